"""Names of original models against those of diffusers: key for key what diffusers' own conversions give.

The bases are diffusers' models on the meta device, with their true sizes where those conversions count on them.  Holds
for diffusers 0.42.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.errors import LorahubError

FILE = "pytorch_lora_weights.safetensors"
WIDTH = 3072
"""Of Flux; diffusers' conversion knows no other."""


def drawn(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def kohya(sizes: Mapping[str, tuple[int, ...]], *, rank: int = 3) -> dict[str, torch.Tensor]:
    tensors = {}
    for seed, (name, (out, into, *kernel)) in enumerate(sizes.items()):
        stem = f"lora_unet_{name}"
        tensors[f"{stem}.lora_down.weight"] = drawn(rank, into, *kernel, seed=seed)
        tensors[f"{stem}.lora_up.weight"] = drawn(out, rank, *(1 for _ in kernel), seed=seed + 500)
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    return tensors


def same_tensors(ours: Path, theirs: Mapping[str, torch.Tensor], prefix: str) -> None:
    found = load_file(ours / FILE)
    expected = {f"{prefix}.{key.removeprefix(f'{prefix}.')}": each for key, each in theirs.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def flux() -> Any:
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def flux_sizes() -> dict[str, tuple[int, int]]:
    sizes = {}
    for side in ("img", "txt"):
        block = f"double_blocks_1_{side}"
        sizes[f"{block}_attn_qkv"] = (3 * WIDTH, WIDTH)
        sizes[f"{block}_attn_proj"] = (WIDTH, WIDTH)
        sizes[f"{block}_mlp_0"], sizes[f"{block}_mlp_2"] = (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
        sizes[f"{block}_mod_lin"] = (6 * WIDTH, WIDTH)
    sizes["single_blocks_0_linear1"], sizes["single_blocks_0_linear2"] = (7 * WIDTH, WIDTH), (WIDTH, 5 * WIDTH)
    sizes["single_blocks_0_modulation_lin"] = (3 * WIDTH, WIDTH)
    sizes["final_layer_adaLN_modulation_1"], sizes["final_layer_linear"] = (2 * WIDTH, WIDTH), (64, WIDTH)
    sizes["img_in"], sizes["txt_in"] = (WIDTH, 64), (WIDTH, 4096)
    sizes["time_in_in_layer"], sizes["vector_in_out_layer"] = (WIDTH, 256), (WIDTH, WIDTH)
    return sizes


def test_flux_of_kohya_is_split_as_diffusers_splits_it(tmp_path: Path) -> None:
    tensors = kohya(flux_sizes())
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=flux(), component="transformer", verify=False
    )
    assert report.rules["fused-to-split"] == 3 + 3 + 4
    assert report.losses == ()
    theirs = _convert_kohya_flux_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    same_tensors(tmp_path / "out", theirs, "transformer")


def test_flux_trained_with_split_qkv_gets_its_small_factors_back(tmp_path: Path) -> None:
    rank = 2
    up = torch.zeros(3 * WIDTH, 3 * rank)
    for at in range(3):
        up[at * WIDTH : (at + 1) * WIDTH, at * rank : (at + 1) * rank] = drawn(WIDTH, rank, seed=at)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": drawn(3 * rank, WIDTH, seed=9),
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(3.0 * rank),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=flux(), component="transformer"
    )
    assert [each.rank_after for each in report.targets] == [rank] * 3
    assert report.max_error == 0.0
    theirs = _convert_kohya_flux_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    same_tensors(tmp_path / "out", theirs, "transformer")


def small_flux() -> dict[str, tuple[int, ...]]:
    """A checkpoint of a small Flux under Black Forest Labs' names."""
    width = 16
    shapes = {}
    for side in ("img", "txt"):
        shapes[f"double_blocks.0.{side}_attn.qkv.weight"] = (3 * width, width)
        shapes[f"double_blocks.0.{side}_attn.proj.weight"] = (width, width)
    shapes["single_blocks.0.linear1.weight"] = (7 * width, width)
    shapes["single_blocks.0.linear2.weight"] = (width, 5 * width)
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * width, width)
    return shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux_of_diffusers_is_fused_for_the_original_and_splits_again_bit_for_bit(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    shapes = small_flux()
    weights = {f"{prefix}{name}": drawn(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}
    save_file(weights, tmp_path / "original" / "model.safetensors")
    with torch.device("meta"):
        split = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=(4, 2, 2)
        )
    modules = [
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0")),
        *(f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "norm_out.linear",
    ]
    tensors = {}
    for seed, module in enumerate(modules):
        out, into = split.get_submodule(module).weight.shape
        tensors[f"transformer.{module}.lora_A.weight"] = drawn(2, into, seed=seed)
        tensors[f"transformer.{module}.lora_B.weight"] = drawn(out, 2, seed=seed + 100)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / FILE)
    fused = lorahub.convert(
        tmp_path / "theirs",
        "kohya",
        tmp_path / "fused.safetensors",
        base=tmp_path / "original",
        component="transformer",
    )
    assert (fused.rules["split-to-fused"], fused.rules["rows-reordered"], fused.max_error) == (3, 1, 0.0)
    assert "lora_transformer_" + f"{prefix}double_blocks_0_img_attn_qkv.lora_up.weight".replace(
        "model.diffusion_model.", "model_diffusion_model_"
    ) in load_file(tmp_path / "fused.safetensors")
    back = lorahub.convert(
        tmp_path / "fused.safetensors", "diffusers", tmp_path / "back", base=split, component="transformer"
    ) if not prefix else None  # fmt: skip
    if back is not None:
        ours = load_file(tmp_path / "back" / FILE)
        assert all(torch.equal(ours[key], each) for key, each in tensors.items())


def sdxl() -> Any:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )


def stability(module: str) -> str:
    """Stability's name for an attention of SDXL: blocks of three layers are counted through."""
    side, block, _, at, *rest = module.split(".")
    if side == "mid_block":
        return ".".join(["middle_block", "1", *module.split(".")[3:]])
    first = 3 * int(block) + int(at) + (1 if side == "down_blocks" else 0)
    return ".".join(["input_blocks" if side == "down_blocks" else "output_blocks", str(first), "1", *rest])


def test_sdxl_under_stabilitys_names_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    model = sdxl()
    modules = {
        name: tuple(each.weight.shape)
        for name, each in model.named_modules()
        if ".attentions." in name and isinstance(each, torch.nn.Linear)
    }
    tensors = kohya({stability(name).replace(".", "_"): shape for name, shape in modules.items()}, rank=1)
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=model, component="unet")
    assert (dict(report.rules), report.max_error) == ({"rename": len(modules)}, 0.0)
    ours = load_file(tmp_path / "out" / FILE)
    assert {key.removeprefix("unet.").partition(".lora_")[0] for key in ours} == modules.keys()
    mapped = quietly(
        lambda: _maybe_map_sgm_blocks_to_diffusers({key: each.clone() for key, each in tensors.items()}, model.config)
    )
    theirs = convert_unet_state_dict_to_peft(_convert_non_diffusers_lora_to_diffusers(mapped)[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_module_of_stable_diffusions_unet_has_one_name_with_stability(tmp_path: Path) -> None:
    """Residual blocks, samplers and embeddings: kohya's own names for convolutions, counted by hand."""
    expected = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
        "out_2": "conv_out",
    }
    model = sdxl()
    sizes = {name: tuple(model.get_submodule(module).weight.shape) for name, module in expected.items()}
    sizes |= {"time_embed_0": (1280, 320), "label_emb_0_2": (1280, 1280), "input_blocks_1_0_emb_layers_1": (320, 1280)}
    save_file(kohya(sizes, rank=1), tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=model, component="unet")
    found = {each.sources[0]: each.target for each in report.targets}
    assert report.max_error == 0.0
    assert {target.removeprefix("unet:").removesuffix(".weight") for target in found.values()} == {
        *expected.values(),
        "time_embedding.linear_1",
        "add_embedding.linear_2",
        "down_blocks.0.resnets.0.time_emb_proj",
    }


def test_wan_under_its_own_names_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, text_dim=16, freq_dim=16
        )
    width = 24
    sizes = {f"blocks.1.{kind}_attn.{name}": (width, width) for kind in ("self", "cross") for name in "qkvo"}
    sizes |= {"blocks.0.ffn.0": (32, width), "blocks.0.ffn.2": (width, 32)}
    tensors = {}
    for seed, (name, (out, into)) in enumerate(sizes.items()):
        tensors[f"diffusion_model.{name}.lora_A.weight"] = drawn(2, into, seed=seed)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = drawn(out, 2, seed=seed + 100)
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=model, component="transformer"
    )
    assert report.max_error == 0.0
    theirs = quietly(
        lambda: _convert_non_diffusers_wan_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    )
    same_tensors(tmp_path / "out", theirs, "transformer")


def test_xlabs_processors_land_where_diffusers_puts_them(tmp_path: Path) -> None:
    tensors = {}
    sizes = {"qkv_lora1": 3 * WIDTH, "qkv_lora2": 3 * WIDTH, "proj_lora1": WIDTH, "proj_lora2": WIDTH}
    for seed, (name, out) in enumerate(sizes.items()):
        stem = f"double_blocks.1.processor.{name}"
        tensors[f"{stem}.down.weight"] = drawn(2, WIDTH, seed=seed)
        tensors[f"{stem}.up.weight"] = drawn(out, 2, seed=seed + 100)
    save_file(tensors, tmp_path / "x.safetensors")
    lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=flux(), component="transformer", verify=False
    )
    theirs = _convert_xlabs_flux_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    same_tensors(tmp_path / "out", theirs, "transformer")


def test_clip_under_the_names_of_either_release(tmp_path: Path) -> None:
    """transformers 5 took ``text_model.`` away, and files in the wild have it."""
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.CLIPTextModel(config)
    names = {name for name, _ in model.named_modules()}
    within = "text_model." if "text_model.encoder.layers.0.mlp.fc1" in names else ""
    for spelled in ("text_model_encoder_layers_0_mlp_fc1", "encoder_layers_0_mlp_fc1"):
        tensors = {key.replace("lora_unet", "lora_te"): each for key, each in kohya({spelled: (24, 16)}).items()}
        save_file(tensors, tmp_path / f"{spelled}.safetensors")
        report = lorahub.convert(
            tmp_path / f"{spelled}.safetensors", "diffusers", tmp_path / spelled, base=model, component="text_encoder"
        )
        assert [each.target for each in report.targets] == [f"text_encoder:{within}encoder.layers.0.mlp.fc1.weight"]
        assert report.max_error == 0.0


def test_a_module_that_neither_vocabulary_has_is_refused_with_the_others_of_its_part(tmp_path: Path) -> None:
    sizes = {"double_blocks_0_img_attn_proj": (WIDTH, WIDTH), "double_blocks_7_img_attn_proj": (WIDTH, WIDTH)}
    save_file(kohya(sizes), tmp_path / "x.safetensors")
    with pytest.raises(LorahubError, match="double_blocks_7_img_attn_proj"):
        lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=flux(), component="transformer")
    assert not (tmp_path / "out").exists()
