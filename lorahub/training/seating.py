"""Seats without their tensors: what a copy of a model needs to know of the tensors that its child module holds.

Kinds are named, so that it can be pickled.  Knows seats and modules; no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

from lorahub.bases.layout import Target
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import MissingDependency
from lorahub.training.rooted import shared_name
from lorahub.training.seats import Seat, Seats

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Seating", "plain", "seating_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Chair:
    """A seat, with the names of its tensors in the place of these."""

    kind: str
    target: Target
    role: str
    options: dict[str, JSON]
    trained: tuple[str, ...]
    fixed: tuple[str, ...]
    turned: bool


@final
@dataclass(frozen=True, slots=True)
class Seating:
    """All seats of an adapter, and (kind, slot) of what all seats of a kind have together."""

    chairs: tuple[_Chair, ...]
    shared: tuple[tuple[str, str], ...]

    def seats(self, own: nn.Module, kinds: Mapping[str, Kind]) -> Seats:
        """The seats with the tensors that lie in ``own``, the adapter's module in the child.

        Raises:
            MissingDependency: a kind is not registered here.
        """
        shared: dict[str, dict[str, torch.Tensor]] = {}
        for kind, slot in self.shared:
            shared.setdefault(kind, {})[slot] = _tensor(own, shared_name(kind, slot))
        return Seats(seats=tuple(_seat(chair, own, kinds) for chair in self.chairs), shared=shared)


def _seat(chair: _Chair, own: nn.Module, kinds: Mapping[str, Kind]) -> Seat:
    if chair.kind not in kinds:
        raise MissingDependency(
            f"no plugin here knows {chair.kind}, which this model is trained with", "lorahub plugins"
        )
    empty = Seat(kind=kinds[chair.kind], target=chair.target, trained={})
    holder = own
    for part in empty.path:
        holder = cast("nn.Module", holder._modules[part])  # noqa: SLF001 - paths may have names that attributes have not
    return Seat(
        kind=kinds[chair.kind],
        target=chair.target,
        role=chair.role,
        options=chair.options,
        trained={slot: _tensor(holder, empty.name(slot)) for slot in chair.trained},
        fixed={slot: _tensor(holder, empty.name(slot)) for slot in chair.fixed},
        turned=chair.turned,
    )


def _tensor(holder: nn.Module, name: str) -> torch.Tensor:
    own = holder._parameters.get(name)  # noqa: SLF001 - as above
    return cast("torch.Tensor", holder._buffers[name] if own is None else own)  # noqa: SLF001


def seating_of(seats: Seats) -> Seating:
    """What there is to say of seats without their tensors."""
    return Seating(
        tuple(
            _Chair(
                kind=seat.kind.name,
                target=seat.target,
                role=seat.role,
                options=cast("dict[str, JSON]", plain(seat.options)),
                trained=tuple(seat.trained),
                fixed=tuple(seat.fixed),
                turned=seat.turned,
            )
            for seat in seats.seats
        ),
        tuple((kind, slot) for kind, slots in seats.shared.items() for slot in slots),
    )


def plain(value: object) -> object:
    """What configs say, in containers that can be pickled."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value
