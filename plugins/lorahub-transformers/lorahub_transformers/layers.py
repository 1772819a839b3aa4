"""A model's list of like layers as its table and configuration have it: what of ``config.json`` speaks of each of them.

Text in, data out; which layers are repeated, adapters say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lorahub.bases.layers import LayerList
from lorahub.deltas.kind import JSON
from lorahub_transformers.families import Family

__all__ = ["layer_list"]

_TYPES = "layer_types"
_WINDOWED = 28
"""``max_window_layers`` of Qwen where the configuration does not say."""


def layer_list(family: Family, config: Mapping[str, JSON], names: Iterable[str]) -> LayerList | None:
    """The list, or None where the table names none.

    Args:
        family: the architecture.
        config: of the base.
        names: canonical names of the base's parameters.
    """
    if not family.layers:
        return None
    layers = LayerList(path=f"{family.prefix}{family.layers}", count=family.count)
    types = _types(config, layers.depth(names))
    return layers if types is None else replace(layers, each={_TYPES: types})


def _types(config: Mapping[str, JSON], depth: int) -> tuple[JSON, ...] | None:
    """What kind of attention each layer has, where the configuration says so; None where all have the same.

    Releases before the fifth wrote from which layer on a window slides, and the list follows from that.
    """
    said = config.get(_TYPES)
    if isinstance(said, list):
        return tuple(said)
    first = config.get("max_window_layers", _WINDOWED)
    slides = config.get("use_sliding_window") and config.get("sliding_window", True)
    if not slides or not isinstance(first, int):
        return None
    return tuple("sliding_attention" if number >= first else "full_attention" for number in range(depth))
