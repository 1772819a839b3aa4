"""PEFT's kinds that follow from the base: which base does, in which order, with which modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from parity.decomposed import CASES, base, index, quietly, trained
from safetensors.torch import load_file, save_file

from lorahub.adapter import load, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.torch_module import TorchModule
from lorahub.errors import BaseNeeded, LorahubError
from lorahub.findings import Verdict
from lorahub.formats.peft.completion import surroundings
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists


if TYPE_CHECKING:
    from transformers import PreTrainedModel


DRAWN_AGAIN = [name for name, each in CASES.items() if each.needs_base]


@pytest.mark.parametrize("name", DRAWN_AGAIN)
def test_what_follows_from_the_base_is_looked_at_without_it_and_not_loaded(
    name: str, tmp_path: Path, registry: Registry
) -> None:
    trained(CASES[name], tmp_path)
    header = open_header(tmp_path, registry)
    (finding,) = header.findings
    assert (finding.code, finding.level) == ("base-needed", Verdict.UNVERIFIED)
    assert "drawn again from a seed" in finding.message
    assert "in PEFT, with save_" in finding.remedy
    assert header.kinds == (CASES[name].kind,)
    with pytest.raises(BaseNeeded, match="drawn again from a seed"):
        load(header, registry)
    assert len(load(header, registry, index=index()).deltas) == CASES[name].changed


@pytest.mark.parametrize("name", ["unilora, drawn", "tinylora, drawn"])
def test_a_base_whose_order_nobody_knows_does_not_do(name: str, tmp_path: Path, registry: Registry) -> None:
    trained(CASES[name], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(LorahubError, match="order in which the model is built"):
        merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_of_a_base_on_disk_do_where_shapes_are_all_it_takes(tmp_path: Path) -> None:
    live = trained(CASES["vera, drawn"], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["kasa", "pissa", "osf", "psoft", "frod", "peanut, deep", "supertuning, the largest"])
def test_a_base_on_disk_is_taken_apart_as_a_live_one_is(name: str, tmp_path: Path) -> None:
    live = trained(CASES[name], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    expected = quietly(live.merge_and_unload).state_dict()
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)


@pytest.mark.plugin("transformers")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_order_is_that_of_the_model_and_not_of_names(
    family: str, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    targets = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    live = quietly(
        lambda: get_peft_model(tiny_model(family), peft.UniLoraConfig(r=2, theta_d_length=29, target_modules=targets))
    )
    with torch.no_grad():
        live.base_model.unilora_theta_d["default"].add_(torch.randn(29, generator=torch.Generator().manual_seed(5)))
    quietly(lambda: live.save_pretrained(tmp_path))
    model = tiny_model(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model, {"one": tmp_path})
    expected = quietly(live.merge_and_unload).state_dict()
    moved = 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
        moved += int((value - weights[name]).norm() > 1e-2 * weights[name].norm())
    assert moved == 2 * len(targets)

    # of a checkpoint the table of its architecture says the order
    tiny_model(family).save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", {"one": tmp_path}, out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in expected.items():
        if name in merged:
            torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-5)
    assert len(merged) > 2 * len(targets)


def named(*names: str) -> BaseIndex:
    """A base that builds matrices of these names, in this order."""
    info = ParameterInfo(shape=(4, 4), dtype="F32", stored_as="")
    parameters = {f"{name}.weight": info for name in sorted(names)}
    return BaseIndex(ref=BaseRef(), framework="torch", parameters=parameters, registered=names)


NAMES = (
    "layers.1.q",
    "model.layers.10.mlp.experts.1.down",
    "model.layers.1.attn.q",
    "model.layers.1.attn.k",
    "model.layers.1.mlp.experts.0.down",
    "model.layers.0.attn.q",
    "model.blocks.1.attn.q",
    "model.head.attn.q",
    "q",
    "lm.q_head",
)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "down"]},
        {"target_modules": ["attn.q", "lm.q_head"]},
        {"target_modules": r".*\.(q|k)"},
        {"target_modules": ["q", "down"], "layers_to_transform": 1},
        {"target_modules": ["q", "k", "down"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ["q", "layers.1.q"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q"], "exclude_modules": ["layers.1.q", "attn.q"]},
        {"target_modules": ["q", "k"], "exclude_modules": r"model\.layers.*"},
        {"target_modules": ["q", "k"], "modules_to_save": ["attn"]},
        {"target_modules": ["q", "k"], "modules_to_save": ["model.head"]},
    ],
    ids=str,
)
def test_the_modules_that_a_config_names_are_those_that_peft_adapts(fields: dict[str, Any]) -> None:
    config = peft.LoraConfig(**fields)
    expected = tuple(name for name in NAMES if check_target_module_exists(config, name))
    assert surroundings(named(*NAMES), fields).targeted == expected
    assert 0 < len(expected) < len(NAMES)


@pytest.mark.parametrize("given", [None, "all-linear", r"(a)\1"])
def test_what_a_config_does_not_name_is_not_guessed(given: str | None) -> None:
    assert surroundings(named(*NAMES), {"target_modules": given}).targeted is None


def test_a_base_in_16_bits_has_its_scales_in_16_bits(tmp_path: Path, registry: Registry) -> None:
    live = quietly(lambda: get_peft_model(base().bfloat16(), CASES["unilora, drawn"].config()))
    quietly(lambda: live.save_pretrained(tmp_path))
    half = TorchModule().index_model(base().bfloat16(), BaseRef())
    adapter = load(open_header(tmp_path, registry, index=half), registry)
    for target, delta in adapter.deltas.items():
        layer = live.base_model.model.get_submodule(target.module)
        tensors = delta.tensors()
        for ours, theirs in (("up_scales", "unilora_scales_B"), ("down_places", "unilora_indices_A")):
            expected = getattr(layer, theirs)["default"]
            assert torch.equal(tensors[ours].to(expected.dtype), expected)
