r"""Datasets by name, the strings that name them, and what all do with a sample (ours).

`Name:key=value:...` as upstream's, with more names and with more keys than root, extra and split.
A part without "=" belongs to the value before it, so that /data/10:30:00 is a path; \: is a colon
anywhere.  A value may have "=" and start with "~", the home folder.
"""

import importlib
import inspect
import os
import re
from typing import Any

from dinov3.cells.checks import one_of

# Name in a dataset string → "module:class", imported on first use.
DATASETS: dict[str, str] = {
    "ImageFolder": "dinov3.cells.image_folder:ImageFolder",
    "JUMPCellPainting": "dinov3.data.datasets.jump_cellpainting:JUMPCellPainting",
    "JUMPCellPaintingMultiView": "dinov3.data.datasets.jump_cellpainting:JUMPCellPaintingMultiView",
    "JUMPS3Dataset": "dinov3.data.datasets.jump_s3:JUMPS3Dataset",
    "JUMPS3MultiView": "dinov3.data.datasets.jump_s3:JUMPS3MultiView",
}
_COMMON_KEYS: dict[str, type] = {"root": str, "extra": str, "split": str}


class DatasetKeyError(ValueError, AssertionError):
    """A dataset string has a key that the dataset does not know (upstream: AssertionError)."""


class DatasetSplitError(ValueError, KeyError):
    """A dataset string has a split that the dataset does not have (upstream: KeyError)."""

    __str__ = Exception.__str__


def register_dataset(name: str, address: str) -> None:
    """Make a class known to dataset strings.

    `address`: "module:class".  A class may declare `STRING_OPTIONS`, option → type, beyond root,
    extra and split.  Raises ValueError (not of that form, or the name cannot stand in a dataset
    string).
    """
    module, _, attribute = address.partition(":")
    if not module or not attribute.isidentifier() or not name or {":", "="} & set(name):
        raise ValueError(
            f"A dataset must be registered as a name without ':' and '=' and as 'module:Class', got "
            f"{name!r} and {address!r}: correct both"
        )
    DATASETS[name] = address


def parse_dataset_str(dataset_str: str) -> tuple[type, dict[str, Any]]:
    """`Name:key=value:...` → class and arguments; of a key given twice the last counts.

    Raises ValueError (unknown name, key, split or type).
    """
    name, *tokens = _parts(dataset_str)
    one_of("The name in a dataset string", name, DATASETS)
    module, _, attribute = DATASETS[name].partition(":")
    class_ = getattr(importlib.import_module(module), attribute)
    known = {**_COMMON_KEYS, **getattr(class_, "STRING_OPTIONS", {})}
    kwargs: dict[str, Any] = {}
    for token in tokens:
        key, equals, value = token.partition("=")
        if not equals:
            raise ValueError(
                f"A dataset string must be Name:key=value:..., got {token!r} in {dataset_str!r}: "
                "write key=value"
            )
        if key not in known:
            raise DatasetKeyError(
                f"Keys of {name} must be among {', '.join(known)}, got {key!r}: correct the string"
            )
        kwargs[key] = _typed(name, key, value, known[key])
    splits = getattr(class_, "Split", None)
    if splits is not None and "split" in kwargs:
        one_of(f"The split of {name}", kwargs["split"], splits.__members__, DatasetSplitError)
        kwargs["split"] = splits[kwargs["split"]]
    return class_, kwargs


def _parts(dataset_str: str) -> list[str]:
    """The name and each key=value."""
    parts: list[str] = []
    for part in re.split(r"(?<!\\):", dataset_str):
        text = part.replace("\\:", ":")
        if len(parts) > 1 and "=" not in part:
            parts[-1] += f":{text}"
        else:
            parts.append(text)
    return parts


def transformed(data: Any, image: Any, target: Any) -> tuple[Any, Any]:
    """A sample after the data set's transforms; upstream's base class has no method for it."""
    if data.transforms is not None:
        return data.transforms(image, target)
    if data.transform is not None:
        image = data.transform(image)
    if data.target_transform is not None:
        target = data.target_transform(target)
    return image, target


def check_needed(dataset_str: str, class_: type, kwargs: dict[str, Any]) -> None:
    """Refuse a string without a key that its class cannot do without.

    Raises ValueError (names the missing keys).
    """
    needed = [
        parameter.name
        for parameter in inspect.signature(class_).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    ]
    if missing := [key for key in needed if key not in kwargs]:
        raise ValueError(
            f"{dataset_str.partition(':')[0]} must have {', '.join(needed)}, got a string without "
            f"{', '.join(missing)}: add ':{missing[0]}=...' to {dataset_str!r}"
        )


def _typed(name: str, key: str, value: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if kind is str and value.startswith("~/"):
            return os.path.expanduser(value)
        return kind(value)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{key} of {name} must be of type {kind.__name__}, got {value!r}: correct the string"
        ) from error
