"""Stability AI's Control-LoRAs: merged into the ControlNet that they are for, as diffusers makes it of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import unet

import lorahub
from lorahub.conversion.unet_blocks import counted
from lorahub.errors import BaseMismatch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
state_dict_utils = pytest.importorskip("diffusers.utils.state_dict_utils", reason="diffusers is not installed")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@pytest.fixture(scope="module")
def model() -> Any:
    """A UNet of the depth that diffusers' conversion knows."""
    return unet(
        layers_per_block=2,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("controlnet")
    diffusers.ControlNetModel.from_unet(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Stability publishes them: factors of what the UNet has too, all else whole."""
    generator = torch.Generator().manual_seed(0)
    stored = load_file(base / WEIGHTS)
    names = counted({name.rpartition(".")[0] for name in stored})
    tensors = {"lora_controlnet": torch.zeros(0)}
    for name, each in stored.items():
        module, _, parameter = name.rpartition(".")
        shape, there = tuple(each.shape), names[module]
        if parameter == "weight" and len(shape) > 1 and not module.startswith("controlnet_"):
            tensors[f"{there}.up"] = torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=generator) / 9
            tensors[f"{there}.down"] = torch.randn(2, *shape[1:], generator=generator) / 3
        else:
            tensors[f"{there}.{parameter}"] = torch.randn(shape, generator=generator)
    file: Path = tmp_path_factory.mktemp("adapter") / "control-lora-canny-rank2.safetensors"
    save_file(tensors, file)
    return file


def test_every_module_of_a_controlnet_has_the_name_that_diffusers_reads(base: Path, adapter: Path) -> None:
    found = quietly(lambda: state_dict_utils.convert_sai_sd_control_lora_state_dict_to_peft(load_file(adapter)))
    assert {name.replace(".lora_A.", ".").replace(".lora_B.", ".") for name in found} == load_file(
        base / WEIGHTS
    ).keys()


def test_a_merged_controlnet_is_the_one_that_diffusers_makes(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = lorahub.merge(base, {"canny": str(adapter)}, out=tmp_path / "merged")
    before, found = (load_file(folder / WEIGHTS) for folder in (base, tmp_path / "merged"))
    theirs = quietly(lambda: state_dict_utils.convert_sai_sd_control_lora_state_dict_to_peft(load_file(adapter)))
    assert found.keys() == before.keys()
    assert report.changed == len(found)
    for name, each in found.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in theirs:
            assert torch.equal(each, theirs[name])
            continue
        down, up = (theirs[f"{module}.lora_{side}.weight"].double() for side in "AB")
        change = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        expected = before[name].double() + change
        assert change.norm() / before[name].norm() > 1e-2
        assert (each - expected).abs().max() <= 2**-22 * expected.abs().max()


def test_a_merged_controlnet_gives_what_diffusers_gives_with_the_file(
    model: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    lorahub.merge(base, {"canny": str(adapter)}, out=tmp_path / "merged")
    ours = diffusers.ControlNetModel.from_pretrained(tmp_path / "merged").eval()
    plain = diffusers.ControlNetModel.from_unet(model).eval()
    theirs = diffusers.ControlNetModel.from_unet(model).eval()
    quietly(lambda: theirs.load_lora_adapter(str(adapter.parent), weight_name=adapter.name, prefix=None))
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "controlnet_cond": torch.rand(2, 3, 64, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)},
    }
    with torch.no_grad():
        found, expected, unchanged = (each(**given, return_dict=False) for each in (ours, theirs, plain))
    for one, other, without in zip(
        [*found[0], found[1]], [*expected[0], expected[1]], [*unchanged[0], unchanged[1]], strict=True
    ):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
        assert (other - without).norm() > 1e-2 * other.norm()


@pytest.mark.parametrize("live", [False, True])
def test_the_unet_itself_is_no_base_for_it_though_its_names_fit(
    live: bool, model: Any, adapter: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(
            model if live else tmp_path / "unet", {"x": str(adapter)}, **({} if live else {"out": tmp_path / "out"})
        )
    found = next(each for each in stop.value.findings if each.code == "controlnet-needed")
    assert "from_unet" in found.remedy
    assert not (tmp_path / "out").exists()
