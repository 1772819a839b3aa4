"""``exact`` against fractions, ``peft`` against PEFT, ``stochastic`` against its own promises."""

from __future__ import annotations

from fractions import Fraction

import peft
import pytest
import torch
from torch import nn

from lorahub.deltas.dora import DoRA
from lorahub.deltas.lora import LoRA
from lorahub.engine.rounding.exact import Exact
from lorahub.engine.rounding.nearest import nearest
from lorahub.engine.rounding.stochastic import Stochastic
from lorahub.errors import BaseMismatch

from .test_fast import fold, problem, run

WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def exactly(weight, *terms):
    """The exact sum of weight and (scale, up, down), rounded once: of the stored numbers around it, the nearest one."""
    result = weight.clone()
    word = WORDS[weight.dtype]
    columns = [(Fraction(scale), up.double().tolist(), down.double().T.tolist()) for scale, up, down in terms]
    for i, row in enumerate(weight.double().tolist()):
        for j, value in enumerate(row):
            total = Fraction(value)
            for scale, up, down in columns:
                total += scale * sum(Fraction(a) * Fraction(b) for a, b in zip(up[i], down[j], strict=True))
            near = torch.tensor([float(total)], dtype=torch.float64).to(weight.dtype)
            bits = [near.view(word), near.view(word) + 1, near.view(word) - 1]
            found = [each.view(weight.dtype) for each in bits]
            found = [each for each in found if each.isfinite()]
            result[i, j] = min(
                found, key=lambda each: (abs(Fraction(each.item()) - total), int(each.view(word).item()) & 1)
            )
    return result


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", list(WORDS), ids=str)
def test_exact_is_the_exact_sum_rounded_once(dtype, factors):
    weight, delta, _ = problem(24, 20, 3, 1.0, dtype=dtype, factors=factors)
    weight[0], delta.up[0] = 0.0, 0.0
    weight[1], delta.up[1] = 0.5, torch.tensor([2.0**-10, 0.0, 0.0])  # ties
    delta.down[0, ::3] = 2.0
    weight[2] = -(delta.up[2].double() @ delta.down.double()).to(dtype)  # nothing is left, or hardly anything
    found = run(fold(weight, delta, weights=[0.7], mode="exact"), weight)
    assert torch.equal(found, exactly(weight, (0.7 * delta.scale, delta.up, delta.down)))
    both = run(fold(weight, delta, delta, weights=[1.0, -0.3], mode="exact"), weight)
    terms = [(factor * delta.scale, delta.up, delta.down) for factor in (1.0, -0.3)]
    assert torch.equal(both, exactly(weight, *terms))
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("dtype", list(WORDS), ids=str)
def test_exact_finds_every_tie_of_a_large_matrix(dtype):
    weight, delta, _ = problem(400, 300, 8, 0.3, dtype=dtype, factors=torch.bfloat16)
    delta = LoRA(delta.up, delta.down, 2.0**-9)  # every sum is a float64 number, so the reference rounds once too
    expected = nearest(weight.double() + delta.delta(weight.double()), dtype)
    assert torch.equal(run(fold(weight, delta, mode="exact"), weight), expected)


def test_exact_does_not_depend_on_windows_adapters_order_or_the_dtype_of_its_first_sum(monkeypatch):
    weight, delta, _ = problem(600, 300, 16, 0.3, dtype=torch.bfloat16, factors=torch.float32)
    other = LoRA(delta.up.roll(1, 0), delta.down.roll(1, 1), 0.013)
    found = run(fold(weight, delta, other, weights=[0.3, 0.7], mode="exact"), weight)
    assert torch.equal(run(fold(weight, other, delta, weights=[0.7, 0.3], mode="exact"), weight), found)
    rows = [run(fold(weight[at : at + 60], *(each.region(slice(at, at + 60), slice(None)) for each in (delta, other)),
                     weights=[0.3, 0.7], mode="exact"), weight[at : at + 60]) for at in range(0, 600, 60)]  # fmt: skip
    assert torch.equal(torch.cat(rows), found)
    monkeypatch.setattr("lorahub.engine.rounding.exact.float32_is_float32", lambda: False)
    assert torch.equal(run(fold(weight, delta, other, weights=[0.3, 0.7], mode="exact"), weight), found)


def test_exact_says_of_broken_weights_what_fast_says():
    weight, delta, _ = problem(64, 64, 4, 0.3, dtype=torch.bfloat16, factors=torch.float32)
    weight[3] = float("nan")
    with pytest.raises(ArithmeticError, match="of the base holds NaN or infinity"):
        run(fold(weight, delta, mode="exact"), weight)


def test_exact_refuses_float64_by_name(tools):
    world = tools.World({"m.weight": tools.weights(64, 32, dtype=torch.float64)})
    planned = world.plan({"m.weight": tools.lora(64, 32)}, mode="exact")
    assert [each.code for each in planned.findings] == ["mode-unfit"]
    with pytest.raises(
        BaseMismatch, match=r"mode exact cannot keep its promise for m\.weight: it is stored in float64"
    ):
        planned.check()


# --------------------------------------------------------------------------------------------------- PEFT


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.one = nn.Linear(260, 300, bias=False, dtype=dtype)
        self.two = nn.Linear(300, 70, bias=False, dtype=dtype)


def adapted(dtype, factors):
    """PEFT's model with two LoRA adapters, and their deltas by module."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(dtype), peft.LoraConfig(r=16, lora_alpha=12, target_modules=["one", "two"]), "first"
    )
    model.add_adapter("second", peft.LoraConfig(r=5, lora_alpha=7, target_modules=["one"], use_rslora=True))
    deltas = {"first": {}, "second": {}}
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            up.data = (torch.randn(up.shape) * 0.05).to(factors).float()
            down.data = (torch.randn(down.shape) * 0.05).to(factors).float()
            stored = LoRA(up.detach().to(factors), down.detach().to(factors), module.scaling[adapter])
            deltas[adapter][f"{name.rpartition('.')[2]}.weight"] = stored
    return model, deltas


@pytest.mark.parametrize("safe", [False, True], ids=["default", "safe"])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_peft_gives_the_bits_of_peft(tools, dtype, factors, safe):
    model, deltas = adapted(dtype, factors)
    before = {
        f"{name}.weight": getattr(model.base_model.model, name).weight.detach().clone() for name in ("one", "two")
    }
    world = tools.World(before)
    live = world.live()
    world.merge(live, deltas["first"], deltas["second"], mode="peft-safe" if safe else "peft")
    model.base_model.set_adapter(["first", "second"])
    model.merge_adapter(safe_merge=safe)
    for name, start in before.items():
        theirs = getattr(model.base_model.model, name.partition(".")[0]).weight
        assert torch.equal(live[name], theirs)
        assert (theirs.double() - start.double()).norm() > 1e-2 * start.double().norm()


def test_peft_and_its_safe_merge_differ_and_neither_is_fast(tools):
    _, deltas = adapted(torch.bfloat16, torch.float32)
    world = tools.World({"one.weight": tools.weights(300, 260), "two.weight": tools.weights(70, 300)})
    results = []
    for mode in ("peft", "peft-safe", "fast", "exact"):
        live = world.live()
        world.merge(live, deltas["first"], deltas["second"], mode=mode)
        results.append(live["one.weight"])
    assert len({tuple(each.view(torch.int16).flatten().tolist()) for each in results}) >= 3


@pytest.mark.parametrize("case", ["embedding", "dora", "conv"])
def test_peft_refuses_by_name_what_it_cannot_be_bit_equal_for(tools, case):
    shape = (24, 16, 3, 3) if case == "conv" else (24, 16)
    world = tools.World(
        {"m.weight": tools.weights(*shape)}, roles={"m.weight": "embedding"} if case == "embedding" else {}
    )
    delta = tools.lora(*shape)
    if case == "dora":
        delta = DoRA(delta.up, delta.down, delta.scale, torch.ones(24), 0)
    planned = world.plan({"m.weight": delta}, mode="peft")
    with pytest.raises(BaseMismatch, match=r"mode peft cannot keep its promise for m\.weight"):
        planned.check()


# --------------------------------------------------------------------------------------------------- stochastic


def test_stochastic_is_one_of_the_two_numbers_around_the_sum_and_right_on_average():
    weight, delta, _ = problem(64, 80, 4, 0.002, dtype=torch.bfloat16, factors=torch.float32)
    wide = weight.double() + delta.delta(weight.double())
    results = torch.stack(
        [run(fold(weight, delta, mode=f"stochastic({seed})"), weight).double() for seed in range(200)]
    )
    step = 2.0 ** (torch.log2(wide.abs()).floor() - 7)
    assert ((results - wide).abs() < step * 1.001).all()
    off = (results.mean(0) - wide) / step
    assert off.abs().mean() < 0.05
    assert abs(off.mean()) < 0.003
    change = wide - weight.double()
    nearest_only = run(fold(weight, delta), weight).double() - weight.double()
    assert (nearest_only * change).sum() / change.square().sum() < 0.9
    kept = ((results.mean(0) - weight.double()) * change).sum() / change.square().sum()
    assert abs(kept - 1) < 0.1


def test_stochastic_depends_on_seed_name_and_place_alone():
    mode = Stochastic(5)
    total = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    whole = torch.empty(40, 30, dtype=torch.bfloat16)
    mode.round(total, whole, "a", 0)
    parts = torch.empty_like(whole)
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        mode.round(total[start:stop], parts[start:stop], "a", start * 30)
    assert torch.equal(parts, whole)
    for other, name in ((Stochastic(6), "a"), (mode, "b")):
        different = torch.empty_like(whole)
        other.round(total, different, name, 0)
        assert 0.2 < (different != whole).double().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_stochastic_leaves_what_can_be_stored_and_never_goes_beyond_the_largest_number(dtype):
    most = torch.finfo(dtype).max
    stored = torch.tensor([0.0, -0.0, 1.0, -1.5, most, -most, torch.finfo(dtype).smallest_normal]).to(dtype)
    for seed in range(20):
        out = torch.empty_like(stored)
        Stochastic(seed).round(stored.float(), out, "a", 0)
        assert torch.equal(out.float(), stored.float())
    above = torch.tensor(
        [most * (1 + torch.finfo(dtype).eps / 8), torch.finfo(dtype).tiny / 1e4, -torch.finfo(dtype).tiny / 1e5],
        dtype=torch.float64,
    )
    found = []
    for seed in range(20):
        out = torch.empty(3, dtype=dtype)
        Stochastic(seed).round(above, out, "a", 0)
        found.append(out.float())
    assert (torch.stack(found)[:, 0] == most).all()
    assert (torch.stack(found)[:, 1:].abs() <= torch.finfo(dtype).smallest_normal).all()


def test_modes_merge_alike_in_memory_and_on_disk_and_are_in_the_digest(tools, tmp_path):
    world = tools.World({"m.weight": tools.weights(300, 200), "n.weight": tools.weights(200, 50, seed=1)})
    adapter = {"m.weight": tools.lora(300, 200), "n.weight": tools.lora(200, 50, seed=2)}
    files = world.save(tmp_path / "base", shards=2)
    digests, results = set(), []
    for mode in ("fast", "exact", "peft", "peft-safe", "stochastic(4)", "stochastic(5)"):
        live = world.live()
        world.merge(live, adapter, mode=mode, threads=2)
        world.stream(files, tmp_path / mode, adapter, mode=mode)
        found = tools.read(tmp_path / mode)
        assert all(torch.equal(found[name], live[name]) for name in live)
        digests.add(world.plan(adapter, mode=mode).digest())
        results.append(live["m.weight"])
    assert len(digests) == 6
    assert not torch.equal(results[-1], results[-2])


def test_exact_is_a_value():
    assert Exact() == Exact()
