"""Two processes train one adapter: data parallel and sharded by FSDP2 and accelerate, with the losses of one process.

The processes are real (gloo); each has half of the batch, so that the mean of their losses is that of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.nets import Net, batch, train

import lorahub

SCRIPT = Path(__file__).with_name("ranks.py")
ARGUMENTS = {"r": 3, "target_modules": "all-linear", "modules_to_save": "head", "bias": "lora_only"}


@pytest.fixture(scope="module")
def folder(run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("this platform cannot fork")
    folder = tmp_path_factory.mktemp("ranks")
    codes = run_script(SCRIPT.read_text(), folder)
    assert codes == [0, 0], "\n".join((folder / f"said-{rank}").read_text() for rank in range(2))
    return folder


def found(folder: Path, way: str) -> list[Any]:
    return [json.loads((folder / f"rank-{rank}.json").read_text())[way] for rank in range(2)]


@pytest.mark.parametrize(
    ("way", "kind", "arguments"),
    [
        ("ddp", "lora", ARGUMENTS),
        ("fsdp", "lora", ARGUMENTS),
        ("fsdp of ia3", "ia3", {"target_modules": "all-linear"}),
        ("accelerate", "lora", ARGUMENTS),
        ("accelerate, of the first", "lora", ARGUMENTS),
    ],
)
def test_processes_train_together_what_one_trains_alone(folder, way, kind, arguments):
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, kind, **arguments)
    alone = train(model, trainee.parameters(), 6)
    ranks = found(folder, way)
    together = [sum(each) / 2 for each in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0] - 1e-3
    assert all(rank["sharded"] == (way != "ddp") for rank in ranks)
    assert all(rank["kept"] for rank in ranks)
    outputs = model(ids).detach()
    trainee.detach()
    with lorahub.attach(model, [folder / way]):
        assert (model(ids) - outputs).abs().max() <= 1e-3 * outputs.abs().max()


def test_a_model_that_is_sharded_already_is_refused(folder):
    for rank in found(folder, "late"):
        assert "is sharded already" in rank["said"]
        assert "create first" in rank["said"]


def test_the_files_of_sharded_parameters_are_whole(folder):
    deltas = lorahub.load(folder / "fsdp").deltas
    assert {delta.up.shape[1] for delta in deltas.values() if hasattr(delta, "up")} == {3}
    assert not any(torch.isnan(tensor).any() for delta in deltas.values() for tensor in delta.tensors().values())
