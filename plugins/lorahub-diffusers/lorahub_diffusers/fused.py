"""Where a projection lies inside a fused parameter, and a fused one among parameters that are apart.

``attn.to_q`` is a target where the model has ``attn.to_qkv_mlp_proj``, and ``attn.to_qkv`` where it has all three
apart.  How the rows lie is the table's to say (``fusions``).  Without an entry, or with shapes or a configuration that
contradict it, there is no layout: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub_diffusers.fusions import FUSED, HEADS, SPLIT, Fused

__all__ = ["fused_layout", "parts_of"]


def fused_layout(kind: str, index: BaseIndex, target: Target) -> Layout | None:
    """The layout of a target that is no parameter of the base itself, or None.

    Args:
        kind: class of the model.
        index: of the one model.
        target: in it; the component that a file names for it is the model itself, where its module is there.
    """
    pieces = _inside(kind, index, target) or _across(index, target)
    return Layout(target=target, pieces=pieces) if pieces else None


def parts_of(kind: str, index: BaseIndex) -> Iterator[tuple[Fused, str, str]]:
    """(entry, fused module, a projection inside it) for all of the base, as the paths that targets have."""
    modules = index.modules()
    for fused in _entries(kind, index):
        for module in modules:
            above = _above(module, fused.module)
            if above is not None and _rows(fused, index, above):
                yield from ((fused, module, f"{above}{part}") for part in fused.parts)


def _entries(kind: str, index: BaseIndex) -> Iterator[Fused]:
    for fused in FUSED:
        if fused.kinds and kind not in fused.kinds:
            continue
        if fused.when is None or index.config.get(fused.when[0]) == fused.when[1]:
            yield fused


def _inside(kind: str, index: BaseIndex, target: Target) -> tuple[Piece, ...]:
    """The rows of one projection in a fused parameter."""
    for fused in _entries(kind, index):
        for at, part in enumerate(fused.parts):
            above = _above(target.module, part)
            if above is None:
                continue
            name = f"{above}{fused.module}.{target.parameter}"
            rows = _rows(fused, index, above)
            if rows and name in index.parameters and target.parameter in ("weight", "bias"):
                return (Piece(parameter=index.stored(name), of_parameter=Region(rows=rows[at])),)
    return ()


def _across(index: BaseIndex, target: Target) -> tuple[Piece, ...]:
    """The parameters that a fused one is made of, one below the other."""
    for split in SPLIT:
        above = _above(target.module, split.module)
        if above is None:
            continue
        names = [f"{above}{part}.{target.parameter}" for part in split.parts]
        shapes = [index.parameters[name].shape for name in names if name in index.parameters]
        if len(shapes) < len(names) or len({shape[1:] for shape in shapes}) > 1:
            continue
        ends = list(accumulate(shape[0] for shape in shapes))
        return tuple(
            Piece(parameter=index.stored(name), of_delta=Region(rows=slice(start, end)))
            for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True)
        )
    return ()


def _above(module: str, end: str) -> str | None:
    """What stands before the end of a path, with its dot; None where the path ends otherwise."""
    return module.removesuffix(end) if f".{module}".endswith(f".{end}") else None


def _rows(fused: Fused, index: BaseIndex, above: str) -> tuple[slice, ...]:
    """Which rows each projection has; none where the base's shapes or configuration are not as the table says."""
    weight = index.parameters.get(f"{above}{fused.module}.weight")
    if weight is None or len(weight.shape) != 2:
        return ()
    sizes: list[int] = []
    if fused.heads:
        said = [index.config.get(name) for name in HEADS]
        found = [number for number in said if isinstance(number, int)]
        if len(found) < len(HEADS):
            return ()
        sizes = [prod(found)] * fused.heads
    left, total = weight.shape[0] - sum(sizes), sum(fused.shares)
    if left <= 0 or left % total:
        return ()
    sizes += [left * share // total for share in fused.shares]
    if fused.inner:
        into = index.parameters.get(f"{above}{fused.inner}.weight")
        if into is None or len(into.shape) != 2 or into.shape[1] != sizes[-1]:
            return ()
    ends = list(accumulate(sizes))
    return tuple(slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True))
