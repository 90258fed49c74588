"""`dinocell inspect`: from checkpoints and fields to the table, the JSON and the picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from dinocell.cli import main
from dinocell.errors import CheckpointError, DataSetError, UsageError
from dinocell.io import write_image, write_labels
from dinocell.network.model import save_model
from dinocell.probing import inspection
from dinocell.probing.backbones import load_backbone_of
from dinocell.probing.decoder_probe import ProbeConfig
from dinocell.probing.feature_extraction import FieldImage
from dinocell.probing.fields import FieldOptions, FieldSource
from dinocell.probing.fields import open_fields as open_fields_with
from dinocell.probing.inspection import (
    InspectOptions,
    PerChannelOptions,
    inspect_checkpoints,
    write_inspection,
)

CHANNELS = ("DNA", "ER", "RNA")
NUM_FIELDS = 6


def read_field(number: int) -> FieldImage:
    """Discs at places of the field; the channels differ in their noise and in what is inside."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:64, :96]
    cells = np.zeros((64, 96))
    for _ in range(6):
        row, column = rng.uniform(0, 64), rng.uniform(0, 96)
        cells += np.hypot(rows - row, columns - column) < rng.uniform(5, 10)
    planes = [
        300
        + 1500 * cells * (1 if channel == 0 else rows % (2 * channel + 1) > 0)
        + rng.normal(0, 30, cells.shape)
        for channel in range(3)
    ]
    return FieldImage(f"field{number}", CHANNELS, np.stack(planes).clip(0).astype(np.uint16))


@pytest.fixture(scope="module")
def source():
    return FieldSource([f"field{number}" for number in range(NUM_FIELDS)], read_field)


@pytest.fixture(scope="module")
def model_path(mini_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, mini_model)
    return path


@pytest.fixture(scope="module")
def field_folder(tmp_path_factory):
    """FIELD/CHANNEL.tif with an index."""
    folder = tmp_path_factory.mktemp("fields")
    lines = ["field,file,channel"]
    for number in range(NUM_FIELDS):
        item = read_field(number)
        for channel, plane in zip(item.channels, item.planes, strict=True):
            write_image(folder / item.name / f"{channel}.tif", plane)
            lines.append(f"{item.name},{item.name}/{channel}.tif,{channel}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def inspected(checkpoints, source, *, channels=None, per_channel=None, **changes):
    """A report on two windows of 32 px of each field."""
    options = {"window_px": 32, "windows_per_field": 2, "device": "cpu", **changes}
    return inspect_checkpoints(
        checkpoints, source, InspectOptions(**options), reading=FieldOptions(channels=channels),
        per_channel=per_channel, shown=False,
    )  # fmt: skip


def open_fields(data, **options):
    return open_fields_with(data, FieldOptions(**options))


def test_report_has_every_number_for_both_features(model_path, source, tmp_path):
    report = inspected([model_path], source)
    (item,) = report.inspections
    assert item.facts["patch_size"] == 16
    assert item.facts["embed_dim"] == 48
    for kind in ("cls", "patch_mean"):
        scores = item.reports[kind]
        assert (scores.num_fields, scores.num_locations, scores.num_views) == (6, 12, 36)
        assert scores.channels == CHANNELS
        assert scores["retrieval_top1"].chance == pytest.approx(1 / 12)
        assert scores["channel_decodability"].chance == pytest.approx(1 / 3)
        assert all(math.isfinite(estimate.value) for estimate in scores.estimates.values())
    assert "attention_same_field" in item.reports["cls"].estimates
    table = "\n".join(report.table())
    assert "6 fields, N = 12 windows of 32 px, 36 views, channels DNA, ER, RNA" in table
    assert "attention agreement, two fields" in table
    json_path, picture_path = write_inspection(report, tmp_path / "new" / "out")
    document = json.loads(json_path.read_text())
    value = document["checkpoints"][0]["features"]["cls"]["estimates"]["retrieval_top1"]["value"]
    assert value == item.reports["cls"]["retrieval_top1"].value
    assert document["settings"]["window_px"] == 32
    with PillowImage.open(picture_path) as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("L").getcolors()) > 50


@pytest.mark.slow
def test_several_checkpoints_stand_side_by_side(model_path, mini_model, source, tmp_path):
    import copy

    other = copy.deepcopy(mini_model)
    for parameter in other.backbone.vit.blocks.parameters():
        parameter.data.mul_(1e-12)  # zeros are refused as a download cut short
    path = tmp_path / "after.safetensors"
    save_model(path, other)
    report = inspected([model_path, path], source, attention=False)
    before, after = (item.reports["cls"] for item in report.inspections)
    # Without its blocks the CLS token sees no image: collapsed, and the score says so.
    assert after["cosine_same_field"].value == pytest.approx(1.0)
    assert after["retrieval_top1"].value == pytest.approx(1 / 12)
    assert before["retrieval_top1"].value > 0.2
    header = next(line for line in report.table() if line.startswith("CLS token"))
    assert header.split()[2:4] == ["small.safetensors", "after.safetensors"]
    assert " ".join(header.split()[4:]) == "random weights pixels (PCA) 4x4 thumbnail chance"
    assert any("after.safetensors, cls): the features vary" in line for line in report.table())
    write_inspection(report, tmp_path)


def test_equal_names_get_a_part_of_their_path(tmp_path):
    names = inspection._short_names([tmp_path / "a" / "m.pth", tmp_path / "b" / "m.pth"])
    assert names == ["a/m.pth", "b/m.pth"]
    assert inspection._short_names(["m.pth", "m.pth"]) == ["m.pth#1", "m.pth#2"]


def test_every_option_changes_the_result(model_path, source):
    changes = (
        {}, {"window_px": 48}, {"windows_per_field": 1}, {"channels": ["DNA", "ER"]}, {"max_fields": 2},
    )  # fmt: skip
    values = [
        inspected([model_path], source, attention=False, **change)
        .inspections[0]
        .reports["cls"]["cosine_same_field"]
        .value
        for change in changes
    ]
    assert len(set(values)) == len(changes)


def test_baselines_stand_beside_the_checkpoint_unless_left_out(model_path, source):
    report = inspected([model_path], source, attention=False)
    names = [item.name for item in report.baselines]
    assert names == ["random weights", "pixels (PCA)", "4x4 thumbnail"]
    assert [item["name"] for item in report.to_mapping()["baselines"]] == names
    # Principal components of 32 × 32 pixels, and of the 16 × 16 of a patch; a thumbnail is not reduced.
    for kind in ("cls", "patch"):
        assert [item.reports[kind].embed_dim for item in report.baselines] == [48, 64, 16]
    alone = inspected([model_path], source, attention=False, baselines=False)
    assert alone.baselines == []
    assert not any("random weights" in line for line in alone.table())


def test_batch_size_does_not_change_it_and_the_seed_only_the_interval(model_path, source):
    options = {"attention": False}
    base = inspected([model_path], source, **options).inspections[0].reports["cls"]
    same = inspected([model_path], source, batch_size=3, **options)
    seeded = inspected([model_path], source, seed=5, **options)
    for name in ("cosine_same_field", "retrieval_top1"):
        for other in (same, seeded):
            found = other.inspections[0].reports["cls"][name].value
            assert found == pytest.approx(base[name].value, abs=1e-5)
    other = seeded.inspections[0].reports["cls"]
    lows = [(item.low, other[name].low) for name, item in base.estimates.items()]
    assert any(abs(first - second) > 1e-6 for first, second in lows)


def test_fields_are_spread_over_the_names(model_path, source):
    report = inspected([model_path], source, attention=False, max_fields=2)
    assert report.settings["fields"] == ["field0", "field5"]


def test_scores_per_channel_are_reported_with_their_spread(model_path, source, tmp_path):
    for number in range(2):
        item = read_field(number)
        labels = (item.planes[0] > 900).astype(np.uint16)
        for channel, plane in zip(item.channels[:2], item.planes, strict=False):
            write_image(tmp_path / f"f{number}" / f"{channel}.tif", plane)
        write_labels(tmp_path / f"f{number}" / "truth.png", labels)
    report = inspected(
        [model_path],
        source,
        attention=False,
        per_channel=PerChannelOptions(tmp_path, "truth", ProbeConfig(window_px=32, steps=2)),
    )
    table = report.table()
    assert any(line.startswith("std over channels") for line in table)
    for name in ("small.safetensors", "random weights", "pixels (PCA)", "4x4 thumbnail"):
        assert any(line.startswith(f"AP@0.5 trained on ({name})") for line in table), name
    scores = report.to_mapping()["checkpoints"][0]["channel_scores"]
    assert list(scores["channels"]) == ["DNA", "ER"]
    assert scores["std"]["mse"] is not None


def test_bundled_model_by_name(true_networks):
    loaded = load_backbone_of("dinocell-tiny")
    assert loaded.facts["patch_size"] == 8
    assert not loaded.vit.training
    assert not any(parameter.requires_grad for parameter in loaded.vit.parameters())
    with pytest.raises(UsageError, match="of a bundled model must be its own, 8, got 16"):
        load_backbone_of("dinocell-tiny", patch_size=16)


@pytest.mark.slow
def test_backbone_files_and_their_networks(small_model, source, tmp_path):
    state = small_model.backbone.vit.state_dict()
    torch.save(state, tmp_path / "meta.pth")
    other = {key: value.clone() for key, value in state.items()}
    other["blocks.5.mlp.fc2.weight"] *= 3
    both = {
        "teacher": {f"backbone.{key}": value for key, value in state.items()},
        "student": {f"backbone.{key}": value for key, value in other.items()},
    }
    torch.save(both, tmp_path / "run.pth")
    plain = load_backbone_of(tmp_path / "meta.pth")
    assert (plain.facts["depth"], plain.facts["num_heads"], plain.facts["format"]) == (
        12,
        3,
        "meta",
    )
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = small_model.backbone.vit(image)
    assert torch.allclose(plain.vit(image), expected, atol=1e-6)
    teacher = load_backbone_of(tmp_path / "run.pth")
    student = load_backbone_of(tmp_path / "run.pth", which="student")
    assert torch.allclose(teacher.vit(image), expected, atol=1e-6)
    assert not torch.allclose(student.vit(image), expected, atol=1e-3)
    adapted = load_backbone_of(tmp_path / "meta.pth", patch_size=8)
    assert adapted.facts["patch_size"] == 8
    enlarged = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(adapted.vit(image), small_model.backbone.vit(enlarged), atol=1e-4)
    options = {"attention": False}
    values = [
        inspected([tmp_path / "run.pth"], source, **options, **change)
        .inspections[0]
        .reports["cls"]["cosine_same_field"]
        .value
        for change in ({}, {"which": "student"}, {"patch_size": 8})
    ]
    assert len(set(values)) == 3


def test_files_that_are_no_backbone_are_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not here</html>")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name, message in (("page.pth", "a web page"), ("other.pth", "must hold a DINOv3 ViT")):
        with pytest.raises(CheckpointError, match=message):
            load_backbone_of(tmp_path / name)


def test_wrong_calls_are_refused(model_path, source, tmp_path):
    def run(checkpoints=(model_path,), **change):
        inspected(checkpoints, source, **change)

    for change, message in (
        ({"checkpoints": ()}, "A checkpoint must be given, got none"),
        ({"checkpoints": ("nothing.pth",)}, "A checkpoint must be a file.*dinocell-tiny"),
        ({"which": "both"}, "`which` must be teacher or student, got 'both'"),
        ({"window_px": 40}, "`window_px` must be a multiple of the patch size 16 .*got 40"),
        ({"windows_per_field": 0}, "`windows_per_field` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"max_fields": 0}, "`max_fields` must be at least 1"),
        ({"patch_size": 0}, "`patch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            run(**change)
    with pytest.raises(DataSetError, match="`data` must be a folder of fields"):
        open_fields(tmp_path / "nowhere")
    with pytest.raises(DataSetError, match="`index` must be a CSV file"):
        open_fields(tmp_path, index=tmp_path / "no.csv")
    with pytest.raises(DataSetError, match="`channels_table` must be a CSV file"):
        open_fields(tmp_path, pattern="harmony", channels_table=tmp_path / "no.csv")


def test_command_prints_the_table_and_writes_both_files(model_path, field_folder, tmp_path, capsys):
    arguments = ["inspect", str(model_path), "--data", str(field_folder)]
    arguments += ["--index", str(field_folder / "index.csv"), "--window-px", "32"]
    arguments += ["--windows-per-field", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "-o", str(tmp_path)])
    assert exit_info.value.code == 0
    output = capsys.readouterr()
    assert "retrieval within the field, turned" in output.out
    assert all(name in output.out for name in ("random weights", "pixels (PCA)", "4x4 thumbnail"))
    assert (tmp_path / "inspect.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "inspect.json").read_text())
    with pytest.raises(SystemExit):
        main([*arguments, "--json", "--no-attention", "--channels", "DNA,RNA"])
    printed = json.loads(capsys.readouterr().out)
    scores = printed["checkpoints"][0]["features"]["cls"]
    assert scores["channels"] == ["DNA", "RNA"]
    assert "attention_same_field" not in scores["estimates"]
    assert written["checkpoints"][0]["features"]["cls"]["channels"] == list(CHANNELS)


def test_fields_by_their_names(field_folder, tmp_path):
    indexed = open_fields(field_folder, index=field_folder / "index.csv")
    assert indexed.names == [f"field{number}" for number in range(NUM_FIELDS)]
    assert indexed.read(2).channels == CHANNELS
    assert np.array_equal(indexed.read(2).planes, read_field(2).planes)
    named = open_fields(field_folder, pattern=r"(?P<channel>\w+)\.tif")
    assert np.array_equal(named.read(2).planes, indexed.read(2).planes)
    table = tmp_path / "table.csv"
    table.write_text("number,channel\nDNA,nuclei\nER,reticulum\nRNA,nucleoli\n")
    renamed = open_fields(
        field_folder, pattern=r"(?P<channel>\w+)\.tif", channels_table=table
    ).read(0)
    assert set(renamed.channels) == {"nuclei", "reticulum", "nucleoli"}
    chosen = open_fields(field_folder, index=field_folder / "index.csv", channels=["rna", "dna"])
    assert set(chosen.read(0).channels) == {"DNA", "RNA"}


def test_bad_fields_are_refused(field_folder, tmp_path):
    with pytest.raises(DataSetError, match="which file is which channel"):
        open_fields(field_folder)
    with pytest.raises(DataSetError, match="channels` must be among DNA, ER, RNA, got Golgi"):
        open_fields(field_folder, index=field_folder / "index.csv", channels=["Golgi"])
    with pytest.raises(DataSetError, match="no match"):
        open_fields(field_folder, pattern="harmony")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "DNA.tif").write_bytes(b"II*\0 cut")
    (tmp_path / "index.csv").write_text("field,file,channel\na,a/DNA.tif,DNA\n")
    with pytest.raises(DataSetError, match=r"a \(DNA\)"):
        open_fields(tmp_path, index=tmp_path / "index.csv").read(0)


def test_command_with_a_wrong_channel_list(model_path, field_folder, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", str(model_path), "--data", str(field_folder), "--channels", " ,"])
    assert exit_info.value.code == 2
    assert "--channels must name a channel" in capsys.readouterr().err
