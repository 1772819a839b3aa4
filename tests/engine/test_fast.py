"""The default mode on every rank, size and layout: references are float64, rounded once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lorahub.bases.layout import Piece, Region
from lorahub.deltas.loha import LoHa
from lorahub.deltas.lokr import LoKr
from lorahub.deltas.lora import LoRA
from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Fold
from lorahub.engine.folding.sums import Ingredient
from lorahub.engine.kernels.merge_c import HIGHEST_RANK
from lorahub.engine.planning.steps import Form, Step
from lorahub.engine.rounding import fast
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.rounding.table import read_mode
from lorahub.errors import UsageError

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def fold(weight, *deltas, weights=None, mode="fast", turned=False):
    form = Form(tuple(weight.shape), CODES[weight.dtype])
    step = Step(out="m.weight", source="m.weight", before=form, after=form, terms=())
    piece = Piece(parameter="m.weight", of_parameter=Region(transposed=turned))
    items = [
        Ingredient(weight=weights[n] if weights else 1.0, delta=delta, piece=piece, local=True, adapter="a")
        for n, delta in enumerate(deltas)
    ]
    return Fold(step, items, None, read_mode(mode))


def run(made, weight, *, inside=False):
    out = weight.clone() if inside else torch.full_like(weight, float("nan"))
    for unit in made.units:
        made.run(unit, (out if inside else weight)[unit.rows], out[unit.rows], Workspace())
    return out


def once(total, dtype):
    """Float64 rounded once."""
    if dtype == torch.float16:
        return torch.from_numpy(total.numpy().astype(np.float16))  # PyTorch itself goes by way of float32
    return total.to(dtype)


def problem(rows, cols, rank, size, *, dtype, factors, seed=0):
    """A weight, a LoRA whose change is ``size`` times as large, and the sum of the two."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, cols, generator=generator) * 0.02).to(dtype)
    up = torch.randn(rows, rank, generator=generator).to(factors)
    down = torch.randn(rank, cols, generator=generator).to(factors)
    delta = LoRA(up, down, 0.020137 * size / rank**0.5)  # 0.02 times a short number is a short one: ties
    change = delta.scale * (up.double() @ down.double())
    assert change.norm() > 1e-3 * weight.double().norm()
    return weight, delta, once(weight.double() + change, dtype)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0.01, 0.12, 1.0, 10.0])
@pytest.mark.parametrize("rank", [1, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nearly_all_elements_are_float64_rounded_once_up_to_rank_512_and_changes_larger_than_weights(
    dtype, rank, size, factors
):
    weight, delta, expected = problem(700, 531, rank, size, dtype=dtype, factors=factors)
    found = run(fold(weight, delta), weight)
    assert (found == expected).double().mean() >= 0.9999
    scale = torch.maximum(weight.double().abs(), expected.double().abs()).clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((found.double() - expected.double()).abs() <= scale * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (4096, 1), (3, 5), (5, 3), (4, 4096), (33, 70), (1027, 129)])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_ragged_and_tiny_matrices_are_float64_rounded_once(shape, factors):
    weight, delta, expected = problem(*shape, 8, 0.3, dtype=torch.bfloat16, factors=factors)
    assert (run(fold(weight, delta), weight) != expected).sum() <= max(1, weight.numel() // 10_000)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_do_not_depend_on_strides_or_on_whether_the_result_lies_where_the_weight_did(factors):
    weight, delta, _ = problem(300, 260, 16, 0.1, dtype=torch.bfloat16, factors=factors)
    expected = run(fold(weight, delta), weight)
    assert torch.equal(run(fold(weight, delta), weight, inside=True), expected)
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    assert torch.equal(run(fold(turned, delta), turned, inside=True), expected)
    wide = torch.zeros(300, 520, dtype=torch.bfloat16)
    wide[:, ::2] = weight
    assert torch.equal(run(fold(weight, delta), wide[:, ::2]), expected)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_that_is_stored_turned_around_is_float64_rounded_once(factors):
    weight, delta, expected = problem(300, 260, 16, 0.1, dtype=torch.bfloat16, factors=factors)
    stored = weight.T.contiguous()
    found = run(fold(stored, delta, turned=True), stored)
    assert (found == expected.T).double().mean() >= 0.9999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "r"), [(LoKr, 12), (LoHa, 20)])
def test_where_factors_would_have_to_be_multiplied_to_a_high_rank_windows_of_the_change_are_added(
    kind, r, dtype, monkeypatch
):
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(800, 900, generator=generator) * 0.02).to(dtype)
    delta = kind.fresh((800, 900), r=r, generator=generator)
    filled = {name: torch.randn(each.shape, generator=generator) for name, each in delta.tensors().items()}
    delta = replace(delta, **filled, scale=1e-5)
    assert delta.multiplied_rank() > HIGHEST_RANK
    low = delta.low_rank()
    assert low.up.shape[1] == delta.multiplied_rank()
    wanted = once(weight.double() + low.scale * (low.up @ low.down), dtype)
    monkeypatch.setattr(kind, "low_rank", lambda _: pytest.fail("it was multiplied out"))
    found = run(fold(weight, delta), weight)
    assert (found != weight).double().mean() > 0.1
    assert (found != wanted).double().mean() < 1e-4


def test_scales_are_never_rounded_into_bfloat16_factors():
    weight, delta, _ = problem(128, 256, 16, 0.2, dtype=torch.bfloat16, factors=torch.bfloat16)
    other = LoRA(delta.up.roll(1, 0), delta.down, delta.scale)
    change = 0.37 * delta.delta(weight.double()) + 1.7 * other.delta(weight.double())
    found = run(fold(weight, delta, other, weights=[0.37, 1.7]), weight)
    assert (found == once(weight.double() + change, torch.bfloat16)).double().mean() >= 0.9999
    half = 0.37 * delta.delta(weight.double()) + 0.185 * other.delta(weight.double())
    made = fold(weight, delta, other, weights=[0.37, 0.185])  # a power of two apart: these go together
    assert (run(made, weight) == once(weight.double() + half, torch.bfloat16)).double().mean() >= 0.9999


def test_where_the_machine_does_not_sum_bfloat16_products_in_float32_they_are_made_in_float32(monkeypatch):
    weight, delta, expected = problem(300, 256, 16, 0.1, dtype=torch.bfloat16, factors=torch.bfloat16)
    monkeypatch.setattr(fast, "_sums_in_float32", lambda: False)
    assert (run(fold(weight, delta), weight) == expected).double().mean() >= 0.9999


def test_a_user_who_asked_for_short_float32_products_gets_float64_sums():
    weight, delta, expected = problem(300, 256, 16, 0.1, dtype=torch.bfloat16, factors=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(run(fold(weight, delta), weight), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_infinite_weight_is_the_bases_fault_also_where_it_is_written_over():
    weight, delta, _ = problem(300, 256, 16, 0.1, dtype=torch.bfloat16, factors=torch.bfloat16)
    for broken in (float("inf"), float("nan")):
        live = weight.clone()
        live[7, 7] = broken
        with pytest.raises(ArithmeticError, match=r"of the base holds NaN or infinity before") as error:
            run(fold(live, delta), live, inside=True)
        assert "m.weight" in str(error.value)


def test_modes_are_values_and_unknown_ones_are_refused():
    assert read_mode("fast") == FAST
    assert read_mode("stochastic(-3)") == read_mode("stochastic(-3)") != read_mode("stochastic(3)")
    for name in ("fast", "exact", "peft", "peft-safe", "stochastic(12)"):
        assert read_mode(name).spelled == name
    for text in ("", "Fast", "stochastic", "stochastic()", "stochastic(1e3)", "exact(1)"):
        with pytest.raises(UsageError, match="is no mode"):
            read_mode(text)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_do_not_depend_on_threads_or_on_where_the_weights_lie(tools, tmp_path, dtype, factors):
    tensors = {f"m.{n}.weight": tools.weights(2100, 520, seed=n, dtype=dtype) for n in range(3)}
    adapter = {name: tools.lora(2100, 520, r=16, seed=n, dtype=factors) for n, name in enumerate(tensors)}
    world = tools.World(tensors)
    files = world.save(tmp_path / "base", shards=2)
    results = []
    for threads in (1, 3):
        live = world.live()
        world.merge(live, adapter, threads=threads)
        world.stream(files, tmp_path / str(threads), adapter, threads=threads)
        results += [live, tools.read(tmp_path / str(threads))]
    for found in results[1:]:
        assert all(torch.equal(found[name], results[0][name]) for name in tensors)
    assert not torch.equal(results[0]["m.0.weight"], tensors["m.0.weight"])
