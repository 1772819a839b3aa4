"""Adapters in, one adapter or checkpoint out: what was asked for opened and judged, then made; and ``lorahub.compose``.

What people ask for becomes a recipe, whether they wrote one or not, and the result carries it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from lorahub.adapter import Adapter, open_header, save
from lorahub.bases.layout import Target
from lorahub.composed import Composed, ComposeReport, Home
from lorahub.composition.budgeting import Shared, budget_of
from lorahub.composition.combining import Combined, Part, combine
from lorahub.composition.explaining import Outline, outline
from lorahub.composition.gathering import seed_of
from lorahub.composition.method import Method, SumMethod
from lorahub.composition.truncate import Budget
from lorahub.composition.weights import parameters_of, weights_of
from lorahub.deltas.kind import JSON
from lorahub.descent import derived, written
from lorahub.engine.crew import crew_size
from lorahub.engine.report import MergeReport
from lorahub.errors import UsageError, WriteFailed
from lorahub.findings import Finding
from lorahub.ingredients import Held, Opened, base_weights, holding, judge, open_one
from lorahub.lazy import torch
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.preparing import prepare
from lorahub.recipe import Ingredient, Recipe
from lorahub.records import SCHEMA_VERSION, AdapterRecord
from lorahub.registry import Registry
from lorahub.requesting import Asked, Request, requested
from lorahub.sources import Base, Progress, open_base, quiet

__all__ = ["Composition", "compose", "prepare_composition"]

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
            headers,
            self.registry.kinds,
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
        folder = _new(out) if out is not None else None
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
        parents = [
            one.parent(each.content, _single(ingredient))
            for one, each, ingredient in zip(self.opened, held, self.recipe.adapters, strict=True)
        ]
        return self._kept(found, parents, folder, start)

    def merge(
        self, out: str | os.PathLike[str], *, threads: int | None = None, progress: Progress = quiet
    ) -> MergeReport:
        """Merge the result into the base, streaming; one pass over the base.

        A plain weighted sum goes in adapter by adapter, in one rounding and whatever their kinds; anything else becomes
        one adapter first.

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
        with tempfile.TemporaryDirectory(prefix="lorahub-") as place:
            made = self.make(Path(place) / self.recipe.method, threads=threads)
            job = prepare(self.base, {self.recipe.method: made}, allow=self.allowed)
            return job.write(out, threads=threads, progress=progress)

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

    def _kept(
        self, found: Combined, parents: Sequence[Mapping[str, JSON]], folder: Path | None, start: float
    ) -> Composed:
        """The result, written and read back."""
        if not found.deltas:
            raise UsageError("the budget leaves nothing of any target", "give more parameters, or a rank")
        formats = {each.format for each in self.opened if each.format}
        layout = self.recipe.format or (formats.pop() if len(formats) == 1 else "peft")
        settings = _settings(self.recipe)
        text = _portable(self.recipe, self.opened)
        record = derived(
            _begun(self.opened),
            self.recipe.method,
            settings,
            parents,
            seed=self.recipe.seed if self.method.draws else None,
            text=text,
            digest=_digest(text, parents),
        )
        home = Home() if folder is None else None
        place = folder or (home.path if home else Path()) / self.recipe.method
        hints = _hints(self.opened)
        made = Adapter(deltas=found.deltas, record=record, hints=hints)
        save(made, place, registry=self.registry, format=layout)
        report = ComposeReport(
            out=os.fspath(place),
            method=self.recipe.method,
            rows=found.rows,
            findings=self.findings,
            seconds=time.perf_counter() - start,
            bytes_written=written(place),
            settings=settings,
        )
        header = open_header(place, self.registry)
        return Composed(deltas=found.deltas, record=header.record, hints=hints, header=header, report=report, home=home)


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
    _budget(recipe)
    allowed = frozenset({*allow, *recipe.allow})
    base = open_base(request.base, digest=True, progress=progress) if request.base is not None else None
    opened = tuple(
        open_one(
            source,
            registry,
            label=label,
            hub=hub,
            index=base.index if base else None,
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


@final
class Compose:
    """``lorahub.compose``: call it to make one adapter of several."""

    def __call__(
        self,
        adapters: Asked,
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        method: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        error: float | None = None,
        adaptive: bool | None = None,
        max_parameters: int | None = None,
        dtype: str | None = None,
        format: str | None = None,  # noqa: A002 - what people call it
        base: str | None = None,
        non_additive: str | None = None,
        seed: int | None = None,
        compat: str | None = None,
        out: str | os.PathLike[str] | None = None,
        allow: Collection[str] = (),
        hub: str | None = None,
        threads: int | None = None,
        progress: Progress = quiet,
        **parameters: Any,
    ) -> Composed:
        """Make one adapter of several: an exact weighted sum, or any registered method.

        Args:
            adapters: name -> adapter, a list, a sum of open adapters (``0.7 * a - b``), a ``Recipe`` or the path of
                one; a recipe says all that follows but ``out`` to ``progress``.
            weights: one for each, in order or by name; 1 by default, or the weight in the reference.  They are never
                normalised unless a parameter asks for it.
            method: "linear" by default; see ``lorahub compose --methods``.
            rank: of every target, at most; without a budget the result keeps every rank that the method gives.
            energy: keep at least this share of the squared norm of each change.
            error: lose at most this share of the norm of each change.
            adaptive: meet energy or error over all targets together.
            max_parameters: spend so many numbers on all factors together.
            dtype: of the result, "float32" by default; "bfloat16" or "float16".
            format: of the written adapter; that of the adapters where they share one, else "peft".
            base: the base, a folder or ``ns/name[@COMMIT]``: where formats name modules differently, adapters bring new
                values, or kinds look at the weights.
            non_additive: "refuse", "linearise" (a DoRA's factors without its lengths) or "dense" (the change that a
                kind makes to the base's weight).
            seed: what every random draw follows from, with the adapter and the target; 0 by default.
            compat: see ``lorahub.load``.
            out: a new folder; None: a temporary one, which lives as long as the result.
            allow: finding codes to accept.
            hub: path of a folder hub.
            threads: how many; the result does not depend on it.
            progress: called with (bytes fetched, in all), then with (targets done, in all).
            parameters: the method's own, as ``density=0.4``; ``lambda_`` for ``lambda``.

        Raises:
            RecipeError, UsageError: what is asked for makes no sense.
            Degraded, BaseMismatch, Incompatible: the adapters do not go together; the findings say how.
            NotFinite: NaN or infinity, or the result does not fit into its dtype.
            WriteFailed: ``out`` exists, or there is no space.
        """
        request = requested(
            adapters,
            weights,
            method=method,
            rank=rank,
            energy=energy,
            error=error,
            adaptive=adaptive,
            max_parameters=max_parameters,
            dtype=dtype,
            format=format,
            base=base,
            non_additive=non_additive,
            seed=seed,
            compat=compat,
            parameters={name.rstrip("_"): value for name, value in parameters.items()} or None,
        )
        if request.recipe.output == "checkpoint":
            raise UsageError(
                "this recipe makes a checkpoint, and no adapter", "lorahub.compose.checkpoint(recipe, out=FOLDER)"
            )
        made = prepare_composition(request, allow=allow, hub=hub, progress=progress)
        return made.make(out, threads=threads, progress=progress)

    def checkpoint(
        self,
        recipe: Recipe | str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        allow: Collection[str] = (),
        hub: str | None = None,
        threads: int | None = None,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Merge what a recipe makes into its base, shard by shard, in one pass.

        Args:
            recipe: a ``Recipe`` or its file; it names a base.
            out: a new folder, or a file that ends in ".safetensors".
            allow: finding codes to accept.
            hub: path of a folder hub.
            threads: how many; the result does not depend on it.
            progress: called with (bytes done, in all).

        Raises:
            UsageError: it names no base, or ``out`` exists.
            RecipeError, Degraded, BaseMismatch, Incompatible, NotFinite: as when called.
        """
        made = prepare_composition(requested(recipe), allow=allow, hub=hub, progress=progress)
        return made.merge(out, threads=threads, progress=progress)


compose: Final = Compose()
"""Adapters in, one adapter out; see ``Compose.__call__``."""


def _budget(recipe: Recipe) -> Budget | Shared | None:
    asked = recipe.budget()
    if recipe.adaptive or any(value is not None for name, value in asked.items() if name != "adaptive"):
        return budget_of(**asked)
    return None


def _single(ingredient: Ingredient) -> float | None:
    """An adapter's weight where it is one number."""
    return float(ingredient.weight) if isinstance(ingredient.weight, int | float) else None


def _new(out: str | os.PathLike[str]) -> Path:
    """The folder for a result, which must not hold anything yet."""
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WriteFailed(f"{folder} exists", "name a new folder, or remove it yourself")
    return folder


def _settings(recipe: Recipe) -> dict[str, JSON]:
    """Everything of a recipe but its adapters that says what comes of it, without what is at its default."""
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    left_out = ("schema_version", "description", "method", "adapters", "seed", "parameters", "base", "allow")
    return {
        **{name: value for name, value in document.items() if name not in left_out},
        **document.get("parameters", {}),
    }


def _portable(recipe: Recipe, opened: Sequence[Opened]) -> str:
    """The recipe as its result carries it: at the commits that were used, and without anybody's folders."""
    adapters = []
    for label, ingredient, one in zip(recipe.labels(), recipe.adapters, opened, strict=True):
        pin = one.pin
        ref = str(Ref(repo=pin.repo, selector=pin.commit, subpath=pin.path)) if pin else f"./{label}"
        adapters.append(ingredient.model_copy(update={"ref": ref, "name": label}))
    base = recipe.base_reference()
    local = Path(base.path).name if base and base.path else None
    changes = {"adapters": adapters, "base": f"./{local}" if local else recipe.base}
    return recipe.changed(**changes).to_toml()


def _digest(text: str, parents: Sequence[Mapping[str, JSON]]) -> str:
    """``sha256:`` over a recipe and the tensors that went in."""
    digests = [str(parent.get("digest", "")) for parent in parents]
    return f"sha256:{hashlib.sha256(chr(10).join([text, *digests]).encode()).hexdigest()}"


def _begun(opened: Sequence[Opened]) -> AdapterRecord | None:
    """What the parents' records say in common: the base, a licence, the words that call them."""
    records = [each.record for each in opened if each.record is not None]
    if not records:
        return None
    bases = [record.base for record in records if record.base]
    licences = {record.license for record in records}
    words = tuple(dict.fromkeys(word for record in records for word in record.trigger_words))
    common: dict[str, Any] = {
        "base": bases[0] if bases else None,
        "license": licences.pop() if len(records) == len(opened) and len(licences) == 1 else None,
        "trigger_words": words or None,
        "pipeline_tag": records[0].pipeline_tag or None,
        "language": records[0].language or None,
    }
    return AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("lora",)).changed(
        **{name: value for name, value in common.items() if value}
    )


_OWN = frozenset({"kohya_metadata", "compat"})
"""Hints that speak of one adapter's training or result, not of the sum."""


def _hints(opened: Sequence[Opened]) -> dict[str, JSON]:
    """What writing wants back: tables and lists of all adapters together, of single facts the first."""
    result: dict[str, JSON] = {}
    for each in opened:
        for name, value in each.hints.items():
            before = result.get(name)
            if name in _OWN:
                continue
            if isinstance(before, dict) and isinstance(value, dict):
                result[name] = {**value, **before}
            elif isinstance(before, list) and isinstance(value, list):
                result[name] = [*before, *(one for one in value if one not in before)]
            elif before is None:
                result[name] = value
    return result
