"""The two orders in which rotary attention's query and key rows are stored.

A rotary embedding turns pairs of a head's rows.  Hugging Face keeps a head as all first halves of the pairs, then all
second halves; Meta's own checkpoints, torchtune and llama.cpp keep each pair together.  Between them lies one
permutation of rows per head, the same for the weight, for LoRA's up factor and for DoRA's magnitudes.  Knows numbers of
heads and rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from lorahub.deltas.kind import JSON

__all__ = ["Heads", "heads_of", "to_halves", "to_pairs"]

Heads = tuple[int, int]
"""How many attention heads have queries, and how many have keys and values."""


def heads_of(config: Mapping[str, JSON]) -> Heads | None:
    """What a base's config says, its language model's where it has several parts; None where it says nothing."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**config, **inner}
    queries, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not _count(queries):
        return None
    assert isinstance(queries, int)
    return queries, keys if isinstance(keys, int) and _count(keys) else queries


def _count(value: JSON) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@cache
def to_halves(rows: int, heads: int) -> tuple[int, ...] | None:
    """Which rows of a tensor kept in pairs make one kept in halves, in order; None where heads do not divide rows."""
    width, rest = divmod(rows, heads)
    if rest or width % 2:
        return None
    half = width // 2
    return tuple(head * width + 2 * at + part for head in range(heads) for part in (0, 1) for at in range(half))


@cache
def to_pairs(rows: int, heads: int) -> tuple[int, ...] | None:
    """The inverse of ``to_halves``."""
    width, rest = divmod(rows, heads)
    if rest or width % 2:
        return None
    half = width // 2
    return tuple(head * width + part * half + at for head in range(heads) for at in range(half) for part in (0, 1))
