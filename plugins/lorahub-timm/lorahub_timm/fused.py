"""Where a projection lies inside a fused parameter, and a fused one among parameters that are apart.

Queries, keys and values of one attention layer stand in one weight, ``attn.qkv``; ``attn.q`` is a target all the same,
and so is ``attn.qkv`` where a model keeps the three apart.  How the rows lie is the table's to say; where the rows of
each head lie together, the number of heads is read off another parameter's shape.  Nothing is guessed: without an
entry, or with shapes that contradict it, there is no layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.delta import Index
from lorahub_timm.families import Family, Fused
from lorahub_timm.paths import ends_with

__all__ = ["fused_layout", "parts_of"]


def fused_layout(family: Family, index: BaseIndex, target: Target) -> Layout | None:
    """The layout of a target that is no parameter of the base itself, or None."""
    pieces = _inside(family, index, target) or _across(family, index, target)
    return Layout(target=target, pieces=pieces) if pieces else None


def parts_of(family: Family, index: BaseIndex) -> Iterator[tuple[str, str]]:
    """(fused module, a projection inside it) for all of the base, as the paths that targets have."""
    for module in index.modules():
        for fused in family.fused:
            if ends_with(module, [fused.module]) and _rows(fused, index, module):
                yield from ((module, _named(fused, module, part)) for part in fused.parts)
                break


def _inside(family: Family, index: BaseIndex, target: Target) -> tuple[Piece, ...]:
    """The rows of one projection in a fused parameter."""
    for fused in family.fused:
        for at, part in enumerate(fused.parts):
            end = _named(fused, fused.module, part)
            if not ends_with(target.module, [end]):
                continue
            module = target.module.removesuffix(end) + fused.module
            name = f"{module}.{target.parameter}"
            rows = _rows(fused, index, module)
            if rows and name in index.parameters and index.parameters[name].shape[0] == _total(index, module):
                return (Piece(parameter=index.stored(name), of_parameter=Region(rows=rows[at])),)
            apart = dict(fused.biases).get(part)
            beside = f"{_above(module, fused)}.{apart}"
            if rows and apart and target.parameter == "bias" and beside in index.parameters:
                return (Piece(parameter=beside),)
    return ()


def _across(family: Family, index: BaseIndex, target: Target) -> tuple[Piece, ...]:
    """The parameters that a fused one would be made of, one below the other."""
    for split in family.split:
        if not ends_with(target.module, [split.module]):
            continue
        around = target.module.rpartition(".")[0]
        names = [f"{around}.{part}.{target.parameter}" for part in split.parts]
        if all(name in index.parameters for name in names):
            ends = list(accumulate(index.parameters[name].shape[0] for name in names))
            starts = [0, *ends[:-1]]
            return tuple(
                Piece(parameter=name, of_delta=Region(rows=slice(start, end)))
                for name, start, end in zip(names, starts, ends, strict=True)
            )
    return ()


def _named(fused: Fused, module: str, part: str) -> str:
    """The path of a projection, from that of the module that has it."""
    parts = module.split(".")
    at = len(parts) - 1 - parts[::-1].index(fused.word)
    return ".".join([*parts[:at], part, *parts[at + 1 :]])


def _above(module: str, fused: Fused) -> str:
    """The attention module that a fused module belongs to."""
    parts = module.split(".")
    return ".".join(parts[: len(parts) - 1 - parts[::-1].index(fused.word)])


def _total(index: BaseIndex, module: str) -> int:
    return index.parameters[f"{module}.weight"].shape[0]


def _rows(fused: Fused, index: BaseIndex, module: str) -> tuple[Index, ...]:
    """Which rows each projection has; none where the base's shapes are not as the table says."""
    weight = index.parameters.get(f"{module}.weight")
    above = _above(module, fused)
    width = index.parameters.get(f"{above}.{fused.width}")
    if weight is None or width is None or len(weight.shape) < 2:
        return ()
    total, last, count = weight.shape[0], width.shape[1], len(fused.parts)
    heads = 1
    if fused.heads is not None:
        found = (index.parameters.get(f"{above}.{name}") for name, _ in fused.heads)
        sizes = [info.shape[axis] for info, (_, axis) in zip(found, fused.heads, strict=True) if info is not None]
        if not sizes:
            return ()
        heads = sizes[0]
    others = total - last
    if (fused.even and total != count * last) or last % heads or others <= 0 or others % (heads * (count - 1)):
        return ()
    sizes = [others // (count - 1) // heads] * (count - 1) + [last // heads]
    ends = list(accumulate(sizes))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if heads == 1:
        return tuple(slice(start, end) for start, end in spans)
    step = ends[-1]
    return tuple(tuple(head * step + row for head in range(heads) for row in range(start, end)) for start, end in spans)
