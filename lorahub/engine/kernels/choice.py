"""Which twin of a kernel runs on a device: the compiled one where it is there and gives the right numbers.

A compiled kernel is tried on small problems before its first use on a device and with a dtype, against its plain twin.
Where it cannot be compiled, or gives other numbers, the plain twin runs, and whoever asks is told why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Generic, TypeVar, final

from lorahub.engine.kernels import checksum_torch, merge_torch, noting_torch, segmented_torch
from lorahub.engine.kernels.compiling import NotCompiled, SwitchedOff
from lorahub.engine.kernels.merge_c import Kernel, kernel
from lorahub.engine.kernels.tiles import Noter, Tiles
from lorahub.engine.kernels.trials import (
    Adder,
    Merger,
    Summer,
    adds_alike,
    is_right,
    merges_alike,
    notes_alike,
    sums_alike,
)
from lorahub.engine.undoing.residual import Steps
from lorahub.lazy import torch

__all__ = ["Choice", "Native", "adder", "merger", "native", "noter", "restore", "summer"]

_Kernel = TypeVar("_Kernel")

_MERGED = ("bfloat16", "float16", "float32")  # what the CPU's kernel may take
_DEVICES = 48  # no fewer than a machine has, each with every dtype


@final
@dataclass(frozen=True, slots=True)
class Choice(Generic[_Kernel]):
    """What runs: ``name`` is "triton" or "torch", ``reason`` says why it is not the compiled one, or is ""."""

    name: str
    run: _Kernel
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
        if found.takes(storage, 1) and not is_right(found, storage):
            return Native(None, f"what was compiled gives other numbers for {storage}")
    return Native(found)


def restore(noted: Steps | Sequence[Tiles], given: torch.Tensor) -> None:
    """Make up in ``given`` for what a kernel noted, by that kernel, which is therefore there.

    Args:
        noted: by the CPU's, of all rows; or by a device's, one for each part of the rows, in order.
        given: rows that lie together.
    """
    if isinstance(noted, Steps):
        found = native().kernel
        assert found is not None
        found.restore(noted, given)
    else:
        parts = torch.split(given.view(-1), [rows * columns for rows, columns in (each.shape for each in noted)])
        noter(given.device, given.dtype).run.restore([*zip(noted, parts, strict=True)])


@lru_cache(maxsize=_DEVICES)
def merger(device: torch.device, storage: torch.dtype) -> Choice[Merger]:
    """What makes patches of weights of a dtype ready to be merged on ``device``; tried there once a process."""
    return _tried(
        device, "merge_triton", "prepare_patches", merge_torch.prepare_patches, partial(merges_alike, storage=storage)
    )


@lru_cache(maxsize=_DEVICES)
def adder(device: torch.device, dtype: torch.dtype) -> Choice[Adder]:
    """What adds changes to the rows of a batch, each its own, on ``device``; tried there once a process."""
    return _tried(
        device, "segmented_triton", "add_segments", segmented_torch.add_segments, partial(adds_alike, dtype=dtype)
    )


@lru_cache(maxsize=_DEVICES)
def noter(device: torch.device, storage: torch.dtype) -> Choice[Noter]:
    """What merges patches of weights of a dtype on ``device`` and notes the way back; tried there once a process."""
    return _tried(device, "noting_triton", "NOTER", noting_torch.NOTER, partial(notes_alike, storage=storage))


@lru_cache(maxsize=_DEVICES)
def summer(device: torch.device) -> Choice[Summer]:
    """What gives the checksums of tensors on ``device``; tried there once a process."""
    return _tried(device, "checksum_triton", "checksums", checksum_torch.checksums, sums_alike)


def _tried(
    device: torch.device, module: str, name: str, plain: _Kernel, agree: Callable[[_Kernel, torch.device], bool]
) -> Choice[_Kernel]:
    """The compiled twin where there is one that gives the plain one's numbers on a device, or the plain one."""
    if device.type != "cuda":
        return Choice("torch", plain, f"kernels are compiled for CUDA, not for {device.type}")
    if find_spec("triton") is None:
        return Choice("torch", plain, "triton is not installed")
    try:
        compiled: _Kernel = getattr(import_module(f"lorahub.engine.kernels.{module}"), name)
        good = agree(compiled, device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the plain twin still works
        return Choice("torch", plain, f"triton cannot run its kernel here: {error}")
    if not good:
        return Choice("torch", plain, "triton's kernel gave other numbers on this device")
    return Choice("triton", compiled)
