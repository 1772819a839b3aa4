"""Processes that merge into a sharded model; run by test_sharding.py.

Each builds the same model twice, shards one of them, merges an adapter into both and says how they compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import rank_groups
import torch
from torch import nn
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


def work(rank: int, world: int, jobs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        way, adapter, options = job["way"], job.get("adapter", ""), job.get("options", {})
        if way == "broken":
            found[name] = broken(rank)
        elif way == "refused":
            found[name] = refused(adapter, world)
        else:
            found[name] = compare(WAYS[way], world, adapter, options)
    return found


if __name__ == "__main__":
    rank_groups.run(work)
