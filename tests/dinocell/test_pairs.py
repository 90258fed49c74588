"""Images and label files are paired by one rule, which every command uses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dinocell.errors import DataSetError
from dinocell.pairs import find_pairs, pair_folders


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def paired(pred: Path, truth: Path, **options: bool) -> dict[str, tuple[str | None, str]]:
    pairs = pair_folders(pred, truth, **options)
    assert [name for name, _, _ in pairs] == sorted(name for name, _, _ in pairs)
    return {name: (p.name if p else None, t.name) for name, p, t in pairs}


def with_images(images: Path, labels: Path) -> dict[str, str]:
    return {pair.image_path.name: pair.labels_path.name for pair in find_pairs(images, labels)}


@pytest.mark.parametrize(
    "ending", ["", "_labels", "_label", "_masks", "_mask", "_cp_masks", "_seg", "_mask_labels"]
)
def test_the_ending_of_a_label_file_does_not_count(tmp_path, ending):
    images = touch(tmp_path / "i", "a.tif", "b.ome.tif")
    labels = touch(tmp_path / "l", f"a{ending}.png", f"b{ending}.ome.TIF")
    assert with_images(images, labels) == {
        "a.tif": f"a{ending}.png",
        "b.ome.tif": f"b{ending}.ome.TIF",
    }
    assert paired(images, labels) == {
        "a": ("a.tif", f"a{ending}.png"),
        "b": ("b.ome.tif", f"b{ending}.ome.TIF"),
    }


def test_every_command_agrees(tmp_path, monkeypatch):
    """A name that scores in one command trains and scores in the others; so does a refusal."""
    from dinocell.evaluation import model_evaluation
    from dinocell.evaluation.evaluate import evaluate_folders
    from dinocell.io import read_image, write_image, write_labels
    from dinocell.network.config import ModelConfig
    from dinocell.pipeline import Judgement, LoadedImage
    from dinocell.probing.labelled_channels import find_channel_pairs
    from dinocell.segmentation.thresholds import Thresholds
    from dinocell.training.config import DataConfig, DatasetConfig
    from dinocell.training.datasets import split_pairs

    class Pipeline:
        """Finds no cell, without a network."""

        def __init__(self, model, **_):
            self.model, self.thresholds = model, Thresholds.of(ModelConfig())

        def load(self, path, **_):
            return LoadedImage(read_image(path).pixels, None, None, None)

        def predict(self, loaded):
            return np.zeros(loaded.plane.shape, np.float32)

        def judge(self, loaded):
            return Judgement((), None, "", self.thresholds)

    monkeypatch.setattr(model_evaluation, "DINOCellPipeline", Pipeline)
    model = SimpleNamespace(config=ModelConfig(), statistics=None)
    monkeypatch.setattr(model_evaluation, "load_model", lambda *_, **__: model)
    data = tmp_path / "sets" / "set"
    images, labels = data / "images", data / "labels"
    image = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    truth = np.zeros((32, 32), np.uint16)
    truth[4:20, 4:20] = 1
    for name in ("a", "b"):
        write_image(images / f"{name}.tif", image)
        write_labels(labels / f"{name}_masks.png", truth)
        write_labels(tmp_path / "pred" / f"{name}_labels.tif", truth)
    config = DataConfig(datasets=(DatasetConfig("set", str(images), str(labels)),))
    commands = [
        lambda: len(evaluate_folders(tmp_path / "pred", labels).images),
        lambda: len(
            model_evaluation.evaluate_model("m.safetensors", data, shown=False).report.images
        ),
        lambda: sum(map(len, split_pairs(config, seed=0))),
        lambda: len(find_channel_pairs(tmp_path / "sets")["set"]),
    ]
    assert [command() for command in commands] == [2, 2, 2, 2]
    write_labels(labels / "a_seg.tif", truth)
    for command in commands:
        with pytest.raises(DataSetError, match=r"'a_masks.png' and 'a_seg.tif' for 'a'"):
            command()


def test_results_beside_their_images_are_found(tmp_path):
    pred = touch(tmp_path / "p", "a_labels.tif", "a_labels.png", "a_overlay.png", "a_cells.csv")
    touch(pred, "b_labels.tif", "b_overlay.png", "report.html", ".a_labels.tif", "b.png")
    truth = touch(tmp_path / "t", "a.png", "b.png", "README.md")
    assert paired(pred, truth) == {"a": ("a_labels.tif", "a.png"), "b": ("b_labels.tif", "b.png")}
    with pytest.raises(DataSetError, match=r"'a_labels.png' and 'a_labels.tif' for 'a'"):
        find_pairs(truth, pred)  # one of them may have been corrected
    with pytest.raises(DataSetError, match=r"'a_labels.tif' and 'a_labels.png' for 'a'"):
        pair_folders(truth, pred)
    (pred / "a_labels.png").unlink()
    with pytest.raises(DataSetError, match=r"'b.png' and 'b_labels.tif' for 'b'"):
        find_pairs(truth, pred)
    (pred / "b.png").unlink()
    assert with_images(truth, pred) == {"a.png": "a_labels.tif", "b.png": "b_labels.tif"}


def test_images_and_labels_may_lie_in_one_folder(tmp_path):
    data = touch(tmp_path / "d", "a.tif", "a_masks.tif", "b.jpg", "b_seg.png", "b_overlay.png")
    touch(data, "a_seg.npy", "t007.tif", "man_seg007.tif")
    (tmp_path / "link").symlink_to(data)
    for labels in (data, tmp_path / "link"):
        assert with_images(data, labels) == {
            "a.tif": "a_masks.tif",
            "b.jpg": "b_seg.png",
            "t007.tif": "man_seg007.tif",
        }
    touch(data, "c.tif")
    with pytest.raises(DataSetError, match=r"1 without a partner \(c\)"):
        find_pairs(data, data)
    touch(data, "c_masks.png", "c_labels.png")
    with pytest.raises(DataSetError, match=r"'c_labels.png' and 'c_masks.png' for 'c'"):
        find_pairs(data, data)


def test_no_image_is_its_own_label_file(tmp_path):
    from dinocell.training.config import DataConfig, DatasetConfig
    from dinocell.training.datasets import split_pairs

    images = touch(tmp_path / "i", "a.tif", "b.tif")
    config = DataConfig(datasets=(DatasetConfig("set", str(images), str(images)),))
    with pytest.raises(DataSetError, match=r"2 without a partner \(a, b\)"):
        split_pairs(config, seed=0)
    labels = touch(tmp_path / "l", "b.tif")
    (labels / "a.tif").symlink_to(images / "a.tif")
    with pytest.raises(DataSetError, match=r"must be two files, got '.*a\.tif' for both"):
        find_pairs(images, labels)


def test_each_image_of_a_mixed_folder_decides_for_itself(tmp_path):
    images = touch(tmp_path / "i", "a.tif", "b.tif")
    labels = touch(tmp_path / "l", "a.tif", "b_masks.tif", "b_overlay.png")
    assert with_images(images, labels) == {"a.tif": "a.tif", "b.tif": "b_masks.tif"}
    touch(labels, "a_masks.tif")
    with pytest.raises(DataSetError, match=r"'a.tif' and 'a_masks.tif' for 'a'"):
        find_pairs(images, labels)


def test_results_of_dinocell_are_no_images(tmp_path):
    images = touch(tmp_path / "i", "a.tif", "a_overlay.png", "a_labels.tif", "notes.txt")
    assert with_images(images, touch(tmp_path / "l", "a.png")) == {"a.tif": "a.png"}
    touch(tmp_path / "i", "b_labels.tif")  # an image all the same, if a label file has its name
    touch(tmp_path / "l", "b_labels.png")
    assert with_images(images, tmp_path / "l") == {"a.tif": "a.png", "b_labels.tif": "b_labels.png"}


def test_cellpose_project_files_are_no_labels(tmp_path):
    pred = touch(tmp_path / "p", "a.tif", "a_cp_masks.png", "a_seg.npy", "a_flows.tif")
    assert paired(pred, touch(tmp_path / "t", "a.npy")) == {"a": ("a_cp_masks.png", "a.npy")}


def test_an_image_whose_name_has_an_ending_takes_the_labels_of_its_name(tmp_path):
    images = touch(tmp_path / "i", "a.tif", "a_mask.tif", "t007.tif", "007.tif")
    labels = touch(tmp_path / "l", "a_mask.png", "a_labels.png", "t007_labels.png", "007_mask.png")
    with pytest.raises(DataSetError, match=r"'007_mask.png' and 't007_labels.png' for '007'"):
        find_pairs(images, labels)
    for path in (images / "007.tif", labels / "007_mask.png"):
        path.unlink()
    assert with_images(images, labels) == {
        "a.tif": "a_labels.png",
        "a_mask.tif": "a_mask.png",
        "t007.tif": "t007_labels.png",
    }


def test_challenge_layout(tmp_path):
    pred = touch(tmp_path / "01_RES", "mask000.tif", "mask001.tif", "res_track.txt")
    truth = touch(tmp_path / "01_GT" / "SEG", "man_seg000.tif", "man_seg001.tif")
    assert paired(pred, truth) == {
        "000": ("mask000.tif", "man_seg000.tif"),
        "001": ("mask001.tif", "man_seg001.tif"),
    }
    markers = touch(tmp_path / "01_GT" / "TRA", "man_track000.tif", "man_track001.tif")
    ours = touch(tmp_path / "ours", "t000_labels.tif", "t001_labels.tif")
    assert paired(ours, markers)["001"] == ("t001_labels.tif", "man_track001.tif")
    images = touch(tmp_path / "01", "t000.tif", "t001.tif")
    assert with_images(images, truth) == {
        "t000.tif": "man_seg000.tif",
        "t001.tif": "man_seg001.tif",
    }


def test_a_data_set_folder_stands_for_its_labels(tmp_path):
    truth = tmp_path / "test"
    touch(truth / "labels", "a.png")
    touch(truth / "images", "a.png")
    pred = touch(tmp_path / "p", "a.png")
    assert pair_folders(pred, truth) == [("a", pred / "a.png", truth / "labels" / "a.png")]


def test_projects_are_compared_where_a_label_image_is_absent(tmp_path):
    pred = touch(tmp_path / "p", "a_seg.npy", "b_RoiSet.zip", "c.tif", "c.zip", "raw images.zip")
    truth = touch(tmp_path / "t", "a_labels.png", "b_labels.png", "c_seg.npy", "d.zip")
    assert paired(pred, truth) == {
        "a": ("a_seg.npy", "a_labels.png"),
        "b": ("b_RoiSet.zip", "b_labels.png"),
        "c": ("c.tif", "c_seg.npy"),
    }
    both = touch(tmp_path / "both", "b_seg.npy", "b.zip")
    assert paired(both, touch(tmp_path / "t2", "b_rois.zip")) == {"b": ("b_seg.npy", "b_rois.zip")}
    with pytest.raises(DataSetError, match=r"'b.zip' and 'b_RoiSet.zip' for 'b'"):
        paired(touch(both, "b_RoiSet.zip"), truth)


def test_names_without_a_partner_are_named(tmp_path):
    pred = touch(tmp_path / "p", "a.png", "x.png", "y.png")
    truth = touch(tmp_path / "t", "a.png", *(f"b{k}.png" for k in range(7)))
    with pytest.raises(DataSetError) as error:
        pair_folders(pred, truth)
    message = str(error.value)
    assert "true label images without a prediction: 7 (b0, b1, b2, b3, b4, ...)" in message
    assert "predictions without a true label image: 2 (x, y)" in message
    assert "give both files of a pair the same name" in message
    with pytest.raises(DataSetError, match=r"9 without a partner \(x, y, b0, b1, b2, \.\.\.\)"):
        find_pairs(pred, truth, "mine")


def test_a_file_left_aside_because_another_has_an_ending_is_named(tmp_path):
    pred = touch(tmp_path / "p", "a_labels.tif", "b_labels.tif")
    truth = touch(tmp_path / "t", "a_labels.tif", "b.png", "c.png")
    with pytest.raises(
        DataSetError, match=r"label image: 1 \(b\), left aside, .*: 1 \(b.png\): give"
    ):
        pair_folders(pred, truth)
    touch(truth, "b_labels.tif")
    assert paired(pred, truth) == {name: (f"{name}_labels.tif",) * 2 for name in "ab"}
    with pytest.raises(DataSetError) as error:
        pair_folders(touch(tmp_path / "p2", "a.png"), touch(tmp_path / "t2", "a.png", "d.png"))
    assert "left aside" not in str(error.value)


def test_missing_predictions_may_be_allowed_but_not_extra_ones(tmp_path):
    pred = touch(tmp_path / "p", "a.png")
    truth = touch(tmp_path / "t", "a.png", "b.png")
    with pytest.raises(DataSetError, match=r"true label images without a prediction: 1 \(b\)"):
        pair_folders(pred, truth)
    allowed = paired(pred, truth, allow_missing_predictions=True)
    assert allowed == {"a": ("a.png", "a.png"), "b": (None, "b.png")}
    touch(pred, "z.png")
    with pytest.raises(
        DataSetError, match=r"predictions without a true label image: 1 \(z\)"
    ) as error:
        pair_folders(pred, truth, allow_missing_predictions=True)
    assert "only the predictions that have a true label" in str(error.value)
    assert "allow" not in str(error.value)


@pytest.mark.parametrize(
    "names", [("a_cp_masks.png", "a_labels.png"), ("a.png", "a.tif"), ("mask001.tif", "t001.tif")]
)
def test_two_label_files_for_one_image_are_refused_by_name(tmp_path, names):
    labels = touch(tmp_path / "p", *names)
    other = touch(tmp_path / "t", "a.png", "001.png")
    for pair in (pair_folders, lambda labels, images: find_pairs(images, labels)):
        with pytest.raises(DataSetError, match="must hold one file for each image") as error:
            pair(labels, other)
        assert all(f"'{name}'" in str(error.value) for name in names)


def test_two_images_of_one_name_are_refused(tmp_path):
    images = touch(tmp_path / "i", "a.png", "a.tif")
    with pytest.raises(DataSetError, match=r"'a.png' and 'a.tif' for 'a'"):
        find_pairs(images, touch(tmp_path / "l", "a.png"))


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    full, jpeg = touch(tmp_path / "t", "a.png"), touch(tmp_path / "p", "a.jpg")
    refusals = [
        ("predictions must be a folder", lambda: pair_folders(tmp_path / "absent", full)),
        ("true labels must be a folder", lambda: pair_folders(full, full / "a.png")),
        ("images must be a folder", lambda: find_pairs(tmp_path / "absent", full)),
        ("labels of data set 'mine' must be", lambda: find_pairs(full, tmp_path / "x", "mine")),
        (r"predictions must hold files .*holds none", lambda: pair_folders(jpeg, full)),
        (r"labels must hold files .*holds none", lambda: find_pairs(full, jpeg)),
    ]
    for message, call in refusals:
        with pytest.raises(DataSetError, match=message):
            call()


def test_projects_take_the_place_of_missing_label_images(tmp_path):
    images = touch(tmp_path / "i", *(f"{name}.tif" for name in "abcde"))
    labels = touch(tmp_path / "l", "a.png", "a_seg.npy", "b_seg.npy", "b_rois.zip", "c.zip")
    touch(labels, "d_RoiSet.zip", "e_rois.zip", "everything.zip")
    found = {"a.tif": "a.png", "b.tif": "b_seg.npy", "c.tif": "c.zip"}
    found |= {"d.tif": "d_RoiSet.zip", "e.tif": "e_rois.zip"}
    assert with_images(images, labels) == found
    for path in labels.iterdir():
        path.rename(images / path.name)
    (images / "a.png").unlink()
    assert with_images(images, images) == found | {"a.tif": "a_seg.npy"}


def test_accents_may_be_apart_from_their_letters(tmp_path):
    """As macOS stores them."""
    images = touch(tmp_path / "i", "\u00e4.tif", "o\u0308.tif")
    labels = touch(tmp_path / "l", "a\u0308_masks.png", "\u00f6_seg.npy")
    assert with_images(images, labels) == {
        "\u00e4.tif": "a\u0308_masks.png",
        "o\u0308.tif": "\u00f6_seg.npy",
    }
    predicted = touch(tmp_path / "p", "a\u0308_labels.tif", "\u00f6_labels.tif")
    assert list(paired(predicted, images)) == ["\u00e4", "\u00f6"]
