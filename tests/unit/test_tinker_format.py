"""Tinker's adapters: PEFT's folder, stacks of experts, and an output layer by another name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.adapter import load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.plugins import Registry

P = "base_model.model.model"
E, R, HIDDEN, INNER = 3, 2, 6, 4
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "base_model_name_or_path": "acme/base",
    "use_rslora": False,
}


def pair(stem: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(up))
    return {
        f"{P}.{stem}.lora_A.weight": torch.randn(down, generator=generator),
        f"{P}.{stem}.lora_B.weight": torch.randn(up, generator=generator),
    }


ATTENTION = pair("layers.0.self_attn.q_proj", (R, HIDDEN), (5, R))
UNEMBED = pair("unembed_tokens", (R, HIDDEN), (11, R))
GATE = pair("layers.0.mlp.experts.w1", (1, R, HIDDEN), (E, INNER, R))  # one expert's input side stands for all
DOWN = pair("layers.0.mlp.experts.w2", (E, R, INNER), (1, HIDDEN, R))
UP = pair("layers.0.mlp.experts.w3", (E, R, HIDDEN), (E, INNER, R))
ALL = ATTENTION | UNEMBED | GATE | DOWN | UP


def folder(place: Path, tensors: Mapping[str, torch.Tensor] = ALL, config: Mapping[str, Any] | None = CONFIG) -> Path:
    place.mkdir()
    save_file(place / "adapter_model.safetensors", tensors)
    if config is not None:
        (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def base(*names: str) -> BaseIndex:
    parameters = {name: ParameterInfo(shape=(4, 4), dtype="F32", stored_as=name) for name in names}
    return BaseIndex(ref=BaseRef(repo="acme/base"), framework="test", parameters=parameters)


def test_it_is_told_from_peft_and_every_key_has_its_place(registry: Registry, tmp_path: Path) -> None:
    header = open_header(folder(tmp_path / "a"), registry)
    assert (header.format, header.kinds, header.findings) == ("tinker", ("expert-lora", "lora"), ())
    assert {target.name for target in header.touches} == {
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.gate_proj",
        "model.layers.0.mlp.experts.up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert header.reading.base_repo == "acme/base"


@pytest.mark.parametrize("name", ["gate_proj", "down_proj", "up_proj"])
def test_each_expert_has_its_own_product_and_a_single_factor_stands_for_all(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    deltas = load(open_header(folder(tmp_path / "a"), registry), registry).deltas
    delta = next(each for target, each in deltas.items() if target.parameter == name)
    a, b = {"gate_proj": GATE, "down_proj": DOWN, "up_proj": UP}[name].values()
    expected = [4 * b[at % len(b)].double() @ a[at % len(a)].double() for at in range(E)]
    found = delta.delta(torch.zeros(E, b.shape[1], a.shape[2], dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.norm() > 1e-2


def test_the_output_layer_is_the_bases(registry: Registry, tmp_path: Path) -> None:
    deltas = load(open_header(folder(tmp_path / "a", UNEMBED), registry), registry).deltas
    ((target, delta),) = deltas.items()
    assert target.name == "lm_head.weight"
    assert isinstance(delta, LoRA)
    assert torch.equal(delta.up, UNEMBED[f"{P}.unembed_tokens.lora_B.weight"])
    assert delta.scale == 4.0


@pytest.mark.parametrize(
    ("stem", "known"),
    [
        ("layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("unembed_tokens", "lm_head"),
    ],
)
def test_with_a_base_modules_are_found_under_its_names(
    registry: Registry, tmp_path: Path, stem: str, known: str
) -> None:
    tensors = UNEMBED | pair(stem, (R, HIDDEN), (5, R))
    header = open_header(folder(tmp_path / "a", tensors), registry, index=base(f"{known}.weight"))
    assert f"{known}.weight" in {target.name for target in header.touches}


def test_experts_are_found_in_a_model_with_several_parts(registry: Registry, tmp_path: Path) -> None:
    index = base("model.language_model.layers.0.mlp.experts.down_proj")
    header = open_header(folder(tmp_path / "a", DOWN), registry, index=index)
    assert [target.name for target in header.touches] == ["model.language_model.layers.0.mlp.experts.down_proj"]


def test_in_a_base_with_a_module_for_each_expert_each_is_a_lora_of_its_own(registry: Registry, tmp_path: Path) -> None:
    index = base(*(f"model.layers.0.mlp.experts.{at}.gate_proj.weight" for at in range(E)))
    adapter = load(open_header(folder(tmp_path / "a", GATE), registry, index=index), registry)
    a, b = GATE.values()
    assert len(adapter.deltas) == E
    for target, delta in adapter.deltas.items():
        at = int(target.module.split(".")[5])
        assert isinstance(delta, LoRA)
        assert torch.equal(delta.down, a[0])
        assert torch.equal(delta.up, b[at])
        assert (delta.scale, target.parameter) == (4.0, "weight")
    again = open_header(save(adapter, tmp_path / "b", registry=registry), registry)
    assert (again.format, set(again.touches)) == ("peft", set(adapter.deltas))


def test_parts_of_a_fused_parameter_are_refused_with_the_reason(registry: Registry, tmp_path: Path) -> None:
    index = base("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    header = open_header(folder(tmp_path / "a", GATE | DOWN), registry, index=index)
    (finding,) = header.findings
    assert (finding.code, finding.level, set(finding.where)) == ("kind-unsupported", Verdict.INCOMPATIBLE, set(GATE))


def test_placeholders_of_projections_that_a_model_lacks_are_noted(registry: Registry, tmp_path: Path) -> None:
    empty = pair("layers.0.mlp.experts.w3", (0, R, HIDDEN), (0, INNER, R))
    header = open_header(folder(tmp_path / "a", UNEMBED | empty), registry)
    (finding,) = header.findings
    assert (finding.code, finding.level, set(finding.where)) == ("tensor-empty", Verdict.EXACT, set(empty))


@pytest.mark.parametrize(
    ("tensors", "config", "code"),
    [
        (ALL, {**CONFIG, "r": 8}, "config-contradicts-tensors"),
        (ALL, {**CONFIG, "use_rslora": True}, "config-unknown"),
        (ALL, {**CONFIG, "new_maths": 1}, "config-unknown"),
        (ALL | {"elsewhere.weight": torch.ones(2)}, CONFIG, "key-unknown"),
        (ALL | {f"{P}.norm.weight": torch.ones(2)}, CONFIG, "key-unknown"),
        (UNEMBED | pair("layers.0.mlp.experts.w1", (2, R, HIDDEN), (E, INNER, R)), CONFIG, "slot-misfit"),
    ],
)
def test_what_does_not_add_up_is_a_finding(
    registry: Registry, tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], code: str
) -> None:
    header = open_header(folder(tmp_path / "a", tensors, config), registry)
    assert code in {each.code for each in header.findings}


def test_without_an_alpha_the_strength_is_unknown(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="strength"):
        open_header(folder(tmp_path / "a", ALL, None), registry)
    with pytest.raises(IntegrityError):
        open_header(folder(tmp_path / "b", ALL, {**CONFIG, "lora_alpha": "8"}), registry)


def test_it_is_not_written_and_what_is_no_expert_becomes_peft(registry: Registry, tmp_path: Path) -> None:
    adapter = load(open_header(folder(tmp_path / "a", ATTENTION | UNEMBED), registry), registry)
    with pytest.raises(CannotCarry, match="read, not written"):
        save(adapter, tmp_path / "b", registry=registry, format="tinker")
    header = open_header(save(adapter, tmp_path / "c", registry=registry), registry)
    assert (header.format, set(header.touches)) == ("peft", set(adapter.deltas))
