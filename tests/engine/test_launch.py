"""Many parameters in one launch of their device's kernel: what plain merging gives, all of them or none.

The device is played: weights lie on the CPU, and the kernel is the plain twin or runs under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import pytest
import torch

from lorahub.bases.layout import Layout, Piece, Region
from lorahub.deltas.dora import DoRA
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.lora import LoRA
from lorahub.engine.changing import launch
from lorahub.engine.changing.merge import Arranged, Prepared, merge_into
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.kernels import merge_torch
from lorahub.engine.kernels.choice import Choice
from lorahub.engine.rounding.nearest import nearest
from lorahub.engine.undoing.reload import BaseRows
from lorahub.errors import IntegrityError, NotFinite

SHAPES = {"a.weight": (48, 40), "b.weight": (24, 16, 3, 3), "c.weight": (64, 64), "d.weight": (33, 7)}


def small(tools, *shape, seed=0, scale=0.1, dtype=torch.float32):
    low = tools.lora(*shape, seed=seed, dtype=dtype)
    return LoRA(low.up, low.down, low.scale * scale)


@pytest.fixture
def world(tools):
    return tools.World({name: tools.weights(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())})


@pytest.fixture
def changes(tools):
    return {name: small(tools, *shape, seed=40 + seed) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def calls(as_device):
    return as_device(merge_torch.merge_patches)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_by_the_compiled_kernel_there_and_back(tools, world, changes, as_device, stored):
    pytest.importorskip("triton", reason="triton is not installed")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this platform compiles kernels for its device")
    calls = as_device(importlib.import_module("lorahub.engine.kernels.merge_triton").merge_patches)
    world.tensors = {name: tensor.to(stored) for name, tensor in world.tensors.items()}
    live = world.live()
    merged = world.merge(live, changes)
    assert sum(map(len, calls)) == len(SHAPES)
    world.demand_merged(live, changes)
    merged.undo()
    assert world.same(live, world.tensors)


def test_one_launch_merges_all_and_puts_aside_what_undoing_needs(world, changes, calls):
    live = world.live()
    merged = world.merge(live, changes)
    narrow, wide = calls  # what does not lie on multiples of 16 bytes, and what does
    assert (len(wide), len(narrow)) == (2, 2)
    assert all(patch.saved is not None and patch.before is None for patch in (*wide, *narrow))
    world.demand_merged(live, changes)
    for name, weight in world.tensors.items():
        wanted = changes[name].delta(weight.double())
        effect = live[name].double() - weight.double()
        gain = (wanted * effect).sum() / (wanted * wanted).sum()
        error = (effect - wanted).norm() / wanted.norm()
        retention = merged.report.retained[name]
        assert merged.report.changes[name] == pytest.approx((wanted.norm() / weight.double().norm()).item(), rel=1e-3)
        assert (retention.gain, retention.error) == pytest.approx((gain.item(), error.item()), rel=1e-5)
    merged.undo()
    assert world.same(live, world.tensors)


def test_the_numbers_are_those_of_merging_one_by_one(world, changes, calls):
    together, alone = world.live(), world.live()
    world.merge(together, changes)
    assert sum(map(len, calls)) == len(SHAPES)
    for name, change in changes.items():
        world.merge(alone, {name: change})
    assert sum(map(len, calls)) == 2 * len(SHAPES)
    assert world.same(together, alone)


def test_factors_of_bfloat16_go_to_the_kernel_as_they_are(tools, world, calls):
    short = {name: small(tools, *shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    live = world.live()
    world.merge(live, short)
    assert {patch.up.dtype for call in calls for patch in call} == {torch.bfloat16}
    world.demand_merged(live, short)
    calls.clear()
    world.merge(world.live(), short, short, weights=[1.0, 0.3])  # a ratio that bfloat16 does not hold
    assert {patch.up.dtype for call in calls for patch in call} == {torch.float32}


def test_a_change_too_large_for_float32_sums_is_summed_in_float64(tools, world, changes, calls):
    large = changes | {"c.weight": small(tools, 64, 64, seed=3, scale=40.0)}
    live = world.live()
    merged = world.merge(live, large)
    assert merged.report.changes["c.weight"] > 0.125
    exact = world.tensors["c.weight"].double() + large["c.weight"].delta(world.tensors["c.weight"].double())
    assert torch.equal(live["c.weight"], nearest(exact, torch.bfloat16))
    world.demand_merged(live, large)
    merged.undo()
    assert world.same(live, world.tensors)


def test_what_changes_only_in_part_goes_along(tools, world, changes, calls):
    target = tools.target("part.weight")
    piece = Piece(parameter="c.weight", of_parameter=Region(rows=slice(16, 48)))
    world.layout[target] = Layout(target=target, pieces=(piece,))
    live = world.live()
    merged = world.merge(live, {"part.weight": small(tools, 32, 64, seed=5)})
    assert sorted(patch.up.shape for patch in reduce(add, calls)) == [(16, 0), (16, 0), (32, 4)]
    assert torch.equal(live["c.weight"][:16], world.tensors["c.weight"][:16])
    assert not torch.equal(live["c.weight"][16:48], world.tensors["c.weight"][16:48])
    assert torch.equal(live["c.weight"][48:], world.tensors["c.weight"][48:])
    merged.undo()
    assert world.same(live, world.tensors)


def test_stacked_experts_go_along(tools, calls):
    world = tools.World({"experts": tools.weights(3, 24, 16)})
    targets = [tools.target(f"e.{number}.weight") for number in (0, 2)]
    for number, target in zip((0, 2), targets, strict=True):
        piece = Piece(parameter="experts", of_parameter=Region(expert=number))
        world.layout[target] = Layout(target=target, pieces=(piece,))
    changes = {target.name: small(tools, 24, 16, seed=number) for number, target in enumerate(targets)}
    live, before = world.live(), world.tensors["experts"]
    merged = world.merge(live, changes)
    assert sum(map(len, calls)) == 3
    for number, delta in zip((0, 2), changes.values(), strict=True):
        exact = nearest(before[number].double() + delta.delta(before[number].double()), torch.bfloat16)
        assert (live["experts"][number] != exact).double().mean() < 2e-3
        assert not torch.equal(live["experts"][number], before[number])
    assert torch.equal(live["experts"][1], before[1])
    merged.undo()
    assert world.same(live, world.tensors)


def test_new_lengths_of_rows_go_along(tools, world, changes, calls):
    low = tools.lora(48, 40, seed=9)
    mixed = changes | {"a.weight": DoRA(low.up, low.down, 1.0, torch.linspace(0.2, 0.4, 48), 0)}
    live = world.live()
    merged = world.merge(live, mixed)
    assert sum(patch.lengths is not None for call in calls for patch in call) == 1
    assert sum(map(len, calls)) == len(SHAPES)
    world.demand_merged(live, mixed)
    merged.undo()
    assert world.same(live, world.tensors)


def test_new_lengths_of_rows_that_are_not_copied_go_by_themselves(tools, calls, tmp_path):
    world, low = tools.World({"a.weight": tools.weights(48, 40)}), tools.lora(48, 40, seed=9)
    dora = {"a.weight": DoRA(low.up, low.down, 1.0, torch.linspace(0.2, 0.4, 48), 0)}
    live, planned = world.live(), world.plan(dora, weights=[0.5])
    base = BaseRows(world.save(tmp_path / "base"), world.index())
    merged = merge_into(live, planned, tools.bring(dora), keeping=Keeping(policy="reload", base=base))
    ((patch,),) = calls
    assert (patch.saved, patch.strength) == (None, 0.5)
    exact = world.tensors["a.weight"].double()
    exact = nearest(exact + 0.5 * dora["a.weight"].delta(exact), torch.bfloat16)
    assert (live["a.weight"] != exact).double().mean() < 2e-3
    assert merged.report.retained["a.weight"].gain == pytest.approx(1, abs=0.01)
    merged.undo()
    assert world.same(live, world.tensors)


def test_what_looks_at_the_weight_in_other_ways_is_merged_beside_the_launch(tools, world, changes, calls):
    mixed = changes | {"a.weight": Gain(1 + tools.lora(48, 1, seed=1).up[:, :1], 0)}
    live = world.live()
    merged = world.merge(live, mixed)
    assert sum(map(len, calls)) == len(SHAPES) - 1
    world.demand_merged(live, mixed)
    merged.undo()
    assert world.same(live, world.tensors)


def test_a_swap_reads_the_copies_and_makes_none(tools, world, changes, calls):
    def arranged(adapter, weight=1.0):
        return Arranged(parameters=live, plan=world.plan(adapter, weights=[weight]), adapters=tools.bring(adapter))

    live, fresh = world.live(), world.live()
    others = {name: small(tools, *SHAPES[name], seed=70) for name in ("a.weight", "c.weight", "d.weight")}
    world.merge(fresh, others)
    start = arranged(changes)
    merged = merge_into(live, start.plan, start.adapters, keeping=Keeping(policy="copy"))
    calls.clear()
    merged.swap_to(arranged(others))
    patches = reduce(add, calls)
    assert len(patches) == len(others)
    assert all(patch.before is not None and patch.saved is None for patch in patches)
    assert world.same(live, fresh)  # and what only the first one changed is as it was
    merged.swap_to(arranged(changes, 0.5))  # "b.weight" is copied anew
    assert sorted(patch.saved is None for patch in reduce(add, calls[2:])) == [False, True, True, True]
    merged.undo()
    assert world.same(live, world.tensors)


def test_a_prepared_swap_is_launched_again_as_long_as_nothing_lies_elsewhere(tools, world, changes, calls, monkeypatch):
    def prepared(adapter):
        arranged = Arranged(parameters=live, plan=world.plan(adapter), adapters=tools.bring(adapter))
        return Prepared.of(arranged, None)

    def told(patches):
        made.append(patches)
        return merge_torch.prepare_patches(patches)

    made = []
    monkeypatch.setattr(launch, "merger", lambda *_: Choice("triton", told))
    live = world.live()
    others = {name: small(tools, *shape, seed=70) for name, shape in SHAPES.items()}
    one, other = prepared(changes), prepared(others)
    wanted = [world.live(), world.live()]
    for fresh, adapter in zip(wanted, (changes, others), strict=True):
        world.merge(fresh, adapter)
    for _ in range(2):  # the second time copies lie elsewhere
        merged = world.merge(live, changes)
        for ready, fresh in ((other, wanted[1]), (one, wanted[0])):
            merged.swap_to(ready)
            assert world.same(live, fresh)
        made.clear()
        for ready, fresh in ((other, wanted[1]), (one, wanted[0])) * 2:
            merged.swap_to(ready)
            assert world.same(live, fresh)
        assert not made
        merged.undo()
        assert world.same(live, world.tensors)


@dataclass
class Failing:
    """A kernel that says out of memory at some calls."""

    calls: frozenset[int]
    made: int = 0

    def __call__(self, patches):
        self.made += 1
        if self.made in self.calls:
            raise RuntimeError("CUDA error: out of memory")
        return merge_torch.merge_patches(patches)


@pytest.mark.parametrize("at", [1, 2])
def test_a_launch_that_fails_leaves_everything_as_it_was(world, changes, as_device, at):
    as_device(Failing(frozenset({at})))
    live = world.live()
    with pytest.raises(RuntimeError, match="out of memory"):
        world.merge(live, changes)
    assert world.same(live, world.tensors)


@pytest.mark.parametrize("at", [3, 4])
def test_a_swap_whose_launch_fails_leaves_the_first_merge(tools, world, changes, as_device, at):
    as_device(Failing(frozenset({at})))
    live = world.live()
    merged, second = world.merge(live, changes), other_than(tools, world, live)
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        merged.swap_to(second)
    assert world.same(live, before)
    merged.swap_to(second)
    assert not world.same(live, before)
    merged.undo()
    assert world.same(live, world.tensors)


def test_a_device_that_goes_on_failing_leaves_nothing_merged_and_says_so(tools, world, changes, as_device):
    as_device(Failing(frozenset(range(4, 99))))
    live = world.live()
    merged = world.merge(live, changes)
    with pytest.raises(IntegrityError, match="Every weight is what it was before anything was merged"):
        merged.swap_to(other_than(tools, world, live))
    assert merged.undone
    assert world.same(live, world.tensors)


def other_than(tools, world, live):
    """Another merge into the same model."""
    others = {name: small(tools, *shape, seed=80) for name, shape in SHAPES.items()}
    return Arranged(parameters=live, plan=world.plan(others), adapters=tools.bring(others))


@pytest.mark.parametrize("swapping", [False, True])
def test_a_result_that_is_no_number_leaves_everything_as_it_was_and_says_where(tools, calls, swapping):
    names = [f"m{number}.weight" for number in range(4)]
    world = tools.World({name: tools.weights(32, 16, seed=4, dtype=torch.float16) for name in names})
    fine = {name: small(tools, 32, 16, seed=7) for name in names}
    broken = fine | {"m3.weight": LoRA(torch.full((32, 1), 300.0), torch.full((1, 16), 300.0), 1.0)}
    live = world.live()
    merged = world.merge(live, fine) if swapping else None
    before = {name: tensor.clone() for name, tensor in live.items()}
    again = Arranged(parameters=live, plan=world.plan(broken), adapters=tools.bring(broken))
    merge = partial(merged.swap_to, again) if merged is not None else partial(world.merge, live, broken)
    with pytest.raises(NotFinite, match=r"m3\.weight beyond 65504"):
        merge()
    assert world.same(live, before)
    if merged is not None:
        merged.undo()
    assert world.same(live, world.tensors)
