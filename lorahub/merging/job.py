"""A merge that is planned and judged: what it says of itself, and how it is written to disk.

It knows nothing of how adapters and bases are named and opened (``preparing``), and of live models only that they are
not written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from lorahub import __version__, checks, patching, strict_json
from lorahub.adapter import Adapter, AdapterHeader, open_deltas
from lorahub.adapter import load as load_tensors
from lorahub.bases.layers import shown
from lorahub.deltas.disputes import Compat
from lorahub.deltas.kind import JSON
from lorahub.engine.folding.bind import HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.writing.inplace import merge_in_place
from lorahub.engine.writing.ranks import ALONE, Ranks
from lorahub.engine.writing.staging import SINGLE
from lorahub.engine.writing.stream import stream_merge
from lorahub.engine.writing.where import HOST, Where
from lorahub.errors import Degraded, Incompatible, UsageError
from lorahub.fetching import Progress, quiet
from lorahub.files.digest import file_digest
from lorahub.findings import Finding, Verdict, worst
from lorahub.hub.contents import survey
from lorahub.merging.apart import Weight, plain
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub.record_fields import RecordPart
from lorahub.registry import Registry

__all__ = ["PROVENANCE", "Job", "demand_own_layers"]

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
        made: name -> changes of those adapters that lie in no file.
        parents: adapters whose tokenizer, processor and template files go along besides.
        rules: name -> the weight of an adapter whose changes have several, as it was asked for; it is in the plan, and
            1 in ``weights``.
    """

    base: Base
    headers: Mapping[str, AdapterHeader]
    weights: Mapping[str, float]
    plan: Plan
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...]
    compat: Compat | None = None
    made: Mapping[str, HasDeltas] = field(default_factory=lambda: MappingProxyType({}))
    parents: tuple[AdapterHeader, ...] = ()
    rules: Mapping[str, Weight] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def verdict(self) -> Verdict:
        """The worst finding that was not allowed."""
        return worst(self.findings, allowed=self.allowed)

    def pulled(self, progress: Progress = quiet) -> Job:
        """The same merge with its base on this machine; see ``Base.pulled``."""
        return replace(self, base=self.base.pulled(progress))

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
                "weight": plain(self.rules.get(name, self.weights[name])),
                "sha256": None if name in self.made else file_digest(header.folder / header.reading.file)[0],
                "recorded_name": known.name if known else None,
                "version": known.version if known else None,
                "license": known.license if known else None,
                "compat": header.reading.hints.get("compat") or self._inside(name),
                "recipe": _said(known.recipe) if known and known.recipe else None,
                "parents": [_said(each) for each in known.parents] if known else None,
            }
            adapters.append({key: value for key, value in said.items() if value not in (None, "", [])})
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

    def _in_files(self) -> list[AdapterHeader]:
        return [*self.parents, *(header for name, header in self.headers.items() if name not in self.made)]

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
        where: Where = HOST,
        ranks: Ranks = ALONE,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Stream the merged checkpoint to ``out``, with its config, tokenizer, processor and template files.

        Where ``out`` ends in ".safetensors" it is one file, whose header carries the provenance.  A base on a hub is
        fetched first.

        Raises:
            UsageError: the base is a live model, or ``out`` exists.
            WriteFailed: no space or no permission; nothing is left at ``out``.
            RankFailed: another of several processes failed or is gone.
        """
        if self.base.model is not None:
            raise UsageError("a live model cannot be merged to disk", "save it first, then merge the folder")
        self.refuse()
        base = self.base.pulled(progress)
        assert base.files is not None  # what is no live model has files
        single = Path(out).suffix == SINGLE
        companions: dict[str, bytes | Path] = {
            **_companions(base, self._in_files(), keep_base_tokenizer),
            PROVENANCE: strict_json.pretty(self.provenance()).encode(),
        }
        with self._opened() as adapters:
            return stream_merge(
                base.files,
                self.plan,
                adapters,
                Path(out),
                companions=None if single else companions,
                metadata={HEADER_KEY: strict_json.compact(self.provenance())} if single else None,
                threads=threads,
                where=where,
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
        where: Where = HOST,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Merge into the base's own files; either all that changes is written, or nothing.

        Args:
            keep_undo: keep the old bytes beside them, for ``lorahub.patching.undo``.
            keep_base_tokenizer: leave tokenizer, processor and template files as they are.
            settled: what ``patching.settle_base`` gave before this merge was planned: where that was this very merge,
                there is nothing left to do.
            threads: how many fold.
            where: what folds units.
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
        demand_own_layers(self, "files that are written in place keep their layout")
        said = {**self.provenance(), "earlier": [*patching.history(place)]}
        companions = _companions(self.base, self._in_files(), keep_base_tokenizer)
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
                where=where,
                progress=progress,
            )

    @contextmanager
    def _opened(self) -> Iterator[dict[str, HasDeltas]]:
        """The adapters, whose tensors are read when they are needed."""
        registry = load_registry()
        with ExitStack() as stack:
            yield {
                name: self.made[name] if name in self.made else stack.enter_context(open_deltas(each, registry))
                for name, each in self.headers.items()
            }


def demand_own_layers(job: Job, why: str) -> None:
    """Return where the model that results has the base's own layers.

    Raises:
        Incompatible: it is deeper than its base, and ``why`` says why there is no place for it.
    """
    if job.plan.repeated:
        raise Incompatible(
            f"{', '.join(job.headers)} is for a model that repeats layers {shown(job.plan.repeated.ranges)} of its "
            f"base, and {why}",
            "merge to disk (out=FOLDER, or lorahub merge ... -o FOLDER) and load the result",
        )


def _said(part: RecordPart) -> dict[str, JSON]:
    """A part of a record, without what is at its default."""
    said: dict[str, JSON] = part.model_dump(mode="json", exclude_defaults=True)
    return said


def _companions(base: Base, headers: Collection[AdapterHeader], keep_base: bool) -> dict[str, Path]:
    """File name -> where it comes from: the base's config and tokenizer files, an adapter's own winning."""
    assert base.files is not None
    result = {name: base.files.folder / name for name in base.framework.companions(base.files)}
    if not keep_base:
        for header in headers:
            own = (path for path, found in survey(header.folder).files.items() if found.role == "companion")
            result |= {path: header.folder / path for path in own if "/" not in path}
    return result
