"""Merging and checking, for scripts: plan and judge first, then do it in place or to disk."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from lorahub import __version__, checks, patching, strict_json
from lorahub.adapter import Adapter, AdapterHeader, OpenAdapter, open_deltas
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.bases.layers import ranges_of, shown
from lorahub.bases.repeated import repeated, why_not
from lorahub.bases.torch_module import held_parameters
from lorahub.deltas.disputes import Compat, as_compat
from lorahub.deltas.kind import JSON
from lorahub.engine.changing.merge import Arranged, Merged, merge_into
from lorahub.engine.changing.sharding import local_parts
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.planning.casting import cast as cast_plan
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.plan import plan as plan_merge
from lorahub.engine.report import MergeReport
from lorahub.engine.undoing.keeper import Policy
from lorahub.engine.undoing.reload import BaseRows
from lorahub.engine.writing.inplace import merge_in_place
from lorahub.engine.writing.ranks import ALONE, Ranks
from lorahub.engine.writing.staging import SINGLE
from lorahub.engine.writing.stream import stream_merge
from lorahub.errors import Degraded, Incompatible, Unavailable, UsageError
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

__all__ = ["PROVENANCE", "Job", "check", "merge", "named_weights", "plan", "prepare"]

PROVENANCE = "lorahub-merge.json"
"""The file in a merged folder that says what it was made of."""

HEADER_KEY = "lorahub-merge"
"""The same in the header of a merged checkpoint that is one file."""


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
            "mode": self.plan.mode,
            "allowed": [*sorted(self.allowed)],
            "findings": [*sorted({each.code for each in self.findings if each.level >= Verdict.UNVERIFIED})],
            **({"layers": [*self.plan.repeated.sources]} if self.plan.repeated else {}),
            "plan": self.plan.digest(),
        }

    def _inside(self, name: str) -> str | None:
        """The choice, where it decided where an adapter's weight goes."""
        terms = (term for step in self.plan.steps for term in step.terms if term.adapter == name)
        return self.compat if any(term.strength != 1 for term in terms) else None

    def adapters(self, registry: Registry) -> dict[str, Adapter]:
        """The adapters' tensors, under the base's names."""
        return {name: load_tensors(header, registry, index=header.index) for name, header in self.headers.items()}

    def write(
        self,
        out: str | os.PathLike[str],
        *,
        keep_base_tokenizer: bool = False,
        threads: int | None = None,
        ranks: Ranks = ALONE,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Stream the merged checkpoint to ``out``, with its config, tokenizer, processor and template files.

        Where ``out`` ends in ".safetensors" it is one file, whose header carries the provenance.

        Raises:
            UsageError: the base is a live model, or ``out`` exists.
            WriteFailed: no space or no permission; nothing is left at ``out``.
            RankFailed: another of several processes failed or is gone.
        """
        if self.base.files is None:
            raise UsageError("a live model cannot be merged to disk", "save it first, then merge the folder")
        self.refuse()
        single = Path(out).suffix == SINGLE
        companions: dict[str, bytes | Path] = {
            **_companions(self.base, self.headers.values(), keep_base_tokenizer),
            PROVENANCE: strict_json.pretty(self.provenance()).encode(),
        }
        with self._opened() as adapters:
            return stream_merge(
                self.base.files,
                self.plan,
                adapters,
                Path(out),
                companions=None if single else companions,
                metadata={HEADER_KEY: strict_json.compact(self.provenance())} if single else None,
                threads=threads,
                ranks=ranks,
                progress=progress,
            )

    def write_in_place(
        self,
        *,
        keep_undo: bool = False,
        keep_base_tokenizer: bool = False,
        settled: MergeReport | None = None,
        threads: int | None = None,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Merge into the base's own files; either all that changes is written, or nothing.

        Args:
            keep_undo: keep the old bytes beside them, for ``lorahub.patching.undo``.
            keep_base_tokenizer: leave tokenizer, processor and template files as they are.
            settled: what ``patching.settle_base`` gave before this merge was planned: where that was this very merge,
                there is nothing left to do.
            threads: how many fold.
            progress: called with (bytes done, bytes in all).

        Raises:
            UsageError: the base is a live model, or its files cannot stay laid out as they are.
            Degraded: an adapter is in the base already.
            WriteFailed: a file is shared (links, a hub's cache) or read-only, or there is no space.
        """
        if self.base.files is None or self.base.index.ref.repo:
            raise UsageError("only the files of a folder are merged into in place", "name a folder: --base FOLDER")
        place, folder = Path(self.base.index.ref.folder), self.base.files.folder
        brought = {name: file_digest(header.folder / header.reading.file)[0] for name, header in self.headers.items()}
        try:
            patching.demand_new(place, brought, self.allowed)
        except Degraded:
            if settled is not None:
                return settled
            raise
        self.refuse()
        _demand_own_layers(self, "files that are written in place keep their layout")
        said = {**self.provenance(), "earlier": [*patching.history(place)]}
        companions = _companions(self.base, self.headers.values(), keep_base_tokenizer)
        own = {name: path for name, path in companions.items() if path.parent != folder and place.is_dir()}
        small = {name: path.read_bytes() for name, path in own.items()}
        small[patching.provenance_name(place)] = strict_json.pretty(said).encode()
        with self._opened() as adapters:
            return merge_in_place(
                self.base.files,
                self.plan,
                adapters,
                companions=small,
                keep_undo=keep_undo,
                threads=threads,
                progress=progress,
            )

    @contextmanager
    def _opened(self) -> Iterator[dict[str, OpenAdapter]]:
        """The adapters, whose tensors are read when they are needed."""
        registry = load_registry()
        with ExitStack() as stack:
            yield {name: stack.enter_context(open_deltas(each, registry)) for name, each in self.headers.items()}


def _demand_own_layers(job: Job, why: str) -> None:
    """Refuse a deeper model where there is no place for it."""
    if job.plan.repeated:
        raise Incompatible(
            f"{', '.join(job.headers)} is for a model that repeats layers {shown(job.plan.repeated.ranges)} of its "
            f"base, and {why}",
            "merge to disk (out=FOLDER, or lorahub merge ... -o FOLDER) and load the result",
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


def named_weights(
    adapters: Mapping[str, Given] | Sequence[Source], weights: Sequence[float] | Mapping[str, float] | None = None
) -> dict[str, tuple[Given, float]]:
    """Adapters by name with the weight that is asked for, or that their reference carries.

    Raises:
        UsageError: a weight too many or too few, for an unknown name, or no finite number.
    """
    named = _named(adapters)
    chosen = _weights(list(named), weights, {name: weight for name, (_, weight) in named.items()})
    return {name: (source, chosen[name]) for name, (source, _) in named.items()}


def prepare(
    base: Source | nn.Module | Base | None,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
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
        mode: how sums are made and rounded; see ``merge``.
        dtype: what the result is stored in; see ``merge``.
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

    def read(index: BaseIndex) -> dict[str, AdapterHeader]:
        return {
            name: header_of(source, registry, hub=hub, progress=progress, index=index, compat=choice)
            for name, (source, _) in named.items()
        }

    headers = read(opened.index)
    index = _deepened(opened.index, headers.values())
    if index is not opened.index:
        headers = read(index)
    planned = plan_merge(
        index,
        opened.framework,
        {name: (header, chosen[name]) for name, header in headers.items()},
        registry.kinds,
        allow=tuple(allow),
        compat=choice,
        mode=mode,
    )
    planned = planned if dtype is None else cast_plan(planned, index, dtype)
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


def _deepened(index: BaseIndex, headers: Collection[AdapterHeader]) -> BaseIndex:
    """The index of the deeper model that all adapters are for; the base's own where they agree on none."""
    asked = {ranges_of(header.reading.hints) for header in headers}
    ranges = asked.pop() if len(asked) == 1 else ()
    return repeated(index, ranges) if ranges and why_not(index, ranges) is None else index


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
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
) -> Plan:
    """What merging would do, from headers alone: print ``plan(...).explain()``."""
    return prepare(base, adapters, weights=weights, allow=allow, compat=compat, mode=mode, dtype=dtype, hub=hub).plan


@overload
def merge(
    base: Source | nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    out: None = None,
    undo: Policy = "auto",
    origin: Source | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
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
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = quiet,
) -> MergeReport: ...


@overload
def merge(
    base: Source,
    adapters: Mapping[str, Given] | Sequence[Source],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    in_place: Literal[True],
    keep_undo: bool = False,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
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
    in_place: bool = False,
    keep_undo: bool = False,
    undo: Policy = "auto",
    origin: Source | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = quiet,
) -> Merged | MergeReport:
    """Merge adapters into a base: a live model in place, a folder to a new folder ``out``, or into the folder itself.

    Every parameter becomes ``W0 + sum of weight * delta(W0)``, rounded once.  All parameters change or none does.

    Args:
        base: a live model (merged in place) or a folder, file or ``ns/name[@COMMIT]`` (then ``out`` is needed).
        adapters: name -> adapter, or a list of references.
        weights: one per adapter; 1 by default, or the weight in the reference.
        out: the new checkpoint's folder, or its one file (``.safetensors``); must not exist.
        in_place: write to the base's own files, only what changes; a run that was killed is completed by the next
            merge in place there, or has changed nothing.
        keep_undo: with ``in_place``: keep the old bytes beside them, for ``lorahub merge --undo FOLDER``.
        undo: of a live model: what ``Merged.undo`` and ``Merged.swap`` need is kept as a "copy" of each changed weight,
            in a "journal" of what taking the change off gets wrong (a few percent of that; where the change looks at
            the weight or is large, a copy), as copies on the "host" for weights on a GPU, or "reload" reads the files
            at ``origin`` again.  "auto" takes the fastest that leaves half of the free memory; "none" keeps nothing.
        origin: where the live model's weights lie, for undo="reload"; None takes the base that the first adapter
            records.  They are compared bit for bit before anything changes.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        mode: "fast": at least 99.99 % of the elements equal the float64 result rounded once.  "exact": all of them do,
            on every machine alike.  "peft", "peft-safe": the bits of PEFT's ``merge``, default and ``safe_merge``, for
            LoRA.  "stochastic(SEED)": rounded up or down at random, so that small changes survive on average.
        dtype: on disk: every floating-point parameter of the result is stored in "bfloat16", "float16" or "float32",
            also where no adapter changes it.  8-bit tensors and buffers stay as they are.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        ranks: with ``out``: this process among several that were started alike, as ``Ranks.from_environment()`` says.
        progress: called with (done, in all): parameters in place, bytes on disk.

    Returns:
        In place: ``Merged`` with ``report`` and a bit-exact ``undo()``.  To disk: the report.

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``; nothing was changed.
    """
    if in_place and (out is not None or not isinstance(base, str | os.PathLike | Ref)):
        raise UsageError("in_place is for a folder, and has no other place for the result", "leave one of them out")
    if dtype is not None and out is None:
        raise UsageError(
            f"a merge in place keeps the dtype of what it merges into, and cannot store {dtype}",
            "merge to disk (out=FOLDER), or give the model that dtype first: model.to(...)",
        )
    settled = patching.settle_base(base) if in_place and isinstance(base, str | os.PathLike | Ref) else None
    job = prepare(
        base,
        adapters,
        weights=weights,
        allow=allow,
        compat=compat,
        mode=mode,
        dtype=dtype,
        hub=hub,
        progress=progress if out else quiet,
    )
    if in_place:
        return job.write_in_place(keep_undo=keep_undo, settled=settled, threads=threads, progress=progress)
    job.refuse()
    if out is not None:
        return job.write(out, threads=threads, ranks=ranks, progress=progress)
    if job.base.model is None:
        raise UsageError(
            "merging a checkpoint on disk needs a place for the result", "pass out=FOLDER, or a live model"
        )
    _demand_own_layers(job, "a live model has the layers that it has")
    keeping = Keeping(policy=undo, base=_base_rows(job, origin, progress) if undo == "reload" else None)

    def again(others: Any, factors: Any, allowed: Collection[str]) -> Arranged:
        codes = {*allow, *allowed}
        given = adapters if others is None else others
        other = prepare(job.base, given, weights=factors, allow=codes, compat=compat, mode=mode, hub=hub)
        other.refuse()
        return _arranged(other)

    arranged = _arranged(job)
    return merge_into(
        arranged.parameters,
        arranged.plan,
        arranged.adapters,
        held=arranged.held,
        threads=threads,
        progress=progress,
        keeping=keeping,
        again=again,
    )


def _arranged(job: Job) -> Arranged:
    """A judged merge into a live model, with its tensors."""
    model, index = job.base.model, job.base.index
    assert model is not None
    brought = job.adapters(load_registry())
    local, parameters = local_parts(job.plan, job.base.framework.parameters(model, index), brought)
    return Arranged(parameters=parameters, plan=local, adapters=brought, held=held_parameters(model, index))


def _base_rows(job: Job, origin: Source | None, progress: Progress) -> BaseRows:
    """The files that a live model's weights came from."""
    base = _open_recorded(next(iter(job.headers.values())), progress) if origin is None else open_base(origin)
    if base.files is None:
        raise UsageError("origin is a live model", "name the folder that its weights were loaded from")
    return BaseRows(base.files, base.index)


def _against(job: Job) -> str:
    """The base, and what is made of it where the adapter is for a deeper model."""
    ref, deeper = str(job.base.index.ref), job.plan.repeated
    if deeper is None:
        return ref
    return f"{ref}, its {deeper.depth} layers made {len(deeper.sources)} ({shown(deeper.ranges)})"


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
        found, against, header = job.findings, [_against(job)], job.headers[header.label]
    if judged is not None:
        found = (*found, *judged.judge(header))
        against.append(judged.title)
    return CheckReport.of(adapter=header.label, against=" and ".join(against), findings=found, allowed=tuple(allow))
