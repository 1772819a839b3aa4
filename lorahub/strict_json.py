"""JSON both ways, strictly: reading under limits, writing in one canonical form.

Reading refuses what ``json.loads`` lets pass: repeated keys, NaN, text over a size, nesting over a depth.  Writing
sorts keys and gives floats their shortest form, so equal values are equal bytes.  Knows nothing of records.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["NotStrict", "compact", "pretty", "read"]

_WIDTH = 100
_DIGITS = 20  # every 64-bit integer, with its sign


class NotStrict(ValueError):
    """Text that is no JSON, or over a limit; callers turn it into their own error and say where."""


def read(text: str | bytes, *, limit: int, depth: int = 32) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        limit: bytes of text.
        depth: how deep lists and objects may nest.

    Raises:
        NotStrict: the text is malformed or over a limit.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > limit:
        raise NotStrict(f"{len(raw):,} bytes are more than the {limit:,} allowed")
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise NotStrict(f"nested deeper than {depth} levels") from None
    except UnicodeError:
        raise NotStrict("not UTF-8, or half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise NotStrict(f"not JSON: {error}") from None
    _test_depth(value, depth)
    return value


def compact(value: object) -> str:
    """One line, keys sorted, no blanks, every character as itself: the form that digests are taken over.

    Raises:
        ValueError: a float is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def pretty(value: object) -> str:
    """For people and diffs: keys sorted, two blanks of indent, what fits on a line on one line, a newline at the end.

    Raises:
        ValueError: a float is not finite.
    """
    return _lines(value, "") + "\n"


def _lines(value: object, indent: str) -> str:
    inline = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if not (isinstance(value, dict | list) and value) or (indent and len(indent) + len(inline) <= _WIDTH):
        return inline
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {_lines(value[key], inner)}" for key in sorted(value)]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotStrict(f"the key {twice[:80]!r} appears twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotStrict(f"{text[:80]} is no finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise NotStrict(f"an integer of {len(text):,} digits")
    return int(text)


def _test_depth(value: Any, limit: int) -> None:
    level, nodes = 0, [value]
    while nodes := [node for node in nodes if isinstance(node, dict | list)]:
        level += 1
        if level > limit:
            raise NotStrict(f"nested deeper than {limit} levels")
        nodes = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
