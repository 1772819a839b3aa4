"""A source that is converted, and its base: what there is to say of it, its changes, and what goes along.

Everything here is in the source's own terms; what the target format makes of it comes later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast, final

from lorahub import checks
from lorahub.adapter import Adapter, AdapterHeader
from lorahub.bases.framework import Created, Edits, Framework, Widens
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Target
from lorahub.conversion.carry import Misfit, refusal
from lorahub.conversion.change import Change, Origin
from lorahub.conversion.fused import land
from lorahub.conversion.home import called, known_words
from lorahub.conversion.naming import known_roles, unresolved
from lorahub.conversion.translate import UNDECLARED, translate
from lorahub.conversion.vocabulary import is_foreign
from lorahub.conversion.weights import BaseWeights
from lorahub.converting.request import Request
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.place import logical_shape, place
from lorahub.errors import CannotCarry
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch
from lorahub.opening import Base
from lorahub.registry import Registry

__all__ = ["Opened"]


@final
class Opened:
    """A source and its base.

    Args:
        request: what was asked for.
        registry: kinds and formats.
        header: the source, read against the base where there is one.
        base: the base, or None.
        held: keeps the base's files open.
    """

    def __init__(
        self, request: Request, registry: Registry, header: AdapterHeader, base: Base | None, held: ExitStack
    ) -> None:
        words: Mapping[Target, Layout] = {}
        if base is not None:
            header, words = translate(header, base.index, registry.kinds)
        self.request, self.registry, self.header, self.base = request, registry, header, base
        self._words = frozenset(target.module for target in words)
        self._layouts: Mapping[Target, Layout] = {}
        self._weights: BaseWeights | None = None
        self._weightless = base is not None and base.model is not None and _is_meta(base)
        if base is not None:
            wanted = set(header.touches)
            wanted |= {
                replace(target, parameter=name) for target, touch in header.touches.items() for name in touch.reads
            }
            self._layouts = {**base.framework.layouts(base.index, wanted), **words}
            self._weights = BaseWeights(base.index, self._layouts, held.enter_context(base.tensors()))
        self.findings = (*header.findings, *self._about_parts(), *self._about_placement())

    @property
    def renames(self) -> bool:
        """Whether its names may be others than the format's tools read: not where they came from there as they are."""
        return self.request.to != self.header.format or bool(self._words)

    def note(self, findings: Collection[Finding], settled: Collection[str]) -> None:
        """Add what there is to say of the names that are written, and leave out what no longer holds.

        Args:
            findings: to add.
            settled: modules of the source whose places the vocabulary knows.
        """
        kept = (each for each in self.findings if each.code != UNDECLARED or not set(settled).issuperset(each.where))
        self.findings = (*kept, *findings)

    def demand(self) -> None:
        """Go on, or not.

        Raises:
            CannotCarry: its modules cannot be named in the format.
            Degraded, IntegrityError, BaseMismatch: what its findings demand.
        """
        self._refuse_unknown_names()
        checks.refuse(self.findings, allowed=self.request.allow, subject=f"{self.header.label} to {self.request.to}")

    def changes(self, adapter: Adapter) -> list[Change]:
        """The source's changes, under the names of the parameters that the base stores where one is known.

        Raises:
            CannotCarry: there are none, or one cannot be put where the base has it.
        """
        changes = [
            Change(target=target, delta=delta, origins=(Origin(target=target),), shape=self._shape(target, delta))
            for target, delta in adapter.deltas.items()
        ]
        if not changes:
            raise CannotCarry(f"{self.header.label} has no change of weights that could be converted")
        if self.base is None:
            return changes
        changes = [change for change in changes if not self._is_the_bases(change)]
        # what a model loaded from these files has itself, and where what reads the format looks for it
        kept = frozenset() if self.renames or self.base.model is not None else self.base.index.elsewhere.keys()
        loaded = [change for change in changes if change.target.name in kept]
        others = [change for change in changes if change.target.name not in kept]
        landed, stuck = land(others, self._layouts, self.base.index, self.weight)
        if stuck:
            by_target = {change.target: change for change in changes}
            raise refusal(
                self.request.to,
                [Misfit(changes=(by_target[target],), reason=reason, remedy="") for target, reason in stuck.items()],
            )
        return [*loaded, *landed]

    def hints(self, adapter: Adapter, changes: Sequence[Change]) -> dict[str, JSON]:
        """What goes along to the format, keyed by the source's names."""
        hints = dict(adapter.hints)
        recorded = self.header.record.base if self.header.record else None
        if recorded is not None and recorded.repo_id:
            hints |= {"base_repo": recorded.repo_id, "base_revision": recorded.revision or ""}
        if self.base is None:
            return hints
        index = self.base.index
        given = hints.get("roles")
        roles = known_roles(changes, index, self._layouts) | (given if isinstance(given, dict) else {})
        turned = any(
            index.parameters[name].transposed
            for change in changes
            if (name := index.stored(change.target.name)) in index.parameters
        )
        return {
            **hints,
            **({"roles": roles} if roles else {}),
            **({"fan_in_fan_out": True} if turned else {}),
            **({"base_repo": index.ref.repo, "base_revision": index.ref.commit} if index.ref.repo else {}),
        }

    def complete(self, module: Sequence[Change]) -> bool:
        """Whether changes of one module are of all that the base has in it, buffers too."""
        if self.base is None:
            return False
        own = {origin.target for change in module for origin in change.origins}
        names = self.base.index.modules()
        place = next(iter(own))
        path = place.name.removesuffix(f".{place.parameter}")
        return path in names and {target.parameter for target in own} >= set(names[path])

    def weight(self, target: Target) -> torch.Tensor | None:
        """The base's weight; None where there is no base, or one that has shapes only (the meta device)."""
        return self._weights.weight(target) if self._weights and not self._weightless else None

    def _shape(self, target: Target, delta: Delta) -> tuple[int, ...] | None:
        layout, own = self._layouts.get(target), delta.shape()
        if layout is None or self.base is None or delta.replacement() is not None:
            return own
        shape = logical_shape(layout, self.base.index)
        widens = own is not None and len(own) == len(shape) > 1 and own[1] > shape[1]  # placed: there is a way to
        return own if widens else shape

    def _is_the_bases(self, change: Change) -> bool:
        """Whether a buffer that a module kept for itself is bit for bit the base's: the layout need not have it."""
        value = change.delta.replacement()
        if self.request.to == "peft" or value is None or change.target.parameter in ("weight", "bias"):
            return False
        layout = self._layouts.get(change.target)
        under = self.weight(change.target) if layout is not None else None
        return under is not None and under.shape == value.shape and torch.equal(under, value.to(torch.float64))

    def _about_parts(self) -> Iterator[Finding]:
        said = {key for each in self.header.findings if each.level >= Verdict.DEGRADED for key in each.where}
        for name, part in self.header.reading.parts.items():
            if said.issuperset(ref.key for ref in part.tensors.values()):
                continue  # what allows that finding, or forbids it, decides
            yield Finding(
                code="part-left-out",
                axis="format",
                level=Verdict.DEGRADED,
                message=f"{name} is {part.kind}, for which '{self.request.to}' has no word: {part.reason}",
                where=tuple(ref.key for ref in part.tensors.values()),
                remedy="keep the source for it, and convert the rest: --allow part-left-out",
                allowable=True,
            )

    def _about_placement(self) -> tuple[Finding, ...]:
        if self.base is None:
            return ()
        reading = self.header.reading
        parts = {group.component for group in reading.groups}
        kept = {self.request.component} if self.request.component in parts else parts
        placed = place(
            [group for group in reading.groups if group.component in kept],
            self.registry.kinds,
            self.base.index,
            cast("Framework", _Declared(self.base.framework, self._layouts)),
            shared=reading.shared,
            hints=reading.hints,
        )
        return placed.findings

    def _refuse_unknown_names(self) -> None:
        """Names that mean something only where they came from can only be written there."""
        if self.request.to == self.header.format:
            return
        index = self.base.index if self.base else None
        wanted = self.request.component
        if self.base is None:
            wanted = called(wanted, {group.component for group in self.header.reading.groups})
        flat, why = unresolved(self.header, index, wanted, self._words | self._known_words(index))
        if not flat:
            return
        parts = sorted({group.component for group in self.header.reading.groups} - {""})
        several = "--component " + " or --component ".join(parts) if len(parts) > 1 else "--base BASE"
        given = "--base DIFFUSERS_FOLDER" if any(map(is_foreign, flat)) else "--base BASE"
        remedy = given if self.base is None else f"{several}   (with the model that it was made for)"
        found = Finding(
            code="names-unknown",
            axis="format",
            level=Verdict.INCOMPATIBLE,
            message=f"{len(flat)} modules {why}",
            where=tuple(flat),
            remedy=remedy,
        )
        raise CannotCarry(f"{self.header.label} cannot be named in '{self.request.to}'", f"add: {remedy}", (found,))

    def _known_words(self, index: BaseIndex | None) -> frozenset[str]:
        """Modules that a vocabulary tells the dots of."""
        parts: dict[str, set[str]] = {}
        for group in self.header.reading.groups:
            parts.setdefault(group.component, set()).add(group.module)
        return frozenset().union(*(known_words(modules, self.request.to, index) for modules in parts.values()))


@final
class _Declared:
    """What placing needs of a framework, with the layouts that another vocabulary's words declare beside its own."""

    def __init__(self, framework: Framework, layouts: Mapping[Target, Layout]) -> None:
        self._framework, self._layouts = framework, layouts

    def layouts(self, _index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Where targets land."""
        return {target: self._layouts[target] for target in targets if target in self._layouts}

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """The framework's."""
        return self._framework.edits(index, created, hints)

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """The framework's, where it has one."""
        return self._framework.widening(index, name, shape) if isinstance(self._framework, Widens) else None


def _is_meta(base: Base) -> bool:
    """Whether a live model has no numbers."""
    assert base.model is not None
    return any(each.is_meta for each in base.framework.parameters(base.model, base.index).values())
