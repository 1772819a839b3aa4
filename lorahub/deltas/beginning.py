"""What the starts of several kinds have in common: settings read with their types, PEFT's draws, where a kind stands.

Draws are made on the generator's device and moved, so that a seed gives the same numbers on every device.  Knows
grounds and tensors; no kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas.kind import JSON
from lorahub.deltas.starting import Ground, Setting
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = [
    "RANKS",
    "RSLORA",
    "flag",
    "kaiming",
    "normal",
    "number",
    "rank",
    "scaled",
    "stands",
    "whole",
    "word",
    "zeros",
]

RANKS: Mapping[str, Setting] = MappingProxyType(
    {
        "r": Setting(default=8, says="The rank: how many columns and rows the factors have."),
        "alpha": Setting(default=8.0, says="The change is multiplied with alpha / r."),
    }
)

RSLORA: Mapping[str, Setting] = MappingProxyType(
    {"use_rslora": Setting(default=False, says="Multiply with alpha / sqrt(r) (https://arxiv.org/abs/2312.03732).")}
)


def number(ground: Ground, name: str) -> float:
    """A finite number.

    Raises:
        UsageError: it is anything else.
    """
    value = ground.settings[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{ground.module}: {name} should be a number, not {value!r}")
    return float(value)


def whole(ground: Ground, name: str, *, least: int) -> int:
    """A whole number, ``least`` or above.

    Raises:
        UsageError: it is anything else.
    """
    value = ground.settings[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{ground.module}: {name} should be a whole number of {least} or more, not {value!r}")
    return value


def rank(ground: Ground) -> int:
    """The rank, 1 at least.

    Raises:
        UsageError: it is anything else.
    """
    return whole(ground, "r", least=1)


def flag(ground: Ground, name: str) -> bool:
    """True or false.

    Raises:
        UsageError: it is anything else.
    """
    value = ground.settings[name]
    if not isinstance(value, bool):
        raise UsageError(f"{ground.module}: {name} should be true or false, not {value!r}")
    return value


def word(ground: Ground, name: str, choices: tuple[JSON, ...]) -> str:
    """One of the words that there are.

    Raises:
        UsageError: it is none of them.
    """
    value = ground.settings[name]
    if value not in choices:
        raise UsageError(
            f"{ground.module}: there is no {name}={value!r}", f"choose one of: {', '.join(map(str, choices))}"
        )
    return str(value)


def scaled(ground: Ground) -> dict[str, JSON]:
    """The options that say how large a change of rank r is: scale, its rule, alpha and rank."""
    r, alpha = rank(ground), number(ground, "alpha")
    if "use_rslora" in ground.settings and flag(ground, "use_rslora"):
        return {"scale": alpha / math.sqrt(r), "scale_rule": "alpha/sqrt(r)", "alpha": alpha, "rank": r}
    return {"scale": alpha / r, "scale_rule": "alpha/r", "alpha": alpha, "rank": r}


def stands(ground: Ground, title: str, reasons: Mapping[str, str]) -> None:
    """Refuse a parameter where a kind cannot stand.

    Args:
        ground: the parameter.
        title: how people write the kind.
        reasons: role -> why it cannot stand there, as the end of "because ...".

    Raises:
        UsageError: saying why.
    """
    where = f"{ground.module}.{ground.parameter}"
    if ground.role in reasons:
        raise UsageError(
            f"{title} cannot stand on {where}, because {reasons[ground.role]}",
            "leave it out of target_modules, or choose another kind",
        )
    least = 3 if ground.role == "conv" else 2
    if len(ground.shape) < least or (ground.role in ("linear", "embedding") and len(ground.shape) != least):
        raise UsageError(
            f"{title} cannot stand on {where}, because {list(ground.shape)} is no weight of a {ground.role} layer",
            "leave it out of target_modules",
        )


def kaiming(ground: Ground, *size: int) -> torch.Tensor:
    """Kaiming uniform with a = sqrt(5), PEFT's default: within 1 / sqrt(fan_in), all axes but the first."""
    bound = 1 / math.sqrt(math.prod(size[1:]))
    drawn = torch.empty(size, device=ground.generator.device)
    return drawn.uniform_(-bound, bound, generator=ground.generator).to(ground.device)


def normal(ground: Ground, *size: int, std: float = 1.0) -> torch.Tensor:
    """Normal numbers around zero."""
    drawn = torch.empty(size, device=ground.generator.device)
    return drawn.normal_(0, std, generator=ground.generator).to(ground.device)


def zeros(ground: Ground, *size: int) -> torch.Tensor:
    """Zeros, float32."""
    return torch.zeros(size, device=ground.device)
