"""Pipelines without their plugin: which folders are components, one set of files of several, and writing them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub.attaching import attach
from lorahub.bases.framework import BaseFiles, TakesPipelines
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.bases.open import as_module, index_base, survey_base
from lorahub.bases.pipelines import components_of
from lorahub.bases.torch_module import TorchModule, in_order
from lorahub.engine.planning.plan import Plan
from lorahub.engine.writing.checkpoint import index_files, lay_out
from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.files.tensors import FileSource
from lorahub.files.writer import StreamWriter
from lorahub.findings import Claim

INDEX: dict[str, Any] = {
    "_class_name": "APipeline",
    "unet": ["diffusers", "UNet"],
    "vae": ["diffusers", "VAE"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "gone": ["diffusers", "UNet"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pipe"
    for component, width in (("unet", 4), ("vae", 2)):
        (place / component).mkdir(parents=True)
        (place / component / "config.json").write_text(json.dumps({"_class_name": component}))
        save_file({"conv.weight": torch.ones(3, width)}, place / component / "diffusion_pytorch_model.safetensors")
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "config.json").write_text("{}")
    (place / "model_index.json").write_text(json.dumps(INDEX))
    save_file({"all": torch.ones(2)}, place / "everything.safetensors")
    return place


class Fake(TorchModule):
    """Takes pipelines by names and shapes, and lists of modules live."""

    name = "fake"

    def claims(self, files: BaseFiles) -> Claim | None:
        return Claim(0.5, "a pipeline") if files.parts else None

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        infos = {
            name.replace(".", ":", 1): ParameterInfo(
                shape=info.shape, dtype=info.dtype, stored_as=name, component=name.partition(".")[0]
            )
            for name, info in files.tensors.items()
        }
        return BaseIndex(ref=ref, framework=self.name, parameters=in_order(infos.items()))

    def as_module(self, given: object) -> torch.nn.Module | None:
        return torch.nn.ModuleList(given) if isinstance(given, list) else None


def test_components_are_the_folders_that_the_index_names_and_that_hold_models(folder: Path) -> None:
    files = survey_base(folder)
    assert set(files.parts) == {"unet", "vae"}
    assert files.parts["unet"].config == {"_class_name": "unet"}
    assert set(files.tensors) == {"unet.conv.weight", "vae.conv.weight"}
    assert {"tokenizer/config.json", "everything.safetensors"} <= set(files.others)
    assert files.prefix("unet/diffusion_pytorch_model.safetensors") == "unet."
    assert files.prefix("everything.safetensors") == ""


def test_a_folder_whose_index_names_no_component_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not survey_base(tmp_path).parts


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "config.json"])
def test_a_model_without_safetensors_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedFormat, match="no safetensors for unet"):
        components_of({"unet": ["diffusers", "UNet"]}, [f"unet/{name}"], "there")
    assert components_of({"tokenizer": ["transformers", "ATokenizer"]}, [f"tokenizer/{name}"], "there") == {}


def test_without_a_framework_for_pipelines_the_plugin_and_a_component_are_named(folder: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="is a pipeline") as caught:
        index_base(survey_base(folder), BaseRef(), {"torch": TorchModule()})
    assert "lorahub-diffusers" in caught.value.hint
    assert f"{folder}/unet" in caught.value.hint


def test_names_behind_a_prefix_are_those_of_the_file_without_it(tmp_path: Path) -> None:
    entries = {"unet.a": ("F32", [2]), "unet.b": ("F32", [1])}
    with StreamWriter(tmp_path / "x.safetensors", entries, prefix="unet.") as out:
        out.write("unet.a", 0, torch.tensor([1.0, 2.0]).numpy().data)
        out.write("unet.b", 0, torch.tensor([3.0]).numpy().data)
        out.commit()
    assert set(load_file(tmp_path / "x.safetensors")) == {"a", "b"}
    with FileSource(tmp_path / "x.safetensors", prefix="unet.") as source:
        assert source.header == out.header
        assert source.read("unet.a").tolist() == [1.0, 2.0]


def test_each_component_keeps_its_files_and_gets_its_own_index(folder: Path) -> None:
    names = ("diffusion_pytorch_model-00001-of-00001.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / names[0])
    (folder / "unet" / names[1]).write_text(json.dumps({"weight_map": {"conv.weight": names[0]}}))
    files = survey_base(folder)
    shards = lay_out(files, Plan(base=BaseRef(), framework="fake", steps=(), untouched=()))
    assert [(shard.name, shard.prefix) for shard in shards] == [
        (f"unet/{names[0]}", "unet."),
        ("vae/diffusion_pytorch_model.safetensors", "vae."),
    ]
    ((name, content),) = index_files(files, shards).items()
    assert name == f"unet/{names[1]}"
    assert json.loads(content)["weight_map"] == {"conv.weight": names[0]}


def test_a_target_of_a_pipeline_is_that_of_its_component(folder: Path) -> None:
    index = Fake().index(BaseRef(), survey_base(folder))
    found = Fake().layouts(index, [Target("vae", "conv", "weight"), Target("", "conv", "weight")])
    assert [each.component for each in found] == ["vae"]


def test_what_is_no_module_is_taken_where_a_framework_has_a_view_of_it() -> None:
    assert isinstance(Fake(), TakesPipelines)
    assert not isinstance(TorchModule(), TakesPipelines)
    layers = [torch.nn.Linear(2, 2)]
    view = as_module(layers, {"torch": TorchModule(), "fake": Fake()})
    assert next(view.children()) is layers[0]
    with pytest.raises(UsageError, match="this is a list"):
        as_module(layers, {"torch": TorchModule()})


def test_nothing_is_attached_to_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="no live model"):
        attach(tmp_path, {})  # type: ignore[arg-type]
