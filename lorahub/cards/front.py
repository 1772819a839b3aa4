"""The metadata at the top of a README, and how to change single values in it while everything else stays as written.

What counts as metadata is said in ``front_matter``.  It is read strictly and within limits.  Changes are cuts in the
text, so order, style and comments of what is not changed stay, and the result is read again: a text that would not say
what it should is never returned.  Knows no adapter and no key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from lorahub import strict_yaml
from lorahub.cards.yaml_text import entry, scalar
from lorahub.errors import RecordError
from lorahub.front_matter import LIMIT, cut
from lorahub.strict_json import NotStrict

__all__ = ["FILE", "Document", "edited", "read_front", "split"]

FILE = "README.md"

_OPENS = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n|\Z)")
_BREAK = re.compile(r"\r\n|\r|\n")
_BOM = "\ufeff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A README in its parts; joined in this order they are the text.

    Attributes:
        head: what comes before the metadata, the opening line included.
        front: the metadata's YAML.
        tail: the closing line.
        body: what people read.
        newline: how its lines end.
        written: whether the metadata stand in the text, be they empty.
    """

    head: str
    front: str
    tail: str
    body: str
    newline: str
    written: bool = True

    @property
    def line(self) -> int:
        """How many lines come before the metadata."""
        return len(_BREAK.findall(self.head))

    @property
    def body_line(self) -> int:
        """How many lines come before the body."""
        return len(_BREAK.findall(self.head + self.front + self.tail)) if self.written else 0

    def text(self) -> str:
        """The whole, without metadata where there are none."""
        if self.front or self.written:
            return f"{self.head}{self.front}{self.tail}{self.body}"
        return f"{_BOM if self.head.startswith(_BOM) else ''}{self.body}"

    def changed(self, *, front: str, body: str) -> Self:
        """The document with other metadata and another body."""
        return replace(self, front=front, body=body)


def split(text: str) -> Document:
    """A README taken apart.

    Raises:
        RecordError: its first line opens metadata, and nothing closes them.
    """
    found = _BREAK.search(text)
    newline = found[0] if found else "\n"
    bom, rest = (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    if (parts := cut(text)) is not None:
        tail = parts.tail if parts.yaml or parts.tail[:1] in "\r\n" else newline + parts.tail  # room for a first key
        return Document(head=parts.head, front=parts.yaml, tail=tail, body=parts.body, newline=newline)
    if opens := _OPENS.match(rest):
        line = len(_BREAK.findall(rest[: opens.end()])) or 1
        raise RecordError(
            f"{FILE}, line {line}: this opens metadata, and nothing closes them",
            "end the metadata with a line ---, or write *** where a rule is meant",
        )
    head, tail = f"{bom}---{newline}", f"{newline}---{newline}"
    return Document(head=head, front="", tail=tail, body=rest, newline=newline, written=False)


def read_front(document: Document) -> dict[str, Any]:
    """The metadata's values.

    Raises:
        RecordError: it is no YAML, no mapping, or over a limit; the message names the line of the README.
    """
    hint = f"correct {FILE}: its metadata are one YAML value a key, between two lines of ---"
    try:
        found = strict_yaml.read("\n" * document.line + document.front, limit=LIMIT)
    except NotStrict as error:
        raise RecordError(f"the metadata of {FILE}: {error}", hint) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecordError(
            f"the metadata of {FILE}, line {document.line + 1}: they are no mapping of keys to values", hint
        )
    return found


def edited(document: Document, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The YAML of ``document`` with the values of ``new`` in place of those of ``old``; equal ones are not touched.

    Raises:
        RecordError: the metadata are laid out so that single values cannot be changed.
    """
    if old == new:
        return document.front
    text, newline = document.front, document.newline
    nodes, indent = _entries(text) if old else ({}, 0)
    cuts: list[tuple[int, int, str]] = []
    for key, node in nodes.items():
        if key not in new:
            cuts.append((node.start, node.end, ""))
        elif repr(old[key]) != repr(new[key]):
            cuts.append(_cut(text, node, key, old[key], new[key], newline))
    for start, end, put in sorted(cuts, reverse=True):
        text = text[:start] + put + text[end:]
    added = [entry(key, value, newline, indent) for key, value in new.items() if key not in old]
    text = newline.join([*([text.removesuffix(newline)] if text.strip() else []), *added])
    text = text.removesuffix(newline) if not added and cuts else text
    if not _says(document.changed(front=text, body=""), new):
        raise RecordError(
            f"the metadata of {FILE} are laid out so that single values cannot be changed in them",
            "write one key to a line, each at the start of its line: license: mit",
        )
    return text


def _says(document: Document, values: Mapping[str, Any]) -> bool:
    try:
        return _plain(read_front(document)) == _plain(values)
    except RecordError:  # the cuts broke what was there
        return False


def _plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted((key, repr(value)) for key, value in values.items())


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a key and its value lie: from the start of the key's line to the next key's."""

    start: int
    end: int
    value: yaml.Node


def _entries(text: str) -> tuple[dict[str, _Entry], int]:
    """Key -> where it lies, and the column that keys begin in."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise RecordError(
            f"the metadata of {FILE} stand in braces, and single values cannot be changed in there",
            "write one key to a line: license: mit",
        )
    pairs = root.value
    indent = pairs[0][0].start_mark.column
    starts = [key.start_mark.index - key.start_mark.column for key, _ in pairs]
    ends = [*starts[1:], len(text)]
    return {
        key.value: _Entry(start, _without_comments(text, start, end), value)
        for (key, value), start, end in zip(pairs, starts, ends, strict=True)
    }, indent


def _without_comments(text: str, start: int, end: int) -> int:
    """The end of an entry, without the empty lines and comments that lead to the next one."""
    lines = text[start:end].splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        end -= len(lines.pop())
    return end


def _line_end(text: str) -> str:
    """The end of the last line, or nothing."""
    return text[len(text.rstrip("\r\n")) :]


def _cut(text: str, found: _Entry, key: str, old: Any, new: Any, newline: str) -> tuple[int, int, str]:
    """(start, end, what to put there) that turns one value into another with as little change as there can be."""
    node = found.value
    begin, stop = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and isinstance(new, str | int | float) and node.style in (None, "'", '"'):
        put = scalar(new)
        return begin, stop, put if begin < stop else f" {put}"
    if isinstance(node, yaml.SequenceNode) and node.value and isinstance(new, list) and _texts(new):
        longer = [repr(each) for each in new[: len(old)]] == [repr(each) for each in old]
        if longer and _one_line(node.value[-1]):
            return _append(text, node, new[len(old) :], newline)
    line = text[found.start : found.end]
    column = len(line) - len(line.lstrip(" "))
    return found.start, found.end, entry(key, new, newline, column) + _line_end(line)


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _one_line(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.start_mark.line == node.end_mark.line


def _append(text: str, node: yaml.SequenceNode, items: list[str], newline: str) -> tuple[int, int, str]:
    """Further items behind the last one, in the list's own style."""
    last = node.value[-1].end_mark.index
    if node.flow_style:
        return last, last, "".join(f", {scalar(item)}" for item in items)
    line = _BREAK.search(text, last)
    end = line.start() if line else len(text)  # behind a comment on that line
    indent = " " * node.start_mark.column
    return end, end, "".join(f"{newline}{indent}- {scalar(item)}" for item in items)
