"""Merge from disk to disk: the base's files are read once, folded unit by unit, and written to a new folder.

What is held at a time is a few units for each thread, not a shard; what does not change moves as bytes.  A run that is
killed goes on at the next, and the result appears whole or not at all.  Knows no frameworks and no formats.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lorahub.bases.framework import BaseFiles
from lorahub.bases.layout import Piece
from lorahub.deltas.kind import JSON
from lorahub.engine.bind import Bound, HasDeltas
from lorahub.engine.checkpoint import Shard, index_file, lay_out
from lorahub.engine.crew import Job, Workspace, crew_size, run_jobs
from lorahub.engine.fold import Change, Fold, Unit
from lorahub.engine.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.staging import Staging
from lorahub.engine.steps import Step
from lorahub.errors import IntegrityError, Unavailable, UsageError, WriteFailed
from lorahub.files.atomic import atomic_write, write_failed
from lorahub.files.dtypes import to_torch, torch_shape
from lorahub.files.tensors import FileSource
from lorahub.files.writer import StreamWriter
from lorahub.lazy import torch
from lorahub.names import check_path

__all__ = ["stream_merge"]

_CONFIG = "config.json"
_PIECE = 64 << 20  # bytes copied by one job

Progress = Callable[[int, int], None]


def stream_merge(
    files: BaseFiles,
    plan: Plan,
    adapters: Mapping[str, HasDeltas],
    out: Path,
    *,
    companions: Mapping[str, bytes | Path] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Execute ``plan`` on the base in ``files`` and write the result to the new folder ``out``.

    Shards, tensor names and header metadata stay as they are.  The same inputs give the same bytes, whatever
    ``threads`` is and however often the run was killed on the way.

    Args:
        files: the base's folder; its weights may lie behind links.
        plan: made for that base.
        adapters: name -> adapter, as in the plan.
        out: where the result goes; absent, or an empty folder.
        companions: file name -> content or where it lies (tokenizer, processor, ``config.json``); the plan's edits are
            made to ``config.json``.
        threads: how many units are folded at a time; as many as PyTorch would use by default.
        progress: called from this thread with (bytes of weights done, in all).

    Raises:
        BaseMismatch, Degraded: the plan's findings forbid it.
        IntegrityError: the files are not those it was made for, or changed meanwhile.
        UsageError: the adapters are not those it was made for, or a companion cannot have its name.
        NotFinite: a result would hold NaN or infinity.
        WriteFailed: no space, no permission, or something is in the way.  Nothing is at ``out``; finished files wait
            beside it for the next run.
    """
    start = time.perf_counter()
    plan.check()
    count = crew_size(threads)
    bound = Bound(plan, adapters)
    shards = lay_out(files, plan)
    small = _small_files(files, plan, shards, companions or {})
    staging = Staging(Path(out), _identity(files, plan, bound))
    try:
        with ExitStack() as opened:
            sources = {name: opened.enter_context(_open(files, name)) for name in sorted(files.headers)}
            streaming = _Streaming(plan, bound, shards, sources, staging, opened)
            streaming.run(count, progress)
        for name, content in small.items():
            path = staging.folder / name
            _make_folder(path.parent)
            atomic_write(path, content)
        report = streaming.report(time.perf_counter() - start, count, sum(map(len, small.values())))
        staging.publish()
    except BaseException as error:
        staging.abandon(resumable=isinstance(error, WriteFailed | KeyboardInterrupt))
        raise
    finally:
        staging.release()
    return report


def _open(files: BaseFiles, name: str) -> FileSource:
    source = FileSource(files.folder / name)
    if source.header != files.headers[name]:
        source.close()
        raise IntegrityError(f"{files.folder / name} changed since it was planned", "plan again")
    return source


def _identity(files: BaseFiles, plan: Plan, bound: Bound) -> dict[str, JSON]:
    """What decides the bytes of the result's weights, so far as it can be told without reading the base's."""
    stats = {name: (files.folder / name).stat() for name in files.headers}
    inputs: dict[str, JSON] = {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}
    return {
        "base": str(files.folder.resolve()),
        "inputs": inputs,
        "plan": plan.digest(),
        "adapters": bound.digest(plan),
    }


def _small_files(
    files: BaseFiles, plan: Plan, shards: tuple[Shard, ...], companions: Mapping[str, bytes | Path]
) -> dict[str, bytes]:
    """Everything but the weights, by file name: index, edited config, companions."""
    index = index_file(files, shards)
    taken = {shard.name for shard in shards} | ({index[0]} if index else set())
    result: dict[str, bytes] = {}
    for name, content in companions.items():
        check_path(name)
        if name in taken:
            raise UsageError(f"{name} is a file of the weights and cannot be a companion", "leave it out")
        try:
            result[name] = content if isinstance(content, bytes) else content.read_bytes()
        except OSError as error:
            raise Unavailable(
                f"{content!s} cannot be read: {error.strerror}", "it was to go along with the weights"
            ) from None
    if plan.config_edits:
        result[_CONFIG] = _edited(result.get(_CONFIG), files.config, plan.config_edits)
    return result | (dict([index]) if index else {})


def _edited(content: bytes | None, config: Mapping[str, JSON], edits: Mapping[str, JSON]) -> bytes:
    """A configuration with edits, spelled as transformers and diffusers do."""
    try:
        before = dict(config) if content is None else json.loads(content)
    except ValueError as error:
        raise IntegrityError(f"{_CONFIG} is no JSON: {error}") from None
    return (json.dumps({**before, **edits}, indent=2, ensure_ascii=False) + "\n").encode()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failed(folder, error) from None


@dataclass(slots=True)
class _Open:
    """A shard that is being written: how many jobs are left, and what came of those that are done."""

    shard: Shard
    writer: StreamWriter
    left: int = 0
    read: int = 0
    changes: dict[str, dict[int, Change]] = field(default_factory=dict)

    def note(self) -> dict[str, JSON]:
        changes: dict[str, JSON] = {
            name: sum((parts[start] for start in sorted(parts)), Change()).relative
            for name, parts in self.changes.items()
        }
        return {"changes": changes, "read": self.read}


@final
class _Streaming:
    """The jobs of a merge from disk to disk."""

    def __init__(
        self,
        plan: Plan,
        bound: Bound,
        shards: Sequence[Shard],
        sources: Mapping[str, FileSource],
        staging: Staging,
        opened: ExitStack,
    ) -> None:
        self._plan, self._bound, self._shards, self._sources = plan, bound, shards, sources
        self._staging, self._opened = staging, opened
        self._files = {name: source for source in sources.values() for name in source.names()}
        self._notes: dict[str, Any] = dict(staging.finished)
        self._lock = threading.Lock()
        self._moved = sum(shard.nbytes for shard in shards if shard.name in staging.finished)

    def run(self, threads: int, progress: Progress | None) -> None:
        """Write every shard that is not finished."""
        total = sum(shard.nbytes for shard in self._shards)

        def tick() -> None:
            if progress:
                progress(self._moved, total)

        waiting = [self._begin(shard) for shard in self._shards if shard.name not in self._notes]
        run_jobs(waiting, threads, tick=tick)

    def report(self, seconds: float, threads: int, others: int) -> MergeReport:
        """What was done, by this run and those before it."""
        changes = {name: value for note in self._notes.values() for name, value in note["changes"].items()}
        return MergeReport(
            changes={step.out: changes.get(step.out) for step in self._plan.steps if step.terms},
            created=tuple(step.out for step in self._plan.steps if step.made_whole),
            removed=self._plan.removed,
            seconds=seconds,
            bytes_read=sum(note["read"] for note in self._notes.values()),
            bytes_written=others + sum((self._staging.folder / shard.name).stat().st_size for shard in self._shards),
            resumed=len(self._staging.finished),
            threads=threads,
            plan=self._plan.digest(),
        )

    def _begin(self, shard: Shard) -> Job:
        def job(_: Workspace) -> Iterator[Job]:
            writer = StreamWriter(self._staging.folder / shard.name, shard.entries, shard.metadata)
            with self._lock:
                self._opened.callback(writer.discard)
            state = _Open(shard, writer)
            jobs = [*self._copies(state), *(self._step(state, *item) for item in shard.steps.values())]
            state.left = len(jobs)
            return iter(jobs or [self._commit(state)])

        return job

    def _copies(self, state: _Open) -> Iterator[Job]:
        for saved, copy in state.shard.copies.items():
            source = self._sources[copy.file]
            offset, nbytes = source.header.span(copy.name)
            for at in range(0, nbytes, _PIECE):
                yield self._copy(state, saved, source.path, offset + at, at, min(_PIECE, nbytes - at))

    def _copy(self, state: _Open, saved: str, path: Path, offset: int, at: int, nbytes: int) -> Job:
        def job(_: Workspace) -> Iterable[Job]:
            state.writer.copy_from(saved, path, offset, nbytes, at=at)
            return self._done(state, moved=nbytes, read=nbytes)

        return job

    def _step(self, state: _Open, step: Step, file: str) -> Job:
        def sibling(piece: Piece) -> torch.Tensor:
            name = self._plan.reads[piece.parameter]
            return self._files[name].read(name)

        def job(_: Workspace) -> Iterable[Job]:
            fold = Fold(step, self._bound.ingredients(step, sibling))
            state.changes[step.out] = {}
            with self._lock:
                state.left += len(fold.units)
            return [*(self._unit(state, step, file, fold, unit) for unit in fold.units), *self._done(state)]

        return job

    def _unit(self, state: _Open, step: Step, file: str, fold: Fold, unit: Unit) -> Job:
        dtype, shape = to_torch(step.after.dtype), torch_shape(step.after.dtype, step.after.shape) or (1,)
        row = math.prod(shape[1:]) * dtype.itemsize
        start, nbytes = unit.rows.start * row, (unit.rows.stop - unit.rows.start) * row

        def job(space: Workspace) -> Iterable[Job]:
            raw = space.take("unit", (nbytes,), torch.uint8, torch.device("cpu"))
            rows = raw.view(dtype).view(-1, *shape[1:])
            if step.made_whole:
                change = fold.run(unit, None, rows, space)
            else:
                self._sources[file].read_into(step.stored_as, start, raw.numpy().data)
                change = fold.run(unit, rows, rows, space)
            state.writer.write(step.saved_as, start, raw.numpy().data)
            state.changes[step.out][start] = change
            return self._done(state, moved=nbytes, read=0 if step.made_whole else nbytes)

        return job

    def _done(self, state: _Open, *, moved: int = 0, read: int = 0) -> list[Job]:
        """Count a job of a shard; the last gives the job that finishes it."""
        with self._lock:
            state.left -= 1
            state.read += read
            self._moved += moved
            return [] if state.left else [self._commit(state)]

    def _commit(self, state: _Open) -> Job:
        def job(_: Workspace) -> None:
            state.writer.commit()
            with self._lock:
                self._notes[state.shard.name] = state.note()
                self._staging.finish(state.shard.name, state.note())

        return job
