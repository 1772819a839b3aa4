"""What only a base makes possible."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.making import IN, MODULES, OUT, based, close, drawn, lora, on, read, write
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.bases.index import ParameterInfo
from lorahub.bases.layout import Target
from lorahub.conversion.verify import same
from lorahub.deltas.full import Full
from lorahub.deltas.miss import MiSS
from lorahub.deltas.replace import Replace
from lorahub.errors import CannotCarry
from lorahub.records import AdapterRecord


def test_a_replaced_parameter_is_a_difference_where_the_base_is_at_hand(tmp_path: Path) -> None:
    head = Target("", "score", "weight")
    value = drawn(3, IN, seed=8)
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(value)}, modules_to_save=["score"])
    base = based({f"{MODULES[0]}.weight": (OUT, IN), "score.weight": (3, IN)}, {})
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
    found = read(tmp_path / "out").deltas[head]
    assert isinstance(found, Full)
    close(found.diff.numpy(), (value - base.model["score.weight"]).numpy(), 1e-6)  # type: ignore[index,union-attr,operator]
    assert report.rules == {"rename": 1, "replacement-to-difference": 1}


@pytest.mark.parametrize("counted", [7, 8])
def test_a_counter_that_nothing_touched_needs_no_word(counted: int, tmp_path: Path) -> None:
    """Modules kept whole bring their buffers along: those that are the base's own change nothing."""
    norm = "stem.normalization"
    base = based({f"{MODULES[0]}.weight": (OUT, IN), f"{norm}.weight": (8,), f"{norm}.running_mean": (8,)}, {})
    counter = ParameterInfo(shape=(), dtype="I64", stored_as=f"{norm}.num_batches_tracked")
    model: Any = {**base.model, counter.stored_as: torch.tensor(7)}  # type: ignore[dict-item]
    infos = {**base.index.parameters, counter.stored_as: counter}
    base = replace(base, index=replace(base.index, parameters=infos), model=model)
    kept = {
        "weight": drawn(8, seed=3),
        "running_mean": model[f"{norm}.running_mean"].clone(),
        "num_batches_tracked": torch.tensor(counted),
    }
    whole = {Target("", norm, name): Replace(value) for name, value in kept.items()}
    write(tmp_path / "peft", {**on(lora(1)), **whole}, modules_to_save=[norm])
    if counted != 7:
        with pytest.raises(CannotCarry, match="no word"):
            lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
        return
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
    assert set(read(tmp_path / "out").deltas) == {Target("", norm, "weight"), *on(lora(1))}
    assert report.rules["replacement-to-difference"] == 1
    assert lorahub.diff(tmp_path / "peft", tmp_path / "peft", base=base).equal


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_bias_beside_factors_is_pefts_lora_bias_and_comes_back(scale: float, tmp_path: Path) -> None:
    biased = {Target("", module, "bias"): Full(drawn(OUT, seed=at), scale) for at, module in enumerate(MODULES)}
    factors = on(*(lora(seed, scale=scale) for seed in range(3)))
    write(tmp_path / "peft", {**factors, **biased})
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors")
    assert f"lycoris_{MODULES[0].replace('.', '_')}.diff_b" in load_file(tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "back")
    assert report.max_error is not None
    assert report.max_error < 1e-7
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "back"))
    assert one.keys() == other.keys()
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_bias"] is True
    for key, each in one.items():
        close(other[key].numpy(), each.numpy(), 1e-7)
        assert scale != 0.5 or torch.equal(other[key], each)


def test_a_head_trained_whole_comes_back_to_peft_where_the_base_is_at_hand(tmp_path: Path) -> None:
    base = based({f"{MODULES[0]}.weight": (OUT, IN), "score.weight": (3, IN)}, {})
    head = Target("", "score", "weight")
    value = drawn(3, IN, seed=8)
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(value)}, modules_to_save=["score"])
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors", base=base)
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "back", base=base)
    found = read(tmp_path / "back").deltas[head]
    assert isinstance(found, Replace)
    assert report.rules["difference-to-replacement"] == 1
    close(found.value.numpy(), value.numpy(), 1e-6)


def test_a_module_that_peft_could_not_load_is_not_kept_whole(tmp_path: Path) -> None:
    """PEFT wants all that a kept module has; a file with a part of it gives only that part."""
    norm = "stem.normalization"
    base = based({f"{MODULES[0]}.weight": (OUT, IN), f"{norm}.weight": (8,), f"{norm}.running_mean": (8,)}, {})
    write(tmp_path / "x", {**on(lora(1)), Target("", norm, "weight"): Full(drawn(8))}, "kohya")
    with pytest.raises(CannotCarry, match="no word"):
        lorahub.convert(tmp_path / "x", "peft", tmp_path / "out", base=base)


def test_a_bare_model_is_the_base_of_the_component_that_is_named(tmp_path: Path) -> None:
    tensors = {}
    for prefix, module in (("lora_unet", "mid_block_to_q"), ("lora_te", "text_model_fc1")):
        tensors[f"{prefix}_{module}.lora_down.weight"] = drawn(2, 6)
        tensors[f"{prefix}_{module}.lora_up.weight"] = drawn(6, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    base = based({"mid_block.to_q.weight": (6, 6)}, {})
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=base)
    assert "--component" in stop.value.hint
    lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=base, component="unet")
    assert set(read(tmp_path / "out").deltas) == {Target("unet", "mid_block.to_q", "weight")}


def test_names_of_a_tool_of_its_own_are_not_taken_for_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "torchtune"
    folder.mkdir()
    tensors = {"layers.0.attn.v_proj.lora_a.weight": drawn(2, 8), "layers.0.attn.v_proj.lora_b.weight": drawn(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    with pytest.raises(CannotCarry, match="Meta's names") as stop:
        lorahub.convert(folder, "peft", tmp_path / "out")
    assert "--base" in stop.value.hint


def test_a_base_without_numbers_gives_names_and_sizes(tmp_path: Path) -> None:
    block = drawn(3, OUT, seed=1)
    write(tmp_path / "miss", on(MiSS(block)))
    with torch.device("meta"):
        parts = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(IN, OUT, bias=False)})
        layer = torch.nn.ModuleDict({"self_attn": parts})
        model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})
    report = lorahub.convert(tmp_path / "miss", "diffusers", tmp_path / "out", base=model)
    assert report.rules == {"miss-to-lora": 1}
    assert report.max_error == 0.0


def test_a_reference_to_a_hub_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "peft", on(lora(1)))
    lorahub.record(tmp_path / "peft", name="ink", license="mit", version="1.0.0")
    hub = str(tmp_path / "hub")
    record = AdapterRecord.load(tmp_path / "peft" / "lorahub.json")
    base = {"repo_id": "acme/base"}
    (tmp_path / "peft" / "lorahub.json").write_text(record.changed(base=base).to_json())
    lorahub.push(tmp_path / "peft", "acme/ink", version="1.0.0", hub=hub)
    report = lorahub.convert("acme/ink@1.0.0", "kohya", tmp_path / "out", hub=hub)
    assert "acme/ink" in report.adapter
    source, found = read(tmp_path / "peft").deltas, read(tmp_path / "out").deltas
    assert all(same(source[target], found[target]) for target in source)
