"""A choice belongs to a context: threads and tasks use one model at the same time, each with its own adapters."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lorahub.deltas.dora import DoRA
from lorahub.errors import UsageError


class Slow(nn.Module):
    """Meets the others in the middle of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.meet = lambda: None

    def forward(self, x):
        x = torch.tanh(self.a(x))
        self.meet()
        return self.b(x)


def deltas(bench, seed):
    bent = DoRA(bench.randn(8, 2, seed=seed), bench.randn(2, 8, seed=seed + 1), 0.5, bench.randn(8).abs(), 0)
    return {"a.weight": bench.lora(8, 8, seed=seed), "b.weight": bent}


def in_thread(call, *args):
    """The result of a call in a thread that has chosen nothing."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args).result()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_two_threads_with_different_adapters_do_not_meet(bench, agree):
    model, x = Slow().eval(), bench.randn(3, 8)
    plain = model(x)
    expected = {name: bench.merged(model, deltas(bench, seed))(x) for name, seed in (("one", 1), ("two", 5))}
    expected[None] = plain
    live = bench.attach(model, {"one": deltas(bench, 1), "two": deltas(bench, 5)})
    barrier = threading.Barrier(3, timeout=60)
    model.meet = barrier.wait

    def run(name):
        live.set_adapters([name] if name else [])
        return [model(x) for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(expected, pool.map(run, expected), strict=True))
    agree(found["one"][0], expected["one"], plain)
    agree(found["two"][0], expected["two"], plain)
    assert all(torch.equal(y, ys[0]) for ys in found.values() for y in ys)
    assert torch.equal(found[None][0], plain)


def test_a_thread_that_never_chose_follows_the_one_that_attached(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench, 1), "two": deltas(bench, 5)})
    live.set_adapters(["two"])
    assert torch.equal(in_thread(model, x), model(x))

    def other():
        live.set_adapters(["one"])
        return model(x)

    assert not torch.equal(in_thread(other), model(x))
    assert live.active == {"two": 1.0}
    assert torch.equal(in_thread(model, x), model(x))


def test_tasks_choose_for_themselves(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench, 1), "two": deltas(bench, 5)})

    async def run(name):
        live.set_adapters([name])
        await asyncio.sleep(0)
        return model(x)

    async def both():
        return await asyncio.gather(run("one"), run("two"))

    one, two = asyncio.run(both())
    assert torch.equal(one, contextvars.copy_context().run(lambda: (live.set_adapters(["one"]), model(x))[1]))
    assert not torch.equal(one, two)


def test_a_swap_during_a_call_takes_effect_after_it(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench, 1)})
    before = model(x)
    for call in ("first", "again"):
        live.swap("one", deltas(bench, 1 if call == "again" else 9))
        fresh = bench.merged(model, deltas(bench, 1 if call == "again" else 9))(x)
        torch.testing.assert_close(model(x), fresh, rtol=1e-4, atol=1e-5)

    def exchange():
        model.meet = lambda: None
        in_thread(live.swap, "one", deltas(bench, 9))

    model.meet = exchange
    torch.testing.assert_close(model(x), before)  # not half of each, though no layer had been seen by this view
    torch.testing.assert_close(model(x), bench.merged(model, deltas(bench, 9))(x), rtol=1e-4, atol=1e-5)


def test_a_call_that_fails_leaves_nothing_behind(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench, 1)})
    expected = model(x)

    def fail():
        raise RuntimeError("in the middle")

    model.meet = fail
    with pytest.raises(RuntimeError, match="middle"):
        model(x)
    model.meet = lambda: None
    assert torch.equal(model(x), expected)
    live.set_adapters([])
    assert not torch.equal(model.b(model.a(x)), expected)


def test_using_a_choice_for_a_block_gives_the_former_one_back(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench, 1), "two": deltas(bench, 5)})
    live.set_adapters(["one"], weights=[0.5])
    before = model(x)
    with live.using(["two"]):
        assert live.active == {"two": 1.0}
        assert not torch.equal(model(x), before)
    assert live.active == {"one": 0.5}
    assert torch.equal(model(x), before)
    with pytest.raises(UsageError, match="no adapter 'three'"), live.using(["three"]):
        pass
    assert torch.equal(in_thread(model, x), before)


def test_no_context_sees_anything_after_detaching(bench):
    model, x = Slow().eval(), bench.randn(3, 8)
    plain = model(x)
    live = bench.attach(model, {"one": deltas(bench, 1)})
    ready, done = threading.Event(), threading.Event()

    def other():
        live.set_adapters(["one"])
        during = model(x)
        ready.set()
        assert done.wait(60)
        return during, model(x)

    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(other)
        assert ready.wait(60)
        live.detach()
        done.set()
        during, after = later.result()
    assert not torch.equal(during, plain)
    assert torch.equal(after, plain)
