"""Kinds that take a weight apart, or draw numbers again, against their formulas, as loops over floats.

Independent of PEFT and of our own code: parts of a weight come from eigenvectors and Gram-Schmidt instead of the
decompositions that the kinds use, and every element of a change is summed up on its own, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from lorahub.deltas.delta import Delta
from lorahub.deltas.frod import Rebased, category_of
from lorahub.deltas.kasa import Kasa
from lorahub.deltas.osf import Tail
from lorahub.deltas.peanut import ACTIVATIONS, Network
from lorahub.deltas.pissa import Moved
from lorahub.deltas.plain import plain_lora
from lorahub.deltas.projections import drawn as drawn_projections
from lorahub.deltas.psoft import Principal
from lorahub.deltas.supertuning import Elements, Ranked
from lorahub.deltas.tinylora import Tiny
from lorahub.deltas.unilora import Spread, drawn
from lorahub.deltas.waveft import Wavelets
from lorahub.deltas.wavelets import LOW_PASS, synthesis
from lorahub.errors import BaseMismatch, NotLocal, UnsupportedKind

Matrix = list[list[float]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(found: torch.Tensor, expected: Matrix, weight: torch.Tensor, *, atol: float = 1e-12) -> None:
    """Equal up to the order of float64 operations, and not small."""
    change = torch.tensor(expected, dtype=torch.float64)
    assert change.norm() > 1e-2 * weight.norm()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, change, rtol=0, atol=atol)


def times(left: Matrix, right: Matrix) -> Matrix:
    return [[sum(a * b for a, b in zip(row, col, strict=True)) for col in zip(*right, strict=True)] for row in left]


def floats(tensor: torch.Tensor) -> Matrix:
    return tensor.double().tolist()


def largest_part(weight: torch.Tensor, n: int) -> Matrix:
    """``W`` on the span of the n leading eigenvectors of ``W.T @ W``."""
    w = weight.double().numpy()
    _, vectors = np.linalg.eigh(w.T @ w)  # ascending
    part: Matrix = (w @ vectors[:, -n:] @ vectors[:, -n:].T).tolist()
    return part


def minus(left: Matrix, right: Matrix) -> Matrix:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def scaled(matrix: Matrix, factor: float) -> Matrix:
    return [[factor * value for value in row] for row in matrix]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_pissa_takes_the_largest_singular_values_from_the_weight(shape: tuple[int, int]) -> None:
    up, down, weight = normal(shape[0], 2), normal(2, shape[1]), normal(*shape, seed=1).double()
    trained = scaled(times(floats(up), floats(down)), 1.5)
    assert_close(Moved(up, down, 1.5, "pissa").delta(weight), minus(trained, largest_part(weight, 2)), weight)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_olora_takes_the_scaled_projection_on_the_first_columns(shape: tuple[int, int]) -> None:
    up, down, weight = normal(shape[0], 2), normal(2, shape[1]), normal(*shape, seed=1).double()
    columns = [list(column) for column in zip(*floats(weight), strict=True)]
    basis: Matrix = []
    for first in columns[:2]:
        column = first
        for axis in basis:
            share = sum(a * b for a, b in zip(axis, column, strict=True))
            column = [a - share * b for a, b in zip(column, axis, strict=True)]
        length = math.sqrt(sum(a * a for a in column))
        basis.append([a / length for a in column])
    shares = [[sum(a * b for a, b in zip(axis, column, strict=True)) for column in columns] for axis in basis]
    part = times([list(row) for row in zip(*basis, strict=True)], shares)
    expected = scaled(minus(times(floats(up), floats(down)), part), 1.5)
    assert_close(Moved(up, down, 1.5, "olora").delta(weight), expected, weight)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_kasa_and_osf_take_the_smallest_singular_values_from_the_weight(shape: tuple[int, int]) -> None:
    up, down, diagonal = normal(shape[0], 2), normal(2, shape[1]), normal(2)
    weight = normal(*shape, seed=1).double()
    tail = minus(floats(weight), largest_part(weight, min(shape) - 2))
    bent = [[u * d for u, d in zip(row, diagonal.double().tolist(), strict=True)] for row in floats(up)]
    trained = times(bent, floats(down))
    assert_close(Kasa(up, down, diagonal, 1.5).delta(weight), minus(scaled(trained, 1.5), tail), weight)
    assert_close(Tail(up, diagonal, down).delta(weight), minus(trained, tail), weight)


DECOMPOSED: Mapping[str, Callable[[], Delta]] = {
    "pissa": lambda: Moved(normal(7, 2), normal(2, 5), 1.5, "pissa"),
    "pissa, turned round": lambda: Moved(normal(7, 2), normal(2, 5), -1.5, "pissa"),
    "pissa, switched off": lambda: Moved(normal(7, 2), normal(2, 5), 0.0, "pissa"),
    "olora": lambda: Moved(normal(7, 2), normal(2, 5), 1.5, "olora"),
    "kasa": lambda: Kasa(normal(7, 2), normal(2, 5), normal(2), 1.5),
    "osf": lambda: Tail(normal(7, 2), normal(2), normal(2, 5)),
    "psoft": lambda: Principal(normal(3), normal(3), normal(3, seed=4), 3),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_plain_lora_is_the_same_change_of_that_weight(name: str) -> None:
    delta, weight = DECOMPOSED[name](), normal(7, 5, seed=1).double()
    lora = plain_lora(delta, weight)
    assert lora is not None
    expected = delta.delta(weight)
    assert expected.norm() > 1e-2 * weight.norm()
    torch.testing.assert_close(lora.delta(weight), expected, rtol=0, atol=1e-12)
    # in the middle of training, in 16 bits, the factors are still those of float32
    half = plain_lora(delta, weight.bfloat16())
    assert half is not None
    assert (half.up.dtype, half.down.dtype) == (torch.float32, torch.float32)


def test_plain_lora_of_rank_r_began_as_part_of_the_weight_has_rank_2r_and_keeps_its_scale() -> None:
    lora = plain_lora(DECOMPOSED["pissa"](), normal(7, 5))
    assert lora is not None
    assert (tuple(lora.up.shape), tuple(lora.down.shape), lora.scale) == ((7, 4), (4, 5), 1.5)
    torch.testing.assert_close(lora.up[:, :2], normal(7, 2))
    torch.testing.assert_close(lora.down[:2], normal(2, 5))


def test_what_has_no_plain_form_is_none() -> None:
    assert plain_lora(Wavelets(normal(4), 1.0, 5), normal(7, 5)) is None


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_decomposition_is_of_the_whole_weight(name: str) -> None:
    delta = DECOMPOSED[name]()
    with pytest.raises(NotLocal, match="whole weight"):
        delta.region(slice(0, 2), slice(None))
    with pytest.raises(BaseMismatch, match="was given a weight"):
        delta.delta(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("cls", [Moved, Kasa, Tail, Rebased])
def test_what_starts_from_a_weight_has_no_start_without_it(cls: type[Delta]) -> None:
    with pytest.raises(UnsupportedKind):
        cls.fresh((4, 4), r=2, generator=torch.Generator())


def turned(terms: int, bound: float = 0.0) -> np.ndarray:
    """``R - I`` for the angles that the tests below use."""
    a, b, c = normal(3).double().tolist()
    q = np.array([[0, a, b], [-a, 0, c], [-b, -c, 0]])
    norm = math.sqrt(2 * (a * a + b * b + c * c))
    if bound and norm > bound:
        q = q * bound / norm
    if not terms:
        return (np.eye(3) + q) @ np.linalg.inv(np.eye(3) - q) - np.eye(3)
    powers = {2: [2], 3: [2, 2, 1], 4: [2, 2, 1], 5: [2, 2, 2, 1], 6: [2, 2, 2, 2, 1]}[terms]
    return sum(factor * np.linalg.matrix_power(q, at) for at, factor in enumerate(powers, 1))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("terms", "bound"), [(0, 0.0), (2, 0.0), (3, 0.0), (4, 0.9), (5, 0.4), (6, 99.0)])
def test_psoft_turns_the_principal_subspace(terms: int, bound: float, balanced: bool) -> None:
    left, right, weight = normal(3, seed=4), normal(3, seed=5), normal(7, 5, seed=1)
    u, s, vh = (part.double().numpy() for part in torch.linalg.svd(weight, full_matrices=False))
    r = np.diag(left.double()) @ (turned(terms, bound) + np.eye(3)) @ np.diag(right.double()) - np.eye(3)
    before, after = (np.sqrt(s[:3]), np.sqrt(s[:3])) if balanced else (s[:3], np.ones(3))
    expected = (u[:, :3] * before @ r @ (after[:, None] * vh[:3])).tolist()
    delta = Principal(normal(3), left, right, 3, balanced, terms, bound)
    assert_close(delta.delta(weight.double()), expected, weight, atol=1e-10)


def test_psoft_with_a_multiple_of_the_identity_scales_the_largest_singular_values() -> None:
    weight = normal(7, 5, seed=1)
    expected = scaled(largest_part(weight, 3), 1.5)
    found = Principal(2.5 * torch.eye(3), None, None, 3).delta(weight.double())
    assert_close(found, expected, weight, atol=1e-5)  # the decomposition is of float32


def test_frod_keeps_directions_and_trains_lengths_and_a_sparse_rotation() -> None:
    lengths, values, basis, weight = normal(4), normal(3), normal(4, 4), normal(6, 4, seed=1).double()
    places = torch.tensor([[0, 3, 0], [1, 2, 1]])
    inverse = np.linalg.inv(basis.double().numpy())
    columns = (weight.numpy() @ inverse.T).T.tolist()
    directions = [[value / math.sqrt(sum(v * v for v in column)) for value in column] for column in columns]
    middle = [[lengths.double().tolist()[i] if i == j else 0.0 for j in range(4)] for i in range(4)]
    for value, row, col in zip(values.double().tolist(), *places.tolist(), strict=True):
        middle[row][col] += value
    u = [list(row) for row in zip(*directions, strict=True)]
    v = [list(row) for row in zip(*floats(basis), strict=True)]
    expected = minus(times(times(u, middle), v), floats(weight))
    found = Rebased(lengths, values, places, basis, "q").delta(weight)
    assert_close(found, expected, weight, atol=1e-6)  # directions are kept in float32


def test_frod_takes_the_next_best_where_a_basis_has_no_inverse() -> None:
    basis = normal(4, 4)
    basis[:, 3] = 0
    change = Rebased(normal(4), normal(1), torch.tensor([[0], [1]]), basis, "q").delta(normal(6, 4).double())
    assert bool(change.isfinite().all())


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("classifier", "classifier"),
        ("h.3.query", "query"),
        ("blocks.3", "blocks_3"),
        ("blocks.3.query", "query"),
        ("model.layers.0.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
    ],
)
def test_frod_names_the_part_of_a_module_by_the_end_of_its_path(module: str, category: str) -> None:
    assert category_of(module) == category


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_peanut_runs_every_column_of_the_weight_through_its_network(depth: int) -> None:
    down, up, encoders, decoders = normal(3, 6), normal(6, 3), normal(depth, 3, 3), normal(depth, 3, 3, seed=1)
    weight = normal(6, 4, seed=1).double()

    def layer(matrix: torch.Tensor, values: list[float]) -> list[float]:
        sums = [sum(a * b for a, b in zip(row, values, strict=True)) for row in floats(matrix)]
        return [max(0.0, each) for each in sums]

    result: Matrix = []
    for column in zip(*floats(weight), strict=True):
        hidden, before = layer(down, list(column)), []
        for encoder in encoders:
            before.append(hidden)
            hidden = layer(encoder, hidden)
        for at, decoder in enumerate(decoders):
            hidden = [a + b for a, b in zip(layer(decoder, hidden), before[depth - 1 - at], strict=True)]
        result.append([0.7 * sum(a * b for a, b in zip(row, hidden, strict=True)) for row in floats(up)])
    expected = [list(row) for row in zip(*result, strict=True)]
    layers = (encoders, decoders) if depth else (None, None)
    assert_close(Network(down, up, *layers, 0.7, "relu").delta(weight), expected, weight)


def test_peanut_reads_whole_columns() -> None:
    delta = Network(normal(3, 6), normal(6, 3), None, None, 1.0, "relu")
    weight = normal(6, 4).double()
    torch.testing.assert_close(
        delta.region(slice(None), slice(1, 3)).delta(weight[:, 1:3]), delta.delta(weight)[:, 1:3]
    )
    with pytest.raises(NotLocal, match="whole columns"):
        delta.region(slice(0, 2), slice(None))


def test_tinylora_mixes_its_matrices_by_the_shared_vector() -> None:
    up, down, mixes, vector = normal(6, 2), normal(2, 4), normal(3, 2, 2), normal(3)
    weight = normal(6, 4, seed=1).double()
    middle = [
        [sum(v * m[i][j] for v, m in zip(vector.double().tolist(), floats(mixes), strict=True)) for j in range(2)]
        for i in range(2)
    ]
    expected = times(times(floats(up), middle), floats(down))
    assert_close(Tiny(up, down, mixes, vector).delta(weight), expected, weight)


def test_unilora_takes_every_element_of_its_factors_from_the_vector() -> None:
    up, down = torch.tensor([[0, 2], [1, 1], [4, 0]]), torch.tensor([[3, 3, 0, 1], [2, 4, 1, 0]])
    scales, vector, weight = (normal(3, 2), normal(2, 4)), normal(5), normal(3, 4, seed=1).double()
    numbers = vector.double().tolist()

    def factor(places: torch.Tensor, by: torch.Tensor) -> Matrix:
        return [
            [numbers[at] * s for at, s in zip(*row, strict=True)]
            for row in zip(places.tolist(), floats(by), strict=True)
        ]

    expected = times(factor(up, scales[0]), factor(down, scales[1]))
    assert_close(Spread(up, scales[0], down, scales[1], vector).delta(weight), expected, weight)


@pytest.mark.parametrize(("total", "length"), [(20, 6), (18, 6), (4, 9)])
def test_unilora_uses_every_number_as_often_as_every_other_or_once_more(total: int, length: int) -> None:
    places, scales = drawn(total, length, 3)
    counts = [places.tolist().count(at) for at in range(length)]
    assert sum(counts) == total
    assert max(counts) - min(counts) == (1 if total % length else 0)
    expected = [1 / math.sqrt(count) if count else 0.0 for count in counts]
    torch.testing.assert_close(scales.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_drawn_projections_lie_within_the_kaiming_bound_and_depend_on_the_seed() -> None:
    up, down = drawn_projections(9, 7, 0, 4, 4)
    assert (tuple(up.shape), tuple(down.shape)) == ((9, 4), (4, 7))
    for tensor in (up, down):
        bound = math.sqrt(6 / tensor.shape[1])
        assert 0.8 * bound < float(tensor.abs().max()) <= bound
    assert not torch.equal(down, drawn_projections(9, 7, 1, 4, 4)[1])


@pytest.mark.parametrize("largest", [True, False])
def test_supertuning_finds_its_places_by_the_size_of_the_elements(largest: bool) -> None:
    values, weight = normal(4), normal(3, 4, seed=1).double()
    flat = weight.flatten().tolist()
    order = sorted(range(12), key=lambda at: -abs(flat[at]) if largest else abs(flat[at]))
    change = [0.0] * 12
    for at, value in zip(order, values.double().tolist(), strict=False):
        change[at] = value
    delta = Ranked(values, largest)
    assert_close(delta.delta(weight), [change[row : row + 4] for row in (0, 4, 8)], weight)
    placed = delta.placed(weight)
    assert isinstance(placed, Elements)
    assert placed.places.tolist() == order[:4]


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        ([[4.0, -4.0], [1.0, 2.0]], [0.5, 0.25]),  # two of one size, two values
        ([[4.0, 2.0], [1.0, -2.0]], [0.5, 0.25]),  # the last one chosen is as large as the first that is not
    ],
)
def test_supertuning_refuses_elements_that_it_cannot_tell_apart(weight: Matrix, values: list[float]) -> None:
    with pytest.raises(BaseMismatch, match="which has which is not in the file"):
        Ranked(torch.tensor(values)).delta(torch.tensor(weight))


def test_supertuning_does_not_mind_equal_elements_with_equal_values() -> None:
    change = Ranked(torch.tensor([0.5, 0.5])).delta(torch.tensor([[4.0, -4.0], [1.0, 2.0]]))
    assert change.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_supertuning_refuses_a_weight_with_fewer_elements_than_values() -> None:
    with pytest.raises(BaseMismatch, match="of 9 elements"):
        Ranked(normal(9)).delta(torch.zeros(2, 2))


def synthesised(values: Matrix, low: list[float]) -> Matrix:
    """One level of the inverse transform by its definition: bands spread by two, filtered, cut."""
    length = len(low)
    high = [(-1) ** t * low[length - 1 - t] for t in range(length)]
    sizes = (len(values), len(values[0]))
    padded_sizes = [size + length - 2 + (size + length - 2) % 2 for size in sizes]
    offset = [(p - size) // 2 for p, size in zip(padded_sizes, sizes, strict=True)]
    padded = [[0.0] * padded_sizes[1] for _ in range(padded_sizes[0])]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            padded[i + offset[0]][j + offset[1]] = value
    half = [p // 2 for p in padded_sizes]

    def tap(bank: int, at: int, position: int) -> float:
        t = position - 2 * at
        return (low, high)[bank][t] if 0 <= t < length else 0.0

    spread = [p + length - 2 - 2 * (length - 2) for p in padded_sizes]  # after the cut
    start = [(have - size) // 2 for have, size in zip(spread, sizes, strict=True)]
    result = []
    for i in range(sizes[0]):
        row = []
        for j in range(sizes[1]):
            down, across = i + start[0] + length - 2, j + start[1] + length - 2
            # upper right: high down the rows; lower left: high across the columns
            row.append(
                sum(
                    padded[below * half[0] + a][right * half[1] + b] * tap(right, a, down) * tap(below, b, across)
                    for below in (0, 1)
                    for right in (0, 1)
                    for a in range(half[0])
                    for b in range(half[1])
                )
            )
        result.append(row)
    return result


@pytest.mark.parametrize("family", ["db2", "sym3", "coif1"])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_waveft_transforms_by_the_filter_of_its_family(family: str, shape: tuple[int, int]) -> None:
    values = normal(*shape).double()
    assert_close(synthesis(values, family), synthesised(floats(values), list(LOW_PASS[family])), values)


@pytest.mark.parametrize("family", [name for name in LOW_PASS if name != "coif4"])
def test_the_filter_of_a_family_is_orthogonal_to_its_own_shifts(family: str) -> None:
    low = LOW_PASS[family]
    assert math.isclose(sum(low), math.sqrt(2), abs_tol=1e-11)
    for shift in range(0, len(low), 2):
        overlap = sum(a * b for a, b in zip(low, low[shift:], strict=False))
        assert math.isclose(overlap, 0.0 if shift else 1.0, abs_tol=1e-8)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_is_that_of_the_transformers_library(name: str) -> None:
    from transformers.activations import ACT2FN  # slow, and needed here alone

    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name].double()(x).detach(), rtol=0, atol=1e-8)
