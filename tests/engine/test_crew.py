"""Jobs on several threads: what is raised does not depend on which of them was faster."""

from __future__ import annotations

import threading
import time

import pytest

from lorahub.engine.crew import run_jobs


class Broken(Exception):
    pass


def failing(name, wait=0.0):
    def job(_):
        time.sleep(wait)
        raise Broken(name)

    return job


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_failure_in_order_is_raised(threads):
    done = []
    jobs = [
        lambda _: done.append(0),
        failing("slow", 0.05),
        *[failing(f"fast {number}") for number in range(4)],
    ]
    with pytest.raises(Broken, match="slow"):
        run_jobs(jobs, threads)
    assert done == [0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_of_an_earlier_job_are_done_before_a_later_failure_is_raised(threads):
    done = []

    def part(number):
        def job(_):
            time.sleep(0.01)
            done.append(number)

        return job

    def several(_):
        time.sleep(0.02)
        return [*map(part, range(6)), failing("the last part")]

    with pytest.raises(Broken, match="the last part"):
        run_jobs([several, failing("at once")], threads)
    assert sorted(done) == list(range(6))


def test_nothing_behind_a_failure_is_begun():
    begun, failed = [], threading.Event()

    def first(_):
        failed.wait(5)
        time.sleep(0.02)

    def second(_):
        failed.set()
        raise Broken("second")

    with pytest.raises(Broken, match="second"):
        run_jobs([first, second, *[lambda _: begun.append(1)] * 50], 2)
    assert not begun


@pytest.mark.parametrize("threads", [1, 4])
def test_parts_stand_where_the_job_stood_that_gave_them(threads):
    order, lock = [], threading.Lock()

    def job(name, *parts):
        def act(_):
            with lock:
                order.append(name)
            return list(parts)

        return act

    run_jobs([job("a", job("b", job("c")), job("d")), job("e")], threads)
    assert sorted(order) == list("abcde")
    if threads == 1:
        assert order == list("abcde")
