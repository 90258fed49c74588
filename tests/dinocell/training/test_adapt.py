"""Adapting a model to a few images: what learns, what is chosen, what is refused."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from small_runs import small_run

from dinocell.cli import main
from dinocell.errors import ConfigError, DataSetError, UsageError
from dinocell.io import read_image, read_labels, write_image, write_labels
from dinocell.labels import cell_borders
from dinocell.network.model import (
    DINOCell,
    create_dinocell_model,
    load_model,
    save_model,
    with_config,
)
from dinocell.pairs import find_pairs
from dinocell.progress import progress
from dinocell.settings import config_from_mapping
from dinocell.training import adapt as module
from dinocell.training import pace as timing
from dinocell.training.adapt import CANDIDATES, AdaptOptions, AdaptResult, Trial, adapt
from dinocell.training.config import TrainConfig
from dinocell.training.pace import Pace, first_steps
from dinocell.training.trainer import train

START = Trial("start", 0, 0.0, 0.0)
RESULT = AdaptResult(Path("out"), (START,), START, {})

pytestmark = pytest.mark.usefixtures("mini_networks")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_SIZE", 2)


def trained(data, out, steps):
    mapping = small_run(data, out, schedule__steps=steps, schedule__eval_every=steps)
    return train(config_from_mapping(TrainConfig, mapping), shown=False).model_path


@pytest.fixture(scope="module")
def start(blob_data, tmp_path_factory):
    """A model that finds bright discs."""
    return trained(blob_data, tmp_path_factory.mktemp("start"), 30)


def adapted(data, start, out, **options):
    options = {"steps": 15, **options}
    return adapt(
        data / "images",
        data / "labels",
        out,
        start=start,
        options=AdaptOptions(**options),
        shown=False,
    )


def weights_of(path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


def test_a_model_that_knows_nothing_learns(blob_data, tmp_path):
    start = trained(blob_data, tmp_path, 2)
    result = adapted(blob_data, start, tmp_path / "mine.safetensors", steps=25)
    tried = [(trial.name, trial.steps) for trial in result.trials]
    assert tried[:-1] == [("start", 0), ("thresholds", 0), *((name, 10) for name in CANDIDATES)]
    assert result.chosen.name in CANDIDATES
    assert result.chosen.ap == max(trial.ap for trial in result.trials) > result.trials[0].ap + 0.1
    best = max(result.trials[2:-1], key=lambda trial: trial.ap)
    assert tried[-1] == (best.name, 25), "the best of the candidates has all steps"
    model = load_model(result.model_path)
    assert model.config.peak_threshold == result.thresholds["peak_threshold"]
    assert model.card["adapted"] == {
        "chosen": result.chosen.name, "steps": result.chosen.steps, "most_steps": 25,
        "seed": 0, "images": 6,
    }  # fmt: skip
    metrics = model.card["metrics"]
    assert metrics["held_out_ap50_start_0_steps"] == result.trials[0].ap50
    assert metrics[f"held_out_ap50_{best.name}_25_steps"] == result.trials[-1].ap50
    assert model.card["start"] == str(start)
    chosen = result.chosen
    assert f"chosen: {chosen.name}, {chosen.steps} steps on all images" in result.text()
    assert f"{chosen.name}  " in result.text()


@pytest.mark.parametrize("best", ["start", "decoder"])
def test_scores_and_statistics_are_of_the_weights_in_the_file(
    blob_data, tmp_path, monkeypatch, best
):
    start = tmp_path / "start.safetensors"
    save_model(start, create_dinocell_model("tiny", window_px=32, overlap_px=8))
    scores = iter([0.0, 2.0 * (best == "decoder"), 0.0, 0.0])  # of thresholds and candidates
    monkeypatch.setattr(
        module._Adaptation, "_cross_validated", lambda self, counts: (next(scores), 0.0)
    )
    judged = []

    def keep(path, model, **how):
        judged.append(model.state_dict())
        save_model(path, model, **how)

    monkeypatch.setattr(module, "save_model", keep)
    result = adapted(blob_data, start, tmp_path / "mine.safetensors", steps=1)
    assert result.chosen.name == best
    for key, value in weights_of(result.model_path).items():
        assert torch.equal(value, judged[0][key]), key


def test_the_result_is_never_worse_than_the_start(start, blob_data, tmp_path, monkeypatch):
    honest = module.distance_loss
    monkeypatch.setattr(module, "distance_loss", lambda *a, **b: -100 * honest(*a, **b))
    result = adapted(blob_data, start, tmp_path / "mine.safetensors", steps=4)
    assert result.chosen.name in ("start", "thresholds")
    assert all(trial.ap <= result.chosen.ap for trial in result.trials)
    before, after = weights_of(start), weights_of(result.model_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_start_that_is_best_stays_as_it_is(start, blob_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Adaptation, "_cross_validated", lambda self, counts: (0.0, 0.0))
    result = adapted(blob_data, start, tmp_path / "mine.safetensors", steps=1)
    assert result.chosen.name == "start"
    assert "the model is that one" in result.text()
    first, last = load_model(start), load_model(result.model_path)
    assert first.config == last.config


@pytest.mark.parametrize(
    ("name", "fixed", "learned"),
    [
        ("decoder", "backbone.vit.norm.weight", "decoder.head.weight"),
        ("last", "backbone.vit.blocks.0.mlp.fc1.weight", "backbone.vit.norm.weight"),
        ("all", None, "backbone.vit.patch_embed.proj.weight"),
    ],
)
def test_only_what_is_named_learns(name, fixed, learned, start, blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "images")
    run = module._Adaptation(load_model(start), pairs, AdaptOptions(), shown=False)
    with progress("", 2, shown=False) as bar:
        model = run._train(name, [0, 1], 2, bar)
    before, after = run.start.state_dict(), model.state_dict()
    assert not torch.equal(before[learned], after[learned])
    assert fixed is None or torch.equal(before[fixed], after[fixed])


def test_folds_are_disjoint_and_nothing_is_scored_by_its_own_labels(start, blob_data, monkeypatch):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "images")
    run = module._Adaptation(load_model(start), pairs, AdaptOptions(), shown=False)
    assert sorted([*run.folds[0], *run.folds[1]]) == list(range(6))
    trained, predicted = [], []

    def remember(name, chosen, steps, bar):
        trained.append(set(chosen))
        return run.start

    monkeypatch.setattr(run, "_train", remember)
    monkeypatch.setattr(
        run, "_predict", lambda model, chosen: [predicted.append(set(chosen))] * len(chosen)
    )
    with progress("", 2, shown=False) as bar:
        run._held_out("all", 1, bar)
    assert all(not a & b for a, b in zip(trained, predicted, strict=True))
    # Two thresholds: the first finds all cells of the first fold and none of the other.
    counts = np.zeros((2, 6, 3, 3), int)
    counts[0, run.folds[0], :, 0] = counts[1, run.folds[1], :, 0] = 1
    counts[0, run.folds[1], :, 2] = counts[1, run.folds[0], :, 2] = 1
    assert run._cross_validated(counts) == (0.0, 0.0), "each fold has the thresholds of the other"
    assert module._best(counts, run.folds[0]) == 0
    assert module._best(counts, run.folds[1]) == 1


@pytest.mark.parametrize(("sizes", "expected"), [([0.5], 0.5), ([None], None), ([0.5, 0.2], None)])
def test_the_pixel_size_is_that_of_the_images(
    sizes, expected, start, blob_data, tmp_path, monkeypatch
):
    """Else `segment` would show the network the images at another scale than it has learned."""
    whole = with_config(load_model(start), pixel_size_um=1.0)
    save_model(tmp_path / "start.safetensors", whole)
    (tmp_path / "images").mkdir()
    shutil.copytree(blob_data / "labels", tmp_path / "labels")
    for index, path in enumerate(sorted((blob_data / "images").iterdir())):
        target = tmp_path / "images" / f"{path.stem}.tif"
        tifffile.imwrite(
            target,
            read_image(path).pixels,
            imagej=True,
            resolution=(1 / (sizes[index % len(sizes)] or 1),) * 2,
            metadata={"unit": "um"} if sizes[0] else None,
        )
    monkeypatch.setattr(module._Adaptation, "result", lambda self, path: (RESULT, self.start))
    adapted(tmp_path, tmp_path / "start.safetensors", tmp_path / "out.safetensors")
    assert load_model(tmp_path / "out.safetensors").config.pixel_size_um == expected


def test_large_images_are_scored_on_their_middles():
    samples = [(np.arange(240).reshape(12, 20), np.zeros((12, 20), np.uint32))] * 3
    assert module._middles(samples, 720)[0][0].shape == (12, 20)
    (image, truth), *_ = module._middles(samples, 180)
    assert image.shape == truth.shape == (6, 10)
    np.testing.assert_array_equal(image, samples[0][0][3:9, 5:15])


def test_one_image_is_cut_in_two(start, blob_data, tmp_path):
    for kind, name in (("images", "blob0.tif"), ("labels", "blob0.png")):
        (tmp_path / kind).mkdir()
        shutil.copy(blob_data / kind / name, tmp_path / kind)
    result = adapted(tmp_path, start, tmp_path / "mine.safetensors", steps=1)
    assert load_model(result.model_path).card["adapted"]["images"] == 1
    assert "note: there is one image, which was cut in two" in result.text()
    assert "show no cell" not in result.text()


def test_label_images_without_cells_are_noted(start, blob_data, tmp_path):
    for kind in ("images", "labels"):
        shutil.copytree(blob_data / kind, tmp_path / kind)
    count = len(list((tmp_path / "labels").iterdir()))
    assert adapted(tmp_path, start, tmp_path / "all.safetensors", steps=1).notes == ()
    for name in ("blob1.png", "blob2.png"):
        labels = read_labels(tmp_path / "labels" / name)
        write_labels(tmp_path / "labels" / name, np.zeros_like(labels))
    result = adapted(tmp_path, start, tmp_path / "mine.safetensors", steps=1)
    assert f"note: 2 of {count} label images show no cell" in result.text()


def test_outlines_are_refused(start, blob_data, tmp_path):
    for kind in ("images", "labels"):
        shutil.copytree(blob_data / kind, tmp_path / kind)
    labels = read_labels(tmp_path / "labels" / "blob1.png")
    write_labels(tmp_path / "labels" / "blob1.png", labels * cell_borders(labels))
    with pytest.raises(DataSetError, match=r"blob1.png', which looks like outlines: .* fill each"):
        adapted(tmp_path, start, tmp_path / "mine.safetensors", steps=1)
    assert not (tmp_path / "mine.safetensors").exists()


def test_the_fewest_steps_are_noted(start, blob_data, tmp_path, monkeypatch):
    for fitting, noted in ((10, True), (11, False)):
        monkeypatch.setattr(module._Adaptation, "_few_that_fit", lambda *_: 10)
        monkeypatch.setattr(Pace, "many_within", lambda *_, n=fitting: n)
        result = adapted(blob_data, start, tmp_path / f"{fitting}.safetensors", steps=None)
        assert ("the time allows 10 steps of each training" in result.text()) == noted
    chosen = adapted(blob_data, start, tmp_path / "b.safetensors", steps=10)
    assert "the time allows" not in chosen.text()


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def spending(self, seconds, function):
        def spend(*arguments, **named):
            self.now += seconds
            return function(*arguments, **named)

        return spend


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for place in (module, timing):
        monkeypatch.setattr(place, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


STEP_S = {"decoder": 1.0, "last": 1.5, "all": 2.5}


@pytest.mark.parametrize(
    ("chosen", "minutes", "least", "few", "slower"),
    [
        ("all", 5, 0.9, 10, 1),
        ("decoder", 5, 0.9, 10, 1),
        ("all", 3.3, 0.85, 10, 1),  # no time for more
        ("all", 20, 0.9, 10, 1),
        ("all", 20, 0.9, 10, 1.15),  # than measured
        ("decoder", 20, 0.5, 10, 1),  # at most 159, or everything would be tried with 40
        ("last", 40, 0.9, 40, 1.1),
    ],
)
def test_the_time_is_used_and_kept(
    start, blob_data, tmp_path, monkeypatch, clock, chosen, minutes, least, few, slower
):
    """Candidates have speeds of their own; copying takes 2 s, scoring and the statistics of the training
    images 5 s, and reading, once, 10 s.
    """
    trained: list[tuple[str, int]] = []

    class Bar:
        def write(self, text): ...

        def expect(self, total): ...

        def advance(self, *, note):
            clock.now += STEP_S[note] * (slower if len(trained) > 3 else 1)

    @contextmanager
    def bar(*arguments, shown):
        yield Bar()

    def train(run, name, images, steps, bar):
        trained.append((name, steps))
        return honest(run, name, images, steps, bar)

    honest = module._Adaptation._train
    scores = iter([0.0, *(float(name == chosen) for name in STEP_S), 2.0])
    monkeypatch.setattr(module, "progress", bar)
    monkeypatch.setattr(module.CropDataset, "only", clock.spending(2, module.CropDataset.only))
    monkeypatch.setattr(module, "CropDataset", clock.spending(10, module.CropDataset))
    statistics = clock.spending(5, module.training_statistics)
    monkeypatch.setattr(module, "training_statistics", statistics)
    counts = clock.spending(5, module._Adaptation._counts)
    monkeypatch.setattr(module._Adaptation, "_counts", lambda run, samples: counts(run, samples))
    monkeypatch.setattr(module._Adaptation, "_train", train)
    monkeypatch.setattr(
        module._Adaptation, "_cross_validated", lambda run, counts: (next(scores), 0.0)
    )
    monkeypatch.setattr(module, "_scores", lambda *a: (-1.0, -1.0))
    result = adapted(blob_data, start, tmp_path / "m.safetensors", steps=None, minutes=minutes)
    assert least < (clock.now - 1000) / (60 * minutes) <= 1
    measured, real = trained[:3], trained[3:]
    assert measured == [(name, 3) for name in CANDIDATES]
    first = [(name, few) for name in CANDIDATES for _ in range(2)]
    steps = result.chosen.steps
    assert result.chosen.name == chosen
    assert real == [*first, *[(chosen, steps)] * (1 if result.hurried else 3)]
    assert result.hurried == (minutes < 4) == (steps == 10)


def test_a_longer_trial_that_is_worse_is_not_delivered(start, blob_data, tmp_path, monkeypatch):
    scores = iter([0.0, 2.0, 3.0, 2.5, 2.9])  # thresholds, candidates, `last` with all steps
    monkeypatch.setattr(
        module._Adaptation, "_cross_validated", lambda run, counts: (next(scores), 0.5)
    )
    monkeypatch.setattr(module, "_scores", lambda *a: (-1.0, -1.0))
    result = adapted(blob_data, start, tmp_path / "m.safetensors", steps=12)
    assert [(trial.name, trial.steps) for trial in result.trials[-2:]] == [
        ("all", 10),
        ("last", 12),
    ]
    assert (result.chosen.name, result.chosen.steps) == ("last", 10)
    assert load_model(result.model_path).card["adapted"]["steps"] == 10


def test_where_few_steps_tell_nothing_everything_learns(start, blob_data, tmp_path, monkeypatch):
    scores = iter([0.0, 0.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(
        module._Adaptation, "_cross_validated", lambda run, counts: (next(scores), 0.5)
    )
    monkeypatch.setattr(module, "_scores", lambda *a: (0.5, 0.5))
    result = adapted(blob_data, start, tmp_path / "m.safetensors", steps=11)
    assert (result.chosen.name, result.chosen.steps) == ("all", 11)


@pytest.mark.parametrize(
    ("steps", "few"), [(1, 1), (10, 10), (11, 10), (159, 10), (160, 40), (600, 40)]
)
def test_candidates_are_tried_with_a_part_of_the_steps(steps, few):
    assert first_steps(steps) == few


def paced(clock, **marks):
    """Of trainings of these candidates with steps that took so long."""
    pace = Pace()
    for name, durations in marks.items():
        pace.begin()
        for seconds in durations:
            clock.now += seconds
            pace.stepped()
        pace.end(name)
    return pace


def test_each_candidate_shows_its_own_speed(clock):
    pace = paced(clock, decoder=(3, 1, 1), all=(7, 4, 6), last=(2,))
    # First steps 3, 7 and 2 s, later ones 1, 5 and 2 s: all are tried twice with 40 steps, the dearest three
    # times with 189, of which 85 % are 160.
    needed_s = 2 * (3 + 7 + 2) + 2 * 39 * (1 + 5 + 2) + 3 * (7 + 188 * 5)
    assert pace.few_within(needed_s) == pace.few_within(1e9) == 40
    assert pace.few_within(needed_s - 0.1) == pace.few_within(0) == 10


@pytest.mark.parametrize(
    ("few", "seconds", "many"),
    [
        (10, 3 * (3 + 49 * 2), 50),
        (10, 3 * (3 + 49 * 2) - 0.1, 49),
        (10, 0, 10),  # none are left
        (10, 1e9, 159),  # the most that a try with 10 stands for
        (40, 3 * (3 + 159 * 2), 160),
        (40, 3 * (3 + 159 * 2) - 0.1, 159),  # belongs to 10, but the time is not wasted
        (40, 1e9, 600),
    ],
)
def test_the_time_that_is_left_when_all_were_tried_is_for_the_best(clock, few, seconds, many):
    assert paced(clock, decoder=(3, 2, 2)).many_within("decoder", few, seconds) == many


def test_steps_repeat_what_the_time_had_chosen(start, blob_data, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_FEW", (2, 4))
    monkeypatch.setattr(timing, "_ENOUGH", 12)
    monkeypatch.setattr(module._Adaptation, "_few_that_fit", lambda *_: 4)
    monkeypatch.setattr(Pace, "many_within", lambda *_: 16)
    timed = adapted(blob_data, start, tmp_path / "timed.safetensors", steps=None)
    assert [trial.steps for trial in timed.trials] == [0, 0, 4, 4, 4, 16]
    again = adapted(blob_data, start, tmp_path / "again.safetensors", steps=16)
    assert again.trials == timed.trials
    first, last = weights_of(timed.model_path), weights_of(again.model_path)
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_images_are_not_read_again_for_each_training(start, blob_data, tmp_path, monkeypatch):
    made = []
    whole = module.CropDataset
    monkeypatch.setattr(module, "CropDataset", lambda *a, **b: made.append(1) or whole(*a, **b))
    adapted(blob_data, start, tmp_path / "m.safetensors", steps=2)
    assert made == [1]


def test_a_seed_repeats_the_steps(start, blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "images")
    heads = []
    for seed in (3, 3, 4):
        run = module._Adaptation(load_model(start), pairs, AdaptOptions(seed=seed), shown=False)
        with progress("", 2, shown=False) as bar:
            heads.append(run._train("all", [0, 1], 2, bar).decoder.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_convolutions_adapt(blob_data, tmp_path):
    torch.manual_seed(0)
    options = {"patch_size": 16, "decoder": "detail", "window_px": 32, "overlap_px": 8}
    create_dinocell_model("conv", **options).save(tmp_path / "conv.safetensors")
    result = adapted(blob_data, tmp_path / "conv.safetensors", tmp_path / "a.safetensors", steps=1)
    assert isinstance(load_model(result.model_path), DINOCell)


def test_wrong_inputs_leave_nothing(start, blob_data, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"new file that ends in \.safetensors"):
        adapted(blob_data, start, tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="new file"):
        adapted(blob_data, start, start)
    with pytest.raises(ConfigError, match="`minutes` must be at least"):
        AdaptOptions(minutes=0)
    image = np.random.default_rng(0).integers(0, 200, (64, 64)).astype(np.uint8)
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.png", image)
        write_labels(tmp_path / "labels" / f"{name}.png", np.zeros((64, 64), np.uint16))
    with pytest.raises(DataSetError, match="label all cells of one more image"):
        adapted(tmp_path, start, tmp_path / "mine.safetensors")
    call = ["adapt", str(tmp_path / "images"), str(tmp_path / "none"), "-m", str(start)]
    with pytest.raises(SystemExit) as left:
        main([*call, "-o", str(tmp_path / "mine.safetensors")])
    assert left.value.code == 2 or left.value.code == 1
    assert not (tmp_path / "mine.safetensors").exists()


def test_where_the_model_cannot_be_written_nothing_is_trained(start, blob_data, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "mine.safetensors"
    call = ["adapt", str(blob_data / "images"), str(blob_data / "labels"), "-m", str(start)]
    with pytest.raises(SystemExit) as left:
        main([*call, "-o", str(out)])
    assert left.value.code == 2
    assert f"--out must lie in a folder that can be written, got {out}" in capsys.readouterr().err
    found = adapted(blob_data, start, tmp_path / "new" / "mine.safetensors", steps=1)
    assert os.listdir(tmp_path / "new") == ["mine.safetensors"]
    card = load_model(found.model_path).card
    assert "of your images: not recorded" in card["licence"]
    assert card["data"]["your images"] == {"train_images": 6}


def test_the_command_passes_its_options_on(start, blob_data, tmp_path, capsys, monkeypatch):
    seen = {}

    def remember(images, labels, out, *, start, options):
        seen.update(start=start, options=options, out=out)
        raise UsageError("`minutes` must be so")

    monkeypatch.setattr(module, "adapt", remember)
    call = ["adapt", "i", "l", "-o", "m.safetensors", "-m", "x", "--minutes", "2", "--steps", "7"]
    with pytest.raises(SystemExit):
        main([*call, "--channels", "DNA,ER", "--seed", "5", "--device", "cpu"])
    assert seen["options"] == AdaptOptions(2.0, 7, ("DNA", "ER"), 5, "cpu")
    assert (seen["start"], str(seen["out"])) == ("x", "m.safetensors")
    assert "--minutes must be so" in capsys.readouterr().err
