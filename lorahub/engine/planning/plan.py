"""The list of changes that merging adapters into a base means, computed from names and shapes alone.

A plan reads no weights: it can be printed, checked and digested before anything is loaded, and both the in-memory
and the streaming engine execute it, so their results agree bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layers import Repetition, ranges_of, shown
from lorahub.bases.repeated import why_not
from lorahub.deltas.disputes import CHOSEN, Compat
from lorahub.deltas.kind import JSON, Kind
from lorahub.engine.folding.windows import ARITHMETIC
from lorahub.engine.planning.assemble import Given, assemble
from lorahub.engine.planning.explain import explain
from lorahub.engine.planning.place import place
from lorahub.engine.planning.steps import Form, Step, Term
from lorahub.engine.rounding.table import read_mode
from lorahub.engine.undoing.choice import held_bytes
from lorahub.engine.undoing.keeper import Policy
from lorahub.errors import BaseMismatch, Degraded, UsageError
from lorahub.files.dtypes import nbytes
from lorahub.findings import Finding, Verdict, worst
from lorahub.formats.format import Reading
from lorahub.formats.on_demand import KEPT
from lorahub.formats.pages import FEWEST

__all__ = ["Form", "Header", "Plan", "Step", "Term", "plan"]

_BUFFERS = 72 << 20  # bytes a thread that reads and writes takes for pieces of files, and its allocator keeps


class Header(Protocol):
    """What is needed of an adapter: what its files say, without its weights."""

    @property
    def reading(self) -> Reading:
        """What its format made of them, under the base's names."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything there is to say before a base is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a merge will do.

    Attributes:
        base: which base.
        framework: the framework that named its parameters.
        adapters: (name, weight) in the order they were given, those at weight 0 included.
        steps: parameters that change, in canonical order.
        untouched: parameters that are copied as bytes.
        untouched_bytes: how many.
        removed: parameters the result no longer has.
        dropped: names in the base's files that are left out: of removed parameters, and outdated second copies.
        renamed: name in the base's files -> name in the result's, for what is copied.
        reads: parameter that a change looks at besides its own -> its name in the base's files.
        repeated: how the result's layers come from the base's, where it is deeper than that; or None.
        config_edits: what changes in ``config.json``.
        config_before: the values it has there now; absent ones are left out.
        findings: everything there is to say, allowed or not.
        allowed: the finding codes that were allowed.
        mode: how sums are made and rounded, as spelled in ``rounding.table``.
    """

    base: BaseRef
    framework: str
    adapters: tuple[tuple[str, float], ...] = ()
    steps: tuple[Step, ...]
    untouched: tuple[str, ...]
    untouched_bytes: int = 0
    removed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    reads: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    repeated: Repetition | None = None
    config_edits: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    config_before: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    findings: tuple[Finding, ...] = ()
    allowed: tuple[str, ...] = ()
    mode: str = "fast"

    @property
    def verdict(self) -> Verdict:
        """The worst finding that was not allowed."""
        return worst(self.findings, allowed=self.allowed)

    @property
    def words(self) -> int | None:
        """The number of words that the result knows, where the plan changes it."""
        inner = self.config_edits.get("text_config")
        said = [each.get("vocab_size") for each in (self.config_edits, inner) if isinstance(each, Mapping)]
        return next((size for size in said if isinstance(size, int)), None)

    def check(self) -> None:
        """Return where the plan may be executed; raise what its findings demand where not.

        Raises:
            BaseMismatch: it cannot be done.
            Degraded: part of the adapters would be lost; the hint says how to accept that.
        """
        if self.verdict < Verdict.DEGRADED:
            return
        stopping = tuple(each for each in self.findings if worst([each], allowed=self.allowed) >= Verdict.DEGRADED)
        names = " and ".join(f"'{name}'" for name, _ in self.adapters)
        message = f"{names} into {self.base}: {'; '.join(each.message for each in stopping)}"
        if self.verdict is Verdict.INCOMPATIBLE:
            raise BaseMismatch(message, next((each.remedy for each in stopping if each.remedy), ""), stopping)
        codes = dict.fromkeys(each.code for each in stopping)
        raise Degraded(message, f"to go on all the same: {' '.join(f'--allow {code}' for code in codes)}", stopping)

    def peak_bytes(self, *, streamed: bool = True, threads: int = 1, undo: Policy = "copy") -> int:
        """About how much memory executing the plan takes beyond what is held already, from headers.

        Args:
            streamed: from disk to disk; else in a live model.
            threads: how many fold at a time.
            undo: what a merge into a live model keeps, as for ``lorahub.merge``.
        """
        sizes = {(term.adapter, term.target): 0 for step in self.steps for term in step.terms}
        for term in (term for step in self.steps for term in step.terms):  # of a target in several places, one has it
            sizes[term.adapter, term.target] = max(sizes[term.adapter, term.target], term.nbytes)
        adapters = min(sum(sizes.values()), KEPT) if streamed else sum(sizes.values())
        largest = max((0 if streamed and _by_rows(step) else _brought(step) for step in self.steps), default=0)
        working = [step.scratch_bytes + (step.unit_bytes if streamed else 0) for step in self.steps]
        held = 0 if streamed else held_bytes(self.steps, undo)
        # factors are cast to the dtype of the sums, which is at most four times as wide, one parameter a thread
        buffers = _BUFFERS * threads if streamed else 0
        return adapters + held + sum(sorted(working)[-threads:]) + 4 * largest * threads + buffers

    def document(self) -> dict[str, JSON]:
        """The plan as JSON-ready values: everything the result depends on, then what there is to say about it."""
        return {
            **self._recipe(),
            "base": str(self.base),
            "digest": self.digest(),
            "untouched": len(self.untouched),
            "verdict": str(self.verdict),
            "allowed": list(self.allowed),
            "findings": [finding.code for finding in self.findings],
        }

    def digest(self) -> str:
        """``sha256:`` over all that the result depends on besides the weights themselves: what resuming compares."""
        text = json.dumps(self._recipe(), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def explain(self) -> str:
        """The plan as an aligned table for people."""
        return explain(self)

    def _recipe(self) -> dict[str, JSON]:
        return {
            "arithmetic": ARITHMETIC,
            "mode": self.mode,
            "framework": self.framework,
            "adapters": [[name, weight] for name, weight in self.adapters],
            "steps": [step.document() for step in self.steps],
            "removed": list(self.removed),
            "dropped": list(self.dropped),
            "renamed": dict(self.renamed),
            **({"layers": list(self.repeated.sources)} if self.repeated else {}),
            "config_edits": dict(self.config_edits),
        }


def plan(
    index: BaseIndex,
    framework: Framework,
    adapters: Mapping[str, tuple[Header, float]],
    kinds: Mapping[str, Kind],
    *,
    allow: Collection[str] = (),
    compat: Compat | None = None,
    mode: str = "fast",
) -> Plan:
    """Work out what merging ``adapters`` into a base means; pure, and refuses nothing that findings can say.

    Args:
        index: the base.
        framework: the one that made the index.
        adapters: name -> (header, weight), in the order in which changes are added.
        kinds: by name.
        allow: finding codes to accept.
        compat: under "peft", a weight goes into the factors of changes that PEFT scales there.
        mode: how sums are made and rounded; see ``rounding.table``.

    Raises:
        UsageError: no adapter, a weight that is no finite number, or no mode.
    """
    if not adapters:
        raise UsageError("no adapter was given, so there is nothing to merge")
    given: list[Given] = []
    findings: list[Finding] = []
    for name, (header, weight) in adapters.items():
        findings += header.findings
        if _number(name, weight) == 0:
            findings.append(_about("weight-zero", f"'{name}' has weight 0 and changes nothing"))
            continue
        about = _layers(name, header, index)
        findings += [about] if about else []
        if about and about.level is Verdict.INCOMPATIBLE:
            continue
        placement = place(
            header.reading.groups, kinds, index, framework, shared=header.reading.shared, hints=header.reading.hints
        )
        stopped = any(each.level is Verdict.INCOMPATIBLE for each in header.findings)  # then that is why nothing lands
        findings += [each for each in placement.findings if not (stopped and each.code == "nothing-lands")]
        given.append(
            Given(
                name=name,
                weight=float(weight),
                placement=placement,
                inside=compat == "peft",
                together=header.reading.hints.get("compat") == "peft",
            )
        )
        findings += _bent(given[-1])
    whole = assemble(given, index, framework)
    if not whole.steps and not any(each.level is Verdict.INCOMPATIBLE for each in findings):
        findings.append(
            _about("nothing-lands", "no adapter changes anything: the result is the base", Verdict.UNVERIFIED)
        )
    outs = {step.out for step in whole.steps} | set(whole.removed)
    untouched = [name for name in index.parameters if name not in outs]
    return Plan(
        base=index.ref,
        framework=framework.name,
        adapters=tuple((name, float(weight)) for name, (_, weight) in adapters.items()),
        steps=whole.steps,
        untouched=tuple(untouched),
        untouched_bytes=sum(nbytes(index.parameters[name].dtype, index.parameters[name].shape) for name in untouched),
        removed=whole.removed,
        dropped=whole.dropped,
        renamed=whole.renamed,
        reads=whole.reads,
        repeated=index.repeated,
        config_edits=whole.config,
        config_before={key: index.config[key] for key in whole.config if key in index.config},
        findings=tuple(dict.fromkeys([*findings, *whole.findings, *_unfit(mode, whole.steps, index)])),
        allowed=tuple(allow),
        mode=read_mode(mode).spelled,
    )


def _unfit(mode: str, steps: Sequence[Step], index: BaseIndex) -> list[Finding]:
    """What a mode cannot keep its promise for, by name."""
    chosen = read_mode(mode)
    roles = {name: info.role for name, info in index.parameters.items()}
    named = {step.out: roles.get(step.out, roles.get(step.source or "", "")) for step in steps}
    faults = {step.out: fault for step in steps if (fault := chosen.fault(step, named[step.out]))}
    if not faults:
        return []
    name, fault = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return [
        Finding(
            code="mode-unfit",
            axis="policy",
            level=Verdict.INCOMPATIBLE,
            message=f"mode {chosen.spelled} cannot keep its promise for {name}{more}: {fault}",
            where=tuple(faults),
            remedy="merge in another mode: --mode fast",
        )
    ]


def _brought(step: Step) -> int:
    """Bytes of the adapters' tensors for a step."""
    return sum(term.nbytes for term in step.terms)


def _by_rows(step: Step) -> bool:
    """Whether what a step adds is one large tensor that is read row by row (see ``formats.pages``)."""
    term = step.terms[0] if len(step.terms) == 1 else None
    return bool(term and term.windowed and term.rank is None and term.nbytes >= FEWEST)


def _number(name: str, weight: object) -> float:
    if isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight):
        return float(weight)
    raise UsageError(f"the weight of '{name}' is {weight!r}, which is no finite number", "give one like 0.8")


def _layers(name: str, header: Header, index: BaseIndex) -> Finding | None:
    """A line on a model with layers of its base repeated, or why this base is not planned as the adapter's."""
    asked, repeated = ranges_of(header.reading.hints), index.repeated
    if repeated and asked == repeated.ranges:
        count = len(repeated.sources)
        message = (
            f"'{name}' is for a model of {count} layers made of the base's {repeated.depth}: {shown(asked)}; the "
            f"result stores all of them, {repeated.layers.path}.0 to {repeated.layers.path}.{count - 1}"
        )
        return _about("layers-repeated", message)
    if not asked and not repeated:
        return None
    if asked and not repeated and (against := why_not(index, asked)):
        return against
    of = f"layers {shown(asked)} of its base" if asked else "the base as it is"
    here = f"layers {shown(repeated.ranges)}" if repeated else "the base's own layers"
    message = f"'{name}' is for {of}, and this merge is planned for {here}: one result cannot be both"
    return Finding(
        code="layers-differ",
        axis="placement",
        level=Verdict.INCOMPATIBLE,
        message=message,
        where=(name,),
        remedy="merge them one by one, into two results",
    )


def _bent(given: Given) -> list[Finding]:
    """A line on kinds that look at the weight, where only a part of their change is asked for."""
    touches = {placed.kind: placed.touch for placed in given.placement.placed}
    kinds = sorted(kind for kind, touch in touches.items() if not (touch.additive or touch.replaces))
    if given.weight == 1 or not kinds:
        return []
    inside = [kind for kind in kinds if given.inside and touches[kind].inside]
    found = []
    if inside:
        message = f"compat peft: weight {given.weight:g} multiplies the factors of '{given.name}' ({', '.join(inside)})"
        found.append(_about(CHOSEN, f"{message}, inside the norm, and not its change"))
    if linear := [kind for kind in kinds if kind not in inside]:
        message = (
            f"weight {given.weight:g} multiplies the whole change that '{given.name}' makes by {', '.join(linear)}; "
            "tools that scale its factors instead get other numbers"
        )
        found.append(_about("weight-is-linear", message))
    return found


def _about(code: str, message: str, level: Verdict = Verdict.EXACT) -> Finding:
    return Finding(code=code, axis="placement", level=level, message=message)
