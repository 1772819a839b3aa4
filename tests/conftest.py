"""Small real models, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model("gpt2", n_layer=1)``: a small real model of that architecture, the same each time."""
    import torch
    import transformers

    def build(family: str, *, seed: int = 0, **config: object) -> PreTrainedModel:
        name, fields = TINY[family]
        torch.manual_seed(seed)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**fields | config)).eval()

    return build


_ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _ENCODER),
    "roberta": ("RobertaModel", _ENCODER),
    "distilbert": ("DistilBertModel", {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", _ENCODER),
    "llama": ("LlamaForCausalLM", _ENCODER | {"num_key_value_heads": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2},
    ),
    "vit": ("ViTModel", {k: v for k, v in _ENCODER.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}),
}
"""Architecture -> (class, config)."""
