"""What headers and configuration tell of a base, held against what timm builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_timm import TINY, build, timm

from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.torch_module import TorchModule
from lorahub.errors import UsageError
from lorahub.files.dtypes import from_torch
from lorahub.files.emit import lay_out
from lorahub_timm import Timm
from lorahub_timm.configs import described, live_config
from lorahub_timm.families import FAMILIES, family_of
from lorahub_timm.fused import parts_of

SOME_OF_EACH_FAMILY = (
    *("beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convnext_atto"),
    *("crossvit_tiny_240", "davit_tiny", "deit_tiny_distilled_patch16_224", "densenet121", "efficientformer_l1"),
    *("efficientnet_cc_b0_4e", "eva02_base_patch14_224", "eva02_tiny_patch14_224", "fastvit_t8", "gcvit_xxtiny"),
    *("hiera_tiny_224", "levit_128s", "levit_conv_128s", "maxvit_tiny_tf_224", "mixnet_s"),
    *("mobilenetv4_conv_small", "mobilevit_xxs", "naflexvit_base_patch16_gap", "nest_tiny", "pit_ti_224"),
    *("pvt_v2_b0", "resnet50_clip", "sam2_hiera_tiny", "samvit_base_patch16", "swin_tiny_patch4_window7_224"),
    *("swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "test_coatnet", "test_mambaout", "test_maxvit"),
    *("test_vit", "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small"),
    *("visformer_tiny", "vit_base_patch16_siglip_224", "vit_small_r26_s32_224", "vitamin_small_224"),
    "volo_d1_224",
)
"""Of every family, and of the many architectures that are of none; the slow walk takes all that there are."""


def essence(index: BaseIndex) -> BaseIndex:
    """The index without what is allowed to differ: where it is from, and its configuration."""
    return replace(index, ref=BaseRef(), config={}, extras={})


def on_meta(name: str, **args: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = timm.create_model(name, **args)
    return model


def as_files(model: torch.nn.Module) -> BaseFiles:
    """What a folder would hold that the model was saved to."""
    entries = {name: (from_torch(each.dtype), tuple(each.shape)) for name, each in model.state_dict().items()}
    header = lay_out("model.safetensors", entries, {})
    config = json.loads(json.dumps(live_config(model)))
    return BaseFiles(folder=Path(), headers={"model.safetensors": header}, configs={"config.json": config})


def judge(name: str) -> None:
    framework, model = Timm(), on_meta(name)
    files, live = framework.index(BaseRef(), as_files(model)), framework.index_model(model, BaseRef())
    assert essence(files) == essence(live)
    assert files.order == live.order
    assert files.declared
    assert framework.claims(as_files(model)) is not None
    about = described(live.config)
    assert about is not None
    assert about.architecture == model.pretrained_cfg["architecture"]
    found = {name for name, info in live.parameters.items() if info.shape[:1] == (model.num_classes,) and info.role}
    if model.num_classes:
        assert {f"{module}.weight" for module in about.classifier} <= found
    if about.family is not None:
        targets = [Target("", path, "weight") for _, path in parts_of(about.family, files)]
        assert framework.layouts(files, targets) == framework.layouts(live, targets)
        assert len(framework.layouts(live, targets)) == len(targets)
        assert type(model).__module__.rpartition(".")[2] in about.family.files
        fused = [
            module for module in live.modules() if module.endswith(tuple(each.module for each in about.family.fused))
        ]
        assert {module for module, _ in parts_of(about.family, live)} == set(fused)
        buffers = [name for name in model.state_dict() if name.endswith(about.family.leftovers)]
        assert not (about.family.leftovers and buffers)
        if any(module.endswith(about.family.attention) for module in live.modules() if about.family.attention):
            assert framework.targets(files, "attention") == framework.targets(live, "attention")


@pytest.mark.parametrize("name", SOME_OF_EACH_FAMILY)
def test_headers_and_a_meta_model_give_the_same_index(name: str) -> None:
    judge(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models())
def test_headers_and_a_meta_model_give_the_same_index_for_every_architecture(name: str) -> None:
    judge(name)


@pytest.mark.parametrize("what", TINY)
def test_what_timm_saves_is_claimed_and_has_the_index_of_the_live_model(what: str, saved: Any) -> None:
    model = build(TINY[what])
    frameworks = {"torch": TorchModule(), "timm": Timm()}
    framework, files = index_base(survey_base(saved(model)), BaseRef(), frameworks)
    assert framework.name == "timm"
    live_framework, live = index_live(model, frameworks)
    assert live_framework is framework
    assert essence(files) == essence(live)
    assert set(live.registered) == {name for name, _ in model.named_modules() if name}


def test_a_configuration_of_the_old_form_is_claimed(framework: Timm) -> None:
    model = on_meta("test_vit")
    files = as_files(model)
    cfg = dict(files.config["pretrained_cfg"])  # type: ignore[arg-type]
    old = replace(files, configs={"config.json": {"architecture": "test_vit", **cfg}})
    assert framework.claims(old) is not None
    assert framework.index(BaseRef(), old).structure == framework.index_model(model, BaseRef()).structure


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "vit_tiny_patch16_224"},
        {"architecture": "vit_tiny_patch16_224", "model_type": "timm_wrapper", "pretrained_cfg": {}},
        {"architectures": ["ViTModel"], "model_type": "vit"},
        {},
    ],
)
def test_what_timm_did_not_write_is_not_claimed(config: dict[str, Any], framework: Timm) -> None:
    files = BaseFiles(folder=Path(), headers={}, configs={"config.json": config})
    assert framework.claims(files) is None


def test_a_module_that_is_none_of_timms_is_not_claimed(framework: Timm) -> None:
    assert framework.claims_model(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("given", "repo", "commit"),
    [
        ({}, "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", ""),
        ({"pretrained_cfg": "augreg_in21k"}, "timm/vit_base_patch16_224.augreg_in21k", ""),
        ({"pretrained_cfg_overlay": {"hf_hub_id": "me/mine@" + "a" * 40}}, "me/mine", "a" * 40),
        ({"pretrained_cfg_overlay": {"hf_hub_id": "me/mine@main"}}, "me/mine", ""),
        ({"pretrained_cfg_overlay": {"hf_hub_id": None}}, "", ""),
    ],
)
def test_a_live_model_names_the_repository_of_its_tag(given: Any, repo: str, commit: str, framework: Timm) -> None:
    index = framework.index_model(on_meta("vit_base_patch16_224", **given), BaseRef())
    assert (index.ref.repo, index.ref.commit) == (repo, commit)


def test_a_model_from_a_folder_names_no_repository(saved: Any, framework: Timm) -> None:
    folder = saved(build(TINY["vit"]))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert framework.index_model(model, BaseRef()).ref == BaseRef()


def test_presets_leave_the_head_out(framework: Timm) -> None:
    index = framework.index_model(build(TINY["vit"]), BaseRef())
    attention = [each.module for each in framework.targets(index, "attention")]
    assert attention == [f"blocks.{at}.attn.{leaf}" for at in (0, 1) for leaf in ("proj", "qkv")]
    linear = [each.module for each in framework.targets(index, "all-linear")]
    assert len(linear) == 8
    assert "head" not in linear
    assert [each.module for each in framework.targets(index, "all-conv")] == ["patch_embed.proj"]


@pytest.mark.parametrize(
    ("what", "preset"), [("convnext", "attention"), ("efficientnet", "all-linear"), ("vit", "all")]
)
def test_a_preset_that_means_nothing_here_is_an_error(what: str, preset: str, framework: Timm) -> None:
    index = framework.index_model(build(TINY[what]), BaseRef())
    with pytest.raises(UsageError):
        framework.targets(index, preset)


def test_buffers_of_older_checkpoints_are_extras_and_change_no_digest(framework: Timm) -> None:
    model = on_meta("swin_tiny_patch4_window7_224")
    files = as_files(model)
    entries = {name: (info.dtype, info.shape) for name, info in files.tensors.items()}
    old = {
        "layers.0.blocks.1.attn_mask": ("F32", (64, 49, 49)),
        "layers.0.blocks.0.attn.relative_position_index": ("I64", (49, 49)),
    }
    aged = replace(files, headers={"model.safetensors": lay_out("model.safetensors", {**entries, **old}, {})})
    index = framework.index(BaseRef(), aged)
    assert set(index.extras) == set(old)
    assert index.structure == framework.index_model(model, BaseRef()).structure


def test_images_of_another_size_leave_the_digest_of_the_targets_as_it_is(framework: Timm) -> None:
    small, large = (
        framework.index_model(on_meta("vit_tiny_patch16_224", **more), BaseRef())
        for more in ({}, {"img_size": 384, "dynamic_img_size": True})
    )
    touched = [each.name for each in framework.targets(small, "attention")]
    assert small.targets(touched) == large.targets(touched)
    assert small.structure != large.structure


def test_adapters_of_the_wrapper_in_transformers_name_the_same_modules(framework: Timm) -> None:
    index = framework.index_model(build(TINY["vit"]), BaseRef())
    assert "timm_model.blocks.0.attn.qkv" in index.spellings("blocks.0.attn.qkv")


def test_the_first_family_that_an_architecture_fits_is_its_own() -> None:
    assert family_of("maxvit_tiny_tf_224") is not family_of("maxvit_tiny_rw_224")
    assert family_of("botnet26t_256") is None
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
