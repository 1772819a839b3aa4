"""The built-in framework: any module and any safetensors file, names and shapes as they are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import survey_base
from lorahub.bases.torch_module import TorchModule, lorahub_frameworks
from lorahub.errors import UnsupportedFormat, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(11))
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv2d(4, 2, 3, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("kept", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


@pytest.fixture
def framework() -> TorchModule:
    return TorchModule()


def live(framework, model):
    return framework.index_model(model, BaseRef())


def test_an_index_has_parameters_and_persistent_buffers_in_natural_order(framework):
    index = live(framework, Net())
    assert "layers.10.weight" in index.parameters
    assert index.order.index("layers.2.weight") < index.order.index("layers.10.weight")
    assert index.parameters["kept"].dtype == "I64"
    assert index.parameters["norm.running_mean"].shape == (4,)
    assert "passing" not in index.parameters


def test_headers_and_the_module_agree(framework, tmp_path):
    model = Net()
    save_model(model, tmp_path / "model.safetensors")
    files = framework.index(BaseRef(), survey_base(tmp_path))
    model_index = live(framework, model)

    assert files.structure == model_index.structure
    assert files.order == model_index.order
    assert {n: i.dtype for n, i in files.parameters.items()} == {n: i.dtype for n, i in model_index.parameters.items()}
    assert not files.declared
    assert model_index.declared


def test_a_meta_module_has_the_same_index(framework):
    with torch.device("meta"):
        model = Net()
        model.head.weight = model.emb.weight
    real = Net()
    real.head.weight = real.emb.weight
    assert live(framework, model) == live(framework, real)


@pytest.mark.parametrize("how", ["the same parameter", "the same memory"])
def test_tied_parameters_are_one_parameter_with_two_names(framework, how):
    model = Net()
    model.head.weight = model.emb.weight if how == "the same parameter" else nn.Parameter(model.emb.weight.data)
    index = live(framework, model)
    assert index.tied == (("emb.weight", "head.weight"),)
    assert "head.weight" not in index.parameters
    target = Target("", "head", "weight")
    assert framework.layouts(index, [target])[target].pieces[0].parameter == "emb.weight"


def test_parts_of_one_memory_are_not_tied(framework):
    model = Net()
    whole = torch.zeros(2, 4)
    model.a, model.b = nn.Parameter(whole[0]), nn.Parameter(whole[1])
    assert not live(framework, model).tied


def test_a_module_used_twice_is_tied_with_itself(framework):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    assert live(framework, model).tied == (("0.bias", "2.bias"), ("0.weight", "2.weight"))


def test_live_tensors_are_the_module_s_own(framework):
    model = Net()
    model.head.weight = model.emb.weight
    tensors = framework.parameters(model, live(framework, model))
    assert tensors["layers.3.bias"] is model.layers[3].bias
    assert tensors["head.weight"] is tensors["emb.weight"]
    assert tensors["kept"] is model.kept


def test_a_transposed_linear_is_known_by_its_qualified_name(framework):
    conv1d = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"})
    model = nn.Module()
    model.c_attn = conv1d()
    model.c_attn.weight, model.c_attn.bias = nn.Parameter(torch.zeros(4, 12)), nn.Parameter(torch.zeros(12))
    index = live(framework, model)

    assert index.parameters["c_attn.weight"].transposed
    assert not index.parameters["c_attn.bias"].transposed
    target = Target("", "c_attn", "weight")
    region = framework.layouts(index, [target])[target].pieces[0].of_parameter
    assert region.shape((4, 12)) == (12, 4)


def test_a_class_that_only_borrows_the_name_is_not_transposed(framework):
    model = nn.Module()
    model.c = type("Conv1D", (nn.Linear,), {})(4, 4)
    assert not live(framework, model).parameters["c.weight"].transposed


def test_presets_go_by_module_type(framework):
    index = live(framework, Net())
    names = [target.name for target in framework.targets(index, "all-linear")]
    assert names == ["head.weight", *(f"layers.{layer}.weight" for layer in range(11))]
    assert [target.name for target in framework.targets(index, "all-embedding")] == ["emb.weight"]
    with pytest.raises(UsageError, match="attention"):
        framework.targets(index, "attention")


def test_presets_are_refused_where_only_files_are_known(framework, tmp_path):
    save_model(Net(), tmp_path / "model.safetensors")
    index = framework.index(BaseRef(folder="here"), survey_base(tmp_path))
    with pytest.raises(UsageError, match="here"):
        framework.targets(index, "all-linear")


def test_a_plain_folder_has_no_model_class(framework, tmp_path):
    with pytest.raises(UnsupportedFormat, match="model class"):
        framework.open_base(tmp_path)


def test_it_takes_no_heads_and_unties_nothing(framework):
    index = live(framework, Net())
    assert framework.edits(index, {"new.weight": ((2, 4), "F32")}, {}) is None
    assert framework.untie(index, ["head.weight"]) is None


def test_it_claims_weights_as_the_last_resort_and_nothing_without_them(framework, tmp_path):
    save_model(Net(), tmp_path / "model.safetensors")
    claim = framework.claims(survey_base(tmp_path))
    assert claim is not None
    assert 0 < claim.score < 0.1
    assert framework.claims(BaseFiles(folder=tmp_path, headers={}, configs={})) is None


def test_the_config_is_its_only_companion(framework, tmp_path):
    save_model(Net(), tmp_path / "model.safetensors")
    assert framework.companions(survey_base(tmp_path)) == ()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert framework.companions(survey_base(tmp_path)) == ("config.json",)


def test_it_registers_itself():
    assert [framework.name for framework in lorahub_frameworks()] == ["torch"]
