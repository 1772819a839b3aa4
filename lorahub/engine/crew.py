"""A few threads that do jobs, each computing on one core, and that stop together.

PyTorch's own threads meet at a barrier after every operation; where another process holds a core, all wait for it.
Threads over whole jobs do not, and since every operation runs on one core, no result depends on how many there are.
Knows nothing of plans or weights.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeAlias, final

from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Job", "Workspace", "crew_size", "run_jobs"]

_TICK = 0.1  # seconds between two looks at the progress


@final
class Workspace:
    """Scratch tensors of one thread, allocated once and used again for every job."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor with undefined content; it is the same memory for the same name, dtype and device."""
        size, key = prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(*shape)


Job: TypeAlias = "Callable[[Workspace], Iterable[Job] | None]"
"""Something to do; it may return more jobs, which come next."""


def crew_size(threads: int | None) -> int:
    """How many threads to use: ``threads``, or as many as PyTorch would.

    Raises:
        UsageError: fewer than one.
    """
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"{threads} threads cannot do anything", "give 1 or more, or leave it out")
    return threads


def run_jobs(
    jobs: Iterable[Job], threads: int, *, tick: Callable[[], None] | None = None, to_the_end: bool = False
) -> None:
    """Do all jobs, and those they return, on ``threads`` threads in inference mode; return when every thread is idle.

    Args:
        jobs: taken in order.
        threads: how many at a time.
        tick: called now and then from the calling thread, and once at the end.
        to_the_end: an interrupt (Ctrl-C) waits until all jobs are done; otherwise no further job is begun.

    Raises:
        BaseException: the first that a job, ``tick`` or an interrupt raised, after all threads are idle.
    """
    crew = _Crew(deque(jobs))
    before = torch.get_num_threads()
    members = [threading.Thread(target=crew.work, name=f"lorahub-{number}") for number in range(threads)]
    try:
        for member in members:
            member.start()
    except BaseException as error:  # noqa: BLE001 - raised below, when those that did start are idle
        crew.interrupt(error, go_on=to_the_end)
    while waiting := next((member for member in members if member.is_alive()), None):
        try:
            waiting.join(_TICK)
            if tick and not crew.interrupted:
                tick()
        except BaseException as error:  # noqa: BLE001 - as above
            crew.interrupt(error, go_on=to_the_end)
    if to_the_end:  # whatever is left where no thread could be started
        crew.work()
    torch.set_num_threads(before)  # members set what later threads start with; their own setting ended with them
    if failure := crew.failure or crew.interrupted:
        raise failure
    if tick:
        tick()


@final
class _Crew:
    """The jobs that wait, how many are being done, and the first failure."""

    def __init__(self, jobs: deque[Job]) -> None:
        self.failure: BaseException | None = None
        self.interrupted: BaseException | None = None
        self._jobs = jobs
        self._busy = 0
        self._changed = threading.Condition()

    def stop(self, reason: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()

    def interrupt(self, reason: BaseException, *, go_on: bool) -> None:
        self.interrupted = self.interrupted or reason
        if not go_on:
            self.stop(reason)

    def work(self) -> None:
        """Do jobs until none is left or one has failed."""
        try:
            torch.set_num_threads(1)
            space = Workspace()
            with torch.inference_mode():  # also lets tensors made in it be written to
                while job := self._next():
                    self._done(list(job(space) or ()))
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            self.stop(error)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._jobs and self._busy and not self.failure:
                self._changed.wait()
            if self.failure or not self._jobs:
                return None
            self._busy += 1
            return self._jobs.popleft()

    def _done(self, more: list[Job]) -> None:
        with self._changed:
            self._busy -= 1
            self._jobs.extendleft(reversed(more))
            self._changed.notify_all()
