"""Cores ``[r, r, *k]``, which LoHa and LoKr put between two factors beside a convolution (FedPara, proposition 3).

PEFT keeps the core of a Conv1d with an axis more, ``[r, r, k, 1]``; so a last axis of 1 may be the weight's own or not.
"""

from __future__ import annotations

import math

from lorahub.deltas.kind import TensorRef
from lorahub.lazy import torch

__all__ = ["core_dims", "core_fits", "core_shape", "core_times"]


def core_times(core: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """A core ``[i, j, *k]`` times ``[j, in]``, as ``[i, in * prod(k)]``."""
    return torch.einsum("ijk,jq->iqk", core.flatten(2), inner).flatten(1)


def core_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The trailing axes that PEFT gives a core for a kernel."""
    return (*kernel, 1) if len(kernel) == 1 else kernel


def core_fits(core: torch.Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether a core was made for a kernel."""
    return tuple(core.shape[2:]) in (kernel, (*kernel, 1))


def core_dims(core: TensorRef) -> str:
    """The trailing dims of the weight that a core is for."""
    kernel = core.shape[2:]
    return f"*{math.prod(kernel)}" if kernel[-1:] == (1,) else " ".join(map(str, kernel))
