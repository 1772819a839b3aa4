"""Suffixes behind dotted names: those of LoRA and DoRA in every release of diffusers, and LyCORIS's for other kinds.

What PEFT's ``LoraConfig`` says of the first two, where a header has one, decides their scale.  Tables and the
arithmetic of scales.  Knows neither files nor how modules are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas import peft_lora
from lorahub.deltas.kind import JSON, Group, Leaf, Spelling, TensorRef
from lorahub.formats.flat_spellings import SPELLINGS as FLAT
from lorahub.formats.flat_spellings import dora_axis

__all__ = ["EVERY", "FORMAT", "PAIRS", "SPELLINGS"]

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
    """The options with the rule that gave the scale, which a trained scalar multiplies."""
    said = options if numbers.get("lora_alpha") is not None else {**options, "scale_rule": "default"}
    scalar, scale = numbers.get("scalar"), said["scale"]
    if not isinstance(scalar, int | float) or not isinstance(scale, int | float):
        return said
    return {**said, "scale": scale * scalar, "scale_rule": f"{said['scale_rule']} * scalar"}


PAIRS = tuple(
    Leaf(slot=slot, suffix=f"{before}{name}.weight")
    for before, names in (
        ("", {"down": "lora_A", "up": "lora_B"}),
        ("", {"down": "lora_down", "up": "lora_up"}),
        ("lora.", {"down": "down", "up": "up"}),
        ("lora_linear_layer.", {"down": "down", "up": "up"}),
    )
    for slot, name in names.items()
)
"""The spelling that is written comes first."""

_EMBEDDINGS = tuple(leaf for leaf in peft_lora.LEAVES if leaf.role)
_BIAS = (Leaf(slot="bias", suffix="lora_B.bias"), Leaf(slot="bias", suffix="lora_up.bias"))
_MAGNITUDES = tuple(
    Leaf(slot="magnitude", suffix=suffix)
    for suffix in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale")
)

SPELLINGS: Mapping[str, Spelling] = MappingProxyType(
    {
        "lora": Spelling(
            format=FORMAT,
            tag="LORA",
            leaves=(*PAIRS, *_EMBEDDINGS, *_BIAS),
            fields=peft_lora.FIELDS,
            options=_lora,
            config=peft_lora.config,
        ),
        "dora": Spelling(
            format=FORMAT,
            tag="LORA",
            leaves=(*PAIRS, *_EMBEDDINGS, *_MAGNITUDES),
            fields=peft_lora.FIELDS,
            options=_dora,
            config=peft_lora.config,
        ),
    }
)
"""Kind -> its spelling; ``options`` and ``config`` deal in the fields of PEFT's ``LoraConfig``."""


def _nothing(_numbers: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {}


def _unwritten(_groups: Mapping[str, Group]) -> dict[str, JSON]:
    return {}


_VALUE = Spelling(
    format=FORMAT,
    tag="",
    leaves=(Leaf(slot="value", suffix="set_weight"),),
    options=_nothing,
    config=_unwritten,
)

EVERY: Mapping[str, Spelling] = MappingProxyType({**FLAT, **SPELLINGS, "replace": _VALUE})
"""Kind -> how it is spelled behind dotted names, by whatever tool: all but LoRA and DoRA as LyCORIS has it."""
