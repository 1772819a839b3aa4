"""From a trained folder to a checkpoint that plain transformers loads: heads, tokenizers, ties, shards, names."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

import lorahub
from lorahub.cli.main import main
from lorahub.errors import BaseMismatch, Degraded

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    # peft tells that it saves, or would part, tied weights; that is what these tests are about
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

Tiny = Callable[..., Any]
Saved = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


def adapt(model: Any, folder: Path, **config: Any) -> Path:
    """A PEFT LoRA folder with factors that change something."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save.default" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def test_a_head_that_the_base_lacks_is_created_and_loads(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    bare = saved(tiny("bert", "BertModel"))
    classifier = transformers.BertForSequenceClassification.from_pretrained(bare, num_labels=3)
    adapter = adapt(classifier, tmp_path / "adapter", target_modules=["query", "value"], task_type="SEQ_CLS")
    report = lorahub.merge(bare, {"adapter": adapter}, out=tmp_path / "out")
    assert report.created == ("classifier.bias", "classifier.weight")
    # the model with a head spells the encoder's parameters behind its prefix
    assert names(tmp_path / "out") == {f"bert.{name}" for name in names(bare)} | set(report.created)

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(model) is transformers.BertForSequenceClassification
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {"input_ids": torch.arange(10)[None]}
    with torch.no_grad():
        reference = peft.PeftModel.from_pretrained(classifier, adapter).eval()(**inputs).logits
        untouched = transformers.BertModel.from_pretrained(bare).eval()(**inputs).last_hidden_state
        merged = model.eval()(**inputs, output_hidden_states=True)
    torch.testing.assert_close(merged.logits, reference, atol=1e-5, rtol=1e-4)
    assert (merged.hidden_states[-1] - untouched).norm() / untouched.norm() > 1e-2


def test_shards_stay_as_they_are(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("llama", "LlamaForCausalLM")
    base = saved(model, max_shard_size="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    adapter = adapt(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == index["weight_map"]
    )
    assert len(set(index["weight_map"].values())) == 2


def test_the_adapters_tokenizer_wins_unless_the_bases_is_asked_for(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    base = saved(model)
    (base / "tokenizer_config.json").write_text('{"from": "base"}')
    (base / "merges.txt").write_text("of the base")
    adapter = adapt(model, tmp_path / "adapter", target_modules=["c_attn"])
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "mine") == 0
    assert json.loads((tmp_path / "mine" / "tokenizer_config.json").read_text()) == {"from": "adapter"}
    assert (tmp_path / "mine" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "mine" / "merges.txt").read_text() == "of the base"
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "theirs", "--tokenizer", "base") == 0
    assert json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text()) == {"from": "base"}
    assert not (tmp_path / "theirs" / "chat_template.jinja").exists()
    assert not (tmp_path / "mine" / "README.md").exists()


def test_one_of_two_tied_parameters_is_parted_only_knowingly(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    base = saved(model)
    adapter = adapt(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(Degraded) as refused:
        lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out")
    codes = {finding.code for finding in refused.value.findings}
    assert "tied-parameter" in codes
    assert not (tmp_path / "out").exists()
    lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out", allow=codes)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    embedding, head = merged.transformer.wte.weight, merged.lm_head.weight
    assert torch.equal(embedding, model.transformer.wte.weight)
    assert (head - embedding).norm() / embedding.norm() > 1e-2


@pytest.mark.parametrize(
    "how", [{"target_modules": ["shared"]}, {"modules_to_save": ["shared"]}], ids=["factors", "whole"]
)
def test_an_embedding_under_many_names_changes_under_all_of_them_and_only_knowingly(
    tiny: Tiny, saved: Saved, tmp_path: Path, how: dict[str, Any]
) -> None:
    model = tiny("t5", "T5ForConditionalGeneration")
    before = model.shared.weight.clone()
    base = saved(model)
    adapter = adapt(model, tmp_path / "adapter", **{"target_modules": ["q"], **how})
    fresh = transformers.T5ForConditionalGeneration.from_pretrained(base)
    wanted = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload().shared.weight
    with pytest.raises(Degraded, match="change would be that of all of them"):
        lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out")
    lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out", allow=["tied-parameter"])
    merged = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (wanted - before).norm() / before.norm() > 1e-2
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        torch.testing.assert_close(merged.get_submodule(name).weight, wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_deeper_model_is_refused_with_what_is_missing(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    deep = tiny("llama", "LlamaForCausalLM", num_hidden_layers=4)
    base = saved(tiny("llama", "LlamaForCausalLM", num_hidden_layers=2))
    adapter = adapt(deep, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(Degraded, match="2 of 4 targets") as refused:
        lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out")
    assert "--allow target-missing" in refused.value.hint
    report = lorahub.merge(base, {"adapter": adapter}, weights=[0.5], out=tmp_path / "out", allow=["target-missing"])
    assert report.changed == 2
    provenance = json.loads((tmp_path / "out" / "lorahub-merge.json").read_text())
    assert provenance["allowed"] == ["target-missing"]
    assert {"base-unrecorded", "target-missing"} <= set(provenance["findings"])
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert [(each["weight"], each["sha256"]) for each in provenance["adapters"]] == [
        (0.5, hashlib.sha256(weights).hexdigest())
    ]
    assert str(tmp_path) not in json.dumps(provenance)


def test_another_architecture_is_incompatible(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    adapter = adapt(tiny("llama", "LlamaForCausalLM"), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(BaseMismatch):
        lorahub.merge(saved(tiny("gpt2", "GPT2LMHeadModel")), {"adapter": adapter}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_bare_encoder_lands_in_the_model_with_a_head(
    tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    headed = tiny("bert", "BertForSequenceClassification")
    adapter = adapt(headed.bert, tmp_path / "adapter", target_modules=["query"])
    before = {name: tensor.clone() for name, tensor in headed.state_dict().items()}
    merged = lorahub.merge(headed, {"adapter": adapter})
    changed = [name for name, tensor in headed.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in range(2)]
    merged.undo()


def test_inits_that_changed_the_base_are_refused_with_the_reason(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("llama", "LlamaForCausalLM")
    base = saved(model)
    adapter = adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "corda"}))
    with pytest.raises(lorahub.LorahubError, match="cannot be done") as refused:
        lorahub.merge(base, {"adapter": adapter}, out=tmp_path / "out")
    assert any("corda" in finding.show() for finding in refused.value.findings)
    assert run("inspect", adapter) == 0
