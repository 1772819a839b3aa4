"""What happens where in a model, as one low picture: targets down, layers across, one colour a cell.

Made to stand in a page of text: no wider than one, with layers counted below instead of named.  One SVG file without
scripts, fonts or links, legible on light and dark pages; the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from xml.sax.saxutils import escape, quoteattr

from lorahub.pictures.colours import STOPS, at, hexadecimal
from lorahub.pictures.scale import Scale, label, number, shortened

__all__ = ["LayerMap", "Section", "svg"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Layers that are counted together.

    Attributes:
        name: what they are, as "layers" or "down_blocks.1"; "" where nothing needs saying.
        layers: their numbers, in order; empty for what is no repeated layer, which is one column.
    """

    name: str
    layers: tuple[int, ...] = ()

    @property
    def columns(self) -> tuple[int, ...]:
        """Its layers, or the one column it has."""
        return self.layers or (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """What to draw.

    Attributes:
        title: at the top.
        subtitle: below it, smaller.
        rows: targets, each its own.
        sections: layers, from left to right.
        values: (row, number of the section, layer) -> number; absent ones are drawn as empty cells.
        measure: what the numbers are.
    """

    title: str
    subtitle: str = ""
    rows: Sequence[str]
    sections: Sequence[Section]
    values: Mapping[tuple[str, int, int], float] = field(default_factory=lambda: MappingProxyType({}))
    measure: str


_WIDTH = 860.0
"""Pixels of a page's column, which the picture takes up as far as its cells may grow."""

_MARGIN, _GAP = 20.0, 8.0
_TEXT, _SMALL = 12.0, 11.0
_WIDE = 0.57
"""Width of a character in text sizes, on the average of sans-serif faces."""

_LONGEST = 28
"""Characters of a row's label."""

_CELL, _LINE = (4.0, 30.0), (14.0, 22.0)
"""The least and the greatest width of a cell, and height of a row."""

_ALIKE = 0.45
"""Where in the scale the colour lies that all cells have where all numbers are one."""

_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI','Helvetica Neue','DejaVu Sans',Arial,sans-serif}"
    ".page{fill:#ffffff;stroke:#d1d9e0}.ink{fill:#1f2328}.dim{fill:#59636e}.none{fill:#eff2f5}.rule{stroke:#d1d9e0}"
    "@media (prefers-color-scheme:dark){.page{fill:#0d1117;stroke:#3d444d}.ink{fill:#e6edf3}.dim{fill:#9198a1}"
    ".none{fill:#1b2129}.rule{stroke:#3d444d}}"
)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Measures of a drawing, in pixels."""

    left: float
    top: float
    cell: float
    line: float
    starts: tuple[float, ...]
    right: float
    bottom: float


def svg(picture: LayerMap) -> str:
    """The picture as the text of an SVG file."""
    rows = [shortened(label(row), _LONGEST) for row in picture.rows]
    frame = _frame(picture, rows)
    scale = Scale.of(picture.values.values())
    alike = len(set(picture.values.values())) < 2
    head = [picture.title, picture.subtitle]
    width = max(frame.right + _MARGIN, 2 * _MARGIN + max(_width(label(head[0]), 16), _width(label(head[1]), _TEXT)))
    width = max(width, frame.left + 300)
    height = frame.bottom + (78 if not alike else 70)
    body = [
        _text(_MARGIN, _MARGIN + 14, picture.title, size=16, weight=600),
        *([_text(_MARGIN, _MARGIN + 34, picture.subtitle, kind="dim")] if picture.subtitle else []),
        *_labels(rows, frame),
        *_cells(picture, frame, scale, alike=alike),
        *_axis(picture, frame),
        *_legend(picture, frame, scale, alike=alike),
    ]
    size = f'width="{_n(width)}" height="{_n(height)}"'
    inner = f'x="0.5" y="0.5" width="{_n(width - 1)}" height="{_n(height - 1)}" rx="8"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_n(width)} {_n(height)}"',
            f'role="img" aria-label={quoteattr(label(picture.title))}>',
            f"<title>{escape(label(picture.title))}</title>",
            f"<style>{_STYLE}</style>",
            '<defs><linearGradient id="scale">',
            *(
                f'<stop offset="{_n(100 * step / (len(STOPS) - 1))}%" stop-color="{hexadecimal(colour)}"/>'
                for step, colour in enumerate(STOPS)
            ),
            "</linearGradient></defs>",
            f'<rect class="page" {inner}/>',
            *body,
            "</svg>\n",
        ]
    )


def _frame(picture: LayerMap, rows: Sequence[str]) -> _Frame:
    columns = sum(len(section.columns) for section in picture.sections)
    gaps = _GAP * max(len(picture.sections) - 1, 0)
    left = _MARGIN + max(map(_width, rows), default=0.0) + 10
    cell = min(max((_WIDTH - left - _MARGIN - gaps) / max(columns, 1), _CELL[0]), _CELL[1])
    line = min(max(360 / max(len(rows), 1), _LINE[0]), _LINE[1])
    starts, x = [], left
    for section in picture.sections:
        starts.append(x)
        x += cell * len(section.columns) + _GAP
    top = _MARGIN + 30 + (18 if picture.subtitle else 0)
    return _Frame(left, top, cell, line, tuple(starts), x - _GAP, top + line * len(rows))


def _labels(rows: Sequence[str], frame: _Frame) -> list[str]:
    size = min(_TEXT, frame.line - 2)
    return [
        _text(frame.left - 8, frame.top + frame.line * (at_row + 0.5) + 0.35 * size, row, size=size, anchor="end")
        for at_row, row in enumerate(rows)
    ]


def _cells(picture: LayerMap, frame: _Frame, scale: Scale, *, alike: bool) -> list[str]:
    gap = 2.0 if frame.cell >= 10 else 1.0 if frame.cell >= 6 else 0.5
    round_ = f' rx="{_n(min(3.0, frame.cell / 5))}"'
    lines = []
    for at_row, row in enumerate(picture.rows):
        for at_section, section in enumerate(picture.sections):
            for at_column, layer in enumerate(section.columns):
                x, y = frame.starts[at_section] + frame.cell * at_column, frame.top + frame.line * at_row
                place = (
                    f'x="{_n(x + gap / 2)}" y="{_n(y + 1)}" width="{_n(frame.cell - gap)}" '
                    f'height="{_n(frame.line - 2)}"{round_}'
                )
                value = picture.values.get((row, at_section, layer))
                if value is None or not math.isfinite(value):
                    lines.append(f'<rect class="none" {place}/>')
                    continue
                colour = hexadecimal(at(_ALIKE if alike else scale.share(value)))
                where = " ".join(filter(None, [section.name, str(layer) if section.layers else ""]))
                said = escape(f"{label(row)}, {label(where)}: {value:g}" if where else f"{label(row)}: {value:g}")
                lines.append(f'<rect fill="{colour}" {place}><title>{said}</title></rect>')
    return lines


def _axis(picture: LayerMap, frame: _Frame) -> list[str]:
    """Layers counted below their cells, and what each section is."""
    lines = []
    for section, start in zip(picture.sections, frame.starts, strict=True):
        wide = frame.cell * len(section.columns)
        y = frame.bottom + 15
        if section.layers:
            every = _step(len(section.layers), wide)
            lines += [
                _text(start + frame.cell * (at + 0.5), y, str(layer), size=_SMALL, anchor="middle", kind="dim")
                for at, layer in enumerate(section.layers)
                if at % every == 0
            ]
        shown = _named(section.name, wide + _GAP - 4)
        if shown:
            lines.append(_text(start + wide / 2, y + 15, shown, size=_SMALL, anchor="middle", kind="dim"))
        if section.name:
            lines.append(
                f'<line class="rule" x1="{_n(start + 1)}" x2="{_n(start + wide - 1)}" '
                f'y1="{_n(y + 3.5)}" y2="{_n(y + 3.5)}"/>'
            )
    return lines


def _named(name: str, room: float) -> str:
    """A section's name in as many of its words as there is room for; "" where there is none."""
    parts = label(name).split(".")
    inner = parts[:-1] if len(parts) > 1 and not parts[-1].isdecimal() else parts
    told = [part for at, part in enumerate(inner) if at < 2 or part.isdecimal()]  # unet.down_blocks.1.0
    shorter = [part for at, part in enumerate(told) if at or len(told) == 1]
    least = [shorter[0].partition("_")[0], *shorter[1:]]
    forms = (".".join(each) for each in (parts, inner, told, shorter, least))
    return next((form for form in forms if _width(form, _SMALL) <= room), "")


def _step(count: int, wide: float) -> int:
    """Every how many layers there is room for a number."""
    least = 24.0
    fitting = (each for each in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100) if wide / count * each >= least)
    return next(fitting, count)


def _legend(picture: LayerMap, frame: _Frame, scale: Scale, *, alike: bool) -> list[str]:
    x, y = frame.left, frame.bottom + (54 if alike else 46)
    if alike:
        value = next(iter(picture.values.values()), None)
        said = f"{picture.measure}: {number(value)}, everywhere" if value is not None else picture.measure
        colour = hexadecimal(at(_ALIKE))
        return [
            f'<rect fill="{colour}" x="{_n(x)}" y="{_n(y - 10)}" width="12" height="12" rx="3"/>',
            _text(x + 18, y, said, size=_SMALL, kind="dim"),
        ]
    measure = f"{picture.measure} (log scale)" if scale.logarithmic else picture.measure
    low, high = number(scale.low, 3), number(scale.high, 3)
    before = _width(low, _SMALL) + 6
    return [
        _text(x, y + 10, low, size=_SMALL, kind="dim"),
        f'<rect fill="url(#scale)" x="{_n(x + before)}" y="{_n(y)}" width="140" height="12" rx="3"/>',
        _text(x + before + 146, y + 10, high, size=_SMALL, kind="dim"),
        _text(x + before + 162 + _width(high, _SMALL), y + 10, measure, size=_SMALL, kind="dim"),
    ]


def _text(
    x: float, y: float, text: str, *, size: float = _TEXT, weight: int = 400, anchor: str = "start", kind: str = "ink"
) -> str:
    more = f' font-weight="{weight}"' if weight != 400 else ""
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"{more}>{escape(label(text))}</text>'


def _width(text: str, size: float = _TEXT) -> float:
    return len(text) * size * _WIDE


def _n(value: float) -> str:
    """A measure with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
