"""Processes that merge into a sharded model; run by test_sharding.py, and forked once everything is imported.

Each builds the same model twice, shards one of them, merges an adapter into both and says how they compare.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorahub
from lorahub.errors import LorahubError


class Block(nn.Module):
    """Every sort of parameter that adapters change: sizes that two ranks share unevenly among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(27, 16)
        self.up = nn.Linear(16, 37)
        self.down = nn.Linear(37, 16)
        self.conv = nn.Conv2d(16, 9, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.block = Block()
        self.to(torch.bfloat16)


def fsdp(model: Model, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: Model, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(model.block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def both(model: Model, world: int) -> None:
    """Two dimensions: tensor parallel within, FSDP2 over it, which makes strided shards."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model.block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The whole parameter."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return tensor.detach().redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()


def compare(
    shard: Callable[[Model, int], None], world: int, adapter: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    whole, sharded = Model(), Model()
    shard(sharded, world)
    before = {name: plain(value).clone() for name, value in sharded.named_parameters()}
    lorahub.merge(whole, [adapter], **options)
    with CommDebugMode() as traffic:
        merged = lorahub.merge(sharded, [adapter], **options)
    after = {name: plain(value).clone() for name, value in sharded.named_parameters()}
    merged.undo()
    undone = {name: plain(value) for name, value in sharded.named_parameters()}
    return {
        "collectives": traffic.get_total_counts(),
        "sharded": sorted(name for name, value in sharded.named_parameters() if isinstance(value, DTensor)),
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "unlike": {
            name: (value != after[name]).float().mean().item()
            for name, value in whole.named_parameters()
            if not torch.equal(value, after[name])
        },
        "left": sorted(name for name in before if not torch.equal(before[name], undone[name])),
    }


def refused(adapter: str, world: int) -> dict[str, Any]:
    model = Model()
    tensor_parallel(model, world)
    before = {name: plain(value).clone() for name, value in model.named_parameters()}
    try:
        lorahub.merge(model, [adapter])
    except LorahubError as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    after = {name: plain(value) for name, value in model.named_parameters()}
    return {"said": said, "changed": sorted(name for name in before if not torch.equal(before[name], after[name]))}


def broken(rank: int) -> dict[str, Any]:
    """The last rank fails; the others wait for it in vain."""
    if rank:
        raise RuntimeError(f"rank {rank} breaks down as it was asked to")
    return {}


WAYS = {"fsdp": fsdp, "tensor-parallel": tensor_parallel, "both": both}


def main(folder: Path, rank: int, world: int, jobs: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    patience = timedelta(minutes=2)
    meeting = f"file://{folder / 'meeting'}"
    init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        way, adapter, options = job["way"], job.get("adapter", ""), job.get("options", {})
        if way == "broken":
            found[name] = broken(rank)
        elif way == "refused":
            found[name] = refused(adapter, world)
        else:
            found[name] = compare(WAYS[way], world, adapter, options)
    draft = folder / f"rank-{rank}.json.draft"
    draft.write_text(json.dumps(found))
    draft.rename(folder / f"rank-{rank}.json")
    leave()


def leave() -> NoReturn:
    """End this process with success once every rank has come here, without taking the interpreter down.

    Gloo's threads outlive ``destroy_process_group`` while a device mesh refers to the group.  A thread that lets go of
    the tensors of its last collective while the interpreter is being finalised asks for the interpreter's lock, is
    ended by that in the middle of a destructor, and takes the process with it: "terminate called without an active
    exception".
    """
    barrier()
    destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start(folder: Path, rank: int, world: int, jobs: Mapping[str, Any]) -> int:
    """Fork one rank, which says what it has to say in a file of its own; its process."""
    if child := os.fork():
        return child
    try:
        said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        main(folder, rank, world, jobs)
    except BaseException:  # noqa: BLE001 - a fork must not go on with what its parent does
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def together(folder: Path, world: int, jobs: Mapping[str, Any]) -> list[int]:
    """Run one group of ranks: the exit code of each."""
    folder.mkdir()
    ranks = [start(folder, rank, world, jobs) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


if __name__ == "__main__":
    groups = json.loads(sys.argv[2])
    codes = {name: together(Path(sys.argv[1]) / name, *group) for name, group in groups.items()}
    sys.stdout.write(json.dumps(codes))
