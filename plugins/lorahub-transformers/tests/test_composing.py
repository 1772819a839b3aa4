"""Composing adapters as PEFT writes them, held against PEFT's own merge of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorahub

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Saving config file.*:UserWarning"),
]


def deltas(model: Callable[[], Any], folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT changes in float64 when it merges an adapter."""
    before = {name: value.detach().double() for name, value in model().double().named_parameters()}
    merged = peft.PeftModel.from_pretrained(model().double(), folder, autocast_adapter_dtype=False).merge_and_unload()
    return {name: value.detach() - before[name] for name, value in merged.named_parameters()}


def trained(model: Callable[[], Any], folder: Path, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model(), config)
    generator = torch.Generator().manual_seed(seed)
    for value in wrapped.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


CONFIGS = {
    "tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 7]),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=3, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_looks_at_the_weight_adds_as_it_changes_the_base(
    tiny: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    def model() -> Any:
        return tiny("llama", "LlamaForCausalLM")

    model().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=4)
    folders = [trained(model, tmp_path / "lora", lora, 1), trained(model, tmp_path / "other", CONFIGS[kind](), 2)]
    lorahub.compose(
        folders, weights=[0.7, -0.4], non_additive="dense", rank=64, base=str(tmp_path / "base"), out=tmp_path / "mix"
    )
    first, second, found = (deltas(model, folder) for folder in (*folders, tmp_path / "mix"))
    wanted = {name: 0.7 * first[name] - 0.4 * second[name] for name in first}
    changed = [name for name in wanted if float(second[name].norm()) > 1e-2]
    assert changed
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 1e-4 * max(1.0, float(value.norm())), name
        if name in changed:
            assert float((found[name] - 0.7 * first[name]).norm()) > 1e-2 * float(value.norm()), name
