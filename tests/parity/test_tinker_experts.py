"""Tinker's stacks of experts merged into transformers' own mixtures, against loops over experts in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorahub
from lorahub.files.writer import save_file

E, R, HIDDEN, INNER, WORDS, SCALE = 3, 2, 16, 8, 30, 2.0
SHARED: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 1,
}
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"

Tensors = dict[str, torch.Tensor]


def qwen() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SHARED, moe_intermediate_size=INNER, num_experts=E, mlp_only_layers=[])
    return transformers.Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> Any:
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHARED, intermediate_size=INNER, num_local_experts=E)
    ).eval()


def adapter(folder: Path, attention: str) -> Tensors:
    """Written as Tinker writes it: of the gates and ups one input side, of the downs one output side, for all."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        f"{LAYER}.{attention}.q_proj": ((R, HIDDEN), (16, R)),
        f"{EXPERTS}.w1": ((1, R, HIDDEN), (E, INNER, R)),
        f"{EXPERTS}.w3": ((1, R, HIDDEN), (E, INNER, R)),
        f"{EXPERTS}.w2": ((E, R, INNER), (1, HIDDEN, R)),
        "model.unembed_tokens": ((R, HIDDEN), (WORDS, R)),
    }
    tensors = {}
    for stem, (down, up) in shapes.items():
        tensors[f"base_model.model.{stem}.lora_A.weight"] = torch.randn(down, generator=generator)
        tensors[f"base_model.model.{stem}.lora_B.weight"] = torch.randn(up, generator=generator)
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": SCALE * R, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def change(tensors: Tensors, stem: str, expert: int | None = None) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{stem}.lora_{which}.weight"].double() for which in "AB")
    if expert is not None:
        a, b = a[expert % len(a)], b[expert % len(b)]
    return SCALE * b @ a


def place_stacked(weights: Tensors, tensors: Tensors, expert: int) -> None:
    """transformers' ``gate, up = linear(x, gate_up_proj[expert]).chunk(2)``."""
    fused = weights[f"{EXPERTS}.gate_up_proj"][expert]
    fused[:INNER] += change(tensors, f"{EXPERTS}.w1", expert)
    fused[INNER:] += change(tensors, f"{EXPERTS}.w3", expert)
    weights[f"{EXPERTS}.down_proj"][expert] += change(tensors, f"{EXPERTS}.w2", expert)


def place_woven(weights: Tensors, tensors: Tensors, expert: int) -> None:
    """GPT-OSS's ``gate, up = (x @ gate_up_proj[expert])[..., ::2], (...)[..., 1::2]``."""
    fused = weights[f"{EXPERTS}.gate_up_proj"][expert]
    fused[:, ::2] += change(tensors, f"{EXPERTS}.w1", expert).T
    fused[:, 1::2] += change(tensors, f"{EXPERTS}.w3", expert).T
    weights[f"{EXPERTS}.down_proj"][expert] += change(tensors, f"{EXPERTS}.w2", expert).T


CASES: dict[str, tuple[Callable[[], Any], str, Callable[[Tensors, Tensors, int], None]]] = {
    "qwen3_moe": (qwen, "self_attn", place_stacked),
    "gpt_oss": (gpt_oss, "attn", place_woven),
}


@pytest.mark.plugin("transformers")
@pytest.mark.parametrize("name", CASES)
def test_every_expert_of_a_live_model_gets_its_own_change(name: str, tmp_path: Path) -> None:
    build, attention, place = CASES[name]
    model, tensors = build(), adapter(tmp_path / "a", attention)
    before = {key: value.double().clone() for key, value in model.state_dict().items()}
    expected = {key: value.clone() for key, value in before.items()}
    for expert in range(E):
        place(expected, tensors, expert)
    expected[f"{LAYER}.self_attn.q_proj.weight"] += change(tensors, f"{LAYER}.{attention}.q_proj")
    expected["lm_head.weight"] += change(tensors, "model.unembed_tokens")
    lorahub.merge(model, {"a": lorahub.load(tmp_path / "a")})
    after = {key: value.double() for key, value in model.state_dict().items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        f"{EXPERTS}.gate_up_proj",
        f"{EXPERTS}.down_proj",
        f"{LAYER}.self_attn.q_proj.weight",
        "lm_head.weight",
    }
    for key in changed:
        assert (expected[key] - before[key]).norm() > 1e-2 * before[key].norm()
        torch.testing.assert_close(after[key], expected[key], rtol=1e-6, atol=2e-6)


def test_a_checkpoint_that_keeps_experts_one_by_one_gets_the_same(tmp_path: Path) -> None:
    model, tensors = qwen(), adapter(tmp_path / "a", "self_attn")
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert f"{EXPERTS}.0.gate_proj.weight" in before
    lorahub.merge(tmp_path / "base", {"a": lorahub.load(tmp_path / "a")}, out=tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for expert in range(E):
        for stem, projection in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            key = f"{EXPERTS}.{expert}.{projection}.weight"
            expected = before[key].double() + change(tensors, f"{EXPERTS}.{stem}", expert)
            assert (expected - before[key]).norm() > 1e-2 * before[key].norm()
            torch.testing.assert_close(after[key].double(), expected, rtol=1e-6, atol=2e-6)
