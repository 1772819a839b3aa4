"""A module's parameters, with the changed weight in the place of its own for whoever reads one by its name.

``module.weight`` looks into a dictionary; here that gives what the adapters selected in this context make of it.
Everything that lists parameters (state dicts, optimizers, ``model.to``) goes on seeing the module's own, and a context
with another selection, in another thread, sees its own weight at the same time.  So it does not matter who uses a
parameter, and how: fused attention, a scaled embedding, a module that is never called.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from lorahub.lazy import torch
from lorahub.live.copies import demand_whole, pickled_lookup
from lorahub.live.standing import OF, standing

if TYPE_CHECKING:
    from lorahub.live.desk import Desk, View
    from lorahub.live.places import Place

__all__ = ["Door", "Lookup", "install", "remove", "stand_for"]


@dataclass(slots=True, eq=False)
class Door:
    """How a parameter is read.

    Attributes:
        key: its spot.
        forward: the module's own code, to whose output the hook adds what can be added there; whoever else reads the
            parameter gets all changes in it.  None where there is no such hook.
        inside: the module is being called, in a graph that is being made; where there are no frames to look at.
    """

    key: int
    forward: CodeType | None
    inside: bool = False


class Lookup(dict[str, Any]):
    """A module's parameters or buffers by name; copies and pickles of the model have plain dictionaries at first."""

    def __init__(self, own: Mapping[str, torch.Tensor | None], desk: Desk) -> None:
        super().__init__(own)
        self.lorahub_desk = desk
        self.lorahub_doors: dict[str, Door] = {}

    def __getitem__(self, name: str) -> Any:
        own = dict.__getitem__(self, name)
        door = self.lorahub_doors.get(name)
        if door is None:
            return own
        view = self.lorahub_desk.view()
        if view is None:
            return own
        if torch.compiler.is_compiling():
            inside = door.inside
        else:
            asking = sys._getframe(1)  # noqa: SLF001 - nothing else tells who reads an attribute
            if asking.f_code is not torch.nn.Module.__getattr__.__code__:
                return own  # somebody handles the dictionary itself, to move what is in it
            inside = asking.f_back is not None and asking.f_back.f_code is door.forward
            if not inside and asking.f_back is not None and _shards(asking.f_back):
                return own
        if inside or door.forward is None:
            return self.lorahub_desk.weight(view, door.key, own)
        if torch.compiler.is_compiling() or _grows(view, own):
            return self.lorahub_desk.weight(view, ~door.key, own)
        return standing(own, partial(self.lorahub_desk.weight, view, ~door.key, own))

    def __setitem__(self, name: str, value: Any) -> None:
        # who takes a parameter out for a while and puts it back, as functional_call does, must not leave a changed one
        dict.__setitem__(self, name, getattr(value, OF, value))

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return pickled_lookup(self.lorahub_desk, dict(self.items()))

    def __copy__(self) -> dict[str, Any]:
        return dict(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        demand_whole(self.lorahub_desk, memo)
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}


def _shards(caller: FrameType) -> bool:
    """Whether it is who puts sharded parameters in the place of whole ones, or those of gathered ones."""
    return str(caller.f_globals.get("__name__")).startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))


def _grows(view: View, own: torch.Tensor) -> bool:
    """Whether gradients are wanted for what is read, so that it has to be made at once.

    Nothing that stands in is seen by a function of autograd's, as losses that go over the head in parts are, and it
    would take the parameter itself.
    """
    return view.trains and torch.is_grad_enabled() and not hasattr(own, "device_mesh")


def stand_for(changed: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Mark a changed weight as standing for a parameter."""
    setattr(changed, OF, own)
    return changed


def install(place: Place, key: int, desk: Desk, *, hooked: bool) -> Door | None:
    """Look a parameter up at ``desk`` from now on, as its spot ``key``; gives the new way, or None where it was known.

    ``hooked``: at the module's output is added what can be added there.
    """
    held = place.held
    if not isinstance(held, Lookup):
        held = Lookup(held, desk)
        place.module.__dict__[place.store] = held
    if place.leaf in held.lorahub_doors:
        return None
    door = Door(key, type(place.module).forward.__code__ if hooked else None)
    held.lorahub_doors[place.leaf] = door
    return door


def remove(places: Iterable[Place]) -> None:
    """Give the modules plain dictionaries again."""
    for place in places:
        if isinstance(place.held, Lookup):
            place.module.__dict__[place.store] = dict(place.held.items())
