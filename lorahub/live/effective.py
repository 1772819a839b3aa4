"""The weight that a module would have after a merge, made beside the one that it has.

The sum is made and rounded as a merge makes it, and here may carry gradients.  Knows tensors and pieces; no modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorahub.bases.layout import Piece
from lorahub.deltas.delta import Delta
from lorahub.errors import NotLocal
from lorahub.lazy import torch

_FINE = 4  # bytes of a number, from which on float32 sums are not enough; nor are they for float16, as in a merge

__all__ = ["Addend", "change", "changed", "cut", "state_of", "writable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addend:
    """``weight`` times ``delta``: its part ``piece.of_delta``, in ``piece.of_parameter``.

    ``siblings``: untouched parameters that the delta reads, logical orientation.
    """

    weight: float
    delta: Delta
    piece: Piece
    siblings: Mapping[str, torch.Tensor]


def changed(raw: torch.Tensor, addends: Sequence[Addend], *, training: bool = False) -> torch.Tensor:
    """``raw`` with everything added, in its dtype and as it is stored; new memory.

    While it trains the sum is made in float32 at least, and not in what makes its rounding exact: it is for one step.
    """
    wide = torch.promote_types(raw.dtype, torch.float32) if training else _wide(raw.dtype)
    return _total(raw, addends, wide)[1].to(raw.dtype)


def change(raw: torch.Tensor, addends: Sequence[Addend]) -> torch.Tensor:
    """What is added, as stored, in the dtype of the sum."""
    before, total = _total(raw, addends, _wide(raw.dtype))
    return total - before


def cut(delta: Delta, piece: Piece) -> Delta:
    """The part of the change that a piece takes.

    Raises:
        NotLocal: it cannot be cut so.
    """
    region = piece.of_delta
    if region.whole:
        return delta
    if region.expert is not None or region.transposed:
        raise NotLocal(f"a {delta.kind} delta cannot be turned around, or cut to one expert of many")
    return delta.region(region.rows, region.cols)


def state_of(*tensors: torch.Tensor) -> tuple[object, ...]:
    """Something that is another after a tensor was put in another's place, moved, or written to.

    Writing through ``tensor.data`` leaves no trace, and neither does writing to tensors made in inference mode.
    """
    return tuple(
        (
            id(each),
            each.data_ptr() if each.layout == torch.strided else 0,
            0 if each.is_inference() else each._version,  # noqa: SLF001 - said nowhere else
        )
        for each in tensors
    )


def writable(y: torch.Tensor) -> torch.Tensor:
    """A module's output, or a copy of it where autograd lets nobody write into it.

    So it is of functions that others wrote, as bitsandbytes did, whose outputs can be views or leaves.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y
    forbidden = y._is_view() or (y.requires_grad and y.is_leaf)  # noqa: SLF001 - as autograd asks
    return y.clone() if forbidden else y


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < _FINE and dtype != torch.float16 else torch.float64


def _total(raw: torch.Tensor, addends: Sequence[Addend], wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    before = raw.to(wide)
    total = before.clone()
    rest = []
    for addend in addends:
        value = addend.delta.replacement() if addend.weight == 1 else None
        if value is None:
            rest.append(addend)
        else:
            addend.piece.of_parameter.put(total, addend.piece.of_delta.of(value).to(before))
    for addend in rest:
        region = addend.piece.of_parameter
        siblings = {name: value.to(before) for name, value in addend.siblings.items()}
        added = cut(addend.delta, addend.piece).delta(region.of(before).contiguous(), **siblings)
        region.put(total, region.of(total) + added * addend.weight)
    return before, total
