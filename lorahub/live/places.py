"""Where parameters lie in a live model: which modules hold a tensor, and under which name of theirs.

Reads the tensors that the model was given, whatever stands in their place for the moment.  Knows no adapters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorahub.errors import BaseMismatch
from lorahub.lazy import torch
from lorahub.storages.storage import Held, held_in

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Numbers", "Place", "Places"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One name of one module: ``module.leaf``, in its parameters or its buffers; ``name`` is its dotted path."""

    name: str
    module: nn.Module
    store: Literal["_parameters", "_buffers"]
    leaf: str

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The module's own dictionary, in which the tensor is."""
        found: dict[str, torch.Tensor] = self.module.__dict__[self.store]
        return found

    def raw(self) -> torch.Tensor:
        """The tensor that the module was given."""
        held: object = self.held
        return dict.__getitem__(self.held, self.leaf) if isinstance(held, dict) else self.held[self.leaf]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers(Place):
    """A quantised weight that is only looked at: ``raw`` gives the numbers that it stands for."""

    stored: Held

    def raw(self) -> torch.Tensor:
        """The numbers, each time anew."""
        return self.stored.read().values()


class Places:
    """Every place of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._by_tensor: dict[int, list[Place]] = {}
        self._all = [
            Place(f"{path}.{leaf}" if path else leaf, module, store, leaf)
            for path, module in model.named_modules(remove_duplicate=False)
            for store in ("_parameters", "_buffers")
            for leaf, tensor in module.__dict__[store].items()
            if tensor is not None
        ]

    def quantised(self, held: Held, names: Collection[str], *, everywhere: bool) -> list[Place]:
        """The places of a quantised weight, each module once; else as ``of``."""
        found = {
            id(one.module): Numbers(name, one.module, "_parameters", name.rpartition(".")[2], one)
            for name, one in held_in(self._model).items()
            if one.identity == held.identity and (everywhere or name in names)
        }
        return list(found.values())

    def of(self, tensor: torch.Tensor, names: Collection[str], *, everywhere: bool) -> list[Place]:
        """The places that hold ``tensor``, each module once.

        Args:
            tensor: a parameter or buffer of the model, the very object.
            names: what the parameter is called, one of them at least.
            everywhere: all places that hold it; else those that ``names`` name.

        Raises:
            BaseMismatch: no place holds it, or one module would have to stand for several names and not for all.
        """
        holding = self._holding(tensor)
        chosen = holding if everywhere else [place for place in holding if _names(place, names)]
        if not chosen:
            raise BaseMismatch(f"{min(names)} is nowhere in the {type(self._model).__name__}", "check it against it")
        once = {(id(place.module), place.leaf): place for place in chosen}
        beside = [place for place in holding if place not in chosen and (id(place.module), place.leaf) in once]
        if beside:
            raise BaseMismatch(
                f"{chosen[0].name} and {beside[0].name} are one module, and the adapter changes only one of them",
                "use a base that has them apart",
            )
        return list(once.values())

    def _holding(self, tensor: torch.Tensor) -> list[Place]:
        """The places of a tensor, as they were when a tensor was last asked for that is not where it was then."""
        found = self._by_tensor.get(id(tensor), [])
        if not found or any(place.raw() is not tensor for place in found):
            self.look_again()
            found = self._by_tensor.get(id(tensor), [])
        return found

    def look_again(self) -> None:
        """Take notice of parameters that were put elsewhere since."""
        self._by_tensor.clear()
        for place in self._all:
            self._by_tensor.setdefault(id(place.raw()), []).append(place)


def _names(place: Place, names: Collection[str]) -> bool:
    """Whether a name is the place's path, or differs from it in a prefix that one of them has."""
    return any(
        place.name == name or place.name.endswith(f".{name}") or name.endswith(f".{place.name}") for name in names
    )
