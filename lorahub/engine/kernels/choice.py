"""Which twin of a kernel runs on a device: the compiled one where it is there and gives the right numbers.

A compiled kernel is tried on a small problem before its first use on a device, against its plain twin.  Where it
cannot be compiled, or gives other numbers, the plain twin runs, and whoever asks is told why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TypeAlias

from lorahub.engine.crew import Workspace
from lorahub.engine.kernels import merge_torch
from lorahub.engine.kernels.compiling import NotCompiled, SwitchedOff
from lorahub.engine.kernels.merge_c import Kernel, Notes, Packed, kernel
from lorahub.engine.kernels.patches import Outcome, Patch
from lorahub.engine.undoing.checksum import checksum
from lorahub.engine.undoing.residual import Steps
from lorahub.lazy import torch

__all__ = ["Choice", "Merger", "Native", "agrees", "merger", "native", "restore"]

Merger: TypeAlias = "Callable[[Sequence[Patch]], list[Outcome]]"

_MERGED = ("bfloat16", "float16", "float32")  # what the CPU's kernel may take
_SHAPES = ((64, 128, 16), (70, 96, 5), (33, 40, 20))  # m, n, r: whole tiles, ragged ones, several steps of the rank


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs: ``name`` is "triton" or "torch", ``reason`` says why it is not the compiled one, or is ""."""

    name: str
    merge: Merger
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Native:
    """What is compiled for the CPU: ``kernel``, or None and a ``reason``, which is "" where nobody wants one."""

    kernel: Kernel | None
    reason: str = ""


@lru_cache(maxsize=1)
def native() -> Native:
    """What merges weights on the CPU; compiled on first use, and tried once a process."""
    try:
        found = kernel()
    except SwitchedOff:
        return Native(None)
    except NotCompiled as reason:
        return Native(None, str(reason))
    for storage in map(partial(getattr, torch), _MERGED):
        if found.takes(storage, 1) and not _is_right(found, storage):
            return Native(None, f"what was compiled gives other numbers for {storage}")
    return Native(found)


def restore(residual: Steps, given: torch.Tensor) -> None:
    """``residual.apply(given)`` by the CPU's kernel, which noted it and is therefore there; takes no memory."""
    found = native().kernel
    assert found is not None
    found.restore(residual, given)


def _is_right(found: Kernel, storage: torch.dtype) -> bool:
    """Whether a kernel gives what the plain twin gives, and its notes give back what was there."""
    for factors in (torch.bfloat16, torch.float32):
        ours, theirs = (_problem(storage, factors, torch.device("cpu")) for _ in range(2))
        merge_torch.merge_patches(theirs)
        for patch, other in zip(ours, theirs, strict=True):
            weight, saved = patch.weight, other.saved
            assert saved is not None
            notes = Notes(found, storage, weight.numel(), weight.shape[1], Workspace())
            packed = found.pack(patch.up.double(), patch.down.double(), storage)
            finite = found.add(packed, slice(None), patch.scale, weight, weight, notes)
            if not finite or not _near(weight, other.weight):
                return False
            back, marks = torch.empty_like(weight), (checksum(saved), checksum(weight))
            found.add(packed, slice(None), -patch.scale, weight, back)
            found.restore(notes.residual, back)
            if not torch.equal(back, saved) or not all(map(torch.equal, notes.checksums(), marks)):
                return False
            if not _rows_are_right(found, packed, patch, saved):
                return False
    return True


def _rows_are_right(found: Kernel, packed: Packed, merged: Patch, saved: torch.Tensor) -> bool:
    """Whether rows with the same numbers come out as those with one number do, and have the lengths that they have."""
    out, by_row = torch.empty_like(saved), torch.tensor([[1.0, merged.scale]] * len(saved), dtype=torch.float64)
    found.add_by_row(packed, slice(None), by_row, saved, out)
    wide = saved.double().addmm_(merged.up.double(), merged.down.double(), alpha=merged.scale)
    lengths = found.lengths(packed, slice(None), merged.scale, saved)
    return torch.equal(out, merged.weight) and torch.allclose(lengths, wide.norm(dim=1))


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
    return torch.equal(ours.saved, theirs.saved) and _near(ours.weight, theirs.weight)


def _near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    a, b = ours.double(), theirs.double()
    return bool(((a - b).abs() <= torch.finfo(ours.dtype).eps * b.abs().clamp_min(1)).all())
