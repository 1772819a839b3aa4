"""Where a projection lies inside a fused parameter: queries, keys and values of an attention that keeps one weight.

How the rows lie is the table's to say (``fusions``), from the configuration: one projection after the other, or head by
head, or by groups of heads that share keys and values.  Without an entry, or with a configuration that lacks a setting
or a shape that contradicts it, there is no layout: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.delta import Index
from lorahub_transformers.fusions import FUSED, Fused

__all__ = ["entries_of", "fused_layouts", "parts_of"]


def entries_of(kind: object) -> tuple[Fused, ...]:
    """The entries of an architecture."""
    return tuple(fused for fused in FUSED if kind in fused.kinds)


def fused_layouts(index: BaseIndex, targets: Collection[Target]) -> Iterator[tuple[Target, Layout]]:
    """The layouts of projections that are no parameters of the base themselves, under any name it has for them."""
    entries = entries_of(index.config.get("model_type"))
    parts = {part for fused in entries for part in fused.parts}
    wanted = [target for target in targets if target.module.rpartition(".")[2] in parts]
    if not wanted:
        return
    modules = [
        (fused, each) for fused in entries for each in index.modules() if f".{each}".endswith(f".{fused.module}")
    ]
    spelled = [(other, fused, each) for fused, each in modules for other in index.spellings(each)]
    places: dict[tuple[str, str], tuple[Fused, str]] = {}
    for name, fused, module in (*spelled, *((module, fused, module) for fused, module in modules)):  # its own name wins
        around = name if fused.own else name.rpartition(".")[0]
        places |= {(around, part): (fused, module) for part in fused.parts}
    for target in wanted:
        around, _, part = target.module.rpartition(".")
        if (around, part) in places and (layout := _layout(*places[around, part], index, target, part)):
            yield target, layout


def _layout(fused: Fused, module: str, index: BaseIndex, target: Target, part: str) -> Layout | None:
    rows = dict(_rows(fused, index, module)).get(part)
    name = index.stored(f"{module}.{fused.own}{target.parameter}")
    if rows is None or name not in index.parameters or target.parameter not in ("weight", "bias"):
        return None
    turned = index.parameters[name].transposed
    return Layout(target=target, pieces=(Piece(parameter=name, of_parameter=Region(transposed=turned, rows=rows)),))


def parts_of(index: BaseIndex) -> Iterator[tuple[str, str]]:
    """(fused module, a projection inside it) for all of the base, as the paths that targets have."""
    for fused in entries_of(index.config.get("model_type")):
        for module in index.modules():
            if f".{module}".endswith(f".{fused.module}"):
                place = module if fused.own else module.rpartition(".")[0]
                yield from ((module, f"{place}.{part}") for part, _ in _rows(fused, index, module))


def _rows(fused: Fused, index: BaseIndex, module: str) -> list[tuple[str, Index]]:
    """(part, its rows); nothing where configuration and shape do not say."""
    info = index.parameters.get(index.stored(f"{module}.{fused.own}weight"))
    config = index.config.get(fused.config) if fused.config else index.config
    if info is None or len(info.shape) != 2 or not isinstance(config, Mapping):
        return []
    total = info.shape[1 if info.transposed else 0]
    found = fused.bands(config, total)
    if found is None or found[0] * sum(found[1]) != total:
        return []
    times, sizes = found
    ends = list(accumulate(sizes))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if times == 1:
        return [(part, slice(start, end)) for part, (start, end) in zip(fused.parts, spans, strict=True)]
    step = ends[-1]
    return [
        (part, tuple(each * step + row for each in range(times) for row in range(start, end)))
        for part, (start, end) in zip(fused.parts, spans, strict=True)
    ]
