"""Single-file checkpoints as bases: named by headers alone, merged into, and all else of them left as it was."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import flux, sd, sd3, sdxl, unet
from tiny_files import METADATA, as_file, inverted, original_unet
from tiny_loras import save_lora
from tiny_originals import CONVERTERS, SMALL

import lorahub
from lorahub.errors import BaseMismatch, UnsupportedFormat
from lorahub.findings import Verdict
from lorahub.opening import open_base
from lorahub_diffusers.single_file import SingleFile
from lorahub_diffusers.single_file_names import named

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils", reason="diffusers is not installed")

MAKERS: Mapping[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl}


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A pipeline, the same as one file, and an adapter for it as diffusers saves it."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = MAKERS[request.param]()
    adapter = save_lora(pipe, folder / "adapter")
    return pipe, as_file(pipe, folder / "base.safetensors"), adapter


def by_diffusers(file: Path, pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Component -> its tensors, as diffusers' own conversions take them out of a file."""
    state = load_file(file)
    unet_state = single_file_utils.convert_ldm_unet_checkpoint(dict(state), dict(pipe.unet.config))
    first = single_file_utils.convert_ldm_clip_checkpoint(state)
    found = {"unet": unet_state, "text_encoder": {k.removeprefix("text_model."): v for k, v in first.items()}}
    found["text_encoder"].pop("embeddings.position_ids", None)
    if hasattr(pipe, "text_encoder_2"):
        about = SimpleNamespace(config=pipe.text_encoder_2.config)
        found["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            about, state, prefix="conditioner.embedders.1.model."
        )
    return found


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under its own names, with layers that PEFT put around looked through."""
    return {
        name.replace(".base_layer", ""): each.detach().clone()
        for name, each in model.state_dict().items()
        if "lora_" not in name
    }


def bytes_of(file: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Name -> raw bytes, and the header's metadata, by the format's own description."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    about = header.pop("__metadata__", {})
    begin = 8 + size
    return {
        name: raw[begin + at[0] : begin + at[1]] for name, each in header.items() for at in [each["data_offsets"]]
    }, about


def test_the_file_has_the_parameters_of_the_pipeline_by_name_and_shape(made: tuple[Any, Path, Path]) -> None:
    pipe, file, _ = made
    opened = open_base(file)
    assert isinstance(opened.framework, SingleFile)
    here = {name: info.shape for name, info in opened.index.parameters.items()}
    live = {
        f"{part}:{name}": tuple(each.shape)
        for part in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, part, None) is not None
        for name, each in getattr(pipe, part).state_dict().items()
    }
    fused = {name for name in live if name.startswith("text_encoder_2:") and ".self_attn." in name}
    fused -= {name for name in fused if ".out_proj." in name}
    assert {name for name in here if name.startswith(("unet:", "text_encoder"))} - live.keys() == {
        name.replace(".q_proj.", ".in_proj_") for name in fused if ".q_proj." in name
    }
    for name in live.keys() - fused:
        if name != "text_encoder_2:text_projection.weight":
            assert here[name] == live[name]
    assert set(opened.index.extras) >= {"alphas_cumprod"}
    assert not set(opened.index.extras) & {info.stored_as for info in opened.index.parameters.values()}


def test_a_merged_file_is_what_diffusers_fuses(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    pipe, file, adapter = made
    before = by_diffusers(file, pipe)
    lorahub.merge(file, {"one": str(adapter)}, weights=[0.7], out=tmp_path / "merged.safetensors")
    found = by_diffusers(tmp_path / "merged.safetensors", pipe)
    copy = MAKERS["sdxl" if hasattr(pipe, "text_encoder_2") else "sd"]()
    quietly(lambda: copy.load_lora_weights(adapter))
    quietly(lambda: copy.fuse_lora(components=list(found), lora_scale=0.7))
    moved = 0.0
    for component, tensors in found.items():
        theirs = weights(getattr(copy, component))
        assert tensors.keys() == theirs.keys()
        for name, ours in tensors.items():
            if name.startswith("text_model."):
                continue
            change = ours - before[component][name]
            moved = max(moved, float(change.norm() / before[component][name].norm().clamp_min(1e-9)))
            assert (ours - theirs[name]).abs().max() <= 4e-6 * theirs[name].abs().max().clamp_min(1)
    assert moved > 1e-2


def test_all_that_the_adapter_does_not_touch_keeps_its_bytes_and_the_header_what_it_says(
    made: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, file, adapter = made
    lorahub.merge(file, {"one": str(adapter)}, out=tmp_path / "merged.safetensors")
    old, new = bytes_of(file), bytes_of(tmp_path / "merged.safetensors")
    assert old[0].keys() == new[0].keys()
    kept = [name for name in old[0] if old[0][name] == new[0][name]]
    assert {name for name in old[0] if name.startswith("first_stage_model.")} <= set(kept)
    assert "alphas_cumprod" in kept
    assert METADATA.items() <= new[1].items()
    changed = [name for name in old[0] if name not in kept]
    assert any(name.startswith("model.diffusion_model.input_blocks.") for name in changed)


def kohya(stems: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """LoRA of rank 3, alpha 6, for modules by kohya's names and the shapes of their weights."""
    result = {}
    for seed, (stem, (out, into, *kernel)) in enumerate(stems.items()):
        generator = torch.Generator().manual_seed(seed)
        result[f"{stem}.lora_down.weight"] = torch.randn(3, into, *kernel, generator=generator) / 9
        result[f"{stem}.lora_up.weight"] = torch.randn(out, 3, *(1 for _ in kernel), generator=generator)
        result[f"{stem}.alpha"] = torch.tensor(6.0)
    return result


KOHYA: Mapping[str, Mapping[str, tuple[str, slice]]] = {
    "sd": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
            "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
            slice(None),
        ),
        "lora_unet_up_blocks_0_upsamplers_0_conv": ("model.diffusion_model.output_blocks.1.2.conv.weight", slice(None)),
        "lora_te_text_model_encoder_layers_1_self_attn_k_proj": (
            "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight",
            slice(None),
        ),
    },
    "sdxl": {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
            "model.diffusion_model.input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight",
            slice(None),
        ),
        "lora_unet_down_blocks_1_resnets_0_conv1": (
            "model.diffusion_model.input_blocks.3.0.in_layers.2.weight",
            slice(None),
        ),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
            slice(None),
        ),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
            slice(0, 32),
        ),
        "lora_te2_text_model_encoder_layers_0_self_attn_v_proj": (
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
            slice(64, 96),
        ),
        "lora_te2_text_model_encoder_layers_2_mlp_fc2": (
            "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_proj.weight",
            slice(None),
        ),
    },
}
"""Of each pipeline: a module as kohya spells it -> the stored parameter, and which of its rows that is."""


def test_modules_in_kohyas_spelling_land_where_they_are_stored(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    pipe, file, _ = made
    places = KOHYA["sdxl" if hasattr(pipe, "text_encoder_2") else "sd"]
    stored = load_file(file)
    tensors = kohya({stem: tuple(stored[name][rows].shape) for stem, (name, rows) in places.items()})
    save_file(tensors, tmp_path / "kohya.safetensors")
    report = lorahub.check(tmp_path / "kohya.safetensors", file)
    assert report.verdict is Verdict.UNVERIFIED, [each.show() for each in report.findings]
    lorahub.merge(file, {"one": str(tmp_path / "kohya.safetensors")}, out=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    expected = {name: each.double() for name, each in stored.items()}
    for stem, (name, rows) in places.items():
        down, up = (tensors[f"{stem}.lora_{end}.weight"].double() for end in ("down", "up"))
        change = 2 * torch.einsum("or,ri...->oi...", up.flatten(1), down)
        expected[name] = expected[name].clone()
        expected[name][rows] += change
        assert change.norm() / stored[name].norm() > 1e-2
    for name, each in merged.items():
        if name in {place for place, _ in places.values()}:
            assert (each.double() - expected[name]).abs().max() <= 2**-23 * expected[name].abs().max()
        else:
            assert torch.equal(each, stored[name])


def test_a_text_encoder_of_openclip_in_stable_diffusion_2_is_found(tmp_path: Path) -> None:
    pipe = sd()
    adapter = save_lora(pipe, tmp_path / "adapter", only=("text_encoder",))
    file = as_file(pipe, tmp_path / "base.safetensors", open_clip_only=True)
    lorahub.merge(file, {"one": str(adapter)}, out=tmp_path / "merged.safetensors")
    old, new = load_file(file), load_file(tmp_path / "merged.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {
        f"cond_stage_model.model.transformer.resblocks.{at}.attn.{end}"
        for at in range(3)
        for end in ("in_proj_weight", "out_proj.weight")
    }


def test_an_adapter_of_another_model_is_refused_by_name(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, file, _ = made
    save_file(kohya({"lora_unet_double_blocks_0_img_attn_qkv": (96, 32)}), tmp_path / "flux.safetensors")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(file, {"one": str(tmp_path / "flux.safetensors")}, out=tmp_path / "merged.safetensors")
    assert "double_blocks" in str(stop.value.findings)
    assert not (tmp_path / "merged.safetensors").exists()


def test_presets_name_modules_of_all_models_in_the_file(made: tuple[Any, Path, Path]) -> None:
    _, file, _ = made
    opened = open_base(file)
    attention = {target.name for target in opened.framework.targets(opened.index, "attention")}
    assert "unet:mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight" in attention
    assert "text_encoder:encoder.layers.0.self_attn.q_proj.weight" in attention
    assert not any("ff.net" in name or "embedding" in name for name in attention)


def test_the_file_alone_is_no_live_model(made: tuple[Any, Path, Path]) -> None:
    _, file, _ = made
    with pytest.raises(UnsupportedFormat, match="configuration") as stop:
        SingleFile().open_base(file)
    assert "from_single_file" in stop.value.hint


def test_a_saved_component_of_diffusers_is_not_taken_for_such_a_file(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "unet")
    assert open_base(tmp_path / "unet").framework.name == "diffusers"


# Original transformers, alone and with their text encoders


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("make", "fused"), [(flux, "double_blocks.0.img_attn.qkv"), (sd3, "joint_blocks.0.x_block.attn.qkv")]
)
def test_an_adapter_of_diffusers_lands_in_the_bands_of_a_fused_projection(
    make: Callable[[], Any], fused: str, prefix: str, tmp_path: Path
) -> None:
    pipe = make()
    adapter = save_lora(pipe, tmp_path / "adapter", only=("transformer",))
    stored = {f"{prefix}{name}": each.clone() for name, each in inverted(pipe.transformer).items()}
    if prefix:
        below = {"clip_l": pipe.text_encoder, "t5xxl": getattr(pipe, "text_encoder_3", pipe.text_encoder_2)}
        stored |= {
            f"text_encoders.{name}.transformer.{key}": each.clone()
            for name, model in below.items()
            for key, each in model.state_dict().items()
        }
    save_file({name: each.contiguous() for name, each in stored.items()}, tmp_path / "base.safetensors")
    lorahub.merge(tmp_path / "base.safetensors", {"one": str(adapter)}, out=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    quietly(lambda: pipe.load_lora_weights(adapter))
    quietly(lambda: pipe.fuse_lora(components=["transformer"]))
    pipe.transformer.unload_lora()
    theirs = inverted(pipe.transformer)
    assert {name.removeprefix(prefix) for name in merged if name.startswith(prefix)} >= theirs.keys()
    for name, expected in theirs.items():
        assert (merged[prefix + name] - expected).abs().max() <= 4e-6 * expected.abs().max().clamp_min(1)
    name = f"{prefix}{fused}.weight"
    assert (merged[name] - stored[name]).norm() / stored[name].norm() > 1e-2
    assert all(torch.equal(merged[key], each) for key, each in stored.items() if key.startswith("text_encoders."))


def exact(model: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of every linear layer under diffusers' names, and what their weights become with it.

    Its factors are small multiples of a power of two, so that no sum of products is rounded.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name in linear(model):
        weight = model.get_submodule(name).weight.detach()
        out, into = weight.shape
        down, up = (torch.randint(-3, 4, size, generator=generator) / 16 for size in ((3, into), (out, 3)))
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        change = up.double() @ down.double()
        assert change.norm() / weight.norm() > 1e-2
        expected[f"{name}.weight"] = (weight.double() + change).float()
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder, expected


def linear(model: Any) -> list[str]:
    """Names of the linear layers."""
    return [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]


PREFIXES = ("", "model.diffusion_model.")
CASES = [(family, prefix) for family in CONVERTERS if family != "lumina2" for prefix in PREFIXES]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        *CASES,
        pytest.param("lumina2", PREFIXES[1], marks=pytest.mark.slow),
    ],  # whose conversion knows its true size alone
)
def test_every_parameter_of_a_merged_checkpoint_is_the_models_to_the_bit(
    family: str, prefix: str, tmp_path: Path
) -> None:
    """As diffusers' own conversion takes it out of the file."""
    kind, arguments = SMALL[family]
    if family == "lumina2":
        arguments = {**arguments, "num_layers": 1}
    torch.manual_seed(0)
    model = quietly(lambda: getattr(diffusers, kind)(**arguments))
    converter, besides = CONVERTERS[family]
    plain = inverted(model) | {name: torch.zeros(size) for name, size in besides.items()}
    save_file({f"{prefix}{name}": each.clone() for name, each in plain.items()}, tmp_path / "base.safetensors")
    adapter, expected = exact(model, tmp_path / "adapter")
    assert isinstance(open_base(tmp_path / "base.safetensors").framework, SingleFile)
    lorahub.merge(tmp_path / "base.safetensors", {"one": str(adapter)}, out=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == {f"{prefix}{name}" for name in plain}
    stripped = {name.removeprefix(prefix): each for name, each in merged.items()}
    found, before = (getattr(single_file_utils, converter)(dict(each)) for each in (stripped, plain))
    assert found.keys() == before.keys() >= expected.keys()
    for name, each in found.items():
        assert torch.equal(each, expected.get(name, before[name])), name
    assert all(torch.equal(before[f"{name}.weight"], model.get_submodule(name).weight) for name in linear(model))


QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
HIDREAM = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": [16, 8],
    "text_emb_dim": 16,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (8, 8),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("kind", "arguments"), [("QwenImageTransformer2DModel", QWEN), ("HiDreamImageTransformer2DModel", HIDREAM)]
)
def test_models_that_diffusers_has_under_their_makers_names_lie_in_one_file_too(
    kind: str, arguments: Mapping[str, Any], prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = quietly(lambda: getattr(diffusers, kind)(**arguments))
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.randn(each.shape) * 0.05)  # some are made without numbers
    stored = {f"{prefix}{name}": each.clone() for name, each in model.state_dict().items()}
    save_file(stored, tmp_path / "base.safetensors")
    adapter, expected = exact(model, tmp_path / "adapter")
    assert isinstance(open_base(tmp_path / "base.safetensors").framework, SingleFile)
    lorahub.merge(tmp_path / "base.safetensors", {"one": str(adapter)}, out=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == stored.keys()
    for name, each in model.state_dict().items():
        assert torch.equal(merged[f"{prefix}{name}"], expected.get(name, each))
    model.save_pretrained(tmp_path / "folder")
    assert open_base(tmp_path / "folder").framework.name == "diffusers"


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_flat_names_of_a_model_that_all_name_alike_land_in_one_file(prefix: str, tmp_path: Path) -> None:
    model = quietly(lambda: diffusers.QwenImageTransformer2DModel(**QWEN))
    stored = {f"model.diffusion_model.{name}": each.clone() for name, each in model.state_dict().items()}
    save_file(stored, tmp_path / "base.safetensors")
    tensors = kohya({f"{prefix}transformer_blocks_1_attn_add_q_proj": (32, 32)})
    save_file(tensors, tmp_path / "kohya.safetensors")
    (step,) = lorahub.plan(tmp_path / "base.safetensors", {"one": str(tmp_path / "kohya.safetensors")}).steps
    assert step.out == "transformer:transformer_blocks.1.attn.add_q_proj.weight"


def test_the_t5_of_ltx_is_its_only_text_encoder() -> None:
    key = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    assert named({key, "patchify_proj.weight"}, "ltx-video", "")[key].component == "text_encoder"


def test_the_t5_of_flux_is_its_second_text_encoder_and_that_of_stable_diffusion_3_its_third() -> None:
    diffusion = {"flux": "double_blocks.0.x", "stable-diffusion-3": "joint_blocks.0.x"}
    key = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    both = {key, "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight"}
    assert named({key, diffusion["flux"]}, "flux", "")[key].component == "text_encoder_2"
    assert named({*both, diffusion["stable-diffusion-3"]}, "stable-diffusion-3", "")[key].component == "text_encoder_3"


def of_true_size(place: Path) -> Path:
    """Stable Diffusion 1.5 as one file: every tensor is there by name and shape, all of them zero and none written."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.device("meta"):
        first = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        second = transformers.CLIPTextModel(config)
    stored = {f"model.diffusion_model.{name}": each for name, each in original_unet(first.state_dict()).items()}
    clip = "cond_stage_model.transformer.text_model."
    stored |= {f"{clip}{name.removeprefix('text_model.')}": each for name, each in second.state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for name, each in stored.items():
        size = 2 * each.numel()
        header[name] = {"dtype": "F16", "shape": list(each.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with place.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return place


REAL: Mapping[str, tuple[int, int]] = {
    "KohakuBlueleaf__LyCORIS__lokr_4": (278, 72),
    "catundchat__stable-diffusion-v1.5-lora__sd15_cat_st": (128, 0),
    "huggingface__diffusers__sd_pokemon_docs": (128, 0),
    "hyper07__Skin-Lesion-Generation-Diffusion__sd_skin_peft": (128, 0),
}
"""Adapter of Stable Diffusion 1 -> how many parameters of the UNet and of the text encoder it changes."""


def test_real_adapters_of_four_formats_land_whole_in_a_checkpoint_of_true_size(
    real_adapters: Path, tmp_path: Path
) -> None:
    file = of_true_size(tmp_path / "v1-5.safetensors")
    for name, counts in REAL.items():
        planned = lorahub.plan(file, {"one": str(real_adapters / name)})
        parts = [step.out.partition(":")[0] for step in planned.steps]
        assert (parts.count("unet"), parts.count("text_encoder")) == counts
        assert not [each for each in planned.findings if each.level > Verdict.EXACT]
        assert all((step.stored_as or "").startswith(("model.diffusion", "cond_stage")) for step in planned.steps)
