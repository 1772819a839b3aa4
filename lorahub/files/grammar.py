"""A strict JSON scanner for objects whose shape is known beforehand, in memory bounded by what is kept.

``json.loads`` builds everything before anything can be judged: eight megabytes of brackets become hundreds of
megabytes of lists.  Here the outer objects are walked key by key, and each value is either a string or a *small*
value that must fit a given number of characters.  Knows nothing of tensors or files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["INTEGERS_ONLY", "Malformed", "Scanner", "integer", "show"]

_BLANKS = " \t\n\r"
_BLANK = re.compile(f"[{_BLANKS}]+")
_PLAIN = re.compile(f'[{_BLANKS}]*"([^"\\\\\x00-\x1f]*)"')
_KEY = re.compile(f'[{_BLANKS}]*"([^"\\\\\x00-\x1f]*)"[{_BLANKS}]*:')
_STRING = json.JSONDecoder()
_DIGITS = 19  # 2**63 - 1 has nineteen


class Malformed(ValueError):
    """Text that is not what was expected; ``hint`` says what now.  Callers add where, and turn it into their error."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.reason = reason
        self.hint = hint


def show(name: str) -> str:
    """A foreign name for a message: quoted, escaped, shortened."""
    return ascii(name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed(f"the key {show(twice)} appears twice")
    return result


def _refuse_number(text: str) -> object:
    raise Malformed(f"{show(text)} is not an integer")


def integer(text: str) -> int:
    """A JSON integer, at most 64 bits wide."""
    if len(text) > _DIGITS:
        raise Malformed(f"the number {show(text)} is too large")
    return int(text)


INTEGERS_ONLY: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=integer, parse_float=_refuse_number, parse_constant=_refuse_number
)
"""Decodes values whose numbers are integers of 64 bits, without duplicate keys."""


class Scanner:
    """A cursor over JSON text.  Every method raises Malformed where the text is not what it is asked to read."""

    __slots__ = ("at", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end; the cursor moves to it."""
        char = self.text[self.at : self.at + 1]
        if char in _BLANKS and (found := _BLANK.match(self.text, self.at)):
            self.at = found.end()
            char = self.text[self.at : self.at + 1]
        return char

    def members(self, what: str) -> Iterator[str]:
        """Yield the keys of the object at the cursor, which is then at the key's value: read that before the next."""
        self._expect("{", what)
        if self.peek() == "}":
            self.at += 1
            return
        seen: set[str] = set()
        while True:
            if found := _KEY.match(self.text, self.at):  # nearly always
                key, self.at = found[1], found.end()
            else:
                key = self.string(f"a key of {what}")
            if key in seen:
                raise Malformed(f"the key {show(key)} appears twice in {what}")
            seen.add(key)
            if found is None:
                self._expect(":", what)
            yield key
            following = self.peek()
            self.at += 1
            if following == "}":
                return
            if following != ",":
                raise Malformed(f"{what} is not JSON: ',' or '}}' was expected at character {self.at - 1}")

    def plain(self) -> str | None:
        """Read a string that is spelled as it is, or nothing where there is another or none."""
        found = _PLAIN.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[1]

    def string(self, what: str) -> str:
        """Read a string that can be written as UTF-8."""
        if self.peek() != '"':
            raise Malformed(f"{what} is not a string (character {self.at})")
        try:
            value, self.at = _STRING.raw_decode(self.text, self.at)
        except ValueError as error:
            raise Malformed(f"{what} is not JSON: {error}") from None
        assert isinstance(value, str)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"{what} holds half a surrogate pair: {show(value)}") from None
        return value

    def small(self, what: str, *, decoder: json.JSONDecoder, limit: int) -> Any:
        """Read any value that takes at most ``limit`` characters."""
        self.peek()
        start = self.at
        try:
            value, used = decoder.raw_decode(self.text[start : start + limit])
        except Malformed as error:
            raise Malformed(f"{what}: {error.reason}", error.hint) from None
        except RecursionError:
            raise Malformed(f"{what} is nested too deeply") from None
        except ValueError as error:
            longer = f", or is longer than {limit} characters" if len(self.text) - start > limit else ""
            raise Malformed(f"{what} is not JSON{longer}: {error}") from None
        self.at = start + used
        return value

    def null(self) -> bool:
        """Pass over a ``null``, if there is one at the cursor."""
        self.peek()
        found = self.text.startswith("null", self.at)
        self.at += 4 * found
        return found

    def end(self, what: str) -> None:
        """Make sure that nothing but blanks is left."""
        if self.peek():
            raise Malformed(f"{what} goes on after its end: {show(self.text[self.at : self.at + 20])}")

    def _expect(self, char: str, what: str) -> None:
        if self.peek() != char:
            raise Malformed(f"{what} is not JSON: '{char}' was expected at character {self.at}")
        self.at += 1
