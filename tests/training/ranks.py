"""Processes that train one adapter together; run by test_processes.py, and forked once everything is imported."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


def late(rank: int) -> dict[str, Any]:
    model = Net()
    shard(model)
    try:
        lorahub.create(model, r=2)
    except UsageError as error:
        return {"said": str(error), "rank": rank}
    return {"said": ""}


def main(folder: Path, rank: int) -> NoReturn:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    found = {way: together(way, folder, rank) for way in ("ddp", "fsdp", "fsdp of ia3")}
    found["late"] = late(rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    barrier()
    destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads outlive their group, and may take an interpreter down that is being finalised


def start(folder: Path, rank: int) -> int:
    """Fork one rank, which says what it has to say in a file of its own; its process."""
    if child := os.fork():
        return child
    try:
        said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        main(folder, rank)
    except BaseException:  # noqa: BLE001 - a fork must not go on with what its parent does
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    ranks = [start(Path(sys.argv[1]), rank) for rank in range(2)]
    sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]))
