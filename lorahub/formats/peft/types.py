"""The adapter types PEFT names in ``peft_type``: what each is, and why some are no weight change.

Names and reasons only.  Which of the weight changes can be read here is for the registered kinds to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.deltas.kind import JSON

__all__ = ["BY_FIELD", "TYPES", "PeftType", "type_of"]


@dataclass(frozen=True, slots=True)
class PeftType:
    """One value of ``peft_type``.

    Attributes:
        title: how people write it.
        part: what an adapter of this type carries instead of a weight change ("prompt-tuning"), or "" where it is one.
        reason: why that cannot be merged, as a sentence; or what is special about a weight change of this type.
        live: a framework's plugin attaches such a part to its models.
    """

    title: str
    part: str = ""
    reason: str = ""
    live: bool = False


_PROMPT = "it puts trained vectors before the input and changes no weight"
_PREFIX = "it puts trained keys and values before every attention layer's own and changes no weight"
_ROUTED = "which of its factors act depends on the input, so no one weight can stand for it"

TYPES: Mapping[str, PeftType] = MappingProxyType(
    {
        "PROMPT_TUNING": PeftType("prompt tuning", "prompt-tuning", _PROMPT, live=True),
        "MULTITASK_PROMPT_TUNING": PeftType("multitask prompt tuning", "multitask-prompt-tuning", _PROMPT, live=True),
        "P_TUNING": PeftType("P-tuning", "p-tuning", _PROMPT, live=True),
        "CPT": PeftType("context-aware prompt tuning", "cpt", _PROMPT),
        "PREFIX_TUNING": PeftType("prefix tuning", "prefix-tuning", _PREFIX, live=True),
        "CARTRIDGE": PeftType("Cartridges", "cartridge", _PREFIX),
        "ADAPTION_PROMPT": PeftType(
            "LLaMA-Adapter",
            "adaption-prompt",
            "it adds gated attention over trained prompts inside the layers and changes no weight",
        ),
        "POLY": PeftType("Poly", "poly", _ROUTED),
        "XLORA": PeftType("X-LoRA", "xlora", _ROUTED),
        "LILY": PeftType("Lily", "lily", _ROUTED),
        "SHADOW": PeftType(
            "ShadowPEFT", "shadow", "it runs a second, smaller network beside the base and changes no weight"
        ),
        "LORA": PeftType("LoRA"),
        "ADALORA": PeftType("AdaLoRA"),
        "ADAMSS": PeftType(
            "AdaMSS",
            reason="its factors act in groups of the base's singular directions that scikit-learn's KMeans put together"
            " from a random start, and the groups are not in the file",
        ),
        "BOFT": PeftType("BOFT"),
        "IA3": PeftType("IA3"),
        "BEFT": PeftType("BEFT"),
        "LOHA": PeftType("LoHa"),
        "LOKR": PeftType("LoKr"),
        "OFT": PeftType("OFT"),
        "LN_TUNING": PeftType("LN tuning"),
        "VERA": PeftType("VeRA"),
        "PVERA": PeftType("PVeRA"),
        "FROD": PeftType("FRoD"),
        "FOURIERFT": PeftType("FourierFT"),
        "GLORA": PeftType("GLoRA"),
        "HRA": PeftType("HRA"),
        "VBLORA": PeftType("VB-LoRA"),
        "UNILORA": PeftType("Uni-LoRA"),
        "MISS": PeftType("MiSS"),
        "RANDLORA": PeftType("RandLoRA"),
        "ROAD": PeftType("RoAd"),
        "TRAINABLE_TOKENS": PeftType("trainable tokens"),
        "HIRA": PeftType("HiRA"),
        "SHIRA": PeftType("SHiRA"),
        "C3A": PeftType("C3A"),
        "WAVEFT": PeftType("WaveFT"),
        "OSF": PeftType("OSF"),
        "DELORA": PeftType("DeLoRA"),
        "GRALORA": PeftType("GraLoRA"),
        "TINYLORA": PeftType("TinyLoRA"),
        "PSOFT": PeftType("PSOFT"),
        "PEANUT": PeftType("PEANuT"),
        "SUPERTUNING": PeftType("SuperTuning"),
        "DEFT": PeftType("DEFT"),
        "BONE": PeftType(
            "Bone",
            reason="PEFT replaced this type by MiSS (peft_type MISS), which computes the same change, with init_weights"
            " 'bat' where Bone's was 'bat', from tensors called miss_block instead of bone_block",
        ),
    }
)
"""Every type of PEFT 0.21.2, and BONE, which earlier releases wrote."""

BY_FIELD: Mapping[str, PeftType] = MappingProxyType(
    {
        "alora_invocation_tokens": PeftType(
            "aLoRA", "alora", "it acts only on tokens after an invocation string, which no change of weights can do"
        ),
        "arrow_config": PeftType("Arrow", "arrow", _ROUTED),
    }
)
"""Fields of a ``LORA`` config that make something else of its factors, where they are set."""


def type_of(tag: str, config: Mapping[str, JSON]) -> PeftType | None:
    """What an adapter is by its ``peft_type`` and the fields that change its meaning; None where nobody knows."""
    changed = (about for name, about in BY_FIELD.items() if tag == "LORA" and config.get(name))
    return next(changed, TYPES.get(tag))
