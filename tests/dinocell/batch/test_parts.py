"""A batch in parts: divided evenly, killed and gone on with, merged into what one process leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dinocell.batch import parts
from dinocell.batch.claims import Claimant
from dinocell.batch.journal import JOURNAL_NAME, shard_folder
from dinocell.batch.merge import merge_shards
from dinocell.batch.options import SegmentOptions
from dinocell.batch.parts import (
    open_shards,
    plan_shards,
    read_plan,
    run_shard,
    shard_states,
)
from dinocell.batch.run import segment_files
from dinocell.cli import main
from dinocell.errors import ConfigError, DINOCellError, UsageError
from dinocell.io import find_images, write_image
from dinocell.network.model import save_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plate(tmp_path_factory) -> Path:
    """Nine small images, and one that is none."""
    folder = tmp_path_factory.mktemp("plate")
    rng = np.random.default_rng(2)
    for index in range(9):
        image = rng.integers(100, 4000, (40 + 8 * index, 40)).astype(np.uint16)
        write_image(folder / f"f{index}.tif", image)
    (folder / "broken.tif").write_bytes(b"II*\0no image")
    return folder


@pytest.fixture(scope="module")
def options(mini_model, tmp_path_factory) -> SegmentOptions:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, mini_model)
    return SegmentOptions(model=str(path), device="cpu", overlay=False)


@pytest.fixture(scope="module")
def alone(plate, options, tmp_path_factory) -> dict[str, bytes]:
    """What one process leaves."""
    out = tmp_path_factory.mktemp("alone")
    result = segment_files(find_images([str(plate)]), out, options, shown=False)
    assert len(result.failures) == 1
    assert sum(row["num_cells"] for row in result.rows) > 5
    return results(out)


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def without_order(found: dict[str, bytes]) -> dict[str, bytes]:
    journal = b"\n".join(sorted(found[JOURNAL_NAME].splitlines()))
    return {**found, JOURNAL_NAME: journal}


def run_all(plan) -> None:
    for index in open_shards(plan):
        run_shard(plan.out, index, shown=False)


# --- dividing ---


def test_parts_are_even():
    assert parts._divide([8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2]]
    assert parts._divide([1, 1, 1], 3) == [[0], [1], [2]]
    assert sorted(map(len, parts._divide([0] * 10, 4))) == [
        2,
        2,
        3,
        3,
    ]  # empty files cost time too


def test_a_hundred_thousand_files():
    sizes = np.random.default_rng(1).integers(1_000, 9_000_000, 100_000).tolist()
    begun = time.process_time()
    divided = parts._divide(sizes, 64)
    assert time.process_time() - begun < 20  # nothing quadratic; it takes a fifth of a second
    assert sorted(place for part in divided for place in part) == list(range(100_000))
    loads = [sum(sizes[place] for place in part) for part in divided]
    assert max(loads) < 1.01 * sum(loads) / 64


def test_a_plan_is_found_again(plate, options, tmp_path):
    paths = find_images([str(plate)])
    plan = plan_shards(paths, tmp_path / "out", options, 3)
    assert read_plan(tmp_path / "out") == plan == plan_shards(paths, tmp_path / "out", options, 3)
    assert [state.images for state in shard_states(plan)] == [4, 3, 3]
    assert plan.images == 10
    assert plan.total_bytes == sum(path.stat().st_size for path in paths)
    # Until something is done, it may be another.
    assert plan_shards(paths, tmp_path / "out", options, 4).count == 4
    assert plan_shards(paths, tmp_path / "few", options, 99).count == 10


def test_a_batch_continues_as_it_began(plate, options, tmp_path):
    paths = find_images([str(plate)])
    out = tmp_path / "out"
    plan_shards(paths, out, options, 3)
    run_shard(out, 0, shown=False)
    from dataclasses import replace

    with pytest.raises(UsageError, match="its 3 shards, got 4: set `shards` to 3"):
        plan_shards(paths, out, options, 4)
    with pytest.raises(UsageError, match="got other values of peak_threshold"):
        plan_shards(paths, out, replace(options, peak_threshold=0.7), 3)
    added = tmp_path / "new.tif"
    write_image(added, np.zeros((8, 8), np.uint16))
    with pytest.raises(UsageError, match=r"got 1 that .* does not list, such as .*new\.tif"):
        plan_shards([*paths, added], out, options, 3)
    # Files that are gone, or were copied again, stop nothing.
    assert plan_shards(paths[1:], out, options, 3).images == 10
    # What changes no result may change.
    assert plan_shards(paths, out, replace(options, batch_size=2), 3).options.batch_size == 2
    assert read_plan(out).options.batch_size == 2


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        ({"report": True}, 2, "`report` must be False"),
        ({"formats": ("bmp",)}, 2, "`formats` must be one of"),
        ({}, 0, "must be at least 1, got 0"),
    ],
)
def test_wrong_plans(plate, options, tmp_path, change, count, message):
    from dataclasses import replace

    with pytest.raises(UsageError, match=message):
        plan_shards(find_images([str(plate)]), tmp_path / "o", replace(options, **change), count)
    assert not (tmp_path / "o").exists()


def test_finished_results_are_not_touched(plate, options, tmp_path):
    from dataclasses import replace

    paths = find_images([str(plate)])
    segment_files(paths[1:3], tmp_path, options, shown=False)
    with pytest.raises(UsageError, match=r"got 2 in .*set `overwrite`"):
        plan_shards(paths, tmp_path, options, 2)
    before = (tmp_path / f"{paths[1].stem}_labels.tif").stat().st_ino
    plan = plan_shards(paths, tmp_path, replace(options, overwrite=True), 2)
    run_all(plan)
    assert (tmp_path / f"{paths[1].stem}_labels.tif").stat().st_ino != before


def test_overwriting_starts_over_with_all_images(plate, options, tmp_path, alone):
    """Whatever the folder held: results without a plan, or a batch with other options."""
    from dataclasses import replace

    paths = find_images([str(plate)])
    changed = replace(options, overwrite=True, peak_threshold=0.3)
    expected = tmp_path / "expected"
    segment_files(paths, expected, replace(changed, overwrite=False), shown=False)
    one, two = tmp_path / "one", tmp_path / "two"
    segment_files(paths, one, options, shown=False)
    plan_shards(paths, two, options, 3)
    run_shard(two, 0, shown=False)
    for out in (one, two):
        plan = plan_shards(paths, out, changed, 2)
        assert open_shards(plan) == [0, 1]
        run_all(plan)
        assert merge_shards(out, shown=False).images == 9
        found = results(out)
        found.pop("cells.csv")
        assert without_order(found) == without_order(results(expected))
        assert found["settings.json"] != alone["settings.json"]


def test_a_part_is_open_again_when_one_of_its_files_changes(options, tmp_path):
    rng = np.random.default_rng(3)
    for index in range(2):
        image = rng.integers(100, 4000, (40, 48)).astype(np.uint16)
        write_image(tmp_path / "plate" / f"{index}.tif", image)
    paths, out = find_images([tmp_path / "plate"]), tmp_path / "out"
    plan = plan_shards(paths, out, options, 2)
    run_all(plan)
    plan = plan_shards(paths, out, options, 2)
    assert open_shards(plan) == []
    write_image(paths[1], image[::-1].copy())
    (changed,) = open_shards(plan)
    result = run_shard(out, changed, shown=False)
    assert "segmented again, because files have changed: 1" in result.text()
    assert open_shards(plan) == []


def test_other_images_of_a_folder_keep_their_settings(plate, options, tmp_path):
    """Results in one folder share them, also when a batch in parts joins later."""
    from dataclasses import replace

    paths = [path for path in find_images([str(plate)]) if path.stem != "broken"]
    segment_files(paths[:2], tmp_path, replace(options, peak_threshold=0.3), shown=False)
    plan_shards(paths[2:], tmp_path, options, 2)
    with pytest.raises(ConfigError, match="must share their settings, got other values of peak"):
        run_shard(tmp_path, 0, shown=False)


def test_overwriting_some_images_of_a_folder_mixes_no_settings(plate, options, tmp_path):
    """Else `segment --resume` would take the others for results of the new settings."""
    from dataclasses import replace

    paths = [path for path in find_images([str(plate)]) if path.stem != "broken"][:3]
    segment_files(paths, tmp_path, options, shown=False)
    changed = replace(options, overwrite=True, peak_threshold=0.3)
    before = results(tmp_path)
    for write in (False, True):
        with pytest.raises(ConfigError, match=r"peak_threshold .*its other images \(f1, f2\)"):
            plan_shards(paths[:1], tmp_path, changed, 1, write=write)
    assert results(tmp_path) == before
    run_all(plan_shards(paths[:1], tmp_path, replace(options, overwrite=True), 1))
    plan_shards(paths, tmp_path, changed, 3)
    run_shard(tmp_path, 0, shown=False)
    now = replace(changed, overwrite=False, resume=True)
    with_new_settings = segment_files(paths, tmp_path, now, shown=False)
    assert with_new_settings.skipped == 0  # the parts that have not run are no results of them


def test_other_settings_of_a_model_are_refused_when_a_part_runs(plate, options, tmp_path):
    """Planning reads no model."""
    from dataclasses import replace

    paths = [path for path in find_images([str(plate)]) if path.stem != "broken"][:2]
    segment_files(paths, tmp_path, replace(options, peak_threshold=0.3), shown=False)
    plan_shards(paths[:1], tmp_path, replace(options, overwrite=True), 1)
    with pytest.raises(ConfigError, match=r"peak_threshold .*plan all its images with `overwrite`"):
        run_shard(tmp_path, 0, shown=False)


def test_a_broken_plan_is_overwritten(plate, options, tmp_path):
    from dataclasses import replace

    paths = find_images([str(plate)])
    plan_shards(paths, tmp_path, options, 2)
    (tmp_path / "shards" / "plan.json").write_text("{")
    assert plan_shards(paths, tmp_path, replace(options, overwrite=True), 3).count == 3


def test_parts_that_run_are_neither_overwritten_nor_run_twice(plate, options, tmp_path):
    from dataclasses import replace

    paths = find_images([str(plate)])
    plan_shards(paths, tmp_path, options, 3)
    (shard_folder(tmp_path, 0) / "claim.json").write_text('{"job": "7", "host": "elsewhere"}')
    before = read_plan(tmp_path)
    with pytest.raises(UsageError, match=r"no process runs the images.*job 7"):
        plan_shards(paths, tmp_path, replace(options, overwrite=True), 2)
    assert read_plan(tmp_path) == before
    with pytest.raises(DINOCellError, match="must be run by one process"):
        run_shard(tmp_path, 0, shown=False)
    assert not (shard_folder(tmp_path, 0) / JOURNAL_NAME).exists()
    ended = Claimant(job_runs=lambda job: False)
    assert (
        plan_shards(paths, tmp_path, replace(options, overwrite=True), 2, claimant=ended).count == 2
    )


def test_a_plan_that_is_only_shown_has_all_to_do(plate, options, tmp_path):
    from dataclasses import replace

    paths = find_images([str(plate)])
    run_all(plan_shards(paths, tmp_path, options, 2))
    shown = plan_shards(paths, tmp_path, replace(options, overwrite=True), 3, write=False)
    assert open_shards(shown) == [0, 1, 2]
    assert len(shard_states(read_plan(tmp_path))) == 2
    continued = plan_shards(paths, tmp_path, options, 2, write=False)
    assert [state.failed for state in shard_states(continued)].count(1) == 1
    assert len(open_shards(continued)) == 1


def test_without_a_plan(tmp_path):
    for call in (read_plan, merge_shards, lambda out: run_shard(out, 0)):
        with pytest.raises(UsageError, match="must hold a plan of shards"):
            call(tmp_path)


# --- running and merging ---


def test_parts_leave_what_one_process_leaves(plate, options, tmp_path, alone):
    plan = plan_shards(find_images([str(plate)]), tmp_path, options, 3)
    run_all(plan)
    merged = merge_shards(tmp_path, shown=False)
    assert (merged.images, merged.missing) == (9, [])
    assert [path.name for path, _ in merged.failures] == ["broken.tif"]
    found = results(tmp_path)
    cells = found.pop("cells.csv").decode().splitlines()
    assert found == alone  # the journal too: one worker goes in order
    assert len(cells) - 1 == merged.cells
    header, *lines = cells
    assert header.startswith("image,label,")
    one = [line.split(",", 1)[1] for line in lines if line.startswith("f3,")]
    assert one == alone["f3_cells.csv"].decode().splitlines()[1:]
    # A failed image is tried again, the others are not.
    assert open_shards(plan) == [state.index for state in shard_states(plan) if state.failed]
    again = run_shard(tmp_path, open_shards(plan)[0], shown=False)
    assert again.skipped == len(again.rows)


def test_merging_early_names_what_is_missing(plate, options, tmp_path):
    plan_shards(find_images([str(plate)]), tmp_path, options, 3)
    run_shard(tmp_path, 1, shown=False)
    merged = merge_shards(tmp_path, shown=False)
    assert [state.index for state in merged.missing] == [0, 2]
    assert "not done: 4 of 4 images of shard 0" in merged.text()
    summary = (tmp_path / "summary.csv").read_text()
    assert summary.count("not done: shard 0 is not finished") == 4


def test_merging_keeps_images_of_an_earlier_batch(plate, options, tmp_path):
    paths = [path for path in find_images([str(plate)]) if path.stem != "broken"]
    segment_files(paths[:3], tmp_path, options, shown=False)
    run_all(plan_shards(paths[3:], tmp_path, options, 2))
    merged = merge_shards(tmp_path, shown=False)
    assert merged.images == len(paths) - 3
    names = [line.split(",")[0] for line in (tmp_path / "summary.csv").read_text().splitlines()]
    assert names == ["name", *(path.stem for path in paths)]


KILLED = """
import os, signal, sys
from pathlib import Path
from dinocell.batch import run as batch
from dinocell.batch.parts import run_shard
from dinocell.network.backbone import BACKBONE_SIZES, BackboneSize
BACKBONE_SIZES["tiny"] = BackboneSize(embed_dim=48, depth=4, num_heads=3)  # as `mini_networks`
count, moment = 0, int(sys.argv[2])
replace = os.replace
def counted(*arguments):
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*arguments)
os.replace = counted
run_shard(sys.argv[1], 0, shown=False)
"""


def test_a_part_killed_while_it_writes(plate, options, tmp_path, alone):
    """Between writing a file and giving it its name."""
    plan = plan_shards(find_images([str(plate)]), tmp_path, options, 2)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'dinov3_modified'}"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "4"], env=environment,
        capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob(".tmp-*"))
    run_all(plan)
    merge_shards(tmp_path, shown=False)
    found = results(tmp_path)
    found.pop("cells.csv")
    assert without_order(found) == without_order(alone)


def test_a_journal_cut_in_a_line(plate, options, tmp_path, alone):
    plan = plan_shards(find_images([str(plate)]), tmp_path, options, 1)
    run_shard(tmp_path, 0, shown=False)
    journal = shard_folder(tmp_path, 0) / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-40])
    assert shard_states(plan)[0].done == 8
    assert run_shard(tmp_path, 0, shown=False).skipped == 8
    assert run_shard(tmp_path, 0, shown=False).skipped == 9  # the new line was not glued to the old
    merge_shards(tmp_path, shown=False)
    found = results(tmp_path)
    found.pop("cells.csv")
    assert without_order(found) == without_order(alone)


# --- the commands ---


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_commands(plate, options, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert exit_code("shards", "plan", "2", str(plate), "-o", out, "-m", options.model,
                     "--device", "cpu", "--no-overlay") == 0  # fmt: skip
    assert capsys.readouterr().out.startswith("10 images, 0.000 GB in 2 shards")
    assert exit_code("shards", "run", out, "2") == 2
    assert "must be one of 0 to 1, got 2" in capsys.readouterr().err
    assert exit_code("shards", "run", out, "0") == 0
    assert exit_code("shards", "merge", out) == 1
    shown = capsys.readouterr()
    assert "not done: 5 of 5 images of shard 1" in shown.out
    assert "got 5 that are neither (shards 1): run the same command again" in shown.err
    assert exit_code("shards", "run", out, "1") == 0
    capsys.readouterr()
    assert exit_code("shards", "status", out) == 0
    assert "4 of 5 images done, 1 failed" in capsys.readouterr().out
    assert exit_code("shards", "merge", out) == 0
    assert "broken.tif" in capsys.readouterr().out
