"""How diffusers spells LoRA and DoRA: the suffixes of every release, and what PEFT's ``LoraConfig`` says of them.

Tables and the arithmetic of scales.  Knows neither files nor how modules are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas import peft_lora
from lorahub.deltas.kind import JSON, Leaf, Spelling, TensorRef
from lorahub.formats.flat_spellings import dora_axis

__all__ = ["FORMAT", "PAIRS", "SPELLINGS"]

FORMAT = "diffusers"


def _lora(numbers: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    stated = {"lora_bias": "bias" in slots, "use_dora": False, **numbers}
    return _ruled(peft_lora.lora_options(_with_alpha(stated, slots), module, slots), stated)


def _dora(numbers: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    stated = {"use_dora": True, **numbers}
    options = _ruled(peft_lora.dora_options(_with_alpha(stated, slots), module, slots), stated)
    return {**options, "axis": dora_axis(slots)} if slots["magnitude"].key.endswith("dora_scale") else options


def _with_alpha(numbers: Mapping[str, JSON], slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The numbers with an alpha that makes the scale 1 where nothing states one; so do rank and rule."""
    if numbers.get("lora_alpha") is not None:
        return dict(numbers)
    rank = slots["down"].shape[0] if slots["down"].shape else 0
    return {**numbers, "lora_alpha": float(rank), "use_rslora": False}


def _ruled(options: dict[str, JSON], numbers: Mapping[str, JSON]) -> dict[str, JSON]:
    return options if numbers.get("lora_alpha") is not None else {**options, "scale_rule": "default"}


PAIRS = tuple(
    Leaf(slot=slot, suffix=f"{before}{name}.weight")
    for before, names in (
        ("", {"down": "lora_A", "up": "lora_B"}),
        ("lora.", {"down": "down", "up": "up"}),
        ("lora_linear_layer.", {"down": "down", "up": "up"}),
    )
    for slot, name in names.items()
)
"""The spelling that is written comes first."""

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale")

SPELLINGS: Mapping[str, Spelling] = MappingProxyType(
    {
        "lora": Spelling(
            format=FORMAT,
            tag="LORA",
            leaves=(*PAIRS, Leaf(slot="bias", suffix="lora_B.bias")),
            fields=peft_lora.FIELDS,
            options=_lora,
            config=peft_lora.config,
        ),
        "dora": Spelling(
            format=FORMAT,
            tag="LORA",
            leaves=(*PAIRS, *(Leaf(slot="magnitude", suffix=suffix) for suffix in _MAGNITUDES)),
            fields=peft_lora.FIELDS,
            options=_dora,
            config=peft_lora.config,
        ),
    }
)
"""Kind -> its spelling; ``options`` and ``config`` deal in the fields of PEFT's ``LoraConfig``."""
