"""Words by textual inversion: prompts mean what they do with diffusers' own loader, and nothing is left afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import diffusers, flux, sd, sd3, sdxl
from tiny_loras import save_lora

import lorahub
from lorahub.errors import BaseMismatch, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub_diffusers import load_lora_weights, load_textual_inversion

PROMPT = "a <ink> b"


def wide(pipe: Any) -> Any:
    """The pipeline with as many rows in its text encoders as its tokenizers have words, and short prompts."""
    for name, model in pipe.components.items():
        if name.startswith("text_encoder"):
            own = getattr(pipe, f"tokenizer{name.removeprefix('text_encoder')}")
            own.model_max_length = 16
            model.resize_token_embeddings(len(own))
    pipe.tokenizer_max_length = 16  # where a pipeline has read it already
    return pipe


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, width) * 2


def embedded(pipe: Any, prompt: str = PROMPT) -> list[torch.Tensor]:
    """What the pipeline makes of a prompt, whole and pooled."""
    with torch.no_grad():
        given = {"prompt_2": prompt} if hasattr(pipe, "tokenizer_2") else {}
        arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if isinstance(pipe, diffusers.FluxPipeline):
            arguments = {"device": "cpu", "max_sequence_length": 16}
        found = pipe.encode_prompt(prompt, **given, **arguments)
    return [each for each in found if isinstance(each, torch.Tensor)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def state(pipe: Any) -> dict[str, Any]:
    """What must be the same objects afterwards."""
    tokenizers = {name: each for name, each in pipe.components.items() if name.startswith("tokenizer")}
    tables = {
        name: each.get_input_embeddings().weight
        for name, each in pipe.components.items()
        if name.startswith("text_encoder")
    }
    return {**tokenizers, **tables}


@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_means_what_it_does_with_diffusers_own_loader(count: int, tmp_path: Path) -> None:
    save_file({"<ink>": vectors(count)}, tmp_path / "ink.safetensors")
    theirs, pipe = wide(sd()), wide(sd())
    theirs.load_textual_inversion(str(tmp_path / "ink.safetensors"))
    before, plain = state(pipe), embedded(pipe)
    with load_textual_inversion(pipe, tmp_path / "ink.safetensors") as words:
        assert same(embedded(pipe), embedded(theirs))
        assert not same(embedded(pipe), plain)
        assert words.tokens == {"<ink>": ("<ink>", "<ink>_1", "<ink>_2")[:count]}
    assert same(embedded(pipe), plain)
    assert all(state(pipe)[name] is each for name, each in before.items())


def test_two_text_encoders_get_their_own_vectors(tmp_path: Path) -> None:
    both = {"clip_l": vectors(2), "clip_g": vectors(2, seed=1)}
    save_file(both, tmp_path / "style.safetensors")
    theirs, pipe = wide(sdxl()), wide(sdxl())
    for end, key in (("", "clip_l"), ("_2", "clip_g")):
        own = {"tokenizer": getattr(theirs, f"tokenizer{end}"), "text_encoder": getattr(theirs, f"text_encoder{end}")}
        theirs.load_textual_inversion(both[key], token="style", **own)
    plain = embedded(pipe, "a style")
    words = load_textual_inversion(pipe, tmp_path / "style.safetensors")
    assert words.tokens == {"style": ("style", "style_1")}
    assert same(embedded(pipe, "a style"), embedded(theirs, "a style"))
    assert not same(embedded(pipe, "a style"), plain)
    words.unload()
    assert same(embedded(pipe, "a style"), plain)


def test_a_word_of_automatic1111_is_called_as_its_file_or_as_is_said(tmp_path: Path) -> None:
    save_file({"emb_params": vectors(1)}, tmp_path / "EasyNegative.safetensors")
    pipe = wide(sd())
    assert list(load_textual_inversion(pipe, tmp_path / "EasyNegative.safetensors").tokens) == ["EasyNegative"]
    words = load_textual_inversion(pipe, tmp_path / "EasyNegative.safetensors", token="<ink>")
    assert list(words.tokens) == ["EasyNegative", "<ink>"]
    first = embedded(pipe)
    assert same(first, embedded(pipe, "a EasyNegative b"))
    words.remove("EasyNegative")
    assert same(embedded(pipe), first)
    assert not same(embedded(pipe, "a EasyNegative b"), first)
    words.unload()
    words.unload()


def test_words_are_in_a_t5_where_a_file_names_it(tmp_path: Path) -> None:
    save_file({"clip_l": vectors(1), "t5": vectors(1, seed=1)}, tmp_path / "x.safetensors")
    pipe = wide(flux())
    plain = embedded(pipe)
    with load_textual_inversion(pipe, tmp_path / "x.safetensors", token="<ink>"):
        changed = embedded(pipe)
        assert all((one != other).any() for one, other in zip(plain[:2], changed[:2], strict=True))
    assert same(embedded(pipe), plain)


def test_words_and_adapters_are_on_a_pipeline_together_and_off_in_any_order(tmp_path: Path) -> None:
    pipe = wide(sd())
    adapter = save_lora(pipe, tmp_path / "lora")
    save_file({"<ink>": vectors(2)}, tmp_path / "ink.safetensors")
    plain = embedded(pipe)
    words = load_textual_inversion(pipe, tmp_path / "ink.safetensors")
    told = embedded(pipe)
    loras = load_lora_weights(pipe, adapter)
    both = embedded(pipe)
    assert not same(both, told)
    words.unload()
    assert not same(embedded(pipe), both)
    words = load_textual_inversion(pipe, tmp_path / "ink.safetensors")
    assert same(embedded(pipe), both)
    merged = loras.merge_into()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(embedded(pipe), both, strict=True))
    merged.undo()
    assert same(embedded(pipe), told)
    words.unload()
    assert same(embedded(pipe), plain)


def test_words_that_are_bundled_with_an_adapter_are_loaded_from_its_file(tmp_path: Path) -> None:
    pipe = wide(sdxl())
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(32, 2)}
    tensors |= {"bundle_emb.<ink>.clip_l": vectors(1), "bundle_emb.<ink>.clip_g": vectors(1, seed=1)}
    save_file(tensors, tmp_path / "x.safetensors")
    plain = embedded(pipe)
    with load_textual_inversion(pipe, tmp_path / "x.safetensors") as words:
        assert list(words.tokens) == ["<ink>"]
        assert not same(embedded(pipe), plain)


def test_words_stay_beside_those_of_the_pipelines_own_loader(tmp_path: Path) -> None:
    save_file({"<ink>": vectors(1)}, tmp_path / "ink.safetensors")
    save_file({"<wash>": vectors(1, seed=1)}, tmp_path / "wash.safetensors")
    pipe = wide(sd())
    pipe.load_textual_inversion(str(tmp_path / "wash.safetensors"))
    before = embedded(pipe, "a <wash>")
    words = load_textual_inversion(pipe, tmp_path / "ink.safetensors")
    assert same(embedded(pipe, "a <wash>"), before)
    first = embedded(pipe)
    pipe.load_textual_inversion(vectors(1, seed=2), token="<dye>")
    assert same(embedded(pipe), first)
    dyed = embedded(pipe, "a <dye>")
    words.unload()
    assert same(embedded(pipe, "a <dye>"), dyed)
    load_textual_inversion(pipe, tmp_path / "ink.safetensors")
    pipe.unload_textual_inversion("<dye>")
    assert same(embedded(pipe), first)
    assert same(embedded(pipe, "a <wash>"), before)


def test_a_tokenizer_that_was_exchanged_meanwhile_is_not_put_back_over(tmp_path: Path) -> None:
    save_file({"<ink>": vectors(1)}, tmp_path / "ink.safetensors")
    pipe = wide(sd())
    words = load_textual_inversion(pipe, tmp_path / "ink.safetensors")
    own, pipe.tokenizer = pipe.tokenizer, wide(sd()).tokenizer
    with pytest.raises(UsageError, match="tokenizer was changed since"):
        words.unload()
    pipe.tokenizer = own
    words.unload()


def test_a_pipeline_is_saved_without_the_words(tmp_path: Path) -> None:
    save_file({"<ink>": vectors(2)}, tmp_path / "ink.safetensors")
    pipe = wide(sd())
    with load_textual_inversion(pipe, tmp_path / "ink.safetensors"):
        told = embedded(pipe)
        pipe.save_pretrained(tmp_path / "pipe")
        assert same(embedded(pipe), told)
    again = type(pipe).from_pretrained(tmp_path / "pipe", local_files_only=True, safety_checker=None)
    assert "<ink>" not in again.tokenizer.get_vocab()
    assert again.text_encoder.get_input_embeddings().weight.shape[0] == len(again.tokenizer)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    pipe = wide(sdxl())
    before = state(pipe)
    files = {
        "width": ({"<ink>": vectors(1, 48)}, BaseMismatch, "48 wide"),
        "encoder": ({"gemma": vectors(1)}, UsageError, "'gemma', which this StableDiffusionXLPipeline"),
        "known": ({"<a>": vectors(1)}, UsageError, "has the word 'a' already"),
        "half": ({"clip_l": vectors(1), "clip_g": vectors(1, 48)}, BaseMismatch, "another model"),
    }
    for name, (tensors, kind, message) in files.items():
        place = tmp_path / f"{name}.safetensors"
        save_file(tensors, place)
        with pytest.raises(kind, match=message):
            load_textual_inversion(pipe, place, token="a" if name == "known" else None)
        assert all(state(pipe)[at] is each for at, each in before.items())
    adapter = save_lora(pipe, tmp_path / "lora")
    with pytest.raises(UnsupportedFormat, match="no vectors of a word"):
        load_textual_inversion(pipe, adapter)
    torch.save({"string_to_param": {"*": vectors(1)}, "name": "ink"}, tmp_path / "ink.pt")
    with pytest.raises(UnsupportedFormat, match="pickle") as stop:
        load_textual_inversion(pipe, tmp_path / "ink.pt")
    assert "pipe.load_textual_inversion" in (stop.value.hint or "")
    with pytest.raises(UsageError, match="no pipeline of diffusers"):
        load_textual_inversion(pipe.text_encoder, tmp_path / "width.safetensors")
    save_file({"clip_l": vectors(2)}, tmp_path / "several.safetensors")
    with pytest.raises(UsageError, match="makes no tokens"):
        load_textual_inversion(sd3(), tmp_path / "several.safetensors")


def test_who_takes_it_for_an_adapter_is_told_what_to_call(tmp_path: Path) -> None:
    save_file({"<ink>": vectors(1)}, tmp_path / "ink.safetensors")
    with pytest.raises(UnsupportedKind) as stop:
        load_lora_weights(sd(), tmp_path / "ink.safetensors")
    assert "load_textual_inversion" in (stop.value.hint or "")
    with pytest.raises(UnsupportedKind) as stop:
        lorahub.attach(sd(), {"ink": tmp_path / "ink.safetensors"})
    assert "load_textual_inversion" in (stop.value.hint or "")
