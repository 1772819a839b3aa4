"""Bases in which element-wise rules work: into one, and back as factors or as the matrix itself.

``dense``: the elements of the weight.  ``core``: every change as an R x R matrix between one basis of all that is
written to and one of all that is read from (Core Space, https://arxiv.org/abs/2509.17786).  ``knots``: with
``[D_1 ... D_n] = U S [V_1 ... V_n]``, the rows of each ``S V_i``, as the authors' program has them (KnOTS,
https://arxiv.org/abs/2410.19735).  Both are lossless, and R is at most the sum of all ranks.

Element-wise rules give another result in another basis, so these are fixed, under the name ``core-svd-v1``: the left
singular vectors of ``[D_1 | ... | D_n]``, and for the core the right ones of the D_i on top of each other, at weight
1, canonical as ``spectral`` has it.  They follow from the changes and not from how those were split into factors,
which the singular vectors of the stacked factors themselves would not: ``(2 B)(A / 2)`` has others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub.composition.algebra.spectral import span
from lorahub.composition.algebra.truncate import one_thread
from lorahub.deltas.delta import LowRank
from lorahub.errors import UsageError
from lorahub.lazy import torch

if TYPE_CHECKING:
    from lorahub.composition.method import Basis, Change, Terms

__all__ = ["BASIS", "Coordinates", "enter"]

BASIS = "core-svd-v1"
"""What the two bases are, as recipes record it; another choice of vectors would have another name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coordinates:
    """Changes in a basis.

    Attributes:
        stack: [n, rows, columns], or [n, length] for a vector.
        back: from the one tensor in the basis to the change.
    """

    stack: torch.Tensor
    back: Callable[[torch.Tensor], Change]


def enter(basis: Basis, terms: Terms) -> Coordinates:
    """The changes of ``terms`` in a basis; a vector has only its own elements.

    Where nothing changes at all there is one direction, which is zero.

    Raises:
        UsageError: there is no such basis.
        UnsupportedKind: a change has no factors, and the basis is made of them.
        NotFinite: NaN or infinity in the factors.
    """
    if basis not in _WAYS:
        raise UsageError(f"there is no basis '{basis}'", f"choose one of {', '.join(_WAYS)}")
    with one_thread():
        return _WAYS[basis if len(terms.shape) == 2 else "dense"](terms)


def _dense(terms: Terms) -> Coordinates:
    return Coordinates(stack=terms.stack(), back=lambda found: found)


def _core(terms: Terms) -> Coordinates:
    ups, downs = _factors(terms)
    left = _some(span(ups, downs))
    right = _some(span([down.mT for down in downs], [up.mT for up in ups]))
    cores = [(left.mT @ up) @ (down @ right) for up, down in zip(ups, downs, strict=True)]

    def back(found: torch.Tensor) -> Change:
        with one_thread():
            return LowRank(left @ found.double(), right.mT.contiguous(), 1.0)

    return Coordinates(stack=torch.stack(cores), back=back)


def _knots(terms: Terms) -> Coordinates:
    ups, downs = _factors(terms)
    left = _some(span(ups, downs))
    stack = torch.stack([(left.mT @ up) @ down for up, down in zip(ups, downs, strict=True)])
    return Coordinates(stack=stack, back=lambda found: LowRank(left, found.double(), 1.0))


_WAYS: Mapping[str, Callable[[Terms], Coordinates]] = MappingProxyType(
    {"dense": _dense, "core": _core, "knots": _knots}
)


def _factors(terms: Terms) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``ups`` with their scales inside, and ``downs``, float64."""
    factors = terms.factors()
    return [each.up.double() * each.scale for each in factors], [each.down.double() for each in factors]


def _some(columns: torch.Tensor) -> torch.Tensor:
    """The columns; a zero one where there are none, so that every rule has something to look at."""
    return columns if columns.shape[1] else columns.new_zeros(columns.shape[0], 1)
