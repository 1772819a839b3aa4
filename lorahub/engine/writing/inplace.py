"""Merge into the files of a base where they lie: only bytes that change are written, all of them or none.

The results go to a journal beside the files first (``journal``); a run that dies before all are there has changed
nothing, and one that dies later is completed by the next.  Knows no frameworks and no formats.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lorahub.bases.framework import BaseFiles
from lorahub.engine.crew import crew_size
from lorahub.engine.folding.bind import Bound, HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.writing.checkpoint import Shard, lay_out
from lorahub.engine.writing.flow import Flow, Note, Progress, open_sources, report
from lorahub.engine.writing.where import HOST, Where
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.journal import Draft, demand_writable, hold_settled
from lorahub.files.raw import Bytes
from lorahub.files.tensors import FileSource

__all__ = ["merge_in_place", "restored"]


def merge_in_place(
    files: BaseFiles,
    plan: Plan,
    adapters: Mapping[str, HasDeltas],
    *,
    companions: Mapping[str, bytes] | None = None,
    keep_undo: bool = False,
    threads: int | None = None,
    where: Where = HOST,
    progress: Progress | None = None,
) -> MergeReport:
    """Execute ``plan`` on the base in ``files`` and leave the result there.

    The bytes are those that ``stream_merge`` would have written to a new folder.  While the last of them are being
    copied from the journal, who reads the files sees some old and some new.

    Args:
        files: the base's folder; surveyed after ``journal.settle``.
        plan: made for that base; no tensor appears, disappears, or changes its name, shape or dtype.
        adapters: name -> adapter, as in the plan.
        companions: file name -> new content of small files.
        keep_undo: keep the old bytes in the folder, for ``journal.revert``.
        threads: as for ``stream_merge``.
        where: what folds units; see ``where``.
        progress: called from this thread with (bytes of weights folded, in all).

    Raises:
        BaseMismatch, Degraded: the plan's findings forbid it.
        UsageError: the files cannot stay as they are laid out; or as ``stream_merge``.
        IntegrityError, NotFinite: as ``stream_merge``; nothing was changed.
        WriteFailed: a file is a link, has several names or is read-only, there is no space, or another run has the
            folder.
    """
    start = time.perf_counter()
    plan.check()
    count = crew_size(threads)
    shards = _as_they_are(files, plan)
    for shard in shards:
        demand_writable(files.folder / shard.name)
    lock, settled = hold_settled(files.folder)
    try:
        if settled is not None:
            raise UsageError(f"{files.folder} was completed just now: plan again", "give the command again")
        bound = Bound(plan, adapters)
        notes: dict[str, Note] = {}
        with ExitStack() as opened:
            draft = opened.enter_context(Draft(files.folder, keep=keep_undo))
            sources = open_sources(files, opened)

            def finish(shard: Shard, _output: object, note: Note) -> None:
                notes[shard.name] = note

            flow = Flow(
                plan,
                bound,
                sources,
                opened,
                create=lambda shard: _Ranges(draft, sources[shard.name], shard.name),
                finish=finish,
                where=where,
            )
            flow.run(shards, count, progress, total=sum(shard.nbytes for shard in shards))
            for name, content in (companions or {}).items():
                draft.small(name, content)
            small = sum(map(len, (companions or {}).values()))
            done = report(
                plan,
                [notes[shard.name] for shard in shards],
                seconds=time.perf_counter() - start,
                threads=count,
                written=draft.nbytes + small,
                where=where,
            )
            draft.commit({"report": done.document()})
            draft.apply()
    finally:
        lock.release()
    return replace(done, seconds=time.perf_counter() - start)


def restored(about: Mapping[str, Any]) -> MergeReport:
    """The report of a merge that another run began, as its journal kept it.

    Raises:
        IntegrityError: the journal was not written by a merge.
    """
    try:
        return _restored(about["report"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"the journal says nothing of a merge: {error}") from None


def _restored(said: Mapping[str, Any]) -> MergeReport:
    return MergeReport(
        changes=said["changes"],
        seconds=said["seconds"],
        bytes_read=said["bytes_read"],
        bytes_written=said["bytes_written"],
        resumed=1,
        threads=said["threads"],
        plan=said["plan"],
    )


def _as_they_are(files: BaseFiles, plan: Plan) -> tuple[Shard, ...]:
    """The shards of which anything changes, without what is copied.

    Raises:
        UsageError: the result needs other files, or another layout of them.
    """
    if files.parts:
        raise UsageError(
            f"{files.folder} is a pipeline, whose components are folders of their own, and what is made in place is "
            "made in one folder",
            "merge to a new folder with -o, or into one component: --base FOLDER/COMPONENT",
        )
    shards = lay_out(files, plan)
    for shard in shards:
        header = files.headers[shard.name]
        before = [(name, info.dtype, tuple(info.shape)) for name, info in header.tensors.items()]
        after = [(name, dtype, tuple(shape)) for name, (dtype, shape) in shard.entries.items()]
        if before != after:
            moved = sorted({name for name, *_ in before} ^ {name for name, *_ in after})
            what = f" ({', '.join(moved[:3])})" if moved else ""
            raise _not_in_place(f"tensors of {shard.name} would appear, disappear or change their form{what}")
    if gone := sorted(files.headers.keys() - {shard.name for shard in shards}):
        raise _not_in_place(f"{gone[0]} would be empty")
    if plan.config_edits:
        raise _not_in_place(f"the configuration changes ({', '.join(sorted(plan.config_edits))})")
    return tuple(replace(shard, copies={}) for shard in shards if shard.steps)


def _not_in_place(reason: str) -> UsageError:
    return UsageError(f"this merge cannot be made in place: {reason}", "merge to a new folder with -o")


@final
@dataclass(frozen=True, slots=True)
class _Ranges:
    """The output of one shard: what differs from the file goes to the journal."""

    draft: Draft
    source: FileSource
    file: str

    def write(self, name: str, offset: int, data: Bytes) -> None:
        new = memoryview(data)
        old = memoryview(bytearray(new.nbytes))
        self.source.read_into(name, offset, old)  # read a moment ago, so it comes from memory
        self.draft.replace(self.file, self.source.header.span(name)[0] + offset, old, new)

    def phase(self, name: str, offset: int) -> int:
        return 0

    def copy_from(self, name: str, source: Path, offset: int, length: int, *, at: int) -> None:
        raise AssertionError("nothing is copied in place")

    def copy_whole(self, source: Path) -> bool:
        return False

    def discard(self) -> None:
        """Nothing: the draft is discarded as a whole."""
