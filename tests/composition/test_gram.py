"""Two changes side by side: held against the dense matrices, which are never made here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorahub.bases.layout import Target
from lorahub.composition.algebra.gram import gram_matrix, principal_angles, relate, relate_dense
from lorahub.composition.analysis.comparing import compare, compare_parts
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace

OUT, IN = 70, 50


def change(rank: int, seed: int, *, scale: float = 0.5, out: int = OUT, inner: int = IN) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator), scale)


def dense(one: LowRank) -> torch.Tensor:
    return one.scale * (one.up.double() @ one.down.double())


def reference_angles(one: torch.Tensor, other: torch.Tensor, rank: int, *, rows: bool) -> list[float]:
    """By projectors: the angles' squared cosines are the eigenvalues of P Q P."""
    spaces = []
    for matrix in (one, other):
        u, _, vh = torch.linalg.svd(matrix)
        basis = vh[:rank].mT if rows else u[:, :rank]
        spaces.append(basis @ basis.mT)
    values = torch.linalg.eigvalsh(spaces[0] @ spaces[1] @ spaces[0]).flip(0)[:rank]
    return [math.acos(math.sqrt(min(1.0, max(0.0, float(value))))) for value in values]


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


@pytest.mark.parametrize(("ranks", "scales"), [((4, 7), (0.5, 2.0)), ((7, 4), (-0.5, 0.3)), ((60, 8), (1.0, 1.0))])
def test_norms_inner_product_and_difference_are_those_of_the_dense_changes(
    ranks: tuple[int, int], scales: tuple[float, float]
) -> None:
    one, other = (change(rank, seed, scale=scale) for seed, (rank, scale) in enumerate(zip(ranks, scales, strict=True)))
    found, a, b = relate(one, other), dense(one), dense(other)
    assert found.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-12)
    assert found.inner == pytest.approx(float((a * b).sum()), rel=1e-9)
    assert found.difference == pytest.approx(float((a - b).norm()), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert found.cosine == pytest.approx(float(cosine), abs=1e-12)
    assert found.relative == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-12)


def test_a_tiny_difference_is_not_lost_in_rounding() -> None:
    one = change(6, 1)
    other = LowRank(one.up.double() * (1 + 1e-9), one.down.double(), one.scale)
    assert relate(one, other).relative == pytest.approx(1e-9, rel=1e-4)
    assert relate(one, one).relative < 1e-15


def test_principal_angles_are_those_between_the_dense_spaces() -> None:
    one, other = change(4, 1), change(4, 2)
    mixed = LowRank(torch.cat([one.up[:, :2], other.up[:, 2:]], dim=1), other.down, 1.0)
    found = relate(one, mixed)
    assert found.ranks == (4, 4)
    assert found.angles_out == pytest.approx(reference_angles(dense(one), dense(mixed), 4, rows=False), abs=1e-6)
    assert found.angles_in == pytest.approx(reference_angles(dense(one), dense(mixed), 4, rows=True), abs=1e-6)
    assert found.angles_out[1] < 1e-7
    assert found.angles_out[2] > 0.1
    assert list(found.angles_in) == sorted(found.angles_in)


def test_an_angle_of_a_hair_is_told_from_none() -> None:
    basis = torch.eye(5, 2).double()
    turned = basis.clone()
    turned[:, 1] = torch.tensor([0.0, math.cos(1e-9), math.sin(1e-9), 0.0, 0.0])
    assert principal_angles(basis, turned) == pytest.approx((0.0, 1e-9), rel=1e-6, abs=1e-15)
    assert principal_angles(basis, torch.eye(5, 5).double()[:, 2:4]) == pytest.approx((math.pi / 2, math.pi / 2))


def test_directions_that_cancel_are_no_directions() -> None:
    one = change(4, 1)
    doubled = LowRank(torch.cat([one.up, one.up], dim=1), torch.cat([one.down, one.down]), one.scale)
    found = relate(doubled, one)
    assert found.ranks == (4, 4)
    assert max(found.angles_out) < 1e-7
    assert found.relative == pytest.approx(0.5)


def test_no_change_has_no_cosine() -> None:
    nothing = LowRank(torch.zeros(OUT, 2), torch.ones(2, IN), 1.0)
    assert relate(nothing, nothing).cosine is None
    assert relate(nothing, change(3, 1)).relative == pytest.approx(1.0)
    assert relate(nothing, change(3, 1)).angles_out == ()


def test_the_gram_matrix_holds_every_inner_product() -> None:
    changes = [change(rank, seed) for seed, rank in enumerate((3, 5, 8))]
    expected = torch.tensor([[float((dense(a) * dense(b)).sum()) for b in changes] for a in changes]).double()
    found = gram_matrix(changes)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.equal(found, found.mT)


def test_nothing_of_the_size_of_the_weight_is_made() -> None:
    one, other = (change(4, seed, out=900, inner=800) for seed in (1, 2))
    with Watch() as dense_watch:
        dense(one)
    with Watch() as watch:
        found = relate(one, other)
        gram_matrix([one, other])
    assert dense_watch.largest == 900 * 800
    assert watch.largest <= 900 * 16
    assert found.norms[0] > 1


def test_dense_changes_are_compared_element_by_element() -> None:
    a, b = dense(change(4, 1)), dense(change(5, 2))
    found = relate_dense(a, b)
    assert found.difference == pytest.approx(float((a - b).norm()))
    assert found.angles_out == ()


# ----------------------------------------------------------------------------------------------- whole adapters


def lora(seed: int, *, scale: float = 2.0) -> LoRA:
    made = change(4, seed)
    return LoRA(made.up, made.down, scale)


def at(**deltas: Delta) -> dict[Target, Delta]:
    return {Target("", name, "weight"): delta for name, delta in deltas.items()}


def test_states_say_what_is_equal_close_different_or_alone() -> None:
    same, folded = lora(1), LoRA(lora(2).up * 2, lora(2).down, 1.0)
    found = compare(
        at(a=same, b=lora(2), c=lora(3), d=lora(4)), at(a=lora(1), b=folded, c=lora(5), e=lora(6)), tolerance=1e-6
    )
    assert {row.target: row.state for row in found.rows} == {
        "a.weight": "equal",
        "b.weight": "close",
        "c.weight": "different",
        "d.weight": "only in A",
        "e.weight": "only in B",
    }
    assert not found.equal
    assert compare(at(a=same, b=lora(2)), at(a=lora(1), b=folded), tolerance=1e-6).equal
    assert not compare(at(a=same, b=lora(2)), at(a=lora(1), b=folded), tolerance=0.0).equal


def test_the_whole_is_all_targets_as_one_vector() -> None:
    one, other = at(a=lora(1), b=lora(2)), at(a=lora(3), c=lora(4))
    zero = torch.zeros(OUT, IN).double()

    def flat(adapter: dict[Target, Delta]) -> torch.Tensor:
        parts = [adapter.get(Target("", name, "weight")) for name in "abc"]
        return torch.cat([(part.delta(zero) if part else zero).flatten() for part in parts])

    a, b, found = flat(one), flat(other), compare(one, other, tolerance=0).whole
    assert found.norms == pytest.approx((float(a.norm()), float(b.norm())))
    assert found.inner == pytest.approx(float(a @ b))
    assert found.difference == pytest.approx(float((a - b).norm()))


def test_kinds_without_factors_are_compared_dense_or_named() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)).double()
    made = lora(1)
    dora = DoRA(made.up, made.down, made.scale, torch.full((OUT,), 1.5), 0)
    full = Full(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(8)))
    without = compare(at(a=dora, b=full), at(a=made, b=made), tolerance=0)
    assert [row.state for row in without.rows] == ["not compared", "different"]
    assert "dora looks at the weight: name the base" in without.rows[0].reason
    based = compare(at(a=dora, b=full), at(a=made, b=made), tolerance=0, weights=lambda _target: weight)
    assert [row.state for row in based.rows] == ["different", "different"]
    relation = based.rows[0].relation
    assert relation is not None
    changed = weight + 2.0 * made.up.double() @ made.down.double()
    expected = changed / changed.norm(dim=1, keepdim=True) * 1.5 - weight
    assert relation.norms[0] == pytest.approx(float(expected.norm()), rel=1e-6)


def test_equal_replacements_are_equal_without_a_base() -> None:
    value = torch.randn(OUT)
    assert compare(at(a=Replace(value)), at(a=Replace(value.clone())), tolerance=0).equal
    assert not compare(at(a=Replace(value)), at(a=Replace(value + 1)), tolerance=0).equal


def test_what_is_no_weight_change_is_compared_by_its_bytes() -> None:
    rows = compare_parts(
        {"a": ("prompt", "sha256:1"), "b": ("prompt", "sha256:1"), "c": ("prompt", None), "d": ("prompt", "sha256:1")},
        {"a": ("prompt", "sha256:1"), "b": ("prompt", "sha256:2"), "c": ("prompt", "sha256:1")},
    )
    assert [row.state for row in rows] == ["equal", "different", "not compared", "only in A"]


def test_changes_of_other_shapes_are_not_compared() -> None:
    other = LoRA(torch.ones(OUT, 2), torch.ones(2, IN + 1), 1.0)
    (row,) = compare(at(a=lora(1)), at(a=other), tolerance=0).rows
    assert row.state == "not compared"
    assert row.reason == f"A changes a weight [{OUT}, {IN}], B one [{OUT}, {IN + 1}]"
