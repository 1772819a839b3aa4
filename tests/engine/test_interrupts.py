"""Ctrl-C, by real signals: in the middle of a merge, a swap and an undo, once and again while it is being answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorahub.engine.crew import run_jobs
from lorahub.engine.interrupts import held

posix = pytest.mark.skipif(os.name != "posix", reason="this platform has no signals to send")


@pytest.fixture
def listening():
    """Interrupts arrive, also where the run was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def strike():
    os.kill(os.getpid(), signal.SIGINT)


@posix
@pytest.mark.usefixtures("listening")
def test_an_interrupt_waits_until_it_is_asked_for_or_the_block_ends():
    done = []

    def block():
        with held() as interrupts:
            strike()
            done.append(1)
            interrupts.demand_none()
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        block()

    def other():
        with held():
            with held(deaf=True) as deaf:
                strike()
                with held() as inner:
                    strike()
                    inner.demand_none()
                deaf.demand_none()
                done.append(2)
            done.append(3)

    with pytest.raises(KeyboardInterrupt):
        other()
    assert done == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@posix
@pytest.mark.usefixtures("listening")
def test_another_error_is_what_is_raised_and_other_handlers_stay():
    def block():
        with held():
            strike()
            raise ValueError

    with pytest.raises(ValueError):
        block()
    with pytest.raises(KeyboardInterrupt):
        strike()
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    with held() as interrupts:
        strike()
        assert not heard
        interrupts.demand_none()  # whoever has a handler of their own decides what comes of it
        assert heard == [1]
        strike()
    assert heard == [1, 1]
    run_jobs([lambda _: strike()] * 3, 1)
    assert len(heard) > 2


def test_other_threads_hear_of_no_interrupt():
    seen = []

    def work():
        with held() as interrupts:
            interrupts.demand_none()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


@posix
@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_crew_that_is_interrupted_is_idle_when_that_is_raised(to_the_end):
    running, finished = [], []

    def job(_):
        running.append(1)
        if len(running) == 2:
            strike()
            strike()
        time.sleep(0.3)  # the interrupt comes while it is at work
        finished.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job] * 6, 2, to_the_end=to_the_end)
    assert len(finished) == len(running)
    assert (len(finished) == 6) is to_the_end
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lorahub-")]


STREWN = """
import random, signal, sys, threading, time, os
import torch
from torch import nn
import lorahub

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(768, 768, bias=False, dtype=torch.bfloat16) for _ in range(4))).requires_grad_(False)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
folders = []
for seed in range(2):
    with lorahub.create(model, r=8, seed=seed) as trainee:
        for parameter in trainee.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
        trainee.save(f"{sys.argv[1]}/{seed}")
first, second = (lorahub.load(f"{sys.argv[1]}/{seed}") for seed in range(2))


def holds(wanted):
    return all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def copy():
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def timed(act):
    start = time.perf_counter()
    return act(), time.perf_counter() - start


dice, struck = random.Random(0), 0


def interrupted(act, within):
    "What `act` gives while interrupts come, or None."
    def strikes():
        for _ in range(dice.choice([1, 2, 3])):
            time.sleep(dice.random() * within)
            os.kill(os.getpid(), signal.SIGINT)

    def quiet():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        thread.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    thread, given, hit = threading.Thread(target=strikes), None, False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            thread.start()
            given = act()
        except KeyboardInterrupt:
            hit = True
        quiet()
    except KeyboardInterrupt:
        quiet()
    return given, hit


def run(undo):
    global struck
    merged, merging = timed(lambda: lorahub.merge(model, {"a": first}, undo=undo, threads=2))
    with_first = copy()
    assert not holds(base)
    _, undoing = timed(merged.undo)
    assert holds(base)
    for _ in range(12):
        merged, hit = interrupted(lambda: lorahub.merge(model, {"a": first}, undo=undo, threads=2), merging)
        struck += hit
        if merged is None:
            late = holds(with_first)  # it was done, and the interrupt came before anybody could take it
            assert late or holds(base), "a merge was left half done"
            for name, tensor in model.state_dict().items():
                tensor.copy_(base[name])
            continue
        assert holds(with_first)
        _, hit = interrupted(lambda: merged.swap({"b": second}), merging)
        struck += hit
        assert not holds(base)
        _, hit = interrupted(merged.undo, undoing)
        struck += hit
        if not merged.undone:
            merged.undo()
        assert holds(base), "an undo was left half done"


for undo in ("auto", "copy", "journal"):
    run(undo)
print("struck", struck)
"""


@posix
def test_interrupts_strewn_over_merges_swaps_and_undos_leave_nothing_half_done(tmp_path):
    command = [sys.executable, "-c", STREWN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10
