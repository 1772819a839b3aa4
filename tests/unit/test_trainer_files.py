"""Files as image and video trainers write them: one format each, the right scale, every key placed or named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lorahub
from lorahub.adapter import load, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.errors import BaseMismatch, IntegrityError
from lorahub.files.header import Header, TensorInfo
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.assembly import account, touches
from lorahub.formats.comfy import ComfyFormat
from lorahub.formats.diffusers import DiffusersFormat
from lorahub.formats.format import AdapterFiles
from lorahub.formats.kohya import KohyaFormat
from lorahub.formats.state_dict import StateDictFormat
from lorahub.plugins import Registry

Entries = Mapping[str, tuple[int, ...] | float]


def factors(stem: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, tuple[int, ...] | float]:
    return {f"{stem}.{down}": (2, 4), f"{stem}.{up}": (6, 2)}


def lycoris(stem: str, alpha: float | None = 1.0) -> dict[str, tuple[int, ...] | float]:
    """A LoKr of rank 2."""
    number: dict[str, tuple[int, ...] | float] = {} if alpha is None else {f"{stem}.alpha": alpha}
    return {f"{stem}.lokr_w1": (2, 2), f"{stem}.lokr_w2_a": (3, 2), f"{stem}.lokr_w2_b": (2, 2), **number}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file, and what it is to be read as."""

    entries: Entries
    format: str
    module: str
    component: str = ""
    kind: str = "lora"
    scale: float = 1.0
    metadata: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[str, ...] = ()


HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
DOWN_UP = ("lora_down.weight", "lora_up.weight")
Q = "transformer_blocks.0.attn.to_q"

CASES: Mapping[str, Case] = {
    "ai-toolkit LoRA": Case(entries=factors(f"transformer.{Q}"), format="diffusers", component="transformer", module=Q),
    "ai-toolkit LoKr": Case(entries=lycoris(f"diffusion_model.{Q}"), format="comfy", module=Q, kind="lokr", scale=0.5),
    "ai-toolkit LoKr under diffusers' names": Case(
        entries=lycoris(f"transformer.{Q}"),
        format="diffusers",
        component="transformer",
        module=Q,
        kind="lokr",
        scale=0.5,
    ),
    "SimpleTuner LoRA": Case(
        entries=factors(f"transformer.{Q}"),
        format="diffusers",
        component="transformer",
        module=Q,
        scale=3.0,
        metadata=HEADER,
    ),
    "SimpleTuner LoRA for ComfyUI": Case(
        entries=factors(f"diffusion_model.{Q}"), format="comfy", module=Q, scale=3.0, metadata=HEADER
    ),
    "SimpleTuner LyCORIS": Case(
        entries=lycoris("lycoris_transformer_blocks_0_attn_to_q", None),
        format="kohya",
        module="transformer_blocks_0_attn_to_q",
        kind="lokr",
        scale=3.0,
        metadata=HEADER,
    ),
    "musubi Wan": Case(
        entries={**factors("lora_unet_blocks_0_self_attn_q", *DOWN_UP), "lora_unet_blocks_0_self_attn_q.alpha": 1.0},
        format="kohya",
        component="unet",
        module="blocks_0_self_attn_q",
        scale=0.5,
    ),
    "DiffSynth": Case(
        entries=factors(Q, "lora_A.default.weight", "lora_B.default.weight"),
        format="state-dict",
        module=Q,
        codes=("alpha-unknown",),
    ),
    "DiffSynth with the pipeline's attributes": Case(
        entries=factors("pipe.dit.blocks.0.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
        format="state-dict",
        module="blocks.0.self_attn.q",
        codes=("alpha-unknown",),
    ),
    "a pipeline's state dict": Case(
        entries=factors(f"transformer.{Q}", "lora_A.default.weight", "lora_B.default.weight"),
        format="state-dict",
        component="transformer",
        module=Q,
        codes=("alpha-unknown",),
    ),
    "a language model's state dict": Case(
        entries=factors("transformer.h.0.attn.c_attn", "lora_A.default.weight", "lora_B.default.weight"),
        format="state-dict",
        module="transformer.h.0.attn.c_attn",
        codes=("alpha-unknown",),
    ),
    "DiffSynth without the adapter's name": Case(entries=factors(Q), format="diffusers", module=Q),
    "down and up without a prefix": Case(entries=factors(Q, *DOWN_UP), format="diffusers", module=Q),
    "fal Kontext": Case(
        entries=factors("base_model.model.single_transformer_blocks.0.attn.to_q"),
        format="state-dict",
        module="single_transformer_blocks.0.attn.to_q",
        codes=("alpha-unknown",),
    ),
    "fal Kontext, original names": Case(
        entries=factors("base_model.model.double_blocks.0.img_attn.qkv"),
        format="state-dict",
        module="double_blocks.0.img_attn.qkv",
        codes=("alpha-unknown",),
    ),
    "Krea": Case(
        entries=factors("base_model.model.blocks.0.self_attn.q"),
        format="state-dict",
        module="blocks.0.self_attn.q",
        codes=("alpha-unknown",),
    ),
    "LightX2V, alpha in the header": Case(
        entries=factors("diffusion_model.blocks.0.self_attn.q"),
        format="comfy",
        module="blocks.0.self_attn.q",
        scale=4.0,
        metadata={"alpha": "8"},
    ),
    "LTX": Case(
        entries=factors("diffusion_model.transformer_blocks.0.attn1.to_q"),
        format="comfy",
        module="transformer_blocks.0.attn1.to_q",
    ),
    "Z-Image": Case(
        entries={
            **factors("diffusion_model.layers.0.attention.qkv"),
            "diffusion_model.layers.0.attention.qkv.alpha": 4.0,
        },
        format="comfy",
        module="layers.0.attention.qkv",
        scale=2.0,
    ),
    "HunyuanVideo": Case(
        entries=factors("transformer.double_blocks.0.img_attn_qkv"),
        format="diffusers",
        component="transformer",
        module="double_blocks.0.img_attn_qkv",
    ),
    "Qwen-Image": Case(
        entries={
            **factors("lora_unet_transformer_blocks_0_attn_add_k_proj", *DOWN_UP),
            "lora_unet_transformer_blocks_0_attn_add_k_proj.alpha": 1.0,
        },
        format="kohya",
        component="unet",
        module="transformer_blocks_0_attn_add_k_proj",
        scale=0.5,
    ),
    "OneTrainer, KOHYA": Case(
        entries={**factors("lora_te2_encoder_block_0_layer_0_SelfAttention_q", *DOWN_UP)},
        format="kohya",
        component="text_encoder_2",
        module="encoder_block_0_layer_0_SelfAttention_q",
    ),
    "OneTrainer, LEGACY": Case(
        entries={
            **factors("lora_transformer_transformer_blocks_0_attn_to_q", *DOWN_UP),
            "lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": (1, 4),
        },
        format="kohya",
        component="transformer",
        module="transformer_blocks_0_attn_to_q",
        kind="dora",
    ),
    "OneTrainer, DIFFUSERS": Case(
        entries={**factors(f"transformer.{Q}", *DOWN_UP), f"transformer.{Q}.alpha": 1.0},
        format="diffusers",
        component="transformer",
        module=Q,
        scale=0.5,
    ),
    "OneTrainer, DoRA on inputs": Case(
        entries={**factors(f"transformer.{Q}", *DOWN_UP), f"transformer.{Q}.dora_scale": (1, 4)},
        format="diffusers",
        component="transformer",
        module=Q,
        kind="dora",
    ),
    "OneTrainer, ORIGINAL": Case(
        entries=factors("clip_l.text_model.encoder.layers.0.self_attn.q_proj", *DOWN_UP),
        format="diffusers",
        component="text_encoder",
        module="text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "OneTrainer, COMFY": Case(
        entries=factors("diffusion_model.double_blocks.0.img_attn.qkv", *DOWN_UP),
        format="comfy",
        module="double_blocks.0.img_attn.qkv",
    ),
    "OneTrainer, OFT": Case(
        entries={"lora_unet_down_blocks_0_to_q.oft_R.weight": (2, 1)},
        format="kohya",
        component="unet",
        module="down_blocks_0_to_q",
        kind="oft",
    ),
    "OneTrainer, OFT under dotted names": Case(
        entries={f"transformer.{Q}.oft_R.weight": (2, 1), f"transformer.{Q}.oft_R.scaled_oft": 1.0},
        format="diffusers",
        component="transformer",
        module=Q,
        kind="oft",
        codes=("oft-scale-assumed",),
    ),
    "OneTrainer, Stable Cascade": Case(
        entries=factors("lora_prior_unet_down_blocks_0_to_q", *DOWN_UP),
        format="kohya",
        component="prior",
        module="down_blocks_0_to_q",
    ),
    "B-LoRA": Case(
        entries=factors("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        format="diffusers",
        component="unet",
        module="up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "kohya T5": Case(
        entries=factors("lora_te3_encoder_block_0_layer_0_SelfAttention_q", *DOWN_UP),
        format="kohya",
        component="text_encoder_3",
        module="encoder_block_0_layer_0_SelfAttention_q",
    ),
}
"""Whose file -> the file."""


def written(folder: Path, entries: Entries, metadata: Mapping[str, str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.tensor(each) if isinstance(each, float) else torch.randn(each, generator=generator)
        for key, each in entries.items()
    }
    save_file(folder / "lora.safetensors", tensors, dict(metadata or {}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_trainers_file_is_read_to_the_last_key(tmp_path: Path, registry: Registry, name: str) -> None:
    case = CASES[name]
    header = open_header(written(tmp_path, case.entries, case.metadata), registry)
    (group,) = header.reading.groups
    assert (header.format, group.kind) == (case.format, case.kind)
    assert (group.component, group.module) == (case.component, case.module)
    if case.kind != "oft":
        assert group.options["scale"] == case.scale
        assert isinstance(group.options["scale_rule"], str)
    assert tuple(finding.code for finding in header.findings) == case.codes
    assert {ref.key for ref in group.slots.values()} == set(case.entries)
    assert [*load(header, registry).deltas]


@pytest.mark.parametrize("name", CASES)
def test_no_two_formats_claim_it_alike(tmp_path: Path, registry: Registry, name: str) -> None:
    files = open_header(written(tmp_path, CASES[name].entries), registry).files
    claims = sorted((claim.score, each.name) for each in registry.formats.values() if (claim := each.claims(files)))
    assert claims[-1][1] == CASES[name].format
    assert len(claims) == 1 or claims[-1][0] > claims[-2][0], claims


def test_peft_tensors_of_a_language_model_without_a_config_are_still_pefts(tmp_path: Path, registry: Registry) -> None:
    for module in (
        "model.layers.0.self_attn.q_proj",
        "layers.0.attention.wq",
        "blocks.0.attn.qkv",
        "transformer.h.0.x",
    ):
        files = AdapterFiles(
            folder=tmp_path,
            headers={
                "a": Header(
                    tensors={f"base_model.model.{module}.lora_A.weight": TensorInfo("F32", (2, 4), 0, 0)},
                    metadata={},
                    data_start=0,
                    size=0,
                )
            },
            configs={},
        )
        assert StateDictFormat().claims(files) is None, module


def test_with_a_config_beside_it_a_diffusion_model_of_pefts_is_pefts(tmp_path: Path, registry: Registry) -> None:
    written(tmp_path, CASES["fal Kontext"].entries)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = open_header(tmp_path, registry)
    assert (header.format, header.reading.groups[0].options["scale"]) == ("peft", 4.0)


# --- video models: differences beside factors ------------------------------------------------------------------------


def test_every_difference_of_a_wan_file_lands(tmp_path: Path) -> None:
    """Ten tensors in, ten changes out: norms, modulations and biases too."""
    block = "diffusion_model.blocks.0"
    entries: dict[str, tuple[int, ...] | float] = {
        **factors(f"{block}.self_attn.q"),
        f"{block}.self_attn.q.diff_b": (6,),
        f"{block}.self_attn.norm_q.diff": (6,),
        f"{block}.norm3.diff": (6,),
        f"{block}.norm3.diff_b": (6,),
        f"{block}.modulation.diff": (1, 6, 4),
        "diffusion_model.head.head.diff": (6, 4),
        "diffusion_model.head.head.diff_b": (6,),
        "diffusion_model.head.modulation.diff": (1, 2, 4),
    }

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "norm_q": torch.nn.RMSNorm(6)})
            self.norm3 = torch.nn.LayerNorm(6)
            self.modulation = torch.nn.Parameter(torch.zeros(1, 6, 4))

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 6)
            self.modulation = torch.nn.Parameter(torch.zeros(1, 2, 4))

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block()])
    model.head = Head()
    model.requires_grad_(False)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    lorahub.merge(model, [written(tmp_path, entries)])
    moved = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == set(before)
    assert len(moved) == len(entries) - 1  # two factors make one change


def test_a_block_diagonal_factor_is_merged_as_it_is(tmp_path: Path) -> None:
    """sd-scripts' ``--split_qkv`` stores three adapters of a fused layer as one, the second factor in blocks."""
    generator = torch.Generator().manual_seed(3)
    downs, ups = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 5, 2, generator=generator)
    tensors = {
        "lora_unet_qkv.lora_down.weight": downs.flatten(0, 1),
        "lora_unet_qkv.lora_up.weight": torch.block_diag(*ups),
        "lora_unet_qkv.alpha": torch.tensor(3.0),
    }
    save_file(tmp_path / "lora.safetensors", tensors, {})
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 15, bias=False)}).requires_grad_(False)
    before = model["qkv"].weight.clone()
    lorahub.merge(model, [tmp_path])
    expected = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)]) * 0.5
    torch.testing.assert_close(model["qkv"].weight - before, expected, rtol=0, atol=2e-5)


def test_a_flux_files_third_text_encoder_is_the_pipelines_second(tmp_path: Path, registry: Registry) -> None:
    entries = {
        **factors("lora_unet_fc", *DOWN_UP),
        **factors("lora_te1_fc", *DOWN_UP),
        **factors("lora_te3_fc", *DOWN_UP),
    }
    parameters = {
        f"{part}:fc.weight": ParameterInfo(shape=(6, 4), dtype="F32", stored_as="fc.weight")
        for part in ("text_encoder", "text_encoder_2", "transformer")
    }
    index = BaseIndex(ref=BaseRef(), framework="test", parameters=parameters)
    header = open_header(written(tmp_path, entries), registry, index=index)
    assert {target.name for target in header.touches} == set(parameters)


@pytest.mark.parametrize(
    ("down", "up", "weight"),
    [
        ((2, 4), (6, 2), (6, 4, 1, 1)),
        ((2, 4 * 9), (6, 2), (6, 4, 3, 3)),
        ((2, 4, 1, 1), (6, 2, 1, 1), (6, 4)),
        ((2, 4, 3, 3), (6, 2, 1, 1), (6, 4, 3, 3)),
        ((2, 4, 3, 3), (6, 2), (6, 4, 3, 3)),
    ],
)
@pytest.mark.parametrize("stem", ["lora_unet_q.", "transformer.q.", "diffusion_model.q."])
def test_factors_with_more_or_fewer_axes_than_the_weight_land_where_their_sizes_agree(
    tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...], stem: str
) -> None:
    folder = written(tmp_path, {f"{stem}lora_down.weight": down, f"{stem}lora_up.weight": up})
    layer = torch.nn.Linear(4, 6) if len(weight) == 2 else torch.nn.Conv2d(4, 6, weight[2:])
    model = torch.nn.ModuleDict({"q": layer}).requires_grad_(False)
    before = model["q"].weight.clone()
    lorahub.merge(model, [folder])
    stored = load_file(folder / "lora.safetensors")
    expected = stored[f"{stem}lora_up.weight"].flatten(1) @ stored[f"{stem}lora_down.weight"].flatten(1)
    torch.testing.assert_close(model["q"].weight - before, expected.reshape(weight), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("down", "weight"), [((2, 5), (6, 4, 3, 3)), ((2, 4, 3, 3), (6, 4)), ((2, 4, 3, 3), (6, 4, 1, 1))]
)
def test_factors_whose_sizes_do_not_agree_are_refused(
    tmp_path: Path, down: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    ones = (1,) * (len(down) - 2)
    folder = written(tmp_path, {"lora_unet_q.lora_down.weight": down, "lora_unet_q.lora_up.weight": (6, 2, *ones)})
    layer = torch.nn.Linear(4, 6) if len(weight) == 2 else torch.nn.Conv2d(4, 6, weight[2:])
    with pytest.raises(BaseMismatch):
        lorahub.merge(torch.nn.ModuleDict({"q": layer}), [folder])


def test_a_grouped_convolution_takes_factors_of_its_groups_and_no_others(tmp_path: Path) -> None:
    """LyCORIS has [r, in / groups, k]; factors over all inputs make no weight of such a layer."""
    model = torch.nn.ModuleDict({"q": torch.nn.Conv2d(4, 6, 3, groups=2)}).requires_grad_(False)
    before = model["q"].weight.clone()
    entries = {"lora_unet_q.lora_down.weight": (2, 2, 3, 3), "lora_unet_q.lora_up.weight": (6, 2, 1, 1)}
    lorahub.merge(model, [written(tmp_path, entries)])
    stored = load_file(tmp_path / "lora.safetensors")
    up, down = (stored[f"lora_unet_q.lora_{name}.weight"].flatten(1) for name in ("up", "down"))
    torch.testing.assert_close(model["q"].weight - before, (up @ down).reshape(6, 2, 3, 3), rtol=0, atol=2e-5)
    folder = written(tmp_path, {**entries, "lora_unet_q.lora_down.weight": (2, 4, 3, 3)})
    with pytest.raises(BaseMismatch, match="grouped convolution"):
        lorahub.merge(model, [folder])


# --- the rules for scales, in every such format ----------------------------------------------------------------------

SPELLED = {
    "kohya": ("lora_unet_q.", *DOWN_UP),
    "diffusers": ("transformer.q.", "lora_A.weight", "lora_B.weight"),
    "comfy": ("diffusion_model.q.", "lora_A.weight", "lora_B.weight"),
    "state-dict": ("base_model.model.double_blocks.q.", "lora_A.weight", "lora_B.weight"),
}
"""Format -> how a module begins, and its factors."""


def rule(
    folder: Path, registry: Registry, name: str, alpha: float | None = None, metadata: Mapping[str, str] | None = None
) -> tuple[float, str, list[str], Verdict]:
    """Scale, its rule, what is said, and how bad it is."""
    stem, down, up = SPELLED[name]
    entries: dict[str, tuple[int, ...] | float] = {f"{stem}{down}": (2, 4), f"{stem}{up}": (6, 2)}
    header = open_header(
        written(folder, entries | ({} if alpha is None else {f"{stem}alpha": alpha}), metadata), registry
    )
    assert header.format == name
    options = header.reading.groups[0].options
    scale = options["scale"]
    assert isinstance(scale, float)
    said = [each for each in header.findings if each.code != "alpha-unknown"]
    return (
        scale,
        str(options["scale_rule"]),
        [each.code for each in said],
        max((each.level for each in said), default=Verdict.EXACT),
    )


def stated(value: float) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": value})}


@pytest.mark.parametrize("name", SPELLED)
def test_scales_follow_one_set_of_rules(tmp_path: Path, registry: Registry, name: str) -> None:
    assert rule(tmp_path, registry, name) == (1.0, "default", [], Verdict.EXACT)
    assert rule(tmp_path, registry, name, 3.0) == (1.5, "alpha/r", [], Verdict.EXACT)
    for void in (0.0, math.nan):
        assert rule(tmp_path, registry, name, void) == (1.0, "default", ["alpha-void"], Verdict.UNVERIFIED)
        assert rule(tmp_path, registry, name, void, stated(3.0))[:3] == (1.5, "alpha/r", ["alpha-void"])
    assert rule(tmp_path, registry, name, None, stated(3.0)) == (1.5, "alpha/r", [], Verdict.EXACT)
    assert rule(tmp_path, registry, name, None, {"lora_alpha": "3"}) == (1.5, "alpha/r", [], Verdict.EXACT)
    assert rule(tmp_path, registry, name, 3.0, stated(3.002)) == (1.5, "alpha/r", [], Verdict.EXACT)
    assert rule(tmp_path, registry, name, None, {"lora_alpha": "auto"}) == (1.0, "default", [], Verdict.EXACT)


@pytest.mark.parametrize("name", SPELLED)
def test_two_sources_that_differ_are_an_error_with_both(tmp_path: Path, registry: Registry, name: str) -> None:
    for metadata in (stated(4.0), {"lora_alpha": "4"}):
        _, _, codes, level = rule(tmp_path, registry, name, 3.0, metadata)
        assert (codes, level) == (["alpha-conflict"], Verdict.INCOMPATIBLE)
        with pytest.raises(IntegrityError, match=r"says 4, and .*alpha says 3"):
            load(open_header(tmp_path, registry), registry)


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("shapes", [((0, 4), (6, 0)), ((4,), (6, 1))])
def test_factors_without_elements_or_axes_are_refused(
    tmp_path: Path, registry: Registry, name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """A sharded training run that was saved without gathering leaves such tensors."""
    stem, down, up = SPELLED[name]
    entries = {f"{stem}{down}": shapes[0], f"{stem}{up}": shapes[1]}
    header = open_header(written(tmp_path, entries), registry)
    assert header.reading.groups == ()
    assert max(each.level for each in header.findings) is Verdict.INCOMPATIBLE


@pytest.mark.parametrize("name", ["diffusers", "comfy", "state-dict"])
def test_a_rank_that_the_header_states_otherwise_is_refused(tmp_path: Path, registry: Registry, name: str) -> None:
    stem, down, up = SPELLED[name]
    said = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    entries = {f"{stem}{down}": (2, 4), f"{stem}{up}": (6, 2)}
    header = open_header(written(tmp_path, entries, {"lora_adapter_metadata": said}), registry)
    assert "slot-misfit" in {each.code for each in header.findings if each.level is Verdict.INCOMPATIBLE}


# --- whatever the file holds -----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "transformer",
            "unet",
            "diffusion_model",
            "base_model.model",
            "clip_l",
            "lora_unet_q",
            "bundle_emb",
            "q",
            "to_q",
        ),
        *("lora_A", "lora_B", "lora_down", "lora_up", "lora_mid", "default", "weight", "bias", "alpha", "scalar"),
        *("dora_scale", "oft_blocks", "rescale", "oft_R", "scaled_oft", "on_input", "a1", "a2", "b1", "b2", "bm"),
        *("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        *("bias_indices", "bias_values", "bias_size", "diff", "diff_b", "w_norm", "set_weight", "initial_norm"),
    ]
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
FLAGS = (".alpha", ".scalar", ".on_input", ".scaled_oft")


@pytest.mark.parametrize("reader", [KohyaFormat(), DiffusersFormat(), ComfyFormat(), StateDictFormat()])
@settings(max_examples=120)
@given(
    shapes=st.dictionaries(st.lists(PIECES, min_size=1, max_size=4).map(".".join), SHAPES, max_size=6),
    named=st.booleans(),
)
def test_whatever_the_names_and_shapes_are_every_key_is_placed_or_named(
    registry: Registry,
    reader: KohyaFormat | DiffusersFormat | ComfyFormat | StateDictFormat,
    shapes: dict[str, tuple[int, ...]],
    named: bool,
) -> None:
    shapes = shapes | {"lora_unet_k.lora_down.weight": (2, 4), "unet.k.lora_A.weight": (2, 4)}
    header = Header(
        tensors={key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes.items()},
        metadata={},
        data_start=0,
        size=0,
    )
    numbers = dict.fromkeys(shapes, b"\0\0\x80\x3f")
    files = AdapterFiles(folder=Path("none"), headers={"a": header}, configs={}, numbers={"a": numbers})
    info = ParameterInfo(shape=(6, 4), dtype="F32", stored_as="q.weight")
    index = BaseIndex(ref=BaseRef(), framework="test", parameters={"q.weight": info}) if named else None
    kinds = tuple(registry.kinds.values())
    if any(key.endswith(FLAGS) and math.prod(shape) != 1 for key, shape in shapes.items()):
        with suppress(IntegrityError):  # a number of several elements, where it is one
            reader.read(files, kinds, index)
        return
    reading = reader.read(files, kinds, index)
    account(reading, header)
    touches(reading.groups, registry.kinds)
