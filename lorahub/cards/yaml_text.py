"""YAML, written: block style, one line a value, texts quoted wherever some reader could take them for something else.

Written out here rather than by a library, so that the same values are the same bytes everywhere.  Knows no key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from lorahub.errors import RecordError

__all__ = ["entry", "scalar"]

_SAFE = re.compile(r"[A-Za-z_][\w./+@-]*(?:[ :][\w./+@-]+)*", re.ASCII)
"""Texts that need no quotes for any reader, save the words below."""

_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan", "inf"})
_UNSAFE = re.compile("[\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff]")


def scalar(value: Any) -> str:
    """A single value on one line.

    Raises:
        RecordError: YAML's plain types have no word for it.
    """
    if isinstance(value, str):
        if _SAFE.fullmatch(value) and value.lower() not in _WORDS and not value.endswith(":"):
            return value
        return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")  # 1e-05 is a text to YAML 1.1
    if isinstance(value, int):
        return str(value)
    if isinstance(value, date):
        return value.isoformat(" ") if isinstance(value, datetime) else value.isoformat()
    raise RecordError(f"a value of type {type(value).__name__} cannot be written into metadata", "write it as text")


def entry(key: str, value: Any, newline: str = "\n", indent: int = 0) -> str:
    """``key: value``, lists and mappings below it, without the last line's end."""
    return newline.join(" " * indent + line for line in _pair(key, value))


def _pair(key: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [f"{scalar(key)}:", *(f"  {line}" for line in _mapping(value))]
    if isinstance(value, list | tuple) and value:
        return [f"{scalar(key)}:", *_list(value)]
    return [f"{scalar(key)}: {_leaf(value)}"]


def _mapping(value: Mapping[str, Any]) -> list[str]:
    return [line for key, item in value.items() for line in _pair(key, item)]


def _list(values: list[Any] | tuple[Any, ...]) -> list[str]:
    lines = []
    for value in values:
        if isinstance(value, Mapping) and value:
            inner = _mapping(value)
        elif isinstance(value, list | tuple) and value:
            inner = _list(value)
        else:
            inner = [_leaf(value)]
        lines += [f"{'  ' if at else '- '}{line}" for at, line in enumerate(inner)]
    return lines


def _leaf(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    return "[]" if isinstance(value, list | tuple) else scalar(value)
