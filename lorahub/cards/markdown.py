"""Foreign text in Markdown: names and sentences from files, shown as they are, and able to do nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorahub.names import printable

__all__ = ["address", "code", "fenced", "link", "shorter", "table", "text"]

_SPECIAL = re.compile(r"[&<>$\\`*_\[\]|#~!{}@]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\\": "&#92;", "@": "&#64;"}
_ADDRESS = re.compile(r"https?://[A-Za-z0-9][\w.~:/?#@!&+,;=%-]*", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


def shorter(words: str, most: int) -> str:
    """``words`` in at most ``most`` characters, with dots where it was cut."""
    return words if len(words) <= most else f"{words[: most - 3]}..."


def text(words: str, most: int = 300) -> str:
    """A sentence on one line; nothing in it is Markdown, HTML or mathematics."""
    line = shorter(printable(" ".join(words.split())), most)
    line = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)
    line = re.sub(r"://", "&#58;//", line)  # an address is shown, not linked
    return re.sub(r"^(\d+)([.)])|^([-+=])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def code(words: str, most: int = 160) -> str:
    """A name in code's letters, within a table as well."""
    line = shorter(printable(" ".join(words.split())), most)
    if re.fullmatch(r"[^`|]+", line):
        return f"`{line}`"
    return (
        "<code>" + "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line) + "</code>" if line else ""
    )


def address(words: str) -> str:
    """An address that may be linked: http or https, without what could end a link; else ""."""
    return words if _ADDRESS.fullmatch(words) and len(words) <= 500 else ""


def link(shown: str, target: str) -> str:
    """A link where ``target`` is an address or a file beside the card, else the bare text; ``shown`` is Markdown."""
    safe = address(target) or (target if _FILE.fullmatch(target) else "")
    return f"[{shown}]({safe})" if safe else shown


def fenced(words: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{words}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are Markdown already; columns without an entry in any row are left out."""
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    lines = [[head[at] for at in kept], ["---"] * len(kept), *([row[at] for at in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
