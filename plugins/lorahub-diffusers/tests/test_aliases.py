"""The makers' words against diffusers: against its classes, built small on the meta device, and its own conversions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import flux, sdxl, unet
from tiny_files import inverted, weighted
from tiny_originals import CONVERTERS, SMALL

import lorahub
from lorahub.conversion.unet_blocks import counted, grouped
from lorahub.conversion.vocabulary import speaks, words
from lorahub.conversion.words import TABLES
from lorahub.errors import BaseMismatch
from lorahub.findings import Verdict
from lorahub_diffusers.single_file_names import told_apart

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils", reason="diffusers is not installed")

SAME = ("lumina2", "z-image", "ltx", "wan")
"""Families of which some attention has the same name in both vocabularies, so no word."""


@lru_cache
def built(family: str) -> Any:
    """The class on the meta device, for all tests once; what it warns of is its own affair."""
    name, arguments = SMALL[family]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**arguments)


@pytest.mark.parametrize("family", SMALL)
def test_every_word_of_a_family_names_modules_of_its_class(family: str) -> None:
    """Each word of the table is used, but for those of variants; and what it names is there, with rows to share."""
    known = weighted(built(family))
    assert speaks(known.keys())
    found = list(words(known.keys()))
    assert found
    for word in found:
        assert known.keys() >= set(word.parts)
        rows = [known[part][0] for part in word.parts]
        assert all(count * word.shares[0] == rows[0] * share for count, share in zip(rows, word.shares, strict=True))
        assert not word.halves_swapped or rows[0] % 2 == 0


OPTIONAL: Mapping[str, frozenset[str]] = {
    "chroma": frozenset({"mod", "modulation", "time_in", "vector_in", "guidance_in", "adaLN_modulation"}),
    "flux": frozenset({"distilled_guidance_layer"}),
    "hunyuan": frozenset(),
    "ltx": frozenset({"audio", "av_ca", "_attn.", "audio_adaln_single"}),
    "mochi": frozenset(),
}
"""Family -> marks of words that this class, or this size of it, has no module for."""


@pytest.mark.parametrize("family", SMALL)
def test_no_word_of_a_table_is_for_nothing(family: str) -> None:
    known = weighted(built(family)).keys()
    used = {word.name for word in words(known)}
    for word in TABLES["flux" if family == "chroma" else family]:
        spelled = [word.name.replace("{n}", str(number)) for number in range(4)]
        if used.isdisjoint(spelled):
            assert any(mark in word.name for mark in OPTIONAL.get(family, ())), word


@pytest.mark.parametrize("family", SMALL)
def test_every_layer_of_attention_and_feed_forward_has_a_word_or_is_called_alike(family: str) -> None:
    known = weighted(built(family))
    spoken = {part for word in words(known.keys()) for part in word.parts}
    inside = {
        name
        for name, shape in known.items()
        if len(shape) > 1
        and any(mark in f".{name}." for mark in (".attn", "attention", ".ff", "feed_forward", ".proj_mlp."))
    }
    assert inside
    silent = inside - spoken
    assert not silent or family in SAME, sorted(silent)
    for name in silent:  # of these, what stays silent is spelled alike: nothing is fused or renamed around it
        assert not any(part.rpartition(".")[0] == name.rpartition(".")[0] and "qkv" in part for part in spoken)


def _marks(family: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if family == "lumina2" else []  # whose conversion knows its true size alone


@pytest.mark.parametrize("family", [pytest.param(each, marks=_marks(each)) for each in CONVERTERS])
def test_the_words_say_what_diffusers_own_conversion_does(family: str) -> None:
    name, arguments = SMALL[family]
    if family == "lumina2":
        arguments = {**arguments, "num_layers": 1}
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**arguments)
    converter, besides = CONVERTERS[family]
    stored = inverted(model) | {each: torch.zeros(size) for each, size in besides.items()}
    found = getattr(single_file_utils, converter)(dict(stored))
    own = model.state_dict()
    checked = 0
    for word in words(weighted(model).keys()):
        for part in word.parts:
            if f"{part}.weight" in own:
                assert torch.equal(found[f"{part}.weight"], own[f"{part}.weight"])
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("arguments", [{}, {"layers_per_block": 2}, {"use_linear_projection": True}])
def test_the_unet_is_counted_as_diffusers_counts_it_both_ways(arguments: dict[str, Any]) -> None:
    model = unet(**arguments)
    state = model.state_dict()
    names = counted({name.rpartition(".")[0] for name in state})
    stored = {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": each for name, each in state.items()}
    whole = {f"model.diffusion_model.{name}": each for name, each in stored.items()}
    found = single_file_utils.convert_ldm_unet_checkpoint(whole, dict(model.config))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], each) for name, each in state.items())
    assert grouped({name.rpartition(".")[0] for name in stored}) == {other: name for name, other in names.items()}


def test_a_unet_that_is_counted_otherwise_is_not_guessed_at() -> None:
    """The second block is deeper than the first: counting back would give other names."""
    strange = {"input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "input_blocks.5.0.op", "input_blocks.4.1.proj_in"}
    assert grouped(strange) == {}
    assert grouped({"input_blocks.1.0.in_layers.2", "input_blocks.2.0.op"}) == {
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    }


# Adapters in these words, merged and attached


def test_a_fused_layer_of_any_kind_lands_in_its_three_parts(tmp_path: Path) -> None:
    """LoRA, DoRA, LoHa and LoKr on Flux's fused projection, against the change worked out in float64."""
    pipe = flux()
    pipe.transformer.save_pretrained(tmp_path / "base")
    own = {name: each.double() for name, each in pipe.transformer.state_dict().items()}
    parts = [f"transformer_blocks.0.attn.to_{each}.weight" for each in "qkv"]
    fused = torch.cat([own[name] for name in parts])
    stem, size = "lora_unet_double_blocks_0_img_attn_qkv", fused.shape[1]
    torch.manual_seed(0)
    down, up = torch.randn(2, size), torch.randn(3 * size, 2) / 20
    lengths = torch.rand(3 * size, 1) + 0.5
    a, b, c, d = torch.randn(3 * size, 2) / 9, torch.randn(2, size), torch.randn(3 * size, 2) / 9, torch.randn(2, size)
    small, large = torch.randn(6, 4) / 9, torch.randn(3 * size // 6, size // 4)
    plain = up.double() @ down.double()
    sum_ = fused + plain
    changes = {
        "lora": ({"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}, plain),
        "dora": (
            {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": lengths},
            lengths.double() * sum_ / sum_.norm(dim=1, keepdim=True) - fused,
        ),
        "loha": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(2.0)},
            (a.double() @ b.double()) * (c.double() @ d.double()),
        ),
        "lokr": (
            {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(2.0)},
            torch.kron(small.double(), large.double()),
        ),
    }
    for kind, (tensors, change) in changes.items():
        assert change.norm() / fused.norm() > 1e-2
        file = tmp_path / f"{kind}.safetensors"
        save_file({f"{stem}.{end}": each for end, each in tensors.items()}, file)
        lorahub.merge(tmp_path / "base", {"one": str(file)}, out=tmp_path / kind)
        merged = load_file(tmp_path / kind / "diffusion_pytorch_model.safetensors")
        found = torch.cat([merged[name] for name in parts]).double()
        bound = 2**-20 * float((fused + change).abs().max())
        assert (found - fused - change).abs().max() <= bound
        assert all(torch.equal(merged[name].double(), own[name]) for name in own if name not in parts)


def test_attached_in_the_makers_words_is_merged_in_them(tmp_path: Path) -> None:
    model = flux().transformer
    stem = "lora_unet_single_blocks_1_linear1"
    torch.manual_seed(0)
    tensors = {"lora_down.weight": torch.randn(2, 32), "lora_up.weight": torch.randn(7 * 32, 2) / 5}
    save_file({f"{stem}.{end}": each for end, each in tensors.items()}, tmp_path / "x.safetensors")
    given = {"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 32)}
    more = {"pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5])}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}

    def run() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(**given, **more, **ids, return_dict=False)[0]
        return result

    plain = run()
    with lorahub.attach(model, {"one": str(tmp_path / "x.safetensors")}):
        attached = run()
    assert torch.equal(run(), plain)
    merged = lorahub.merge(model, {"one": str(tmp_path / "x.safetensors")})
    assert (plain - attached).norm() / plain.norm() > 1e-2
    assert (run() - attached).abs().max() <= 1e-4 * attached.abs().max()
    merged.undo()
    assert torch.equal(run(), plain)


def test_a_check_says_which_modules_have_other_names_here(tmp_path: Path) -> None:
    sdxl().save_pretrained(tmp_path / "pipe")
    stem = "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 64), f"{stem}.lora_up.weight": torch.ones(64, 2)},
        tmp_path / "x.safetensors",
    )
    report = lorahub.check(tmp_path / "x.safetensors", tmp_path / "pipe")
    assert report.verdict is Verdict.UNVERIFIED
    noted = next(each for each in report.findings if each.code == "names-translated")
    assert "unet:down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k" in noted.message


def test_a_live_pipeline_takes_kohyas_names_in_all_its_models(tmp_path: Path) -> None:
    pipe = sdxl()
    places = {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
            "unet:down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight",
            64,
        ),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder:encoder.layers.0.self_attn.q_proj.weight",
            32,
        ),
        "lora_te2_text_model_encoder_layers_2_self_attn_v_proj": (
            "text_encoder_2:text_model.encoder.layers.2.self_attn.v_proj.weight",
            32,
        ),
    }
    tensors: dict[str, torch.Tensor] = {}
    for stem, (_, size) in places.items():
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, size), f"{stem}.lora_up.weight": torch.ones(size, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    merged = lorahub.merge(pipe, {"x": str(tmp_path / "x.safetensors")})
    assert merged.report.changes.keys() == {name for name, _ in places.values()}
    assert all(change and change > 1e-2 for change in merged.report.changes.values())
    merged.undo()


def test_what_no_vocabulary_has_is_refused_by_name(tmp_path: Path) -> None:
    flux().transformer.save_pretrained(tmp_path / "base")
    stem = "lora_unet_double_blocks_7_img_attn_qkv"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(96, 2)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(tmp_path / "base", {"x": str(tmp_path / "x.safetensors")}, out=tmp_path / "out")
    assert any("double_blocks_7" in name for each in stop.value.findings for name in each.where)


# Layouts of real files, on models of the true size


def fake(layout: Mapping[str, Any], place: Path) -> Path:
    """A file with these tensors, all of them zero and none of them written."""
    header: dict[str, Any] = {}
    end = 0
    for key, about in layout.items():
        shape = about["shape"] if isinstance(about, dict) else about
        size = 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return place


ALONE: Mapping[str, tuple[str, str, str]] = {
    "flux": ("flux", "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv"),
    "flux2": ("flux-2", "transformer_blocks.1.attn.add_k_proj", "double_blocks.1.txt_attn.qkv"),
    "hunyuan": ("hunyuan-video", "single_transformer_blocks.0.attn.to_v", "single_blocks.0.linear1"),
    "sd3": ("stable-diffusion-3", "transformer_blocks.0.attn.to_q", "joint_blocks.0.x_block.attn.qkv"),
    "wan": ("wan", "blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o"),
    "auraflow": ("auraflow", "joint_transformer_blocks.0.attn.add_k_proj", "double_layers.0.attn.w1k"),
    "ltx": ("ltx-video", "time_embed.linear", "adaln_single.linear"),
    "lumina2": ("lumina-2", "noise_refiner.1.attn.to_v", "noise_refiner.1.attention.qkv"),
    "mochi": ("mochi", "transformer_blocks.0.ff.net.2", "blocks.0.mlp_x.w2"),
    "sana": ("sana", "transformer_blocks.1.attn2.to_k", "blocks.1.cross_attn.kv_linear"),
    "z-image": ("z-image", "layers.1.attention.to_q", "layers.1.attention.qkv"),
}
"""Family -> what its checkpoints are called, a module of diffusers, and the stored one that it is or is a part of."""


@pytest.mark.parametrize("family", [pytest.param(each, marks=_marks(each)) for each in ALONE])
def test_an_original_checkpoint_of_one_model_is_a_base_for_diffusers_names(family: str, tmp_path: Path) -> None:
    called, module, stored = ALONE[family]
    model = built(family)
    layout = {name: list(each.shape) for name, each in inverted(model).items()}
    assert told_apart(layout) == (called, "")
    base = fake(layout, tmp_path / "base.safetensors")
    out, into = weighted(model)[module][:2]
    save_file(
        {
            f"transformer.{module}.lora_A.weight": torch.ones(2, into),
            f"transformer.{module}.lora_B.weight": torch.ones(out, 2),
        },
        tmp_path / "x.safetensors",
    )
    (step,) = lorahub.plan(base, {"x": str(tmp_path / "x.safetensors")}).steps
    assert (step.out, step.stored_as) == (f"transformer:{stored}.weight", f"{stored}.weight")


def whole_unet() -> Any:
    """That of Stable Diffusion XL."""
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


LAYOUTS: Mapping[str, tuple[str, int, set[str]]] = {
    "flux_control_lora_format": ("flux", 0, set()),
    "flux_dora_onetrainer_format": ("flux", 240, {"component-elsewhere"}),
    "flux_lora_diffusers_format": ("flux", 0, set()),
    "flux_lora_kohya_format": ("flux", 0, set()),
    "flux_lora_xlabs_format": ("flux", 0, set()),
    "stripped_kohya_sdxl": ("sdxl", 264, {"component-elsewhere"}),
}
"""Layout -> the model that it is for, how many of its targets are text encoders', and what stops a merge for them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_module_of_a_real_layout_has_its_place(name: str, real_adapters: Path, tmp_path: Path) -> None:
    model, elsewhere, codes = LAYOUTS[name]
    with torch.device("meta"):
        base = diffusers.FluxTransformer2DModel(guidance_embeds=True) if model == "flux" else whole_unet()
    layout = json.loads((real_adapters / "layouts" / f"{name}.json").read_text())
    report = lorahub.check(fake(layout, tmp_path / "x.safetensors"), base)
    stopping = {each.code: each for each in report.findings if each.level >= Verdict.DEGRADED}
    assert stopping.keys() == codes
    assert sum(len(each.where) for each in stopping.values()) == elsewhere
