"""Kinds built from products of small factors, against PEFT: merged from the files alone, elementwise equal.

PEFT makes the adapter, every number of it is moved, and it is saved; lorahub sees the files.  Holds for PEFT 0.21.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorahub.adapter import load, open_header, save
from lorahub.findings import Verdict
from lorahub.formats.peft.config import COMMON
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    from peft import (
        AdaLoraConfig,
        DeloraConfig,
        GraloraConfig,
        HiraConfig,
        LoHaConfig,
        LoKrConfig,
        MissConfig,
        PeftConfig,
        PeftModel,
        get_peft_model,
    )


class Layers(nn.Module):
    """Layers of every type that these kinds adapt, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.turned = Conv1D(12, 8)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8, bias=False))
        self.flat = nn.Conv1d(8, 10, 3, padding=1)
        self.narrow = nn.Conv1d(8, 14, 1)
        self.square = nn.Conv2d(4, 14, 3, padding=1)
        self.oblong = nn.Conv2d(4, 14, (3, 1))
        self.point = nn.Conv2d(4, 14, 1)
        self.grouped = nn.Conv2d(4, 14, 3, groups=2)
        self.cube = nn.Conv3d(2, 4, 2)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.block(self.turned(self.first(self.embed(tokens))))
        lines = hidden.transpose(1, 2)
        planes = (self.square, self.oblong, self.point, self.grouped)
        return (
            hidden,
            self.flat(lines),
            self.narrow(lines),
            *(each(image) for each in planes),
            self.cube(image[:, :2, None].expand(-1, -1, 2, -1, -1)),
        )


def base() -> Layers:
    torch.manual_seed(3)
    return Layers()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(11, (2, 4), generator=generator), torch.randn(2, 4, 5, 5, generator=generator)


LINEAR = ["first", "block.0", "block.1"]
CONVOLUTIONS = ["flat", "narrow", "square", "oblong", "point", "grouped"]


@dataclass(frozen=True)
class Case:
    """A PEFT config, and what the file must turn out to be.

    ``loads`` is false where PEFT cannot load what it saves itself.
    """

    config: PeftConfig
    kind: str
    notes: tuple[str, ...] = ()
    loads: bool = True


CASES: Mapping[str, Case] = {
    "loha": Case(LoHaConfig(r=2, alpha=3, target_modules=LINEAR), "loha"),
    "loha patterns": Case(
        LoHaConfig(
            r=2, alpha=3, target_modules=LINEAR, rank_pattern={r"block\.\d": 4}, alpha_pattern={"first": 5, "1": 0.5}
        ),
        "loha",
    ),
    "loha convolutions": Case(LoHaConfig(r=2, alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS]), "loha"),
    "loha cores": Case(
        LoHaConfig(r=2, alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS], use_effective_conv2d=True), "loha"
    ),
    "lokr of whole factors": Case(LoKrConfig(r=8, alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS]), "lokr"),
    "lokr": Case(LoKrConfig(r=1, alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS]), "lokr"),
    "lokr cores": Case(
        LoKrConfig(r=2, alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS], use_effective_conv2d=True), "lokr"
    ),
    "lokr of factored factors": Case(
        LoKrConfig(r=1, alpha=0.7, decompose_both=True, target_modules=[*LINEAR, *CONVOLUTIONS]), "lokr"
    ),
    "lokr split by a factor": Case(
        LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=LINEAR, rank_pattern={"block.1": 1}), "lokr"
    ),
    "hira": Case(HiraConfig(r=2, target_modules=[*LINEAR, "embed", "flat", "square", "point", "cube"]), "hira"),
    "hira of transposed layers": Case(HiraConfig(r=2, target_modules=["turned"], fan_in_fan_out=True), "hira"),
    "hira with a rank pattern, which peft ignores": Case(
        HiraConfig(r=2, target_modules=LINEAR, rank_pattern={"first": 3}), "hira"
    ),
    "delora": Case(
        DeloraConfig(
            r=2, target_modules=LINEAR, rank_pattern={"first": 3}, delora_lambda=4, lambda_pattern={"block.1": 2}
        ),
        "delora",
    ),
    "gralora": Case(GraloraConfig(r=4, alpha=3, target_modules=LINEAR), "gralora"),
    "gralora of more blocks": Case(GraloraConfig(r=4, alpha=3, gralora_k=4, target_modules=["block.0"]), "gralora"),
    "gralora, hybrid": Case(
        GraloraConfig(r=4, alpha=3, hybrid_r=3, target_modules=["turned"], fan_in_fan_out=True), "gralora"
    ),
    "adalora": Case(AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR), "adalora"),
    "adalora convolutions": Case(
        AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=["square", "oblong", "point"]), "adalora"
    ),
    "adalora of transposed layers": Case(
        AdaLoraConfig(init_r=3, lora_alpha=-1, total_step=9, target_modules=["turned"], fan_in_fan_out=True), "adalora"
    ),
    "miss": Case(MissConfig(r=5, target_modules=LINEAR), "miss"),
    "miss, random": Case(MissConfig(r=3, init_weights=False, target_modules=LINEAR), "miss"),
    "miss, mini": Case(MissConfig(r=5, init_weights="mini", mini_r=4, target_modules=LINEAR), "miss"),
    "miss, bat": Case(MissConfig(r=2, init_weights="bat", target_modules=LINEAR), "miss"),
}


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings (about configs it corrects itself) are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def trained(config: PeftConfig, folder: Path) -> PeftModel:
    """A PEFT model with every trainable number moved, saved to ``folder``."""
    model = quietly(lambda: get_peft_model(base(), config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    quietly(lambda: model.save_pretrained(folder))
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merging_from_the_files_gives_pefts_merged_weights(
    case: Case, dtype: torch.dtype, tmp_path: Path, registry: Registry
) -> None:
    live = trained(case.config, tmp_path)
    adapter = load(open_header(tmp_path, registry), registry)
    merged = quietly(live.merge_and_unload).state_dict()
    seen = set()
    for name, weight in base().state_dict().items():
        delta = next((delta for target, delta in adapter.deltas.items() if target.name == name), None)
        if delta is None:
            assert torch.equal(weight, merged[name])
            continue
        seen.add(delta.kind)
        turned = name == "turned.weight"
        logical = (weight.T if turned else weight).to(dtype)
        change = delta.delta(logical)
        assert change.norm() > 1e-2 * logical.norm(), name
        found = logical + change
        expected = (merged[name].T if turned else merged[name]).to(dtype)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        low = delta.low_rank()
        if low is not None:
            product = (low.up.double() @ low.down.double() * low.scale).reshape(logical.shape)
            torch.testing.assert_close(logical + product.to(dtype), expected, rtol=1e-5, atol=2e-5)
    assert seen == {case.kind}
    assert len(adapter.deltas) == len(case.config.target_modules)


def test_what_peft_writes_is_read_without_doubt_and_written_again_for_peft(
    case: Case, tmp_path: Path, registry: Registry
) -> None:
    live = trained(case.config, tmp_path / "theirs")
    header = open_header(tmp_path / "theirs", registry)
    assert header.kinds == (case.kind,)
    assert {finding.code for finding in header.findings} == set(case.notes)
    assert all(finding.level is Verdict.EXACT for finding in header.findings)

    save(load(header, registry), tmp_path / "ours", registry=registry)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
    if not case.loads:
        return

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert [
        str(each.message) for each in said if "missing" in str(each.message) or "Unexpected" in str(each.message)
    ] == []
    with torch.no_grad():
        expected, found = live(*inputs()), again.eval()(*inputs())
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def pruned(folder: Path) -> PeftModel:
    """An AdaLoRA model after its ranks were pruned, in one module to nothing."""
    masks = {"first": [True, False, True], "block.0": [True] * 3, "block.1": [False] * 3}
    config = AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR)
    model = trained(config, folder)
    with torch.no_grad():
        for name, mask in masks.items():
            values = model.base_model.model.get_submodule(name).lora_E["default"]
            values[~torch.tensor(mask)] = 0.0
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in masks.items()}
    quietly(lambda: model.save_pretrained(folder))
    return model


def test_ranks_that_adalora_pruned_are_read_with_the_scale_of_all_of_them(tmp_path: Path, registry: Registry) -> None:
    live = pruned(tmp_path / "theirs")
    header = open_header(tmp_path / "theirs", registry)
    assert header.findings == ()
    assert header.ranks == (2, 3)
    adapter = load(header, registry)
    save(adapter, tmp_path / "ours", registry=registry)
    again = quietly(lambda: PeftModel.from_pretrained(base(), tmp_path / "ours"))
    with torch.no_grad():
        for one, other in zip(live(*inputs()), again.eval()(*inputs()), strict=True):
            torch.testing.assert_close(one, other)

    merged = quietly(live.merge_and_unload).state_dict()
    sizes = {}
    for target, delta in adapter.deltas.items():
        weight = base().state_dict()[target.name]
        change = delta.delta(weight)
        sizes[target.module] = float(change.norm() / weight.norm())
        torch.testing.assert_close(weight + change, merged[target.name], rtol=1e-5, atol=2e-5)
    assert sizes["block.1"] == 0.0
    assert min(sizes["first"], sizes["block.0"]) > 1e-2


@pytest.mark.parametrize("name", ["loha", "lokr", "hira", "delora", "gralora", "adalora", "miss"])
def test_every_field_of_pefts_config_has_a_meaning(name: str, registry: Registry) -> None:
    config = next(case.config for case in CASES.values() if case.kind == name)
    spelling = next(each for each in registry.kinds[name].spellings if each.tag == config.peft_type)
    assert config.to_dict().keys() - spelling.fields.keys() - COMMON.keys() == set()
