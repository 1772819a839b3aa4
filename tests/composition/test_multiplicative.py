"""Gains, turns and mirrors combine to one of their kind, as the matrices say, or are refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lorahub.composition.multiplicative import combined, multiplies
from lorahub.deltas.delta import Delta
from lorahub.deltas.diag_oft import OutputTurn
from lorahub.deltas.hra import Mirrors
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.lora import LoRA
from lorahub.deltas.lycoris_ia3 import Growth
from lorahub.deltas.oft import Turn
from lorahub.deltas.replace import Replace
from lorahub.errors import BaseMismatch, NotFinite, UnsupportedKind
from lorahub.plugins import load_registry

Matrix = np.ndarray[Any, np.dtype[np.float64]]
OUT, IN = 8, 12
WEIGHT = np.random.default_rng(0).standard_normal((OUT, IN))


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def after(delta: Delta | None, weight: Matrix = WEIGHT) -> Matrix:
    """The weight with a change."""
    assert delta is not None
    start = torch.from_numpy(weight)
    return np.asarray((start + delta.delta(start)).numpy())


def made(deltas: Sequence[Delta | None], weights: Sequence[float] | None = None, sort: Any = "product") -> Delta | None:
    return combined(deltas, weights or [1.0] * len(deltas), sort, dtype=torch.float64)


def close(one: Matrix, other: Matrix, tolerance: float = 1e-12) -> bool:
    return bool(np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other))


def gain(seed: int, axis: int = 0) -> Gain:
    shape = (OUT, 1) if axis == 0 else (1, IN)
    return Gain(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5, axis)


def growth(seed: int, axis: int = 0) -> Growth:
    size = (OUT, IN)[axis]
    return Growth(torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.5, axis)


def factors_of(delta: Gain | Growth) -> Matrix:
    """What every row or column is multiplied with, by a loop's reckoning."""
    if isinstance(delta, Gain):
        return np.asarray(delta.gain.double().numpy())
    return np.asarray(1 + delta.growth.double().numpy().reshape((-1, 1) if delta.axis == 0 else (1, -1)))


@pytest.mark.parametrize("make", [gain, growth])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weights", [(0.5, 2.0, -0.7), (1.0, 1.0, 1.0)])
def test_the_sum_of_gains_is_the_weighted_sum_of_what_they_change(make: Any, axis: int, weights: Any) -> None:
    parts = [make(seed, axis) for seed in range(3)]
    expected = np.array(WEIGHT)
    for part, weight in zip(parts, weights, strict=True):
        factor = np.broadcast_to(factors_of(part), WEIGHT.shape)
        for row, column in itertools.product(range(OUT), range(IN)):
            expected[row, column] += weight * (factor[row, column] - 1) * WEIGHT[row, column]
    result = made([parts[0], None, *parts[1:]], [weights[0], 5.0, *weights[1:]], "sum")
    assert type(result) is type(parts[0])
    assert close(after(result), expected)
    assert not close(after(made(parts[:2], weights[:2], "sum")), expected, 1e-2)


@pytest.mark.parametrize("make", [gain, growth])
@pytest.mark.parametrize("weights", [(0.5, 2.0, -0.7), (1.0, 1.0, 1.0)])
def test_the_product_of_gains_multiplies_their_powers(make: Any, weights: Any) -> None:
    parts = [make(seed, 1) for seed in range(3)]
    factor = np.ones((1, IN))
    for part, weight in zip(parts, weights, strict=True):
        factor = factor * factors_of(part) ** weight
    result = made(parts, weights)
    assert close(after(result), WEIGHT * factor)
    assert not close(after(made(parts[:2], weights[:2])), WEIGHT * factor, 1e-2)


def test_gains_of_kernels_and_biases_combine_as_well() -> None:
    kernels = [Gain(torch.rand(OUT, 1, 1, 1) + 0.5, 0) for _ in range(2)]
    biases = [Gain(each.gain.flatten(), 0) for each in kernels]
    weight, bias = made(kernels, (0.5, 0.5), "sum"), made(biases, (0.5, 0.5), "sum")
    assert isinstance(weight, Gain)
    assert isinstance(bias, Gain)
    assert weight.gain.shape == (OUT, 1, 1, 1)
    assert torch.equal(weight.gain.flatten(), bias.gain)  # PEFT's file has one tensor for both
    flat = [Growth(torch.rand(1, OUT, 1, 1), 0) for _ in range(2)]
    assert made(flat).growth.shape == (1, OUT, 1, 1)  # type: ignore[union-attr]  # a Growth


def test_small_gains_lose_no_digits_in_a_product() -> None:
    tiny = [Growth(torch.tensor([1e-9, -2e-9]).double(), 0), Growth(torch.tensor([3e-9, 5e-9]).double(), 0)]
    result = made(tiny, (0.5, 1.0))
    assert isinstance(result, Growth)
    assert result.growth.tolist() == pytest.approx([3.5e-9 - 1e-18 / 8, 4e-9], rel=1e-7)


def test_gains_that_are_not_positive_have_whole_powers_only() -> None:
    mixed, plain = Gain(torch.tensor([[-1.0], [0.0], [2.0]]), 0), Gain(torch.tensor([[3.0], [4.0], [0.5]]), 0)
    weight = np.arange(6.0).reshape(3, 2) + 1
    result = made([mixed, plain], (3.0, 1.0))
    assert close(after(result, weight), weight * np.array([[-3.0], [0.0], [4.0]]))
    with pytest.raises(UnsupportedKind, match=r"no power of 0\.5") as caught:
        made([mixed, plain], (0.5, 1.0))
    assert "linear, the weighted sum" in str(caught.value.hint)
    with pytest.raises(UnsupportedKind, match="no power of -1"):
        made([mixed, plain], (-1.0, 1.0))
    assert made([mixed, plain], (-0.5, 1.0), "sum") is not None


def test_gains_on_different_axes_or_of_different_bases_do_not_combine() -> None:
    with pytest.raises(UnsupportedKind, match="outputs and gains on inputs") as caught:
        made([gain(0, 0), gain(1, 1)], sort="sum")
    assert "--non-additive dense" in str(caught.value.hint)
    with pytest.raises(BaseMismatch, match="different bases"):
        made([gain(0), Gain(torch.ones(OUT + 1, 1), 0)], sort="sum")
    with pytest.raises(UnsupportedKind, match="kinds ia3 and lycoris-ia3"):
        made([gain(0), growth(0)], sort="sum")
    with pytest.raises(UnsupportedKind, match="kinds ia3 and lora"):
        made([gain(0), LoRA(random(OUT, 2, seed=0), random(2, IN, seed=1), 1.0)], sort="sum")


# Turns


def turned_by(angles: torch.Tensor, b: int) -> Matrix:
    """The block-diagonal rotation of some angles, in numpy: (I - Q)(I + Q)^-1."""
    result = np.zeros((len(angles) * b, len(angles) * b))
    for n, row in enumerate(angles.double().numpy()):
        q = np.zeros((b, b))
        for value, (i, j) in zip(row, itertools.combinations(range(b), 2), strict=True):
            q[i, j], q[j, i] = value, -value
        result[n * b : (n + 1) * b, n * b : (n + 1) * b] = (np.eye(b) - q) @ np.linalg.inv(np.eye(b) + q)
    return result


def angles(seed: int, blocks: int = 3, b: int = 4) -> torch.Tensor:
    return random(blocks, b * (b - 1) // 2, seed=seed, scale=0.6)


@pytest.mark.parametrize("turned", [False, True])
def test_turns_of_inputs_follow_each_other_in_order(turned: bool) -> None:
    parts = [Turn(angles(seed), turned=turned) for seed in range(3)]
    expected = WEIGHT
    for part in parts:
        rotation = turned_by(part.angles, 4)
        expected = expected @ (rotation if turned else rotation.T)
    result = made([parts[0], None, *parts[1:]])
    assert isinstance(result, Turn)
    assert result.turned is turned
    assert result.angles.shape == (3, 6)
    assert close(after(result), expected, 1e-10)
    assert close(after(combined(parts, [1.0] * 3, "product", dtype=torch.float32)), expected, 1e-5)
    assert not close(after(made(parts[::-1])), expected, 1e-2)
    assert not close(after(made(parts[:2])), expected, 1e-2)


def test_shared_bounded_and_scaled_turns_combine_to_what_they_are() -> None:
    shared, own = Turn(angles(0, 1), shared=True), Turn(angles(1))
    repeated = turned_by(shared.angles.expand(3, 6), 4)
    result = made([shared, own])
    assert isinstance(result, Turn)
    assert not result.shared
    assert close(after(result), WEIGHT @ repeated.T @ turned_by(own.angles, 4).T, 1e-10)
    both = made([shared, shared])
    assert isinstance(both, Turn)
    assert both.shared
    assert both.angles.shape == (1, 6)
    assert close(after(both), WEIGHT @ repeated.T @ repeated.T, 1e-10)
    bounded = Turn(angles(0), limit=0.5)
    result = made([bounded, own])
    assert isinstance(result, Turn)
    assert result.limit is None
    assert close(after(result), after(own, after(bounded)), 1e-10)
    scaled = [Turn(angles(seed), scaled=True) for seed in (0, 1)]
    result = made(scaled)
    assert isinstance(result, Turn)
    assert result.scaled
    assert close(after(result), after(scaled[1], after(scaled[0])), 1e-10)
    with pytest.raises(UnsupportedKind, match="scaled and angles that are not"):
        made([scaled[0], own])


def test_turns_of_kernels_combine_without_knowing_the_kernel() -> None:
    kernel = random(5, 3, 2, 2, seed=4).double()
    parts = [Turn(angles(seed)) for seed in range(2)]
    once = kernel + parts[0].delta(kernel)
    result = made(parts)
    assert result is not None
    assert torch.allclose(kernel + result.delta(kernel), once + parts[1].delta(once), atol=1e-10)


def test_turns_that_are_no_exact_cayley_turns_are_refused() -> None:
    own = Turn(angles(1))
    series = Turn(angles(0), (2.0, 2.0))
    with pytest.raises(UnsupportedKind, match="series in Q only comes near a turn") as caught:
        made([series, own])
    assert "use_cayley_neumann" in str(caught.value.hint)
    with pytest.raises(UnsupportedKind, match="one way and the other"):
        made([own, Turn(angles(0), turned=True)])
    with pytest.raises(UnsupportedKind, match="blocks of 3 and 4"):
        made([own, Turn(angles(0, 4, 3))])
    with pytest.raises(UnsupportedKind, match="matrices and the other for kernels"):
        made([Turn(angles(0), mirrored=True), Turn(angles(1), mirrored=True)])
    with pytest.raises(BaseMismatch, match="different bases"):
        made([own, Turn(angles(0, 2))])
    with pytest.raises(UnsupportedKind, match=r"no product at weight 0\.5"):
        made([own, own], (1.0, 0.5))
    quarter = Turn(torch.ones(1, 1))  # (I - Q)(I + Q)^-1 is a turn by 90 degrees
    with pytest.raises(UnsupportedKind, match="half turn"):
        made([quarter, quarter])


def test_turns_of_outputs_follow_each_other_in_order() -> None:
    parts = [OutputTurn(random(2, 4, 4, seed=seed, scale=0.4)) for seed in range(3)]
    expected = WEIGHT
    for part in parts:
        blocks = part.blocks.double().numpy()
        rotation = np.zeros((OUT, OUT))
        for n in range(2):
            q = blocks[n] - blocks[n].T
            rotation[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = (np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q)
        expected = rotation @ expected
    result = made(parts)
    assert isinstance(result, OutputTurn)
    assert result.blocks.shape == (2, 4, 4)
    assert close(after(result), expected, 1e-10)
    assert not close(after(made(parts[::-1])), expected, 1e-2)


def test_factors_for_outputs_come_last_or_not_at_all() -> None:
    plain = OutputTurn(random(2, 4, 4, seed=0, scale=0.4), constraint=0.1)
    last = OutputTurn(random(2, 4, 4, seed=1, scale=0.4), random(OUT, 1, seed=2) + 2)
    result = made([plain, last])
    assert isinstance(result, OutputTurn)
    assert result.constraint is None
    assert close(after(result), after(last, after(plain)), 1e-10)
    with pytest.raises(UnsupportedKind, match="before the next turn"):
        made([last, plain])
    with pytest.raises(UnsupportedKind, match="different sizes"):
        made([plain, OutputTurn(random(4, 2, 2, seed=0))])


def test_mirrors_stand_in_a_row() -> None:
    parts = [Mirrors(random(IN, 2, seed=0)), Mirrors(random(IN, 3, seed=1), orthogonal=True)]
    expected = WEIGHT
    for part in parts:
        normals = part.normals.double().numpy()
        units: list[Matrix] = []
        for column in normals.T:
            for earlier in units if part.orthogonal else ():
                column = column - (earlier @ column) * earlier  # noqa: PLW2901  # Gram and Schmidt, in order
            units.append(column / np.linalg.norm(column))
        for unit in units:
            expected = expected @ (np.eye(IN) - 2 * np.outer(unit, unit))
    result = made(parts)
    assert isinstance(result, Mirrors)
    assert result.normals.shape == (IN, 5)
    assert not result.orthogonal
    assert close(after(result), expected, 1e-10)
    assert not close(after(made(parts[::-1])), expected, 1e-2)
    with pytest.raises(BaseMismatch, match="different bases"):
        made([parts[0], Mirrors(random(IN + 1, 2, seed=0))])


# Whatever they are


def test_one_adapter_alone_at_weight_one_stays_what_it_is() -> None:
    for delta in (gain(0), Turn(angles(0), (2.0,)), Replace(torch.ones(OUT, IN))):
        for sort in ("sum", "product"):
            assert made([None, delta, gain(3)], (1.0, 1.0, 0.0), sort) is delta
    assert made([None, gain(0)], (1.0, 0.0), "sum") is None


def test_what_has_no_such_sum_or_product_says_what_works() -> None:
    turns = [Turn(angles(0)), Turn(angles(1))]
    with pytest.raises(UnsupportedKind, match="the sum of changes of kind oft") as caught:
        made(turns, (0.5, 0.5), "sum")
    assert 'method "product"' in str(caught.value.hint)
    with pytest.raises(UnsupportedKind, match="the sum of changes of kind oft") as caught:
        made([turns[0], Turn(angles(1), (2.0, 2.0))], (0.5, 0.5), "sum")
    assert "product" not in str(caught.value.hint)
    loras = [LoRA(random(OUT, 2, seed=0), random(2, IN, seed=1), 1.0)] * 2
    with pytest.raises(UnsupportedKind, match="the product of changes of kind lora") as caught:
        made(loras)
    assert "--non-additive dense" in str(caught.value.hint)
    assert "product" not in str(caught.value.hint)


def test_a_result_that_does_not_fit_its_dtype_is_refused() -> None:
    large = [Gain(torch.full((OUT, 1), 300.0), 0)] * 2
    assert combined(large, (1.0, 1.0), "product", dtype=torch.float32) is not None
    with pytest.raises(NotFinite, match=r"does not fit into torch\.float16"):
        combined(large, (1.0, 1.0), "product", dtype=torch.float16)


def test_only_kinds_that_look_at_the_weight_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    known = {
        kind.name
        for kind in load_registry().kinds.values()
        for delta in kind.deltas
        if delta in (Gain, Growth, Turn, OutputTurn, Mirrors)
    }
    assert known == {"ia3", "lycoris-ia3", "oft", "diag-oft", "hra"}
    for delta in (Gain, Growth, Turn, OutputTurn, Mirrors):
        assert multiplies(delta.example((OUT, IN), r=2, generator=generator))
        assert not delta.additive
    assert not multiplies(LoRA.example((OUT, IN), r=2, generator=generator))
