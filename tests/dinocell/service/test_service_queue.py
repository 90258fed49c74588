"""The queue on disk: order, limits, what a killed process leaves, what expires."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from types import SimpleNamespace

import pytest

from dinocell.batch.journal import MAX_KILLS
from dinocell.service import queue as module
from dinocell.service.news import News
from dinocell.service.queue import Queue, QueueFullError


@pytest.fixture
def queue(tmp_path):
    queue = Queue(tmp_path)
    yield queue
    queue.close()


def add(queue, name="a", size=10, limit=100):
    return queue.add(
        name, "image.tif", {"page": 1}, lambda path: path.write_bytes(b"x" * size), limit=limit
    )


def test_jobs_are_taken_in_their_order(queue):
    jobs = [add(queue, name) for name in "abc"]
    assert [queue.place(job) for job in jobs] == [0, 1, 2]
    taken = [queue.take() for _ in range(4)]
    assert [job and job.name for job in taken] == ["a", "b", "c", None]
    assert taken[0].state == "running"
    assert taken[0].options == {"page": 1}
    queue.finish(taken[0], summary={"num_cells": 3}, counts={"cells_total": 3})
    queue.finish(taken[1], error="broken")
    states = [(job.state, job.error) for job in map(queue.get, (job.id for job in jobs))]
    assert states == [("done", None), ("failed", "broken"), ("running", None)]
    assert queue.get(jobs[0].id).summary == {"num_cells": 3}
    assert queue.counters() == {
        "cells_total": 3,
        'jobs_total{state="done"}': 1,
        'jobs_total{state="failed"}': 1,
    }
    assert [job.name for job in queue.newest()] == ["c", "b", "a"]
    assert queue.get("../a") is None


def test_several_threads_and_connections_take_each_job_once(queue, tmp_path):
    ids = {add(queue).id for _ in range(20)}
    taken, others = [], [Queue(tmp_path) for _ in range(3)]

    def work(own):
        while (job := own.take()) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(other,)) for other in (queue, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        other.close()
    assert sorted(taken) == sorted(ids)


def test_a_full_queue_takes_nothing(queue):
    add(queue, limit=1)
    with pytest.raises(QueueFullError, match="1 waiting jobs"):
        add(queue, limit=1)
    queue.take()
    add(queue, limit=1)
    assert len(list((queue.folder / "jobs").iterdir())) == 2


def test_an_upload_that_breaks_off_leaves_nothing(queue):
    def write(path):
        path.write_bytes(b"half")
        raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        queue.add("a", "image.tif", {}, write, limit=1)
    assert queue.newest() == []
    assert list((queue.folder / "jobs").iterdir()) == []


def test_what_a_killed_process_worked_on_is_queued_again(queue):
    job, other = add(queue), add(queue)
    for kill in range(1, MAX_KILLS):
        assert queue.take().id == job.id
        queue.recover()
        assert (queue.get(job.id).state, queue.get(job.id).kills) == ("queued", kill)
    queue.take()
    queue.recover(killed=False)  # a service that was stopped is no fault of the image
    assert queue.get(job.id).state == "queued"
    queue.take()
    queue.recover()
    assert queue.get(job.id).state == "failed"
    assert "memory" in queue.get(job.id).error
    assert queue.take().id == other.id


def test_a_job_that_was_cancelled_while_it_ran_is_not_queued_again(queue):
    job = add(queue)
    queue.take()
    queue.remove(job.id)
    assert queue.stops(job.id)
    assert queue.get(job.id).state == "running"
    queue.recover()
    assert queue.get(job.id).state == "cancelled"
    assert not queue.job_folder(job.id).exists()
    assert queue.counters() == {'jobs_total{state="cancelled"}': 1}


def test_a_job_that_was_cancelled_at_its_last_step_is_cancelled(queue):
    job = add(queue)
    queue.take()
    queue.remove(job.id)
    queue.finish(job, summary={"num_cells": 3})
    assert queue.get(job.id).state == "cancelled"
    assert not queue.job_folder(job.id).exists()


def test_a_transaction_that_the_disk_refuses_does_not_block_the_next(queue):
    queue._database.execute("PRAGMA max_page_count = 1")  # as a full disk: nothing may grow
    with pytest.raises(sqlite3.OperationalError, match="full"):
        add(queue, name="a" * 10**6)
    queue._database.execute("PRAGMA max_page_count = 1000000")
    assert add(queue).state == "queued"


def test_sweeping_deletes_folders_of_no_job(queue):
    job = add(queue)
    (queue.folder / "jobs" / "left").mkdir()
    queue.sweep()
    assert [path.name for path in (queue.folder / "jobs").iterdir()] == [job.id]


def test_what_cannot_be_swept_stays(queue, monkeypatch):
    job = add(queue)

    def refuse(*_, **more):
        raise PermissionError("of another user")

    monkeypatch.setattr(module, "remove_temporary_files", refuse)
    queue.sweep()
    assert queue.job_folder(job.id).is_dir()


def test_time_and_space_bound_what_is_kept(queue):
    jobs = [add(queue, size=1000) for _ in range(4)]
    for _ in jobs[:3]:
        queue.finish(queue.take())
    ended = queue.get(jobs[2].id).finished
    assert queue.expire(keep_s=60, keep_bytes=1e6, now=ended + 1) == []
    (queue.job_folder(jobs[2].id) / "current.json").write_text("{}")
    (queue.job_folder(jobs[2].id) / "undo").write_bytes(bytes(300))  # corrections count, too
    assert queue.expire(keep_s=60, keep_bytes=3200, now=ended + 1) == [jobs[0].id]
    assert not queue.job_folder(jobs[0].id).exists()
    assert set(queue.expire(keep_s=60, keep_bytes=1e6, now=ended + 61)) == {jobs[1].id, jobs[2].id}
    assert [queue.get(job.id).state for job in jobs] == ["expired"] * 3 + ["queued"]
    queue.expire(keep_s=60, keep_bytes=1e6, now=ended + 40 * 86_400)
    assert queue.get(jobs[0].id) is None


def test_the_newest_stays_although_it_is_too_large_alone(queue):
    jobs = [add(queue, size=1000) for _ in range(2)]
    for _ in jobs:
        queue.finish(queue.take())
    ended = queue.get(jobs[1].id).finished
    assert queue.expire(keep_s=60, keep_bytes=500, now=ended + 1) == [jobs[0].id]
    assert queue.expire(keep_s=60, keep_bytes=500, now=ended + 61) == [jobs[1].id]


def test_a_later_failure_does_not_take_the_place_of_the_newest_result(queue):
    result, failure = add(queue, size=1000), add(queue, size=10)
    queue.finish(queue.take())
    queue.finish(queue.take(), error="broken")
    now = queue.get(failure.id).finished
    assert queue.expire(keep_s=60, keep_bytes=500, now=now) == []
    assert queue.get(result.id).state == "done"


def test_what_was_changed_last_stays_longest(queue):
    jobs = [add(queue, size=1000) for _ in range(3)]
    for _ in jobs:
        queue.finish(queue.take())
    ended = queue.get(jobs[2].id).finished
    changed = queue.job_folder(jobs[0].id) / "current.json"
    changed.write_text("{}")
    os.utime(changed, (ended + 50, ended + 50))
    assert queue.expire(keep_s=60, keep_bytes=2500, now=ended + 55) == [jobs[1].id]
    assert queue.expire(keep_s=60, keep_bytes=1e6, now=ended + 70) == [jobs[2].id]
    assert queue.expire(keep_s=60, keep_bytes=1e6, now=ended + 40 * 86_400) == [jobs[0].id]
    assert queue.get(jobs[0].id).state == "expired"  # whoever asks for it soon is answered


def test_nobody_follows_a_job_when_the_service_stops():
    async def follow():
        news = News(asyncio.get_running_loop(), lambda job_id: SimpleNamespace(state="running"))
        states = news.follow("a", beat_s=600)
        seen = [(await anext(states)).state]
        waiting = asyncio.ensure_future(anext(states, None))
        await asyncio.sleep(0)  # it waits for news
        news.end()
        return [*seen, (await waiting).state, await anext(states, "ended")]

    assert asyncio.run(follow()) == ["running", "running", "ended"]
