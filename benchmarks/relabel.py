"""Time of new thresholds at a service: the watershed on the stored map, and the answer.

    python benchmarks/relabel.py               # 1,024 x 1,024 px, real HTTP on this computer

The distance map is a grid of cones with noise, about 330 cells.  Measured is the time of `POST relabel` as
a client sees it, which includes the changed labels, and the processor time of the whole process, for
thresholds that change the cells each time.

Writes benchmarks/results/relabel.json; the load of the machine is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import requests
import uvicorn

from dinocell.io import write_labels
from dinocell.service.app import create_app
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Queue
from dinocell.service.service import Service

RESULTS = Path(__file__).parent / "results" / "relabel.json"
SPACING_PX = 56


def make_job(service: Service, side: int) -> str:
    """A finished job with its map; returns its id."""
    job = service.queue.add("map", "image.tif", {}, lambda path: path.write_bytes(b"x"), limit=9)
    folder = service.queue.job_folder(job.id)
    rng = np.random.default_rng(0)
    at = np.arange(side) % SPACING_PX - SPACING_PX / 2
    cone = np.clip(1 - np.hypot(at[:, None], at) / (SPACING_PX / 2), 0, 1)
    noisy = np.clip(cone + rng.normal(0, 0.03, cone.shape), 0, 1).astype(np.float32)
    np.save(folder / "map.npy", noisy)
    np.save(folder / "plane.npy", (1000 * cone).astype(np.uint16))
    (folder / "result").mkdir()
    write_labels(folder / "result" / "image_labels.tif", np.zeros(cone.shape, np.uint16))
    about = {"pixel_size_um": None, "channel_names": [], "warnings": [], "unfamiliar": None}
    about |= {"target": "linear", "min_score": 0.0, "peak_threshold": 0.5, "fill_threshold": 0.2}
    about |= {"min_prominence": 0.1, "min_area_px": 0}
    (folder / "about.json").write_text(json.dumps(about))
    taken = service.queue.take()
    assert taken is not None
    service.queue.finish(taken, summary={"num_cells": 0, "warnings": ""})
    return job.id


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(ServiceOptions(jobs=Path(folder)), Queue(Path(folder)))
        job = make_job(service, given.side)
        server = uvicorn.Server(
            uvicorn.Config(create_app(service), port=0, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/api/v1/jobs/{job}/relabel"
        session, wall, processor, cells = requests.Session(), [], [], 0
        for turn in range(given.repeats + 3):
            before = time.perf_counter(), time.process_time()
            answer = session.post(url, json={"peak_threshold": 0.4 + 0.01 * (turn % 20)})
            now = time.perf_counter(), time.process_time()
            answer.raise_for_status()
            cells = answer.json()["num_cells"]
            if turn >= 3:  # functions are compiled by then
                wall.append(1000 * (now[0] - before[0]))
                processor.append(1000 * (now[1] - before[1]))
        server.should_exit = True
        thread.join(10)
    row = {
        "command": " ".join(["python", *sys.argv]),
        "side_px": given.side,
        "cells": cells,
        "median_ms": round(float(np.median(wall)), 1),
        "p95_ms": round(float(np.percentile(wall, 95)), 1),
        "least_ms": round(min(wall), 1),
        "median_processor_ms": round(float(np.median(processor)), 1),
        "wall_ms": [round(value, 1) for value in wall],
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
