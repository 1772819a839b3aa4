"""QLoRA: adapters on models that transformers loads in quantised form, live and merged, next to PEFT."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers

import lorahub
from lorahub.errors import Degraded, UnsupportedFormat
from lorahub.storages.storage import held_in
from lorahub_transformers import Transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]

MODELS = {"llama": ("LlamaForCausalLM", "all-linear"), "gpt2": ("GPT2LMHeadModel", ["c_attn", "c_fc"])}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 64},
}


def settings(how: str) -> Any:
    if how == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


ON_DISK = [("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4"), ("gpt2", "fp4")]


@pytest.fixture(params=[*ON_DISK, ("llama", "torchao")])
def case(request, tiny, saved, tmp_path):
    """(folder of the 16-bit base, what loads it quantised, folder of an adapter, its largest relative change)."""
    kind, how = request.param
    name, targets = MODELS[kind]
    model = tiny(kind, name, dtype=torch.bfloat16, **SIZES[kind])
    base = saved(model)

    def load():
        return getattr(transformers, name).from_pretrained(
            base, quantization_config=settings(how), dtype=torch.bfloat16, device_map="cpu"
        )

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in tuned.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    return base, load, tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits.double()


def test_the_quantised_model_has_the_index_of_the_base(case):
    base, load, _ = case
    framework = Transformers()
    plain = lorahub.open_base(base).index
    index = lorahub.open_base(load()).index
    assert index.framework == framework.name
    assert set(index.parameters) == set(plain.parameters)
    stored = {name for name, info in index.parameters.items() if info.storage}
    assert stored
    for name, info in index.parameters.items():
        shape = plain.parameters[name].shape
        turned = plain.parameters[name].transposed and name in stored  # a Conv1D that was replaced
        assert info.shape == (shape[::-1] if turned else shape)
        assert info.transposed == (plain.parameters[name].transposed and name not in stored)


def test_live_it_computes_what_peft_computes(case):
    _, load, folder = case
    model = load()
    plain = logits(model)
    expected = logits(peft.PeftModel.from_pretrained(load(), folder).eval())
    with lorahub.attach(model, [folder]) as live:
        found = logits(model)
        assert not any(live.coverage().values())
    assert (expected - plain).norm() / plain.norm() > 0.05
    assert (found - expected).norm() / (expected - plain).norm() < 0.05
    assert torch.equal(logits(model), plain)


def test_merged_it_computes_about_the_same_and_comes_back_to_the_bit(case):
    _, load, folder = case
    model = load()
    plain = logits(model)
    with lorahub.attach(model, [folder]):
        live = logits(model)
    if any(one.bits < 8 for one in held_in(model).values()):
        with pytest.raises(Degraded, match=r"keeps \d+\.\d% of the change"):
            lorahub.merge(model, [folder])
    merged = lorahub.merge(model, [folder], allow=["quantised-merge"])
    found = logits(model)
    assert (found - live).norm() / (live - plain).norm() < 0.6
    merged.undo()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("case", ON_DISK, indirect=True)
def test_a_quantised_checkpoint_is_refused_with_both_ways_on(case, tmp_path):
    _, load, folder = case
    model = load()
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(UnsupportedFormat, match="quantised") as refused:
        lorahub.plan(tmp_path / "quantised", [folder])
    assert "lorahub dequantise" in refused.value.hint
    done = lorahub.dequantise(tmp_path / "quantised", tmp_path / "plain")
    assert done.weights == len(held_in(model))
    report = lorahub.merge(tmp_path / "plain", [folder], out=tmp_path / "merged")
    assert report.changed
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    with lorahub.attach(model, [folder]):
        live = logits(model)
    plain = logits(model)
    assert (logits(again) - live).norm() / (live - plain).norm() < 0.15
