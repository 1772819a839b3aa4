"""A composition that is opened and judged: what it would take, and the adapter or checkpoint that it makes.

The result carries its recipe and its parents, and nobody's folders.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lorahub.adapter import Adapter, AdapterHeader, open_header, save
from lorahub.bases.layers import ranges_of
from lorahub.bases.layout import Target
from lorahub.composing.adding import content_of, header_of_uncut, job_of, shapes_of
from lorahub.composing.asked import Request
from lorahub.composing.ingredients import Held, Opened, base_weights, holding, judge, open_one
from lorahub.composing.provenance import about_bases, begun, hints, portable, recipe_digest, settings
from lorahub.composing.result import Composed, ComposeReport, Home, lost
from lorahub.composing.spelling import layout_of, spelled
from lorahub.composition.algebra.budgeting import Shared, budget_of
from lorahub.composition.algebra.truncate import Budget
from lorahub.composition.combining import Combined, Part, combine, methods_for, whole_for
from lorahub.composition.explaining import Outline, Seen, outline, seen
from lorahub.composition.gathering import seed_of
from lorahub.composition.method import Method, SumMethod
from lorahub.composition.uncut import Uncut, addable
from lorahub.composition.weights.resolve import parameters_of, weights_of
from lorahub.deltas.delta import Delta
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON
from lorahub.descent import derived, new_folder, written
from lorahub.engine.crew import crew_size
from lorahub.engine.report import MergeReport
from lorahub.errors import CannotCarry, UsageError
from lorahub.fetching import Progress, quiet
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch
from lorahub.merging.preparing import prepare
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.recipe import Ingredient, Recipe
from lorahub.records import AdapterRecord
from lorahub.registry import Registry
from lorahub.saving import carries

__all__ = ["Composition", "prepare_composition"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A composition that is opened and judged, and not yet made.

    Attributes:
        request: the recipe, and where its adapters are.
        registry: kinds, formats and methods.
        method: how changes become one.
        base: the base, or None.
        opened: the adapters, in order.
        findings: everything there is to say of them.
        allowed: codes that were accepted.
    """

    request: Request
    registry: Registry
    method: type[Method]
    base: Base | None
    opened: tuple[Opened, ...]
    findings: tuple[Finding, ...]
    allowed: frozenset[str]

    @property
    def recipe(self) -> Recipe:
        """The document."""
        return self.request.recipe

    @property
    def accepted(self) -> tuple[str, ...]:
        """Codes of the findings that would have stopped it, and were allowed; sorted."""
        stopping = {each.code for each in self.findings if each.allowable and each.level >= Verdict.DEGRADED}
        return tuple(sorted(stopping & self.allowed))

    def outline(self) -> Outline:
        """What it would take, from headers alone.

        Raises:
            RecipeError: a weight or a parameter speaks of what is not there.
            UsageError: an adapter was made in memory and has no header.
        """
        headers = [each.header for each in self.opened if each.header is not None]
        if len(headers) < len(self.opened):
            raise UsageError("an adapter that was made in memory has no header to explain", "save it first")
        targets = [tuple(header.touches) for header in headers]
        budget = _budget(self.recipe)
        return outline(
            [_seen(each, self.registry) for each in self.opened if each.header is not None],
            [header.label for header in headers],
            self._methods(targets).__getitem__,
            self._weights(targets),
            rank=budget.rank if isinstance(budget, Budget) else None,
            undecided=isinstance(budget, Shared) or (budget is not None and budget.demands),
            item=_BYTES[self.recipe.dtype or "float32"],
        )

    def make(
        self, out: str | os.PathLike[str] | None = None, *, threads: int | None = None, progress: Progress = quiet
    ) -> Composed:
        """Compute the adapter and write it.

        Args:
            out: a new folder; None: a temporary one, which lives as long as the result.
            threads: how many; the result does not depend on it.
            progress: called with (targets done, in all).

        Raises:
            BaseMismatch, BaseNeeded, UnsupportedKind, CannotCarry: the adapters do not go together; the target is
                named.
            NotFinite: NaN or infinity, or the result does not fit into its dtype.
            WriteFailed: ``out`` exists, or there is no space.
        """
        start = time.perf_counter()
        folder = new_folder(out) if out is not None else None
        with holding(self.opened, self.registry) as held, base_weights(self.base, held) as weight:
            targets = [tuple(each.deltas) for each in held]
            found = combine(
                self._parts(held, targets),
                self._methods(targets).__getitem__,
                _budget(self.recipe),
                dtype=getattr(torch, self.recipe.dtype or "float32"),
                threads=crew_size(threads),
                mode=self.recipe.non_additive,
                base=weight,
                progress=progress,
            )
        return self._kept(found, self._parents(held), folder, start)

    def pulled(self, progress: Progress = quiet) -> Composition:
        """The same with its base on this machine; see ``Base.pulled``."""
        return replace(self, base=self.base.pulled(progress)) if self.base is not None else self

    def merge(
        self, out: str | os.PathLike[str], *, threads: int | None = None, progress: Progress = quiet
    ) -> MergeReport:
        """Merge the result into the base, streaming; one pass over the base.

        A plain weighted sum goes in adapter by adapter, and whatever their kinds; what another method makes goes in as
        it is; both in one rounding.  With a budget, or by a method that cuts, it becomes one adapter first.

        Args:
            out: a new folder, or a file that ends in ".safetensors".
            threads: how many; the result does not depend on it.
            progress: called with (bytes done, in all).

        Raises:
            UsageError: no base is named, or ``out`` exists.
            Degraded, Incompatible, BaseMismatch: the adapters do not fit the base.
        """
        if self.base is None:
            raise UsageError("a checkpoint is made of a base, and none is named", "--base FOLDER or NS/NAME[@COMMIT]")
        weights = self._plain_sum()
        if weights is not None and all(each.header is not None for each in self.opened):
            labels = self.recipe.labels()
            headers = {
                label: each.header for label, each in zip(labels, self.opened, strict=True) if each.header is not None
            }
            job = prepare(self.base, headers, weights=weights, allow=self.allowed, compat=self.recipe.compat)
            return job.write(out, threads=threads, progress=progress)
        if _budget(self.recipe) is None and not self.method.cut and not any(map(_layers, self.opened)):
            return self._merged_uncut(self.base, out, threads, progress)
        with tempfile.TemporaryDirectory(prefix="lorahub-") as place:
            made = self.make(Path(place) / self.recipe.method, threads=threads)
            job = prepare(self.base, {self.recipe.method: made}, allow=self.allowed)
            report = replace(job, parents=self._headers()).write(out, threads=threads, progress=progress)
            return replace(report, findings=(*report.findings, *_cut(self.recipe.method, made.report.error)))

    def _merged_uncut(
        self, base: Base, out: str | os.PathLike[str], threads: int | None, progress: Progress
    ) -> MergeReport:
        """Merge what the method makes, when it is added; what is no sum of matrices is made before."""
        name, mode = self.recipe.method, self.recipe.non_additive
        with holding(self.opened, self.registry) as held, base_weights(base, held) as weight:
            assert weight is not None  # there is a base
            targets = [tuple(each.deltas) for each in held]
            parts, of = self._parts(held, targets), self._methods(targets)
            methods = methods_for(parts, of.__getitem__)
            whole = whole_for(parts, methods, mode, weight)
            shapes = shapes_of(base, parts, addable(parts, mode, weight))
            apart = [replace(part, without=part.without | shapes.keys()) for part in parts]
            found = combine(
                apart,
                of.__getitem__,
                None,
                dtype=torch.float32,
                threads=crew_size(threads),
                mode=mode,
                base=weight,
                whole=whole,
            )
            rest = found.deltas
            record = self._record([*shapes, *rest], self._parents(held))
            header = header_of_uncut(
                name, shapes, rest, record, base.index, hints(self.opened, base.index, rest), self.registry.kinds
            )
            uncut = Uncut(
                parts, shapes, methods, content=content_of(record), rest=rest, mode=mode, base=weight, whole=whole
            )
            job = job_of(base, header, self.registry, allow=self.allowed)
            job = replace(job, made={name: uncut}, parents=self._headers())
            report = job.write(out, threads=threads, progress=progress)
        return replace(report, findings=(*report.findings, *_cut(name, lost(found.rows))))

    def _headers(self) -> tuple[AdapterHeader, ...]:
        return tuple(each.header for each in self.opened if each.header is not None)

    def _parents(self, held: Sequence[Held]) -> list[dict[str, JSON]]:
        """The adapters as a record names parents."""
        return [
            one.parent(each.content, _single(ingredient))
            for one, each, ingredient in zip(self.opened, held, self.recipe.adapters, strict=True)
        ]

    def _plain_sum(self) -> list[float] | None:
        """The adapters' weights where all of it is their weighted sum, uncut; else None."""
        weights = [_single(each) for each in self.recipe.adapters]
        if not issubclass(self.method, SumMethod) or self.method.cut or _budget(self.recipe) is not None:
            return None
        settings = {**self.method.defaults(), **self.recipe.parameters}
        plain = all(isinstance(value, bool | int | float) for value in settings.values())
        known = [weight for weight in weights if weight is not None]
        if not plain or len(known) < len(weights) or any(each.parameters for each in self.recipe.adapters):
            return None
        method = self.method.made(settings)
        return [float(weight) for weight in method.coefficients(known)]

    def _weights(self, targets: Sequence[Sequence[Target]]) -> list[dict[Target, float]]:
        return weights_of(self.recipe, targets, self.base.index if self.base else None)

    def _parts(self, held: Sequence[Held], targets: Sequence[Sequence[Target]]) -> list[Part]:
        return [
            Part(
                label=one.label,
                deltas=each.deltas,
                weights=own,
                seed=seed_of(self.recipe.seed, each.content),
                elsewhere=_single(ingredient) or 0.0,
                without=one.without(self.base),
            )
            for one, each, own, ingredient in zip(
                self.opened, held, self._weights(targets), self.recipe.adapters, strict=True
            )
        ]

    def _methods(self, targets: Sequence[Sequence[Target]]) -> Mapping[Target, Method]:
        """The method for every target; equal parameters are one object."""
        every = dict.fromkeys(target for own in targets for target in own)
        index = self.base.index if self.base else None
        found = parameters_of(self.recipe, every, index, defaults=self.method.defaults())
        made = {id(each): self.method.made(each) for each in found.values()}
        return {target: made[id(each)] for target, each in found.items()}

    def _record(self, targets: Collection[Target], parents: Sequence[Mapping[str, JSON]]) -> AdapterRecord:
        """What is recorded of a result that changes these."""
        text = portable(self.recipe, self.opened, self.accepted)
        return derived(
            begun(self.opened, targets),
            self.recipe.method,
            settings(self.recipe, self.accepted),
            parents,
            seed=self.recipe.seed if self.method.draws else None,
            text=text,
            digest=recipe_digest(text, parents),
        )

    def _kept(
        self, found: Combined, parents: Sequence[Mapping[str, JSON]], folder: Path | None, start: float
    ) -> Composed:
        """The result, written and read back."""
        if not found.deltas:
            raise UsageError("the budget leaves nothing of any target", "give more parameters, or a rank")
        layout = self.recipe.format or layout_of(found.deltas, self.opened)
        record = self._record(found.deltas, parents)
        home = Home() if folder is None else None
        place = folder or (home.path if home else Path()) / self.recipe.method
        told = hints(self.opened, self.base.index if self.base else None, found.deltas)
        try:
            deltas, said = self._spelled(found, told, layout)
            made = Adapter(deltas=deltas, record=record, hints=said)
            save(made, place, registry=self.registry, format=layout)
        except CannotCarry as error:
            raise self._with_a_way(error, found, told, layout) from None
        report = ComposeReport(
            out=os.fspath(place),
            method=self.recipe.method,
            rows=found.rows,
            findings=(*self.findings, *about_bases(self.opened)),
            seconds=time.perf_counter() - start,
            bytes_written=written(place),
            settings=settings(self.recipe, self.accepted),
        )
        header = open_header(place, self.registry)
        return Composed(deltas=found.deltas, record=header.record, hints=told, header=header, report=report, home=home)

    def _spelled(
        self, found: Combined, told: Mapping[str, JSON], layout: str
    ) -> tuple[Mapping[Target, Delta], Mapping[str, JSON]]:
        """The result and its hints in the words of a format."""
        return spelled(found.deltas, told, layout, self.opened, self.base.index if self.base else None)

    def _with_a_way(self, error: CannotCarry, found: Combined, told: Mapping[str, JSON], layout: str) -> CannotCarry:
        """The refusal of a format, with what to ask for instead."""
        if error.hint:
            return error
        if any(isinstance(delta, Full) and delta.diff.dim() > 1 for delta in found.deltas.values()):
            hint = "make factors of what has none: --rank R, or --energy 0.999"
        elif others := [each for each in _OFFERED if each != layout and self._carried(found, told, each)]:
            hint = f"choose a format that has a word for it: --format {' or '.join(others)}"
        else:
            hint = "compose those of one kind at a time, or merge side by side: lorahub merge A B --base BASE -o FOLDER"
        return CannotCarry(error.message, hint, error.findings)

    def _carried(self, found: Combined, told: Mapping[str, JSON], layout: str) -> bool:
        """Whether the result could be written in another format."""
        try:
            deltas, said = self._spelled(found, told, layout)
        except CannotCarry:
            return False
        return carries(deltas, registry=self.registry, format=layout, hints=said)


def prepare_composition(
    request: Request,
    *,
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = quiet,
) -> Composition:
    """Open and judge what was asked for; headers only, nothing is computed.

    Args:
        request: see ``requested``.
        allow: finding codes to accept besides the recipe's own.
        hub: path of a folder hub.
        progress: called with (bytes fetched, in all).

    Raises:
        UsageError: there is no such method.
        NotFound, Unavailable, UnsupportedFormat, IntegrityError: an adapter or the base cannot be had.
        Degraded, Incompatible, BaseMismatch: they do not go together.
    """
    recipe, registry = request.recipe, load_registry()
    method = registry.method(recipe.method)
    method.demand_known({name for each in recipe.adapters for name in each.parameters})
    _budget(recipe)
    if all(_single(each) == 0 for each in recipe.adapters):
        raise UsageError("every weight is 0, so nothing would be left", "give one adapter another weight")
    allowed = frozenset({*allow, *recipe.allow})
    base = open_base(request.base, digest=True, hub=hub, progress=progress) if request.base is not None else None
    opened = tuple(
        open_one(
            source,
            registry,
            label=label,
            hub=hub,
            base=base,
            compat=recipe.compat,
            progress=progress,
        )
        for label, source in zip(recipe.labels(), request.sources, strict=True)
    )
    findings = judge(opened, base, allow=allowed, compat=recipe.compat)
    return Composition(
        request=request,
        registry=registry,
        method=method,
        base=base,
        opened=opened,
        findings=findings,
        allowed=allowed,
    )


_OFFERED = ("peft", "diffusers", "kohya")
"""Formats that are read most widely."""


def _budget(recipe: Recipe) -> Budget | Shared | None:
    asked = recipe.budget()
    if recipe.adaptive or any(value is not None for name, value in asked.items() if name != "adaptive"):
        return budget_of(**asked)
    return None


def _seen(one: Opened, registry: Registry) -> Mapping[Target, Seen]:
    """What an adapter does to each target, under the base's names where there is one."""
    assert one.header is not None
    found = seen(one.header, registry.kinds)
    home = one.home
    if home is None or not home.moved:
        return found
    result: dict[Target, Seen] = {}
    for target, sources in home.sources.items():
        read = [found[source] for source in sources if source in found]
        shape = home.shape(target)
        for each in read:
            rank = home.header.touches[target].rank
            result[target] = Seen(shape=shape or each.shape, rank=rank if shape else each.rank, whole=each.whole)
    return result


def _cut(method: str, error: float) -> tuple[Finding, ...]:
    """What was left out on the way to a checkpoint, where it had to be factors first."""
    if error < NOTABLE:
        return ()
    return (
        Finding(
            code="change-cut",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"what {method} makes was cut to factors before it was merged: {error:.1%} of its norm is left "
            f"out, {max(0.0, 1 - error**2):.1%} of its energy is in",
            remedy="give more: --rank R, or --energy 0.999",
        ),
    )


NOTABLE = 1e-3
"""Relative error from which a cut is told; what float32 rounds off is not."""


def _layers(one: Opened) -> bool:
    """Whether an adapter is for a model that repeats layers of its base."""
    return bool(ranges_of(one.hints))


def _single(ingredient: Ingredient) -> float | None:
    """An adapter's weight where it is one number."""
    return float(ingredient.weight) if isinstance(ingredient.weight, int | float) else None
