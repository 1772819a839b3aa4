"""What headers and configuration tell of a base, held against what diffusers builds: for every class of its models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_classes import classes, on_meta
from tiny_diffusers import PIPELINES, sd, unet, vae

from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_live, survey_base
from lorahub.bases.torch_module import TorchModule, live_entries
from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.files.dtypes import from_torch
from lorahub.files.emit import lay_out
from lorahub.opening import open_base
from lorahub_diffusers import Diffusers, Pipelines

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # in diffusers

COMMON = (
    *("UNet2DConditionModel", "UNetMotionModel", "ControlNetModel", "AutoencoderKL", "AutoencoderKLWan"),
    *("SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"),
    *("WanTransformer3DModel", "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel"),
    *("SanaTransformer2DModel", "PixArtTransformer2DModel", "ZImageTransformer2DModel", "AuraFlowTransformer2DModel"),
    *("Lumina2Transformer2DModel", "CogVideoXTransformer3DModel", "ChromaTransformer2DModel", "DiTTransformer2DModel"),
)
"""Held against their classes in every run."""


def as_files(model: Any) -> BaseFiles:
    """What a folder would hold that the model was saved to."""
    entries = {name: (from_torch(each.dtype), tuple(each.shape)) for name, each in model.state_dict().items()}
    header = lay_out("diffusion_pytorch_model.safetensors", entries, {})
    config = json.loads(model.to_json_string())
    return BaseFiles(
        folder=Path(), headers={"diffusion_pytorch_model.safetensors": header}, configs={"config.json": config}
    )


def essence(index: BaseIndex) -> BaseIndex:
    """The index without what is allowed to differ: where it is from, and its configuration."""
    return replace(index, ref=BaseRef(), config={}, extras={})


def judge(model: Any) -> None:
    framework, files = Diffusers(), as_files(model)
    assert framework.claims(files) is not None
    assert framework.claims_model(model) is not None
    stored, live = framework.index(BaseRef(), files), framework.index_model(model, BaseRef())
    assert essence(stored) == essence(live)
    assert stored.order == live.order
    assert stored.declared
    real = {name: info.role for name, info in live_entries(model)[0].items()}
    wrong = {name: (info.role, real[name]) for name, info in live.parameters.items() if info.role != real[name]}
    assert not wrong
    assert real.keys() == live.parameters.keys()
    if any(info.role == "linear" and ".to_q." in name for name, info in live.parameters.items()):
        assert framework.targets(stored, "attention") == framework.targets(live, "attention") != []


@pytest.mark.parametrize("name", COMMON)
def test_headers_and_a_meta_model_give_the_same_index(name: str) -> None:
    judge(on_meta(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_headers_and_a_meta_model_give_the_same_index_for_every_class() -> None:
    judged, left = [], []
    for name in classes():
        try:
            model = on_meta(name)
        except (TypeError, ValueError):  # it needs arguments that are models or constants of its own
            left.append(name)
            continue
        judge(model)
        judged.append(name)
    assert len(judged) > 120
    assert len(left) < 25
    assert set(COMMON) <= set(judged)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_has_the_index_of_the_live_one_with_a_framework_for_each_component(
    name: str, tmp_path: Path
) -> None:
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    stored, live = open_base(tmp_path), open_base(pipe)
    assert isinstance(stored.framework, Pipelines)
    assert essence(stored.index) == essence(live.index)
    parts = stored.index.parts  # type: ignore[attr-defined]
    assert {part.framework.name for part in parts.values()} == {"diffusers", "transformers"}
    assert parts.keys() == {each for each, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    assert {info.component for info in stored.index.parameters.values()} == set(parts)


def test_a_component_folder_is_a_base_of_its_own_and_opens_as_what_was_saved(tmp_path: Path) -> None:
    pipe = sd()
    pipe.save_pretrained(tmp_path)
    for component, kind in (("unet", "diffusers"), ("text_encoder", "transformers")):
        base = open_base(tmp_path / component)
        assert base.framework.name == kind
    again = Diffusers().open_base(tmp_path / "unet")
    assert type(again) is type(pipe.unet)
    assert all(torch.equal(value, pipe.unet.state_dict()[name]) for name, value in again.state_dict().items())
    view = Pipelines().open_base(tmp_path, dtype="BF16")
    assert {name for name, _ in view.named_children()} == {"unet", "vae", "text_encoder"}
    assert view.unet.dtype == torch.bfloat16


def test_presets_mean_the_denoiser_unless_a_component_is_named() -> None:
    base = open_base(sd())
    attention = base.framework.targets(base.index, "attention")
    assert {each.component for each in attention} == {"unet"}
    assert {each.module.rpartition("attn")[2][2:] for each in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    linear = base.framework.targets(base.index, "all-linear")
    assert set(attention) < set(linear)
    assert {each.component for each in base.framework.targets(base.index, "text_encoder:attention")} == {"text_encoder"}
    assert base.framework.targets(base.index, "unet:all-conv")
    for wrong in ("nothing", "prior:attention"):
        with pytest.raises(UsageError):
            base.framework.targets(base.index, wrong)


def test_attention_blocks_of_old_autoencoders_have_their_present_names() -> None:
    model = vae()
    files = as_files(model)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        return next((name.replace(f".{new}.", f".{was}.") for new, was in old.items() if f".{new}." in name), name)

    entries = {renamed(name): (info.dtype, info.shape) for name, info in files.tensors.items()}
    aged = replace(files, headers={"diffusion_pytorch_model.safetensors": lay_out("x.safetensors", entries, {})})
    index = Diffusers().index(BaseRef(), aged)
    assert index.structure == Diffusers().index_model(model, BaseRef()).structure
    assert index.parameters["decoder.mid_block.attentions.0.to_q.weight"].stored_as.endswith("query.weight")


def test_fused_copies_that_were_saved_are_extras_and_change_no_digest() -> None:
    model = unet()
    before = Diffusers().index_model(model, BaseRef())
    model.fuse_qkv_projections()
    index = Diffusers().index(BaseRef(), as_files(model))
    assert index.structure == before.structure
    assert index.extras
    assert all("to_qkv" in name or "to_kv" in name for name in index.extras)
    live = Diffusers().index_model(model, BaseRef())
    assert live.structure == before.structure
    query = next(name for name in live.modules() if name.endswith("attn1.to_q"))
    out = Target("", query.replace("to_q", "to_out.0"), "weight")
    assert out in Diffusers().layouts(live, [out])
    with pytest.raises(UnsupportedFormat, match="are fused"):
        Diffusers().layouts(live, [out, Target("", query, "weight")])


def test_a_quantised_model_and_one_of_another_kind_are_not_taken() -> None:
    files = as_files(unet())
    quantised = replace(files, configs={"config.json": {**files.config, "quantization_config": {"quant_method": "x"}}})
    with pytest.raises(UnsupportedFormat, match="quantised"):
        Diffusers().index(BaseRef(), quantised)
    assert Diffusers().claims(replace(files, configs={"config.json": {"model_type": "bert"}})) is None
    assert Diffusers().claims_model(torch.nn.Linear(2, 2)) is None
    with pytest.raises(UsageError, match="pipeline"):
        index_live(object(), {"torch": TorchModule()})  # type: ignore[arg-type]


def test_a_pipeline_with_pickles_alone_is_refused_by_component(tmp_path: Path) -> None:
    sd().save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsupportedFormat, match="no safetensors for vae"):
        survey_base(tmp_path)


def test_without_a_plugin_for_pipelines_the_message_says_so(tmp_path: Path) -> None:
    from lorahub.bases.open import index_base

    sd().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFormat, match="is a pipeline") as caught:
        index_base(survey_base(tmp_path), BaseRef(), {"torch": TorchModule()})
    assert "lorahub-diffusers" in caught.value.hint


def test_targets_of_a_pipeline_land_in_their_component_and_those_of_others_nowhere() -> None:
    base = open_base(sd())
    here = Target("unet", "conv_in", "weight")
    absent = Target("vae", "conv_in", "weight"), Target("", "conv_in", "weight"), Target("prior", "conv_in", "weight")
    found = base.framework.layouts(base.index, [here, *absent])
    assert [piece.parameter for piece in found[here].pieces] == ["unet:conv_in.weight"]
    assert set(found) == {here}
