"""Bases for element-wise rules: nothing is lost in them, and they do not depend on how a change was factored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.composition.algebra.coordinates import Coordinates, enter
from lorahub.composition.algebra.spectral import canonical, polar, singular, span
from lorahub.composition.method import Basis, Terms
from lorahub.deltas.delta import LowRank
from lorahub.errors import NotFinite, UnsupportedKind, UsageError

BASES: tuple[Basis, ...] = ("core", "knots")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changes(out: int, inner: int, ranks: Sequence[int], *, seed: int = 0) -> list[LowRank]:
    return [
        LowRank(random(out, rank, seed=seed + 2 * n), random(rank, inner, seed=seed + 2 * n + 1), 0.5 + n)
        for n, rank in enumerate(ranks)
    ]


def terms(found: Sequence[LowRank]) -> Terms:
    count = len(found)
    shape = (found[0].up.shape[0], found[0].down.shape[1])
    return Terms(shape=shape, changes=tuple(found), weights=(1.0,) * count, seeds=tuple(range(count)))


def dense(change: LowRank) -> torch.Tensor:
    return change.scale * (change.up.double() @ change.down.double())


def product(found: object) -> torch.Tensor:
    assert isinstance(found, LowRank)
    return dense(found)


def refactored(change: LowRank, *, seed: int) -> LowRank:
    """The same change: ``(c B R) (R^-1 A / c)`` for a matrix R that is far from orthogonal."""
    rank = change.up.shape[1]
    turn = torch.linalg.qr(random(rank, rank, seed=seed)).Q @ torch.diag(torch.linspace(0.2, 5, rank).double())
    up, down = 7 * change.up.double() @ turn, torch.linalg.solve(turn, change.down.double()) / 7
    return LowRank(up * change.scale * 4, down, 0.25)


@pytest.mark.parametrize("basis", BASES)
@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 24),
    inner=st.integers(1, 24),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_what_goes_into_a_basis_comes_back(basis: Basis, out: int, inner: int, ranks: list[int], seed: int) -> None:
    found = changes(out, inner, ranks, seed=seed)
    coordinates = enter(basis, terms(found))
    for number, change in enumerate(found):
        back = product(coordinates.back(coordinates.stack[number]))
        norm = max(float(dense(each).norm()) for each in found)
        assert float((back - dense(change)).norm()) <= 1e-11 * norm
    total = sum((0.3 + n) * each for n, each in enumerate(coordinates.stack))
    assert isinstance(total, torch.Tensor)
    wanted = sum((0.3 + n) * dense(each) for n, each in enumerate(found))
    assert torch.allclose(product(coordinates.back(total)), torch.as_tensor(wanted), rtol=0, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("ranks", [(4, 4), (3, 7, 1), (12, 30)])
def test_coordinates_follow_from_the_changes_and_not_from_their_factors(basis: Basis, ranks: tuple[int, ...]) -> None:
    found = changes(20, 26, ranks)
    other = [refactored(change, seed=50 + n) for n, change in enumerate(found)]
    assert all(torch.allclose(dense(a), dense(b), atol=1e-10) for a, b in zip(found, other, strict=True))
    first, second = enter(basis, terms(found)).stack, enter(basis, terms(other)).stack
    assert first.shape == second.shape
    assert float((first - second).abs().max()) <= 1e-9 * float(first.abs().max())


@pytest.mark.parametrize("basis", BASES)
def test_the_order_of_the_adapters_only_orders_the_coordinates(basis: Basis) -> None:
    found = changes(20, 26, (3, 5, 2))
    first, second = enter(basis, terms(found)).stack, enter(basis, terms(found[::-1])).stack
    assert float((first - second.flip(0)).abs().max()) <= 1e-9 * float(first.abs().max())


def test_the_core_has_a_row_for_each_direction_that_counts() -> None:
    one, other = changes(20, 26, (3, 5))
    shared_inputs = LowRank(other.up[:, :3], one.down, 1.0)
    twice = LowRank(one.up.repeat(1, 2), one.down.repeat(2, 1), 1.0)
    assert enter("core", terms([one, other])).stack.shape == (2, 8, 8)
    assert enter("core", terms([one, shared_inputs])).stack.shape == (2, 6, 3)
    assert enter("core", terms([one, twice])).stack.shape == (2, 3, 3)
    assert enter("core", terms(changes(6, 26, (5, 5)))).stack.shape == (2, 6, 10)
    assert enter("knots", terms([one, other])).stack.shape == (2, 8, 26)


def test_the_core_basis_is_that_of_a_dense_svd() -> None:
    found = changes(20, 26, (3, 5))
    wide = torch.cat([dense(each) for each in found], dim=1)
    tall = torch.cat([dense(each) for each in found])
    left = torch.linalg.svd(wide)[0][:, :8]
    right = torch.linalg.svd(tall)[2][:8].mT
    for basis in (left, right):
        for column in range(8):
            if basis[:, column][basis[:, column].abs().argmax()] < 0:
                basis[:, column] *= -1
    expected = torch.stack([left.mT @ dense(each) @ right for each in found])
    assert torch.allclose(enter("core", terms(found)).stack, expected, atol=1e-9)


def test_knots_coordinates_are_the_right_singular_vectors_at_their_singular_values() -> None:
    found = changes(20, 26, (3, 5))
    u, s, vh = torch.linalg.svd(torch.cat([dense(each) for each in found], dim=1), full_matrices=False)
    signs = torch.stack([u[u[:, n].abs().argmax(), n].sign() for n in range(8)])
    expected = (signs * s[:8])[:, None] * vh[:8]
    assert torch.allclose(enter("knots", terms(found)).stack[0], expected[:, :26], atol=1e-9)
    assert torch.allclose(enter("knots", terms(found)).stack[1], expected[:, 26:], atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_equal_singular_values_do_not_make_the_basis_a_matter_of_rounding(basis: Basis) -> None:
    """Both changes are orthogonal on both sides: all eight singular values are one."""
    left = torch.linalg.qr(random(20, 8, seed=3)).Q
    right = torch.linalg.qr(random(26, 8, seed=4)).Q
    found = [LowRank(left[:, :4], right[:, :4].mT, 1.0), LowRank(left[:, 4:], right[:, 4:].mT, 1.0)]
    turns = [torch.linalg.qr(random(4, 4, seed=seed)).Q for seed in (5, 6)]
    other = [LowRank(each.up @ turn, turn.mT @ each.down, 1.0) for each, turn in zip(found, turns, strict=True)]
    first, second = enter(basis, terms(found)).stack, enter(basis, terms(other)).stack
    assert float((first - second).abs().max()) < 1e-8
    for number, change in enumerate(found):
        assert torch.allclose(product(enter(basis, terms(found)).back(first[number])), dense(change), atol=1e-12)


def test_canonical_vectors_depend_on_the_space_alone() -> None:
    columns = torch.linalg.qr(random(30, 6, seed=1)).Q
    values = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 0.5]).double()
    turned = columns.clone()
    turned[:, 1:4] = columns[:, 1:4] @ torch.linalg.qr(random(3, 3, seed=2)).Q
    turned[:, 0] *= -1
    one, other = canonical(columns, values), canonical(turned, values)
    assert torch.allclose(one, other, atol=1e-12)
    assert torch.allclose(one.mT @ one, torch.eye(6).double(), atol=1e-12)
    assert all(float(one[:, n][one[:, n].abs().argmax()]) > 0 for n in range(6))
    assert torch.allclose(one[:, 1:4] @ one[:, 1:4].mT, columns[:, 1:4] @ columns[:, 1:4].mT, atol=1e-12)


def test_entries_of_one_size_and_two_signs_leave_no_doubt_about_the_sign() -> None:
    column = torch.tensor([[0.5], [-0.5 - 1e-16], [0.5], [-0.5]]).double()
    assert canonical(column, torch.ones(1).double())[0, 0] == pytest.approx(0.5)
    assert canonical(-column, torch.ones(1).double())[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize("basis", BASES)
def test_changes_of_nothing_have_coordinates_of_zero(basis: Basis) -> None:
    nothing = [LowRank(torch.zeros(5, 0), torch.zeros(0, 7), 1.0), LowRank(torch.zeros(5, 2), torch.ones(2, 7), 1.0)]
    coordinates: Coordinates = enter(basis, terms(nothing))
    assert coordinates.stack.numel()
    assert not coordinates.stack.any()
    back = coordinates.back(coordinates.stack[0])
    assert product(back).shape == (5, 7)
    assert not product(back).any()


@pytest.mark.parametrize("basis", BASES)
def test_a_change_that_leaves_the_matrix_alone_takes_no_room(basis: Basis) -> None:
    one, other = changes(20, 26, (3, 5))
    with_nothing = terms([one, LowRank(torch.zeros(20, 0), torch.zeros(0, 26), 1.0), other])
    stack = enter(basis, with_nothing).stack
    assert not stack[1].any()
    assert torch.allclose(stack[::2], enter(basis, terms([one, other])).stack, atol=1e-10)


def test_a_vector_has_its_own_elements_in_every_basis() -> None:
    two = (torch.arange(4.0), torch.ones(4))
    vector = Terms(shape=(4,), changes=two, weights=(1.0, 1.0), seeds=(0, 1))
    for basis in ("dense", *BASES):
        found = enter(basis, vector)
        assert torch.equal(found.stack, torch.stack(two))
        assert found.back(found.stack[0]) is not None


def test_what_has_no_factors_or_no_such_basis_is_refused() -> None:
    one = changes(5, 7, (2,))[0]
    mixed = Terms(shape=(5, 7), changes=(one, torch.zeros(5, 7)), weights=(1.0, 1.0), seeds=(0, 1))
    assert enter("dense", mixed).stack.shape == (2, 5, 7)
    for basis in BASES:
        with pytest.raises(UnsupportedKind, match="has no factors"):
            enter(basis, mixed)
    with pytest.raises(UsageError, match="no basis 'fourier'"):
        enter("fourier", terms([one]))  # type: ignore[arg-type]  # what a recipe may say
    broken = LowRank(one.up.clone().fill_(float("nan")), one.down, 1.0)
    for basis in BASES:
        with pytest.raises(NotFinite, match="NaN or infinity"):
            enter(basis, terms([one, broken]))


def test_singular_values_that_count_are_those_of_the_dense_matrix() -> None:
    change = changes(20, 26, (6,))[0]
    twice = LowRank(change.up.repeat(1, 2), change.down.repeat(2, 1), change.scale)
    found = singular(twice.up, twice.down, twice.scale)
    u, s, vh = torch.linalg.svd(dense(twice))
    assert len(found) == 6
    assert torch.allclose(found.values, s[:6])
    assert torch.allclose(found.u @ found.u.mT, u[:, :6] @ u[:, :6].mT, atol=1e-10)
    assert torch.allclose(found.v @ found.v.mT, vh[:6].mT @ vh[:6], atol=1e-10)
    assert len(singular(change.up * 1e-9, change.down, 1.0)) == 6
    assert len(singular(change.up * 1e-9, change.down, 1.0, beside=1e6)) == 0
    assert len(singular(change.up[:, :0], change.down[:0], 1.0)) == 0


def test_the_span_is_orthonormal_and_holds_all_outputs() -> None:
    found = changes(20, 26, (3, 5))
    basis = span([each.up for each in found], [each.down for each in found])
    assert basis.shape == (20, 8)
    assert torch.allclose(basis.mT @ basis, torch.eye(8).double(), atol=1e-12)
    for each in found:
        assert torch.allclose(basis @ (basis.mT @ each.up), each.up, atol=1e-11)


def test_the_polar_factor_is_the_nearest_orthonormal_matrix_and_makes_nothing_up() -> None:
    columns = random(20, 5, seed=9)
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    root = vectors @ torch.diag(values**-0.5) @ vectors.mT
    assert torch.allclose(polar(columns), columns @ root, atol=1e-10)
    unit = torch.linalg.qr(random(20, 2, seed=10)).Q
    doubled = polar(torch.cat([unit, unit], dim=1))
    assert torch.allclose(doubled, torch.cat([unit, unit], dim=1) / 2**0.5, atol=1e-12)
    assert int(torch.linalg.matrix_rank(doubled)) == 2
