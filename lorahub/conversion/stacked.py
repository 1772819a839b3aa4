"""Experts that an adapter changes one by one as one change of the stack that the base keeps them in, and back.

Transformers 5 stacks the experts of a mixture in one parameter, and adapters of earlier releases name each of them.
Parts of one expert (gate and up) are fused by their rows first; ranks are brought to the largest by zeros, and scales
to the commonest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lorahub.bases.layout import Region, Target
from lorahub.conversion.change import Change
from lorahub.conversion.folding import commonest, fold
from lorahub.conversion.rewrite import Obstacle
from lorahub.deltas.delta import Delta, take
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.lora import LoRA
from lorahub.lazy import torch

__all__ = ["expert_of", "stacked"]

Band = tuple[Region, Change]


def expert_of(delta: Delta, cut: Region) -> LoRA:
    """What a stack's change does to some rows of one expert.

    Raises:
        Obstacle: it is no LoRA of a stack.
    """
    if not isinstance(delta, ExpertLoRA) or cut.expert is None:
        raise Obstacle(f"a {delta.kind} change of a stack is not taken apart", "")
    return LoRA(take(delta.up[cut.expert], cut.rows, 0).contiguous(), delta.down[cut.expert].contiguous(), delta.scale)


def stacked(
    target: Target,
    bands: Sequence[Band],
    shape: tuple[int, ...],
    fused: Callable[[Sequence[Band], tuple[int, int]], LoRA],
) -> Change:
    """The change of a whole stack; experts that no band is of get zeros.

    Args:
        target: the stack.
        bands: where each part of it lies, and the part.
        shape: of the stack, as the base stores it.
        fused: brings the bands of one expert together as one LoRA of [out, in].

    Raises:
        Obstacle: there are no matrices, or parts are stored either way round.
    """
    ways = {region.transposed for region, _ in bands}
    if len(shape) != 3 or len(ways) > 1 or any(region.expert is None for region, _ in bands):
        raise Obstacle("its parts lie in no one stack of matrices", "")
    (transposed,) = ways
    count, out, width = (shape[0], shape[2], shape[1]) if transposed else shape
    experts: dict[int, LoRA] = {}
    for expert in sorted({region.expert for region, _ in bands if region.expert is not None}):
        own = [
            (replace(region, expert=None, transposed=False), part) for region, part in bands if region.expert == expert
        ]
        experts[expert] = fused(own, (out, width))
    origins = tuple(replace(origin, of_parameter=region) for region, part in bands for origin in part.origins)
    rules = tuple(dict.fromkeys(rule for _, part in bands for rule in part.rules))
    start = Change(target=target, delta=next(iter(experts.values())), origins=origins, shape=shape, rules=rules)
    way = None if out != width else transposed  # a stack of oblong matrices tells it by its shape
    return start.become(ExpertLoRA(*_together(experts, count), way), "experts-to-stack")


def _together(experts: Mapping[int, LoRA], count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up [E, out, r], down [E, r, in], scale), zeros where an expert is missing or of a smaller rank."""
    scale = commonest(each.scale for each in experts.values())
    ups = {at: fold(each.up, each.scale / scale) if scale else each.up for at, each in experts.items()}
    rank = max(each.down.shape[0] for each in experts.values())
    first = next(iter(experts.values()))
    dtype = first.down.dtype
    for tensor in (*ups.values(), *(each.down for each in experts.values())):
        dtype = torch.promote_types(dtype, tensor.dtype)
    up = torch.zeros(count, first.up.shape[0], rank, dtype=dtype)
    down = torch.zeros(count, rank, first.down.shape[1], dtype=dtype)
    for at, each in experts.items():
        own = each.down.shape[0]
        up[at, :, :own], down[at, :own] = ups[at].to(dtype), each.down.to(dtype)
    return up, down, scale
