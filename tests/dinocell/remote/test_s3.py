"""Images from S3 and results to it, on a server of its protocol."""

from __future__ import annotations

import csv
import io
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from dinocell.batch import remote
from dinocell.batch.options import SegmentOptions
from dinocell.batch.parts import plan_shards, run_shard
from dinocell.batch.remote import segment_anywhere
from dinocell.batch.run import segment_files
from dinocell.batch.units import units_of
from dinocell.cli import main
from dinocell.errors import DINOCellError, UsageError
from dinocell.io import describe_image, find_images, read_image, s3
from dinocell.io.s3 import S3Error, S3Path, images_below, place_of
from dinocell.network.model import save_model


@pytest.fixture
def model_path(mini_model, tmp_path):
    save_model(tmp_path / "model.safetensors", mini_model)
    return tmp_path / "model.safetensors"


def options(**given) -> SegmentOptions:
    return SegmentOptions(**{"device": "cpu", "overlay": False, **given})


def picture(seed: int, shape: tuple[int, ...] = (40, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(np.uint16)


def tiff(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels)
    return stream.getvalue()


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def write_zarr(folder: Path, pixels: np.ndarray, axes: str, version: int = 2) -> None:
    """OME-Zarr with chunks of 16 × 16 px; each voxel is 0.5 µm."""
    import zarr

    group = zarr.open_group(str(folder), mode="w", zarr_format=version)
    chunks = (1,) * (pixels.ndim - 2) + (16, 16)
    group.create_array("0", shape=pixels.shape, chunks=chunks, dtype=pixels.dtype)[...] = pixels
    kinds = {"t": "time", "c": "channel"}
    image = {
        "axes": [
            {"name": a, "type": kinds.get(a, "space")}
            | ({} if a in kinds else {"unit": "micrometer"})
            for a in axes
        ],
        "datasets": [
            {
                "path": "0",
                "coordinateTransformations": [{"type": "scale", "scale": [0.5] * pixels.ndim}],
            }
        ],
        "version": "0.4",
    }
    content: dict[str, Any] = {"multiscales": [image]}
    group.attrs.update(content if version == 2 else {"ome": content | {"version": "0.5"}})


def upload(server, folder: Path, prefix: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            server.put(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def test_addresses() -> None:
    place: Any = place_of("s3://bucket/a/plate.zarr")
    assert isinstance(place, S3Path)
    assert (str(place), place.bucket, place.key) == (
        "s3://bucket/a/plate.zarr",
        "bucket",
        "a/plate.zarr",
    )
    assert str(place_of(Path("s3://bucket/a/plate.zarr"))) == str(place)  # pathlib leaves one slash
    assert place_of(place) is place
    assert str(place / "A" / "1") == "s3://bucket/a/plate.zarr/A/1"
    assert str(place.parent) == "s3://bucket/a"
    assert (place.stem, place.suffix) == ("plate", ".zarr")
    assert place_of("s3.tif") == Path("s3.tif")
    with pytest.raises(UsageError, match="name the bucket"):
        place_of("s3://")


@pytest.mark.parametrize("version", [2, 3])
def test_planes_of_a_zarr_are_read_by_chunks(server, tmp_path, version) -> None:
    """What is not asked for need not be there; a chunk that is missing has the fill value."""
    pixels = picture(0, (3, 40, 48))
    write_zarr(tmp_path / "a.zarr", pixels, "zyx", version)
    upload(server, tmp_path / "a.zarr", "in/a.zarr")
    place = "s3://bucket/in/a.zarr"
    (one,) = describe_image(place).series
    assert (one.axes, one.shape, one.edge_um) == ("ZYX", (3, 40, 48), 0.5)
    for key in server.listed("in/a.zarr/0/"):
        if key.startswith(("in/a.zarr/0/0", "in/a.zarr/0/c/0")):  # of the first plane
            server.client.delete_object(Bucket="bucket", Key=key)
    np.testing.assert_array_equal(read_image(place, z=1).pixels, pixels[1])
    assert not read_image(place, z=0).pixels.any()


def test_files_are_fetched_and_named_in_errors(server) -> None:
    server.put("in/a.tif", tiff(picture(1)))
    server.put("in/b.tif", tiff(picture(1))[:300])
    image = read_image("s3://bucket/in/a.tif")
    np.testing.assert_array_equal(image.pixels, picture(1))
    server.put("in/a.tif", tiff(picture(2)))  # no stale copy
    np.testing.assert_array_equal(read_image("s3://bucket/in/a.tif").pixels, picture(2))
    with pytest.raises(DINOCellError, match=r"'s3://bucket/in/b\.tif' .*damaged or cut short"):
        read_image("s3://bucket/in/b.tif")
    with pytest.raises(UsageError, match=r"There is no file 's3://bucket/in/c\.tif'"):
        read_image("s3://bucket/in/c.tif")
    with pytest.raises(UsageError, match="'s3://bucket/in' is a folder"):
        read_image("s3://bucket/in")


def test_copies_that_a_killed_process_left_are_removed(server, tmp_path, monkeypatch) -> None:
    copies = s3._Copies()
    monkeypatch.setattr(s3, "_copies", copies)
    server.put("in/a.tif", tiff(picture(1)))
    folder = tmp_path / "copies"
    left = folder / "dinocell-s3-left" / "a.tif"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a process that was killed")
    other = folder / "mine.tif"
    other.write_bytes(b"of somebody who keeps copies there")
    s3.keep_copies_in(folder)
    assert list(folder.iterdir()) == [other]
    read_image(place_of("s3://bucket/in/a.tif"))
    assert [path.name for path in folder.glob("*/*")] == ["a.tif"]
    for kept in copies.kept.values():
        kept.cleanup()


def test_folders(server, tmp_path) -> None:
    write_zarr(tmp_path / "z", picture(0), "yx")
    upload(server, tmp_path / "z", "in/sub/z.zarr")
    upload(server, tmp_path / "z", "in/y")
    for name in ("a10.tif", "a2.tif", "a2_labels.tif", "a2_cells.csv", ".hidden.tif", "notes.txt"):
        server.put(f"in/{name}", b"x")
    found = [str(path) for path in find_images(["s3://bucket/in"])]
    names = ["s3://bucket/in/a2.tif", "s3://bucket/in/a10.tif", "s3://bucket/in/y"]
    assert found == names
    inside = [str(path) for path in find_images(["s3://bucket/in/"], recursive=True)]
    assert inside == [*names[:2], "s3://bucket/in/sub/z.zarr", names[2]]
    assert find_images(["s3://bucket/in/sub/z.zarr"]) == [place_of("s3://bucket/in/sub/z.zarr")]
    with pytest.raises(UsageError, match="There is no file or folder 's3://bucket/none'"):
        find_images(["s3://bucket/none"])
    with pytest.raises(UsageError, match="got the pattern"):
        find_images(["s3://bucket/in/*.tif"])
    server.put("none/notes.txt", b"x")
    with pytest.raises(UsageError, match="holds none: images end in"):
        find_images(["s3://bucket/none"])


@pytest.fixture
def plate(server, tmp_path) -> str:
    """OME-Zarr with two wells, of two and of one field, of two planes along z."""
    import zarr

    folder = tmp_path / "P1.zarr"
    top = zarr.open_group(str(folder), mode="w", zarr_format=2)
    top.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "B/12"}], "version": "0.4"}
    for number, (well, fields) in enumerate({"A/1": 2, "B/12": 1}.items()):
        group = zarr.open_group(str(folder / well), mode="w", zarr_format=2)
        group.attrs["well"] = {"images": [{"path": str(field)} for field in range(fields)]}
        for field in range(fields):
            write_zarr(folder / well / str(field), picture(5 * number + field, (2, 40, 48)), "zyx")
    upload(server, folder, "in/P1.zarr")
    return "s3://bucket/in/P1.zarr"


def test_a_plate_from_s3_to_s3(server, plate, tmp_path, model_path, capsys) -> None:
    """The same results as of a plate on this machine, except for the name of the source."""
    how = ["-m", model_path, "--device", "cpu", "--no-overlay", "--z", "1"]
    how += ["--format", "tif", "--format", "ome-zarr", "--format", "parquet"]
    assert run("segment", plate, "-o", "s3://bucket/out/x", *how) == 0
    assert "in 3 images" in (printed := capsys.readouterr().out)
    assert "→ s3://bucket/out/x" in printed
    local = tmp_path / "local"
    given = options(z=1, formats=("tif", "ome-zarr", "parquet"), model=str(model_path))
    segment_files([tmp_path / "P1.zarr"], local, given, shown=False)
    files = {
        path.relative_to(local).as_posix(): path.read_bytes()
        for path in local.rglob("*")
        if path.is_file()
    }
    keys = {key.removeprefix("out/x/") for key in server.listed("out/x/")}
    assert keys == files.keys()
    assert "P1_B12_s0_labels.zarr/labels/cells/0/0/0" in keys
    for name, content in files.items():
        if name in ("images.jsonl", "summary.csv", "settings.json"):
            continue
        assert server.get(f"out/x/{name}") == content, name
    rows = list(csv.DictReader(server.get("out/x/summary.csv").decode().splitlines()))
    assert [(row["plate"], row["well"], row["site"]) for row in rows] == [
        *(("P1", "A01", "0"), ("P1", "A01", "1"), ("P1", "B12", "0"))
    ]
    assert rows[2]["source"] == "s3://bucket/in/P1.zarr/B/12/0"
    wells = list(csv.DictReader(server.get("out/x/wells.csv").decode().splitlines()))
    assert [(row["well"], row["images"]) for row in wells] == [("A01", "2"), ("B12", "1")]


@pytest.mark.slow
def test_resume_refusal_and_overwriting(server, plate, mini_model, monkeypatch) -> None:
    paths = find_images([plate])
    out = Path("s3://bucket/out")

    def segmented(**given):
        how = options(z=1, **given)
        return segment_anywhere(paths, out, how, model=mini_model, shown=False)

    segmented()
    with pytest.raises(UsageError, match=r"got 3 in s3://bucket/out: set `resume`"):
        segmented()
    labels = {key: server.get(key) for key in server.listed("out/") if key.endswith(".tif")}
    assert len(labels) == 3
    server.client.delete_object(Bucket="bucket", Key="out/P1_A01_s1_labels.tif")
    again = segmented(resume=True)
    assert (again.skipped, len(again.rows)) == (2, 3)
    assert {key: server.get(key) for key in labels} == labels
    assert "claim.json" not in " ".join(server.listed("out/"))
    with pytest.raises(UsageError, match="got other values of min_score"):
        segmented(resume=True, min_score=0.5)
    assert segmented(overwrite=True, report=True).skipped == 0
    # a field that has changed is segmented again, the others are kept
    (changed,) = [key for key in server.listed("in/") if key.endswith("A/1/0/0/1.0.0")]
    server.put(changed, server.get(changed)[::-1])
    again = segmented(resume=True, report=True)
    assert again.skipped == 2
    assert again.notes[-1].endswith("files have changed: P1_A01_s0")
    page = server.get("out/report.html").decode()
    assert "P1_B12_s0" in page
    assert page.count("data:image/") >= 3  # of the images of the earlier run, too


def test_a_second_run_is_refused(server, plate, mini_model) -> None:
    out: Any = place_of("s3://bucket/out")
    paths = find_images([plate])
    with (
        remote._claimed(out, remote.Claimant(job="7")),
        pytest.raises(DINOCellError, match=r"got s3://bucket/out, which job 7 on .* is running"),
    ):
        segment_anywhere(paths, out, options(z=0), model=mini_model, shown=False)
    server.put("out/claim.json", json.dumps({"host": "gone", "pid": 1}).encode())
    with pytest.raises(DINOCellError, match=r"delete s3://bucket/out/claim\.json if it is gone"):
        segment_anywhere(paths, out, options(z=0), model=mini_model, shown=False)


def test_an_interrupted_run_continues(server, tmp_path, mini_model) -> None:
    """What was finished is noted; the claim of a process that died on this machine is taken over."""
    for number in range(3):
        (tmp_path / f"a{number}.tif").write_bytes(tiff(picture(number)))
    paths, out = sorted(tmp_path.glob("a*.tif")), Path("s3://bucket/out")

    class Interrupting(remote.Watcher):
        def loaded(self, image) -> None:
            if image.name == "a2":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_anywhere(
            paths, out, options(), model=mini_model, shown=False, watcher=Interrupting()
        )
    assert "out/a0_labels.tif" in server.listed("out/")
    assert "out/claim.json" not in server.listed("out/")
    dead = {"host": socket.gethostname(), "pid": 2**30, "began": "1"}
    server.put("out/claim.json", json.dumps(dead).encode())
    again = segment_anywhere(paths, out, options(resume=True), model=mini_model, shown=False)
    assert again.skipped >= 1
    assert len(again.rows) == 3
    assert "out/claim.json" not in server.listed("out/")


def test_a_replacement_that_was_stopped_is_repeated_with_its_name(
    server, tmp_path, mini_model
) -> None:
    """The old journal would call the image done, and without the summary it would be `x/a`."""
    paths, out = [tmp_path / "x" / "a.tif", tmp_path / "y" / "a.tif"], Path("s3://bucket/out")
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(tiff(picture(number)))

    class Interrupting(remote.Watcher):
        def loaded(self, image) -> None:
            raise KeyboardInterrupt

    how = {"model": mini_model, "shown": False}
    segment_anywhere(paths[:1], out, options(), **how)
    with pytest.raises(KeyboardInterrupt):
        segment_anywhere(paths, out, options(overwrite=True), watcher=Interrupting(), **how)
    again = segment_anywhere(paths, out, options(resume=True), **how)
    assert (again.skipped, [row["name"] for row in again.rows]) == (0, ["a", "y/a"])


@pytest.mark.slow
def test_parts_of_a_plate_on_s3(server, plate, tmp_path, model_path) -> None:
    given = options(z="each", model=str(model_path))
    plan = plan_shards(find_images([plate]), tmp_path / "out", given, 2)
    assert (plan.count, plan.images) == (2, 6)
    assert plan.total_bytes > 6 * 2 * 40 * 48 // 2
    for index in range(2):
        assert run_shard(tmp_path / "out", index, shown=False).failures == []
    assert len(list((tmp_path / "out").glob("*_labels.tif"))) == 6
    assert plan_shards(find_images([plate]), tmp_path / "out", given, 2).images == 6
    with pytest.raises(UsageError, match="must be a folder that all processes share"):
        plan_shards(find_images([plate]), "s3://bucket/parts", given, 2)


def test_images_that_cannot_be_read_fail_alone(server, mini_model, capsys) -> None:
    """Gone after they were listed, damaged, or a plate with a hole; the others are segmented."""
    server.put("in/good.tif", tiff(picture(1)))
    server.put("in/damaged.tif", b"II*\0no image")
    plate = {"plate": {"wells": [{"path": "A/1"}]}}
    server.put("in/hole.zarr/.zattrs", json.dumps(plate).encode())
    paths = [*find_images(["s3://bucket/in"]), place_of("s3://bucket/in/gone.tif")]
    out = Path("s3://bucket/out")
    result = segment_anywhere(paths, out, options(), model=mini_model, shown=False)
    assert [row["name"] for row in result.rows] == ["good"]
    sentences = {path.name: sentence for path, sentence in result.failures}
    assert "damaged or cut short" in sentences["damaged.tif"]
    assert "lacks A/1" in sentences["hole.zarr"]
    assert "There is no file 's3://bucket/in/gone.tif'" in sentences["gone.tif"]
    assert "failed: s3://bucket/in/damaged.tif: " in result.text()
    assert b"lacks A/1" in server.get("out/summary.csv")


def test_no_bucket_and_no_permission(server, mini_model, monkeypatch, model_path, capsys) -> None:
    with pytest.raises(S3Error, match="There is no bucket 'none' on S3: check the address"):
        find_images(["s3://none/a"])
    server.put("in/a.tif", tiff(picture(1)))
    paths = find_images(["s3://bucket/in"])
    with pytest.raises(S3Error, match=r"here is no (such )?bucket"):
        segment_anywhere(paths, Path("s3://none/x"), options(), model=mini_model, shown=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    from dinocell.io import s3

    s3._store.cache_clear()
    assert run("segment", "s3://bucket/in", "-o", "s3://bucket/out", "-m", model_path) == 1
    assert "You have no permission for 's3://bucket/" in capsys.readouterr().err
    with pytest.raises(S3Error, match="You have no permission"):
        read_image("s3://bucket/in/a.tif")


class Stopping(remote.Watcher):
    """Stops the server once an image was read, or once its map was predicted."""

    def __init__(self, server, when: str, number: int) -> None:
        self.server, self.when, self.left = server, when, number

    def count(self, when: str) -> None:
        if when == self.when:
            self.left -= 1
            if self.left == 0:
                self.server.stop()

    def loaded(self, image) -> None:
        self.count("loaded")

    def predicted(self, pipeline, image, distance_map) -> None:
        self.count("predicted")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("Generic S3 error: Error after 2 retries: tcp connect error 127.0.0.1:40351", "S3 must"),
        ("Generic S3 error: Error after 2 retries in 1.403s: connection reset", "S3 must"),
        (
            "Generic S3 error: Error performing GET http://a/b in 403.7ms, after 3 retries",
            "S3 must",
        ),
        ("Generic S3 error: Server returned non-2xx status code: 403 Forbidden", "You have no"),
    ],
)
def test_a_number_in_an_error_is_no_status(text, start) -> None:
    kind = type("GenericError", (Exception,), {"__module__": "obstore.exceptions"})
    assert str(s3.refusal(place_of("s3://bucket/a"), kind(text))).startswith(start)


def test_s3_disappears_while_it_is_read(mortal_server, tmp_path, mini_model) -> None:
    """The images of this machine are still segmented; the others are listed with a sentence each."""
    for number in range(4):
        mortal_server.put(f"in/s{number}.tif", tiff(picture(number)))
    (tmp_path / "here.tif").write_bytes(tiff(picture(9)))
    paths = [*find_images(["s3://bucket/in"]), tmp_path / "here.tif"]
    result = segment_anywhere(
        paths,
        tmp_path / "out",
        options(),
        model=mini_model,
        shown=False,
        watcher=Stopping(mortal_server, "loaded", 1),
    )
    done = [row["name"] for row in result.rows]
    assert done[0] == "s0"
    assert done[-1] == "here"
    assert len(result.failures) == 5 - len(done) >= 2
    for _, sentence in result.failures:
        assert sentence.startswith("S3 must answer, got nothing for 's3://bucket/in/s")
        assert "\n" not in sentence


def test_s3_disappears_while_results_are_written(mortal_server, tmp_path, mini_model) -> None:
    for number in range(3):
        (tmp_path / f"a{number}.tif").write_bytes(tiff(picture(number)))
    paths = sorted(tmp_path.glob("a*.tif"))
    result = segment_anywhere(
        paths,
        Path("s3://bucket/out"),
        options(),
        model=mini_model,
        shown=False,
        watcher=Stopping(mortal_server, "predicted", 2),
    )
    assert len(result.failures) >= 3
    where, last = result.failures[-1]
    assert (str(where), last[:20]) == ("s3://bucket/out", "journal and summary:")
    assert all("S3 must answer" in sentence for _, sentence in result.failures)


def test_units_of_s3_and_of_this_machine(server, tmp_path) -> None:
    server.put("in/a.tif", tiff(picture(0)))
    server.put("in/b/a.tif", tiff(picture(0)))
    remote_paths = find_images(["s3://bucket/in"], recursive=True)
    assert [unit.name for unit in units_of(remote_paths, options())] == ["a", "b/a"]
    (tmp_path / "a.tif").write_bytes(tiff(picture(0)))
    with pytest.raises(UsageError, match="must differ in name"):
        units_of([remote_paths[0], tmp_path / "a.tif"], options())
    assert images_below(S3Path("s3://bucket/in"), recursive=False) == remote_paths[:1]


def test_a_service_reads_below_the_addresses_that_it_may(server, tmp_path, mini_model) -> None:
    from dinocell.service.queue import Queue
    from dinocell.service.worker import Worker

    for key in ("open/a.tif", "a.tif"):
        server.put(key, tiff(picture(0)))
    queue = Queue(tmp_path)
    worker = Worker(queue, mini_model, options(), lambda line: None)
    worker.places = (place_of("s3://bucket/open"),)
    addresses = [f"s3://bucket/{key}" for key in ("open/a.tif", "a.tif", "open/missing.tif")]
    jobs = [queue.add("a", address, {}, lambda path: None, limit=9) for address in addresses]
    worker.work_off()
    first, outside, missing = (queue.get(job.id) for job in jobs)
    assert None not in (first, outside, missing)
    assert (first.state, first.summary["num_cells"] > 0) == ("done", True)
    assert (outside.state, "may not read" in str(outside.error)) == ("failed", True)
    assert (missing.state, "bucket" in str(missing.error)) == ("failed", False)
    queue.close()
