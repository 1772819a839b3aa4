"""The public functions: what the command line does, for scripts.

Each takes references as people write them (a folder, a file, ``ns/name@1.2``) or the objects themselves, and raises
typed errors.  ``import lorahub`` loads this file at the first use of one of its names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

from lorahub import checks, inspection, recording
from lorahub.adapter import Adapter, AdapterHeader, open_header
from lorahub.adapter import load as load_tensors
from lorahub.bases.framework import BaseFiles, Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.weights import weights_digest
from lorahub.engine.merge import Merged, merge_into
from lorahub.engine.plan import Plan
from lorahub.engine.plan import plan as plan_merge
from lorahub.engine.report import MergeReport
from lorahub.engine.stream import stream_merge
from lorahub.errors import NotFound, PushRefused, UsageError
from lorahub.files.atomic import atomic_write
from lorahub.findings import Finding, Verdict, worst
from lorahub.hub import open_hub
from lorahub.hub.contents import survey
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.record import FILENAME, AdapterRecord
from lorahub.registry import Registry
from lorahub.report import CheckReport

if TYPE_CHECKING:
    from torch import nn

    from lorahub.hub.hub import Pin

__all__ = [
    "Base",
    "Job",
    "Pulled",
    "check",
    "inspect",
    "load",
    "merge",
    "open_base",
    "plan",
    "prepare",
    "pull",
    "push",
    "record",
]

Source: TypeAlias = "str | os.PathLike[str] | Ref"
"""An adapter as people write it: a folder, a file, or ``ns/name[@SELECTOR][/path][:WEIGHT]``."""

Given: TypeAlias = "Source | Adapter | AdapterHeader"
"""An adapter as people write it, or one that is open."""


Progress: TypeAlias = "Callable[[int, int], None]"
"""Called with (done, in all): bytes where files move, parameters where a live model changes."""


def _quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """An adapter that was fetched: its verified folder, and exactly which commit and files it is."""

    folder: Path
    pin: Pin


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an adapter lies: its folder, the weights file that the reference named (or ""), and what people call it."""

    folder: Path
    weight_name: str
    label: str


def _ref(source: Source, *, bare: bool = False) -> Ref:
    """The reference; a path that exists is taken as a path, also where it could be a name on a hub.

    Args:
        source: what was given.
        bare: also take names without a namespace, as old bases have ("gpt2").
    """
    if isinstance(source, Ref):
        return source
    text = os.fspath(source)
    head, equals, tail = text.partition("=")
    name, place = (f"{head}=", tail) if equals and head.isidentifier() else ("", text)
    if place and not Path(place).is_absolute():
        local = Ref.parse(f"{name}./{place}")
        if local.path is not None and Path(local.path).exists():
            return local
    return Ref.parse(text, bare=bare)


def _fetch(ref: Ref, hub: str | None, local_files_only: bool, progress: Progress) -> Pulled:
    opened = open_hub(hub, local_files_only=local_files_only)
    pin = opened.resolve(ref)
    return Pulled(folder=opened.pull(pin, progress=lambda _file, done, total: progress(done, total)), pin=pin)


def _locate(source: Source, hub: str | None, local_files_only: bool, progress: Progress) -> _Place:
    ref = _ref(source)
    if ref.path is None:
        pulled = _fetch(ref, hub, local_files_only, progress)
        return _Place(folder=pulled.folder, weight_name=pulled.pin.file, label=str(pulled.pin))
    path = Path(ref.path).expanduser()
    if path.is_dir():
        return _Place(folder=path, weight_name="", label=ref.path)
    if path.is_file():
        return _Place(folder=path.parent, weight_name=path.name, label=ref.path)
    raise NotFound(
        f"there is no adapter at {path}", "give a folder, a .safetensors file, or ns/name[@VERSION] on a hub"
    )


def pull(ref: Source, *, hub: str | None = None, local_files_only: bool = False, progress: Progress = _quiet) -> Pulled:
    """Fetch an adapter from a hub, verify every file, and say where it lies.

    Args:
        ref: ``ns/name[@SELECTOR][/folder-or-file]``.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        Unavailable: it does not exist, is not accessible, or the network is needed and not there.
        IntegrityError: a file is not what the hub says it is.
    """
    parsed = _ref(ref)
    if parsed.path is not None:
        raise UsageError(f"{ref} is a local path; only hub references are pulled", "lorahub pull NS/NAME[@VERSION]")
    return _fetch(parsed, hub, local_files_only, progress)


def _header(
    source: Given, registry: Registry, *, hub: str | None, progress: Progress, index: BaseIndex | None = None
) -> AdapterHeader:
    if isinstance(source, Adapter):
        if source.header is None:
            raise UsageError(
                "this adapter lies in no folder yet", "save it first: lorahub.adapter.save(adapter, FOLDER)"
            )
        source = source.header
    if isinstance(source, AdapterHeader):
        if index is None:
            return source
        return open_header(source.folder, registry, index=index, weight_name=source.reading.file, label=source.label)
    found = _locate(source, hub, False, progress)
    return open_header(found.folder, registry, index=index, weight_name=found.weight_name, label=found.label)


def inspect(source: Source, *, hub: str | None = None, progress: Progress = _quiet) -> inspection.Inspection:
    """Say what an adapter is, from headers alone; no torch."""
    registry = load_registry()
    return inspection.inspect(_header(source, registry, hub=hub, progress=progress), registry)


def load(
    source: Source,
    *,
    hub: str | None = None,
    weight_name: str = "",
    local_files_only: bool = False,
    progress: Progress = _quiet,
) -> Adapter:
    """An adapter with its tensors.

    Args:
        source: a folder, a file, or a reference.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        weight_name: which weights file, where a folder holds several.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        UnsupportedFormat, UnsupportedKind: nobody can read it, or it is no weight change.
        IntegrityError: its files contradict themselves, or hold NaN or infinity.
    """
    registry = load_registry()
    found = _locate(source, hub, local_files_only, progress)
    return load_tensors(
        open_header(found.folder, registry, weight_name=weight_name or found.weight_name, label=found.label), registry
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base at hand: its index, the framework that names it, and where it is.

    Attributes:
        files: its files, or None for a live model.
        model: the live model, or None for files.
    """

    index: BaseIndex
    framework: Framework
    files: BaseFiles | None = None
    model: nn.Module | None = None


def open_base(base: Source | nn.Module | Base, *, digest: bool = False, progress: Progress = _quiet) -> Base:
    """A base by its headers (a folder, a file, ``ns/name[@COMMIT]``) or as a live model; no weights are read.

    Args:
        base: what to open.
        digest: hash the weight files too (once; remembered), which tells equal shapes with other weights apart.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    if isinstance(base, Base):
        return base
    if not isinstance(base, str | os.PathLike | Ref):
        framework, index = index_live(base, registry.frameworks)
        return Base(index=index, framework=framework, model=base)
    ref = _ref(base, bare=True)
    if ref.path is not None:
        place = Path(ref.path).expanduser()
        if not place.exists():
            raise NotFound(
                f"there is no base at {place}",
                "give a folder with config.json and safetensors files, or NS/NAME[@COMMIT]",
            )
        where = BaseRef(folder=str(place.resolve()))
    else:
        from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

        bases = HuggingFaceHub()
        pin = bases.base_pin(ref)
        place = bases.pull(pin, progress=lambda _file, done, total: progress(done, total))
        where = BaseRef(repo=pin.repo, commit=pin.commit, subfolder=pin.subfolder, folder=str(place))
    files = survey_base(place)
    framework, index = index_base(
        files, where, registry.frameworks, weights=weights_digest(files, progress=progress) if digest else ""
    )
    return Base(index=index, framework=framework, files=files)


def _recorded_base(header: AdapterHeader) -> str:
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        return f"{recorded.repo_id}@{recorded.revision}" if recorded.revision else recorded.repo_id
    raise UsageError(
        f"{header.label} does not record a base that can be fetched",
        "name the base: --base FOLDER or --base NS/NAME[@COMMIT]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A merge that is planned and judged, and not yet done.

    Attributes:
        base: the base.
        headers: name -> adapter, read against the base.
        weights: name -> weight.
        plan: what will change.
        findings: everything there is to say, the plan's and each adapter's.
        allowed: codes that were allowed.
    """

    base: Base
    headers: Mapping[str, AdapterHeader]
    weights: Mapping[str, float]
    plan: Plan
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst finding that was not allowed."""
        return worst(self.findings, allowed=self.allowed)

    def refuse(self) -> None:
        """Raise what the findings demand; return where the merge may go on."""
        checks.refuse(
            self.findings, allowed=self.allowed, subject=f"{', '.join(self.headers)} into {self.base.index.ref}"
        )

    def document(self) -> dict[str, object]:
        """The plan and the findings as JSON-ready values."""
        return {
            "plan": self.plan.document(),
            "verdict": str(self.verdict),
            "findings": [finding.document() for finding in self.findings],
        }

    def adapters(self, registry: Registry) -> dict[str, Adapter]:
        """The adapters' tensors, under the base's names."""
        return {name: load_tensors(header, registry, index=self.base.index) for name, header in self.headers.items()}

    def write(
        self,
        out: str | os.PathLike[str],
        *,
        keep_base_tokenizer: bool = False,
        threads: int | None = None,
        progress: Progress = _quiet,
    ) -> MergeReport:
        """Stream the merged checkpoint to ``out``, with its config, tokenizer, processor and template files.

        Raises:
            UsageError: the base is a live model, or ``out`` exists.
            WriteFailed: no space or no permission; nothing is left at ``out``.
        """
        if self.base.files is None:
            raise UsageError("a live model cannot be merged to disk", "save it first, then merge the folder")
        self.refuse()
        return stream_merge(
            self.base.files,
            self.plan,
            self.adapters(load_registry()),
            Path(out),
            companions=_companions(self.base, self.headers.values(), keep_base_tokenizer),
            threads=threads,
            progress=progress,
        )


def _companions(base: Base, headers: Collection[AdapterHeader], keep_base: bool) -> dict[str, Path]:
    """File name -> where it comes from: the base's config and tokenizer files, an adapter's own winning."""
    assert base.files is not None
    result = {name: base.files.folder / name for name in base.framework.companions(base.files)}
    if not keep_base:
        for header in headers:
            own = (path for path, found in survey(header.folder).files.items() if found.role == "companion")
            result |= {path: header.folder / path for path in own if "/" not in path}
    return result


def _named(adapters: Mapping[str, Given] | Sequence[Source]) -> dict[str, tuple[Given, float]]:
    """Adapters by name, with the weight that their reference carries (1 where it carries none)."""
    if isinstance(adapters, Mapping):
        return {name: (source, _weight(source)) for name, source in adapters.items()}
    result: dict[str, tuple[Given, float]] = {}
    for source in adapters:
        ref = _ref(source)
        stem = ref.name or (ref.repo or ref.path or "adapter").rstrip("/").rpartition("/")[2]
        name = next(
            each for each in (stem, *(f"{stem}-{n}" for n in range(2, len(adapters) + 2))) if each not in result
        )
        result[name] = (ref, _weight(ref))
    return result


def _weight(source: Given) -> float:
    if isinstance(source, Adapter | AdapterHeader):
        return 1.0
    weight = _ref(source).weight
    return 1.0 if weight is None else weight


def prepare(
    base: Source | nn.Module | Base | None,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = _quiet,
) -> Job:
    """Plan and judge a merge; headers only, nothing is refused yet.

    Args:
        base: a folder, a file, ``ns/name[@COMMIT]`` or a live model; None takes the one that the first adapter records.
        adapters: by name, or a list of references whose names are taken from them.
        weights: one per adapter, in order or by name; they replace weights in references.
        allow: finding codes to accept.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    named = _named(adapters)
    if not named:
        raise UsageError("no adapter was given", "lorahub merge REF --base BASE -o FOLDER")
    chosen = _weights(list(named), weights, {name: weight for name, (_, weight) in named.items()})
    if base is None:
        first = next(iter(named.values()))[0]
        base = _recorded_base(_header(first, registry, hub=hub, progress=progress))
    opened = open_base(base, digest=True, progress=progress)
    headers = {
        name: _header(source, registry, hub=hub, progress=progress, index=opened.index)
        for name, (source, _) in named.items()
    }
    planned = plan_merge(
        opened.index,
        opened.framework,
        {name: (header, chosen[name]) for name, header in headers.items()},
        registry.kinds,
        allow=tuple(allow),
    )
    found = tuple(
        dict.fromkeys(
            finding
            for header in headers.values()
            for finding in checks.findings(header, opened.index, opened.framework, planned)
        )
    )
    return Job(base=opened, headers=headers, weights=chosen, plan=planned, findings=found, allowed=tuple(allow))


def _weights(
    names: Sequence[str], given: Sequence[float] | Mapping[str, float] | None, own: Mapping[str, float]
) -> dict[str, float]:
    if given is None:
        result = dict(own)
    elif isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise UsageError(
                f"weights name adapters that were not given: {', '.join(unknown)}",
                f"the adapters are {', '.join(names)}",
            )
        result = {name: float(given.get(name, own[name])) for name in names}
    else:
        if len(given) != len(names):
            raise UsageError(f"{len(given)} weights for {len(names)} adapters", "give one weight per adapter")
        result = dict(zip(names, map(float, given), strict=True))
    for name, weight in result.items():
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {name} is {weight}", "give a finite number")
    return result


def plan(
    base: Source | nn.Module | Base,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
) -> Plan:
    """What merging would do, from headers alone: print ``plan(...).explain()``."""
    return prepare(base, adapters, weights=weights, allow=allow, hub=hub).plan


@overload
def merge(
    base: Source | nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = _quiet,
) -> Merged: ...


@overload
def merge(
    base: Source,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: str | os.PathLike[str],
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = _quiet,
) -> MergeReport: ...


def merge(
    base: Source | nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = _quiet,
) -> Merged | MergeReport:
    """Merge adapters into a base: a live model in place, or a folder to a new folder ``out``, shard by shard.

    Every parameter becomes ``W0 + sum of weight * delta(W0)``, rounded once.  All parameters change or none does.

    Args:
        base: a live model (merged in place) or a folder, file or ``ns/name[@COMMIT]`` (then ``out`` is needed).
        adapters: name -> adapter, or a list of references.
        weights: one per adapter; 1 by default, or the weight in the reference.
        out: the new checkpoint's folder; must not exist.
        allow: finding codes to accept.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (done, in all): parameters in place, bytes on disk.

    Returns:
        In place: ``Merged`` with ``report`` and a bit-exact ``undo()``.  To disk: the report.

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``; nothing was changed.
    """
    job = prepare(base, adapters, weights=weights, allow=allow, hub=hub, progress=progress if out else _quiet)
    job.refuse()
    if out is not None:
        return job.write(out, threads=threads, progress=progress)
    if job.base.model is None:
        raise UsageError(
            "merging a checkpoint on disk needs a place for the result", "pass out=FOLDER, or a live model"
        )
    return merge_into(
        job.base.framework.parameters(job.base.model, job.base.index),
        job.plan,
        job.adapters(load_registry()),
        threads=threads,
        progress=progress,
    )


def check(
    source: Given,
    base: Source | nn.Module | Base | None = None,
    *,
    runtime: str | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = _quiet,
) -> CheckReport:
    """Say whether an adapter goes with a base, on six axes, with the evidence; refuses nothing, no torch.

    Args:
        source: the adapter.
        base: what to hold it against; None takes the base it records, unless ``runtime`` is given.
        runtime: a serving runtime to judge for ("vllm").
        allow: finding codes to accept.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    header = _header(source, registry, hub=hub, progress=progress)
    found: tuple[Finding, ...] = header.findings
    against = []
    judged = registry.runtime(runtime) if runtime is not None else None
    if base is not None or judged is None:
        job = prepare(
            base if base is not None else _recorded_base(header),
            {header.label: header},
            allow=allow,
            hub=hub,
            progress=progress,
        )
        found, against, header = job.findings, [str(job.base.index.ref)], job.headers[header.label]
    if judged is not None:
        found = (*found, *judged.judge(header))
        against.append(judged.title)
    return CheckReport.of(adapter=header.label, against=" and ".join(against), findings=found, allowed=tuple(allow))


def record(
    folder: str | os.PathLike[str],
    base: Source | nn.Module | Base | None = None,
    *,
    base_repo: str | None = None,
    base_revision: str | None = None,
    hub: str | None = None,
    progress: Progress = _quiet,
    **fields: object,
) -> AdapterRecord:
    """Write ``lorahub.json`` into an adapter folder: its base, its arithmetic, the digests of its files; no torch.

    Args:
        folder: the adapter's folder.
        base: the base it was trained on; None keeps what an earlier record says, and brings the rest up to date.
        base_repo: what a local base is called on the Hub.
        base_revision: its commit there, 40 hex digits.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all) while the base is hashed.
        fields: further record fields, as ``license="apache-2.0"``; None removes one.

    Raises:
        BaseMismatch: the adapter does not fit the base, so this is not the one it was made for.
        RecordError: a field does not follow the schema; nothing was written.
    """
    registry = load_registry()
    header = open_header(Path(folder), registry)
    described, planned = None, None
    if base is not None:
        job = prepare(base, {header.label: header}, hub=hub, progress=progress)
        fitting = [finding for finding in job.plan.findings if finding.axis == "placement"]
        checks.refuse(fitting, subject=f"{header.label} was not made for {job.base.index.ref}")
        header, planned = job.headers[header.label], job.plan
        touched = {step.source for step in planned.steps if step.source}
        described = recording.describe_base(
            job.base.index, job.base.framework, touched, repo=base_repo, revision=base_revision
        )
    elif base_repo or base_revision:
        raise UsageError(
            "a name for the base was given, but no base", "name it too: --base FOLDER or --base NS/NAME@COMMIT"
        )
    written = recording.make_record(header, registry, base=described, plan=planned, fields=fields)
    atomic_write(Path(folder) / FILENAME, written.to_json().encode())
    return written


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push published, or would: the pin, and the files it left out."""

    pin: Pin
    skipped: tuple[str, ...]


def push(
    folder: str | os.PathLike[str],
    ref: Source,
    *,
    version: str | None = None,
    message: str = "",
    dry_run: bool = False,
    hub: str | None = None,
    progress: Progress = _quiet,
) -> Pushed:
    """Publish an adapter folder as one commit and one immutable version; no torch.

    The version, and the name where the record has none, are written into the folder's ``lorahub.json`` first.

    Args:
        folder: the adapter's folder, with a record that is up to date.
        ref: ``ns/name``.
        version: as "1.2.0"; None keeps the record's.
        message: commit message.
        dry_run: say what would be published; write nothing, anywhere.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        progress: called with (bytes done, bytes in all).

    Raises:
        PushRefused: the record is missing, stale or incomplete, the folder holds what must not be published, or the
            version exists with other content; nothing was published.
    """
    folder, to = Path(folder), _ref(ref)
    if to.repo is None:
        raise UsageError(f"{ref} is not a name on a hub", "lorahub push NS/NAME FOLDER --version 1.0.0")
    header = open_header(folder, load_registry())
    surveyed = survey(folder)
    surveyed.demand()
    again = f"lorahub record {folder}"
    if header.record is None:
        raise PushRefused(
            f"{folder} has no {FILENAME}, so nobody could check it against a base",
            f"{again} --base BASE --license SPDX",
        )
    if stale := header.record.stale(folder):
        raise PushRefused(f"the record of {folder} is stale: {', '.join(stale)} changed since", again)
    ready = header.record.changed(
        version=version or header.record.version, name=header.record.name or to.repo.partition("/")[2]
    )
    if missing := ready.missing_for_push():
        options = {
            "version": "lorahub push ... --version 1.0.0",
            "license": f"{again} --license SPDX",
            "base.repo_id": f"{again} --base BASE",
        }
        raise PushRefused(
            f"the record of {folder} lacks what a published adapter needs: {', '.join(missing)}",
            "; ".join(options[key] for key in missing if key in options) or again,
        )
    opened = open_hub(hub)
    before = (folder / FILENAME).read_bytes()
    if not dry_run:
        atomic_write(folder / FILENAME, ready.to_json().encode())
    try:
        pin = opened.push(
            folder,
            to,
            version=ready.version,
            message=message,
            dry_run=dry_run,
            progress=lambda _file, done, total: progress(done, total),
        )
    except BaseException:  # a refused version must not stay in the record
        atomic_write(folder / FILENAME, before)
        raise
    return Pushed(pin=pin, skipped=tuple(sorted(surveyed.skipped)))
