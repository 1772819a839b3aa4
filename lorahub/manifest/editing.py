"""Small edits of a manifest's text: one line comes, goes or changes, and everything a person wrote stays.

An edit is a guess at lines that is believed only where the new text reads as exactly the document that was meant; where
no guess does, the person is told what to write.  Knows TOML and no hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorahub import strict_json, strict_toml
from lorahub.errors import ManifestError
from lorahub.manifest.document import FILENAME, LIMIT

__all__ = ["with_adapter", "with_base", "with_verdict", "without_adapter"]

_HEADER = re.compile(r"\s*\[")
_COMMENT = re.compile(r"[ \t]+#[^\"']*$")


def with_adapter(text: str, name: str, ref: str, weight: float | None) -> str:
    """The manifest with an adapter added, or with another reference for one that is there.

    Raises:
        ManifestError: its text is laid out so that this has to be done by hand; the hint is what to write.
    """
    value: Any = ref if weight is None else {"ref": ref, "weight": weight}
    document = _read(text)
    wanted = {**document, "adapters": {**_adapters(document), name: value}}
    line = _line(name, value)
    guesses = _replaced(text, "adapters", name, line) if name in _adapters(document) else _inserted(text, line)
    return _first(guesses, wanted, f"[adapters] of {FILENAME}: {line}")


def without_adapter(text: str, name: str) -> str:
    """The manifest without an adapter; a comment on its own line stays.

    Raises:
        ManifestError: its text is laid out so that this has to be done by hand.
    """
    document = _read(text)
    kept = {key: value for key, value in _adapters(document).items() if key != name}
    guesses = _removed(text, "adapters", name)
    return _first(guesses, {**document, "adapters": kept}, f"{FILENAME}, without {name}")


def with_base(text: str, ref: str) -> str:
    """The manifest with that base.

    Raises:
        ManifestError: its text is laid out so that this has to be done by hand; the hint is what to write.
    """
    document, line = _read(text), _line("base", ref)
    if "base" in document:
        guesses = _replaced(text, "", "base", line)
    else:
        lines, end = _lines(text)
        guesses = iter(_joined([*lines[:at], line, *lines[at:]], end) for at in _places_at_top(lines))
    return _first(guesses, {**document, "base": ref}, f"the top of {FILENAME}: {line}")


def with_verdict(text: str, verdict: str) -> str:
    """The manifest with a policy that accepts no worse verdict than this.

    Raises:
        ManifestError: its text is laid out so that this has to be done by hand; the hint is what to write.
    """
    document, line = _read(text), _line("verdict", verdict)
    policy = document.get("policy", {})
    policy = dict(policy) if isinstance(policy, dict) else {}
    guesses = _replaced(text, "policy", "verdict", line) if "verdict" in policy else _inserted(text, line, "policy")
    wanted = {**document, "policy": {**policy, "verdict": verdict}}
    return _first(guesses, wanted, f"[policy] of {FILENAME}: {line}")


def _first(guesses: Iterator[str], wanted: Mapping[str, Any], where: str) -> str:
    for guess in guesses:
        try:
            if strict_toml.read(guess, limit=LIMIT) == wanted:
                return guess
        except strict_json.NotStrict:
            continue
    raise ManifestError(
        f"{FILENAME} is laid out so that it cannot be edited safely; nothing was written", f"write it by hand: {where}"
    )


def _read(text: str) -> dict[str, Any]:
    try:
        return strict_toml.read(text, limit=LIMIT)
    except strict_json.NotStrict as error:
        raise ManifestError(f"{FILENAME}: {error}", "correct it first") from None


def _adapters(document: Mapping[str, Any]) -> dict[str, Any]:
    found = document.get("adapters", {})
    return dict(found) if isinstance(found, dict) else {}


def _line(name: str, value: Any) -> str:
    """``name = value`` on one line."""
    if isinstance(value, dict):
        inner = ", ".join(strict_toml.write({key: item}).strip() for key, item in value.items())
        return f"{_key(name)} = {{ {inner} }}"
    return strict_toml.write({name: value}).strip()


def _key(name: str) -> str:
    return strict_toml.write({name: 0}).partition(" = ")[0]


def _lines(text: str) -> tuple[list[str], str]:
    """The lines, and what ends them."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(end)
    return (lines[:-1] if lines and not lines[-1] else lines), end


def _joined(lines: Sequence[str], end: str) -> str:
    return "".join(f"{line}{end}" for line in lines)


def _sections(lines: Sequence[str], table: str) -> Iterator[tuple[int, int]]:
    """Where a table's own lines may be, as (first, behind the last); "" for what is above every table."""
    heads = [at for at, line in enumerate(lines) if _HEADER.match(line)]
    ends = [*heads[1:], len(lines)][: len(heads)]
    if not table:
        yield 0, (heads or [len(lines)])[0]
        return
    wanted = re.compile(rf"\s*\[\s*(?:{table}|\"{table}\"|'{table}')\s*\]")
    yield from ((head + 1, end) for head, end in zip(heads, ends, strict=True) if wanted.match(lines[head]))


def _inserted(text: str, line: str, table: str = "adapters") -> Iterator[str]:
    """Behind the last key of the table, or in a table of its own at the end."""
    lines, end = _lines(text)
    for first, behind in _sections(lines, table):
        filled = [at for at in range(first, behind) if lines[at].strip() and not lines[at].lstrip().startswith("#")]
        at = filled[-1] + 1 if filled else first
        yield _joined([*lines[:at], line, *lines[at:]], end)
    gap = [""] if lines and lines[-1].strip() else []
    yield _joined([*lines, *gap, f"[{table}]", line], end)


def _places_at_top(lines: Sequence[str]) -> Iterator[int]:
    """Where a key above all tables may go: behind the last one there, behind the opening comment, first of all."""
    _, behind = next(_sections(lines, ""))
    filled = [at for at in range(behind) if lines[at].strip() and not lines[at].lstrip("\ufeff ").startswith("#")]
    if filled:
        yield filled[-1] + 1
    opening = next((at for at in range(behind) if not lines[at].lstrip("\ufeff ").startswith("#")), behind)
    yield opening
    yield 0


def _of_key(lines: Sequence[str], table: str, name: str) -> Iterator[int]:
    """Lines that may say the key's value."""
    begins = re.compile(rf"\s*(?:{re.escape(name)}|\"{re.escape(name)}\"|'{re.escape(name)}')\s*=")
    for first, behind in _sections(lines, table):
        yield from (at for at in range(first, behind) if begins.match(lines[at]))


def _replaced(text: str, table: str, name: str, line: str) -> Iterator[str]:
    lines, end = _lines(text)
    for at in _of_key(lines, table, name):
        indent = re.match(r"\s*", lines[at])
        comment = _COMMENT.search(lines[at])
        for tail in ([comment[0]] if comment else []) + [""]:
            yield _joined([*lines[:at], f"{indent[0] if indent else ''}{line}{tail}", *lines[at + 1 :]], end)


def _removed(text: str, table: str, name: str) -> Iterator[str]:
    """Without the key's line, or without its own table."""
    lines, end = _lines(text)
    for at in _of_key(lines, table, name):
        yield _joined([*lines[:at], *lines[at + 1 :]], end)
    for first, behind in _sections(lines, rf"{table}\s*\.\s*[\"']?{re.escape(name)}[\"']?"):
        filled = [at for at in range(first, behind) if lines[at].strip() and not lines[at].lstrip().startswith("#")]
        last = filled[-1] + 1 if filled else first
        yield _joined([*lines[: first - 1], *lines[last:]], end)
