"""The one sink of the command line: the answer on stdout, the talk on stderr.

Three modes: ``human`` (tables and sentences), ``json`` (one document on stdout), ``quiet`` (the answer's bare
value).  Commands hand over data and a way to show it; they never print.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorahub.errors import LorahubError
from lorahub.findings import Finding, Verdict

__all__ = ["Mode", "Output", "Progress", "aligned", "brief", "plain", "size"]

Mode: TypeAlias = Literal["human", "json", "quiet"]
Progress: TypeAlias = "Callable[[int, int], None]"
"""``(done, total)`` in bytes or steps; called from any thread."""

_LEVEL_WORDS = {
    Verdict.EXACT: "note",
    Verdict.COMPATIBLE: "note",
    Verdict.UNVERIFIED: "warning",
    Verdict.DEGRADED: "refused",
    Verdict.INCOMPATIBLE: "refused",
}


def plain(text: str) -> str:
    """``text`` without control characters, so that a name in a file cannot drive the terminal."""
    return "".join(
        character if character in "\n\t" or _harmless(character) else f"\\x{ord(character):02x}" for character in text
    )


def brief(text: str, width: int) -> str:
    """Foreign text on one line of at most ``width`` characters, its length told where it was cut; safe to show."""
    head = plain(text[: 2 * width]).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= 2 * width and len(head) <= width:
        return head
    note = f"... ({len(text):,} characters)"
    return head[: max(width - len(note), 0)] + note


def _json(document: object) -> str:
    """JSON for people and programs: text as it is, save what could drive a terminal, which is escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return _SPECIAL.sub(lambda found: "".join(map(_escaped, found[0])), text)


_SPECIAL = re.compile(r"[^\n\x20-\x7e]+")


def _escaped(character: str) -> str:
    return character if _harmless(character) else json.dumps(character)[1:-1]


def _harmless(character: str) -> bool:
    """Whether it is no control, format or surrogate character, and begins no new line."""
    return unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"


def size(count: float) -> str:
    """Bytes for people: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def aligned(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows as left-aligned columns."""
    widths = [
        max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows), default=0))
    ]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's answer and talk go."""

    mode: Mode = "human"

    def answer(self, document: object, *, text: str, bare: str | None = None, picture: Sequence[str] = ()) -> None:
        """The command's result: JSON in json mode, ``bare`` (or nothing) in quiet mode, else ``text``.

        ``picture`` follows the text line by line as it is: it may hold escapes for colour, and no foreign text that was
        not made safe where it was drawn.
        """
        if self.mode == "json":
            sys.stdout.write(_json(document) + "\n")
        elif self.mode == "quiet":
            if bare:
                sys.stdout.write(plain(bare) + "\n")
        elif text:
            sys.stdout.write("\n".join([plain(text), *picture]) + "\n")

    @property
    def width(self) -> int:
        """Columns of the terminal; 100 where there is none."""
        return shutil.get_terminal_size((100, 24)).columns

    @property
    def unicode(self) -> bool:
        """Whether stdout takes more than ASCII."""
        return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")

    def colour(self, *, wanted: bool = True) -> bool:
        """Whether colours may be used: on a terminal, where NO_COLOR (no-color.org) does not speak against it."""
        return wanted and sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """A line of talk; silent in quiet mode."""
        if self.mode != "quiet":
            sys.stderr.write(plain(text) + "\n")

    def findings(self, findings: Sequence[Finding], *, allowed: Collection[str] = ()) -> None:
        """Findings worth saying, worst first; mere notes are left to ``--json``.

        Args:
            findings: all there are.
            allowed: codes that ``--allow`` accepted.
        """
        for finding in sorted(findings, key=lambda each: -each.level):
            if finding.level < Verdict.UNVERIFIED:
                continue
            accepted = finding.allowable and finding.code in allowed
            self.say(f"{'allowed' if accepted else _LEVEL_WORDS[finding.level]}: {finding.show()}")
            if finding.remedy and not accepted:
                self.say(f"  {finding.remedy}")

    def error(self, error: LorahubError) -> None:
        """A failure: what, the findings behind it, and what to do next."""
        if self.mode == "json":
            document = {
                "error": {
                    "type": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                    "exit_code": error.exit_code,
                    "findings": [finding.document() for finding in error.findings],
                }
            }
            sys.stdout.write(_json(document) + "\n")
            return
        lines = [f"Error: {error.message}"]
        for finding in error.findings:
            if finding.level >= Verdict.DEGRADED and finding.message not in error.message:
                lines.append(f"  {finding.show()}")
                if finding.remedy:
                    lines.append(f"    {finding.remedy}")
        if error.hint:
            lines.append(f"Hint: {error.hint}")
        sys.stderr.write(plain("\n".join(lines)) + "\n")

    @contextmanager
    def progress(self, title: str, *, unit: Literal["bytes", "steps"] = "bytes") -> Iterator[Progress]:
        """A progress bar on stderr while the block runs, on a terminal and in human mode; otherwise nothing."""
        if self.mode != "human" or not sys.stderr.isatty():
            yield lambda _done, _total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        with Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            count,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
