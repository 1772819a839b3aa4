"""What an adapter changes, layer by layer, as the picture of its card: from headers alone, without weights.

Shows ranks where they differ, and otherwise how many numbers were trained for each target.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from lorahub.adapter import AdapterHeader
from lorahub.bases.index import natural
from lorahub.pictures.grid import Place, arrange
from lorahub.pictures.layer_map import LayerMap, Section, svg
from lorahub.records import AdapterRecord
from lorahub.registry import Registry

__all__ = ["PICTURE", "by_order", "picture_of"]

PICTURE = "lorahub-layers.svg"
"""The file beside the card."""

_MOST_ROWS, _MOST_COLUMNS = 40, 160
"""More than this no page can show."""

_LAYER = re.compile(r"(.*?)[._]?(\d+)", re.DOTALL)
_INNER = re.compile(r"[._]\d+(?=[._]|$)")
_ORDER = tuple(
    name
    for names in (
        "q_proj k_proj v_proj qkv_proj o_proj out_proj query key value to_q to_k to_v to_out q k v o c_attn c_proj",
        "gate_proj up_proj gate_up_proj down_proj fc1 fc2",
    )
    for name in names.split()
)
"""Targets as models run through them."""


def picture_of(header: AdapterHeader, record: AdapterRecord, registry: Registry) -> tuple[str, str]:
    """The SVG, and what it shows in a sentence; both "" where there is nothing to see, or more than fits.

    Args:
        header: the adapter.
        record: for what it is called.
        registry: its kinds.
    """
    groups = header.reading.groups
    ranks: dict[str, list[float]] = {}
    counts: dict[str, list[float]] = {}
    for group in groups:
        name = ".".join(filter(None, [group.component, group.module]))
        found = (touch.rank for touch in registry.kinds[group.kind].touches(group) if touch.rank is not None)
        ranks.setdefault(name, []).append(float(next(found, 0)))
        counts.setdefault(name, []).append(float(sum(math.prod(ref.shape) for ref in group.slots.values())))
    if not groups:
        return "", ""
    differ = len({value for values in ranks.values() for value in values}) > 1
    values, measure = (ranks, "rank") if differ else (counts, "trained parameters per target")
    drawn = _map(values)
    if drawn is None:
        return "", ""
    rows, sections, numbers = drawn
    title = record.title or record.name or header.label
    kinds = ", ".join(registry.kinds[kind].title for kind in header.kinds if kind in registry.kinds)
    rank = f", rank {header.ranks[0]}" if len(header.ranks) == 1 else ""
    modules = f"{len(groups):,} target{'s' * (len(groups) != 1)}"
    picture = LayerMap(
        title=title[:100],
        subtitle=f"{kinds}{rank}; {modules}",
        rows=rows,
        sections=sections,
        values=numbers,
        measure=measure,
    )
    return svg(
        picture
    ), f"Which layers {title[:100]} changes: {measure}, {len(rows)} target{'s' * (len(rows) != 1)} by layer"


_Drawn = tuple[list[str], list[Section], dict[tuple[str, int, int], float]]


def _map(values: Mapping[str, Sequence[float]]) -> _Drawn | None:
    """Rows, sections and numbers; of many experts, those of a layer are one row."""
    for fold in (False, True):
        folded: dict[str, list[float]] = {}
        for name, found in values.items():
            folded.setdefault(_fold(name) if fold else name, []).extend(found)
        rows, sections, numbers = _arranged({name: fmean(found) for name, found in folded.items()})
        if len(rows) <= _MOST_ROWS and sum(len(each.columns) for each in sections) <= _MOST_COLUMNS:
            return rows, sections, numbers
    return None


def _fold(name: str) -> str:
    """The name without every number but the first."""
    first = _INNER.search(name)
    return name[: first.end()] + _INNER.sub("", name[first.end() :]) if first else name


def _arranged(values: Mapping[str, float]) -> _Drawn:
    places = arrange(sorted(values, key=natural))
    rows = sorted({place.column for place in places.values()}, key=by_order)
    layers: dict[str, set[int]] = {}
    for place in places.values():
        name, layer = _split(place)
        layers.setdefault(name, set())
        if layer is not None:
            layers[name].add(layer)
    names = sorted(layers, key=lambda name: (not layers[name], natural(name)))
    sections = [Section(name=name, layers=tuple(sorted(layers[name]))) for name in names]
    numbers = {}
    for name, place in places.items():
        section, layer = _split(place)
        numbers[place.column, names.index(section), layer or 0] = values[name]
    return rows, sections, numbers


def _split(place: Place) -> tuple[str, int | None]:
    """A row of the grid as a section and a layer's number in it."""
    found = _LAYER.fullmatch(place.row)
    if found:
        return found[1] or "layer", int(found[2][-9:])
    return "other" if place.row.startswith("(") else place.row, None


def by_order(target: str) -> tuple[int, tuple[tuple[int, int | str], ...]]:
    """Sort key that puts targets as models run through them: query, key, value, out, then the rest by name."""
    words = [part for part in target.split(".") if not part.isdecimal()]
    word = words[-1] if words else ""
    return (_ORDER.index(word) if word in _ORDER else len(_ORDER)), natural(target)
