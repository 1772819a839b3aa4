"""Merging and checking, for scripts: plan and judge first, then do it in place or to disk."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from lorahub import __version__, checks, strict_json
from lorahub.adapter import Adapter, AdapterHeader
from lorahub.adapter import load as load_tensors
from lorahub.deltas.disputes import Compat, as_compat
from lorahub.deltas.kind import JSON
from lorahub.engine.merge import Merged, merge_into
from lorahub.engine.plan import Plan
from lorahub.engine.plan import plan as plan_merge
from lorahub.engine.report import MergeReport
from lorahub.engine.sharding import local_parts
from lorahub.engine.stream import stream_merge
from lorahub.errors import Unavailable, UsageError
from lorahub.files.digest import file_digest
from lorahub.findings import Finding, Verdict, worst
from lorahub.hub.contents import survey
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.report import CheckReport
from lorahub.sources import Base, Given, Progress, Source, as_ref, header_of, open_base, quiet, recorded_base

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PROVENANCE", "Job", "check", "merge", "plan", "prepare"]

PROVENANCE = "lorahub-merge.json"
"""The file in a merged folder that says what it was made of."""


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
        compat: whose result counts where PEFT's is not the declared one, for all adapters; None: each adapter's own
            choice, where it says.
    """

    base: Base
    headers: Mapping[str, AdapterHeader]
    weights: Mapping[str, float]
    plan: Plan
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...]
    compat: Compat | None = None

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
            "compat": self.compat,
            "findings": [finding.document() for finding in self.findings],
        }

    def provenance(self) -> dict[str, JSON]:
        """What the merged weights are made of, what was allowed and chosen: the text of ``lorahub-merge.json``."""
        index = self.base.index
        base = {"repo_id": index.ref.repo, "revision": index.ref.commit, "weights": index.weights}
        adapters: list[JSON] = []
        for name, header in self.headers.items():
            known = header.record
            said: dict[str, JSON] = {
                "name": name,
                "weight": self.weights[name],
                "sha256": file_digest(header.folder / header.reading.file)[0],
                "recorded_name": known.name if known else None,
                "version": known.version if known else None,
                "license": known.license if known else None,
                "compat": header.reading.hints.get("compat") or self._inside(name),
            }
            adapters.append({key: value for key, value in said.items() if value is not None and value != ""})
        return {
            "lorahub": __version__,
            "base": {key: value for key, value in base.items() if value},
            "adapters": adapters,
            "allowed": [*sorted(self.allowed)],
            "findings": [*sorted({each.code for each in self.findings if each.level >= Verdict.UNVERIFIED})],
            "plan": self.plan.digest(),
        }

    def _inside(self, name: str) -> str | None:
        """The choice, where it decided where an adapter's weight goes."""
        terms = (term for step in self.plan.steps for term in step.terms if term.adapter == name)
        return self.compat if any(term.strength != 1 for term in terms) else None

    def adapters(self, registry: Registry) -> dict[str, Adapter]:
        """The adapters' tensors, under the base's names."""
        return {name: load_tensors(header, registry, index=self.base.index) for name, header in self.headers.items()}

    def write(
        self,
        out: str | os.PathLike[str],
        *,
        keep_base_tokenizer: bool = False,
        threads: int | None = None,
        progress: Progress = quiet,
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
            companions={
                **_companions(self.base, self.headers.values(), keep_base_tokenizer),
                PROVENANCE: strict_json.pretty(self.provenance()).encode(),
            },
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
        ref = as_ref(source)
        stem = ref.name or (ref.repo or ref.path or "adapter").rstrip("/").rpartition("/")[2]
        name = next(
            each for each in (stem, *(f"{stem}-{n}" for n in range(2, len(adapters) + 2))) if each not in result
        )
        result[name] = (ref, _weight(ref))
    return result


def _weight(source: Given) -> float:
    if isinstance(source, Adapter | AdapterHeader):
        return 1.0
    weight = as_ref(source).weight
    return 1.0 if weight is None else weight


def prepare(
    base: Source | nn.Module | Base | None,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> Job:
    """Plan and judge a merge; headers only, nothing is refused yet.

    Args:
        base: a folder, a file, ``ns/name[@COMMIT]`` or a live model; None takes the one that the first adapter records.
        adapters: by name, or a list of references whose names are taken from them.
        weights: one per adapter, in order or by name; they replace weights in references.
        allow: finding codes to accept.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one.  None takes what each
            adapter's record or file says; where that is nothing, a finding asks.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    choice = as_compat(compat)
    named = _named(adapters)
    if not named:
        raise UsageError("no adapter was given", "lorahub merge REF --base BASE -o FOLDER")
    chosen = _weights(list(named), weights, {name: weight for name, (_, weight) in named.items()})
    if base is None:
        first = header_of(next(iter(named.values()))[0], registry, hub=hub, progress=progress)
        opened = _open_recorded(first, progress)
    else:
        opened = open_base(base, digest=True, progress=progress)
    headers = {
        name: header_of(source, registry, hub=hub, progress=progress, index=opened.index, compat=choice)
        for name, (source, _) in named.items()
    }
    planned = plan_merge(
        opened.index,
        opened.framework,
        {name: (header, chosen[name]) for name, header in headers.items()},
        registry.kinds,
        allow=tuple(allow),
        compat=choice,
    )
    found = tuple(
        dict.fromkeys(
            finding
            for header in headers.values()
            for finding in checks.findings(header, opened.index, opened.framework, planned)
        )
    )
    return Job(
        base=opened,
        headers=headers,
        weights=chosen,
        plan=planned,
        findings=found,
        allowed=tuple(allow),
        compat=choice,
    )


def _open_recorded(header: AdapterHeader, progress: Progress) -> Base:
    """The base that an adapter records."""
    named = recorded_base(header)
    try:
        return open_base(Ref.parse(named, bare=True), digest=True, progress=progress)  # never a path that lies here
    except Unavailable as error:
        raise type(error)(
            f"{header.label} records {named} as its base, which cannot be had: {error.message}",
            "name one that is at hand: --base FOLDER",
        ) from None


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
    compat: str | None = None,
    hub: str | None = None,
) -> Plan:
    """What merging would do, from headers alone: print ``plan(...).explain()``."""
    return prepare(base, adapters, weights=weights, allow=allow, compat=compat, hub=hub).plan


@overload
def merge(
    base: Source | nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> Merged: ...


@overload
def merge(
    base: Source,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: str | os.PathLike[str],
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> MergeReport: ...


def merge(
    base: Source | nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> Merged | MergeReport:
    """Merge adapters into a base: a live model in place, or a folder to a new folder ``out``, shard by shard.

    Every parameter becomes ``W0 + sum of weight * delta(W0)``, rounded once.  All parameters change or none does.

    Args:
        base: a live model (merged in place) or a folder, file or ``ns/name[@COMMIT]`` (then ``out`` is needed).
        adapters: name -> adapter, or a list of references.
        weights: one per adapter; 1 by default, or the weight in the reference.
        out: the new checkpoint's folder; must not exist.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (done, in all): parameters in place, bytes on disk.

    Returns:
        In place: ``Merged`` with ``report`` and a bit-exact ``undo()``.  To disk: the report.

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``; nothing was changed.
    """
    job = prepare(
        base, adapters, weights=weights, allow=allow, compat=compat, hub=hub, progress=progress if out else quiet
    )
    job.refuse()
    if out is not None:
        return job.write(out, threads=threads, progress=progress)
    if job.base.model is None:
        raise UsageError(
            "merging a checkpoint on disk needs a place for the result", "pass out=FOLDER, or a live model"
        )
    brought = job.adapters(load_registry())
    live = job.base.framework.parameters(job.base.model, job.base.index)
    local, parameters = local_parts(job.plan, live, brought)
    return merge_into(
        parameters,
        local,
        brought,
        threads=threads,
        progress=progress,
    )


def check(
    source: Given,
    base: Source | nn.Module | Base | None = None,
    *,
    runtime: str | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> CheckReport:
    """Say whether an adapter goes with a base, on six axes, with the evidence; refuses nothing, no torch.

    Args:
        source: the adapter.
        base: what to hold it against; None takes the base it records, unless ``runtime`` is given.
        runtime: a serving runtime to judge for ("vllm").
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    header = header_of(source, registry, hub=hub, progress=progress, compat=compat, whole=False)
    found: tuple[Finding, ...] = header.findings
    against = []
    judged = registry.runtime(runtime) if runtime is not None else None
    if base is not None or judged is None:
        job = prepare(base, {header.label: header}, allow=allow, compat=compat, hub=hub, progress=progress)
        found, against, header = job.findings, [str(job.base.index.ref)], job.headers[header.label]
    if judged is not None:
        found = (*found, *judged.judge(header))
        against.append(judged.title)
    return CheckReport.of(adapter=header.label, against=" and ".join(against), findings=found, allowed=tuple(allow))
