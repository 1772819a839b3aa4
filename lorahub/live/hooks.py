"""The hooks that an attached model has: on modules at whose output something may be added, and around its own call.

A copy of the model has its own; see ``copies``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorahub.lazy import torch
from lorahub.live.copies import Bound, demand_whole, pickled_hook
from lorahub.live.short import dropped
from lorahub.live.tensor_parallel import Parts, has_part

if TYPE_CHECKING:
    from torch import nn

    from lorahub.live.desk import Act, Desk, View
    from lorahub.live.lookup import Door

__all__ = ["Before", "Begin", "End", "Enter", "Output"]


class _Hook(Bound):
    """Bound to one attached model and no copy of it."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        demand_whole(self.desk, memo)
        return super().__deepcopy__(memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickled_hook(self.desk)


class Enter(_Hook):
    """Before a module is called while a graph is made: whoever reads its parameters now is the module."""

    def __init__(self, desk: Desk, door: Door) -> None:
        super().__init__(desk)
        self.door = door

    def __call__(self, _module: nn.Module, _args: object) -> None:
        """``Output`` ends it."""
        if torch.compiler.is_compiling():
            self.door.inside = True


class Before(_Hook):
    """Before a module is called whose inputs an adapter changes while it trains; does nothing at other times."""

    def __init__(self, desk: Desk, key: int) -> None:
        super().__init__(desk)
        self.key = key

    def __call__(
        self, _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]] | None:
        """``args`` and ``kwargs`` hold the module's one input."""
        view = self.desk.view()
        short = None if view is None else self.desk.short(view, self.key)
        if short is None:
            return None
        given = short.entering(args[0] if args else next(iter(kwargs.values())))
        if given is None:
            return None
        return ((given,), kwargs) if args else ((), dict.fromkeys(kwargs, given))


class Output(_Hook):
    """After a module was called: adds what the adapters chosen add at this spot; returns at once where none is."""

    def __init__(self, desk: Desk, door: Door) -> None:
        super().__init__(desk)
        self.key, self.door = door.key, door
        self._parts = Parts()

    def __call__(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor], y: torch.Tensor
    ) -> torch.Tensor | None:
        """``args`` and ``kwargs`` hold the module's one input."""
        if torch.compiler.is_compiling():
            self.door.inside = False
        view = self.desk.view()
        if view is None:
            return None
        if view.trains:
            return self._trained(view, module, args[0] if args else next(iter(kwargs.values())), y)
        act = self.desk.act(view, self.key, y)
        return None if act is None else self._added(view, act, args[0] if args else next(iter(kwargs.values())), y)

    def _trained(self, view: View, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The same where an adapter trains: around weights rather than through them, and with dropout."""
        short = self.desk.short(view, self.key)
        if short is not None:
            y = short.behind(x, y)
        dropping = view.dropout is not None and module.training
        for dropout, each in self.desk.parted(view) if dropping else ((0.0, view),):
            act = self.desk.act(each, self.key, y)
            if act is not None:
                y = self._added(each, act, dropped(x, dropout), y, changes=short is None)
        return y

    def _added(self, view: View, act: Act, x: torch.Tensor, y: torch.Tensor, *, changes: bool = True) -> torch.Tensor:
        if act.anew or not (act.fits(y) or torch.compiler.is_compiling()):
            again = self.desk.refit(view, self.key, y)
            assert again is not None
            act = again
        return self._parts.add(act, x, y) if has_part(act, x, y) else act.add(x, y, changes=changes)


class Begin(_Hook):
    """Before the model is called: adapters that are exchanged during the call take effect after it."""

    def __call__(self, _module: nn.Module, _args: object) -> None:
        """See ``Desk.pin``."""
        if not torch.compiler.is_compiling():  # a graph reads everything before it runs
            self.desk.pin()


class End(_Hook):
    """After the model was called, or failed."""

    def __call__(self, _module: nn.Module, _args: object, _output: object) -> None:
        """See ``Desk.unpin``."""
        if not torch.compiler.is_compiling():
            self.desk.unpin()
