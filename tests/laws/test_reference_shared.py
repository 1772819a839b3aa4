"""Shared projections, banks of vectors, replaced rows and their like against their formulas, as loops over floats.

Independent of PEFT and of our own code: every element of the change is summed up on its own, in float64.
"""

from __future__ import annotations

import math

import pytest
import torch

from lorahub.deltas.bdlora import BlockLoRA
from lorahub.deltas.deft import Refill
from lorahub.deltas.glora import Offsets, Scaled
from lorahub.deltas.pvera import PVeRA
from lorahub.deltas.randlora import RandLoRA
from lorahub.deltas.supertuning import Elements
from lorahub.deltas.tokens import Rows
from lorahub.deltas.vblora import Banked, Chosen
from lorahub.deltas.vera import VeRA
from lorahub.errors import BaseMismatch, NotLocal, UnsupportedKind

Matrix = list[list[float]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(found: torch.Tensor, expected: Matrix, weight: torch.Tensor) -> None:
    """Equal up to the order of float64 operations, and not small."""
    change = torch.tensor(expected, dtype=torch.float64)
    assert change.norm() > 1e-2 * weight.norm()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, change, rtol=0, atol=1e-12)


def test_vera_uses_the_first_rows_and_columns_of_what_all_modules_share() -> None:
    gain, mix, up, down, weight = normal(5), normal(3), normal(9, 3), normal(3, 8), normal(5, 6, seed=1).double()
    b, d, up_, down_ = (tensor.double().tolist() for tensor in (gain, mix, up, down))
    expected = [[b[o] * sum(up_[o][r] * d[r] * down_[r][i] for r in range(3)) for i in range(6)] for o in range(5)]
    assert_close(VeRA(gain, mix, up, down).delta(weight), expected, weight)


def test_pvera_is_the_mean_and_so_the_first_half_of_the_inner_vector_and_projection() -> None:
    gain, mix, up, down, weight = normal(5), normal(6), normal(9, 3), normal(6, 8), normal(5, 6, seed=1).double()
    b, d, up_, down_ = (tensor.double().tolist() for tensor in (gain, mix, up, down))
    expected = [[b[o] * sum(up_[o][r] * d[r] * down_[r][i] for r in range(3)) for i in range(6)] for o in range(5)]
    assert_close(PVeRA(gain, mix, up, down).delta(weight), expected, weight)


@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (5, 9), (5,), (5, 6, 1)])
def test_vera_refuses_a_weight_it_was_not_made_for(shape: tuple[int, ...]) -> None:
    with pytest.raises(BaseMismatch, match="5 outputs and up to 8 inputs"):
        VeRA(normal(5), normal(3), normal(9, 3), normal(3, 8)).delta(torch.zeros(shape))


def test_vera_cannot_be_cut_by_columns_counted_from_the_end() -> None:
    with pytest.raises(NotLocal, match="how many inputs"):
        VeRA(normal(5), normal(3), normal(9, 3), normal(3, 8)).region(slice(None), slice(-2, None))


def pieces(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> list[Matrix]:
    """For every piece the mean of the bank's vectors with the largest logits, weighted by their exponentials."""
    vectors = bank.double().tolist()

    def piece(numbers: list[float]) -> list[float]:
        largest = sorted(range(len(numbers)), key=lambda at: -numbers[at])[:topk]
        parts = {at: math.exp(numbers[at]) for at in largest}
        return [sum(parts[at] * vectors[at][e] for at in largest) / sum(parts.values()) for e in range(len(vectors[0]))]

    return [[piece(numbers) for numbers in row] for row in logits.double().tolist()]


def test_vblora_puts_factors_together_from_weighted_vectors_of_the_bank() -> None:
    down, up, bank, weight = normal(3, 4, 5), normal(3, 3, 5), normal(5, 2), normal(6, 8, seed=1).double()
    left, right = pieces(up, bank, 2), pieces(down, bank, 2)
    expected = [
        [sum(left[o // 2][r][o % 2] * right[r][i // 2][i % 2] for r in range(3)) for i in range(8)] for o in range(6)
    ]
    assert_close(Banked(down, up, bank, 2).delta(weight), expected, weight)


def test_vblora_from_chosen_vectors_gives_the_last_the_rest() -> None:
    bank, weight = normal(5, 2), normal(2, 4, seed=1).double()
    places, weights = torch.tensor([[[4, 1], [0, 2]]], dtype=torch.uint8), torch.tensor([[[0.75], [0.5]]])
    b = bank.double().tolist()
    right = [[0.75 * b[4][e] + 0.25 * b[1][e], 0.5 * b[0][e] + 0.5 * b[2][e]] for e in range(2)]
    left = [0.75 * b[3][e] + 0.25 * b[2][e] for e in range(2)]
    expected = [[left[o] * right[i % 2][i // 2] for i in range(4)] for o in range(2)]
    chosen = Chosen(places, weights, torch.tensor([[[3, 2]]]), torch.tensor([[[0.75]]]), bank)
    assert_close(chosen.delta(weight), expected, weight)


def test_vblora_has_no_start_that_changes_nothing() -> None:
    with pytest.raises(UnsupportedKind, match="one bank"):
        Banked.fresh((4, 4), r=2, generator=torch.Generator())


@pytest.mark.parametrize(("out", "inputs"), [(7, 5), (5, 7), (5, 5)])
def test_randlora_sums_scaled_random_bases_over_the_shorter_axis(out: int, inputs: int) -> None:
    r, n, least = 2, 3, min(out, inputs)
    lamb, gamma, up, down = normal(r, n), normal(n, least), normal(9, 4, r), normal(r, 1, 8)
    weight = normal(out, inputs, seed=1).double()
    lamb_, gamma_, up_, down_ = (tensor.double().tolist() for tensor in (lamb, gamma, up, down))

    def element(long: int, short: int) -> float:
        # the two sides count bases and ranks in different orders, as PEFT does
        total = 0.0
        for at in range(r * n):
            base, rank = divmod(at, n)
            total += up_[long][at // r][at % r] * lamb_[base][rank] * down_[base][0][short] * gamma_[rank][short]
        return 1.5 * total

    expected = [[element(o, i) if inputs <= out else element(i, o) for i in range(inputs)] for o in range(out)]
    assert_close(RandLoRA(lamb, gamma, up, down, 1.5).delta(weight), expected, weight)


def test_tokens_replace_their_rows_and_no_others() -> None:
    values, weight = normal(2, 3), normal(5, 3, seed=1).double()
    w, v = weight.tolist(), values.double().tolist()
    expected = [[0.0] * 3 for _ in range(5)]
    for row, place in enumerate((4, 1)):
        expected[place] = [v[row][i] - w[place][i] for i in range(3)]
    assert_close(Rows(values, (4, 1)).delta(weight), expected, weight)


def test_tokens_refuse_a_weight_that_lacks_a_row() -> None:
    with pytest.raises(BaseMismatch, match="rows up to 4"):
        Rows(normal(2, 3), (4, 1)).delta(torch.zeros(4, 3))


def orthonormal(basis: Matrix) -> Matrix:
    """The columns by Gram and Schmidt."""
    columns: Matrix = []
    for column in zip(*basis, strict=True):
        rest = list(column)
        for other in columns:
            along = sum(x * y for x, y in zip(other, column, strict=True))
            rest = [x - along * y for x, y in zip(rest, other, strict=True)]
        size = math.sqrt(sum(x * x for x in rest))
        columns.append([x / size for x in rest])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("filled", [True, False])
def test_deft_projects_a_space_out_and_fills_it(filled: bool) -> None:
    basis, fill, weight = normal(5, 2), normal(2, 4), normal(5, 4, seed=1).double()
    w, p = weight.tolist(), basis.double().tolist()
    f = [[1.5 * value * filled for value in row] for row in fill.double().tolist()]

    def expected(q: Matrix, right: Matrix) -> Matrix:
        return [
            [
                sum(q[o][r] * (f[r][i] - sum(right[x][r] * w[x][i] for x in range(5))) for r in range(2))
                for i in range(4)
            ]
            for o in range(5)
        ]

    given = fill if filled else None
    relu = [[max(value, 0.0) for value in row] for row in p]
    assert_close(Refill(basis, given, 1.5, "relu").delta(weight), expected(p, relu), weight)
    found = Refill(basis, given, 1.5, "qr").delta(weight)
    q = orthonormal(p)
    if filled:  # then the sign of each column of q matters, and is LAPACK's
        signs = torch.linalg.qr(basis.double()).R.diagonal().sign().tolist()
        q = [[value * sign for value, sign in zip(row, signs, strict=True)] for row in q]
    assert_close(found, expected(q, q), weight)


def test_glora_scales_and_shifts_the_weight_by_products() -> None:
    a, a_right, b, b_right = normal(4, 2), normal(2, 3), normal(4, 2, seed=2), normal(2, 3, seed=2)
    weight = normal(4, 3, seed=1).double()
    w, *paths = (tensor.double().tolist() for tensor in (weight, a, a_right, b, b_right))

    def product(left: Matrix, right: Matrix, o: int, i: int) -> float:
        return sum(left[o][r] * right[r][i] for r in range(2))

    expected = [
        [w[o][i] * product(paths[0], paths[1], o, i) + product(paths[2], paths[3], o, i) for i in range(3)]
        for o in range(4)
    ]
    assert_close(Scaled(a, a_right, b, b_right, "lora").delta(weight), expected, weight)


def test_glora_moves_the_bias_by_the_untouched_weight() -> None:
    mix, right, gain, shift = normal(3, 2), normal(2, 1), normal(4), normal(1)
    weight, bias = normal(4, 3, seed=1).double(), normal(4, seed=2).double()
    w, b, m, u, d, e = (tensor.double().tolist() for tensor in (weight, bias, mix, right, gain, shift))
    c = [sum(m[i][r] * u[r][0] for r in range(2)) for i in range(3)]
    expected = [b[o] * d[o] + e[0] + sum(w[o][i] * c[i] for i in range(3)) for o in range(4)]
    found = Offsets(mix, right, gain, shift, "lora", "vector").delta(bias, weight=weight)
    assert_close(found[:, None], [[value] for value in expected], bias)
    with pytest.raises(NotLocal, match="whole weight"):
        Offsets(mix, right, gain, shift, "lora", "vector").region(slice(0, 2), slice(None))


@pytest.mark.parametrize("factored", [True, False])
def test_supertuning_adds_to_flat_positions_and_the_product_of_its_factors(factored: bool) -> None:
    values, places, up, down = normal(4), torch.tensor([7, 0, 7, 11], dtype=torch.int32), normal(3, 2), normal(2, 4)
    weight = normal(3, 4, seed=1).double()
    v, u, d = (tensor.double().tolist() for tensor in (values, up, down))
    expected = [[1.5 * factored * sum(u[o][r] * d[r][i] for r in range(2)) for i in range(4)] for o in range(3)]
    for value, place in zip(v, places.tolist(), strict=True):
        expected[place // 4][place % 4] += value
    delta = Elements(values, places, up, down, 1.5) if factored else Elements(values, places)
    assert_close(delta.delta(weight), expected, weight)
    with pytest.raises(BaseMismatch, match="element 12"):
        delta.delta(weight[:, :3])


@pytest.mark.parametrize("side", ["up", "down"])
def test_bdlora_puts_the_blocks_of_one_factor_on_a_diagonal(side: str) -> None:
    weight, r = normal(4, 6, seed=1).double(), 4
    up, down = normal(4, r // 2 if side == "up" else r), normal(r, 6 if side == "up" else 3)
    u, d = up.double().tolist(), down.double().tolist()

    def element(blocks: Matrix, row: int, col: int) -> float:
        tall, wide = len(blocks) // 2, len(blocks[0])
        return blocks[row][col % wide] if row // tall == col // wide else 0.0

    expected = [
        [
            1.5
            * sum(
                (element(u, o, k) if side == "up" else u[o][k]) * (element(d, k, i) if side == "down" else d[k][i])
                for k in range(r)
            )
            for i in range(6)
        ]
        for o in range(4)
    ]
    assert_close(BlockLoRA(up, down, 1.5, side, 2).delta(weight), expected, weight)
