"""Copies of what was there, beside the parameter or in the memory of the CPU."""

from __future__ import annotations

from typing import ClassVar, Self, final

from lorahub.engine.crew import Workspace
from lorahub.engine.undoing.keeper import Keeper, Policy
from lorahub.engine.undoing.memory import reserve
from lorahub.lazy import torch

__all__ = ["Copies", "HostCopies"]


class Copies(Keeper):
    """A copy of one parameter on its own device.

    Attributes:
        copy: of the parameter, row-major; undefined where no rows were kept.
        full: it was there before, and holds all of what the parameter held before anything was merged.
    """

    policy: ClassVar[Policy] = "copy"
    verified: ClassVar[bool] = False  # nobody else can reach the memory

    def __init__(self, name: str, tensor: torch.Tensor, *, instead_of: Copies | None = None) -> None:
        """Reserve memory.

        Args:
            name: of the parameter.
            tensor: the parameter, with an axis 0.
            instead_of: a keeper of the same parameter that has copied all of it; its copy is shared.

        Raises:
            LorahubError: there is no room.
        """
        super().__init__(name, tensor)
        self.full = instead_of is not None
        self.copy: torch.Tensor = (
            reserve(tensor, torch.device(self.place or tensor.device)) if instead_of is None else instead_of.copy
        )

    place: ClassVar[str] = ""  # the device type that copies are on; "" for the parameter's own device

    def open(self) -> Self:
        """Nothing is to be made ready."""
        return self

    def keep(self, rows: slice, untouched: torch.Tensor | None, space: Workspace) -> torch.Tensor:
        """Copy the rows; see ``Way``."""
        if self.full:
            return self.copy[rows]
        return self.copy[rows].copy_(self.tensor[rows] if untouched is None else untouched)

    def written(self, rows: slice, before: torch.Tensor, space: Workspace) -> None:
        """See ``Way``."""
        self.mark(rows)

    def demand(self, rows: slice, space: Workspace) -> None:
        """Nothing can go wrong; see ``Way``."""

    def recover(self, rows: slice, space: Workspace) -> torch.Tensor:
        """The copy of the rows; see ``Way``."""
        return self.copy[rows]

    def whole(self, space: Workspace) -> torch.Tensor:
        """The copy, on the parameter's device."""
        return self.copy.to(self.tensor.device)

    @property
    def held(self) -> int:
        """Bytes of the copy."""
        return self.copy.numel() * self.copy.element_size()

    def drop(self) -> None:
        """Free the copy."""
        super().drop()
        self.copy = self.copy.new_empty(0)


@final
class HostCopies(Copies):
    """A copy of one parameter in memory of the CPU, pinned where the parameter is on a GPU."""

    policy: ClassVar[Policy] = "host"
    place: ClassVar[str] = "cpu"
