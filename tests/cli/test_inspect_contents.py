"""What ``lorahub inspect`` says of one adapter: confidence, the base it looks like, metadata, triggers, leftovers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.files.writer import save_file
from lorahub.inspection import tag_frequency, trigger_words
from lorahub.lineage import Module, guess

Cli = Callable[..., Any]

CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya(path: Path, modules: Mapping[str, int], **metadata: str) -> Path:
    """LoRA factors of rank 2 with 8 outputs beside modules with so many inputs."""
    tensors = {}
    for module, inputs in modules.items():
        tensors[f"{module}.lora_down.weight"] = torch.ones(2, inputs)
        tensors[f"{module}.lora_up.weight"] = torch.ones(8, 2)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    return save_file(path, tensors, metadata)


UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("modules", "label"),
    [
        ({UNET: 768}, "SD1-shaped"),
        ({UNET: 1024}, "SD2-shaped"),
        ({UNET: 2048}, "SDXL-shaped"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_v": 2048}, "SDXL-shaped"),
        ({"lora_unet_input_blocks_7_1_transformer_blocks_9_ff_net_2": 5120}, "SDXL-shaped"),
        ({"lora_unet_down_blocks_0_resnets_0_conv1": 320}, "UNet-shaped"),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": 768}, "CLIP-L text encoder-shaped"),
        ({"lora_unet_double_blocks_0_img_attn_qkv": 3072}, "Flux-shaped"),
        ({"lora_unet_single_blocks_37_linear1": 3072}, "Flux-shaped"),
        ({"lora_unet_single_blocks_39_linear1": 3072}, "HunyuanVideo-shaped"),
        ({"lora_unet_double_blocks_0_img_mlp_fc1": 3072}, "HunyuanVideo-shaped"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": 1536}, "SD3-shaped"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": 2432}, "SD3.5 Large-shaped"),
        ({"lora_unet_blocks_0_self_attn_q": 5120}, "Wan 14B-shaped"),
        ({"lora_unet_blocks_0_self_attn_q": 1536}, "Wan 1.3B-shaped"),
        ({"lora_unet_transformer_blocks_0_img_mlp_net_2": 3072}, "Qwen-Image-shaped"),
        ({"lora_unet_transformer_blocks_59_attn_add_q_proj": 3072}, "Qwen-Image-shaped"),
    ],
)
def test_the_base_it_looks_like_comes_from_names_and_widths(
    lorahub: Cli, tmp_path: Path, modules: Mapping[str, int], label: str
) -> None:
    document = lorahub("inspect", kohya(tmp_path / "a.safetensors", modules), "--json").json()
    assert document["base_guess"]["label"] == label
    assert document["base_guess"]["source"] == "shapes"
    assert document["base_guess"]["family"] == ""
    assert document["base"] == ""


@pytest.mark.parametrize(
    ("modules", "label"),
    [
        (("double_blocks.0.img_attn_qkv", "single_blocks.0.linear1"), "HunyuanVideo-shaped"),
        (("double_blocks.3.txt_attn_proj",), "HunyuanVideo-shaped"),
        (("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"), "Flux-shaped"),
    ],
)
def test_dots_tell_hunyuan_video_from_flux_where_the_file_has_them(
    lorahub: Cli, tmp_path: Path, modules: tuple[str, ...], label: str
) -> None:
    tensors = {}
    for module in modules:
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(2, 3072)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(8, 2)
    document = lorahub("inspect", save_file(tmp_path / "a.safetensors", tensors, {}), "--json").json()
    assert document["base_guess"]["label"] == label


@pytest.mark.parametrize(
    ("width", "layers", "label"),
    [
        (4096, 32, "as Llama-2-7B"),
        (896, 24, "as Qwen2.5-0.5B"),
        (2304, 26, "as Gemma-2-2B"),
        (4096, 31, "4096 wide, 31 layers"),
    ],
)
def test_language_models_are_told_by_width_and_depth(width: int, layers: int, label: str) -> None:
    modules = [Module(f"model_layers_{layer}_self_attn_q_proj", width) for layer in range(layers)]
    found = guess({}, modules)
    assert found is not None
    assert label in found.label


@pytest.mark.parametrize(
    ("metadata", "label", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", ""),
        ({"ss_sd_model_name": "ponyDiffusionV6XL_v6.safetensors"}, "Pony Diffusion (SDXL)", "Pony Diffusion"),
        (
            {"ss_sd_model_name": "/models/Illustrious-XL-v0.1.safetensors", "ss_base_model_version": "sdxl_base_v1-0"},
            "Illustrious (SDXL)",
            "Illustrious",
        ),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL", ""),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux", ""),
        ({"base_model": "black-forest-labs/FLUX.1-dev"}, "Flux", ""),
        (
            {"ss_new_sd_model_hash": "67AB2FD8EC439A89B3FEDB15CC65F54336AF163C7EB5E4F2ACC98F090A29B0B3"},
            "Pony Diffusion (SDXL)",
            "Pony Diffusion",
        ),
        ({"ss_sd_model_name": "stabilityai/stable-diffusion-xl-base-1.0"}, "SDXL", ""),
        ({"ss_sd_model_name": "mix.safetensors"}, "SDXL-shaped", ""),
    ],
)
def test_a_family_is_named_only_by_metadata(metadata: dict[str, str], label: str, family: str) -> None:
    found = guess(metadata, [Module(UNET.removeprefix("lora_"), 2048)])
    assert found is not None
    assert (found.label, found.family) == (label, family)


def test_metadata_that_shapes_speak_against_are_said_to_be(lorahub: Cli, tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors", {UNET: 768}, ss_base_model_version="sdxl_base_v1-0")
    assert "though its shapes are SD1-shaped" in lorahub("inspect", file, "--json").json()["base_guess"]["evidence"]


def test_what_nothing_tells_is_not_guessed(lorahub: Cli, adapter: Path) -> None:
    assert lorahub("inspect", adapter, "--json").json()["base_guess"] is None


def test_the_format_comes_with_its_confidence_and_reason(lorahub: Cli, tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors", {UNET: 768})
    document = lorahub("inspect", file, "--json").json()
    assert 0 < document["confidence"] <= 1
    assert "lora_unet_" in document["reason"]
    assert document["reason"] in lorahub("inspect", file).out
    assert document["size"] == file.stat().st_size


def test_unclaimed_tensors_are_listed(lorahub: Cli, tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors", {UNET: 768})
    tensors = {"strange.thing": torch.ones(3), f"{UNET}.lora_down.weight": torch.ones(2, 768)}
    tensors[f"{UNET}.lora_up.weight"] = torch.ones(8, 2)
    save_file(file, tensors)
    assert lorahub("inspect", file, "--json").json()["unclaimed"] == ["strange.thing"]
    assert "strange.thing" in lorahub("inspect", file).out


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "ink wash, sumi-e , ink wash"}, ("ink wash", "sumi-e")),
        ({"ss_trigger_words": '["ink", "wash"]'}, ("ink", "wash")),
        ({"trigger_words": "", "instance_prompt": "a photo of sks dog"}, ("a photo of sks dog",)),
        ({"trigger_words": "[not json"}, ("[not json",)),
        ({"note": "ink"}, ()),
    ],
)
def test_trigger_words_are_found_where_trainers_put_them(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert trigger_words(metadata) == words
    assert trigger_words(metadata, ("recorded",)) == ("recorded",)


def test_tag_frequencies_are_summed_up_over_folders() -> None:
    folders = {"10_ink": {"ink": 10, "paper ": 4}, "5_more": {"paper": 7, "brush": "x"}}
    assert tag_frequency({"ss_tag_frequency": json.dumps(folders)}) == [("paper", 11), ("ink", 10)]
    assert tag_frequency({"ss_tag_frequency": "{"}) == tag_frequency({}) == []
    assert tag_frequency({"ss_tag_frequency": "[1]"}) == tag_frequency({"ss_tag_frequency": '{"a": [1]}'}) == []


def test_metadata_are_short_on_the_terminal_and_whole_as_json(lorahub: Cli, tmp_path: Path) -> None:
    tags = json.dumps({"10_ink": {f"tag {number}": number for number in range(1000)}})
    long = "word " * 20_000
    file = kohya(tmp_path / "a.safetensors", {UNET: 768}, ss_tag_frequency=tags, ss_comment=long)
    run = lorahub("inspect", file)
    assert max(map(len, run.out.splitlines())) < 200
    assert "1,000 tags: tag 999 999, tag 998 998" in run.out
    assert "(100,000 characters)" in run.out
    document = lorahub("inspect", file, "--json").json()
    assert document["metadata"]["ss_comment"] == long
    assert document["metadata"]["ss_tag_frequency"] == tags


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202egpj.exe\u2028\x7f"


@pytest.mark.parametrize("options", [[], ["--json"], ["-q"], ["--weights"], ["--weights", "--json"]])
def test_hostile_metadata_never_reach_the_terminal_as_they_are(
    lorahub: Cli, tmp_path: Path, options: list[str]
) -> None:
    metadata = {
        HOSTILE + "key": HOSTILE,
        "modelspec.trigger_phrase": HOSTILE,
        "ss_sd_model_name": "pony" + HOSTILE,
        "ss_tag_frequency": json.dumps({"a": {HOSTILE: 3}}),
        "newline": "a\nformat  peft",
    }
    file = kohya(tmp_path / "a.safetensors", {UNET: 768}, **metadata)
    run = lorahub("inspect", file, *options)
    assert run.code == 0, run.err
    raw = [each for each in run.out + run.err if unicodedata.category(each)[0] == "C" and each != "\n"]
    assert raw == []
    assert "\u2028" not in run.out
    if "--json" in options:
        assert run.json()["metadata"][HOSTILE + "key"] == HOSTILE
    else:
        assert not re.search(r"^\s*format +peft", run.out, re.MULTILINE)


def test_hundreds_of_entries_are_cut_and_said_to_be(lorahub: Cli, tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors", {UNET: 768}, **{f"key_{number:04}": "x" for number in range(500)})
    run = lorahub("inspect", file)
    assert "and 380 more" in run.out
    assert len(lorahub("inspect", file, "--json").json()["metadata"]) == 500


def test_a_hubs_adapter_is_inspected_by_the_command_too(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    assert lorahub("push", "acme/ink", adapter, "--version", "1.0.0", "--hub", hub).code == 0
    run = lorahub("inspect", "acme/ink@1", "--hub", hub)
    assert run.code == 0, run.err
    assert "acme/ink@v1.0.0" in run.out
    assert "requests" in run.out
    document = lorahub("inspect", "acme/ink@1", "--hub", hub, "--json").json()
    assert document["remote"]["bytes_read"] < sum(document["remote"]["files"].values())
    assert document["where"] == "acme/ink@v1.0.0"
    assert not list((tmp_path / "cache" / "pulled").rglob("*.safetensors"))
    hashed = lorahub("inspect", "acme/ink@1", "--hub", hub, "--hashes", "--json").json()
    assert hashed["hashes"]["autov2"] == document["remote"]["autov2"]


def test_a_hubs_adapter_is_checked_without_its_weights(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    assert lorahub("push", "acme/ink", adapter, "--version", "1.0.0", "--hub", hub).code == 0
    near = lorahub("check", adapter, "--base", base, "--json").json()
    run = lorahub("check", "acme/ink@1", "--base", base, "--hub", hub, "--json")
    assert run.code == 0, run.err
    far = run.json()
    assert not list((tmp_path / "cache" / "pulled").rglob("*.safetensors"))
    assert {each["code"] for each in far["findings"]} == {each["code"] for each in near["findings"]}
    assert far["verdict"] == near["verdict"]
    assert lorahub("check", "acme/ink@1", "--for", "vllm", "--hub", hub).code == 0
    assert lorahub("merge", "acme/ink@1", "--base", base, "--hub", hub, "-o", tmp_path / "out").code == 0
