"""Many parameters with journals, merged and noted together by their device's kernel: all of them or none.

The device is played: weights lie on the CPU, and the kernel is the plain twin or runs under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lorahub.bases.layout import Layout, Piece, Region
from lorahub.deltas.lora import LoRA
from lorahub.engine.changing.merge import Arranged, merge_into
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.kernels import merge_torch, noting_torch
from lorahub.engine.rounding.nearest import nearest
from lorahub.errors import NotFinite

SHAPES = {"a.weight": (48, 40), "b.weight": (24, 16, 3, 3), "c.weight": (64, 64), "d.weight": (70, 33)}


def thin(tools, *shape, seed=0, size=0.05):
    """A change of rank one, of about ``size`` times such weights."""
    low = tools.lora(*shape, r=1, seed=seed)
    weights = tools.weights(*shape).float().norm()
    scale = float(size * weights / LoRA(low.up, low.down, 1.0).delta(torch.zeros(shape)).norm())
    return LoRA(low.up.bfloat16(), low.down.bfloat16(), scale)


@pytest.fixture
def world(tools):
    return tools.World({name: tools.weights(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())})


@pytest.fixture
def changes(tools):
    return {name: thin(tools, *shape, seed=40 + seed) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def noting(as_device):
    """What is looked at, written and put, by a device's kernel that notes the way back, and what one without gets."""
    looks, writes, puts = [], [], []

    def told(calls, act):
        def run(given):
            calls.append(given)
            return act(given)

        return run

    plain = noting_torch.NOTER
    kernel = replace(plain, look=told(looks, plain.look), write=told(writes, plain.write), put=told(puts, plain.put))
    merges = as_device(merge_torch.merge_patches, kernel)
    return SimpleNamespace(looks=looks, writes=writes, puts=puts, merges=merges)


def journalled(tools, world, live, changes):
    return merge_into(live, world.plan(changes), tools.bring(changes), keeping=Keeping(policy="journal"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_by_the_compiled_kernel_there_and_back(tools, world, changes, as_device, stored):
    pytest.importorskip("triton", reason="triton is not installed")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this platform compiles kernels for its device")
    kernel = importlib.import_module("lorahub.engine.kernels.noting_triton").NOTER
    as_device(importlib.import_module("lorahub.engine.kernels.merge_triton").merge_patches, kernel)
    world.tensors = {name: tensor.to(stored) for name, tensor in world.tensors.items()}
    live = world.live()
    merged = journalled(tools, world, live, changes)
    assert set(merged.report.undo) == {"journal"}
    world.demand_merged(live, changes)
    merged.undo()
    assert world.same(live, world.tensors)


def test_all_is_noted_in_the_pass_that_writes_and_the_numbers_are_those_of_other_ways_back(
    tools, world, changes, noting
):
    live, copied = world.live(), world.live()
    merged = journalled(tools, world, live, changes)
    assert [len(each) for each in noting.looks] == [len(SHAPES)]
    assert sum(map(len, noting.writes)) == len(SHAPES)
    assert not noting.merges
    world.demand_merged(live, changes)
    other = world.merge(copied, changes).report
    assert noting.merges
    assert world.same(live, copied)
    assert merged.report.retained == other.retained
    assert merged.report.changes == other.changes
    assert 0 < merged.report.undo["journal"] < other.undo["copy"] / 5
    merged.undo()
    assert noting.puts
    assert world.same(live, world.tensors)


def test_a_swap_notes_parameter_by_parameter(tools, world, changes, noting):
    live, fresh = world.live(), world.live()
    others = {name: thin(tools, *SHAPES[name], seed=70) for name in ("a.weight", "c.weight", "d.weight")}
    world.merge(fresh, others)
    merged = journalled(tools, world, live, changes)
    noting.writes.clear()
    merged.swap_to(Arranged(parameters=live, plan=world.plan(others), adapters=tools.bring(others)))
    assert sorted(map(len, noting.writes)) == [1, 1, 1]
    assert all(one.patch.before is not None for each in noting.writes for one in each)
    assert world.same(live, fresh)
    merged.undo()
    assert world.same(live, world.tensors)


def test_what_wants_wider_sums_is_left_and_folded_by_itself(tools, world, changes, noting):
    weight = world.tensors["c.weight"]
    mixed = changes | {"c.weight": thin(tools, 64, 64, seed=3, size=0.131)}
    live = world.live()
    merged = journalled(tools, world, live, mixed)
    assert 0.125 < merged.report.changes["c.weight"] < 0.137  # small enough for a journal, too large for float32
    assert sum(map(len, noting.looks[:1])) == len(SHAPES)
    assert sum(map(len, noting.writes)) == len(SHAPES) - 1
    assert set(merged.report.undo) == {"journal"}
    exact = weight.double() + mixed["c.weight"].delta(weight.double())
    assert torch.equal(live["c.weight"], nearest(exact, torch.bfloat16))
    world.demand_merged(live, mixed)
    merged.undo()
    assert world.same(live, world.tensors)


def test_a_part_of_a_parameter_and_some_of_its_experts_go_along(tools, noting):
    world = tools.World({"whole": tools.weights(96, 64), "experts": tools.weights(3, 48, 40, seed=2)})
    part, expert = tools.target("part.weight"), tools.target("e.weight")
    rows, one = Region(rows=slice(16, 80)), Region(expert=1)
    world.layout[part] = Layout(target=part, pieces=(Piece(parameter="whole", of_parameter=rows),))
    world.layout[expert] = Layout(target=expert, pieces=(Piece(parameter="experts", of_parameter=one),))
    changes = {"part.weight": thin(tools, 64, 64, seed=5), "e.weight": thin(tools, 48, 40, seed=6)}
    live = world.live()
    merged = journalled(tools, world, live, changes)
    assert sum(map(len, noting.writes)) == 6
    for found, before, delta in (
        (live["whole"][16:80], world.tensors["whole"][16:80], changes["part.weight"]),
        (live["experts"][1], world.tensors["experts"][1], changes["e.weight"]),
    ):
        assert not torch.equal(found, before)
        exact = nearest(before.double() + delta.delta(before.double()), torch.bfloat16)
        assert (found != exact).double().mean() < 2e-3
    assert torch.equal(live["whole"][:16], world.tensors["whole"][:16])
    assert torch.equal(live["experts"][2], world.tensors["experts"][2])
    merged.undo()
    assert world.same(live, world.tensors)


def test_where_a_result_is_no_number_nothing_is_written_and_the_message_says_where(tools, noting):
    names = [f"m{number}.weight" for number in range(4)]
    world = tools.World({name: tools.weights(32, 16, seed=4, dtype=torch.float16) for name in names})
    world.tensors["m2.weight"][3, 5] = float("inf")
    live = world.live()
    changes = {name: thin(tools, 32, 16, seed=7) for name in names}
    with pytest.raises(NotFinite, match=r"m2\.weight of the base holds NaN or infinity"):
        journalled(tools, world, live, changes)
    assert noting.looks
    assert not noting.writes
    assert world.same(live, world.tensors)


@pytest.mark.parametrize("at", [1, 2])
def test_a_launch_that_fails_leaves_everything_as_it_was(tools, world, changes, as_device, at):
    calls = []

    def write(foreseen):
        calls.append(foreseen)
        if len(calls) == at:
            raise RuntimeError("CUDA error: out of memory")
        return noting_torch.NOTER.write(foreseen)

    as_device(merge_torch.merge_patches, replace(noting_torch.NOTER, write=write))
    live = world.live()
    with pytest.raises(RuntimeError, match="out of memory"):
        journalled(tools, world, live, changes)  # in two launches: rows of 33 numbers do not lie on multiples of 16
    assert len(calls) == at
    assert world.same(live, world.tensors)
