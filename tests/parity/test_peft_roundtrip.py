"""PEFT writes, lorahub reads and writes, PEFT loads: the same tensors bit for bit, and the same outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from lorahub.adapter import load, open_header, save
from lorahub.findings import Verdict
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model


class Layers(nn.Module):
    """Every layer type PEFT adapts with LoRA, side by side, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.turned = Conv1D(8, 8)
        self.flat = nn.Conv1d(8, 10, 3, padding=1)
        self.square = nn.Conv2d(2, 4, 3, padding=1)
        self.cube = nn.Conv3d(1, 2, 2, padding=1)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.turned(self.first(self.embed(tokens)))
        hidden = self.norm(hidden + self.block(hidden))
        flat = self.flat(hidden.transpose(1, 2))
        return self.head(hidden), flat, self.square(image), self.cube(image[:, :1, None])


def base() -> Layers:
    torch.manual_seed(3)
    return Layers().double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(11, (2, 4), generator=generator)
    return tokens, torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A PEFT config, and what the file must turn out to be."""

    config: PeftConfig
    kinds: tuple[str, ...]
    notes: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    "linear": Case(LoraConfig(r=3, lora_alpha=5, target_modules=["first", "block.0"]), ("lora",)),
    "regex targets": Case(LoraConfig(r=3, target_modules=r"block\.[01]"), ("lora",)),
    "conv1d": Case(LoraConfig(r=2, target_modules=["flat"]), ("lora",)),
    "conv2d": Case(LoraConfig(r=2, target_modules=["square"]), ("lora",)),
    "conv3d": Case(LoraConfig(r=2, target_modules=["cube"]), ("lora",)),
    "embedding": Case(LoraConfig(r=2, target_modules=["embed"]), ("lora",)),
    "transposed": Case(LoraConfig(r=2, target_modules=["turned"], fan_in_fan_out=True), ("lora",)),
    "rslora": Case(LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["first", "embed"]), ("lora",)),
    "patterns": Case(
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["first", "block.0", "block.1", "turned"],
            fan_in_fan_out=True,
            rank_pattern={"block.1": 4, r"^fir.*": 1},
            alpha_pattern={"block": 7, r"block\.1": 0.5, "turned": 11},
        ),
        ("lora",),
    ),
    "lora_bias": Case(LoraConfig(r=2, lora_bias=True, target_modules=["first", "block.0"]), ("lora",)),
    "bias of adapted layers": Case(
        LoraConfig(r=2, target_modules=["first", "block.1"], bias="lora_only"), ("lora", "replace")
    ),
    "bias everywhere": Case(LoraConfig(r=2, target_modules=["first"], bias="all"), ("lora", "replace")),
    "bias everywhere and a head": Case(
        LoraConfig(r=2, target_modules=["first"], bias="all", modules_to_save=["head"]),
        ("lora", "replace"),
        ("modules-to-save-twice", "original-module"),
    ),
    "head": Case(LoraConfig(r=2, target_modules=["first"], modules_to_save=["head", "norm"]), ("lora", "replace")),
    "part of a head": Case(LoraConfig(r=2, target_modules=["first"], modules_to_save=["head.1"]), ("lora", "replace")),
    "dora": Case(LoraConfig(r=2, use_dora=True, target_modules=["first", "block.0"]), ("dora",)),
    "dora of every layer type": Case(
        LoraConfig(
            r=2, use_dora=True, target_modules=["embed", "turned", "flat", "square", "cube"], fan_in_fan_out=True
        ),
        ("dora",),
    ),
    "ia3": Case(IA3Config(target_modules=["first", "block.0"], feedforward_modules=["block.0"]), ("ia3",)),
    "ia3 convolutions": Case(
        IA3Config(target_modules=["first", "square", "cube"], feedforward_modules=["square"]), ("ia3",)
    ),
}


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings (about configs it corrects itself) are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def trained(config: PeftConfig, folder: Path) -> PeftModel:
    """A PEFT model with every trainable number moved, saved to ``folder``."""
    model = quietly(lambda: get_peft_model(base(), config)).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    quietly(lambda: model.save_pretrained(folder))
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_what_peft_writes_is_read_without_doubt_and_written_again_bit_for_bit(
    case: Case, tmp_path: Path, registry: Registry
) -> None:
    live = trained(case.config, tmp_path / "theirs")
    header = open_header(tmp_path / "theirs", registry)

    assert header.kinds == case.kinds
    assert {finding.code for finding in header.findings} == set(case.notes)
    assert all(finding.level is Verdict.EXACT for finding in header.findings)

    save(load(header, registry), tmp_path / "ours", registry=registry)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    noted = {key for finding in header.findings for key in finding.where}
    assert ours.keys() == theirs.keys() - noted
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key

    again = quietly(lambda: PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False))
    with torch.no_grad():
        expected, found, plain = live(*inputs()), again.eval()(*inputs()), base()(*inputs())
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    # ... and the comparison is not one of an adapter that does nothing.
    assert any((one - other).norm() > 1e-2 * other.norm() for one, other in zip(expected, plain, strict=True))


def test_peft_accepts_every_key_and_field_of_what_lorahub_writes(
    case: Case, tmp_path: Path, registry: Registry
) -> None:
    trained(case.config, tmp_path / "theirs")
    save(load(open_header(tmp_path / "theirs", registry), registry), tmp_path / "ours", registry=registry)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False)
    complaints = [
        str(each.message) for each in said if "missing" in str(each.message) or "Unexpected" in str(each.message)
    ]
    assert complaints == []


def test_merging_what_was_read_gives_pefts_merged_weights(case: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(case.config, tmp_path / "theirs")
    adapter = load(open_header(tmp_path / "theirs", registry), registry)
    merged = quietly(live.merge_and_unload).state_dict()
    weights = base().state_dict()
    changed = 0
    for name, weight in weights.items():
        deltas = [delta for target, delta in adapter.deltas.items() if target.name == name]
        turned = name == "turned.weight"
        logical = weight.T if turned else weight
        for delta in deltas:
            value = delta.replacement()
            logical = logical + delta.delta(logical) if value is None else value
            changed += 1
        torch.testing.assert_close(logical.T if turned else logical, merged[name], rtol=1e-12, atol=1e-12)
    present = [target for target in adapter.deltas if target.name in weights]
    assert changed == len(present) > 0


ENCODER = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_labels": 3,
}

MODELS: Mapping[str, tuple[type[PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "bert classifier": (
        BertForSequenceClassification,
        ENCODER,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ),
    "roberta classifier": (
        RobertaForSequenceClassification,
        ENCODER | {"pad_token_id": 1},
        {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "bias": "lora_only"},
    ),
    "gpt2 classifier": (
        GPT2ForSequenceClassification,
        {"vocab_size": 30, "n_embd": 16, "n_head": 2, "n_layer": 2, "num_labels": 3, "pad_token_id": 0},
        {"task_type": "SEQ_CLS", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "llama with a norm kept": (
        LlamaForCausalLM,
        {name: value for name, value in ENCODER.items() if name != "num_labels"} | {"num_key_value_heads": 1},
        {
            "task_type": "CAUSAL_LM",
            "target_modules": r".*\.(q|v)_proj",
            "modules_to_save": ["norm"],
            "use_rslora": True,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_transformers_models_come_back_into_them(name: str, tmp_path: Path, registry: Registry) -> None:
    model_class, fields, settings = MODELS[name]

    def fresh() -> PreTrainedModel:
        torch.manual_seed(11)
        return model_class(model_class.config_class(**fields)).double().eval()

    live = quietly(lambda: get_peft_model(fresh(), LoraConfig(r=2, lora_alpha=3, **settings))).double()
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    quietly(lambda: live.save_pretrained(tmp_path / "theirs"))
    header = open_header(tmp_path / "theirs", registry)
    assert header.findings == ()
    save(load(header, registry), tmp_path / "ours", registry=registry)

    again = quietly(lambda: PeftModel.from_pretrained(fresh(), tmp_path / "ours", autocast_adapter_dtype=False))
    tokens = torch.randint(2, 30, (2, 7), generator=generator)
    with torch.no_grad():
        expected, found, plain = (each.eval()(tokens).logits for each in (live, again, fresh()))
    assert torch.equal(expected, found)
    assert (expected - plain).norm() > 1e-2 * plain.norm()


def test_embeddings_among_the_targets_come_back_without_the_copies_peft_adds(
    tmp_path: Path, registry: Registry
) -> None:
    model_class, fields, _ = MODELS["llama with a norm kept"]

    def fresh() -> PreTrainedModel:
        torch.manual_seed(11)
        return model_class(model_class.config_class(**fields)).double().eval()

    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["embed_tokens", "lm_head", "q_proj"])
    live = quietly(lambda: get_peft_model(fresh(), config)).double().eval()
    quietly(lambda: live.save_pretrained(tmp_path / "theirs"))
    header = open_header(tmp_path / "theirs", registry)
    (finding,) = header.findings
    assert (finding.code, finding.level) == ("embedding-included", Verdict.UNVERIFIED)
    assert [key.rpartition("model.")[2] for key in finding.where] == [
        "lm_head.base_layer.weight",
        "embed_tokens.base_layer.weight",
    ]

    save(load(header, registry), tmp_path / "ours", registry=registry)
    assert open_header(tmp_path / "ours", registry).findings == ()
    again = quietly(lambda: PeftModel.from_pretrained(fresh(), tmp_path / "ours", autocast_adapter_dtype=False))
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, again.eval()(tokens).logits)
