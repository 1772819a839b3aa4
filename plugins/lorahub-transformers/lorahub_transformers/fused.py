"""Where a projection lies inside a fused parameter: queries, keys and values of an attention that keeps one weight.

How the rows lie is the table's to say, from the configuration: one projection after the other, or head by head, or by
groups of heads that share keys and values.  Without an entry, or with a configuration that lacks a setting or a shape
that contradicts it, there is no layout: nothing is guessed.  ``tests/test_fused.py`` holds every entry against what
the real classes compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.delta import Index
from lorahub.deltas.kind import JSON

__all__ = ["FUSED", "Fused", "entries_of", "fused_layout", "parts_of"]

Config: TypeAlias = Mapping[str, JSON]
Bands: TypeAlias = tuple[int, tuple[int, ...]]
"""How often a pattern of rows comes, and how many rows each projection has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections in one parameter, along its rows.

    Attributes:
        kinds: ``model_type`` of the architectures that keep them so.
        module: end of the path of the module that has them.
        parts: their names, in the order of the rows; each stands in the place of the module's last name.
        bands: how the rows lie, from the configuration and their number; None where that does not say.
        how: the same in words.
        config: the part of the configuration that says it ("text_config"), where it has parts.
    """

    kinds: tuple[str, ...]
    module: str
    parts: tuple[str, ...]
    bands: Callable[[Config, int], Bands | None]
    how: str
    config: str = ""


_QKV = ("q_proj", "k_proj", "v_proj")
_BOTH = ("gate_proj", "up_proj")
_ONE_BY_ONE, _BY_HEAD = "one projection after the other", "head by head"


def _number(config: Config, *names: str) -> int | None:
    """A setting under the first of its names that is there."""
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def _thirds(_config: Config, rows: int) -> Bands | None:
    return None if rows % 3 else (1, (rows // 3,) * 3)


def _halves(_config: Config, rows: int) -> Bands | None:
    return None if rows % 2 else (1, (rows // 2,) * 2)


def _grouped(config: Config, rows: int) -> Bands | None:
    """As many rows for queries as heads, and as many for keys and values as heads of theirs."""
    heads = _number(config, "num_attention_heads")
    shared = _number(config, "num_key_value_heads") or heads
    if heads is None or shared is None or rows % (heads + 2 * shared):
        return None
    size = rows // (heads + 2 * shared)
    return 1, (heads * size, shared * size, shared * size)


def _heads(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "num_attention_heads", "n_head")
    return None if heads is None or rows % (3 * heads) else (heads, (rows // heads // 3,) * 3)


def _falcon(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "num_attention_heads", "n_head")
    new, one = config.get("new_decoder_architecture"), config.get("multi_query")
    if heads is None or not isinstance(new, bool) or not isinstance(one, bool):
        return None
    if not new and not one:
        return _heads(config, rows)
    groups = (_number(config, "num_kv_heads") if new else 1) or 0
    if not groups or heads % groups or rows % (heads + 2 * groups):
        return None
    size = rows // (heads + 2 * groups)
    return groups, (heads // groups * size, size, size)


def _bigcode(config: Config, rows: int) -> Bands | None:
    heads, one = _number(config, "n_head", "num_attention_heads"), config.get("multi_query")
    if heads is None or not isinstance(one, bool):
        return None
    if not one:
        return _heads(config, rows)
    return None if rows % (heads + 2) else (1, (rows // (heads + 2) * heads, *(rows // (heads + 2),) * 2))


def _codegen(_config: Config, rows: int) -> Bands | None:
    """Four blocks, as the machines had on which it was trained."""
    return None if rows % 12 else (4, (rows // 12,) * 3)


FUSED: tuple[Fused, ...] = (
    Fused(
        kinds=("gpt2", "decision_transformer", "imagegpt", "openai-gpt"),
        module="attn.c_attn",
        parts=_QKV,
        bands=_thirds,
        how=_ONE_BY_ONE,
    ),
    Fused(kinds=("gpt_bigcode",), module="attn.c_attn", parts=_QKV, bands=_bigcode, how="as multi_query says"),
    Fused(kinds=("gpt_neox",), module="attention.query_key_value", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(kinds=("bloom",), module="self_attention.query_key_value", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(
        kinds=("falcon",),
        module="self_attention.query_key_value",
        parts=_QKV,
        bands=_falcon,
        how="by groups of heads, as new_decoder_architecture and multi_query say",
    ),
    Fused(kinds=("persimmon",), module="self_attn.query_key_value", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(
        kinds=("fuyu",),
        module="self_attn.query_key_value",
        parts=_QKV,
        bands=_heads,
        how=_BY_HEAD,
        config="text_config",
    ),
    Fused(kinds=("mpt",), module="attn.Wqkv", parts=_QKV, bands=_thirds, how=_ONE_BY_ONE),
    Fused(kinds=("modernbert",), module="attn.Wqkv", parts=_QKV, bands=_thirds, how=_ONE_BY_ONE),
    Fused(
        kinds=("codegen",),
        module="attn.qkv_proj",
        parts=("q_proj", "v_proj", "k_proj"),
        bands=_codegen,
        how="four blocks of queries, values and keys",
    ),
    Fused(kinds=("phi3",), module="self_attn.qkv_proj", parts=_QKV, bands=_grouped, how=_ONE_BY_ONE),
    Fused(kinds=("phi3", "glm", "glm4"), module="mlp.gate_up_proj", parts=_BOTH, bands=_halves, how=_ONE_BY_ONE),
)
"""Every fused parameter whose rows are known."""


def entries_of(kind: object) -> tuple[Fused, ...]:
    """The entries of an architecture."""
    return tuple(fused for fused in FUSED if kind in fused.kinds)


def fused_layout(index: BaseIndex, target: Target) -> Layout | None:
    """The layout of a projection that is no parameter of the base itself, or None."""
    for fused in entries_of(index.config.get("model_type")):
        around, _, last = fused.module.rpartition(".")
        place, _, part = target.module.rpartition(".")
        if part not in fused.parts or not f".{place}".endswith(f".{around}"):
            continue
        module = f"{place}.{last}"
        rows = dict(_rows(fused, index, module)).get(part)
        name = f"{module}.{target.parameter}"
        if rows is None or name not in index.parameters or target.parameter not in ("weight", "bias"):
            continue
        turned = index.parameters[name].transposed
        pieces = (Piece(parameter=name, of_parameter=Region(transposed=turned, rows=rows)),)
        return Layout(target=target, pieces=pieces)
    return None


def parts_of(index: BaseIndex) -> Iterator[tuple[str, str]]:
    """(fused module, a projection inside it) for all of the base, as the paths that targets have."""
    for fused in entries_of(index.config.get("model_type")):
        for module in index.modules():
            if f".{module}".endswith(f".{fused.module}"):
                place = module.rpartition(".")[0]
                yield from ((module, f"{place}.{part}") for part, _ in _rows(fused, index, module))


def _rows(fused: Fused, index: BaseIndex, module: str) -> list[tuple[str, Index]]:
    """(part, its rows); nothing where configuration and shape do not say."""
    info = index.parameters.get(f"{module}.weight")
    config = index.config.get(fused.config) if fused.config else index.config
    if info is None or len(info.shape) != 2 or not isinstance(config, Mapping):
        return []
    total = info.shape[1 if info.transposed else 0]
    found = fused.bands(config, total)
    if found is None or found[0] * sum(found[1]) != total:
        return []
    times, sizes = found
    ends = list(accumulate(sizes))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if times == 1:
        return [(part, slice(start, end)) for part, (start, end) in zip(fused.parts, spans, strict=True)]
    step = ends[-1]
    return [
        (part, tuple(each * step + row for each in range(times) for row in range(start, end)))
        for part, (start, end) in zip(fused.parts, spans, strict=True)
    ]
