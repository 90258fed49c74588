"""Scores of pairs and of folders, and reports."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinocell.errors import DataSetError, DINOCellError, ImageFileError
from dinocell.evaluation.evaluate import evaluate_folders, evaluate_pairs
from dinocell.evaluation.scores import evaluate_pair, threshold_name

TRUTH = np.zeros((12, 12), np.uint32)
TRUTH[1:5, 1:5] = 1
TRUTH[1:5, 5:9] = 2
TRUTH[7:11, 2:6] = 3
NOTHING = np.zeros_like(TRUTH)

SYMMETRIC = (
    "ap50",
    "ap75",
    "ap90",
    "f1_50",
    "pq50",
    "sq50",
    "boundary_f",
    "pixel_dice",
    "pixel_iou",
)


def equal(left: dict[str, float], right: dict[str, float]) -> bool:
    assert left.keys() == right.keys()
    return all(left[k] == pytest.approx(right[k], abs=1e-12, nan_ok=True) for k in left)


# ------------------------------------------------------------------ one pair


def test_scores_of_two_merged_cells_by_hand() -> None:
    pred = TRUTH.copy()
    pred[pred == 2] = 1
    scores = evaluate_pair(TRUTH, pred, iou_thresholds=(0.4, 0.5, 0.75)).scores()
    assert scores["det"] == pytest.approx(1 - 5 / 30)
    assert scores["seg"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert scores["op_csb"] == pytest.approx((scores["det"] + scores["seg"]) / 2)
    # At 0.5 the merged cell is matched with one of the two (IoU exactly 0.5).
    assert scores["ap40"] == scores["ap50"] == pytest.approx(2 / 3)
    assert scores["ap75"] == pytest.approx(1 / 4)
    assert scores["ap_avg"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 4) / 3)
    assert scores["precision75"] == 1 / 2
    assert scores["recall75"] == 1 / 3
    assert scores["f1_75"] == pytest.approx(2 / 5)
    assert scores["pq50"] == pytest.approx(1.5 / 2.5)
    assert scores["sq50"] == 0.75
    assert scores["aji"] == pytest.approx((16 + 16 + 16) / (32 + 32 + 16))
    assert scores["aji_plus"] == pytest.approx((16 + 16) / (32 + 16 + 16))
    assert scores["pixel_dice"] == scores["pixel_iou"] == 1.0
    assert (scores["count_error"], scores["count_error_abs"]) == (-1, 1)
    assert scores["count_error_rel"] == pytest.approx(-1 / 3)


def test_a_perfect_prediction_scores_1(random_pairs: list) -> None:
    seen = 0
    for truth, _ in random_pairs:
        if not truth.any():
            continue
        seen += 1
        for name, value in evaluate_pair(truth, truth).scores().items():
            if name.startswith("count_error"):
                assert value == 0
            elif name.startswith("boundary") and math.isnan(value):
                assert np.unique(truth).size == 1  # one cell fills the image: no boundary
            else:
                assert value == 1.0, name
    assert seen > 160


def test_numbering_does_not_matter(random_pairs: list) -> None:
    rng = np.random.default_rng(5)
    for truth, pred in random_pairs:
        changed = []
        for labels in (truth, pred):
            ids, index = np.unique(labels, return_inverse=True)
            new = rng.permutation(1000 + ids.size)[: ids.size] + 1
            new[ids == 0] = 0
            changed.append(new[index].reshape(labels.shape))
        before, after = evaluate_pair(truth, pred), evaluate_pair(*changed)
        assert before == after


def test_symmetric_scores_are_symmetric_and_precision_turns_into_recall(random_pairs: list) -> None:
    for truth, pred in random_pairs:
        there, back = evaluate_pair(truth, pred).scores(), evaluate_pair(pred, truth).scores()
        for name in SYMMETRIC:
            assert there[name] == pytest.approx(back[name], abs=1e-12, nan_ok=True)
        for name in ("50", "75", "90"):
            one, other = there[f"precision{name}"], back[f"recall{name}"]
            assert one == pytest.approx(other, nan_ok=True)
        assert there["count_error"] == -back["count_error"]


def test_scores_stay_in_range_and_ap_falls_with_the_threshold(random_pairs: list) -> None:
    for truth, pred in random_pairs:
        scores = evaluate_pair(truth, pred).scores()
        if not (truth.any() or pred.any()):
            continue
        assert scores["ap50"] >= scores["ap75"] >= scores["ap90"]
        assert scores["aji"] <= scores["pixel_iou"] + 1e-12
        for name, value in scores.items():
            assert name.startswith("count_error") or math.isnan(value) or 0 <= value <= 1


@pytest.mark.parametrize(
    ("truth", "pred", "zero", "nan"),
    [
        (NOTHING, NOTHING, ["count_error"], ["ap50", "f1_50", "pq50", "seg", "det", "aji", "pixel_dice", "boundary_f"]),
        (TRUTH, NOTHING, ["ap50", "f1_50", "pq50", "seg", "det", "aji", "pixel_dice", "boundary_f", "recall50"], ["precision50"]),
        (NOTHING, TRUTH, ["ap50", "f1_50", "pq50", "aji", "pixel_dice", "boundary_f", "precision50"], ["recall50", "seg", "det", "op_csb"]),
    ],
    ids=["both empty", "empty prediction", "empty truth"],
)  # fmt: skip
def test_empty_images(truth: np.ndarray, pred: np.ndarray, zero: list[str], nan: list[str]) -> None:
    scores = evaluate_pair(truth, pred).scores()
    assert {name: scores[name] for name in zero} == dict.fromkeys(zero, 0.0)
    assert all(math.isnan(scores[name]) for name in nan)


def test_thresholds_and_tolerance_are_used() -> None:
    pred = np.roll(TRUTH, 1, axis=1)  # every cell keeps 12 of its 16 pixels: IoU 12 / 20
    scores = evaluate_pair(
        TRUTH, pred, iou_thresholds=(0.6, 0.61), boundary_tolerance_px=1
    ).scores()
    assert (scores["ap60"], scores["ap61"]) == (1.0, 0.0)
    assert scores["boundary_f"] == 1.0
    assert "ap50" not in scores
    assert evaluate_pair(TRUTH, pred, boundary_tolerance_px=0).scores()["boundary_f"] < 1


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.1,), (0.5, 0.5), (float("nan"),)])
def test_impossible_thresholds_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"distinct numbers in \(0, 1\]"):
        evaluate_pair(TRUTH, TRUTH, iou_thresholds=thresholds)


def test_threshold_names() -> None:
    assert threshold_name("ap", 0.5) == "ap50"
    assert threshold_name("f1", 0.75) == "f1_75"
    assert threshold_name("ap", 0.625) == "ap62.5"
    assert threshold_name("pq", 0.05) == "pq05"
    assert threshold_name("ap", 1.0) == "ap100"


# ------------------------------------------------------------------ many pairs


def three_images() -> list[tuple[str, np.ndarray, np.ndarray]]:
    missed = TRUTH.copy()
    missed[missed != 1] = 0
    one_cell = np.where(TRUTH == 3, 1, 0).astype(np.uint32)
    return [("a", TRUTH, missed), ("b", one_cell, one_cell), ("c", NOTHING, NOTHING)]


def test_pooled_and_mean_are_what_they_say() -> None:
    report = evaluate_pairs(three_images())
    assert [image.name for image in report.images] == ["a", "b", "c"]
    assert report.pooled["ap50_pooled"] == 2 / 4  # 1 of 3 and 1 of 1 cells
    assert report.mean["ap50_mean"] == pytest.approx((1 / 3 + 1) / 2)  # c is left out
    assert report.pooled["seg_pooled"] == 2 / 4
    assert report.mean["seg_mean"] == pytest.approx((1 / 3 + 1) / 2)
    assert report.pooled["count_error_abs_pooled"] == 2
    assert report.mean["count_error_abs_mean"] == pytest.approx(2 / 3)  # c counts: its error is 0
    assert report.num_empty_images == 1
    names = report.images[0].scores()
    assert list(report.pooled) == [f"{name}_pooled" for name in names]
    assert list(report.mean) == [f"{name}_mean" for name in names]


def test_pooling_equals_one_big_image(random_pairs: list) -> None:
    """Images put side by side, with background and distinct labels between them."""
    rng = np.random.default_rng(8)
    for _ in range(10):
        some = [random_pairs[k] for k in rng.integers(0, len(random_pairs), 4)]
        truths, preds, offset = [], [], 0
        for truth, pred in some:
            rows = 40 - truth.shape[0]
            padding = ((2, rows), (6, 6))
            for labels, out in ((truth, truths), (pred, preds)):
                moved = np.where(labels > 0, labels.astype(np.int64) + offset, 0)
                out.append(np.pad(moved, padding))
            offset += 100_000
        # A cell that touches the border of its image gains a boundary in the big one.
        big = evaluate_pair(np.hstack(truths), np.hstack(preds))
        report = evaluate_pairs((str(k), t, p) for k, (t, p) in enumerate(some))
        for name, value in big.scores().items():
            if not name.startswith(("boundary", "count_error_abs")):
                assert report.pooled[f"{name}_pooled"] == pytest.approx(value, nan_ok=True)


def test_only_empty_images_give_nan_without_a_warning() -> None:
    report = evaluate_pairs([("x", NOTHING, NOTHING)])
    assert math.isnan(report.mean["ap50_mean"])
    assert math.isnan(report.pooled["ap50_pooled"])
    assert report.mean["count_error_mean"] == 0


def test_options_of_many_pairs_are_used() -> None:
    report = evaluate_pairs(three_images(), iou_thresholds=(0.9, 0.3), boundary_tolerance_px=5)
    assert report.iou_thresholds == (0.3, 0.9)
    assert report.boundary_tolerance_px == 5
    assert "ap30_pooled" in report.pooled
    near = evaluate_pairs([("a", TRUTH, np.roll(TRUTH, 1, 0))], boundary_tolerance_px=0)
    far = evaluate_pairs([("a", TRUTH, np.roll(TRUTH, 1, 0))], boundary_tolerance_px=1)
    assert near.pooled["boundary_f_pooled"] < far.pooled["boundary_f_pooled"]


def test_wrong_pairs() -> None:
    with pytest.raises(
        DataSetError, match="of 'cell7' must have the same size, got 12 × 12 and 12 × 10"
    ):
        evaluate_pairs([("cell7", TRUTH, TRUTH[:, :10])])
    with pytest.raises(DataSetError, match="at least one pair"):
        evaluate_pairs([])


# ------------------------------------------------------------------ files and tables


def test_csv_holds_one_row_per_image(tmp_path: Path) -> None:
    report = evaluate_pairs(three_images())
    path = tmp_path / "new folder" / "scores.csv"
    report.to_csv(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert (rows[0]["num_truth"], rows[0]["num_pred"], rows[0]["tp50"]) == ("3", "1", "1")
    assert (rows[0]["fn50"], rows[0]["fp50"], rows[0]["det_missed"]) == ("2", "0", "2")
    assert float(rows[0]["ap50"]) == 1 / 3
    assert rows[2]["ap50"] == "nan"
    assert [file.name for file in path.parent.iterdir()] == ["scores.csv"]


def test_json_holds_everything_and_is_strict(tmp_path: Path) -> None:
    report = evaluate_pairs(three_images())
    path = tmp_path / "scores.json"
    report.to_json(path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["pooled"]["ap50_pooled"] == 0.5
    assert document["mean"]["ap50_mean"] == report.mean["ap50_mean"]
    assert document["images"][2]["ap50"] is None
    assert document["intervals"]["ap50_pooled"] == list(report.intervals["ap50_pooled"])
    assert document["totals"]["tp50"] == 2
    assert (document["num_images"], document["num_empty_images"]) == (3, 1)
    assert document["iou_thresholds"] == [0.5, 0.75, 0.9]


@pytest.mark.parametrize("method", ["to_csv", "to_json"])
def test_a_failing_write_leaves_the_old_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(csv.DictWriter, "writerows", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(DINOCellError, match=r"scores' cannot be written \(disk full\)"):
        getattr(evaluate_pairs(three_images()), method)(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["scores"]


def test_table_says_which_number_is_which() -> None:
    report = evaluate_pairs(three_images())
    lines = report.table()
    assert lines[0] == "3 images, 4 true cells, 2 predicted cells"
    assert lines[1].split() == ["score", "pooled", "95", "%", "interval", "mean", "over", "images"]
    row = next(line for line in lines if line.startswith("ap50"))
    assert row.split() == ["ap50", "0.5000", "0.333", "to", "1.000", "0.6667"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1].endswith("except of the count error: 1 of 3")
    assert not any(line.split()[0] == "a" for line in lines)


def test_table_per_image_and_its_columns() -> None:
    report = evaluate_pairs(three_images())
    lines = report.table(per_image=True)
    assert lines[0].split()[:5] == ["name", "num_truth", "num_pred", "seg", "det"]
    assert lines[3].split()[:4] == ["c", "0", "0", "-"]
    assert lines[4] == ""
    table = dict(zip(lines[0].split(), lines[1].split(), strict=True))
    assert (table["name"], table["ap50"], table["num_truth"]) == ("a", "0.3333", "3")
    report = evaluate_pairs(three_images(), iou_thresholds=[0.4, 0.45, 0.5, 0.55, 0.6, 0.75])
    assert report.table(per_image=True)[0].split()[6:] == [
        *("ap50", "ap75", "f1_50", "pq50", "aji", "boundary_f"),
    ]
    report = evaluate_pairs(three_images(), iou_thresholds=[0.3, 0.35, 0.4, 0.45])
    assert report.table(per_image=True)[0].split()[6:10] == ["ap30", "ap35", "ap40", "f1_30"]


# ------------------------------------------------------------------ folders


def write_labels(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(labels.astype(np.uint16)).save(path)
    else:
        tifffile.imwrite(path, labels)


def test_folders_of_files_give_the_scores_of_their_arrays(tmp_path: Path) -> None:
    pairs = three_images()
    for name, truth, pred in pairs:
        write_labels(tmp_path / "t" / f"{name}.png", truth)
        write_labels(tmp_path / "p" / f"{name}_labels.tif", pred + np.where(pred > 0, 70_000, 0))
    report = evaluate_folders(tmp_path / "p", tmp_path / "t")
    assert report == evaluate_pairs(pairs)
    with_options = evaluate_folders(
        tmp_path / "p", tmp_path / "t", iou_thresholds=(0.2,), boundary_tolerance_px=0.0
    )
    assert with_options == evaluate_pairs(pairs, iou_thresholds=(0.2,), boundary_tolerance_px=0.0)


def test_projects_of_other_programs_give_the_scores_of_their_labels(tmp_path: Path) -> None:
    pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    from dinocell.results.imagej_rois import write_imagej_rois

    truth = np.zeros((8, 9), np.uint32)
    truth[1:4, 1:5], truth[5:7, 2:8] = 1, 2
    pred = np.where(truth == 1, 1, 0).astype(np.uint32)
    for folder in ("truth", "pred", "zips"):
        (tmp_path / folder).mkdir()
    write_labels(tmp_path / "truth" / "a.png", truth)
    write_imagej_rois(tmp_path / "truth" / "b_RoiSet.zip", truth)
    write_imagej_rois(tmp_path / "pred" / "a_RoiSet.zip", pred)
    np.save(tmp_path / "pred" / "b_seg.npy", {"masks": pred}, allow_pickle=True)
    report = evaluate_folders(tmp_path / "pred", tmp_path / "truth")
    assert [image.name for image in report.images] == ["a", "b"]
    expected = evaluate_pair(truth, pred).scores()
    assert all(equal(image.scores(), expected) for image in report.images)
    write_imagej_rois(tmp_path / "zips" / "b.zip", pred)
    (tmp_path / "truth" / "a.png").unlink()
    with pytest.raises(DataSetError, match="a zip of ROIs does not say how large its image is"):
        evaluate_folders(tmp_path / "zips", tmp_path / "truth")


def test_missing_predictions_count_as_empty_and_are_reported(tmp_path: Path) -> None:
    for name, truth, _ in three_images():
        write_labels(tmp_path / "t" / f"{name}.png", truth)
    write_labels(tmp_path / "p" / "b.png", three_images()[1][2])
    report = evaluate_folders(tmp_path / "p", tmp_path / "t", allow_missing_predictions=True)
    assert report.pooled["ap50_pooled"] == 1 / 4
    assert report.missing_predictions == ("a", "c")
    assert any(line.endswith("images without any found cell: 2") for line in report.table())


def test_notes_on_the_files_are_in_the_report(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    for folder, name in (("t", "a"), ("p", "a"), ("t", "b"), ("p", "b")):
        path = tmp_path / folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        turned = name == "a" or folder == "p"
        Image.fromarray(TRUTH.astype(np.uint16)).save(path, **({"exif": exif} if turned else {}))
    report = evaluate_folders(tmp_path / "p", tmp_path / "t")
    note = "The file states that its picture is turned (orientation 3): it was turned upright"
    assert report.notes == {
        "a": (f"truth: {note}", f"prediction: {note}"),
        "b": (f"prediction: {note}",),
    }
    assert f"note: a: truth: {note}; prediction: {note}" in report.table()
    report.to_json(tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["images"]
    assert [row["warnings"] for row in rows] == ["; ".join(report.notes[name]) for name in "ab"]


def test_files_of_other_size_or_kind(tmp_path: Path) -> None:
    write_labels(tmp_path / "t" / "a.png", TRUTH)
    write_labels(tmp_path / "p" / "a.png", TRUTH[:7])
    with pytest.raises(
        DataSetError, match="of 'a' must have the same size, got 12 × 12 and 7 × 12"
    ):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    (tmp_path / "p" / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageFileError, match=r"a\.png"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")


@pytest.mark.parametrize("wrong", ["pred", "truth"])
def test_masks_in_place_of_labels(tmp_path: Path, wrong: str) -> None:
    labels = np.kron(np.arange(12).reshape(3, 4) + 1, np.pad(np.ones((6, 6), int), 2))
    for folder in ("pred", "truth"):
        write_labels(tmp_path / folder / "a.png", labels > 0 if folder == wrong else labels)
    with pytest.raises(
        DataSetError, match=rf"{wrong}/a\.png', which looks like a mask: its 12 separate"
    ):
        evaluate_folders(tmp_path / "pred", tmp_path / "truth")


def test_real_labels_against_themselves(data_dir: Path) -> None:
    folder = data_dir / "bbbc039" / "edge_cases"
    report = evaluate_folders(folder, folder)
    assert len(report.images) == report.num_empty_images == 3
    yeast = data_dir / "ctc" / "yeast_baby" / "01_GT"
    report = evaluate_folders(yeast / "TRA", yeast / "SEG")
    assert report.pooled["op_csb_pooled"] == 1.0
    assert len(report.images) == 5
