"""What adapters are called beside each other: short, and each its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from lorahub.adapter import Adapter, AdapterHeader
from lorahub.fetching import as_ref
from lorahub.sources import Given

__all__ = ["label_of", "names_of"]


def names_of(adapters: Sequence[Given]) -> tuple[str, ...]:
    """A short name for each adapter: the end of its path that no other one has, or its name on a hub."""
    paths = [_name(each, number) for number, each in enumerate(adapters)]
    found: list[str] = []
    for number, parts in enumerate(paths):
        others = [other for at, other in enumerate(paths) if at != number and other != parts]
        length = next(
            (size for size in range(1, len(parts)) if all(other[-size:] != parts[-size:] for other in others)),
            len(parts),
        )
        found.append("/".join(parts[-length:]))
    names: list[str] = []
    for name in found:
        numbered = (f"{name} ({number})" if number > 1 else name for number in count(1))
        names.append(next(each for each in numbered if each not in names))
    return tuple(names)


def _name(source: Given, number: int) -> tuple[str, ...]:
    """Parts of what an adapter may be called, the most telling last."""
    if isinstance(source, Adapter):
        return (source.header.label if source.header else f"adapter {number + 1}",)
    if isinstance(source, AdapterHeader):
        return (source.label,)
    ref = as_ref(source)
    if ref.name is not None:
        return (ref.name,)
    if ref.path is not None:
        path = Path(ref.path).expanduser().absolute()
        path = path.with_suffix("") if path.suffix in _SUFFIXES else path
        return tuple(each for each in path.parts if each != "/") or ("/",)
    return tuple(str(replace(ref, weight=None)).split("/"))


_SUFFIXES = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz"})
"""Ends of files' names that tell nobody which adapter it is."""


def label_of(source: Given, number: int) -> str:
    """What an adapter was asked for by; an open one by its own label, or by its number."""
    if isinstance(source, Adapter | AdapterHeader):
        return _name(source, number)[0]
    return str(as_ref(source))
