"""The jobs of a merge from disk: read a unit, fold it, hand it on; and the bytes that go along as they are.

Where results go is the caller's: a new file (``stream``) or a journal beside the old one (``inplace``).  What is held
at a time is a few units for each thread.  Knows no frameworks, no formats and no folders.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

from lorahub.bases.framework import BaseFiles
from lorahub.bases.layout import Piece
from lorahub.deltas.kind import JSON
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.engine.folding.bind import Bound
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.retention import judge, measured, overall
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.engine.report import MergeReport
from lorahub.engine.rounding.fast import FAST, told_of_kernels
from lorahub.engine.rounding.table import read_mode
from lorahub.engine.writing.checkpoint import Shard
from lorahub.engine.writing.where import HOST, Where
from lorahub.errors import IntegrityError
from lorahub.files.direct import BLOCK
from lorahub.files.dtypes import to_torch, torch_shape
from lorahub.files.raw import Bytes
from lorahub.files.tensors import FileSource
from lorahub.formats.pages import Paged
from lorahub.lazy import torch

__all__ = ["Flow", "Note", "Output", "Progress", "open_sources", "report"]

_PIECE = 64 << 20  # bytes copied by one job

Progress: TypeAlias = "Callable[[int, int], None]"

Note: TypeAlias = "Mapping[str, Any]"
"""What came of a shard, JSON-ready: ``changes`` (parameter -> relative size or None), ``measured`` (parameter -> the
numbers of its ``Change``) and ``read`` (bytes)."""


class Output(Protocol):
    """Where one shard's tensors go; ``write`` and ``copy_from`` are called from several threads."""

    def write(self, name: str, offset: int, data: Bytes) -> None:
        """Take bytes of a tensor from its byte ``offset`` on."""

    def phase(self, name: str, offset: int) -> int:
        """Where in a block of ``BLOCK`` bytes byte ``offset`` of a tensor goes: memory for it best begins so."""

    def copy_from(self, name: str, source: Path, offset: int, length: int, *, at: int) -> None:
        """Take bytes of another file, ``length`` from its ``offset``, for byte ``at`` of a tensor."""

    def copy_whole(self, source: Path) -> bool:
        """Take over a whole file, where it is laid out as this shard; whether it is."""

    def discard(self) -> None:
        """Let go of what was not finished."""


def open_sources(files: BaseFiles, opened: ExitStack) -> dict[str, FileSource]:
    """The base's weights files, open until ``opened`` is closed.

    Raises:
        IntegrityError: a file is not the one that was surveyed.
    """
    sources = {}
    for name in sorted(files.headers):
        sources[name] = opened.enter_context(FileSource(files.folder / name, prefix=files.prefix(name)))
        if sources[name].header != files.headers[name]:
            raise IntegrityError(f"{files.folder / name} changed since it was planned", "plan again")
    return sources


def report(
    plan: Plan,
    notes: Iterable[Note],
    *,
    seconds: float,
    threads: int,
    written: int,
    resumed: int = 0,
    where: Where = HOST,
) -> MergeReport:
    """What was done, from the notes of all shards."""
    done = list(notes)
    changes = {name: value for note in done for name, value in note["changes"].items()}
    sums = {name: Change(*value) for note in done for name, value in note.get("measured", {}).items()}
    complete = all(step.out in sums for step in plan.steps)  # of several ranks, one sees all
    dtypes = {step.after.dtype for step in plan.steps}
    findings = judge(sums, allowed=plan.allowed, dtypes=dtypes) if complete else ()
    if where.name != HOST.name and plan.mode == FAST.spelled:
        forms = {step.out: (torch.device(where.name), to_torch(step.after.dtype)) for step in plan.steps}
        findings = (*findings, *told_of_kernels(plan.steps, forms))
    return MergeReport(
        changes={step.out: changes.get(step.out) for step in plan.steps if step.terms},
        created=tuple(step.out for step in plan.steps if step.made_whole),
        removed=plan.removed,
        seconds=seconds,
        bytes_read=sum(note["read"] for note in done),
        bytes_written=written,
        resumed=resumed,
        threads=threads,
        plan=plan.digest(),
        retained=measured(sums),
        retention=overall(sums),
        findings=findings,
    )


@dataclass(slots=True)
class _Open:
    """A shard in the making: how many jobs are left, and what came of those that are done."""

    shard: Shard
    output: Output
    left: int = 0
    read: int = 0
    changes: dict[str, dict[int, Change]] = field(default_factory=dict)

    def note(self) -> dict[str, JSON]:
        sums = {name: sum((parts[start] for start in sorted(parts)), Change()) for name, parts in self.changes.items()}
        changes: dict[str, JSON] = {name: change.relative for name, change in sums.items()}
        return {
            "changes": changes,
            "measured": {name: [*astuple(each)] for name, each in sums.items()},
            "read": self.read,
        }


@final
class Flow:
    """The jobs of one merge, over the shards that are still to be made."""

    def __init__(
        self,
        plan: Plan,
        bound: Bound,
        sources: Mapping[str, FileSource],
        opened: ExitStack,
        *,
        create: Callable[[Shard], Output],
        finish: Callable[[Shard, Output, Note], None],
        where: Where = HOST,
    ) -> None:
        """Say where results go.

        Args:
            plan: what to do.
            bound: the same with its deltas.
            sources: file name -> the base's weights.
            opened: what outputs are discarded by, when it is closed.
            create: gives a shard's output; called from any thread.
            finish: called once for each shard, from any thread, when all of it has been handed over.
            where: what folds units.
        """
        self._plan, self._bound, self._sources, self._opened = plan, bound, sources, opened
        self._create, self._finish, self._where = create, finish, where
        self._files = {name: source for source in sources.values() for name in source.names()}
        self._lock = threading.Lock()
        self._moved = 0

    def run(
        self, shards: Sequence[Shard], threads: int, progress: Progress | None, *, moved: int = 0, total: int = 0
    ) -> None:
        """Make shards.

        Args:
            shards: which.
            threads: how many units are folded at a time.
            progress: called from this thread with (bytes done, in all).
            moved: bytes that were done before.
            total: bytes in all.
        """
        self._moved = moved

        def tick() -> None:
            if progress:
                progress(self._moved, total)

        run_jobs([self._begin(shard) for shard in shards], threads, tick=tick)

    def _begin(self, shard: Shard) -> Job:
        def job(_: Workspace) -> Iterator[Job]:
            output = self._create(shard)
            with self._lock:
                self._opened.callback(output.discard)
            state = _Open(shard, output)
            if self._untouched(state):
                return iter([self._end(state)])
            jobs = [*self._copies(state), *(self._step(state, *item) for item in shard.steps.values())]
            state.left = len(jobs)
            return iter(jobs or [self._end(state)])

        return job

    def _untouched(self, state: _Open) -> bool:
        """Whether a shard is a file of the base as it is; it was copied then."""
        copies = state.shard.copies.items()
        files = {copy.file for _, copy in copies}
        if state.shard.steps or len(files) != 1 or any(saved != copy.name for saved, copy in copies):
            return False
        if not state.output.copy_whole(self._sources[files.pop()].path):
            return False
        with self._lock:
            state.read += state.shard.nbytes
            self._moved += state.shard.nbytes
        return True

    def _copies(self, state: _Open) -> Iterator[Job]:
        for saved, copy in state.shard.copies.items():
            source = self._sources[copy.file]
            offset, nbytes = source.header.span(copy.name)
            for at in range(0, nbytes, _PIECE):
                yield self._copy(state, saved, source.path, offset + at, at, min(_PIECE, nbytes - at))

    def _copy(self, state: _Open, saved: str, path: Path, offset: int, at: int, nbytes: int) -> Job:
        def job(_: Workspace) -> Iterable[Job]:
            state.output.copy_from(saved, path, offset, nbytes, at=at)
            return self._done(state, moved=nbytes, read=nbytes)

        return job

    def _step(self, state: _Open, step: Step, file: str) -> Job:
        def sibling(piece: Piece) -> torch.Tensor:
            name = self._plan.reads[piece.parameter]
            return self._files[name].read(name)

        def job(_: Workspace) -> Iterable[Job]:
            paged = self._bound.paged(step)
            items, mode = self._bound.ingredients(step, sibling, paged), read_mode(self._plan.mode)
            fold = Fold(step, items, torch.device(self._where.name), mode, streamed=True)
            state.changes[step.out] = {}
            with self._lock:
                state.left += len(fold.units)
            return [*(self._unit(state, step, file, fold, unit, paged) for unit in fold.units), *self._done(state)]

        return job

    def _unit(self, state: _Open, step: Step, file: str, fold: Fold, unit: Unit, paged: Paged | None) -> Job:
        dtype, shape = to_torch(step.after.dtype), torch_shape(step.after.dtype, step.after.shape) or (1,)
        row = math.prod(shape[1:]) * dtype.itemsize
        start, nbytes = unit.rows.start * row, (unit.rows.stop - unit.rows.start) * row
        other = to_torch(step.before.dtype) if step.before and step.before.dtype != step.after.dtype else None

        def job(space: Workspace) -> Iterable[Job]:
            phase = state.output.phase(step.saved_as, start) // dtype.itemsize * dtype.itemsize
            raw = _beginning_at(self._where.memory(space, nbytes + BLOCK), nbytes, phase)
            rows = raw.view(dtype).view(-1, *shape[1:])
            if paged:
                paged.pages.fill(unit.rows)
            before: torch.Tensor | None = rows
            if step.made_whole:
                before = None
            elif step.widened:
                before = self._padded(step, file, unit.rows, space)
            elif other:  # the result is stored in another dtype
                before = space.take("other", rows.shape, other, rows.device)
                at = start // dtype.itemsize * other.itemsize
                self._sources[file].read_into(step.stored_as, at, before.view(-1).view(torch.uint8).numpy().data)
            else:
                self._sources[file].read_into(step.stored_as, start, raw.numpy().data)
            change = self._where.fold(fold, unit, before, rows, space)
            if paged:
                paged.pages.drop(unit.rows)
            state.output.write(step.saved_as, start, raw.numpy().data)
            state.changes[step.out][start] = change
            return self._done(state, moved=nbytes, read=0 if step.made_whole else nbytes)

        return job

    def _padded(self, step: Step, file: str, rows: slice, space: Workspace) -> torch.Tensor:
        """Rows of the base's value, with zeros in the columns that it gets."""
        assert step.before is not None
        dtype, narrow = to_torch(step.before.dtype), torch_shape(step.before.dtype, step.before.shape)
        count, row = rows.stop - rows.start, math.prod(narrow[1:])
        stored = space.take("narrow", (count, *narrow[1:]), dtype, torch.device("cpu"))
        at = rows.start * row * dtype.itemsize
        self._sources[file].read_into(step.stored_as, at, stored.view(-1).view(torch.uint8).numpy().data)
        wide = torch_shape(step.after.dtype, step.after.shape)
        padded = space.take("wide", (count, *wide[1:]), dtype, torch.device("cpu")).zero_()
        padded[:, : narrow[1]] = stored
        return padded

    def _done(self, state: _Open, *, moved: int = 0, read: int = 0) -> list[Job]:
        """Count a job of a shard; the last gives the job that finishes it."""
        with self._lock:
            state.left -= 1
            state.read += read
            self._moved += moved
            return [] if state.left else [self._end(state)]

    def _end(self, state: _Open) -> Job:
        def job(_: Workspace) -> None:
            self._finish(state.shard, state.output, state.note())

        return job


def _beginning_at(room: torch.Tensor, nbytes: int, phase: int) -> torch.Tensor:
    """So many bytes of ``room``, which has a block more, that begin at ``phase`` within a block."""
    shift = (phase - room.data_ptr()) % BLOCK
    return room[shift : shift + nbytes]
