"""Kinds of errors, their pictures and their table."""

from __future__ import annotations

import csv
import os
import sys

import numpy as np
import pytest
from PIL import Image

from dinocell.cli import main
from dinocell.evaluation.errors import COLORS, draw_errors, find_errors
from dinocell.io import write_image, write_labels

TRUTH = np.zeros((40, 120), np.uint32)
PRED = np.zeros_like(TRUTH)


def _box(labels: np.ndarray, number: int, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    labels[slice(*rows), slice(*columns)] = number


_box(TRUTH, 1, (2, 12), (2, 12))  # found
_box(PRED, 11, (2, 12), (2, 13))
_box(TRUTH, 2, (2, 12), (20, 30))  # missed
_box(PRED, 12, (2, 12), (35, 45))  # false
_box(TRUTH, 3, (2, 12), (50, 60))  # two in one
_box(TRUTH, 4, (2, 12), (60, 70))
_box(PRED, 13, (2, 14), (50, 70))
_box(TRUTH, 5, (20, 30), (2, 22))  # one in two
_box(PRED, 14, (20, 30), (2, 11))
_box(PRED, 15, (20, 30), (13, 22))
_box(TRUTH, 6, (20, 30), (50, 60))  # another outline
_box(PRED, 16, (20, 30), (55, 67))
_box(TRUTH, 7, (20, 30), (80, 90))  # hardly touched: missed, and the other one false
_box(PRED, 17, (20, 30), (89, 105))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def test_kinds_by_hand():
    errors = find_errors(TRUTH, PRED)
    assert {kind: getattr(errors, kind).tolist() for kind in (*COLORS, "blamed")} == {
        "found": [1],
        "missed": [2, 7],
        "false": [12, 17],
        "merged": [3, 4],
        "split": [5],
        "inexact": [6],
        "blamed": [13, 14, 15, 16],
    }
    assert list(errors.counts().values()) == [1, 2, 2, 2, 1, 1]
    assert find_errors(TRUTH, PRED, 0.2).counts()["inexact"] == 0


def test_every_cell_has_one_kind_whatever_the_labels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, pred = (np.kron(rng.integers(0, 9, (6, 6)), np.ones((4, 4), int)) for _ in range(2))
        errors, matched = find_errors(truth, pred), find_errors(pred, truth).found.size
        kinds = [errors.found, errors.missed, errors.merged, errors.split, errors.inexact]
        assert sorted(np.concatenate(kinds)) == sorted(set(truth.ravel()) - {0})
        assert errors.found.size == matched
        num_pred = len(set(pred.ravel()) - {0})
        assert errors.false.size + errors.blamed.size + errors.found.size == num_pred


def test_perfect_and_empty():
    assert find_errors(TRUTH, TRUTH).counts() == dict.fromkeys(COLORS, 0) | {"found": 7}
    nothing = np.zeros_like(TRUTH)
    assert find_errors(nothing, nothing).counts() == dict.fromkeys(COLORS, 0)
    assert find_errors(TRUTH, nothing).counts()["missed"] == 7
    assert find_errors(nothing, PRED).counts()["false"] == 7


def test_borders_have_the_colour_of_their_kind():
    picture = draw_errors(np.zeros(TRUTH.shape), TRUTH, PRED, find_errors(TRUTH, PRED), title="a b")
    repeat = -(-512 // 120)
    assert picture.shape[0] == 40 * repeat + 52

    def color_at(row: int, column: int) -> tuple[int, ...]:
        return tuple(picture[row * repeat, column * repeat].tolist())

    corners = {"found": (2, 2), "missed": (2, 20), "false": (2, 35), "merged": (2, 55)}
    corners |= {"split": (25, 2), "inexact": (25, 50)}
    for kind, (row, column) in corners.items():
        assert color_at(row, column) == COLORS[kind], kind
    last = picture[30 * repeat - 1, 66 * repeat].tolist()
    assert last == [255, 255, 255]  # the predicted outline of the inexact cell
    assert (picture[40 * repeat :] > 100).any()


def test_command_writes_pictures_and_the_worst_image_first(tmp_path, capsys):
    better = np.where(TRUTH == 2, 0, TRUTH)
    for name, pred in (("a", better), ("b", PRED)):
        write_labels(tmp_path / "truth" / f"{name}.png", TRUTH.astype(np.uint16))
        write_labels(tmp_path / "pred" / f"{name}.png", pred.astype(np.uint16))
    folders = ["--pred", str(tmp_path / "pred"), "--truth", str(tmp_path / "truth")]
    assert run("evaluate", *folders, "--errors", str(tmp_path / "out"), "--iou", "0.5") == 0
    text = capsys.readouterr().out
    assert "errors at IoU 0.5: 7 found, 3 missed, 2 false, 2 merged, 1 split, 1 inexact" in text
    with open(tmp_path / "out" / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["errors"]) for row in rows] == [("b", "8"), ("a", "1")]
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.mode == "RGB"
    before = (tmp_path / "out" / "errors.csv").stat().st_ino
    again = ["evaluate", *folders, "--errors", str(tmp_path / "out")]
    assert run(*again, "--iou", "0.9") == 2
    assert (
        "errors.csv, which exists: choose another name, or set --overwrite"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out" / "errors.csv").stat().st_ino == before
    assert run(*again, "--iou", "0.9", "--overwrite") == 0
    assert (tmp_path / "out" / "errors.csv").stat().st_ino != before
    assert run("evaluate", *folders, "--errors", str(tmp_path / "out" / "errors.csv")) == 2
    assert "--errors must be a folder" in capsys.readouterr().err


def test_pictures_of_a_model_show_its_images(tmp_path, capsys, small_model):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (64, 64)).astype(np.uint8)
    labels = np.zeros((64, 64), np.uint16)
    labels[10:30, 10:30] = 1
    write_image(tmp_path / "data" / "images" / "x.png", image)
    write_labels(tmp_path / "data" / "labels" / "x.png", labels)
    small_model.save(tmp_path / "m.safetensors")
    call = ["evaluate", "-m", str(tmp_path / "m.safetensors"), "--data", str(tmp_path / "data")]
    assert run(*call, "--errors", str(tmp_path / "out")) == 0
    assert "pictures: " in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "x.png") as picture:
        gray = np.asarray(picture)[40 * 8 : 63 * 8, 40 * 8 : 63 * 8]
    assert len(np.unique(gray)) > 20  # the image, not black


def test_pictures_never_replace_what_is_compared(tmp_path, capsys):
    for folder in ("truth", "pred", "pictures"):
        write_labels(tmp_path / folder / "a.png", TRUTH.astype(np.uint16))
    before = (tmp_path / "truth" / "a.png").read_bytes()
    call = ["evaluate", "--pred", str(tmp_path / "pred"), "--truth", str(tmp_path / "truth")]
    for folder in ("truth", "pred", "truth/../pred", "truth/labels"):
        errors = ["--errors", str(tmp_path / folder), "--overwrite"]
        assert run(*call, *errors) == 2, folder
        assert "--errors must be another folder" in capsys.readouterr().err
    write_labels(tmp_path / "deep" / "x" / "a.png", TRUTH.astype(np.uint16))
    for folder in ("pictures", "deep"):
        assert run(*call, "--errors", str(tmp_path / folder)) == 2
        assert "a.png, which exists" in capsys.readouterr().err
    for folder in ("truth", "pred", "pictures"):
        assert (tmp_path / folder / "a.png").read_bytes() == before
    model = ["evaluate", "--model", "dinocell-cells", "--data", str(tmp_path)]
    for folder in ("images", "labels"):
        assert run(*model, "--errors", str(tmp_path / folder)) == 2
        assert "--errors must be another folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses such names")
def test_scores_of_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"b\xff.png")
    for folder in ("truth", "pred"):
        write_labels(tmp_path / folder / name, TRUTH.astype(np.uint16))
    call = ["evaluate", "--pred", str(tmp_path / "pred"), "--truth", str(tmp_path / "truth")]
    for ending in ("csv", "json"):
        assert run(*call, "--out", str(tmp_path / f"scores.{ending}")) == 0
        assert "b\\udcff" in (tmp_path / f"scores.{ending}").read_text()
    assert run(*call, "--errors", str(tmp_path / "pictures")) == 0
    assert "b\\udcff" in (tmp_path / "pictures" / "errors.csv").read_text()
