"""Laws of a change by itself: its form, what it looks at, how it adds up and how it is cut."""

from __future__ import annotations

from lorahub.deltas.delta import ALL
from lorahub.deltas.full import Full
from lorahub.deltas.kind import Kind
from lorahub.errors import NotLocal, UnsupportedKind
from lorahub.lazy import torch
from lorahub.testing.cases import RANK, cases
from lorahub.testing.judging import close, hold
from lorahub.testing.loops import cuts, index_text, loop_product, loop_sum, loop_take

__all__ = [
    "additive_kinds_ignore_the_weight_and_commute",
    "fresh_changes_nothing",
    "full_merges_alike",
    "regions_are_local_or_refused",
    "shape_is_kept",
    "weights_are_linear",
]


def shape_is_kept(kind: Kind) -> None:
    """Law 1: a change has the weight's shape and dtype, is finite, is new memory, and leaves the weight alone."""
    for case in cases(kind):
        for dtype in (torch.float32, torch.float64):
            weight = case.weight.to(dtype)
            before = weight.clone()
            change = case.delta.delta(weight)
            hold(change.shape == weight.shape, f"{case.name}: the change has shape {list(change.shape)}")
            hold(change.dtype == dtype, f"{case.name}: the change of a {dtype} weight is {change.dtype}")
            hold(bool(change.isfinite().all()), f"{case.name}: the change is not finite")
            hold(torch.equal(weight, before), f"{case.name}: delta wrote into the weight")
            kept = change.clone()
            change.add_(1)
            hold(torch.equal(weight, before), f"{case.name}: the change shares memory with the weight")
            hold(torch.equal(case.delta.delta(weight), kept), f"{case.name}: the change shares memory with the delta")
        shape = case.delta.shape()
        hold(shape in (None, tuple(case.weight.shape)), f"{case.name}: shape() says {shape}")


def fresh_changes_nothing(kind: Kind) -> None:
    """Law 2: a fresh delta changes nothing, exactly; a class may refuse with ``UnsupportedKind``."""
    for case in cases(kind):
        try:
            fresh = type(case.delta).fresh(tuple(case.weight.shape), r=RANK, generator=case.generator)
        except UnsupportedKind:
            continue
        for dtype in (torch.float32, torch.float64):
            change = fresh.delta(case.weight.to(dtype))
            hold(not change.any(), f"{case.name}: a fresh delta changes {int(change.count_nonzero())} elements")


def additive_kinds_ignore_the_weight_and_commute(kind: Kind) -> None:
    """Law 3: an additive change is the same on every weight, so order does not matter; any other does look."""
    for case in cases(kind):
        weight, elsewhere = case.weight, torch.randn(case.weight.shape, generator=case.generator, dtype=torch.float64)
        change, moved = case.delta.delta(weight), case.delta.delta(elsewhere)
        if not case.delta.additive:
            hold(not torch.equal(change, moved), f"{case.name}: not declared additive, and does not look at the weight")
            continue
        hold(torch.equal(change, moved), f"{case.name}: declared additive, and looks at the weight")
        first = weight + change
        both = first + case.other.delta(first)
        second = weight + case.other.delta(weight)
        close(second + case.delta.delta(second), both, weight, f"{case.name}: two deltas do not commute")


def weights_are_linear(kind: Kind) -> None:
    """Law 4: a delta is a pure function, so ``W + a * d(W) + b * e(W)`` is linear in a and b, in either order."""
    for case in cases(kind):
        weight = case.weight
        one, other = case.delta.delta(weight), case.other.delta(weight)
        again = case.delta.delta(weight)
        hold(torch.equal(one, again), f"{case.name}: the same weight gave another change the second time")
        for a, b in ((1.0, 0.0), (0.5, 0.0), (0.5, -0.25), (-2.0, 1.0)):
            expected = loop_sum(weight, ((a, one), (b, other)))
            forward = weight + a * case.delta.delta(weight) + b * case.other.delta(weight)
            backward = weight + b * case.other.delta(weight) + a * case.delta.delta(weight)
            close(forward, expected, weight, f"{case.name}: weights {a}, {b} are not linear")
            close(backward, expected, weight, f"{case.name}: weights {a}, {b} depend on the order")


def regions_are_local_or_refused(kind: Kind) -> None:
    """Law 5: ``region(r, c).delta(W[r][:, c])`` is ``delta(W)[r][:, c]``, or the cut is refused with ``NotLocal``."""
    for case in cases(kind):
        weight, change = case.weight, case.delta.delta(case.weight)
        whole = case.delta.region(ALL, ALL).delta(weight)
        close(whole, change, weight, f"{case.name}: the region that is everything differs from the delta")
        for rows, cols in cuts(tuple(weight.shape)):
            window = loop_take(weight, rows, cols)
            try:
                part = case.delta.region(rows, cols)
            except NotLocal:
                continue
            says = f"{case.name}: region({index_text(rows)}, {index_text(cols)})"
            close(part.delta(window), loop_take(change, rows, cols), weight, f"{says} is not that part of the change")
            hold(part.shape() in (None, tuple(window.shape)), f"{says}.shape() says {part.shape()}")


def full_merges_alike(kind: Kind) -> None:
    """Law 6: ``Full(d.delta(W))`` merges as ``d`` does, and the other views of a delta agree with it.

    ``replacement`` is the merged value, ``low_rank`` and ``low_rank_for`` multiply out to the change, ``low_rank`` has
    the rank that is said, and ``directed`` gives the directions and lengths of the merged rows.
    """
    for case in cases(kind):
        weight, change = case.weight, case.delta.delta(case.weight)
        full = Full(change.clone()).delta(weight)
        hold(torch.equal(weight + full, weight + change), f"{case.name}: the full difference merges otherwise")
        if (value := case.delta.replacement()) is not None:
            close(value.to(weight), weight + change, weight, f"{case.name}: replacement() is not the merged value")
        if (factors := case.delta.low_rank()) is not None:
            rank = factors.down.shape[0]
            hold(
                case.delta.multiplied_rank() in (0, rank),
                f"{case.name}: low_rank() gives rank {rank}, and multiplied_rank() says {case.delta.multiplied_rank()}",
            )
            multiplied = loop_product(factors, weight)
            close(multiplied.reshape(change.shape), change, weight, f"{case.name}: low_rank() is not the change")
        if weight.dim() == 2 and (factors := case.delta.low_rank_for(weight.shape[1])) is not None:
            close(loop_product(factors, weight), change, weight, f"{case.name}: low_rank_for() is not the change")
        if (turned := case.delta.directed()) is not None:
            moved = weight.flatten(1) + loop_product(turned.low, weight)
            for row, length in enumerate(turned.lengths.to(weight)):
                moved[row] *= length / moved[row].norm()
            close(moved.reshape(change.shape), weight + change, weight, f"{case.name}: directed() is not what becomes")
