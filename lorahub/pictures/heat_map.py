"""A table of numbers as a picture: rows and columns with labels, a colour for each number, and what the colours mean.

One SVG file without scripts, fonts or links, legible on light and dark pages; the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from xml.sax.saxutils import escape, quoteattr

from lorahub.pictures.colours import STOPS, at, hexadecimal, ink_on
from lorahub.pictures.scale import Scale, label, number, shortened

__all__ = ["HeatMap", "svg"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """What to draw.

    Attributes:
        title: at the top.
        subtitle: below it, smaller.
        rows, columns: labels, in order; each its own.
        values: (row, column) -> number; absent ones are drawn as empty cells.
        measure: what the numbers are, beside the scale.
        row_title, column_title: what rows and columns are.
        dotted: columns are dotted names, whose last part tells them where room is short.
        low, high: the ends of the scale, where they are known; see ``Scale.of``.
    """

    title: str
    subtitle: str = ""
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], float] = field(default_factory=lambda: MappingProxyType({}))
    measure: str
    row_title: str = "layer"
    column_title: str = "target"
    dotted: bool = True
    low: float | None = None
    high: float | None = None

    @property
    def scale(self) -> Scale:
        """The scale of its numbers."""
        return Scale.of(self.values.values(), low=self.low, high=self.high)


_MARGIN = 20.0
_TEXT = 11.0
_WIDE = 0.57
"""Width of a character in text sizes, on the average of sans-serif faces."""

_LONGEST_ROW, _LONGEST_COLUMN = 44, 30
"""Characters of a label; the rest is left out of its middle, and said when the cell is pointed at."""

_SLANT = 45
_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI','Helvetica Neue','DejaVu Sans',Arial,sans-serif}"
    ".page{fill:#ffffff}.ink{fill:#1f2328}.dim{fill:#59636e}.none{fill:none;stroke:#d1d9e0}"
    "@media (prefers-color-scheme:dark){.page{fill:#0d1117}.ink{fill:#e6edf3}.dim{fill:#9198a1}.none{stroke:#3d444d}}"
)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Measures of a drawing, in pixels."""

    left: float
    top: float
    cell: float
    line: float
    columns: int
    rows: int

    @property
    def right(self) -> float:
        return self.left + self.cell * self.columns

    @property
    def bottom(self) -> float:
        return self.top + self.line * self.rows


def svg(picture: HeatMap) -> str:
    """The picture as the text of an SVG file."""
    rows = [shortened(label(row), _LONGEST_ROW) for row in picture.rows]
    columns = [shortened(label(column), _LONGEST_COLUMN) for column in picture.columns]
    cell = min(max(560 / max(len(columns), 1), 30.0), 64.0)
    line = min(max(1080 / max(len(rows), 1), 9.0), 24.0)
    small = min(_TEXT, line - 1)
    slanted = any(_width(column) > cell - 6 for column in columns)
    reach = math.sin(math.radians(_SLANT)) * max(map(_width, columns), default=0.0) + _TEXT if slanted else _TEXT + 4
    head = _MARGIN + 22 + (18 if picture.subtitle else 0)
    left = _MARGIN + 20 + max((_width(row, small) for row in rows), default=0.0) + 8
    frame = _Frame(left, head + 10 + reach, cell, line, len(columns), len(rows))
    hang = math.cos(math.radians(_SLANT)) * _width(columns[-1]) - cell / 2 if slanted and columns else 0.0
    legend_left = frame.right + max(28.0, hang + 12)
    legend_tall = min(max(frame.bottom - frame.top, 120.0), 260.0)
    width = legend_left + 14 + 8 + 52 + _MARGIN
    width = max(
        width, 2 * _MARGIN + _width(label(picture.title), 16), 2 * _MARGIN + _width(label(picture.subtitle), 12)
    )
    height = max(frame.bottom + 24, frame.top + legend_tall + 8) + _MARGIN
    body = [
        *_heading(picture, head),
        *_labels(rows, columns, frame, slanted=slanted),
        *_titles(picture, frame),
        *_cells(picture, frame),
        *_legend(picture, legend_left, frame.top, legend_tall),
    ]
    size = f'width="{_n(width)}" height="{_n(height)}"'
    name = quoteattr(label(picture.title))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_n(width)} {_n(height)}"',
            f'role="img" aria-label={name}>',
            f"<title>{escape(label(picture.title))}</title>",
            f"<style>{_STYLE}</style>",
            "<defs>",
            '<linearGradient id="scale" x1="0" y1="1" x2="0" y2="0">',
            *(
                f'<stop offset="{_n(100 * step / (len(STOPS) - 1))}%" stop-color="{hexadecimal(colour)}"/>'
                for step, colour in enumerate(STOPS)
            ),
            "</linearGradient>",
            "</defs>",
            f'<rect class="page" {size}/>',
            *body,
            "</svg>\n",
        ]
    )


def _heading(picture: HeatMap, head: float) -> list[str]:
    lines = [_text(_MARGIN, _MARGIN + 14, picture.title, size=16, weight=600)]
    if picture.subtitle:
        lines.append(_text(_MARGIN, head - 4, picture.subtitle, size=12, kind="dim"))
    return lines


def _labels(rows: Sequence[str], columns: Sequence[str], frame: _Frame, *, slanted: bool) -> list[str]:
    size = min(_TEXT, frame.line - 1)
    lines = [
        _text(frame.left - 8, frame.top + frame.line * (at_row + 0.5) + 0.36 * size, row, size=size, anchor="end")
        for at_row, row in enumerate(rows)
    ]
    for at_column, column in enumerate(columns):
        x, y = frame.left + frame.cell * (at_column + 0.5), frame.top - 7
        if slanted:
            lines.append(_text(x, y, column, turned=-_SLANT))
        else:
            lines.append(_text(x, y, column, anchor="middle"))
    return lines


def _titles(picture: HeatMap, frame: _Frame) -> list[str]:
    middle = (frame.top + frame.bottom) / 2
    return [
        _text((frame.left + frame.right) / 2, frame.bottom + 18, picture.column_title, anchor="middle", kind="dim"),
        _text(_MARGIN + 6, middle, picture.row_title, anchor="middle", kind="dim", turned=-90),
    ]


def _cells(picture: HeatMap, frame: _Frame) -> list[str]:
    scale = picture.scale
    written = frame.line >= 15 and frame.cell >= 34
    gap = 1.0 if frame.line >= 12 else 0.5
    lines = []
    for at_row, row in enumerate(picture.rows):
        for at_column, column in enumerate(picture.columns):
            x, y = frame.left + frame.cell * at_column, frame.top + frame.line * at_row
            place = (
                f'x="{_n(x + gap / 2)}" y="{_n(y + gap / 2)}" '
                f'width="{_n(frame.cell - gap)}" height="{_n(frame.line - gap)}"'
            )
            value = picture.values.get((row, column))
            if value is None or math.isnan(value):
                lines.append(f'<rect class="none" stroke-width="0.5" {place}/>')
                continue
            colour = at(scale.share(value))
            said = escape(f"{label(row)}, {label(column)}: {value:.4g}")
            lines.append(f'<rect fill="{hexadecimal(colour)}" {place}><title>{said}</title></rect>')
            if written:
                lines.append(
                    f'<text x="{_n(x + frame.cell / 2)}" y="{_n(y + frame.line / 2 + 3.5)}" font-size="10" '
                    f'text-anchor="middle" pointer-events="none" fill="{ink_on(colour)}">{number(value)}</text>'
                )
    return lines


def _legend(picture: HeatMap, x: float, y: float, tall: float) -> list[str]:
    scale = picture.scale
    measure = f"{picture.measure}, log scale" if scale.logarithmic else picture.measure
    lines = [f'<rect fill="url(#scale)" x="{_n(x)}" y="{_n(y)}" width="14" height="{_n(tall)}"/>']
    lines += [
        _text(x + 20, y + tall * (1 - share) + (9 if share == 1 else 0 if share == 0 else 4), number(value))
        for share, value in scale.ticks()
    ]
    lines.append(_text(x + 66, y + tall / 2, measure, anchor="middle", kind="dim", turned=-90))
    return lines


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = _TEXT,
    weight: int = 400,
    anchor: str = "start",
    kind: str = "ink",
    turned: int = 0,
) -> str:
    more = f' font-weight="{weight}"' if weight != 400 else ""
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' transform="rotate({turned} {_n(x)} {_n(y)})"' if turned else ""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"{more}>{escape(label(text))}</text>'


def _width(text: str, size: float = _TEXT) -> float:
    return len(text) * size * _WIDE


def _n(value: float) -> str:
    """A measure with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")
