"""Rotations, circulants, spectra and sparse changes against their formulas, as loops over Python floats.

Independent of PEFT and of our own code: matrices are multiplied and inverted element by element.
"""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch

from lorahub.deltas.beft import Offset
from lorahub.deltas.boft import Butterfly
from lorahub.deltas.c3a import Circulant
from lorahub.deltas.fourierft import Spectrum
from lorahub.deltas.hra import Mirrors
from lorahub.deltas.ln_tuning import Tuned
from lorahub.deltas.oft import Turn
from lorahub.deltas.road import Pairs
from lorahub.deltas.shira import SHIRA, Sparse
from lorahub.deltas.waveft import Wavelets
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal, UnsupportedKind

Matrix = list[list[float]]
SHAPES = [(5, 12), (3, 4, 3), (2, 3, 2, 2)]
"""Twelve inputs each, in one to three axes."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def product(left: Matrix, right: Matrix) -> Matrix:
    return [[sum(x * y for x, y in zip(row, col, strict=True)) for col in zip(*right, strict=True)] for row in left]


def turned(matrix: Matrix) -> Matrix:
    return [list(row) for row in zip(*matrix, strict=True)]


def eye(n: int) -> Matrix:
    return [[float(row == col) for col in range(n)] for row in range(n)]


def combined(left: Matrix, right: Matrix, factor: float) -> Matrix:
    return [[x + factor * y for x, y in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def inverse(matrix: Matrix) -> Matrix:
    """Gauss and Jordan, pivoting by size."""
    n = len(matrix)
    rows = [[*row, *unit] for row, unit in zip(matrix, eye(n), strict=True)]
    for col in range(n):
        pivot = max(range(col, n), key=lambda row: abs(rows[row][col]))
        rows[col], rows[pivot] = rows[pivot], rows[col]
        rows[col] = [value / rows[col][col] for value in rows[col]]
        for row in range(n):
            if row != col:
                rows[row] = [x - rows[row][col] * y for x, y in zip(rows[row], rows[col], strict=True)]
    return [row[n:] for row in rows]


def diagonal(blocks: list[Matrix]) -> Matrix:
    n, b = len(blocks), len(blocks[0])
    return [
        [blocks[row // b][row % b][col % b] if row // b == col // b else 0.0 for col in range(n * b)]
        for row in range(n * b)
    ]


def flat(weight: torch.Tensor) -> Matrix:
    return weight.flatten(1).tolist()


def assert_close(found: torch.Tensor, merged: Matrix, weight: torch.Tensor) -> None:
    """The change is ``merged - weight``, up to the order of float64 operations, and not a small one."""
    expected = torch.tensor(merged, dtype=torch.float64).reshape(weight.shape) - weight
    assert expected.norm() > 1e-2 * weight.norm()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def skew(numbers: list[float], b: int) -> Matrix:
    upper = iter(numbers)
    matrix = [[0.0] * b for _ in range(b)]
    for row, col in itertools.combinations(range(b), 2):
        matrix[row][col] = next(upper)
        matrix[col][row] = -matrix[row][col]
    return matrix


def exact(q: Matrix) -> Matrix:
    """``(I - Q)(I + Q)^-1``."""
    return product(combined(eye(len(q)), q, -1), inverse(combined(eye(len(q)), q, 1)))


def series(q: Matrix, coefficients: tuple[float, ...]) -> Matrix:
    result, power = eye(len(q)), eye(len(q))
    for coefficient in coefficients:
        power = product(power, q)
        result = combined(result, power, coefficient)
    return result


@pytest.mark.parametrize("coefficients", [None, (), (2.0,), (2.0, 2.0, 2.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_oft_multiplies_the_inputs_by_the_transposed_rotation(
    shape: tuple[int, ...], coefficients: tuple[float, ...] | None
) -> None:
    angles, weight = normal(4, 3), normal(*shape, seed=1).double()
    blocks = [skew(row, 3) for row in angles.double().tolist()]
    rotations = [exact(q) if coefficients is None else series(q, coefficients) for q in blocks]
    found = Turn(angles, coefficients).delta(weight)
    if coefficients == ():
        assert not found.any()
    else:
        assert_close(found, product(flat(weight), turned(diagonal(rotations))), weight)


def test_oft_turns_embeddings_the_other_way_and_shares_one_block() -> None:
    angles, weight = normal(1, 3), normal(5, 12, seed=1).double()
    rotation = exact(skew(angles[0].double().tolist(), 3))
    merged = product(flat(weight), diagonal([rotation] * 4))
    assert_close(Turn(angles, shared=True, turned=True).delta(weight), merged, weight)


def test_a_bound_shortens_the_oft_blocks_that_are_too_long() -> None:
    angles, weight = normal(4, 3) * torch.tensor([[0.01], [1.0], [1.0], [0.02]]), normal(5, 12, seed=1).double()
    bound, rotations = 0.8 / math.sqrt(4), []
    for row in angles.double().tolist():
        q = skew(row, 3)
        length = math.sqrt(sum(value**2 for line in q for value in line))
        rotations.append(exact([[value * min(1.0, bound / length) for value in line] for line in q]))
    merged = product(flat(weight), turned(diagonal(rotations)))
    assert_close(Turn(angles, limit=0.8).delta(weight), merged, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_boft_multiplies_by_shuffled_block_rotations_and_scales_the_outputs(shape: tuple[int, ...]) -> None:
    factors, n, b = 2, 6, 2
    blocks, weight = normal(factors, n, b, b), normal(*shape, seed=1).double()
    scale = normal(shape[0], 1, seed=2) + 1
    total = eye(12)
    for factor in range(factors):
        rotations = []
        for block in blocks[factor].double().tolist():
            half = combined(block, turned(block), -1)
            rotations.append(exact([[value / 2 for value in row] for row in half]))
        order = list(range(12))
        if factor:  # pieces of b / 2 = 1 inside stretches of 4: 0 2 1 3, 4 6 5 7, ...
            order = [start + step for start in range(0, 12, 4) for step in (0, 2, 1, 3)]
        permutation = [[float(order[row] == col) for col in range(12)] for row in range(12)]
        turn = product(permutation, product(diagonal(rotations), turned(permutation)))
        total = product(turn, total)
    merged = product(flat(weight), turned(total))
    scaled = [[value * gain for value in row] for row, gain in zip(merged, scale.flatten().tolist(), strict=True)]
    assert_close(Butterfly(blocks, scale).delta(weight), scaled, weight)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_hra_mirrors_the_inputs_one_plane_after_the_other(shape: tuple[int, ...], orthogonal: bool) -> None:
    normals, weight = normal(12, 3), normal(*shape, seed=1).double()
    total, earlier = eye(12), []
    for column in normals.double().T.tolist():
        vector = column
        for unit in earlier if orthogonal else ():
            overlap = sum(x * y for x, y in zip(unit, vector, strict=True))
            vector = [x - overlap * y for x, y in zip(vector, unit, strict=True)]
        length = math.sqrt(sum(value**2 for value in vector))
        unit = [value / length for value in vector]
        earlier.append(unit)
        total = product(total, combined(eye(12), [[x * y for y in unit] for x in unit], -2))
    assert_close(Mirrors(normals, orthogonal).delta(weight), product(flat(weight), total), weight)


def test_a_fresh_hra_changes_exactly_nothing_and_learns_all_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = normal(5, 12).double()
    fresh = Mirrors.fresh((5, 12), r=4, generator=generator)
    normals = fresh.normals.clone().requires_grad_()
    change = Mirrors(normals).delta(weight)
    assert not change.any()
    (change * normal(5, 12, seed=3)).sum().backward()
    assert (normals.grad.norm(dim=0) > 1e-3).all()
    with pytest.raises(UnsupportedKind, match="even number"):
        Mirrors.fresh((5, 12), r=3, generator=generator)


@pytest.mark.parametrize("shape", [(8, 3), (8,), (8, 2, 3)])
@pytest.mark.parametrize(("variant", "size"), [("road_1", 4), ("road_2", 8), ("road_4", 16)])
def test_road_turns_and_stretches_pairs_of_outputs(shape: tuple[int, ...], variant: str, size: int) -> None:
    angles, lengths = normal(size), normal(size, seed=1) + 1
    t, a = angles.double().tolist(), lengths.double().tolist()
    weight = normal(*shape, seed=2).double()
    rows = weight.reshape(8, -1).tolist()
    merged: Matrix = [[] for _ in rows]
    for start, i in itertools.product((0, 4), (0, 1)):
        one, two = start + i, start + 2 + i
        at = {
            "road_1": ((start // 2 + i,) * 4),
            "road_2": (one, one, two, two),
            "road_4": (2 * start + i, 2 * start + 4 + i, 2 * start + 2 + i, 2 * start + 6 + i),
        }[variant]
        own, other = a[at[0]] * math.cos(t[at[0]]), a[at[1]] * math.sin(t[at[1]])
        merged[one] = [own * x - other * y for x, y in zip(rows[one], rows[two], strict=True)]
        own, other = a[at[2]] * math.cos(t[at[2]]), a[at[3]] * math.sin(t[at[3]])
        merged[two] = [own * y + other * x for x, y in zip(rows[one], rows[two], strict=True)]
    assert_close(Pairs(angles, lengths, variant, 4).delta(weight), merged, weight)


def test_road_is_cut_into_whole_groups_only() -> None:
    pairs, weight = Pairs(normal(8), normal(8, seed=1), "road_2", 4), normal(8, 3, seed=2).double()
    for rows in (slice(4, 8), (4, 5, 6, 7, 0, 1, 2, 3)):
        index = list(range(8))[rows] if isinstance(rows, slice) else list(rows)
        torch.testing.assert_close(
            pairs.region(rows, slice(1, 3)).delta(weight[index][:, 1:3]), pairs.delta(weight)[index][:, 1:3]
        )
    for rows in (slice(2, 6), slice(0, 2), (3, 2, 1, 0)):
        with pytest.raises(NotLocal):
            pairs.region(rows, slice(None))


def test_c3a_is_a_matrix_of_circulants_divided_by_the_inputs() -> None:
    kernel, weight = normal(2, 3, 4) * 12, normal(8, 12).double()
    numbers = kernel.double().tolist()
    merged = [
        [weight[row, col].item() + numbers[row // 4][col // 4][(col - row) % 4] / 12 for col in range(12)]
        for row in range(8)
    ]
    assert_close(Circulant(kernel).delta(weight), merged, weight)


def test_shira_adds_its_values_at_its_places() -> None:
    values, places = normal(4), torch.tensor([[0, 2, 2, 4], [1, 0, 0, 5]], dtype=torch.int32)
    weight = normal(5, 6, seed=1).double()
    merged = weight.tolist()
    for value, row, col in zip(values.double().tolist(), *places.tolist(), strict=True):
        merged[row][col] += value
    delta = Sparse(values, places, 1)
    assert_close(delta.delta(weight), merged, weight)
    with pytest.raises(BaseMismatch, match=r"reaches \[5, 6\]"):
        delta.delta(weight[:4])
    with pytest.raises(NotLocal, match="end of its weight"):
        delta.region(slice(-2, None), slice(None))
    with pytest.raises(NotLocal, match="twice"):
        delta.region((1, 1), slice(None))


@pytest.mark.parametrize("places", [[[0.5], [1.0]], [[0.0], [-1.0]]])
def test_shira_refuses_places_that_are_none(places: list[list[float]]) -> None:
    group, tensors = _group_of(Sparse(normal(1), torch.tensor(places), 1))
    with pytest.raises(IntegrityError, match="no whole numbers, or below zero"):
        SHIRA.build(group, tensors)


def _group_of(delta: Sparse):
    from lorahub.deltas.kind import Group, TensorRef

    tensors, options = SHIRA.dissolve({"weight": delta})
    slots = {name: TensorRef(key=name, shape=tuple(value.shape), dtype="F32") for name, value in tensors.items()}
    return Group(module="m", kind="shira", slots=slots, options=options), tensors


def test_fourierft_is_the_real_part_of_an_inverse_transform() -> None:
    spectrum, weight = normal(5) * 20, normal(4, 6, seed=1).double()
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:5].tolist()
    merged = weight.tolist()
    for row, col in itertools.product(range(4), range(6)):
        for value, at in zip(spectrum.double().tolist(), chosen, strict=True):
            phase = 2j * math.pi * (at // 6 * row / 4 + at % 6 * col / 6)
            merged[row][col] += 1.5 * value * cmath.exp(phase).real / 24
    delta = Spectrum(spectrum, 1.5, 3)
    assert_close(delta.delta(weight), merged, weight)
    assert torch.equal(delta.delta(weight.T.contiguous().T), delta.delta(weight))
    with pytest.raises(BaseMismatch, match="5 coefficients"):
        delta.delta(weight[:2, :2])


@pytest.mark.parametrize(("rows", "cols"), [(4, 6), (3, 5)])
def test_waveft_makes_each_square_from_one_number_of_every_quadrant(rows: int, cols: int) -> None:
    spectrum, weight = normal(7), normal(rows, cols, seed=1).double()
    chosen = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(3))[:7].tolist()
    high, wide = (rows + 1) // 2, (cols + 1) // 2
    merged = weight.tolist()
    for value, at in zip(spectrum.double().tolist(), chosen, strict=True):
        lower, i = divmod(at // cols, high)
        right, j = divmod(at % cols, wide)
        for a, b in itertools.product((0, 1), (0, 1)):
            if 2 * i + a < rows and 2 * j + b < cols:
                sign = (-1) ** (right * a + lower * b)
                merged[2 * i + a][2 * j + b] += 1.5 * sign * value / 2
    assert_close(Wavelets(spectrum, 1.5, 3).delta(weight), merged, weight)


def test_waveft_without_a_transform_puts_its_numbers_in_place() -> None:
    spectrum, weight = normal(5), normal(4, 6, seed=1).double()
    merged = weight.tolist()
    for value, at in zip(
        spectrum.double().tolist(),
        torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist(),
        strict=False,
    ):
        merged[at // 6][at % 6] += 1.5 * value
    assert_close(Wavelets(spectrum, 1.5, 3, inverted=False).delta(weight), merged, weight)


def test_beft_adds_to_the_bias_and_ln_tuning_leads_to_its_value() -> None:
    value, bias = normal(5), normal(5, seed=1).double()
    added = [[x + y] for x, y in zip(bias.tolist(), value.double().tolist(), strict=True)]
    assert_close(Offset(value).delta(bias), added, bias)
    assert_close(Tuned(value).delta(bias), [[y] for y in value.double().tolist()], bias)
