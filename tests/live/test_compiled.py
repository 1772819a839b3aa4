"""``torch.compile`` and attached adapters: the graph is the model with its adapters, and is made once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from lorahub.deltas.dora import DoRA
from lorahub.errors import UsageError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


class Apart(nn.Module):
    """Reads a weight without calling its module, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        return self.b(functional.linear(x, self.a.weight))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def adapters(bench):
    def bent(seed):
        return DoRA(bench.randn(8, 2, seed=seed), bench.randn(2, 8, seed=seed + 1), 0.5, bench.randn(8).abs(), 0)

    return {
        "one": {"a.weight": bench.lora(8, 8, seed=1), "b.weight": bench.lora(8, 8, seed=2)},
        "two": {"a.weight": bench.lora(8, 8, seed=3), "b.weight": bench.lora(8, 8, seed=4)},
        "dora": {"a.weight": bent(5), "b.weight": bent(6)},
        "mora": {"a.weight": bent(7), "b.weight": bent(8)},
        "wide": {"a.weight": bench.lora(8, 8, r=7, seed=9)},
    }


def test_weights_and_adapters_of_one_rank_change_without_another_graph(bench):
    model, x, counter = Block().eval(), bench.randn(3, 8), CompileCounter()
    live = bench.attach(model, adapters(bench))
    live.set_adapters(["one"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []

    def step():
        seen.append(compiled(x))
        torch.testing.assert_close(seen[-1], model(x))

    step()
    live.set_adapters(["one"], weights=[0.25])
    step()
    live.set_adapters(["two"])
    step()
    live.swap("two", adapters(bench)["one"])
    step()
    assert counter.frame_count == 1
    assert torch.equal(seen[0], seen[3])
    assert len({tuple(y.flatten().tolist()) for y in seen}) == 3
    live.set_adapters([])
    step()
    live.set_adapters(["one"])
    step()
    assert counter.frame_count == 2


def test_changed_weights_are_exchanged_without_another_graph(bench):
    model, x, counter = Block().eval(), bench.randn(3, 8), CompileCounter()
    live = bench.attach(model, adapters(bench))
    live.set_adapters(["dora"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first = compiled(x)
    live.set_adapters(["mora"], weights=[0.5])
    second = compiled(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(second, model(x))
    assert (first - second).norm() > 0.1


def test_with_a_capacity_any_choice_fits_one_graph(bench):
    model, x, counter = Block().eval(), bench.randn(3, 8), CompileCounter()
    live = bench.attach(model, adapters(bench), active=["one"], capacity=12)
    live.set_adapters(["one"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (["one"], ["two", "one"], ["wide"], ["wide", "two"]):
        live.set_adapters(names)
        found = compiled(x)
        torch.testing.assert_close(found, model(x))
    assert counter.frame_count == 1
    with pytest.raises(UsageError, match="rank 15 together"):
        live.set_adapters(["one", "two", "wide"])
    assert live.active == {"wide": 1.0, "two": 1.0}


def test_a_parameter_that_is_read_apart_from_its_module_is_seen(bench):
    model, x, counter = Apart().eval(), bench.randn(3, 8), CompileCounter()
    plain = model(x)
    live = bench.attach(model, adapters(bench))
    live.set_adapters(["one"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (["one"], ["two"], ["dora"]):
        live.set_adapters(names)
        torch.testing.assert_close(compiled(x), model(x))
        assert (compiled(x) - plain).norm() > 0.1


def test_rows_of_a_batch_take_their_own_adapters(bench):
    model, x = Block().eval(), bench.randn(3, 8)
    live = bench.attach(model, adapters(bench))
    compiled = torch.compile(model, backend="eager")
    for names in (["one", None, "two"], ["two", "two", None]):
        live.adapter_names = names
        torch.testing.assert_close(compiled(x), model(x))


def test_attaching_and_detaching_make_new_graphs(bench):
    model, x, counter = Block().eval(), bench.randn(3, 8), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    plain = compiled(x)
    live = bench.attach(model, {"one": adapters(bench)["one"]})
    attached = compiled(x)
    assert (attached - plain).norm() > 0.1
    torch.testing.assert_close(attached, model(x))
    live.add("dora", adapters(bench)["dora"])
    live.set_adapters(["dora", "one"])
    torch.testing.assert_close(compiled(x), model(x))
    live.detach()
    torch.testing.assert_close(compiled(x), plain)


def test_gradients_flow_through_a_graph(bench):
    deltas = adapters(bench)["one"]
    for delta in deltas.values():
        delta.up.requires_grad_()
    model, x = Block().requires_grad_(False), bench.randn(3, 8)
    bench.attach(model, {"one": deltas})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.enable_grad():
        compiled(x).square().sum().backward()
        found = [delta.up.grad.clone() for delta in deltas.values()]
        for delta in deltas.values():
            delta.up.grad = None
        model(x).square().sum().backward()
    for delta, grad in zip(deltas.values(), found, strict=True):
        assert grad.norm() > 0
        torch.testing.assert_close(grad, delta.up.grad)
