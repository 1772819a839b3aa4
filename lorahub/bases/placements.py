"""Which positions of a sharded parameter this process holds.

FSDP2 and tensor parallelism keep a parameter as a ``DTensor``, of which each process holds a part.  Placements follow
https://docs.pytorch.org/docs/stable/distributed.tensor.html.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from lorahub.errors import Incompatible
from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Runs", "held_positions", "is_sharded"]

Runs: TypeAlias = "tuple[range, ...]"
"""The positions on one axis of a parameter that a process holds, in the order in which it has them."""


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``: a parameter of which there is a part here, or what a module makes of such."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def held_positions(name: str, tensor: DTensor) -> tuple[Runs, ...]:
    """For each axis the positions that this process holds, from the placements of its mesh, the first applied first.

    Raises:
        Incompatible: it holds partial sums; ``name`` says of what.
    """
    axes: list[Runs] = [(range(size),) for size in tensor.shape]
    mesh = tensor.device_mesh
    for number, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise Incompatible(
                f"{name} holds partial sums ({placement}), which add up to the parameter only after a reduction",
                "redistribute it as Replicate or Shard first",
            )
        axis = int(getattr(placement, "dim")) % len(axes)  # noqa: B009 - the base class Placement declares none
        parts, mine = mesh.size(number), mesh.get_local_rank(number)
        # a strided shard takes its share of each of ``split_factor`` sections, such as gate and up of a fused layer
        sections = _chunks(range(sum(map(len, axes[axis]))), int(getattr(placement, "split_factor", 1)))
        spans = [span for section in sections for span in _chunks(section, parts)[mine : mine + 1]]
        axes[axis] = tuple(run for span in spans for run in _within(axes[axis], span))
    return tuple(_joined(runs) for runs in axes)


def _chunks(span: range, count: int) -> list[range]:
    """``span`` cut as ``torch.chunk`` cuts: equal parts, the last shorter, and perhaps fewer than ``count``."""
    height = -(-len(span) // count)
    return [span[start : start + height] for start in range(0, len(span), height)] if height else []


def _within(runs: Runs, span: range) -> Iterator[range]:
    """The positions numbered ``span`` among those of ``runs``."""
    at = 0
    for run in runs:
        part = run[max(span.start - at, 0) : max(span.stop - at, 0)]
        if part:
            yield part
        at += len(run)


def _joined(runs: Iterable[range]) -> Runs:
    """Runs with neighbours that follow on each other made one."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)
