"""Where units are folded on their way from disk to disk: in the memory that they are read into, or on a device.

On a CUDA device each thread of the crew has a stream of its own for what goes there and comes back, and memory that is
pinned: while the units of some threads move, that of another is folded, and others are read and written.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, final

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.errors import LorahubError, UsageError
from lorahub.lazy import torch

__all__ = ["HOST", "Device", "Where", "folded_on"]


class Where(Protocol):
    """A place that units are folded in; from several threads."""

    @property
    def name(self) -> str:
        """As PyTorch spells it: "cpu", "cuda:0"."""

    def memory(self, space: Workspace, nbytes: int) -> torch.Tensor:
        """Scratch bytes that units are read into and written from."""

    def fold(self, fold: Fold, unit: Unit, before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """As ``Fold.run``, with rows in the memory of the CPU; they are there when it returns."""


@final
class Host:
    """The memory that units are read into."""

    name = "cpu"

    def memory(self, space: Workspace, nbytes: int) -> torch.Tensor:
        """See ``Where``."""
        return space.take("unit", (nbytes,), torch.uint8, torch.device("cpu"))

    def fold(self, fold: Fold, unit: Unit, before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """See ``Where``."""
        return fold.run(unit, before, out, space)


HOST = Host()


@final
class Device:
    """A device that units are moved to, and back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, str(device)
        self._of_thread = threading.local()

    def memory(self, space: Workspace, nbytes: int) -> torch.Tensor:
        """See ``Where``."""
        return space.take("unit", (nbytes,), torch.uint8, torch.device("cpu"), pinned=self.device.type == "cuda")

    def fold(self, fold: Fold, unit: Unit, before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """See ``Where``.

        Raises:
            LorahubError: the device has no room.
        """
        try:
            there = space.take("folded", out.shape, out.dtype, self.device)
            given, moving = None, self._moving()
            if before is not None:
                given = self._given(before, there, space)
                moving.follow()  # memory that was given back may still be read by what is computed
                with moving.on():
                    given.copy_(before, non_blocking=True)
            moving.lead()
            change = fold.run(unit, given, there, space)
            moving.follow()
            with moving.on():
                out.copy_(there, non_blocking=True)
            moving.wait()
        except torch.OutOfMemoryError as error:
            raise LorahubError(
                f"{self.name} has no room for a few units of weights and their change: {str(error).partition('.')[0]}",
                "fewer threads at a time (--threads 2), or merge on the CPU",
            ) from None
        return change

    def _given(self, before: torch.Tensor, there: torch.Tensor, space: Workspace) -> torch.Tensor:
        """Where the rows go that are added to: where the result will be, if it has their form."""
        if (before.dtype, before.shape) == (there.dtype, there.shape):
            return there
        return space.take("given", before.shape, before.dtype, self.device)

    def _moving(self) -> _Stream:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = _Stream(self.device)
        found: _Stream = self._of_thread.stream
        return found


@final
class _Stream:
    """A thread's own order of transfers, beside the one in which all threads compute; other devices have one order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own: Any = None
        if device.type == "cuda":
            self._own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on(self) -> AbstractContextManager[object]:
        """What is begun inside belongs to the transfers."""
        return nullcontext() if self._own is None else torch.cuda.stream(self._own)

    def follow(self) -> None:
        """Transfers begin when what is computed now is done."""
        if self._own is not None:
            self._own.wait_stream(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        """What is computed begins when the transfers are done."""
        if self._own is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._own)

    def wait(self) -> None:
        """Return when the transfers are done."""
        if self._own is not None:
            self._own.synchronize()


_FIRST = re.compile(r"\.\s|\n")  # sentence


def folded_on(device: str | torch.device | None) -> Where:
    """The place that somebody named; None and "cpu" are the memory of the CPU.

    A CUDA device without a number is the current one, or under ``torchrun`` the one of the process's local rank.

    Raises:
        UsageError: PyTorch has no such device, or it does not compute here.
    """
    if device is None or str(device) == HOST.name:
        return HOST
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"{device!r} is no device of PyTorch", "cpu, cuda, cuda:1, ...") from None
    if named.type == "meta":
        raise UsageError("nothing is computed on the meta device", "leave the device out, or name cuda")
    try:
        if str(named) == "cuda" and (rank := os.environ.get("LOCAL_RANK", "")).isdigit():
            named = torch.device("cuda", int(rank) % max(torch.cuda.device_count(), 1))
        tried = torch.ones(1, device=named)
        tried.sum().item()
    except (AssertionError, RuntimeError, ImportError) as error:  # PyTorch raises each of them, where it was built so
        raise UsageError(
            f"{named} does not compute here: {_FIRST.split(str(error))[0]}", "leave the device out"
        ) from None
    return Device(tried.device)
