"""Processes that call a sharded model with adapters attached; run by test_sharded.py.

Each builds the same model twice, shards one of them, attaches the same adapters to both and says how they compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import rank_groups
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorahub
from lorahub.errors import LorahubError

WORDS = torch.arange(12).reshape(3, 4)


class Model(nn.Module):
    """Every layer that tensor parallelism knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(28, 16)
        self.up = nn.Linear(16, 36)
        self.down = nn.Linear(36, 16)
        self.head = nn.Linear(16, 28, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(self.embed(words)))))


def fsdp(model: Model) -> None:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: Model) -> None:
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def by_width(model: Model) -> None:
    """The embedding cut along its width, and outputs that stay apart."""
    plan = {"embed": ColwiseParallel(), "up": ColwiseParallel(input_layouts=Shard(-1)), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def attached(adapters: Mapping[str, str]) -> Model:
    """The whole model with adapters."""
    model = Model()
    lorahub.attach(model, adapters)
    return model


def called(model: Model) -> tuple[torch.Tensor, int]:
    with torch.no_grad(), CommDebugMode() as traffic:
        out = model(WORDS)
    return out, traffic.get_total_counts()


def compare(shard: Callable[[Model], None], adapters: Mapping[str, str], *, first: bool) -> dict[str, float]:
    """``first``: adapters are attached before the model is sharded."""
    sharded, bare = Model(), Model()
    shard(bare)
    _, usual = called(bare)
    base, _ = called(Model())
    wanted, _ = called(attached(adapters))
    if not first:
        shard(sharded)
    live = lorahub.attach(sharded, adapters)
    if first:
        shard(sharded)
    found, collectives = called(sharded)
    unlike = {"all": float((found - wanted).abs().max())}
    if len(adapters) > 1:
        alone = {name: called(attached({name: each}))[0] for name, each in adapters.items()}
        names = [*adapters, None]
        live.set_rows(names)
        rows, _ = called(sharded)
        one_each = [base[row] if name is None else alone[name][row] for row, name in enumerate(names)]
        unlike["rows"] = float((rows - torch.stack(one_each)).abs().max())
    return {"change": float((wanted - base).abs().max()), "more": collectives - usual, **unlike}


def refused(adapter: str, *, gradients: bool = False) -> str:
    model = Model()
    tensor_parallel(model)
    try:
        with torch.set_grad_enabled(gradients):
            lorahub.attach(model, {"a": adapter})
            model(WORDS)
    except LorahubError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


WAYS = {"fsdp": fsdp, "tensor-parallel": tensor_parallel, "by width": by_width}


def work(_rank: int, _world: int, given: Mapping[str, Any]) -> dict[str, Any]:
    one, two, dora = given["adapters"]
    found: dict[str, Any] = {
        f"{way}, {'first' if first else 'after'}": compare(shard, {"a": one, "b": two}, first=first)
        for way, shard in WAYS.items()
        for first in (False, True)
    }
    found["dora, fsdp"] = compare(fsdp, {"a": dora}, first=False)
    return found | {"dora": refused(dora), "gradients": refused(one, gradients=True)}


if __name__ == "__main__":
    rank_groups.run(work)
