"""TOML both ways, strictly: reading under limits, writing in one form.

Python's own parser reads; what it would spend unbounded time or memory on is refused before it looks: text over a size,
brackets or dotted keys over a depth.  Writing goes in the order of the tables given, so equal values in equal order are
equal bytes.  Knows nothing of recipes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from lorahub.strict_json import NotStrict

__all__ = ["read", "write"]

_TOKEN = re.compile(
    r"""
      (?P<comment> \#[^\n]* )
    | (?P<string>
          \"\"\" (?: [^"\\] | \\. | "{1,2}+ (?!") )*+ "{3,5}
        | '''    (?: [^'] | '{1,2}+ (?!') )*+ '{3,5}
        | "      (?: [^"\\\n] | \\. )*+ "
        | '      [^'\n]*+ '
      )
    | (?P<open>  [\[{] )
    | (?P<close> [\]}] )
    | (?P<break> [=,\n] )
    | (?P<dot>   \. )
    """,
    re.VERBOSE | re.DOTALL,
)
"""What tells how deep a place is; every other character is passed over.  No part of it can be matched in two ways."""


def read(text: str | bytes, *, limit: int, depth: int = 32) -> dict[str, Any]:
    """The value of a TOML document.

    Args:
        text: UTF-8 where it is bytes.
        limit: bytes of text.
        depth: how deep arrays and tables may nest, and how many dots a key may have.

    Raises:
        NotStrict: the text is malformed or over a limit.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > limit:
        raise NotStrict(f"{len(raw):,} bytes are more than the {limit:,} allowed")
    try:
        plain = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise NotStrict(f"not UTF-8 at byte {error.start}") from None
    _test_depth(plain, depth)
    try:
        value = tomllib.loads(plain)
    except tomllib.TOMLDecodeError as error:
        raise NotStrict(f"not TOML: {error}") from None
    except ValueError as error:  # a number of too many digits, a date that is none
        raise NotStrict(f"not TOML: {str(error)[:200]}") from None
    except RecursionError:
        raise NotStrict(f"nested deeper than {depth} levels") from None
    _test_integers(value)
    return value


def write(document: Mapping[str, Any]) -> str:
    """The TOML text of plain values, in the order of the tables given.

    Raises:
        TypeError: TOML has no word for a value; None is one.
    """
    return tomli_w.dumps(document)


def _test_depth(text: str, limit: int) -> None:
    """Refuse nesting that would cost the parser more than the text is long."""
    level = dots = 0
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "open":
                level, dots = level + 1, 0
            case "close":
                level, dots = level - 1, 0
            case "break":
                dots = 0
            case "dot":
                dots += 1
        if level > limit or dots > limit:
            raise NotStrict(f"nested deeper than {limit} levels, in line {text.count(chr(10), 0, token.start()) + 1}")


def _test_integers(value: dict[str, Any]) -> None:
    """Refuse what is no 64-bit integer, as TOML has it."""
    nodes: list[Any] = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict | list):
            nodes += node.values() if isinstance(node, dict) else node
        elif isinstance(node, int) and not -(2**63) <= node < 2**63:
            raise NotStrict("an integer that does not fit into 64 bits")
