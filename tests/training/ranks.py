"""Processes that train one adapter together; run by test_processes.py, and forked once everything is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import forks
from training.nets import Net, batch, numbers, same, train

import lorahub
from lorahub.errors import UsageError

ARGUMENTS = {"r": 3, "target_modules": "all-linear", "modules_to_save": "head", "bias": "lora_only"}
STEPS = 6


def shard(model: Net) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def together(way: str, folder: Path, rank: int) -> dict[str, Any]:
    model = Net()
    before = numbers(model)
    kind = "ia3" if way == "fsdp of ia3" else "lora"
    arguments: dict[str, Any] = ARGUMENTS if kind == "lora" else {"target_modules": "all-linear"}
    trainee = lorahub.create(model, kind, **arguments)
    wrapped: nn.Module = model
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        shard(model)
    ids, labels = batch()
    half = slice(rank * 8, rank * 8 + 8)
    losses = train(wrapped, trainee.parameters(), STEPS, data=(ids[half], labels[half]))
    if way != "ddp" or rank == 0:
        trainee.save(folder / way)
    return {
        "losses": losses,
        "sharded": all(hasattr(own, "device_mesh") for own in trainee.parameters()),
        "kept": way != "ddp" or same(numbers(model), before),
    }


def accelerated(way: str, folder: Path, rank: int) -> dict[str, Any]:
    """As a script of accelerate does it: all numbers in every process, or those of the first one handed out."""
    forks.shards_here()
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=way.endswith("of the first"),
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = Net(seed=rank if way.endswith("of the first") else 0)
    before = numbers(Net())
    trainee = lorahub.create(model, **ARGUMENTS)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainee.parameters(), lr=1e-2))
    ids, labels = batch()
    half = slice(rank * 8, rank * 8 + 8)
    losses = train(wrapped, [], STEPS // 2, optimizer=optimizer, data=(ids[half], labels[half]))
    accelerator.save_state(str(folder / "state"))
    train(wrapped, [], 2, optimizer=optimizer, data=(ids[half], labels[half]))
    accelerator.load_state(str(folder / "state"))
    losses += train(wrapped, [], STEPS // 2, optimizer=optimizer, data=(ids[half], labels[half]))
    trainee.save(folder / way)
    whole = {name: value.full_tensor() for name, value in numbers(model).items()}  # type: ignore[operator]
    return {
        "losses": losses,
        "sharded": accelerator.is_fsdp2 and all(hasattr(own, "device_mesh") for own in trainee.parameters()),
        "kept": same(whole, before),
    }


def late(rank: int) -> dict[str, Any]:
    model = Net()
    shard(model)
    try:
        lorahub.create(model, r=2)
    except UsageError as error:
        return {"said": str(error), "rank": rank}
    return {"said": ""}


def everything(folder: Path, rank: int) -> dict[str, Any]:
    found = {way: together(way, folder, rank) for way in ("ddp", "fsdp", "fsdp of ia3")}
    found |= {way: accelerated(way, folder, rank) for way in ("accelerate", "accelerate, of the first")}
    return found | {"late": late(rank)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(forks.together(Path(sys.argv[1]), everything)))
