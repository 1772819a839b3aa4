"""Core Space merging: element-wise merging of the small cores of all changes (https://arxiv.org/abs/2509.17786)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.method import Basis, Method
from lorahub.composition.methods.preset import Preset
from lorahub.hookspecs import hookimpl

__all__ = ["Core"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Core(Preset):
    """An element-wise method in the basis ``core``; TIES unless another is named."""

    name: ClassVar[str] = "core"
    title: ClassVar[str] = "Core Space"
    source: ClassVar[str] = "https://arxiv.org/abs/2509.17786"
    basis: ClassVar[Basis] = "core"


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Core Space."""
    return [Core]
