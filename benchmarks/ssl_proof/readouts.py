"""What frozen features can do: find nuclei through channels that a probe never saw.

Images are reduced by `SCALE`, the middle of the zooms of the training.  Nothing that is tested on lies in a
part of a field that a training saw; the probe of the real fields is fitted on such parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import data
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from views import tokens, view_numbers

from dinocell.io import read_labels
from dinocell.pairs import find_pairs
from dinocell.probing.backbones import load_backbone_of
from dinocell.probing.decoder_probe import ProbeConfig, probe_features
from dinocell.probing.feature_extraction import normalize_channels
from dinocell.probing.labelled_windows import LabelledWindow, cut_windows, read_windows
from dinocell.training.datasets import spread_evenly

SCALE = 1.4
WINDOW_PX = 96  # of the linear probe, after the reduction
LABEL_SHARES = (1.0, 0.1, 0.01)  # of LABELLED images of dsb2018/train
LABELLED, HELD_OUT = 200, 53
SECTIONS = ("decoder", "decoder_five", "labels", "views")  # of a row, beside the probe
DECODER_CHANNELS = ("DNA", "ER")  # a decoder is trained on each of these and run on all channels


def score(
    teacher: Path | str, root: Path, *, more: bool = True, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All read-outs of one backbone, as plain numbers by unit (field or part of a field).

    `known` has read-outs that are kept as they are; without `more`, only the probe of two domains is made.
    """
    vit = load_backbone_of(teacher).vit
    found: dict[str, Any] = {name: {} for name in ("probe", *SECTIONS)}
    found |= {name: value for name, value in (known or {}).items() if name in found}
    for domain in _domains(more):
        if domain not in found["probe"]:
            found["probe"][domain] = _probe(vit, *_probe_fields(root, domain))
    if more:
        found["decoder"] = found["decoder"] or _decoders(vit)
        found["decoder_five"] = found["decoder_five"] or _decoders_five(vit, root)
        found["labels"] = found["labels"] or _few_labels(vit, root)
        found["views"] = found["views"] or _views(vit, root)
    return found


def is_complete(row: dict[str, Any], *, more: bool = True) -> bool:
    """Does a row of results have every read-out that `score` makes?"""
    sections = SECTIONS if more else ()
    return set(_domains(more)) <= set(row["probe"]) and all(row.get(name) for name in sections)


def _domains(more: bool) -> tuple[str, ...]:
    return ("nf1", "generated", "five") if more else ("nf1", "generated")


def _probe_fields(root: Path, domain: str) -> tuple[list[data.Field], list[data.Field]]:
    """Fields to fit the probe on, and fields to test it on."""
    if domain == "generated":
        return (
            data.generated("probe", data.PROBE_FIELDS, data.TEST_PLATES),
            data.generated("test", data.TEST_FIELDS, data.TEST_PLATES),
        )
    whole = (
        [field for field in data.read_real(root) if field.nuclei is not None]
        if domain == "nf1"
        else _five_channel_fields(root)
    )
    halves = [data.left_and_right(field) for field in whole if field.name != data.UNSEEN]
    unseen = [field for field in whole if field.name == data.UNSEEN]
    return [left for left, _ in halves], [*unseen, *(right for _, right in halves)]


def _five_channel_fields(root: Path) -> list[data.Field]:
    """Real fields with all of `data.CHANNELS`, and the nuclei that dinocell-nuclei found on DNA.

    The labels, of version 4, are kept beside this file, so that all rows have the same truth.  Checked by
    eye: nearly all nuclei of both fields are outlined, touching ones now and then as one; what lies out of
    focus in the middle of `pediatric_BR00143976` is no nucleus.
    """
    found = []
    for field in data.read_real(root):
        if set(data.CHANNELS) <= set(field.channels):
            planes = field.planes[[field.channels.index(name) for name in data.CHANNELS]]
            nuclei = read_labels(Path(__file__).parent / f"nuclei_{field.name}.png")
            found.append(data.Field(field.name, data.CHANNELS, planes, nuclei))
    return found


def _views(vit: nn.Module, root: Path) -> dict[str, Any]:
    """`view_numbers` on what no arm saw of the real fields, and on the generated test fields."""
    real = [
        field if field.name == data.UNSEEN else data.left_and_right(field)[1]
        for field in data.read_real(root)
    ]
    made = data.generated("test", data.TEST_FIELDS, data.TEST_PLATES)
    return {
        domain: {
            "fields": [field.name for field in fields],
            **view_numbers(vit, [(x.name, x.channels, _reduced_planes(x)) for x in fields]),
        }
        for domain, fields in (("real", real), ("generated", made))
    }


def _reduced_planes(field: data.Field) -> NDArray[np.float32]:
    """Normalised planes (C, h, w) in [0, 1], reduced by `SCALE`."""
    height, width = (round(edge / SCALE) for edge in field.planes.shape[1:])
    planes = [
        cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
        for plane in normalize_channels(field.planes)
    ]
    return np.stack(planes)


def _reduced(field: data.Field) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """`_reduced_planes`, and nuclei (h, w) at that scale."""
    assert field.nuclei is not None
    planes = _reduced_planes(field)
    nuclei = field.nuclei.astype(np.uint16)
    size = planes.shape[:0:-1]
    return planes, cv2.resize(nuclei, size, interpolation=cv2.INTER_NEAREST)


def _windows(field: data.Field) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Windows (C, w, w) of the reduced field with the share of nucleus in each patch of 8 px."""
    planes, nuclei = _reduced(field)
    height, width = nuclei.shape
    for top in range(0, height - WINDOW_PX + 1, WINDOW_PX):
        for left in range(0, width - WINDOW_PX + 1, WINDOW_PX):
            part = (slice(top, top + WINDOW_PX), slice(left, left + WINDOW_PX))
            inside = (nuclei[part] > 0).reshape(WINDOW_PX // 8, 8, WINDOW_PX // 8, 8)
            yield planes[:, *part], inside.mean(axis=(1, 3))


def _tokens(vit: nn.Module, images: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Patch tokens of (w, w) images: (images · patches, D)."""
    patches = tokens(vit, images)[1]
    return patches.reshape(-1, patches.shape[-1])


def _probe(
    vit: nn.Module, fitted: list[data.Field], tested: list[data.Field]
) -> dict[str, dict[str, list[float]]]:
    """AUC of a linear probe for nuclei, `[from channel][to channel]`: a number for each unit.

    A unit is a test field or the right part of one; a whole real field has four.  One without nuclei is left
    out.
    """
    channels = fitted[0].channels
    train = [window for field in fitted for window in _windows(field)]
    truth = np.concatenate([share.ravel() for _, share in train])
    sure = (truth < 0.1) | (truth > 0.9)
    probes = []
    for index in range(len(channels)):
        tokens = _tokens(vit, [planes[index] for planes, _ in train])
        probe = make_pipeline(StandardScaler(), RidgeClassifier(10.0, class_weight="balanced"))
        probes.append(probe.fit(tokens[sure], truth[sure] > 0.5))
    found: dict[str, dict[str, list[float]]] = {a: {b: [] for b in channels} for a in channels}
    for field in tested:
        windows = list(_windows(field))
        count = 4 if len(windows) >= 16 else 1
        for unit in np.array_split(np.arange(len(windows)), count):
            share = np.concatenate([windows[place][1].ravel() for place in unit])
            sure = (share < 0.1) | (share > 0.9)
            if len(np.unique(share[sure] > 0.5)) < 2:
                continue  # there is no nucleus, so that the AUC is undefined
            for to, name in enumerate(channels):
                tokens = _tokens(vit, [windows[place][0][to] for place in unit])[sure]
                for start, probe in zip(channels, probes, strict=True):
                    value = roc_auc_score(share[sure] > 0.5, probe.decision_function(tokens))
                    found[start][name].append(float(value))
    return found


def _cut(fields: list[data.Field], channel: int, count: int) -> list[LabelledWindow]:
    """At most `count` windows of each field, seen through a channel."""
    found = []
    for field in fields:
        planes, nuclei = _reduced(field)
        found += cut_windows(field.name, planes[channel], nuclei, window_px=176, count=count)
    return found


def _decoders(vit: nn.Module) -> dict[str, dict[str, float]]:
    """`_cross_channel_ap` on generated fields, which hold one window."""
    fitted = data.generated("probe", 2 * data.PROBE_FIELDS, data.TEST_PLATES)
    tested = data.generated("test", data.TEST_FIELDS, data.TEST_PLATES)
    return _cross_channel_ap(vit, fitted, tested, 1)


def _decoders_five(vit: nn.Module, root: Path) -> dict[str, dict[str, float]]:
    """`_cross_channel_ap` on the two real fields with five channels, from left to right parts."""
    return _cross_channel_ap(vit, *_probe_fields(root, "five"), 8)


def _cross_channel_ap(
    vit: nn.Module, fitted: list[data.Field], tested: list[data.Field], count: int
) -> dict[str, dict[str, float]]:
    """AP at 0.5 of nuclei, `[from channel][to channel]`, of decoders on frozen features."""
    config = ProbeConfig(window_px=176, steps=60, max_seconds=1e6)
    held_out = {name: _cut(tested, index, count) for index, name in enumerate(data.CHANNELS)}
    found = {}
    for start in DECODER_CHANNELS:
        train = _cut(fitted, data.CHANNELS.index(start), count)
        others = {name: windows for name, windows in held_out.items() if name != start}
        result = probe_features(vit, train, held_out[start], config, elsewhere=others)
        scores = {start: result.scores, **result.elsewhere}
        found[start] = {name: scores[name]["ap50"] for name in data.CHANNELS}
    return found


def _few_labels(vit: nn.Module, root: Path) -> dict[str, float]:
    """AP at 0.5 on dsb2018/val of decoders that saw a share of the labelled images."""
    folder = root / "dsb2018"
    sets = {
        part: read_windows(
            find_pairs(folder / part / "images", folder / part / "labels", part),
            window_px=128,
            windows_per_image=1,
            max_images=limit,
        )
        for part, limit in (("train", LABELLED), ("val", HELD_OUT))
    }
    config = ProbeConfig(window_px=128, steps=60, max_seconds=1e6)
    found = {}
    for share in LABEL_SHARES:
        train = spread_evenly(sets["train"], max(2, round(share * LABELLED)))
        found[f"{share:g}"] = probe_features(vit, train, sets["val"], config).scores["ap50"]
    return found
