"""What a checkpoint needs so that plain ``from_pretrained`` builds it with another vocabulary than its base had.

An adapter that brings whole embeddings and a whole output layer, all with the same new number of words, brings the
resized parts of the model itself; only ``vocab_size`` is left to say.  One that brings a part of them is refused, since
the other rows of the rest are nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from lorahub.bases.framework import Created, Edits
from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON

__all__ = ["resized"]

_SIZE, _TEXT = "vocab_size", "text_config"


def resized(index: BaseIndex, created: Created, backbone: Collection[str]) -> Edits | None:
    """The edits for another number of words, or None where ``created`` is something else, or is not all of it.

    Args:
        index: the base.
        created: what adapters bring.
        backbone: names of the linear weights that are no output layer.
    """
    words = _size(index.config)
    if words is None or not created:
        return None
    rows = {
        name
        for name, info in index.parameters.items()
        if info.shape[:1] == (words,) and (info.role == "embedding" or (info.role == "linear" and name not in backbone))
    }
    rows |= {bias for name in rows if (bias := f"{name.rpartition('.')[0]}.bias") in index.parameters}
    sizes = {shape[0] for shape, _ in created.values() if shape}
    same = all(
        name in index.parameters and shape[1:] == index.parameters[name].shape[1:]
        for name, (shape, _) in created.items()
    )
    if created.keys() != rows or len(sizes) != 1 or not same or words in sizes:
        return None
    return Edits(config=MappingProxyType(_with(index.config, sizes.pop())))


def _size(config: Mapping[str, JSON]) -> int | None:
    inner = config.get(_TEXT)
    said = [each.get(_SIZE) for each in (config, inner) if isinstance(each, Mapping)]
    return next((size for size in said if isinstance(size, int)), None)


def _with(config: Mapping[str, JSON], size: int) -> dict[str, JSON]:
    """The settings that say how many words there are, wherever they are said now."""
    found: dict[str, JSON] = {_SIZE: size} if _SIZE in config else {}
    inner = config.get(_TEXT)
    if isinstance(inner, Mapping) and _SIZE in inner:
        found[_TEXT] = {**inner, _SIZE: size}
    return found
