"""Merge from disk to disk: the base's files are read once, folded unit by unit, and written to a new folder.

What is held at a time is a few units for each thread, not a shard; what does not change moves as bytes.  A run that is
killed goes on at the next, and the result appears whole or not at all.  Knows no frameworks and no formats.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lorahub.bases.framework import BaseFiles
from lorahub.deltas.kind import JSON
from lorahub.engine.crew import crew_size
from lorahub.engine.folding.bind import Bound, HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.writing.checkpoint import Shard, index_files, lay_out
from lorahub.engine.writing.flow import Flow, Note, Output, Progress, open_sources, report
from lorahub.engine.writing.ranks import ALONE, Ranks
from lorahub.engine.writing.resume import whole
from lorahub.engine.writing.staging import SINGLE, Staging
from lorahub.engine.writing.where import HOST, Where
from lorahub.errors import IntegrityError, Unavailable, UsageError, WriteFailed
from lorahub.files.atomic import atomic_write, write_failed
from lorahub.files.writer import StreamWriter
from lorahub.names import check_path

__all__ = ["stream_merge"]

_CONFIG = "config.json"


def stream_merge(
    files: BaseFiles,
    plan: Plan,
    adapters: Mapping[str, HasDeltas],
    out: Path,
    *,
    companions: Mapping[str, bytes | Path] | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    where: Where = HOST,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> MergeReport:
    """Execute ``plan`` on the base in ``files`` and write the result to the new folder ``out``, or to one file.

    Shards, tensor names and header metadata stay as they are.  The same inputs give the same bytes, whatever
    ``threads`` and ``ranks`` are and however often the run was killed on the way.

    Args:
        files: the base's folder; its weights may lie behind links.
        plan: made for that base.
        adapters: name -> adapter, as in the plan.
        out: where the result goes; absent, or an empty folder.  Where it ends in ".safetensors", the one weights file.
        companions: file name -> content or where it lies (tokenizer, processor, ``config.json``); the plan's edits are
            made to ``config.json``.  Beside one file there are none.
        metadata: what one file's header says besides the base's; a folder has companions for that.
        threads: how many units are folded at a time; one more than PyTorch would use by default.
        where: what folds units; see ``where``.
        ranks: this process among those that were started with the same arguments; each makes whole shards.
        progress: called from this thread with (bytes of weights done, in all).

    Returns:
        What was done; of several ranks, rank 0 reports everything and the others their own part.

    Raises:
        BaseMismatch, Degraded: the plan's findings forbid it.
        IntegrityError: the files are not those it was made for, or changed meanwhile.
        UsageError: the adapters are not those it was made for, a companion cannot have its name, or the result is more
            than the one file asked for.
        NotFinite: a result would hold NaN or infinity.
        RankFailed: another rank failed or is gone.
        WriteFailed: no space, no permission, or something is in the way.  Nothing is at ``out``; finished files wait
            beside it for the next run.
    """
    start = time.perf_counter()
    plan.check()
    count, out = crew_size(threads) + (threads is None), Path(out)  # one more, since some wait for the disk
    bound = Bound(plan, adapters)
    shards = lay_out(files, plan)
    if out.suffix == SINGLE:
        shards, small = _one_file(shards, plan, metadata or {}), {}
    else:
        small = _small_files(files, plan, shards, companions or {})
    staging = Staging(out, _identity(files, plan, bound, metadata or {}, where), ranks)
    try:
        with ExitStack() as opened:
            notes = _make(files, plan, bound, ranks.share(shards), staging, opened, count, where, progress)
        resumed = len(staging.kept)
        if ranks.rank == 0:
            shares = {rank: [shard.name for shard in ranks.share(shards, rank)] for rank in range(ranks.world)}
            notes |= staging.wait_for_others(shares)
            for name, content in small.items():
                path = staging.folder / name
                _make_folder(path.parent)
                atomic_write(path, content)
        written = sum((staging.folder / name).stat().st_size for name in notes) + sum(map(len, small.values()))
        done = report(
            plan,
            [notes[shard.name] for shard in shards if shard.name in notes],
            seconds=time.perf_counter() - start,
            threads=count,
            written=written,
            resumed=resumed,
            where=where,
        )
        if ranks.rank == 0:
            staging.publish({*small, *(shard.name for shard in shards)})
        else:
            staging.wait_until_published()
    except BaseException as error:
        staging.abandon(error, resumable=isinstance(error, WriteFailed | KeyboardInterrupt))
        raise
    finally:
        staging.release()
    return done


def _make(
    files: BaseFiles,
    plan: Plan,
    bound: Bound,
    shards: Sequence[Shard],
    staging: Staging,
    opened: ExitStack,
    threads: int,
    where: Where,
    progress: Progress | None,
) -> dict[str, Note]:
    """Write the shards that are not finished; the notes of all."""
    sources = open_sources(files, opened)
    claimed = [shard for shard in shards if shard.name in staging.finished]
    kept = whole(claimed, {shard.name: staging.finished[shard.name] for shard in claimed}, staging.folder, sources)
    staging.take_over(kept)
    notes: dict[str, Note] = {name: staging.finished[name] for name in kept}

    def create(shard: Shard) -> Output:
        path = staging.folder / shard.name
        _make_folder(path.parent)
        return StreamWriter(path, shard.entries, shard.metadata, sums=True, prefix=shard.prefix)

    def finish(shard: Shard, output: Output, note: Note) -> None:
        assert isinstance(output, StreamWriter)
        output.commit()
        with lock:
            notes[shard.name] = {**note, "sums": output.sums}
            staging.finish(shard.name, dict(notes[shard.name]))

    lock = threading.Lock()
    flow = Flow(plan, bound, sources, opened, create=create, finish=finish, where=where)
    flow.run(
        [shard for shard in shards if shard.name not in kept],
        threads,
        progress,
        moved=sum(shard.nbytes for shard in shards if shard.name in kept),
        total=sum(shard.nbytes for shard in shards),
    )
    return notes


def _one_file(shards: tuple[Shard, ...], plan: Plan, metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """The one shard, with more metadata."""
    if len(shards) > 1:
        raise UsageError(f"the result is {len(shards)} files, as the base is", "name a folder: -o FOLDER")
    if plan.config_edits:
        edits = ", ".join(sorted(plan.config_edits))
        raise UsageError(f"the configuration changes with this merge ({edits})", "name a folder: -o FOLDER")
    return tuple(replace(shard, metadata={**shard.metadata, **metadata}) for shard in shards)


def _identity(files: BaseFiles, plan: Plan, bound: Bound, metadata: Mapping[str, str], where: Where) -> dict[str, JSON]:
    """What decides the bytes of the result's weights, so far as it can be told without reading the base's."""
    stats = {name: (files.folder / name).stat() for name in files.headers}
    inputs: dict[str, JSON] = {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}
    return {
        "base": str(files.folder.resolve()),
        "inputs": inputs,
        "plan": plan.digest(),
        "adapters": bound.digest(plan),
        **({"metadata": dict(metadata)} if metadata else {}),
        **({} if where.name == HOST.name else {"device": where.name.partition(":")[0]}),
    }


def _small_files(
    files: BaseFiles, plan: Plan, shards: tuple[Shard, ...], companions: Mapping[str, bytes | Path]
) -> dict[str, bytes]:
    """Everything but the weights, by file name: index, edited config, companions."""
    indices = index_files(files, shards)
    taken = {shard.name for shard in shards} | set(indices)
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
    for component, edits in _by_component(files, plan.config_edits).items():
        name = f"{component}/{_CONFIG}" if component else _CONFIG
        before = files.parts[component].config if component else files.config
        result[name] = _edited(result.get(name), before, edits)
    return result | indices


def _by_component(files: BaseFiles, edits: Mapping[str, JSON]) -> dict[str, dict[str, JSON]]:
    """Component -> what changes in its configuration; in a pipeline, keys say it before a colon."""
    result: dict[str, dict[str, JSON]] = {}
    for key, value in edits.items():
        component, colon, name = key.partition(":")
        if colon and component in files.parts:
            result.setdefault(component, {})[name] = value
        else:
            result.setdefault("", {})[key] = value
    return result


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
