"""Pipelines merged from folder to folder: all files of the new one, shards, what is copied, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_diffusers import diffusers, sd, sdxl
from tiny_loras import save_lora

import lorahub
from lorahub.errors import UsageError
from lorahub.opening import open_base


class Saved:
    """A pipeline in a folder, with a sharded UNet, and an adapter."""

    def __init__(self, folder: Path) -> None:
        self.pipe: Any = sdxl()
        self.folder, self.adapter = folder / "base", save_lora(self.pipe, folder / "lora")
        self.pipe.save_pretrained(self.folder, max_shard_size="300KB")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def merged(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    lorahub.merge(saved.folder, {"style": saved.adapter}, out=out)
    return out


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path, component: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / component).glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_the_new_folder_has_every_file_of_the_old_one(saved: Saved, merged: Path) -> None:
    assert files_of(merged) == files_of(saved.folder) | {"lorahub-merge.json"}
    assert len(list((merged / "unet").glob("*.safetensors"))) > 1
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (merged / name).read_bytes() == (saved.folder / name).read_bytes()


def test_an_index_of_shards_names_the_tensors_as_its_component_does(merged: Path) -> None:
    index = json.loads((merged / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(weights_of(merged, "unet"))
    assert {(merged / "unet" / name).is_file() for name in index["weight_map"].values()} == {True}


def test_a_component_that_is_not_touched_is_copied_byte_for_byte(saved: Saved, merged: Path) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (merged / name).read_bytes() == (saved.folder / name).read_bytes()


def test_streamed_weights_are_those_merged_in_memory_bit_for_bit(saved: Saved, merged: Path) -> None:
    again = type(saved.pipe).from_pretrained(saved.folder, local_files_only=True)
    with torch.no_grad():
        lorahub.merge(again, {"style": saved.adapter}, undo="none")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        live, streamed = getattr(again, component).state_dict(), weights_of(merged, component)
        changed = [name for name, value in weights_of(saved.folder, component).items() if name in streamed]
        assert any(not torch.equal(streamed[name], weights_of(saved.folder, component)[name]) for name in changed)
        for name in changed:
            assert torch.equal(streamed[name], live[name]), f"{component}: {name}"


def test_a_single_component_of_a_folder_is_merged_by_itself(saved: Saved, merged: Path, tmp_path: Path) -> None:
    adapters = {"style": saved.adapter}
    lorahub.merge(saved.folder / "unet", adapters, out=tmp_path / "unet", allow=["component-elsewhere"])
    alone, whole = weights_of(tmp_path, "unet"), weights_of(merged, "unet")
    assert all(torch.equal(alone[name], value) for name, value in whole.items())
    assert type(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")) is diffusers.UNet2DConditionModel


def test_a_pipeline_is_not_merged_in_place_and_its_components_are(saved: Saved, tmp_path: Path) -> None:
    pipe = sd()
    pipe.save_pretrained(tmp_path / "base")
    adapter = save_lora(pipe, tmp_path / "lora", only=("unet",))
    before = files_of(tmp_path / "base")
    with pytest.raises(UsageError, match="is a pipeline"):
        lorahub.merge(tmp_path / "base", {"style": adapter}, in_place=True)
    assert files_of(tmp_path / "base") == before
    lorahub.merge(tmp_path / "base", {"style": adapter}, out=tmp_path / "out")
    lorahub.merge(tmp_path / "base" / "unet", {"style": adapter}, in_place=True)
    inside, beside = weights_of(tmp_path / "base", "unet"), weights_of(tmp_path / "out", "unet")
    assert all(torch.equal(inside[name], value) for name, value in beside.items())


def test_undoing_by_reading_again_finds_the_components_files(saved: Saved) -> None:
    again = type(saved.pipe).from_pretrained(saved.folder, local_files_only=True)
    before = {name: value.clone() for name, value in again.unet.state_dict().items()}
    merged = lorahub.merge(again, {"style": saved.adapter}, undo="reload", origin=saved.folder)
    assert any(not torch.equal(before[name], value) for name, value in again.unet.state_dict().items())
    merged.undo()
    assert all(torch.equal(before[name], value) for name, value in again.unet.state_dict().items())


def test_a_recorded_pipeline_is_known_again(saved: Saved, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(saved.adapter, tmp_path / "lora")
    lorahub.record(folder, saved.folder)
    report = lorahub.check(folder, saved.folder)
    assert report.verdict.name in ("EXACT", "COMPATIBLE")
    said = json.loads((folder / "lorahub.json").read_bytes())
    assert said["components"] == ["text_encoder", "text_encoder_2", "unet"]
    assert said["base"]["library"] == "diffusers-pipeline"
    assert open_base(saved.folder, digest=True).index.weights == said["base"]["weights_digest"]
