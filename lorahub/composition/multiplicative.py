"""Sums and products of changes that multiply the weight: gains (IA3), turns (OFT), mirrors (HRA).

Such changes look at the weight, so they have no factors and no elements; but some combinations of them are again one of
their kind, exactly and without a base:

    gains on one axis   sum       1 + sum of w_i (l_i - 1), which is the weighted sum of what they change
                        product   l_1^w_1 l_2^w_2 ...
    turns of inputs     product   in the order of the adapters, at weight 1, for exact Cayley turns in equal blocks
    turns of outputs    product   the same; factors for each output only with the last
    mirrors             product   one row of mirrors after the other, at weight 1

Everything else is refused by name.  Float64, rounded once.  Knows no files and no base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar

from lorahub.composition.algebra.truncate import one_thread
from lorahub.deltas.delta import Delta
from lorahub.deltas.diag_oft import OutputTurn
from lorahub.deltas.hra import Mirrors
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.lycoris_ia3 import Growth
from lorahub.deltas.oft import Turn
from lorahub.deltas.rotation import block_size, cayley
from lorahub.errors import BaseMismatch, NotFinite, UnsupportedKind
from lorahub.lazy import torch

__all__ = ["Sort", "combined", "multiplies"]

Sort: TypeAlias = Literal["sum", "product"]
"""What becomes of several changes: their weighted sum, or one after the other."""

CLOSED = 1e-9
"""How far a turn may be from the Cayley form that was found for it; only half turns, which have none, are further."""

_Any = TypeVar("_Any", bound=Delta)
_DENSE = "add what they change in a base: --base BASE --non-additive dense --rank R"


def multiplies(delta: Delta) -> bool:
    """Whether ``combined`` knows changes like this one."""
    return any(type(delta) is kind for kind, _ in _WAYS)


def combined(
    deltas: Sequence[Delta | None], weights: Sequence[float], sort: Sort, *, dtype: torch.dtype
) -> Delta | None:
    """What several adapters that multiply do to one target, as one change of their kind.

    Args:
        deltas: one for each adapter, in order; None where it leaves the target alone.
        weights: one for each; an adapter at weight 0 is left out.
        sort: add them, or apply them one after the other.
        dtype: of the result's tensors; a single adapter at weight 1 keeps its own.

    Returns:
        The change; None where nothing is left.

    Raises:
        BaseMismatch: they are for weights of different sizes.
        UnsupportedKind: their combination is none of their kind; the message says what would work.
        NotFinite: the result does not fit into ``dtype``.
    """
    there = [(each, weight) for each, weight in zip(deltas, weights, strict=True) if each is not None and weight]
    if not there:
        return None
    if len(there) == 1 and there[0][1] == 1:
        return there[0][0]
    kinds = {type(each): each.kind for each, _ in there}
    if len(kinds) > 1:
        raise UnsupportedKind(
            f"changes of the kinds {' and '.join(kinds.values())} do not combine to one of either kind", _DENSE
        )
    ((kind, name),) = kinds.items()
    if (kind, sort) not in _WAYS:
        multiply = (kind, "product") in _WAYS and not any(_near(each) for each, _ in there)
        raise UnsupportedKind(
            f"the {sort} of changes of kind {name} is no change of that kind",
            f'take method "product", which is, or {_DENSE}' if multiply else _DENSE,
        )
    with one_thread():
        result = _WAYS[kind, sort](there)
    tensors = {field: tensor.to(dtype).contiguous() for field, tensor in result.tensors().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise NotFinite(f"the {sort} of the {name} changes does not fit into {dtype}, or one holds NaN or infinity")
    return replace(result, **tensors)  # type: ignore[type-var]  # every delta is a dataclass


def _gain_sum(pairs: Sequence[tuple[Gain, float]]) -> Gain:
    return replace(_alike_gains(pairs), gain=1 + _added([(each.gain.double() - 1, weight) for each, weight in pairs]))


def _gain_product(pairs: Sequence[tuple[Gain, float]]) -> Gain:
    first = _alike_gains(pairs)
    return replace(first, gain=1 + _multiplied([(each.gain.double() - 1, weight) for each, weight in pairs]))


def _growth_sum(pairs: Sequence[tuple[Growth, float]]) -> Growth:
    return replace(_alike_growths(pairs), growth=_added([(each.growth.double(), weight) for each, weight in pairs]))


def _growth_product(pairs: Sequence[tuple[Growth, float]]) -> Growth:
    first = _alike_growths(pairs)
    return replace(first, growth=_multiplied([(each.growth.double(), weight) for each, weight in pairs]))


def _added(growths: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    total = torch.zeros_like(growths[0][0])
    for growth, weight in growths:
        total += weight * growth
    return total


def _multiplied(growths: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """``(1 + g_1)^w_1 (1 + g_2)^w_2 ... - 1``, with no digits lost where all are near zero.

    Raises:
        UnsupportedKind: a power of a number that is not positive does not exist.
    """
    total = torch.zeros_like(growths[0][0])
    for growth, weight in growths:
        positive = growth > -1
        if not bool(positive.all()) and (weight != int(weight) or (weight < 0 and bool((growth == -1).any()))):
            raise UnsupportedKind(
                f"a gain that is not positive has no power of {weight:g}",
                "give whole weights, above 0 where a gain is 0; or take linear, the weighted sum",
            )
        own = torch.expm1(weight * torch.log1p(torch.where(positive, growth, 0.0)))
        own = torch.where(positive, own, (1 + torch.where(positive, 0.0, growth)) ** weight - 1)
        total = total + own + total * own
    return total


def _alike_gains(pairs: Sequence[tuple[Gain, float]]) -> Gain:
    """The first, where all are along one axis of one weight."""
    first = pairs[0][0]
    _expect_one([each.axis for each, _ in pairs], "gains on outputs and gains on inputs make no single gain")
    _expect_fitting([tuple(each.gain.shape) for each, _ in pairs])
    return first


def _alike_growths(pairs: Sequence[tuple[Growth, float]]) -> Growth:
    """The same for LyCORIS."""
    first = pairs[0][0]
    _expect_one([each.axis for each, _ in pairs], "gains on outputs and gains on inputs make no single gain")
    _expect_fitting([tuple(each.growth.shape) for each, _ in pairs])
    return first


def _turn_product(pairs: Sequence[tuple[Turn, float]]) -> Turn:
    """``W R_1^T R_2^T ...``, or ``W R_1 R_2 ...`` for those the other way round."""
    turns = _once(pairs)
    if any(_near(turn) for turn in turns):
        raise UnsupportedKind(
            "an oft change by a series in Q only comes near a turn, and the product of two is no such series",
            f"train with use_cayley_neumann=false, or {_DENSE}",
        )
    _expect_one([(turn.turned, turn.mirrored) for turn in turns], "turns one way and the other make no single turn")
    _expect_one([turn.scaled for turn in turns], "angles that are scaled and angles that are not do not combine")
    sizes = [block_size(turn.angles.shape[1]) or 0 for turn in turns]
    _expect_one(sizes, f"turns in blocks of {' and '.join(map(str, sorted(set(sizes))))} make no turn in equal blocks")
    if turns[0].mirrored:
        raise UnsupportedKind("turns that go one way for matrices and the other for kernels do not combine", _DENSE)
    counts = [turn.angles.shape[0] for turn in turns if not turn.shared]
    _expect_fitting([(count * sizes[0],) for count in counts])
    blocks, b = max(counts, default=1), sizes[0]
    total = torch.zeros(blocks, b, b, dtype=torch.float64)
    # each block of this weight is the identity, so that its change is that block of the turn
    probe = torch.eye(b, dtype=torch.float64).repeat(1, blocks)
    for turn in turns:
        own = turn.delta(probe).reshape(b, blocks, b).transpose(0, 1)
        total = total + own + total @ own
    q = _cayley_form(total if turns[0].turned else total.transpose(1, 2))
    rows, columns = torch.triu_indices(b, b, 1)
    angles = q[:, rows, columns] * (2 * max(1, b - 1) ** 0.5 if turns[0].scaled else 1)
    return replace(turns[0], angles=angles, shared=not counts, limit=None)


def _near(delta: Delta) -> bool:
    """Whether a change is a turn but for the rest of a series."""
    return isinstance(delta, Turn) and delta.series is not None


def _output_product(pairs: Sequence[tuple[OutputTurn, float]]) -> OutputTurn:
    """``R_2 R_1 W``, and then the last one's factors."""
    turns = _once(pairs)
    sizes = [tuple(turn.blocks.shape[-2:]) for turn in turns]
    _expect_one(sizes, "turns in blocks of different sizes make no turn in equal blocks")
    _expect_fitting([(turn.outputs(),) for turn in turns])
    if any(turn.rescale is not None for turn in turns[:-1]):
        raise UnsupportedKind(
            "factors for each output come before the next turn, and a diag-oft change has them after it", _DENSE
        )
    blocks, b, _ = turns[0].blocks.shape
    total = torch.zeros(blocks, b, b, dtype=torch.float64)
    probe = torch.eye(b, dtype=torch.float64).repeat(blocks, 1)
    for turn in turns:
        own = replace(turn, rescale=None).delta(probe).reshape(blocks, b, b)
        total = total + own + own @ total
    return replace(turns[-1], blocks=_cayley_form(total) / 2, constraint=None)


def _mirror_product(pairs: Sequence[tuple[Mirrors, float]]) -> Mirrors:
    """All mirrors in a row; those that are made orthogonal first are so already."""
    mirrors = _once(pairs)
    _expect_fitting([(each.normals.shape[0],) for each in mirrors])
    rows = [torch.linalg.qr(each.normals.double()).Q if each.orthogonal else each.normals.double() for each in mirrors]
    return Mirrors(torch.cat(rows, dim=1))


def _cayley_form(change: torch.Tensor) -> torch.Tensor:
    """Skew-symmetric Q with ``cayley(Q) == change``, [n, b, b].

    Raises:
        UnsupportedKind: there is none, because a block is or holds a half turn.
    """
    eye = torch.eye(change.shape[-1], dtype=change.dtype)
    q, failed = torch.linalg.solve_ex(2 * eye + change, -change)
    skewed: torch.Tensor = (q - q.transpose(1, 2)) / 2
    if bool(failed.any()) or not float((cayley(skewed) - change).abs().max()) <= CLOSED:
        raise UnsupportedKind("the turns together hold a half turn, which these angles cannot say", _DENSE)
    return skewed


def _once(pairs: Sequence[tuple[_Any, float]]) -> list[_Any]:
    """The changes, all at weight 1.

    Raises:
        UnsupportedKind: one is at another weight.
    """
    other = next((weight for _, weight in pairs if weight != 1), None)
    if other is not None:
        raise UnsupportedKind(
            f"a change of kind {pairs[0][0].kind} is done or not done, and has no product at weight {other:g}",
            f"give weight 1, or {_DENSE}",
        )
    return [each for each, _ in pairs]


def _expect_one(values: Sequence[object], otherwise: str) -> None:
    if len(set(values)) > 1:
        raise UnsupportedKind(otherwise, _DENSE)


def _expect_fitting(shapes: Sequence[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        told = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise BaseMismatch(
            f"the adapters change weights of different sizes, {told}: they are for different bases",
            "compose adapters of one base: lorahub inspect ADAPTER says which it names",
        )


_WAYS: Mapping[tuple[type[Delta], Sort], Callable[..., Delta]] = MappingProxyType(
    {
        (Gain, "sum"): _gain_sum,
        (Gain, "product"): _gain_product,
        (Growth, "sum"): _growth_sum,
        (Growth, "product"): _growth_product,
        (Turn, "product"): _turn_product,
        (OutputTurn, "product"): _output_product,
        (Mirrors, "product"): _mirror_product,
    }
)
"""(kind of change, what is asked) -> how, from pairs of changes and weights."""
