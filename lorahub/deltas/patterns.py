r"""Module-name patterns from config files, matched without ever handing them to ``re``.

PEFT keeps per-module ranks and alphas under regular expressions and finds the first one for which
``re.match(rf"(.*\.)?({key})$", module)`` holds.  A file is not to be trusted with a backtracking engine, where
``(a+)+$`` costs exponential time, so the truly regular part of the syntax is compiled to a Thompson automaton:
time is bounded by pattern length times name length, and the yes or no is the one ``re`` gives.

Understood: literals, ``.``, escaped punctuation, ``\d \w \s`` and their negations, classes, groups, ``|``, ``*``
``+`` ``?`` ``{m,n}`` (lazy or not: the answer is the same), ``^`` and ``$``.  Back-references, look-around, flags
and the rest are refused by name.  Names without operators, anchored or not (``^model\.layers\.0\.q_proj$``), are
compared as text, an unescaped dot standing for any character as it does in ``re``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from lorahub.errors import UnsupportedKind

__all__ = ["first_match", "full_match"]

_PLAIN = re.compile(r"(\^?)((?:[\w.\-]|\\[.\-_])+)\$?")
_BRACES = re.compile(r"\{(\d{0,6})(?:(,)(\d{0,6}))?\}")
_LONGEST = 20_000
_DEEPEST = 40
_LARGEST = 20_000
"""Limits on characters, nested groups and automaton states: above any real pattern, below what would hurt."""

Test: TypeAlias = "Callable[[str], bool]"

_CATEGORIES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
    "D": lambda char: not char.isdecimal(),
    "W": lambda char: not (char.isalnum() or char == "_"),
    "S": lambda char: not char.isspace(),
}
"""The classes of ``re`` for text, by the same character properties."""


def first_match(keys: Iterable[str], module: str, *, field: str) -> str | None:
    """The first of ``keys`` that PEFT would find for ``module``, or None.

    Args:
        keys: patterns in the order of the file.
        module: dotted module path in the base, without PEFT's own prefix.
        field: the config field they come from, for the message.

    Raises:
        UnsupportedKind: a pattern uses syntax that is not understood here, or is malformed.
    """
    for key in keys:
        plain = _plain(key)
        if plain.ends(module) if plain else _automaton(key, field, suffix=True).accepts(module):
            return key
    return None


def full_match(pattern: str, module: str, *, field: str) -> bool:
    """Whether ``re.fullmatch(pattern, module)`` would hold.

    Raises:
        UnsupportedKind: as ``first_match``.
    """
    return _automaton(pattern, field, suffix=False).accepts(module)


@dataclass(frozen=True, slots=True)
class _Plain:
    """A pattern without operators: it has one length, so there is one place to look."""

    anchored: bool
    text: str
    dots: frozenset[int]

    def ends(self, module: str) -> bool:
        r"""``(.*\.)?(text)$``."""
        start = len(module) - len(self.text)
        if start < 0 or (start > 0 and (self.anchored or module[start - 1] != ".")):
            return False
        tail = module[start:]
        return tail == self.text or all(
            char == found or (at in self.dots and _any(found))
            for at, (char, found) in enumerate(zip(self.text, tail, strict=True))
        )


@lru_cache(maxsize=4096)
def _plain(key: str) -> _Plain | None:
    found = _PLAIN.fullmatch(key)
    if found is None or len(key) > _LONGEST:
        return None
    characters = re.findall(r"\\?.", found[2])
    dots = frozenset(at for at, character in enumerate(characters) if character == ".")
    return _Plain(bool(found[1]), "".join(character[-1] for character in characters), dots)


@dataclass(frozen=True, slots=True)
class _Step:
    """One state: consume a character that passes ``test``, or go on at once to ``to`` (where ``anchor`` holds)."""

    test: Test | None = None
    to: tuple[int, ...] = ()
    anchor: str = ""


@dataclass(frozen=True, slots=True)
class _Automaton:
    """States in order; one past the last accepts."""

    steps: tuple[_Step, ...]

    def accepts(self, text: str) -> bool:
        """Whether the whole of ``text`` is matched: every state is entered at most once per character."""
        states = {0}
        for at in range(len(text) + 1):
            consuming: list[int] = []
            stack, seen = list(states), set(states)
            while stack:
                state = stack.pop()
                step = self.steps[state] if state < len(self.steps) else None
                if step is None or step.test is not None:
                    consuming.append(state)
                    continue
                if (step.anchor == "^" and at) or (step.anchor == "$" and at < len(text)):
                    continue
                fresh = [target for target in step.to if target not in seen]
                seen.update(fresh)
                stack += fresh
            if at == len(text):
                return len(self.steps) in seen
            states = set()
            for state in consuming:
                if state < len(self.steps) and (test := self.steps[state].test) and test(text[at]):
                    states.add(state + 1)
            if not states:
                return False
        return False


@lru_cache(maxsize=64)
def _automaton(pattern: str, field: str, *, suffix: bool) -> _Automaton:
    parser = _Parser(pattern, field)
    own = parser.parse()
    if suffix:  # (.*\.)?(pattern)$
        prefix = parser.repeat([*parser.repeat([_Step(test=_any)], 0, None), _Step(test=_is("."))], 0, 1)
        own = [*prefix, *_moved(own, len(prefix))]
    return _Automaton(tuple(own))


def _any(char: str) -> bool:
    return char != "\n"


def _is(wanted: str) -> Test:
    return lambda char: char == wanted


def _between(low: str, high: str) -> Test:
    return lambda char: low <= char <= high


def _moved(steps: list[_Step], by: int) -> list[_Step]:
    """The same states, ``by`` places further on."""
    return [_Step(step.test, tuple(target + by for target in step.to), step.anchor) for step in steps]


class _Parser:
    """Recursive descent over one pattern; every method returns states that begin at 0 and leave past their end."""

    def __init__(self, pattern: str, field: str) -> None:
        self.pattern = pattern
        self.field = field
        self.at = 0
        self.depth = 0

    def refuse(self, what: str) -> UnsupportedKind:
        shown = self.pattern if len(self.pattern) <= 80 else self.pattern[:77] + "..."
        return UnsupportedKind(
            f"{self.field}: the pattern {shown!r} {what}",
            "Write the module names out in full; plain names are always understood.",
        )

    def parse(self) -> list[_Step]:
        if len(self.pattern) > _LONGEST:
            raise self.refuse(f"is longer than {_LONGEST} characters")
        steps = self.alternatives()
        if self.at < len(self.pattern):
            raise self.refuse("closes a group that was not opened")
        return steps

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def next(self) -> str:
        char = self.peek()
        if not char:
            raise self.refuse("ends too early")
        self.at += 1
        return char

    def alternatives(self) -> list[_Step]:
        branches = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            branches.append(self.sequence())
        if len(branches) == 1:
            return branches[0]
        starts, at = [], 1
        for branch in branches:
            starts.append(at)
            at += len(branch) + 1
        steps = [_Step(to=tuple(starts))]
        for start, branch in zip(starts, branches, strict=True):
            steps += [*_moved(branch, start), _Step(to=(at,))]
        return steps

    def sequence(self) -> list[_Step]:
        steps: list[_Step] = []
        while self.peek() not in ("", "|", ")"):
            steps += _moved(self.repeated(), len(steps))
            if len(steps) > _LARGEST:
                raise self.refuse("repeats too much")
        return steps

    def repeated(self) -> list[_Step]:
        steps = self.atom()
        bounds = self.quantifier()
        if bounds is None:
            return steps
        if any(step.anchor for step in steps):
            raise self.refuse("repeats an anchor")
        if self.peek() == "+":
            raise self.refuse("uses a possessive quantifier, which is not understood here")
        if self.peek() == "?":
            self.at += 1
        if self.quantifier() is not None:
            raise self.refuse("repeats a repetition")
        return self.repeat(steps, *bounds)

    def quantifier(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if (char := self.peek()) in simple:
            self.at += 1
            return simple[char]
        found = _BRACES.match(self.pattern, self.at)
        if found is None or found[0] == "{}":
            return None
        self.at = found.end()
        least = int(found[1] or 0)
        most = (int(found[3]) if found[3] else None) if found[2] else least
        if most is not None and most < least:
            raise self.refuse("has a repetition whose bounds are exchanged")
        return least, most

    def repeat(self, steps: list[_Step], least: int, most: int | None) -> list[_Step]:
        copies = least + (1 if most is None else most - least)
        if (len(steps) + 2) * copies > _LARGEST:
            raise self.refuse("repeats too much")
        result: list[_Step] = []
        for _ in range(least):
            result += _moved(steps, len(result))
        if most is None:  # loop: try the body, come back
            here = len(result)
            result += [_Step(to=(here + 1, here + len(steps) + 2)), *_moved(steps, here + 1), _Step(to=(here,))]
        else:
            end = len(result) + (most - least) * (len(steps) + 1)
            for _ in range(most - least):
                here = len(result)
                result += [_Step(to=(here + 1, end)), *_moved(steps, here + 1)]
        return result

    def atom(self) -> list[_Step]:
        char = self.next()
        match char:
            case "(":
                return self.group()
            case "[":
                return [_Step(test=self.char_class())]
            case ".":
                return [_Step(test=_any)]
            case "^" | "$":
                return [_Step(to=(1,), anchor=char)]
            case "\\":
                return [_Step(test=self.escape())]
            case "*" | "+" | "?":
                raise self.refuse("repeats nothing")
            case "{" if (found := _BRACES.match(self.pattern, self.at - 1)) and found[0] != "{}":
                raise self.refuse("repeats nothing")
        return [_Step(test=_is(char))]

    def group(self) -> list[_Step]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.refuse(f"nests groups deeper than {_DEEPEST}")
        if self.peek() == "?":
            if self.pattern[self.at : self.at + 2] != "?:":
                raise self.refuse("uses a group extension, which is not understood here")
            self.at += 2
        steps = self.alternatives()
        if self.peek() != ")":
            raise self.refuse("does not close a group")
        self.at += 1
        self.depth -= 1
        return steps

    def escape(self) -> Test:
        char = self.next()
        if char in _CATEGORIES:
            return _CATEGORIES[char]
        if char.isascii() and char.isalnum():
            raise self.refuse(f"uses '\\{char}', which is not understood here")
        return _is(char)

    def member(self) -> tuple[str, Test]:
        """One entry of a class: its character ("" for a category) and its test."""
        char = self.next()
        if char != "\\":
            return char, _is(char)
        char = self.peek()
        test = self.escape()
        return ("" if char in _CATEGORIES else char), test

    def char_class(self) -> Test:
        negated = self.peek() == "^"
        self.at += negated
        tests: list[Test] = []
        while self.peek() != "]" or not tests:
            low, test = self.member()
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high, _ = self.member()
                if not low or high < low:
                    raise self.refuse("has a character range that is no range")
                test = _between(low, high)
            tests.append(test)
        self.at += 1
        return lambda char: any(test(char) for test in tests) != negated
