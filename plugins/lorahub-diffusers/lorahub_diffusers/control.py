"""Control adapters that give a model's first layer more inputs: what changes in its configuration with that.

The condition's channels are put beside the image's, so that the first layer has twice the columns; those of the base
come first, and the new ones are zero in it.  What comes out stays as wide as it was, which a configuration that does
not say so would take from the input.  Data alone.

Facts: Black Forest Labs' control adapters for FLUX.1, and diffusers 0.42.1 (``_MODULE_NAME_TO_ATTRIBUTE_MAP_FLUX``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.bases.framework import Edits
from lorahub.bases.index import BaseIndex

__all__ = ["FIRST", "First", "widening"]


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """The first layer of a class of models.

    Attributes:
        weight: its parameter.
        takes: the field of the configuration that says how many inputs it has.
        gives: the field that says how many outputs the model has, and means those of ``takes`` where it is null.
    """

    weight: str
    takes: str
    gives: str


FIRST: Mapping[str, First] = MappingProxyType(
    {"FluxTransformer2DModel": First(weight="x_embedder.weight", takes="in_channels", gives="out_channels")}
)
"""Class of diffusers -> its first layer, where the pipelines of diffusers widen it too."""


def widening(class_name: str, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
    """What changes elsewhere when a weight gets more columns; None where nobody says how.

    Args:
        class_name: of the model.
        index: the base.
        name: the parameter.
        shape: that it gets.
    """
    first = FIRST.get(class_name)
    before = index.config.get(first.takes) if first else None
    if first is None or name.rpartition(":")[2] != first.weight or before != index.parameters[name].shape[1]:
        return None
    given = index.config.get(first.gives)
    return Edits(config={first.takes: shape[1], first.gives: before if given is None else given})
