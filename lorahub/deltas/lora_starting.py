"""How LoRA's training begins, also on a stack of experts; DoRA's factors begin the same way.

By default one factor is zero.  ``init`` chooses among PEFT's other starts, and only among those that leave the base's
weights as they are, or can be made to: PiSSA and OLoRA become a difference from where they began; see ``departed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from lorahub.deltas.beginning import RANKS, RSLORA, kaiming, normal, rank, scaled, stands, word, zeros
from lorahub.deltas.factors import pointwise
from lorahub.deltas.kind import JSON
from lorahub.deltas.singular import first_of_qr, largest
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["EXPERT_STARTING", "LORA_STARTING", "PLAIN_SETTINGS", "plain_factors"]

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""``up`` and ``down``, in the shapes that files have."""


def _default(ground: Ground) -> Factors:
    """Zeros beside Kaiming uniform; of an embedding PEFT multiplies the output, and there the other factor is zero."""
    if ground.role == "embedding":
        rows, width = ground.shape
        return zeros(ground, rows, rank(ground)), normal(ground, rank(ground), width)
    return _nothing_up(ground), kaiming(ground, rank(ground), *ground.shape[1:])


def _gaussian(ground: Ground) -> Factors:
    """Zeros beside normal numbers of standard deviation 1 / r."""
    if ground.role == "embedding":
        rows, width = ground.shape
        return zeros(ground, rows, rank(ground)), normal(ground, rank(ground), width, std=1 / rank(ground))
    return _nothing_up(ground), normal(ground, rank(ground), *ground.shape[1:], std=1 / rank(ground))


def _pissa(ground: Ground) -> Factors:
    """The r largest singular values, their roots on either side; the scale divides them."""
    scale = _scale(ground)
    if scale <= 0:
        raise UsageError(f"{ground.module}: PiSSA divides singular values by the scale, which is {scale}")
    up, down = largest(_matrix(ground), _within(ground))
    return _shaped(ground, up / math.sqrt(scale), down / math.sqrt(scale))


def _olora(ground: Ground) -> Factors:
    """The first r columns of Q and rows of R."""
    return _shaped(ground, *first_of_qr(_matrix(ground), _within(ground)))


def _eva(ground: Ground) -> Factors:
    """Zeros beside the r directions along which the inputs vary most (https://arxiv.org/abs/2410.07170)."""
    if ground.inputs is None:
        raise UsageError(
            f"{ground.module}: EVA starts from what the module is given, and no batches were run",
            "give batches to look at, or choose another init",
        )
    seen = ground.inputs().to(ground.device, torch.float32)
    width = math.prod(ground.shape[1:])
    r = _within(ground)
    if seen.dim() != 2 or seen.shape[1] != width:
        raise UsageError(f"{ground.module}: its inputs are {list(seen.shape)}, and EVA needs rows of {width}")
    if seen.shape[0] < r:
        raise UsageError(
            f"{ground.module}: {seen.shape[0]} inputs were seen, and a rank of {r} takes {r} at least",
            "give more batches, or a smaller r",
        )
    _, _, directions = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
    return _nothing_up(ground), directions[:r].reshape(r, *ground.shape[1:]).clone(
        memory_format=torch.contiguous_format
    )


_FACTORS: Mapping[JSON, Callable[[Ground], Factors]] = MappingProxyType(
    {"default": _default, "gaussian": _gaussian, "pissa": _pissa, "olora": _olora, "eva": _eva}
)
_OF_THE_WEIGHT = ("pissa", "olora")
_PLAIN = ("default", "gaussian")

_INIT = "How the factors begin; pissa and olora are saved as LoRA of rank 2r, for the base keeps its numbers."


def start(ground: Ground) -> Started:
    """LoRA's factors.

    Raises:
        UsageError: an init that cannot be had there.
    """
    stands(ground, "LoRA", {})
    init = word(ground, "init", tuple(_FACTORS))
    if init not in _PLAIN and ground.role == "embedding":
        raise UsageError(
            f"{ground.module}: init={init!r} looks at a layer's weight or inputs as a matrix product has them, and "
            "an embedding has none",
            'leave it out of target_modules, or begin with init="default"',
        )
    up, down = _FACTORS[init](ground)
    trained = {"down": down, "up": up}
    if init not in _OF_THE_WEIGHT:
        return Started(trained=trained, options=scaled(ground))
    return Started(trained=trained, fixed={"from_down": down.clone(), "from_up": up.clone()}, options=scaled(ground))


def plain_factors(ground: Ground) -> dict[str, torch.Tensor]:
    """The factors of a start that looks at nothing, by slot.

    Raises:
        UsageError: another init.
    """
    up, down = _FACTORS[word(ground, "init", _PLAIN)](ground)
    return {"down": down, "up": up}


def start_experts(ground: Ground) -> Started:
    """Factors for every expert of a stack ``[experts, out, in]``; the base is [out, in] whichever way it is stored.

    Raises:
        UsageError: it is no stack.
    """
    if len(ground.shape) != 3 or ground.role != "experts":
        raise UsageError(
            f"LoRA for experts cannot stand on {ground.module}.{ground.parameter}, because {list(ground.shape)} is no "
            "stack of experts",
            'choose kind="lora" for other layers',
        )
    experts, out, inputs = ground.shape
    r = rank(ground)
    down = torch.stack([kaiming(ground, r, inputs) for _ in range(experts)])
    return Started(
        trained={"down": down, "up": zeros(ground, experts, out, r)}, options={**scaled(ground), "transposed": False}
    )


def _nothing_up(ground: Ground) -> torch.Tensor:
    return zeros(ground, *pointwise(ground.shape[0], rank(ground), ground.shape))


def _scale(ground: Ground) -> float:
    scale = scaled(ground)["scale"]
    assert isinstance(scale, float)
    return scale


def _matrix(ground: Ground) -> torch.Tensor:
    return ground.weight().to(ground.device, torch.float32).flatten(1)


def _within(ground: Ground) -> int:
    """The rank, which the weight must have.

    Raises:
        UsageError: the weight is smaller.
    """
    r, most = rank(ground), min(ground.shape[0], math.prod(ground.shape[1:]))
    if r > most:
        raise UsageError(
            f"{ground.module}: init={ground.settings['init']!r} takes r={r} directions of a weight that has {most}",
            f"choose r={most} or less",
        )
    return r


def _shaped(ground: Ground, up: torch.Tensor, down: torch.Tensor) -> Factors:
    """In the shapes that files have, in memory of their own: an optimizer writes there."""
    r = up.shape[1]
    shapes = (pointwise(up.shape[0], r, ground.shape), (r, *ground.shape[1:]))
    first, second = (
        each.reshape(shape).clone(memory_format=torch.contiguous_format)
        for each, shape in zip((up, down), shapes, strict=True)
    )
    return first, second


_DROPOUT = Setting(default=0.0, says="The chance of an input of the factors to be dropped while it trains.")


def _init(choices: tuple[JSON, ...]) -> Setting:
    return Setting(default="default", says=_INIT, choices=choices)


PLAIN_SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {**RANKS, **RSLORA, "init": _init(_PLAIN), "dropout": _DROPOUT}
)
"""What a kind with LoRA's factors can be told that looks at nothing to begin with."""

LORA_STARTING = Starting(settings={**PLAIN_SETTINGS, "init": _init(tuple(_FACTORS))}, start=start)
EXPERT_STARTING = Starting(settings={**RANKS, **RSLORA}, start=start_experts)
