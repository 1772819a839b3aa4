"""Tied embeddings and vocabularies of another size: what is merged, what is refused, and what a refusal says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.errors import BaseMismatch, Degraded, Incompatible

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

KINDS = {
    # in the table; known from its class; words counted in a part of the configuration
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}, "embed_tokens"),
    "opt": ("OPTForCausalLM", {"tie_word_embeddings": False}, "embed_tokens"),
    "gpt_neox": ("GPTNeoXForCausalLM", {}, "embed_in"),
}


def trained(model: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of ``model``, full of noise, and give what PEFT merges."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(folder)
    return dict(wrapped.merge_and_unload().state_dict())


@pytest.mark.parametrize("words", [53, 45], ids=["larger", "smaller"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_output_layer_of_another_size_give_a_resized_checkpoint(
    kind: str, words: int, tiny: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    name, more, embedding = KINDS[kind]
    base = tiny(kind, name, **more)
    folder = saved(base)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(words)
    projection = "query_key_value" if kind == "gpt_neox" else "q_proj"
    options = {"target_modules": [projection], "modules_to_save": [embedding, "lm_head"]}
    wanted = trained(larger, tmp_path / "adapter", **options)

    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == words
    merged = type(base).from_pretrained(tmp_path / "out")
    assert merged.get_input_embeddings().weight.shape[0] == merged.get_output_embeddings().weight.shape[0] == words
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=1e-5)

    with pytest.raises(Incompatible, match=str(words)) as raised:
        lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    assert f"model.resize_token_embeddings({words})" in raised.value.hint
    with pytest.raises(Incompatible) as raised:
        lorahub.attach(base, {"adapter": tmp_path / "adapter"})
    assert f"model.resize_token_embeddings({words})" in raised.value.hint

    base.resize_token_embeddings(words)
    inputs = torch.arange(4, 12)[None]
    with torch.no_grad(), lorahub.attach(base, {"adapter": tmp_path / "adapter"}):
        attached = base(inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(attached, merged(inputs).logits, atol=1e-5, rtol=1e-5)
        assert (attached - base(inputs).logits).norm() > 1e-2


def test_a_part_of_the_vocabulary_is_refused_and_the_message_says_what_to_call(
    tiny: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny("llama", "LlamaForCausalLM", tie_word_embeddings=False)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(53)
    wanted = trained(larger, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    for what in (base, saved(base)):
        options = {} if what is base else {"out": tmp_path / "out"}
        with pytest.raises(BaseMismatch, match=r"model\.resize_token_embeddings\(53\)"):
            lorahub.merge(what, {"adapter": tmp_path / "adapter"}, **options)
    base.resize_token_embeddings(53)
    base.lm_head.weight.data.copy_(wanted["lm_head.weight"])  # new rows are drawn at random
    lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=1e-5)


def test_an_adapter_saved_with_its_embedding_lands_in_a_model_that_is_resized_first(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny("llama", "LlamaForCausalLM", tie_word_embeddings=False)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(53)
    wanted = trained(larger, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(BaseMismatch, match=r"model\.resize_token_embeddings\(53\)"):
        lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    base.resize_token_embeddings(53)
    base.lm_head.weight.data.copy_(wanted["lm_head.weight"])
    lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tied_pair_is_changed_alone_in_a_checkpoint_that_says_so(
    side: str, tiny: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    """An architecture that only its class describes; PEFT changes both sides, so the reference is a float64 sum."""
    base = tiny("opt", "OPTForCausalLM")
    assert base.lm_head.weight is base.model.decoder.embed_tokens.weight
    folder = saved(base)
    trained(copy.deepcopy(base), tmp_path / "adapter", target_modules=[side])
    with pytest.raises(Degraded, match="tied-parameter"):
        lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out", allow=["tied-parameter"])
    merged = transformers.OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    word, head = merged.model.decoder.embed_tokens.weight, merged.lm_head.weight
    changed, kept = (head, word) if side == "lm_head" else (word, head)
    assert torch.equal(kept, base.lm_head.weight)
    (delta,) = lorahub.load(tmp_path / "adapter").deltas.values()
    low = delta.low_rank()
    assert low is not None
    expected = base.lm_head.weight.double() + low.scale * (low.up.double() @ low.down.double())
    torch.testing.assert_close(changed.double(), expected, atol=1e-6, rtol=1e-6)
    assert (changed - kept).norm() / kept.norm() > 1e-2


def test_a_saved_side_of_a_tied_pair_counts_once(
    tiny: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny("opt", "OPTForCausalLM")
    trained(copy.deepcopy(base), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(Degraded, match="tied-parameter"):
        lorahub.merge(saved(base), {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")


def test_a_weight_that_was_trained_whole_for_both_its_names_stays_one(tmp_path: Path) -> None:
    """``ensure_weight_tying``: the file has the embedding and the head, with the same numbers."""
    config = transformers.GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return transformers.GemmaForCausalLM.from_pretrained(tmp_path / "base").eval()

    tuning = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    wrapped = peft.get_peft_model(base(), tuning)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 2
    tokens = torch.tensor([[3, 17, 41, 5]])
    model = base()
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        expected = wrapped(tokens).logits
        assert (expected - model(tokens).logits).abs().max() > 0.1
        merged = lorahub.merge(model, {"a": tmp_path / "adapter"})
        assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        merged.undo()
        assert all(map(torch.equal, before, model.parameters()))
        lorahub.merge(tmp_path / "base", {"a": tmp_path / "adapter"}, out=tmp_path / "out")
        stored = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert stored.config.tie_word_embeddings
        assert torch.allclose(stored(tokens).logits, expected, atol=1e-5)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if "lm_head" in name)
    save_file(tensors | {head: tensors[head] + 1}, file)
    with pytest.raises(lorahub.LorahubError, match=r"lm_head|embed_tokens"):  # one weight has one value
        lorahub.merge(base(), {"a": tmp_path / "adapter"})
