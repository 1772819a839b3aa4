"""KnOTS: element-wise merging after one SVD of all changes has aligned them (https://arxiv.org/abs/2410.19735)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.method import Basis, Method
from lorahub.composition.methods.preset import Preset
from lorahub.hookspecs import hookimpl

__all__ = ["Knots"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Knots(Preset):
    """An element-wise method in the basis ``knots``; TIES unless another is named, as in the paper."""

    name: ClassVar[str] = "knots"
    title: ClassVar[str] = "KnOTS"
    source: ClassVar[str] = "https://arxiv.org/abs/2410.19735"
    basis: ClassVar[Basis] = "knots"


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """KnOTS."""
    return [Knots]
