"""Every loader of diffusers: what it saves from a pipeline, lorahub puts on the same modules, as diffusers does.

Each module that was changed is asked by itself, so that no model has to run as a whole.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_files import weighted
from tiny_loaders import LOADERS, Loader

import lorahub_diffusers
from lorahub.conversion.vocabulary import words
from lorahub.conversion.words import TABLES
from lorahub_diffusers.table import FAMILIES

loaders = pytest.importorskip("diffusers.loaders.lora_pipeline", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # in diffusers

NOISE = 2**-18
"""Of the largest output: one product in float32, summed in another order."""

NONE = frozenset({"AmusedLoraLoaderMixin", "LoraLoaderMixin"})
"""Loaders that no pipeline has, and the former name of another."""

ALIKE = frozenset({"SkyReelsV2Transformer3DModel"})
"""Classes that the table names with another that has the same modules."""

WEIGHTS = "pytorch_lora_weights.safetensors"

Place = tuple[str, str]


def linear(model: torch.nn.Module) -> list[str]:
    """The linear layers of a model's blocks, which is what adapters are on."""
    return [
        name
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]


def save(pipe: Any, components: list[str], folder: Path) -> list[Place]:
    """Random LoRA on every layer of the blocks, saved as diffusers does; the layers."""
    layers: dict[str, Any] = {}
    places: list[Place] = []
    torch.manual_seed(0)
    for component in components:
        model = getattr(pipe, component)
        targets = linear(model)
        places += [(component, name) for name in targets]
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        layers[f"{component}_lora_layers"] = peft.utils.get_peft_model_state_dict(model)
        layers[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    takes = inspect.signature(pipe.save_lora_weights).parameters
    if layers.keys() <= takes.keys():
        pipe.save_lora_weights(folder, **layers)
    else:  # it loads what it cannot save
        tensors = {f"{at}.{key}": each for at in components for key, each in layers[f"{at}_lora_layers"].items()}
        save_file({key: each.contiguous() for key, each in tensors.items()}, folder / WEIGHTS)
    pipe.unload_lora_weights()
    return places


def answers(pipe: Any, places: list[Place]) -> list[torch.Tensor]:
    """What each layer gives for an input of its own."""
    found = []
    for component, name in places:
        module: Any = getattr(pipe, component).get_submodule(name)
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(module(torch.randn(3, module.in_features)))
    return found


def test_every_loader_is_in_the_table() -> None:
    there = {name for name in vars(loaders) if name.endswith("LoraLoaderMixin")}
    assert there == LOADERS.keys() | NONE
    for name, loader in LOADERS.items():
        mixin = getattr(loaders, name)
        assert loader.models.keys() == set(mixin._lora_loadable_modules)


def test_the_table_of_the_page_names_the_model_of_every_loader() -> None:
    for name, loader in LOADERS.items():
        models = {component: type(build()).__name__ for component, build in loader.models.items()}
        denoiser = models.get("unet") or models["transformer"]
        said = [components for kind, components in FAMILIES.values() if kind == denoiser]
        assert any(models.keys() <= set(components) for components in said) or denoiser in ALIKE, name


LARGE = frozenset(
    f"{each}LoraLoaderMixin"
    for each in (
        *("StableDiffusion", "StableDiffusionXL", "SD3", "Flux"),  # which ``test_parity`` has whole
        *("LTX2", "HiDreamImage", "BriaFibo2", "HunyuanVideo"),
    )
)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each in LARGE else each for each in LOADERS]
)
def test_what_a_loader_of_diffusers_saves_does_here_what_it_does_there(name: str, tmp_path: Path) -> None:
    loader: Loader = LOADERS[name]
    pipe = loader.build()
    assert isinstance(pipe, getattr(loaders, name))
    components = [loader.alone] if loader.alone else list(loader.models)
    places = save(pipe, components, tmp_path)
    before = answers(pipe, places)
    pipe.load_lora_weights(tmp_path)
    expected = answers(pipe, places)
    pipe.unload_lora_weights()
    for one, other in zip(before, expected, strict=True):
        assert (one - other).norm() / one.norm() > 1e-2

    with lorahub_diffusers.load_lora_weights(pipe, tmp_path, adapter_name="ink") as loras:
        for found, wanted in zip(answers(pipe, places), expected, strict=True):
            assert (found - wanted).abs().max() <= NOISE * wanted.abs().max()
        assert loras.components == {"ink": tuple(sorted(components))}
        merged = loras.merge_into()
        for found, wanted in zip(answers(pipe, places), expected, strict=True):
            assert (found - wanted).abs().max() <= NOISE * wanted.abs().max()
        merged.undo()
    assert all(torch.equal(one, other) for one, other in zip(answers(pipe, places), before, strict=True))


PEFT = "base_model.model."

MAKERS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "Flux3LoraLoaderMixin": (
        "diffusion_model.",
        {
            "content_mode_blocks.image.0.q_proj": ("mode_blocks.image.0.attn.to_q",),
            "txt_mode_blocks.0.mlp_in": ("txt_mode_blocks.0.ff.linear_in",),
            "single_blocks.0.attn_out": ("single_transformer_blocks.0.attn.to_out.0",),
            "single_blocks.0.mlp_out": ("single_transformer_blocks.0.ff.linear_out",),
        },
    ),
    "Krea2LoraLoaderMixin": (
        "diffusion_model.",
        {
            "blocks.0.attn.wk": ("transformer_blocks.0.attn.to_k",),
            "blocks.0.attn.gate": ("transformer_blocks.0.attn.to_gate",),
            "blocks.0.mlp.down": ("transformer_blocks.0.ff.down",),
            "txtfusion.refiner_blocks.0.attn.wo": ("text_fusion.refiner_blocks.0.attn.to_out.0",),
            "tproj.1": ("time_mod_proj",),
            "txtmlp.3": ("txt_in.linear_2",),
            "last.linear": ("final_layer.linear",),
        },
    ),
    "Ideogram4LoraLoaderMixin": (
        "diffusion_model.",
        {
            "layers.0.attention.qkv": tuple(f"layers.0.attention.to_{each}" for each in "qkv"),
            "layers.0.attention.o": ("layers.0.attention.to_out.0",),
            "layers.0.feed_forward.w3": ("layers.0.feed_forward.w3",),
            "layers.0.adaln_modulation": ("layers.0.adaln_modulation",),
        },
    ),
    "AceStepLoraLoaderMixin": (
        PEFT,
        {
            "layers.1.self_attn.q_proj": ("layers.1.self_attn.to_q",),
            "layers.0.cross_attn.o_proj": ("layers.0.cross_attn.to_out.0",),
        },
    ),
    "AnimaLoraLoaderMixin": (
        "diffusion_model.",
        {
            "blocks.0.self_attn.q_proj": ("transformer_blocks.0.attn1.to_q",),
            "blocks.0.cross_attn.output_proj": ("transformer_blocks.0.attn2.to_out.0",),
            "blocks.0.adaln_modulation_mlp.2": ("transformer_blocks.0.norm3.linear_2",),
            "blocks.0.mlp.layer1": ("transformer_blocks.0.ff.net.0.proj",),
            "final_layer.linear": ("proj_out",),
        },
    ),
}
"""Loader -> what stands before its makers' names, and some of these -> what diffusers calls them."""


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_of_the_makers_does_here_what_it_does_there(name: str, tmp_path: Path) -> None:
    pipe = LOADERS[name].build()
    before_names, modules = MAKERS[name]
    places: list[Place] = []
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for module, parts in modules.items():
        own = [("transformer", part) for part in parts]
        places += own
        layers: list[Any] = [getattr(pipe, component).get_submodule(part) for component, part in own]
        tensors[f"{before_names}{module}.lora_A.weight"] = torch.randn(2, layers[0].in_features) * 0.3
        tensors[f"{before_names}{module}.lora_B.weight"] = torch.randn(sum(each.out_features for each in layers), 2)
    folder = tmp_path / "x"
    folder.mkdir()
    if before_names == PEFT:  # which keeps the scale beside its weights
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        save_file(tensors, folder / WEIGHTS)
    before = answers(pipe, places)
    pipe.load_lora_weights(dict(tensors))
    expected = answers(pipe, places)
    pipe.unload_lora_weights()
    for one, other in zip(before, expected, strict=True):
        assert (one - other).norm() / one.norm() > 1e-2
    where = "transformer" if len(LOADERS[name].models) > 1 else ""
    with lorahub_diffusers.load_lora_weights(pipe, folder, component=where):
        for found, wanted in zip(answers(pipe, places), expected, strict=True):
            assert (found - wanted).abs().max() <= NOISE * wanted.abs().max()
    assert all(torch.equal(one, other) for one, other in zip(answers(pipe, places), before, strict=True))


FAMILY = {
    "Flux3LoraLoaderMixin": "flux3",
    "Krea2LoraLoaderMixin": "krea2",
    "Ideogram4LoraLoaderMixin": "ideogram4",
    "AceStepLoraLoaderMixin": "ace-step",
    "AnimaLoraLoaderMixin": "cosmos",
}
"""Loader -> what the family's words are kept under."""


@pytest.mark.parametrize("name", MAKERS)
def test_every_word_of_a_family_names_modules_of_its_class(name: str) -> None:
    known = weighted(LOADERS[name].models["transformer"]())
    used = {part for word in words(known.keys()) for part in word.parts}
    assert used <= known.keys()
    meant = {part.replace("{n}", "0") for word in TABLES[FAMILY[name]] for part in word.parts}
    assert meant <= used
