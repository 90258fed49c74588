"""Where an evaluation went wrong: each cell's kind of error, a picture an image, a table of all."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import UsageError
from dinocell.evaluation.matching import OverlapTable, match, overlap_table
from dinocell.labels import as_labels, cell_borders
from dinocell.results.captions import fitted, load_font, plain_text
from dinocell.results.pictures import to_display, write_png
from dinocell.results.table import CellTable, align_columns

COLORS = {
    "found": (70, 160, 90),
    "missed": (255, 60, 60),
    "false": (255, 225, 50),
    "merged": (255, 80, 255),
    "split": (60, 220, 255),
    "inexact": (255, 150, 40),
}
"""Kinds of cells and the colours of their borders in a picture."""

_INSIDE = 0.5  # share of a cell that lies in another one where cells are merged or split
_TOUCHED_IOU = 0.1  # below it, a cell that was not found counts as missed, not as inexact
_MIN_PICTURE_PX, _CAPTION_PX = 512, 26


@dataclass(frozen=True)
class CellErrors:
    """Labels of the cells of each kind; every true cell and every predicted cell has one.

    `found`, `missed`, `merged`, `split` and `inexact` are true cells: matched at the IoU threshold; not
    there; together in one predicted cell, each with half of its area; cut, so that two predicted
    cells lie in it with half of theirs; there with another outline.  `false` are predicted cells that
    meet none of these, `blamed` those behind merged, split and inexact ones.
    """

    found: NDArray[Any]
    missed: NDArray[Any]
    merged: NDArray[Any]
    split: NDArray[Any]
    inexact: NDArray[Any]
    false: NDArray[Any]
    blamed: NDArray[Any]

    def counts(self) -> dict[str, int]:
        """Number of cells of each kind of `COLORS`."""
        return {kind: int(getattr(self, kind).size) for kind in COLORS}


def find_errors(truth: ArrayLike, pred: ArrayLike, iou_threshold: float = 0.5) -> CellErrors:
    """The kind of every cell of two (H, W) label images.

    Raises TypeError, ValueError (as for `overlap_table` and `match`).
    """
    table = overlap_table(truth, pred)
    pairs = match(table, iou_threshold)
    found, matched = _marked(table.num_truth), _marked(table.num_pred)
    found[table.truth_index[pairs]] = True
    matched[table.pred_index[pairs]] = True
    merged = ~found & _shares(table, of_truth=True)
    split = ~found & ~merged & _shares(table, of_truth=False)
    best = np.zeros(table.num_truth)
    np.maximum.at(best, table.truth_index, table.iou)
    inexact = ~found & ~merged & ~split & (best >= _TOUCHED_IOU)
    wrong = (merged | split | inexact)[table.truth_index] & (
        np.maximum(_share_of_truth(table), _share_of_pred(table)) >= _TOUCHED_IOU
    )
    blamed = _marked(table.num_pred)
    blamed[table.pred_index[wrong]] = True
    return CellErrors(
        found=table.truth_ids[found],
        missed=table.truth_ids[~found & ~merged & ~split & ~inexact],
        merged=table.truth_ids[merged],
        split=table.truth_ids[split],
        inexact=table.truth_ids[inexact],
        false=table.pred_ids[~matched & ~blamed],
        blamed=table.pred_ids[~matched & blamed],
    )


def _marked(size: int) -> NDArray[np.bool_]:
    return np.zeros(size, dtype=bool)


def _share_of_truth(table: OverlapTable) -> NDArray[np.float64]:
    return table.intersection / table.truth_areas[table.truth_index]


def _share_of_pred(table: OverlapTable) -> NDArray[np.float64]:
    return table.intersection / table.pred_areas[table.pred_index]


def _shares(table: OverlapTable, *, of_truth: bool) -> NDArray[np.bool_]:
    """True cells that share a predicted one, or (`of_truth` False) that two predicted ones share."""
    share = _share_of_truth(table) if of_truth else _share_of_pred(table)
    inside = share >= _INSIDE
    truth_index, pred_index = table.truth_index[inside], table.pred_index[inside]
    marked = _marked(table.num_truth)
    if of_truth:
        together = np.bincount(pred_index, minlength=table.num_pred) >= 2
        marked[truth_index[together[pred_index]]] = True
    else:
        marked[np.bincount(truth_index, minlength=table.num_truth) >= 2] = True
    return marked


def draw_errors(
    image: ArrayLike, truth: ArrayLike, pred: ArrayLike, errors: CellErrors, *, title: str = ""
) -> NDArray[np.uint8]:
    """RGB picture of an image (H, W) with the border of each cell in the colour of its kind.

    Found cells show their true border.  Beside the true border of the others the predicted one is
    white.  Below stand the colours with their counts, above them the title.
    """
    truth, pred = as_labels(truth), as_labels(pred)
    picture = to_display(image)
    repeat = max(1, -(-_MIN_PICTURE_PX // max(1, *picture.shape[:2])))
    picture, truth, pred = (
        np.repeat(np.repeat(array, repeat, 0), repeat, 1) for array in (picture, truth, pred)
    )
    picture = picture // 2 + 30  # borders must stand out from bright cells
    picture[cell_borders(truth) & np.isin(truth, errors.found)] = COLORS["found"]
    picture[cell_borders(pred) & np.isin(pred, errors.blamed)] = (255, 255, 255)
    for kind in ("inexact", "split", "merged", "missed"):
        borders = cell_borders(truth) & np.isin(truth, getattr(errors, kind))
        picture[borders] = COLORS[kind]
    picture[cell_borders(pred) & np.isin(pred, errors.false)] = COLORS["false"]
    return _with_caption(picture, title, errors.counts())


def _with_caption(
    picture: NDArray[np.uint8], title: str, counts: dict[str, int]
) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    font = load_font(14)
    texts = [(f"{count} {kind}", COLORS[kind]) for kind, count in counts.items()]
    width = max(picture.shape[1], 16 + int(sum(font.getlength(text) + 14 for text, _ in texts)))
    page = np.zeros((picture.shape[0] + 2 * _CAPTION_PX, width, 3), np.uint8)
    page[: picture.shape[0], : picture.shape[1]] = picture
    drawn = Image.fromarray(page)
    draw = ImageDraw.Draw(drawn)
    top, left = picture.shape[0] + 4, 8.0
    draw.text((left, top), fitted(plain_text(title), font, width - 16), font=font, fill=(235,) * 3)
    for text, color in texts:
        draw.text((left, top + _CAPTION_PX), text, font=font, fill=color)
        left += font.getlength(text) + 14
    return np.asarray(drawn)


@dataclass
class ErrorPictures:
    """Pictures and `errors.csv` of an evaluation in one folder.

    The folder is made when the first picture is written.  Raises UsageError where it exists as a file.
    """

    folder: Path
    iou_threshold: float = 0.5
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(
                f"`errors` must be a folder, got the file {self.folder}: name another one"
            )

    def add(self, name: str, image: ArrayLike, truth: ArrayLike, pred: ArrayLike) -> None:
        """Write NAME.png and remember the image's counts."""
        errors = find_errors(truth, pred, self.iou_threshold)
        picture = draw_errors(image, truth, pred, errors, title=name)
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture)
        counts = errors.counts()
        total = sum(counts.values()) - counts["found"]
        self.rows.append({"image": name, "errors": total, **counts})

    def finish(self) -> str:
        """Write `errors.csv`, the worst image first; returns the totals as text."""
        self.rows.sort(key=lambda row: -row["errors"])
        columns = {name: np.array([row[name] for row in self.rows]) for name in self.rows[0]}
        CellTable(columns).to_csv(self.folder / "errors.csv")
        totals = {kind: sum(row[kind] for row in self.rows) for kind in COLORS}
        shown = [["image", "errors", *COLORS]]
        shown += [[str(value) for value in row.values()] for row in self.rows[:5]]
        text = ", ".join(f"{count} {kind}" for kind, count in totals.items())
        lines = [f"errors at IoU {self.iou_threshold:g}: {text}", "the worst images:"]
        return "\n".join([*lines, *align_columns(shown), f"pictures: {os.fspath(self.folder)}"])
