"""PEFT adapters converted to PEFT's layout with their base named: PEFT applies what comes out as what went in."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import lorahub

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # they name parameters
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

TOKENS = torch.tensor([[3, 17, 41, 5, 29, 8]])
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tied() -> transformers.PreTrainedModel:
    config = transformers.GemmaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True)
    return transformers.GemmaForCausalLM(config)


def experts() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **SMALL, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


HEAD = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
STACKS = peft.LoraConfig(
    r=4,
    target_modules=["q_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    rank_pattern={"experts.down_proj": 2},
)


@pytest.mark.parametrize(
    ("build", "config"), [(tied, HEAD), (experts, STACKS)], ids=["tied head", "stacks of two ranks"]
)
def test_peft_applies_what_comes_out(build, config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    kind = type(build())

    def base() -> torch.nn.Module:
        return kind.from_pretrained(tmp_path / "base").eval()

    wrapped = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorahub.convert(tmp_path / "adapter", "peft", tmp_path / "again", base=tmp_path / "base")
    with torch.no_grad():
        expected = wrapped(TOKENS).logits
        found = peft.PeftModel.from_pretrained(base(), tmp_path / "again")(TOKENS).logits
        assert (expected - base()(TOKENS).logits).abs().max() > 0.1
    assert torch.equal(found, expected)
