"""Where diffusers applies a file in kohya's names with other numbers than its author meant, or drops modules of it.

Read from its ``lora_conversion_utils.py``, ``utils/peft_utils.py`` and ``lora_base.py``.  Goes by a file's own names,
and does not know the model: which of several pipelines reads such names, the rules' texts say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.runtimes.keys import keys_of
from lorahub.runtimes.runtime import Case, Subject

__all__ = ["DROPPED", "alphas_lost", "blocks_only"]

_UNET = re.compile(
    r"^lora_unet_(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|conv_in|conv_out|out_2|"
    r"time_embed_\d|time_embedding_linear_|label_emb_|add_embedding_)"
)
"""Names of a UNet; kohya's of transformers begin with ``lora_unet_`` too, and are read by other converters."""

_ATTENTION = re.compile(r"_to_(q|k|v|out_0)$")
_LOSES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "lora_unet_": _ATTENTION,
        "lora_te_": re.compile(""),
        "lora_te1_": re.compile(""),
        "lora_te2_": re.compile("_attn_"),
    }
)
"""A part's beginning -> the modules whose own alpha does not reach PEFT under a name that the model has.

Of the first text encoder it is every one: since version 5 of transformers its modules do not begin with ``text_model``.
"""

DROPPED = (
    r"^lora_unet_(add_embedding_|class_embedding_|time_embedding_cond_proj|encoder_hid_proj|"
    r"(down_blocks|mid_block|up_blocks)_.*_add_[qkv]_proj\.)"
)
"""Modules of a UNet whose names come out of its conversion as ones that no module has."""

_BLOCKS = re.compile(r"^lora_transformer_(single_)?transformer_blocks_\d+_")
_TAKEN = re.compile(r"attn_.*(to_q|to_k|to_v|to_out_0|to_add_out|add_[qkv]_proj)\.")
_BESIDE = ("lora_transformer_", "lora_te1_", "lora_unet_")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaled:
    """LoRA factors of a module: their first key, the rank, and the alpha if the file has one."""

    key: str
    rank: int
    alpha: float | None

    @property
    def meant(self) -> float:
        return self.rank if self.alpha is None else self.alpha


def _scaled(subject: Subject, start: str) -> Iterator[_Scaled]:
    for group in subject.reading.groups:
        down, alpha = group.slots.get("down"), group.options.get("alpha")
        if down is None or not down.key.startswith(start) or not down.key.endswith(".lora_down.weight"):
            continue
        stated = float(alpha) if "alpha" in group.slots and isinstance(alpha, int | float) else None
        yield _Scaled(key=down.key, rank=down.shape[0], alpha=stated)


def _defaults(scaled: Iterable[_Scaled]) -> frozenset[float]:
    """The alpha that occurs most, which is that of every module whose own got lost; several where they tie."""
    counts = Counter(each.alpha for each in scaled if each.alpha is not None)
    return frozenset(alpha for alpha, count in counts.items() if count == max(counts.values()))


def alphas_lost(subject: Subject) -> Case | None:
    """Modules that a pipeline with a UNet scales by the commonest alpha of their part, where theirs is another.

    Modules without an alpha, which are meant to be unscaled, get it too as soon as one module of the part has one.
    """
    names = [key for key in keys_of(subject) if key.startswith("lora_unet_")]
    if names and not any(_UNET.match(key) for key in names):
        return None
    where = []
    for start, loses in _LOSES.items():
        scaled = tuple(_scaled(subject, start))
        applied = _defaults(scaled)
        for each in scaled:
            lost = each.alpha is None or loses.search(each.key.removesuffix(".lora_down.weight"))
            if lost and applied and applied != {each.meant}:
                where.append(each.key)
    return Case(where=tuple(where)) if where else None


def blocks_only(subject: Subject) -> Case | None:
    """Keys that fail beside or behind ``lora_transformer_``: read as a whole block, without alpha, of other parts."""
    names = keys_of(subject)
    if not any(key.startswith("lora_transformer_") for key in names):
        return None
    present = frozenset(names)
    where = [key for key in names if _BLOCKS.match(key) and not _TAKEN.search(key)]
    where += [key for key in names if not key.startswith(_BESIDE)]
    where += [
        key
        for key in names
        if key.startswith("lora_transformer_")
        and key.endswith(".lora_down.weight")
        and key.replace(".lora_down.weight", ".alpha") not in present
    ]
    return Case(where=tuple(dict.fromkeys(where))) if where else None
