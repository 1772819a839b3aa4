"""The product of changes that multiply: gains times gains, turns after turns, in the order of the adapters.

Such changes have no factors and no sum of their own kind but for gains; ``multiplicative`` computes both.  What is
added to a weight has no product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.method import Method, ProductMethod
from lorahub.hookspecs import hookimpl

__all__ = ["Product"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Product(ProductMethod):
    """One adapter after the other: a gain to the power of its weight, a turn at weight 1."""

    name: ClassVar[str] = "product"
    title: ClassVar[str] = "product of gains or turns"
    source: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    ordered: ClassVar[bool] = True


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """The product."""
    return [Product]
