"""Adapters on models that are sharded over processes: FSDP2 and tensor parallelism.

The processes are real (gloo, two of them); each compares what it sees with the whole model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_groups
import torch

from lorahub.files.writer import save_file

SCRIPT = Path(__file__).with_name("live_ranks.py")
SHAPES = {"up": (36, 16), "down": (16, 36), "head": (28, 16)}


def write_adapter(folder: Path, *, seed: int, dora: bool = False) -> str:
    """For every layer of the model, as PEFT writes it; of DoRA not for the embedding."""
    generator = torch.Generator().manual_seed(seed)
    tensors, r = {}, 4
    for name, (out, width) in SHAPES.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(r, width, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, r, generator=generator) * 0.05
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    if not dora:
        tensors["base_model.model.embed.lora_embedding_A"] = torch.randn(r, 28, generator=generator)
        tensors["base_model.model.embed.lora_embedding_B"] = torch.randn(16, r, generator=generator) * 0.05
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    targets = [*SHAPES] if dora else [*SHAPES, "embed"]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": targets, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def both(run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    if not hasattr(os, "fork"):
        pytest.skip("this platform cannot fork")
    folder = tmp_path_factory.mktemp("groups")
    adapters = [write_adapter(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    adapters.append(write_adapter(folder / "dora", seed=5, dora=True))
    codes = run_script(SCRIPT.read_text(), folder, json.dumps({"pair": (2, {"adapters": adapters})}))
    return rank_groups.found_by(folder, "pair", codes)


@pytest.mark.parametrize("when", ["after", "first"])
@pytest.mark.parametrize("way", ["fsdp", "tensor-parallel", "by width"])
def test_adapters_act_as_on_the_whole_model_and_nothing_more_is_sent(both, way, when):
    for found in (each[f"{way}, {when}"] for each in both):
        assert found["change"] > 0.5
        assert found["all"] < 2e-6
        assert found["rows"] < 2e-6
        assert found["more"] == 0


def test_dora_acts_where_weights_are_gathered(both):
    for found in (each["dora, fsdp"] for each in both):
        assert found["change"] > 0.5
        assert found["all"] < 2e-6


def test_what_cannot_be_done_in_parts_is_refused_by_name(both):
    for found in both:
        assert found["dora"].startswith("Incompatible: up.weight is tensor-parallel, and only changes of low rank")
        assert "lorahub.merge" in found["dora"]
        assert found["gradients"].startswith("Incompatible: up.weight is tensor-parallel, and gradients")
        assert "no_grad" in found["gradients"]
