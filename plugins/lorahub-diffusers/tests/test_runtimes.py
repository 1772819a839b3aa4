"""``check --for diffusers`` against diffusers itself: what its pipelines make of the same keys.  And for ComfyUI."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import flux, sd, sdxl

import lorahub
from lorahub.findings import Finding, Verdict

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

WIDTH = 8
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
Tensors = dict[str, torch.Tensor]


def pair(
    stem: str, ends: tuple[str, str], *, alpha: float | None = None, out: int = WIDTH, into: int = WIDTH
) -> Tensors:
    """LoRA of rank 2."""
    generator = torch.Generator().manual_seed(len(stem))
    down = torch.randn(2, into, generator=generator)
    result = {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": torch.randn(out, 2, generator=generator)}
    return result if alpha is None else {**result, f"{stem}.alpha": torch.tensor(alpha)}


def lokr(stem: str) -> Tensors:
    return {
        f"{stem}.lokr_w1": torch.ones(2, 2),
        f"{stem}.lokr_w2": torch.ones(4, 4),
        f"{stem}.alpha": torch.tensor(1.0),
    }


READS, LESS, NOTHING, REFUSES = "reads", "reads a part of", "reads nothing of", "refuses"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Keys, a pipeline's class, what it does with them, and what the table says of it."""

    tensors: Tensors
    pipeline: str
    does: str
    codes: frozenset[str] = field(default_factory=frozenset)


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

CASES: Mapping[str, Seen] = {
    "kohya, Stable Diffusion": Seen(tensors=pair(UNET, KOHYA, alpha=1), pipeline="StableDiffusionPipeline", does=READS),
    "makers', Stable Diffusion": Seen(
        tensors=pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", KOHYA),
        pipeline="StableDiffusionPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "kohya, Stable Diffusion 3": Seen(
        tensors=pair("lora_unet_joint_blocks_0_x_block_attn_proj", KOHYA),
        pipeline="StableDiffusion3Pipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "makers', Stable Diffusion 3": Seen(
        tensors=pair("diffusion_model.joint_blocks.0.x_block.attn.proj", KOHYA),
        pipeline="StableDiffusion3Pipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "kohya, Flux": Seen(
        tensors=pair("lora_unet_double_blocks_0_img_attn_proj", KOHYA, alpha=1), pipeline="FluxPipeline", does=READS
    ),
    "kohya, Flux's last layer": Seen(
        tensors=pair("lora_unet_double_blocks_0_img_attn_proj", KOHYA, alpha=1)
        | pair("lora_unet_final_layer_linear", KOHYA, alpha=1),
        pipeline="FluxPipeline",
        does=LESS,
        codes=frozenset({"diffusers-left-out"}),
    ),
    "kohya, Flux's T5": Seen(
        tensors=pair("lora_unet_double_blocks_0_img_attn_proj", KOHYA, alpha=1)
        | pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", KOHYA, alpha=1),
        pipeline="FluxPipeline",
        does=LESS,
        codes=frozenset({"diffusers-left-out"}),
    ),
    "makers', Flux": Seen(
        tensors=pair("diffusion_model.double_blocks.0.img_attn.proj", KOHYA), pipeline="FluxPipeline", does=READS
    ),
    "makers' in PEFT's ends, Flux": Seen(
        tensors=pair("diffusion_model.double_blocks.0.img_attn.proj", PEFT),
        pipeline="FluxPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-flux"}),
    ),
    "makers' in PEFT's ends, HunyuanVideo": Seen(
        tensors=pair("diffusion_model.double_blocks.0.img_attn.proj", PEFT),
        pipeline="HunyuanVideoPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-flux"}),
    ),
    "makers' in PEFT's ends, FLUX.2": Seen(
        tensors=pair("diffusion_model.double_blocks.0.img_attn.proj", PEFT),
        pipeline="Flux2Pipeline",
        does=READS,
        codes=frozenset({"diffusers-flux"}),
    ),
    "alpha beside PEFT's ends, FLUX.2": Seen(
        tensors=pair("diffusion_model.double_blocks.0.img_attn.proj", PEFT, alpha=1),
        pipeline="Flux2Pipeline",
        does=REFUSES,
        codes=frozenset({"diffusers-flux", "diffusers-alpha-unread"}),
    ),
    "makers', Wan": Seen(
        tensors=pair("diffusion_model.blocks.0.self_attn.q", PEFT), pipeline="WanPipeline", does=READS
    ),
    "a norm's difference, Wan": Seen(
        tensors=pair("diffusion_model.blocks.0.self_attn.q", KOHYA, alpha=2)
        | {"diffusion_model.blocks.0.norm3.diff": torch.ones(8)},
        pipeline="WanPipeline",
        does=LESS,
        codes=frozenset({"diffusers-left-out"}),
    ),
    "makers', LTX-Video": Seen(
        tensors=pair("diffusion_model.transformer_blocks.0.attn1.to_q", PEFT), pipeline="LTXPipeline", does=READS
    ),
    "kohya, LTX-Video": Seen(
        tensors=pair("lora_unet_transformer_blocks_0_attn1_to_q", KOHYA, alpha=1),
        pipeline="LTXPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "kohya, Qwen-Image": Seen(
        tensors=pair("lora_unet_transformer_blocks_0_attn_to_q", KOHYA, alpha=1),
        pipeline="QwenImagePipeline",
        does=READS,
    ),
    "kohya, Qwen-Image's text": Seen(
        tensors=pair("lora_unet_transformer_blocks_0_attn_add_q_proj", KOHYA, alpha=1)
        | pair("lora_unet_transformer_blocks_0_attn_to_q", KOHYA, alpha=2),
        pipeline="QwenImagePipeline",
        does=READS,
    ),
    "makers', Qwen-Image": Seen(
        tensors=pair("diffusion_model.transformer_blocks.0.attn.to_q", PEFT), pipeline="QwenImagePipeline", does=READS
    ),
    "kohya, Z-Image": Seen(
        tensors=pair("lora_unet_layers_0_attention_qkv", KOHYA, alpha=1, out=24), pipeline="ZImagePipeline", does=READS
    ),
    "makers', Sana": Seen(
        tensors=pair("diffusion_model.blocks.0.attn.qkv", PEFT, out=24),
        pipeline="SanaPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "makers', AuraFlow": Seen(
        tensors=pair("diffusion_model.double_layers.0.attn.w2q", PEFT),
        pipeline="AuraFlowPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-names"}),
    ),
    "LoKr, FLUX.2": Seen(
        tensors=lokr("diffusion_model.double_blocks.0.img_attn.proj"),
        pipeline="Flux2Pipeline",
        does=READS,
        codes=frozenset({"diffusers-lokr"}),
    ),
    "LoKr, Flux": Seen(
        tensors=lokr("diffusion_model.double_blocks.0.img_attn.proj"),
        pipeline="FluxPipeline",
        does=NOTHING,
        codes=frozenset({"diffusers-lokr"}),
    ),
    "LoKr, Stable Diffusion": Seen(
        tensors=lokr("lora_unet_down_blocks_0_attentions_0_proj_in"),
        pipeline="StableDiffusionPipeline",
        does=REFUSES,
        codes=frozenset({"diffusers-kind"}),
    ),
    "a difference, Stable Diffusion": Seen(
        tensors=pair(UNET, KOHYA, alpha=1) | {"lora_unet_down_blocks_0_attentions_0_proj_in.diff": torch.ones(8, 8)},
        pipeline="StableDiffusionPipeline",
        does=REFUSES,
        codes=frozenset({"diffusers-difference"}),
    ),
    "dora_scale, Stable Diffusion": Seen(
        tensors=pair(UNET, KOHYA, alpha=1) | {f"{UNET}.dora_scale": torch.ones(8, 1)},
        pipeline="StableDiffusionPipeline",
        does=LESS,
        codes=frozenset({"diffusers-dora-scale"}),
    ),
    "Tucker, Stable Diffusion": Seen(
        tensors={
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 8, 1, 1),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(8, 2, 1, 1),
        },
        pipeline="StableDiffusionPipeline",
        does=REFUSES,
        codes=frozenset({"diffusers-tucker"}),
    ),
}


def done(pipeline: str, tensors: Tensors) -> str:
    """What diffusers makes of the keys: by how many modules come out under a component's name."""
    parts = ("transformer.", "unet.", "text_encoder.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found: Any = getattr(diffusers, pipeline).lora_state_dict(dict(tensors))
        except (ValueError, KeyError):
            return REFUSES
    state: Mapping[str, torch.Tensor] = found[0] if isinstance(found, tuple) else found
    named = [key for key in state if key.startswith(parts) and not key.endswith(".alpha")]
    numbers = sum(state[key].numel() for key in named)
    given = {key: each for key, each in tensors.items() if not key.endswith(".alpha")}
    fused = sum(
        each.numel() for key, each in given.items() if "qkv" in key and key.endswith(("down.weight", "A.weight"))
    )
    if not named:
        return NOTHING
    return READS if numbers >= sum(each.numel() for each in given.values()) + 2 * fused else LESS


def said(tensors: Tensors, folder: Path, runtime: str, **metadata: str) -> dict[str, Finding]:
    """Code -> finding, of what the table says and no other."""
    save_file(tensors, folder / "lora.safetensors", metadata=metadata or None)
    report = lorahub.check(folder / "lora.safetensors", runtime=runtime)
    return {each.code: each for each in report.findings if each.code.startswith((f"{runtime}-", "runtime-"))}


@pytest.mark.parametrize("name", CASES)
def test_the_table_says_what_diffusers_does(name: str, tmp_path: Path) -> None:
    seen = CASES[name]
    assert done(seen.pipeline, seen.tensors) == seen.does
    found = said(seen.tensors, tmp_path, "diffusers")
    assert found.keys() == (seen.codes or {"runtime-accepts"})
    if seen.does == READS and "runtime-accepts" not in found:
        assert all(each.allowable for each in found.values()), "what one pipeline reads must be possible to allow"
    for each in found.values():
        assert each.code == "runtime-accepts" or (each.where and each.remedy.startswith("lorahub "))


def test_alphas_in_two_places_are_refused_by_both(tmp_path: Path) -> None:
    stated = {"transformer.r": 2, "transformer.lora_alpha": 1.0}
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", PEFT, alpha=1, out=32, into=32)
    about = {"format": "pt", "lora_adapter_metadata": json.dumps(stated)}
    found = said(tensors, tmp_path, "diffusers", **about)
    assert found.keys() == {"diffusers-alpha-twice"}
    with pytest.raises(ValueError, match="alpha"):
        flux().load_lora_weights(tmp_path, weight_name="lora.safetensors")


def test_an_alpha_that_ltx_leaves_unread_is_told_unless_it_is_the_rank(tmp_path: Path) -> None:
    stem = "diffusion_model.transformer_blocks.0.attn1.to_q"
    assert said(pair(stem, PEFT, alpha=1), tmp_path, "diffusers").keys() == {"diffusers-alpha-unread"}
    assert said(pair(stem, PEFT, alpha=2), tmp_path, "diffusers").keys() == {"runtime-accepts"}
    state = diffusers.LTXPipeline.lora_state_dict(pair(stem, PEFT, alpha=1))
    down = state["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"]
    assert torch.equal(down, pair(stem, PEFT)[f"{stem}.lora_A.weight"])
    assert "transformer.transformer_blocks.0.attn1.to_q.alpha" in state


def test_what_peft_saved_is_a_folder_that_no_pipeline_reads(tmp_path: Path) -> None:
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(pair(f"base_model.model.{module}", PEFT, out=64, into=64), folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    report = lorahub.check(folder, runtime="diffusers")
    assert report.verdict is Verdict.INCOMPATIBLE
    assert "diffusers-format" in {each.code for each in report.findings}
    pipe = sd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(folder, weight_name="adapter_model.safetensors")
    assert not any("lora_A" in name for name, _ in pipe.unet.named_modules())
    assert "comfyui-peft" in {each.code for each in lorahub.check(folder, runtime="comfyui").findings}


def test_comfyui_takes_kohyas_files_and_leaves_alphas_of_headers_unread(tmp_path: Path) -> None:
    assert said(pair(UNET, KOHYA, alpha=1), tmp_path, "comfyui").keys() == {"runtime-accepts"}
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", PEFT)
    for alpha, codes in ((4.0, {"comfyui-alpha-unread"}), (2.0, {"runtime-accepts"})):
        stated = json.dumps({"transformer.r": 2, "transformer.lora_alpha": alpha})
        found = said(tensors, tmp_path, "comfyui", format="pt", lora_adapter_metadata=stated)
        assert found.keys() == codes


def test_comfyui_is_right_with_dora_and_oft_within_limits_that_are_told(tmp_path: Path) -> None:
    dora = pair(UNET, KOHYA, alpha=1) | {f"{UNET}.dora_scale": torch.ones(8, 1)}
    assert said(dora, tmp_path, "comfyui").keys() == {"comfyui-dora"}
    turned = {f"{UNET}.oft_blocks": torch.zeros(2, 4, 4), f"{UNET}.alpha": torch.tensor(1e-3)}
    found = said(turned, tmp_path, "comfyui")
    assert found.keys() == {"comfyui-oft"}
    assert found["comfyui-oft"].level is Verdict.DEGRADED


def load(pipe: Any, folder: Path) -> None:
    """diffusers' own loading; PEFT warns of patterns that match no module, which is what is looked for here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following alpha_pattern keys did not match", RuntimeWarning)
        pipe.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="x")


BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LOSING: Mapping[str, tuple[dict[str, float | None], set[str]]] = {
    "one alpha": ({"attn1.to_q": 1, "attn1.to_k": 1, "ff.net.2": 1}, set()),
    "no alphas": ({"attn1.to_q": None, "attn1.to_k": None, "ff.net.2": None}, set()),
    "attention's differ": ({"attn1.to_q": 4, "attn1.to_k": 1, "attn1.to_v": 1}, {"attn1.to_q"}),
    "an output's differs": ({"attn1.to_out.0": 4, "attn1.to_k": 1, "attn1.to_v": 1}, {"attn1.to_out.0"}),
    "another's differs": ({"attn1.to_q": 1, "attn1.to_k": 1, "ff.net.2": 4}, set()),
    "one has none": ({"attn1.to_q": 1, "attn1.to_k": 1, "ff.net.2": None}, {"ff.net.2"}),
    "one has none, and is right": ({"attn1.to_q": 2, "attn1.to_k": 2, "ff.net.2": None}, set()),
}


@pytest.mark.parametrize("name", LOSING)
def test_alphas_that_a_unet_loses_are_told_by_their_keys_and_no_others(name: str, tmp_path: Path) -> None:
    alphas, wrong = LOSING[name]
    pipe = sd()
    tensors: Tensors = {}
    for module, alpha in alphas.items():
        layer = pipe.unet.get_submodule(f"{BLOCK}.{module}")
        stem = f"lora_unet_{BLOCK}.{module}".replace(".", "_")
        tensors |= pair(stem, KOHYA, alpha=alpha, out=layer.out_features, into=layer.in_features)
    found = said(tensors, tmp_path, "diffusers")
    told = found["diffusers-alpha-lost"].where if wrong else ()
    assert found.keys() == ({"diffusers-alpha-lost"} if wrong else {"runtime-accepts"})
    assert set(told) == {f"lora_unet_{BLOCK}.{each}".replace(".", "_") + ".lora_down.weight" for each in wrong}
    load(pipe, tmp_path)
    scales = {each: pipe.unet.get_submodule(f"{BLOCK}.{each}").scaling["x"] for each in alphas}
    meant = {each: 1.0 if alpha is None else alpha / 2 for each, alpha in alphas.items()}
    assert {each for each in alphas if scales[each] != meant[each]} == wrong


def test_alphas_that_text_encoders_lose_are_told(tmp_path: Path) -> None:
    for part, other, wrong in (("te1", 4.0, {"q_proj", "fc1"}), ("te2", 4.0, {"q_proj"}), ("te2", 1.0, set())):
        pipe = sdxl()
        encoder = pipe.text_encoder if part == "te1" else pipe.text_encoder_2
        tensors: Tensors = {}
        for each, alpha in {"q_proj": other, "k_proj": 1.0, "v_proj": 1.0, "out_proj": 1.0, "fc1": other}.items():
            ending = f"layers.0.{'mlp' if each == 'fc1' else 'self_attn'}.{each}"
            name, layer = next((n, m) for n, m in encoder.named_modules() if n.endswith(ending))
            stem = f"lora_{part}_text_model_" + name.removeprefix("text_model.").replace(".", "_")
            tensors |= pair(stem, KOHYA, alpha=alpha, out=layer.out_features, into=layer.in_features)
        found = said(tensors, tmp_path, "diffusers")
        told = found["diffusers-alpha-lost"].where if wrong else ()
        assert {each for each in ("q_proj", "k_proj", "fc1") if any(each in key for key in told)} == wrong
        load(pipe, tmp_path)
        held = [(n.rpartition(".")[2], m) for n, m in encoder.named_modules() if hasattr(m, "lora_A")]
        scaled = {each: module.scaling["x"] for each, module in held}
        assert len(scaled) == 5
        for each in ("q_proj", "fc1"):
            assert (scaled[each] != other / 2) == (each in wrong)


@pytest.mark.parametrize(
    ("module", "name", "dropped"),
    [
        ("add_embedding.linear_1", "add_embedding_linear_1", True),
        ("add_embedding.linear_2", "add_embedding_linear_2", True),
        ("add_embedding.linear_1", "label_emb_0_0", False),
        ("time_embedding.linear_1", "time_embedding_linear_1", False),
        ("time_embedding.linear_2", "time_embed_2", False),
    ],
)
def test_modules_that_a_unet_drops_are_told(module: str, name: str, dropped: bool, tmp_path: Path) -> None:
    pipe = sdxl()
    layer = pipe.unet.get_submodule(module)
    key = f"{BLOCK}.attn1.to_q"
    kept = pipe.unet.get_submodule(key)
    tensors = pair(f"lora_unet_{name}", KOHYA, alpha=1, out=layer.out_features, into=layer.in_features)
    tensors |= pair(f"lora_unet_{key}".replace(".", "_"), KOHYA, alpha=1, out=kept.out_features, into=kept.in_features)
    found = said(tensors, tmp_path, "diffusers")
    assert found.keys() == ({"diffusers-module-dropped"} if dropped else {"runtime-accepts"})
    load(pipe, tmp_path)
    assert hasattr(pipe.unet.get_submodule(key), "lora_A")
    assert hasattr(pipe.unet.get_submodule(module), "lora_A") == (not dropped)


@pytest.mark.parametrize(
    ("name", "alpha", "fails"),
    [
        ("transformer_blocks_0_attn_to_q", 1.0, None),
        ("transformer_blocks_0_attn_to_q", None, KeyError),
        ("single_transformer_blocks_0_attn_to_k", 1.0, None),
        ("single_transformer_blocks_0_norm_linear", 1.0, KeyError),
        ("transformer_blocks_0_ff_net_2", 1.0, KeyError),
    ],
)
def test_blocks_of_flux_behind_lora_transformer_are_read_as_told(
    name: str, alpha: float | None, fails: type[Exception] | None, tmp_path: Path
) -> None:
    pipe = flux()
    known = {n.replace(".", "_"): m for n, m in pipe.transformer.named_modules()}
    layer = known[name]
    tensors = pair(f"lora_transformer_{name}", KOHYA, alpha=alpha, out=layer.out_features, into=layer.in_features)
    found = said(tensors, tmp_path, "diffusers")
    assert found.keys() == ({"diffusers-blocks"} if fails else {"runtime-accepts"})
    if fails:
        with pytest.raises(fails):
            pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    else:
        load(pipe, tmp_path)
        assert layer is not {n.replace(".", "_"): m for n, m in pipe.transformer.named_modules()}[name]


def test_a_second_text_encoder_beside_lora_transformer_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_transformer_transformer_blocks_0_attn_to_q", KOHYA, alpha=1, out=32, into=32)
    tensors |= pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q", KOHYA, alpha=1, out=32, into=32)
    assert "diffusers-blocks" in said(tensors, tmp_path, "diffusers")
    with pytest.raises(AssertionError):
        flux().load_lora_weights(tmp_path, weight_name="lora.safetensors")
