"""A stage of a merge: the number of waiting jobs, and the end of the others after a failure."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from composer.merge.shards import Stage


def test_no_more_jobs_are_unfinished_than_allowed() -> None:
    gate, done = threading.Event(), list[int]()

    def job(number: int) -> None:
        gate.wait()
        done.append(number)

    with Stage("copy", threads=2, most=3) as stage, ThreadPoolExecutor(1) as submitter:
        for number in range(3):
            stage.submit(partial(job, number))
        fourth = submitter.submit(stage.submit, partial(job, 3))
        time.sleep(0.05)
        assert not fourth.done()
        gate.set()
        fourth.result(10)
        stage.drain()
        assert sorted(done) == [0, 1, 2, 3]


def test_the_first_failure_in_order_is_raised_by_every_later_submission_and_at_the_end() -> None:
    second_failed = threading.Event()

    def fail(name: str, after: threading.Event | None = None) -> None:
        if after is not None:
            after.wait()
        raise ValueError(name)

    def fail_second() -> None:
        try:
            fail("second")
        finally:
            second_failed.set()

    with Stage("copy", threads=2, most=8) as stage:
        stage.submit(partial(fail, "first", second_failed))
        stage.submit(fail_second)
        with pytest.raises(ValueError, match="first"):
            stage.drain()
        for _ in range(20):  # more often than there are slots: a refused job uses none
            with pytest.raises(ValueError, match="first"):
                stage.submit(lambda: None)


def test_a_stage_that_feeds_one_that_failed_ends_and_starts_no_further_jobs() -> None:
    started: list[int] = []

    def confirm() -> None:
        raise ValueError("does not match")

    def write(number: int, confirming: Stage) -> None:
        started.append(number)
        confirming.submit(confirm)
        time.sleep(0.01)

    def run() -> None:
        with Stage("confirm", threads=1, most=1) as confirming, Stage("write", threads=2, most=4) as writing:
            for number in range(1_000):
                writing.submit(partial(write, number, confirming))
            writing.drain()

    with pytest.raises(ValueError, match="does not match"):
        run()
    assert len(started) < 20
