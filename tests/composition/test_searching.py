"""Searching over numbers, and the log from which a search goes on."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lorahub.composition.searching import optimisers as searching
from lorahub.composition.searching.optimisers import Search, Space, search
from lorahub.composition.searching.trial_log import Journal
from lorahub.errors import IntegrityError, MissingDependency, NotFinite, UsageError, WriteFailed

FLAT = {"optimiser": "cma", "seed": 0}


def bowl(*optimum: float) -> Callable[[Sequence[float]], float]:
    """A quadratic with different curvatures, 0 at the optimum."""

    def value(weights: Sequence[float]) -> float:
        return sum((n + 1) * (one - other) ** 2 for n, (one, other) in enumerate(zip(weights, optimum, strict=True)))

    return value


def counted(value: Callable[[Sequence[float]], float], calls: list[tuple[float, ...]]):
    def counting(weights: Sequence[float]) -> float:
        calls.append(tuple(weights))
        return value(weights)

    return counting


@pytest.mark.parametrize("optimum", [(1.0, -1.0), (-0.3,), (0.9, -1.2, 0.4, 0.0)])
def test_cma_reaches_an_optimum_within_the_bounds(optimum):
    found = search(bowl(*optimum), Space(size=len(optimum), l1=0.0), budget=500)
    assert found.best.weights == pytest.approx(optimum, abs=1e-3)
    assert found.best.loss < 1e-6 < bowl(*optimum)(found.trials[0].weights)


def test_an_optimum_outside_of_the_bounds_is_met_at_the_bound():
    found = search(bowl(3.0, -3.0), Space(size=2, l1=0.0), budget=300)
    assert found.best.weights == pytest.approx((1.5, -1.5), abs=1e-3)
    assert all(-1.5 <= weight <= 1.5 for trial in found.trials for weight in trial.weights)


def test_a_search_may_begin_at_a_bound():
    found = search(bowl(0.3, 0.8), Space(size=2, lower=0.0, upper=1.0, l1=0.0), budget=300)
    assert found.best.weights == pytest.approx((0.3, 0.8), abs=1e-3)


@pytest.mark.parametrize("optimiser", ["cma", "random"])
def test_the_budget_counts_every_evaluation_and_the_start_is_the_first(optimiser):
    calls: list[tuple[float, ...]] = []
    found = search(counted(bowl(1.0, -1.0), calls), Space(size=2, start=0.25), optimiser=optimiser, budget=23)
    assert len(calls) == len(found.trials) == 23
    assert calls[0] == (0.25, 0.25)
    assert [trial.weights for trial in found.trials] == calls
    assert [trial.number for trial in found.trials] == list(range(23))
    assert found.best.score == min(trial.score for trial in found.trials)


def test_the_penalty_is_the_mean_absolute_weight_and_moves_the_optimum():
    space = Space(size=2, l1=0.5)
    assert space.score((1.0, -0.5), 2.0) == pytest.approx(2.0 + 0.5 * 0.75)
    found = search(bowl(1.0, -1.0), space, budget=400)
    # where the slopes 2 (w - 1) and 4 (w + 1) meet those of the penalty, a quarter towards 0 each
    assert found.best.weights == pytest.approx((0.875, -0.9375), abs=1e-3)


@pytest.mark.parametrize("optimiser", ["cma", "random"])
def test_the_same_seed_tries_the_same_weights_whatever_else_draws_numbers(optimiser):
    def disturbed(weights: Sequence[float]) -> float:
        np.random.rand(3)  # noqa: NPY002 - what an objective may do
        random.random()
        return bowl(1.0, -1.0)(weights)

    space = Space(size=2)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one = search(bowl(1.0, -1.0), space, optimiser=optimiser, seed=3)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert search(disturbed, space, optimiser=optimiser, seed=3) == one
    assert search(bowl(1.0, -1.0), space, optimiser=optimiser, seed=4) != one


def test_what_is_no_finite_number_is_recorded_and_counts_as_the_worst(tmp_path):
    def torn(weights: Sequence[float]) -> float:
        return bowl(1.0, -1.0)(weights) if weights[0] > 0.1 else random.Random(0).choice([math.nan, math.inf])

    log = tmp_path / "log.jsonl"
    with Journal(log, FLAT) as journal:
        found = search(torn, Space(size=2, start=0.5, l1=0.0), budget=250, journal=journal)
    bad = [trial for trial in found.trials if math.isnan(trial.loss)]
    assert bad
    assert all(trial.score == math.inf for trial in bad)
    assert found.best.weights == pytest.approx((1.0, -1.0), abs=1e-2)
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert [line["trial"] for line in lines if line["loss"] is None] == [trial.number for trial in bad]
    assert found.trials[bad[0].number].document()["loss"] is None


def test_a_search_that_never_sees_a_number_says_so():
    with pytest.raises(NotFinite, match="no finite number in 9 trials of the adapters"):
        search(lambda _: math.nan, Space(size=2), budget=9)


def test_a_flat_objective_ends_early_and_says_why():
    found = search(lambda _: 1.0, Space(size=2, l1=0.0), budget=5000)
    assert found.ended
    assert found.best.weights == (0.0, 0.0)  # the first of equals
    assert len(found.trials) < 5000


@pytest.mark.parametrize("stop", [1, 7, 12, 29])
def test_a_search_that_stopped_goes_on_and_ends_as_an_unbroken_one(tmp_path, stop):
    whole: list[tuple[float, ...]] = []
    unbroken = search(counted(bowl(1.0, -1.0), whole), Space(size=2), budget=30)

    def stopping(weights: Sequence[float]) -> float:
        if len(calls) == stop:
            raise KeyboardInterrupt
        return counted(bowl(1.0, -1.0), calls)(weights)

    calls: list[tuple[float, ...]] = []
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt), Journal(log, FLAT) as journal:
        search(stopping, Space(size=2), budget=30, journal=journal)
    rest: list[tuple[float, ...]] = []
    with Journal(log, FLAT) as journal:
        resumed = search(counted(bowl(1.0, -1.0), rest), Space(size=2), budget=30, journal=journal)
    assert resumed == unbroken
    assert calls + rest == whole
    with Journal(log, FLAT) as journal:  # and a larger budget goes on from there
        more = search(bowl(1.0, -1.0), Space(size=2), budget=50, journal=journal)
    assert more == search(bowl(1.0, -1.0), Space(size=2), budget=50)


KILLED = """
import os, signal, sys
from lorahub.composition.searching.optimisers import Space, search
from lorahub.composition.searching.trial_log import Journal

count = 0

def value(weights):
    global count
    count += 1
    if count == 17:
        if sys.argv[2] == "torn":  # as where the machine stops while a line is being written
            with open(sys.argv[1], "ab") as file:
                file.write(b'{"loss":0.1,"of":"adap')
        os.kill(os.getpid(), signal.SIGKILL)
    return (weights[0] - 1) ** 2 + 2 * (weights[1] + 1) ** 2

with Journal(sys.argv[1], {"optimiser": "cma", "seed": 0}) as journal:
    search(value, Space(size=2), budget=30, journal=journal)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
@pytest.mark.parametrize("tail", ["whole", "torn"])
def test_a_killed_process_leaves_a_log_that_a_search_goes_on_from(tmp_path, tail):
    log = tmp_path / "log.jsonl"
    gone = subprocess.run([sys.executable, "-c", KILLED, str(log), tail], check=False, env=os.environ)
    assert gone.returncode == -signal.SIGKILL
    assert log.read_bytes().endswith(b"\n") is (tail == "whole")
    whole: list[tuple[float, ...]] = []
    unbroken = search(counted(bowl(1.0, -1.0), whole), Space(size=2), budget=30)
    rest: list[tuple[float, ...]] = []
    with Journal(log, FLAT) as journal:
        resumed = search(counted(bowl(1.0, -1.0), rest), Space(size=2), budget=30, journal=journal)
    assert resumed == unbroken
    assert rest == whole[16:]
    assert len(log.read_text().splitlines()) == 31


def test_a_line_says_trial_weights_loss_optimiser_and_seed(tmp_path):
    log = tmp_path / "log.jsonl"
    with Journal(log, {"optimiser": "random", "seed": 5, "adapters": ["ink"]}) as journal:
        found = search(bowl(1.0), Space(size=1), optimiser="random", seed=5, budget=2, journal=journal)
    first, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert first == {"search": {"adapters": ["ink"], "optimiser": "random", "seed": 5}}
    assert lines[1] == {
        "of": "adapters",
        "trial": 1,
        "weights": list(found.trials[1].weights),
        "loss": found.trials[1].loss,
        "optimiser": "random",
        "seed": 5,
    }


def _log(tmp_path: Path, budget: int = 3) -> tuple[Path, Search]:
    log = tmp_path / "log.jsonl"
    with Journal(log, FLAT) as journal:
        return log, search(bowl(1.0, -1.0), Space(size=2), budget=budget, journal=journal)


def test_a_log_of_another_search_is_refused_by_what_differs(tmp_path):
    log, _ = _log(tmp_path)
    before = log.read_bytes()
    with pytest.raises(UsageError, match=r"the log of a search with other seed"):
        Journal(log, {"optimiser": "cma", "seed": 1})
    assert log.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b"[1]\n", b'{"search": 1}\n', b"\xff\xfe\n"])
def test_a_file_that_is_no_log_is_refused_and_kept(tmp_path, content):
    log = tmp_path / "notes.txt"
    log.write_bytes(content)
    with pytest.raises(UsageError, match=r"notes\.txt is no log of a search"):
        Journal(log, FLAT)
    assert log.read_bytes() == content


@pytest.mark.parametrize("line", [b"{}", b'{"of":"adapters","trial":0,"weights":1,"loss":0}', b"\xff", b'{"of":'])
def test_a_malformed_line_is_named(tmp_path, line):
    log, _ = _log(tmp_path)
    log.write_bytes(log.read_bytes() + line + b"\n")
    with pytest.raises(IntegrityError, match=r"log\.jsonl, line 5: no trial"):
        Journal(log, FLAT)


def test_weights_that_were_changed_in_the_log_are_noticed(tmp_path):
    log, found = _log(tmp_path)
    log.write_text(log.read_text().replace(str(found.trials[1].weights[0]), "0.125"))
    with Journal(log, FLAT) as journal, pytest.raises(UsageError, match="other weights for trial 1"):
        search(bowl(1.0, -1.0), Space(size=2), budget=3, journal=journal)


def test_one_search_at_a_time_writes_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    with Journal(log, FLAT), pytest.raises(WriteFailed, match="another run is writing"):
        Journal(log, FLAT)
    Journal(log, FLAT).close()


def test_a_log_in_a_folder_that_is_not_there_is_a_named_error(tmp_path):
    with pytest.raises(WriteFailed, match="cannot be written"):
        Journal(tmp_path / "none" / "log.jsonl", FLAT)


def test_a_missing_package_is_named_with_what_installs_it_and_random_search_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingDependency, match=r"lorahub-core\[search\]") as caught:
        search(bowl(1.0, -1.0), Space(size=2))
    assert 'optimiser="random"' in caught.value.hint
    found = search(bowl(1.0, -1.0), Space(size=2), optimiser="random", budget=400)
    assert found.best.score < 0.2 * found.trials[0].score


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: search(bowl(1.0), Space(size=1), optimiser="cna"), "'cna'.*cma"),
        (lambda: search(bowl(1.0), Space(size=1), budget=0), "budget of 0"),
        (lambda: Space(size=0), "no weight"),
        (lambda: Space(size=1, lower=1.0, upper=1.0), "hold nothing"),
        (lambda: Space(size=1, upper=math.inf), "hold nothing"),
        (lambda: Space(size=1, start=2.0), "lies outside"),
        (lambda: Space(size=1, l1=-1.0), "reward"),
        (lambda: search(lambda _: "much", Space(size=1)), "gave a str"),  # type: ignore[arg-type,return-value]
        (lambda: search(lambda _: None, Space(size=1)), "gave a NoneType"),  # type: ignore[arg-type,return-value]
    ],
)
def test_a_malformed_request_is_named(act, says):
    with pytest.raises(UsageError, match=says):
        act()


def test_what_the_objective_raises_comes_out_as_it_is():
    def failing(_weights: Sequence[float]) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        search(failing, Space(size=2))


def test_every_optimiser_of_the_table_is_made_of_a_space_and_a_seed():
    for name in searching.OPTIMISERS:
        assert len(searching.make(name, Space(size=3), 0).ask()[0]) == 3
