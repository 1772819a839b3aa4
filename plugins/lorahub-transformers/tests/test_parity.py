"""PEFT trains and saves, lorahub merges from the files: the weights equal what PEFT itself merges, for every family.

References are PEFT's own ``merge_and_unload`` and, for 16-bit storage, a float64 sum rounded once.
"""

from __future__ import annotations

import copy
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
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]

Tiny = Callable[..., Any]

FAMILIES: dict[str, tuple[str, list[str], str]] = {
    # model type -> (class, attention modules, feed-forward module)
    "bert": ("BertForSequenceClassification", ["query", "value"], "output.dense"),
    "roberta": ("RobertaForSequenceClassification", ["query", "key", "value"], "intermediate.dense"),
    "distilbert": ("DistilBertForSequenceClassification", ["q_lin", "v_lin"], "lin1"),
    "gpt2": ("GPT2LMHeadModel", ["c_attn", "c_proj"], "c_fc"),
    "gpt_neox": ("GPTNeoXForCausalLM", ["query_key_value"], "dense_h_to_4h"),
    "llama": ("LlamaForCausalLM", ["q_proj", "k_proj", "v_proj", "o_proj"], "down_proj"),
    "t5": ("T5ForConditionalGeneration", ["q", "v"], "wo"),
    "vit": ("ViTForImageClassification", ["q_proj", "v_proj"], "fc1"),
}


def lora(attention: list[str], feed_forward: str, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=12, target_modules=[*attention, feed_forward], **more)


VARIANTS: dict[str, Callable[[list[str], str], Any]] = {
    "lora": lora,
    "rslora with patterns": lambda attention, ff: lora(
        attention, ff, use_rslora=True, rank_pattern={attention[0]: 6}, alpha_pattern={attention[0]: 5}
    ),
    "dora": lambda attention, ff: lora(attention, ff, use_dora=True),
    "trained biases": lambda attention, ff: lora(attention, ff, bias="lora_only"),
    "ia3": lambda attention, ff: peft.IA3Config(target_modules=[*attention, ff], feedforward_modules=[ff]),
}


def disturb(model: Any, seed: int = 3) -> None:
    """Fill every trainable parameter with noise, so that nothing an adapter holds is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                scale = 0.3 if "magnitude" not in name and "ia3" not in name else 0.1
                parameter.add_(noise.to(parameter.dtype) * scale)


def trained(model: Any, config: Any, folder: Path) -> None:
    wrapped = peft.get_peft_model(model, config)
    disturb(wrapped)
    wrapped.save_pretrained(folder)


def peft_merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_equal_pefts(family: str, variant: str, tiny: Tiny, tmp_path: Path) -> None:
    name, attention, feed_forward = FAMILIES[family]
    base = tiny(family, name)
    trained(copy.deepcopy(base), VARIANTS[variant](attention, feed_forward), tmp_path / "adapter")
    reference = peft_merged(copy.deepcopy(base), tmp_path / "adapter")

    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    merged = lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    after = base.state_dict()
    changes = {
        key: float((after[key] - before[key]).norm() / before[key].norm())
        for key in before
        if not torch.equal(after[key], before[key]) and before[key].norm() > 0
    }
    assert max(changes.values()) > 1e-2
    assert merged.report.changed >= len(changes) > 0
    for key, tensor in after.items():
        torch.testing.assert_close(
            tensor, reference[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )

    merged.undo()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_in_memory_bit_for_bit(
    family: str, variant: str, tiny: Tiny, saved: Callable[..., Path], tmp_path: Path
) -> None:
    name, attention, feed_forward = FAMILIES[family]
    base = tiny(family, name, dtype=torch.bfloat16)
    folder = saved(base, max_shard_size="20KB")
    trained(copy.deepcopy(base), VARIANTS[variant](attention, feed_forward), tmp_path / "adapter")

    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    reloaded = type(base).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    streamed, live = reloaded.state_dict(), base.state_dict()
    assert streamed.keys() == live.keys()
    assert all(torch.equal(streamed[key], live[key]) for key in live)
    untouched = type(base).from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(untouched[key], live[key]) for key in live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_merges_are_the_float64_sum_rounded_once(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama", "LlamaForCausalLM", hidden_size=128, intermediate_size=256, dtype=dtype)
    trained(copy.deepcopy(base), lora(["q_proj", "v_proj"], "down_proj"), tmp_path / "adapter")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    loaded = lorahub.load(tmp_path / "adapter")
    lorahub.merge(base, {"adapter": loaded})
    after = base.state_dict()
    compared = 0
    for target, delta in loaded.deltas.items():
        low = delta.low_rank()
        assert low is not None
        weight = before[target.name].double()
        exact = weight.clone()
        for k in range(low.up.shape[1]):  # a float64 loop over rank one updates
            exact += low.scale * torch.outer(low.up[:, k].double(), low.down[k].double())
        change = exact - weight
        assert change.norm() / weight.norm() > 1e-2
        # PyTorch takes float64 to float16 by way of float32, and rounds twice; NumPy rounds once
        half = torch.from_numpy(exact.numpy().astype("float16"))
        expected = half if dtype == torch.float16 else exact.to(dtype)
        same = (after[target.name] == expected).double().mean()
        assert same >= 0.9999, f"{target.name}: {same:.6f} equal"
        ulp = torch.finfo(dtype).eps * torch.maximum(weight.abs(), exact.abs())
        assert ((after[target.name].double() - exact).abs() <= ulp).all()
        compared += 1
    assert compared == 6


def test_two_adapters_add_up_in_one_pass(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("gpt2", "GPT2LMHeadModel")
    for seed, name in enumerate(("one", "two")):
        wrapped = peft.get_peft_model(copy.deepcopy(base), lora(["c_attn"], "c_fc"))
        disturb(wrapped, seed=seed)
        wrapped.save_pretrained(tmp_path / name)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    alone = {}
    for name in ("one", "two"):
        with lorahub.merge(base, {name: tmp_path / name}):
            alone[name] = {key: tensor - before[key] for key, tensor in base.state_dict().items()}
    lorahub.merge(base, {"one": tmp_path / "one", "two": tmp_path / "two"}, weights=[0.5, -0.25])
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(
            tensor, before[key] + 0.5 * alone["one"][key] - 0.25 * alone["two"][key], atol=1e-5, rtol=1e-4
        )
    assert max(float(change.norm()) for change in alone["one"].values()) > 1e-2
