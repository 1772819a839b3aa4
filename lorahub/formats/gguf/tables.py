"""What llama.cpp's converter does to the models it knows: their architecture's name, and which rows it moves.

Facts of llama.cpp's ``convert_hf_to_gguf.py``.  An architecture that is not listed may move, join or turn tensors in
ways of its own, so nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas.kind import Leaf
from lorahub.formats.suffixes import Row

__all__ = [
    "ALPHA",
    "ARCHITECTURE",
    "EMBEDDING",
    "EXACT_ALPHA",
    "EXPERTS",
    "FILE",
    "LINEAR",
    "MODELS",
    "PAIRED",
    "ROTATED",
    "TOKENS",
    "TYPE",
]

FILE = "adapter.gguf"

ARCHITECTURE, TYPE = "general.architecture", "general.type"
ALPHA = "adapter.lora.alpha"
EXACT_ALPHA = "lorahub.lora.alpha"
"""Alpha in double precision, where the one that llama.cpp reads is its rounding to single precision."""

TOKENS = "token_embd"
"""The one module whose factors llama.cpp wants the other way round."""

LINEAR = (
    Row(kind="lora", leaves=(Leaf(slot="down", suffix="weight.lora_a"), Leaf(slot="up", suffix="weight.lora_b"))),
)
EMBEDDING = (
    Row(
        kind="lora",
        leaves=(
            Leaf(slot="up", suffix="weight.lora_a", role="embedding"),
            Leaf(slot="down", suffix="weight.lora_b", transposed=True, role="embedding"),
        ),
    ),
)

EXPERTS = (
    Row(
        kind="expert-lora",
        leaves=LINEAR[0].leaves,
        options={"transposed": None},  # which way round the base has them, only the base knows
    ),
)

PAIRED: Mapping[str, bool] = MappingProxyType(
    {
        "arcee": True,
        "granite": True,
        "granitemoe": True,
        "llama": True,
        "olmo": True,
        "smollm3": True,
        "cohere2": False,
        "command-r": False,
        "gemma": False,
        "gemma2": False,
        "gemma3": False,
        "olmo2": False,
        "phi2": False,
        "phi3": False,
        "qwen2": False,
        "qwen2moe": False,
        "qwen3": False,
        "qwen3moe": False,
        "stablelm": False,
        "starcoder2": False,
    }
)
"""Architecture -> whether the rows of queries and keys are stored in pairs (see ``lorahub.formats.rope``)."""

ROTATED: Mapping[str, int] = MappingProxyType({"attn_q": 0, "attn_k": 1})
"""The last part of a tensor's name -> which count of heads it has."""

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "arcee": "arcee",
        "cohere": "command-r",
        "cohere2": "cohere2",
        "gemma": "gemma",
        "gemma2": "gemma2",
        "gemma3": "gemma3",
        "gemma3_text": "gemma3",
        "granite": "granite",
        "granitemoe": "granitemoe",
        "llama": "llama",
        "mistral": "llama",
        "mixtral": "llama",
        "olmo": "olmo",
        "olmo2": "olmo2",
        "phi": "phi2",
        "phi3": "phi3",
        "qwen2": "qwen2",
        "qwen2_moe": "qwen2moe",
        "qwen3": "qwen3",
        "qwen3_moe": "qwen3moe",
        "smollm3": "smollm3",
        "stablelm": "stablelm",
        "starcoder2": "starcoder2",
    }
)
"""``model_type`` of a base's config -> architecture."""
