"""Each delta against its paper's formula, written out as loops over Python floats: never our own code again.

Factors are stored in float32, so a reference reads the same stored numbers; computation is float64 on both sides.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lorahub.deltas.dora import DORA, DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import IA3, Gain
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.lora import LORA, LoRA
from lorahub.deltas.replace import Replace

SHAPES = [(5, 4), (5, 4, 3), (3, 4, 2, 3), (3, 2, 2, 3, 2)]
R = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def indices(shape: tuple[int, ...]):
    return itertools.product(*map(range, shape))


def assert_close(found: torch.Tensor, expected: dict[tuple[int, ...], float], weight: torch.Tensor) -> None:
    """Every element within n eps of the largest value: sums of at most n terms, in another order."""
    norm = math.sqrt(sum(value**2 for value in expected.values()))
    assert norm / weight.norm().item() > 1e-2, "the reference change is trivial"
    assert found.dtype == torch.float64
    assert set(indices(tuple(found.shape))) == expected.keys()
    largest = max(1.0, *(abs(value) for value in expected.values()), weight.abs().max().item())
    bound = weight.numel() * 2.3e-16 * largest
    for at, value in expected.items():
        assert abs(found[at].item() - value) <= bound, at


def low_rank(up: torch.Tensor, down: torch.Tensor, scale: float, at: tuple[int, ...]) -> float:
    """``scale * sum over r of up[out, r] * down[r, in, k...]``."""
    row, *rest = at
    total = 0.0
    for r in range(down.shape[0]):
        total += up.reshape(up.shape[0], -1)[row, r].item() * down[(r, *rest)].item()
    return scale * total


def factors(shape: tuple[int, ...], *, flat: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    up = normal(shape[0], R) if flat else normal(shape[0], R, *(1 for _ in shape[2:]))
    return up, normal(R, *shape[1:], seed=1)


@pytest.mark.parametrize("flat", [False, True], ids=["pointwise up", "matrix up"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_is_scale_times_up_times_down(shape: tuple[int, ...], flat: bool):
    up, down = factors(shape, flat=flat)
    weight = normal(*shape, seed=2).double()
    expected = {at: low_rank(up, down, 1.75, at) for at in indices(shape)}
    assert_close(LoRA(up, down, 1.75).delta(weight), expected, weight)


def test_lora_on_an_embedding_is_the_transposed_product_of_what_peft_stores():
    vocabulary, width = 7, 4
    a, b = normal(R, vocabulary), normal(width, R, seed=1)  # lora_embedding_A, lora_embedding_B
    delta = from_peft(LORA, {"up": (a, True), "down": (b, True)}, role="embedding")["weight"]
    weight = normal(vocabulary, width, seed=2).double()
    expected = {
        (token, unit): 0.5 * sum(b[unit, r].item() * a[r, token].item() for r in range(R))
        for token, unit in indices((vocabulary, width))
    }
    assert_close(delta.delta(weight), expected, weight)


def test_lora_bias_is_added_with_the_same_scale():
    up, down, bias = normal(5, R), normal(R, 4, seed=1), normal(5, seed=3)
    deltas = from_peft(LORA, {"up": (up, False), "down": (down, False), "bias": (bias, False)})
    base = normal(5, seed=4).double()
    assert_close(deltas["bias"].delta(base), {(row,): 0.5 * bias[row].item() for row in range(5)}, base)


@pytest.mark.parametrize("shape", SHAPES)
def test_dora_rescales_every_output_row_to_its_magnitude(shape: tuple[int, ...]):
    up, down = factors(shape)
    magnitude = normal(shape[0], seed=5).abs() + 0.5
    weight = normal(*shape, seed=2).double()
    moved = {at: weight[at].item() + low_rank(up, down, 0.5, at) for at in indices(shape)}
    length = [math.sqrt(sum(value**2 for at, value in moved.items() if at[0] == row)) for row in range(shape[0])]
    expected = {at: magnitude[at[0]].item() * value / length[at[0]] - weight[at].item() for at, value in moved.items()}
    stored = magnitude if len(shape) == 2 else magnitude.reshape(1, -1, *(1 for _ in shape[2:]))
    delta = from_peft(DORA, {"up": (up, False), "down": (down, False), "magnitude": (stored, False)})["weight"]
    assert_close(delta.delta(weight), expected, weight)


def test_dora_on_an_embedding_rescales_every_column_over_the_vocabulary():
    vocabulary, width = 7, 4
    a, b, magnitude = normal(R, vocabulary), normal(width, R, seed=1), normal(width, seed=5).abs() + 0.5
    weight = normal(vocabulary, width, seed=2).double()
    moved = {
        (token, unit): weight[token, unit].item() + 0.5 * sum(b[unit, r].item() * a[r, token].item() for r in range(R))
        for token, unit in indices((vocabulary, width))
    }
    length = [math.sqrt(sum(moved[token, unit] ** 2 for token in range(vocabulary))) for unit in range(width)]
    expected = {at: magnitude[at[1]].item() * value / length[at[1]] - weight[at].item() for at, value in moved.items()}
    slots = {"up": (a, True), "down": (b, True), "magnitude": (magnitude, False)}
    assert_close(from_peft(DORA, slots, role="embedding")["weight"].delta(weight), expected, weight)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_fresh_dora_keeps_the_lengths_of_the_untouched_weight(axis: int):
    up, down = factors((6, 5))
    weight = normal(6, 5, seed=2).double()
    delta = DoRA(up, down, 0.5, None, axis)
    merged = weight + delta.delta(weight)
    assert (merged - weight).norm() / weight.norm() > 1e-2
    for at in range(weight.shape[axis]):
        before, after = (
            math.sqrt(sum(value**2 for value in tensor.select(axis, at).tolist())) for tensor in (weight, merged)
        )
        assert math.isclose(before, after, rel_tol=1e-14)
    measured = delta.measured(weight)
    assert measured.tensors()["magnitude"].shape == (weight.shape[axis],)
    assert torch.equal(measured.delta(weight), delta.delta(weight))


@pytest.mark.parametrize(
    ("stored", "shape", "axis"),
    [((5, 1), (5, 4), 0), ((1, 4), (5, 4), 1), ((1, 3, 1, 1), (3, 4, 2, 3), 0), ((1, 4, 1, 1), (3, 4, 2, 3), 1)],
)
def test_ia3_multiplies_rows_and_bias_or_columns(stored: tuple[int, ...], shape: tuple[int, ...], axis: int):
    gain = normal(*stored) + 1
    numbers = gain.flatten().tolist()
    deltas = from_peft(IA3, {"gain": (gain, False)}, feedforward=axis == 1)
    weight = normal(*shape, seed=2).double()
    expected = {at: weight[at].item() * numbers[at[axis]] - weight[at].item() for at in indices(shape)}
    assert_close(deltas["weight"].delta(weight), expected, weight)
    assert deltas.keys() == ({"weight"} if axis else {"weight", "bias"})
    if axis == 0:
        bias = normal(shape[0], seed=3).double()
        scaled = {(row,): bias[row].item() * numbers[row] - bias[row].item() for row in range(shape[0])}
        assert_close(deltas["bias"].delta(bias), scaled, bias)


@pytest.mark.parametrize("shape", [*SHAPES, (5,), ()])
def test_a_full_difference_is_scale_times_diff(shape: tuple[int, ...]):
    diff, weight = normal(*shape) + 1, normal(*shape, seed=2).double()
    assert_close(Full(diff, 0.3).delta(weight), {at: 0.3 * diff[at].item() for at in indices(shape)}, weight)


@pytest.mark.parametrize("shape", [*SHAPES, (5,), ()])
def test_a_replacement_leads_to_its_value(shape: tuple[int, ...]):
    value, weight = normal(*shape) + 1, normal(*shape, seed=2).double()
    expected = {at: value[at].item() - weight[at].item() for at in indices(shape)}
    assert_close(Replace(value).delta(weight), expected, weight)


def test_half_precision_factors_are_exact_in_the_dtype_of_the_weight():
    up, down = normal(5, R).bfloat16(), normal(R, 4, seed=1).half()
    weight = normal(5, 4, seed=2).double()
    assert_close(
        LoRA(up, down, 1.75).delta(weight), {at: low_rank(up, down, 1.75, at) for at in indices((5, 4))}, weight
    )
    gain = (normal(5, 1) * 0.1 + 1).bfloat16()
    expected = {at: weight[at].item() * (gain[at[0], 0].item() - 1) for at in indices((5, 4))}
    assert_close(Gain(gain, 0).delta(weight), expected, weight)


def from_peft(kind, stored, *, role="", **options):
    """What a kind builds from tensors as PEFT stores them: slot -> (tensor, whether it is stored transposed)."""
    tensors = {name: tensor.transpose(0, 1) if turned else tensor for name, (tensor, turned) in stored.items()}
    slots = {
        name: TensorRef(key=name, shape=tuple(tensor.shape), dtype="F32", transposed=stored[name][1])
        for name, tensor in tensors.items()
    }
    group = Group(module="m", kind=kind.name, role=role, slots=slots, options=options or {"scale": 0.5})
    kind.touches(group)
    return kind.build(group, tensors)
