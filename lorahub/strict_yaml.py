"""YAML, read strictly: plain values only, under limits.

PyYAML's safe loader reads.  What it lets pass or would spend unbounded time on is refused: repeated keys, keys that are
no text, anchors and aliases (which can stand for exponentially much), several documents, text over a size, nesting over
a depth.  Knows nothing of recipes, and nothing here writes YAML.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from yaml.constructor import ConstructorError  # type: ignore[import-untyped]

from lorahub.strict_json import NotStrict

__all__ = ["read"]

_OPEN = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSE = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def read(text: str | bytes, *, limit: int, depth: int = 32) -> Any:
    """The value of a YAML document.

    Args:
        text: UTF-8 where it is bytes.
        limit: bytes of text.
        depth: how deep lists and mappings may nest.

    Raises:
        NotStrict: the text is malformed or over a limit.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > limit:
        raise NotStrict(f"{len(raw):,} bytes are more than the {limit:,} allowed")
    try:
        plain = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotStrict(f"not UTF-8 at byte {error.start}") from None
    try:
        _test_events(plain, depth)
        return yaml.load(plain, _Strict)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        at = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise NotStrict(f"not YAML: {error.problem}{at}") from None
    except yaml.YAMLError as error:
        raise NotStrict(f"not YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # a number of too many digits, a date that is none
        raise NotStrict(f"not YAML: {str(error)[:200]}") from None
    except RecursionError:
        raise NotStrict(f"nested deeper than {depth} levels") from None


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # as above
    """The safe loader, without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are texts, each another."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ConstructorError(None, None, "a key is no text", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value[:80]!r} appears twice", key.start_mark)
            seen.add(key.value)
        result: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return result


def _test_events(text: str, depth: int) -> None:
    """Refuse what would make the document larger than its text, or the loader recurse without bound."""
    level = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise NotStrict(
                f"anchors and aliases are not read, in line {event.start_mark.line + 1}: write the value out"
            )
        level += isinstance(event, _OPEN) - isinstance(event, _CLOSE)
        if level > depth:
            raise NotStrict(f"nested deeper than {depth} levels, in line {event.start_mark.line + 1}")
