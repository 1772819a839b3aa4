"""Which twin of a kernel runs on a device: the compiled one where it is there and gives the right numbers.

A compiled kernel is tried on a small problem before its first use on a device, against its plain twin.  Where it
cannot be compiled, or gives other numbers, the plain twin runs, and whoever asks is told why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TypeAlias

from lorahub.engine.kernels import merge_torch
from lorahub.engine.kernels.patches import Outcome, Patch
from lorahub.lazy import torch

__all__ = ["Choice", "Merger", "agrees", "merger"]

Merger: TypeAlias = "Callable[[Sequence[Patch]], list[Outcome]]"

_SHAPES = ((64, 128, 16), (70, 96, 5), (33, 40, 20))  # m, n, r: whole tiles, ragged ones, several steps of the rank


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs: ``name`` is "triton" or "torch", ``reason`` says why it is not the compiled one, or is ""."""

    name: str
    merge: Merger
    reason: str = ""


@lru_cache(maxsize=16)  # as many as a machine has devices
def merger(device: torch.device) -> Choice:
    """What merges patches on ``device``; tried there once a process."""
    if device.type != "cuda":
        return Choice("torch", merge_torch.merge_patches, f"kernels are compiled for CUDA, not for {device.type}")
    if find_spec("triton") is None:
        return Choice("torch", merge_torch.merge_patches, "triton is not installed")
    try:
        compiled: Merger = import_module("lorahub.engine.kernels.merge_triton").merge_patches
        good = agrees(compiled, device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the plain twin still works
        return Choice("torch", merge_torch.merge_patches, f"triton cannot run its kernel here: {error}")
    if not good:
        return Choice("torch", merge_torch.merge_patches, "triton's kernel gave other numbers on this device")
    return Choice("triton", compiled)


def agrees(merge: Merger, device: torch.device) -> bool:
    """Whether ``merge`` gives what the plain twin gives on small problems: at most one rounding apart."""
    for storage in (torch.bfloat16, torch.float16, torch.float32):
        for factors in (torch.bfloat16, torch.float32):
            ours, theirs = (_problem(storage, factors, device) for _ in range(2))
            found, expected = merge(ours), merge_torch.merge_patches(theirs)
            if not all(_close(a, b) for a, b in zip(ours, theirs, strict=True)):
                return False
            if [each.finite for each in found] != [each.finite for each in expected]:
                return False
    return True


def _problem(storage: torch.dtype, factors: torch.dtype, device: torch.device) -> list[Patch]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return [
        Patch(
            weight=numbers(m, n, dtype=storage),
            up=numbers(m, r, dtype=factors),
            down=numbers(r, n, dtype=factors),
            scale=0.3,
            saved=torch.empty(m, n, dtype=storage, device=device),
        )
        for m, n, r in _SHAPES
    ]


def _close(ours: Patch, theirs: Patch) -> bool:
    assert ours.saved is not None
    assert theirs.saved is not None
    step = torch.finfo(ours.weight.dtype).eps
    a, b = ours.weight.double(), theirs.weight.double()
    return torch.equal(ours.saved, theirs.saved) and bool(((a - b).abs() <= step * b.abs().clamp_min(1)).all())
