"""A few threads that do jobs, each computing on one core, and that stop together.

PyTorch's own threads meet at a barrier after every operation; where another process holds a core, all wait for it.
Threads over whole jobs do not, and since every operation runs on one core, no result depends on how many there are.
Knows nothing of plans or weights.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TypeAlias, final

from lorahub.engine.interrupts import held
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Job", "Workspace", "crew_size", "run_jobs"]

_TICK = 0.1  # seconds between two looks at the progress
_LITTLE = 1 << 19  # bytes; threads over smaller ones wait for each other in Python: 1.5 times as long with two of them


@final
class Workspace:
    """Scratch tensors of one thread, allocated once and used again for every job."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
    ) -> torch.Tensor:
        """A contiguous tensor with undefined content; it is the same memory for the same name, dtype and device.

        Args:
            name: what it is for.
            shape: its shape.
            dtype: its dtype.
            device: where it lies.
            pinned: it is memory of the CPU that a GPU reads and writes by itself.
        """
        size, key = prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device, pin_memory=pinned)
        return buffer[:size].view(*shape)


_Place: TypeAlias = "tuple[int, ...]"
"""Where a job stands: its number, and those of the jobs that returned it before."""

Job: TypeAlias = "Callable[[Workspace], Iterable[Job] | None]"
"""Something to do; it may return more jobs, which come next."""


def crew_size(threads: int | None, sizes: Collection[int] = ()) -> int:
    """How many threads to use: ``threads``, or as many as PyTorch would; one where there is little to compute.

    Args:
        threads: as the user asks for.
        sizes: bytes of what is worked on, each in a job or a few, where that is known.

    Raises:
        UsageError: fewer than one.
    """
    if threads is None:
        return 1 if sizes and sum(sizes) < _LITTLE * len(sizes) else int(torch.get_num_threads())
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
        BaseException: what a job, ``tick`` or an interrupt raised, after all threads are idle.  Of jobs that fail it is
            the first in order, whichever thread was faster: what stands before it is still done, and nothing behind it.
    """
    crew = _Crew(jobs)
    before = torch.get_num_threads()
    with held() as interrupts:

        def look() -> None:
            interrupts.demand_none()
            if tick and not crew.interrupted:
                tick()

        for number in range(threads):
            with crew.noting_interrupts(go_on=to_the_end):
                threading.Thread(target=crew.work, name=f"lorahub-{number}").start()
        while not crew.rests():
            with crew.noting_interrupts(go_on=to_the_end):
                look()
        if to_the_end:  # whatever is left where no thread could be started
            crew.work()
        crew.close()
        torch.set_num_threads(before)  # members set what later threads start with; their own setting ended with them
        if failure := crew.failure or crew.interrupted:
            raise failure
        look()


@final
class _Crew:
    """The jobs that wait with their places in the order, how many are being done, and the first failure.

    Whether all are idle is asked of the jobs and not of the threads: a ``Thread.join`` that is interrupted says that
    its thread has ended while it runs (CPython 3.11), and one that has not begun yet does no harm.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.failure: BaseException | None = None
        self.interrupted: BaseException | None = None
        self._jobs: deque[tuple[_Place, Job]] = deque(((number,), job) for number, job in enumerate(jobs))
        self._failed: _Place = ()  # where the failure was
        self._busy = self._members = 0
        self._closed = False
        lock = threading.Lock()
        self._changed, self._resting = threading.Condition(lock), threading.Condition(lock)

    @contextmanager
    def noting_interrupts(self, *, go_on: bool) -> Iterator[None]:
        """What is raised here ends the crew, or is kept until it has ended."""
        try:
            yield
        except BaseException as reason:  # noqa: BLE001 - raised by ``run_jobs`` when all are idle
            self.interrupted = self.interrupted or reason
            if not go_on:
                with self._changed:
                    self._stop(reason)

    def rests(self) -> bool:
        """Wait a little; whether nobody does a job and nobody here will."""
        with self._resting:
            if not self._over:
                self._resting.wait(_TICK)
            return self._over

    def close(self) -> None:
        """Wait until all members have gone; who comes later goes again."""
        with self._resting:
            self._closed = True
            while self._members:
                self._resting.wait()

    def work(self) -> None:
        """Do jobs until none is left that is to be done."""
        with self._changed:
            if self._closed:
                return
            self._members += 1
        failure: BaseException | None = None
        try:
            torch.set_num_threads(1)
            space = Workspace()
            with torch.inference_mode():  # also lets tensors made in it be written to
                while following := self._next():
                    self._do(*following, space)
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            failure = error
        with self._changed:
            self._members -= 1
            if failure:
                self._busy = max(self._busy - 1, 0)
                self._stop(failure)
            self._resting.notify_all()

    def _do(self, place: _Place, job: Job, space: Workspace) -> None:
        try:
            more = list(job(space) or ())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            self._fail(place, error)
        else:
            self._done([((*place, number), each) for number, each in enumerate(more)])

    @property
    def _over(self) -> bool:
        nobody_came = bool(self.interrupted) and not self._members
        return not self._busy and (not self._jobs or nobody_came)

    def _stop(self, reason: BaseException) -> None:
        """Begin no further job."""
        self.failure, self._failed = self.failure or reason, ()
        self._leave_out()

    def _fail(self, place: _Place, reason: BaseException) -> None:
        """Begin none that stands behind this one."""
        with self._changed:
            self._busy -= 1
            if self.failure is None or place < self._failed:
                self.failure, self._failed = reason, place
            self._leave_out()

    def _leave_out(self) -> None:
        self._jobs = deque(each for each in self._jobs if each[0] < self._failed)
        self._changed.notify_all()
        self._resting.notify_all()

    def _next(self) -> tuple[_Place, Job] | None:
        with self._changed:
            while not self._jobs and self._busy:
                self._changed.wait()
            if not self._jobs:
                return None
            self._busy += 1
            return self._jobs.popleft()

    def _done(self, more: list[tuple[_Place, Job]]) -> None:
        with self._changed:
            self._jobs.extendleft(reversed(more))
            self._busy -= 1
            if self.failure is not None:
                self._leave_out()
            self._changed.notify_all()
            if self._over:
                self._resting.notify_all()
