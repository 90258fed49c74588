"""ImageNet-1k (matches `dinov3.data.datasets.image_net`).

Instead of scanning a million files, a table is read: `entries-SPLIT.npy` (class_index, class_id,
actual_index), `class-ids-SPLIT.npy` and `class-names-SPLIT.npy` in `extra`; `dump_extra` makes them.
"""

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset

_ENTRY = np.dtype(
    [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U64")]
)


class _Split(Enum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        return {"train": 1_281_167, "val": 50_000, "test": 100_000}[self.value]

    def get_dirname(self, class_id: str | None = None) -> str:
        return os.path.join(self.value, class_id) if class_id else self.value

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        folder = self.get_dirname(class_id)
        if self is _Split.TRAIN:
            return os.path.join(folder, f"{class_id}_{actual_index}.JPEG")
        return os.path.join(folder, f"ILSVRC2012_{self.value}_{actual_index:08d}.JPEG")

    def parse_image_relpath(self, image_relpath: str) -> tuple[str, int]:
        folder, name = os.path.split(image_relpath)
        stem = os.path.splitext(name)[0]
        return os.path.basename(folder), int(stem.split("_")[-1])


class ImageNet(ExtendedVisionDataset):
    """Images with their class numbers.

    `split`: `ImageNet.Split.TRAIN`, VAL or TEST; `root`: folder with train/CLASS, val/CLASS and
    test; `extra`: folder of the tables.
    """

    Split = _Split

    def __init__(
        self,
        *,
        split: _Split,
        root: str,
        extra: str,
        transforms: Any = None,
        transform: Any = None,
        target_transform: Any = None,
    ) -> None:
        super().__init__(
            root=root, transforms=transforms, transform=transform, target_transform=target_transform
        )
        self._extra_root = extra
        self._split = split
        self._entries: np.ndarray | None = None

    @property
    def split(self) -> _Split:
        return self._split

    def _table(self) -> np.ndarray:
        if self._entries is None:
            path = Path(self._extra_root) / f"entries-{self._split.value.upper()}.npy"
            if not path.is_file():
                raise FileNotFoundError(
                    f"ImageNet must have its table, got no {path}: make it with ImageNet.dump_extra()"
                )
            self._entries = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._entries

    def get_image_relpath(self, index: int) -> str:
        entry = self._table()[index]
        return self._split.get_image_relpath(int(entry["actual_index"]), self.get_class_id(index))

    def get_image_data(self, index: int) -> bytes:
        return (Path(self.root or "") / self.get_image_relpath(index)).read_bytes()

    get_sample_name = get_image_relpath

    def _entry(self, index: int, column: str, kind: Callable[[Any], Any]) -> Any:
        """A value of the table, None for the test part."""
        return None if self._split is _Split.TEST else kind(self._table()[index][column])

    def get_target(self, index: int) -> int | None:
        """Class number, None for the test part."""
        return self._entry(index, "class_index", int)

    def get_targets(self) -> np.ndarray | None:
        return None if self._split is _Split.TEST else self._table()["class_index"]

    def get_class_id(self, index: int) -> str | None:
        """WordNet number."""
        return self._entry(index, "class_id", str)

    def get_class_name(self, index: int) -> str | None:
        return self._entry(index, "class_name", str)

    def __len__(self) -> int:
        return len(self._table())

    def dump_extra(self) -> None:
        """Scan root once and write the tables; class names come from root/labels.txt."""
        root = Path(self.root or "")
        labels = root / "labels.txt"
        lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
        pairs = (line.partition(",") for line in lines)
        names = {class_id.strip(): class_name.strip() for class_id, _, class_name in pairs}
        folder = root / self._split.value
        paths = sorted(folder.rglob("*.JPEG"))
        if not paths:
            raise FileNotFoundError(f"ImageNet must have images, got none in {folder}: check root")
        classes = sorted({path.parent.name for path in paths})
        rows = []
        for path in paths:
            class_id, number = self._split.parse_image_relpath(str(path.relative_to(root)))
            row = (classes.index(class_id), class_id, names.get(class_id, class_id))
            none = (np.iinfo(np.uint32).max, "", "")
            rows.append((number, *(none if self._split is _Split.TEST else row)))
        extra = Path(self._extra_root)
        extra.mkdir(parents=True, exist_ok=True)
        part = self._split.value.upper()
        np.save(extra / f"entries-{part}.npy", np.array(rows, dtype=_ENTRY))
        np.save(extra / f"class-ids-{part}.npy", np.array(classes))
        np.save(extra / f"class-names-{part}.npy", np.array([names.get(c, c) for c in classes]))
        self._entries = None
