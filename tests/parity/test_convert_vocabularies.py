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
    _convert_hunyuan_video_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.errors import LorahubError
from lorahub.findings import Verdict

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
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "fused.safetensors")}
    assert stems == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_unet_single_blocks_0_linear1",
        "lora_unet_final_layer_adaLN_modulation_1",
    }
    lorahub.convert(tmp_path / "fused.safetensors", "diffusers", tmp_path / "back", base=split)
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


def dotted(sizes: Mapping[str, tuple[int, int]], prefix: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for seed, (name, (out, into)) in enumerate(sizes.items()):
        tensors[f"{prefix}{name}.lora_A.weight"] = drawn(2, into, seed=seed)
        tensors[f"{prefix}{name}.lora_B.weight"] = drawn(out, 2, seed=seed + 100)
    return tensors


@pytest.mark.parametrize("stack", ["layers", "noise_refiner", "context_refiner"])
def test_z_image_with_fused_attention_is_split_as_diffusers_splits_it(stack: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = diffusers.ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4]
        )
    sizes = {f"{stack}.0.attention.qkv": (96, 32), f"{stack}.0.attention.out": (32, 32)}
    sizes[f"{stack}.0.feed_forward.w1"] = (85, 32)
    flat = kohya({name.replace(".", "_"): size for name, size in sizes.items()})
    save_file(flat, tmp_path / "flat.safetensors")
    named = {}
    for name in sizes:
        stem = f"lora_unet_{name.replace('.', '_')}"
        named[f"diffusion_model.{name}.lora_A.weight"] = flat[f"{stem}.lora_down.weight"]
        named[f"diffusion_model.{name}.lora_B.weight"] = flat[f"{stem}.lora_up.weight"]
    save_file(named, tmp_path / "dotted.safetensors")
    theirs = _convert_non_diffusers_z_image_lora_to_diffusers({key: each.clone() for key, each in flat.items()})
    assert len(theirs) == 2 * (3 + 1 + 1)
    for spelled in ("flat", "dotted"):
        report = lorahub.convert(
            tmp_path / f"{spelled}.safetensors", "diffusers", tmp_path / spelled, base=model, component="transformer"
        )
        assert (report.max_error, report.losses) == (0.0, ())
        same_tensors(tmp_path / spelled, theirs, "transformer")


@pytest.mark.parametrize("component", ["", "unet", "transformer"])
def test_flat_names_of_no_known_model_need_a_base_whatever_the_part_is_called(component: str, tmp_path: Path) -> None:
    save_file(kohya({"layers_0_attention_qkv": (96, 32)}), tmp_path / "x.safetensors")
    with pytest.raises(LorahubError, match="names-unknown"):
        lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", component=component)
    assert not (tmp_path / "out").exists()


def test_the_second_flux_under_its_makers_names_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=8,
            axes_dims_rope=[4, 4, 4, 4],
        )
    sizes = {}
    for side in ("img", "txt"):
        block = f"double_blocks.1.{side}"
        sizes[f"{block}_attn.qkv"], sizes[f"{block}_attn.proj"] = (96, 32), (32, 32)
        sizes[f"{block}_mlp.0"], sizes[f"{block}_mlp.2"] = (192, 32), (32, 96)
        sizes[f"double_stream_modulation_{side}.lin"] = (192, 32)
    sizes |= {"single_blocks.0.linear1": (288, 32), "single_blocks.0.linear2": (32, 128)}
    sizes |= {"single_stream_modulation.lin": (96, 32), "img_in": (32, 8), "txt_in": (32, 16)}
    sizes |= {"time_in.in_layer": (32, 8), "guidance_in.out_layer": (32, 32), "final_layer.linear": (8, 32)}
    tensors = dotted(sizes, "diffusion_model.")
    theirs = _convert_non_diffusers_flux2_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    # as the conversion of whole models has it: diffusers' conversion of adapters forgets the halves
    up = drawn(64, 2, seed=77)
    tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight"] = drawn(2, 32, seed=78)
    tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"] = up
    theirs["transformer.norm_out.linear.lora_A.weight"] = drawn(2, 32, seed=78)
    theirs["transformer.norm_out.linear.lora_B.weight"] = torch.cat([up[32:], up[:32]])
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=model, component="transformer"
    )
    assert (report.max_error, report.losses) == (0.0, ())
    same_tensors(tmp_path / "out", theirs, "transformer")


def hunyuan() -> Any:
    with torch.device("meta"):
        return diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1)


def test_hunyuan_video_under_its_makers_names_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    """But for what diffusers cuts along the rank: the refiner's attention, and the halves of the final modulation."""
    sizes = {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        sizes[f"{block}_attn_qkv"], sizes[f"{block}_attn_proj"] = (3 * WIDTH, WIDTH), (WIDTH, WIDTH)
        sizes[f"{block}_mlp.fc1"], sizes[f"{block}_mlp.fc2"] = (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
        sizes[f"{block}_mod.linear"] = (6 * WIDTH, WIDTH)
    sizes |= {"single_blocks.0.linear1": (7 * WIDTH, WIDTH), "single_blocks.0.linear2": (WIDTH, 5 * WIDTH)}
    sizes |= {"single_blocks.0.modulation.linear": (3 * WIDTH, WIDTH), "final_layer.linear": (64, WIDTH)}
    refiner = "txt_in.individual_token_refiner.blocks.0"
    sizes |= {f"{refiner}.self_attn_proj": (WIDTH, WIDTH), f"{refiner}.mlp.fc1": (4 * WIDTH, WIDTH)}
    sizes |= {f"{refiner}.adaLN_modulation.1": (2 * WIDTH, WIDTH), "txt_in.input_embedder": (WIDTH, 4096)}
    sizes |= {"txt_in.t_embedder.mlp.0": (WIDTH, 256), "txt_in.c_embedder.linear_2": (WIDTH, WIDTH)}
    sizes |= {"time_in.mlp.2": (WIDTH, WIDTH), "guidance_in.mlp.0": (WIDTH, 256), "vector_in.in_layer": (WIDTH, 768)}
    tensors = dotted(sizes, "transformer.")
    theirs = _convert_hunyuan_video_lora_to_diffusers({key: each.clone() for key, each in tensors.items()})
    split = dotted({f"{refiner}.self_attn_qkv": (3 * WIDTH, WIDTH)}, "")
    refined = "context_embedder.token_refiner.refiner_blocks.0.attn"
    down, up = split.values()
    for at, each in enumerate("qkv"):
        theirs[f"{refined}.to_{each}.lora_A.weight"] = down
        theirs[f"{refined}.to_{each}.lora_B.weight"] = up[WIDTH * at : WIDTH * (at + 1)]
    halves = dotted({"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}, "")
    down, up = halves.values()
    theirs["norm_out.linear.lora_A.weight"] = down
    theirs["norm_out.linear.lora_B.weight"] = torch.cat([up[WIDTH:], up[:WIDTH]])
    tensors |= {f"transformer.{key}": each for key, each in (split | halves).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=hunyuan(), component="transformer", verify=False
    )
    assert report.losses == ()
    same_tensors(tmp_path / "out", theirs, "transformer")


def test_hunyuan_video_goes_to_diffusers_and_comes_back_to_musubis_keys(tmp_path: Path) -> None:
    tensors = kohya(
        {"double_blocks_0_img_attn_qkv": (3 * WIDTH, WIDTH), "single_blocks_0_modulation_linear": (3 * WIDTH, WIDTH)}
    )
    save_file(tensors, tmp_path / "x.safetensors")
    lorahub.convert(
        tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=hunyuan(), component="transformer", verify=False
    )
    assert {key.partition(".lora_")[0] for key in load_file(tmp_path / "out" / FILE)} == {
        *(f"transformer.transformer_blocks.0.attn.to_{each}" for each in "qkv"),
        "transformer.single_transformer_blocks.0.norm.linear",
    }
    lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back.safetensors", base=hunyuan(), verify=False)
    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], each) for key, each in tensors.items())


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


def tiny_flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def loaded(folder: Path, model: Any) -> set[str]:
    """The modules of the model that diffusers puts the file's factors on."""

    def load() -> None:
        state, metadata = diffusers.FluxPipeline.lora_state_dict(folder, return_lora_metadata=True)[:2]
        assert metadata is None or isinstance(metadata, dict)
        diffusers.FluxPipeline.load_lora_into_transformer(state, network_alphas=None, transformer=model)

    quietly(load)
    names = {name for name, _ in model.named_modules() if ".lora_A." in name}
    return {name.partition(".lora_A.")[0] for name in names}


TINY: Mapping[str, tuple[int, int]] = {
    "double_blocks_0_img_attn_qkv": (48, 16),
    "double_blocks_0_txt_attn_proj": (16, 16),
    "single_blocks_0_linear1": (112, 16),
    "final_layer_adaLN_modulation_1": (32, 16),
}
SPLIT = {
    *(f"transformer_blocks.0.attn.to_{each}" for each in "qkv"),
    "transformer_blocks.0.attn.to_add_out",
    *(f"single_transformer_blocks.0.attn.to_{each}" for each in "qkv"),
    "single_transformer_blocks.0.proj_mlp",
    "norm_out.linear",
}


def original_tiny_flux(place: Path) -> Path:
    shapes = {"double_blocks.0.img_attn.qkv": (48, 16), "double_blocks.0.txt_attn.proj": (16, 16)}
    shapes |= {"single_blocks.0.linear1": (112, 16), "final_layer.adaLN_modulation.1": (32, 16)}
    save_file({f"{name}.weight": drawn(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}, place)
    return place


@pytest.mark.parametrize("based", ["none", "original", "diffusers"])
def test_flux_of_kohya_is_what_diffusers_loads_whatever_the_base_is_called(based: str, tmp_path: Path) -> None:
    save_file(kohya(TINY), tmp_path / "x.safetensors")
    base = {"none": None, "original": original_tiny_flux(tmp_path / "base.safetensors"), "diffusers": tiny_flux()}[
        based
    ]
    report = lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=base)
    assert (report.max_error, report.losses) == (0.0, ())
    assert loaded(tmp_path / "out", tiny_flux()) == SPLIT
    split = lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "split", base=tiny_flux())
    assert report.rules == split.rules
    one, other = load_file(tmp_path / "out" / FILE), load_file(tmp_path / "split" / FILE)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_flux_goes_to_diffusers_and_comes_back_to_kohyas_own_keys(tmp_path: Path) -> None:
    tensors = kohya(TINY)
    save_file(tensors, tmp_path / "x.safetensors")
    lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out")
    report = lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back.safetensors")
    assert report.max_error == 0.0
    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], each) for key, each in tensors.items())


def test_a_base_in_the_other_vocabulary_does_not_change_what_the_tool_reads(tmp_path: Path) -> None:
    """Split and turned for the base, and fused and turned back for kohya: the numbers are those that were given."""
    tensors = kohya(TINY)
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", "kohya", tmp_path / "back.safetensors", base=tiny_flux())
    assert report.max_error == 0.0
    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], each) for key, each in tensors.items())


def test_a_part_of_a_pipeline_may_be_called_what_diffusers_calls_it(tmp_path: Path) -> None:
    save_file(kohya(TINY), tmp_path / "x.safetensors")
    lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", component="transformer")
    assert loaded(tmp_path / "out", tiny_flux()) == SPLIT


def test_a_pipelines_flux_becomes_the_files_of_sd_scripts_and_diffusers_splits_them_again(tmp_path: Path) -> None:
    """Fused where one of three was trained too; diffusers' own conversion reads the keys, and knows one width only."""
    sizes = {"attn.to_q": (WIDTH, WIDTH), "attn.to_v": (WIDTH, WIDTH), "ff.net.0.proj": (4 * WIDTH, WIDTH)}
    tensors = {}
    for seed, (name, (out, into)) in enumerate(sizes.items()):
        tensors[f"transformer.transformer_blocks.1.{name}.lora_A.weight"] = drawn(2, into, seed=seed)
        tensors[f"transformer.transformer_blocks.1.{name}.lora_B.weight"] = drawn(out, 2, seed=seed + 100)
    stem = "transformer.single_transformer_blocks.0.proj_mlp"
    tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = (
        drawn(2, WIDTH, seed=7),
        drawn(4 * WIDTH, 2, seed=8),
    )
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / FILE)
    lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors", verify=False)
    written = load_file(tmp_path / "x.safetensors")
    assert {key.partition(".")[0] for key in written} == {
        "lora_unet_double_blocks_1_img_attn_qkv",
        "lora_unet_double_blocks_1_img_mlp_0",
        "lora_unet_single_blocks_0_linear1",
    }
    found = _convert_kohya_flux_lora_to_diffusers({key: each.clone() for key, each in written.items()})
    for key in [key for key in tensors if ".lora_A." in key]:
        other = key.replace(".lora_A.", ".lora_B.")
        change, ours = tensors[other].double() @ tensors[key].double(), found[other].double() @ found[key].double()
        assert change.norm() > 1e-2
        assert (change - ours).norm() <= 1e-6 * change.norm()
    key = "transformer.transformer_blocks.1.attn.to_k.lora_{}.weight"
    assert not (found[key.format("B")] @ found[key.format("A")]).any() if key.format("B") in found else True


def test_wan_of_diffusers_becomes_musubis_keys_and_diffusers_reads_them_back(tmp_path: Path) -> None:
    tensors = {}
    for seed, name in enumerate(("blocks.0.attn1.to_k", "blocks.1.attn2.to_out.0", "blocks.0.ffn.net.0.proj")):
        tensors[f"transformer.{name}.lora_A.weight"] = drawn(2, 24, seed=seed)
        tensors[f"transformer.{name}.lora_B.weight"] = drawn(24, 2, seed=seed + 100)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / FILE)
    report = lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors")
    assert report.max_error == 0.0
    assert {key.partition(".")[0] for key in load_file(tmp_path / "x.safetensors")} == {
        "lora_unet_blocks_0_self_attn_k",
        "lora_unet_blocks_1_cross_attn_o",
        "lora_unet_blocks_0_ffn_0",
    }
    lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "back")
    back = load_file(tmp_path / "back" / FILE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], each) for key, each in tensors.items())


@pytest.mark.parametrize(("to", "prefix"), [("diffusers", "transformer."), ("peft", "base_model.model.")])
def test_xlabs_processors_need_no_base_to_become_the_modules_that_they_change(
    to: str, prefix: str, tmp_path: Path
) -> None:
    stem = "double_blocks.0.processor.qkv_lora1"
    tensors = {f"{stem}.down.weight": drawn(2, 16, seed=0), f"{stem}.up.weight": drawn(48, 2, seed=1)}
    save_file(tensors, tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", to, tmp_path / "out")
    assert "layout-undeclared" not in {finding.code for finding in report.findings}
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    modules = {key.removeprefix(prefix).partition(".lora_")[0] for key in found}
    assert modules == {f"transformer_blocks.0.attn.to_{each}" for each in "qkv"}
    for at, each in enumerate("qkv"):
        up = found[f"{prefix}transformer_blocks.0.attn.to_{each}.lora_B.weight"]
        assert torch.equal(up, tensors[f"{stem}.up.weight"][16 * at : 16 * (at + 1)])
    lorahub.convert(tmp_path / "x.safetensors", "kohya", tmp_path / "fused.safetensors")
    fused = load_file(tmp_path / "fused.safetensors")
    assert torch.equal(fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], tensors[f"{stem}.up.weight"])


def test_names_that_several_models_share_are_not_guessed_at(tmp_path: Path) -> None:
    """Attention of Flux, Stable Diffusion 3 and Qwen-Image: the same for diffusers, three vocabularies elsewhere."""
    stem = "transformer.transformer_blocks.0.attn.to_q"
    (tmp_path / "theirs").mkdir()
    save_file({f"{stem}.lora_A.weight": drawn(2, 16, seed=0), f"{stem}.lora_B.weight": drawn(16, 2, seed=1)},
              tmp_path / "theirs" / FILE)  # fmt: skip
    with pytest.raises(LorahubError, match="several models") as stop:
        lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors")
    assert "--base DIFFUSERS_FOLDER" in stop.value.hint
    assert {finding.code for finding in stop.value.findings} == {"names-unknown"}
    lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors", base=tiny_flux(), component="transformer")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_makers_name_that_no_word_is_known_for_is_refused(to: str, tmp_path: Path) -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.elsewhere"
    save_file({f"{stem}.lora_A.weight": drawn(2, 16, seed=0), f"{stem}.lora_B.weight": drawn(16, 2, seed=1)},
              tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(LorahubError, match="original makers") as stop:
        lorahub.convert(tmp_path / "x.safetensors", to, tmp_path / "out")
    assert "--base DIFFUSERS_FOLDER" in stop.value.hint
    assert not (tmp_path / "out").exists()


def test_what_kohyas_trainers_do_not_read_is_written_with_a_word_about_who_does(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn1.to_q"
    (tmp_path / "theirs").mkdir()
    save_file({f"{stem}.lora_A.weight": drawn(2, 16, seed=0), f"{stem}.lora_B.weight": drawn(16, 2, seed=1)},
              tmp_path / "theirs" / FILE)  # fmt: skip
    report = lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors")
    (finding,) = [each for each in report.findings if each.code == "names-of-diffusers"]
    assert "ComfyUI and OneTrainer read" in finding.message
    assert finding.level == Verdict.UNVERIFIED  # said aloud, and no obstacle
    assert "lora_transformer_transformer_blocks_0_attn1_to_q.alpha" in load_file(tmp_path / "x.safetensors")


def test_clip_is_written_for_kohya_as_kohya_names_it_and_read_by_either_release(tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.CLIPTextModel(config)
    old, new = tmp_path / "old", tmp_path / "new"
    model.save_pretrained(new)
    model.save_pretrained(old)
    weights = load_file(new / "model.safetensors")
    bare = {name.removeprefix("text_model."): each for name, each in weights.items()}
    save_file(bare, new / "model.safetensors")
    save_file({f"text_model.{name}": each for name, each in bare.items()}, old / "model.safetensors")
    for written in ("", "text_model."):
        folder = tmp_path / f"theirs{written}"
        folder.mkdir()
        stem = f"text_encoder.{written}encoder.layers.0.mlp.fc1"
        factors = {f"{stem}.lora_A.weight": drawn(2, 16, seed=0), f"{stem}.lora_B.weight": drawn(24, 2, seed=1)}
        save_file(factors, folder / FILE)
        for base in (None, old, new):
            place = tmp_path / f"{written}{base.name if base else 'none'}.safetensors"
            part = {"component": "text_encoder"} if base else {}
            lorahub.convert(folder, "kohya", place, base=base, **part)
            assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in load_file(place)
            for there in (old, new):
                report = lorahub.check(place, base=there)
                assert "target-missing" not in {finding.code for finding in report.findings}
