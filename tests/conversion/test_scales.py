"""Scales, alphas and ranks: where a format has fewer of them, they go into the factors without a change."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion.making import IN, MODULES, NOWHERE, OUT, RANK, change_of, close, drawn, lora, on, read, start, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.bases.layout import Target
from lorahub.conversion.folding import fold
from lorahub.conversion.unify import ladder, one_rank, one_scale
from lorahub.deltas.lora import LoRA


def test_a_power_of_two_folds_into_sixteen_bits_and_anything_else_into_thirty_two() -> None:
    numbers = drawn(50, dtype=torch.bfloat16)
    assert fold(numbers, 0.25).dtype == torch.bfloat16
    assert torch.equal(fold(numbers, 0.25).double(), numbers.double() * 0.25)
    third = fold(numbers, 1 / 3)
    assert third.dtype == torch.float32
    assert torch.equal(third, (numbers.double() / 3).float())
    tiny = torch.tensor([2**-24], dtype=torch.float16)  # the smallest there is: half of it would be lost
    assert float(fold(tiny, 0.5)) == 2**-25


def test_mlx_gets_one_scale_and_one_rank(tmp_path: Path) -> None:
    deltas = on(lora(1, scale=2.0), lora(2, scale=0.3, rank=3), lora(3, scale=2.0))
    write(tmp_path / "peft", deltas)
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]) == (2.0, 3)
    found = read(tmp_path / "mlx").deltas
    for target, delta in deltas.items():
        close(change_of(found[target]), change_of(delta))
    assert report.rules == {"rank-padded": 2, "scale-folded": 1}


def test_scales_a_power_of_two_apart_stay_bit_exact_in_sixteen_bits(tmp_path: Path) -> None:
    half = [
        LoRA(drawn(OUT, RANK, seed=seed, dtype=torch.bfloat16), drawn(RANK, IN, seed=9, dtype=torch.bfloat16), scale)
        for seed, scale in enumerate((2.0, 0.5, 2.0))
    ]
    write(tmp_path / "peft", on(*half))
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    assert report.max_error == 0.0
    assert {each.dtype for each in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {torch.bfloat16}


def test_rank_stabilised_scales_become_alphas(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{module}.lora_{name}.weight": drawn(*size, seed=seed)
        for seed, module in enumerate(MODULES)
        for name, size in (("A", (3, IN)), ("B", (OUT, 3)))
    }
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out.safetensors")
    assert report.rules == {"rslora-folded": 3}
    assert report.max_error == 0.0
    written = load_file(tmp_path / "out.safetensors")
    alphas = [float(each) for key, each in written.items() if key.endswith(".alpha")]
    assert alphas == pytest.approx([5 * math.sqrt(3)] * 3, rel=1e-15)


def test_an_alpha_of_kohya_is_the_alpha_of_diffusers(tmp_path: Path) -> None:
    stem = "lora_unet_final_layer_linear"
    tensors = {
        f"{stem}.lora_down.weight": drawn(4, 8),
        f"{stem}.lora_up.weight": drawn(6, 4),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "flux.safetensors", {"lorahub.modules": json.dumps({stem: "final_layer.linear"})})
    lorahub.convert(tmp_path / "flux.safetensors", "diffusers", tmp_path / "out")
    ((target, delta),) = read(tmp_path / "out").deltas.items()
    assert target == Target("transformer", "proj_out", "weight")
    assert isinstance(delta, LoRA)
    assert delta.scale == 0.25
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 1


def test_unifying_changes_nothing() -> None:
    changes = [replace(start(lora(seed, rank=rank, scale=scale)), target=Target("", str(seed), "weight"))
               for seed, (rank, scale) in enumerate(((2, 0.3), (3, 1.7), (1, 0.3)))]  # fmt: skip
    assert len({change.delta.scale for change in one_scale(changes)}) == 1  # type: ignore[attr-defined]
    assert len({change.delta.down.shape[0] for change in one_rank(changes)}) == 1  # type: ignore[attr-defined]
    for steps in ladder(NOWHERE):
        now = list(changes)
        for step in steps:
            now = step(now)
        for before, after in zip(changes, now, strict=True):
            close(change_of(after.delta), change_of(before.delta))
