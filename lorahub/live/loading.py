"""Adapters spread over the spots of a live model, as their plans say, and the hooks that this takes.

Knows plans and modules; no choices.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, final

from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Piece
from lorahub.bases.torch_module import held_parameters
from lorahub.deltas.delta import Delta
from lorahub.engine.folding.bind import Bound, HasDeltas
from lorahub.engine.folding.sums import Ingredient
from lorahub.engine.planning.place import FLOATS
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.errors import BaseMismatch, Incompatible, UnsupportedKind, UsageError
from lorahub.lazy import torch
from lorahub.live import lookup
from lorahub.live.desk import Desk
from lorahub.live.hooks import Before, Begin, End, Enter, Output
from lorahub.live.places import Numbers, Place, Places
from lorahub.live.spots import Loaded, Part, Spot, Way

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Loader"]


@final
class Loader:
    """A model's spots, found as adapters need them, and all that was put into its modules."""

    def __init__(self, model: nn.Module, index: BaseIndex, framework: Framework, desk: Desk, *, inside: bool) -> None:
        """Hook the model's own call.

        Args:
            model: the model.
            index: its index.
            framework: the one that made it.
            desk: what hooks and lookups ask.
            inside: a weight goes into the factors of changes that PEFT scales there.

        Raises:
            UsageError: adapters are attached to the model, or to a part of it, already.
        """
        if any(map(_attached, model.modules())):
            raise UsageError(
                "this model has adapters attached already", "add to those (live.add), or detach them first"
            )
        self._model, self._framework, self._desk, self._inside = model, framework, desk, inside
        self._places = Places(model)
        self._tensors = framework.parameters(model, index)
        self._held = held_parameters(model, index)
        self._found: dict[tuple[str, bool], Sequence[Place]] = {}
        self._keys: dict[tuple[int, str], int] = {}
        self._handles = [
            model.register_forward_pre_hook(Begin(desk), prepend=True),
            model.register_forward_hook(End(desk), always_call=True),
        ]
        self._hooked: set[int] = set()
        self._entered: set[int] = set()
        self._looked: list[Place] = []
        _forget_graphs()

    def remove(self) -> None:
        """Take everything out of the model's modules."""
        for handle in self._handles:
            handle.remove()
        lookup.remove(self._looked)
        _forget_graphs()

    def load(self, name: str, plan: Plan, adapter: HasDeltas, dropout: float = 0.0) -> Loaded:
        """Spread an adapter over spots; the model gets the hooks it lacks, which do nothing for others.

        Args:
            name: what it is called.
            plan: what merging it would do.
            adapter: its deltas.
            dropout: the chance of an input of its paths to be dropped in training.

        Raises:
            BaseMismatch, Degraded: the plan's findings forbid it.
            Incompatible: it takes another model (new heads, more layers).
            UsageError, IntegrityError: the adapter is not the one it was planned for, or is of a kind whose inputs
                are not dropped.
        """
        _demand_dropout(name, dropout, adapter.deltas.values())
        _demand_same_model(plan, {*self._tensors, *self._held})
        self._places.look_again()
        planned = {term.adapter for step in plan.steps for term in step.terms}  # or another of its structure
        bound = Bound(plan, dict.fromkeys(planned, adapter))
        sources = [step.source for step in plan.steps]
        parts: dict[int, tuple[Part, ...]] = {}
        for step in plan.steps:
            if not step.terms:
                continue
            made = self._parts(step, bound)
            names = {step.out, step.stored_as} if step.out == step.source else {step.out}
            everywhere = step.out == step.source and sources.count(step.source) == 1
            for place in self._places_of(step.out, names, everywhere=everywhere):
                spot = self._spot(place, step.after.shape)
                here = tuple(_going(spot, part) for part in made)
                parts[spot.key] = (*parts.get(spot.key, ()), *here)
        spots = {key: self._desk.spots[key] for key in parts}
        factors = {key: low for key, spot in spots.items() if (low := spot.low_rank(parts[key])) is not None}
        not_by_row = tuple(spot.place.name for spot in spots.values() if spot.site is None or spot.site.rows is None)
        entered = {key for key in parts if any(part.route and part.route.enters for part in parts[key])}
        self._reach(spots.values(), entered)
        return Loaded(name, parts, factors, not_by_row, dropout)

    def _parts(self, step: Step, bound: Bound) -> list[Part]:
        items: list[Ingredient] = bound.ingredients(step, lambda piece: self._sibling(piece).raw().detach())
        return [
            Part(
                target=term.target,
                delta=item.delta,
                piece=item.piece,
                siblings={name: (self._sibling(piece), piece.of_parameter) for name, piece in term.siblings.items()},
                whole=step.after.dtype not in FLOATS,
                inside=self._inside and _bends(item.delta),
                replaces=term.replaces,
            )
            for term, item in zip(step.terms, items, strict=True)
        ]

    def _sibling(self, piece: Piece) -> Place:
        return self._places_of(piece.parameter, {piece.parameter}, everywhere=True)[0]

    def _places_of(self, name: str, names: Collection[str], *, everywhere: bool) -> Sequence[Place]:
        if name in self._held:
            return self._places.quantised(self._held[name], names, everywhere=everywhere)
        try:
            found = self._places.of(self._tensors[name], names, everywhere=everywhere)
        except BaseMismatch:
            if (name, everywhere) not in self._found:
                raise
            return self._found[name, everywhere]  # the model was sharded since, which puts other tensors there
        self._found[name, everywhere] = found
        return found

    def _spot(self, place: Place, shape: tuple[int, ...]) -> Spot:
        identity = (id(place.module), place.leaf)
        key = self._keys.get(identity)
        if key is None:
            key = len(self._keys)
            site = self._framework.site(self._model, place.name)
            quantised = place.stored if isinstance(place, Numbers) else None
            if quantised is not None and site is None:
                raise Incompatible(
                    f"{place.name} is stored as {quantised.storage}, and what {type(place.module).__name__} does with "
                    "it is not known, so nothing can be added to it",
                    "attach the adapter to the model before it is quantised",
                )
            self._desk.spots[key] = Spot(key, place, site, shape, quantised)
            self._keys[identity] = key  # last: a spot without a key is nowhere
        return self._desk.spots[key]

    def _reach(self, spots: Collection[Spot], entered: Collection[int]) -> None:
        """Hook every module at whose output something may be added; look up every parameter that may be changed.

        Those of ``entered`` may be given other inputs too.
        """
        new = False
        for spot in spots:
            hooked = spot.site is not None  # of what is quantised, always, and then nothing stands in its place
            door = lookup.install(spot.place, spot.key, self._desk, hooked=hooked) if spot.quantised is None else None
            if door is not None:
                self._looked.append(spot.place)
                new = True
            if hooked and spot.key not in self._hooked:
                module, door = spot.place.module, door or lookup.Door(spot.key, None)
                self._hooked.add(spot.key)
                self._handles += [
                    module.register_forward_pre_hook(Enter(self._desk, door)),
                    module.register_forward_hook(Output(self._desk, door), prepend=True, with_kwargs=True),
                ]
                new = True
            if spot.key in entered and spot.key not in self._entered:
                self._entered.add(spot.key)
                before = Before(self._desk, spot.key)
                self._handles.append(spot.place.module.register_forward_pre_hook(before, with_kwargs=True))
                new = True
        if new:
            _forget_graphs()


def _going(spot: Spot, part: Part) -> Part:
    """The part with its way there."""
    way = spot.way(part)
    return replace(part, way=way, route=spot.route(part) if way in (Way.WEIGHT, Way.CHANGE) else None)


def _attached(module: nn.Module) -> bool:
    return any(isinstance(hook, Begin | Output) for hook in _hooks(module)) or any(
        isinstance(vars(module)[store], lookup.Lookup) for store in ("_parameters", "_buffers")
    )


def _hooks(module: nn.Module) -> Iterator[object]:
    yield from vars(module)["_forward_pre_hooks"].values()
    yield from vars(module)["_forward_hooks"].values()


_VALUES = frozenset({"full", "replace"})
"""Kinds that are values of their own and have no path that inputs go."""


def _demand_dropout(name: str, chance: float, deltas: Iterable[Delta]) -> None:
    """Refuse a dropout that is none, or that an adapter's kinds do not have.

    Raises:
        UsageError: saying which.
    """
    if not 0 <= chance < 1:
        raise UsageError(f"'{name}': a dropout of {chance} is none", "give a chance from 0 up to, and not, 1")
    if chance and (kinds := sorted({delta.kind for delta in deltas if not delta.drops} - _VALUES)):
        raise UsageError(
            f"'{name}' has changes of kind {', '.join(kinds)}, whose inputs are not dropped in training: dropout acts "
            "on the input of LoRA, DoRA and VeRA; the rank_dropout and module_dropout of other kinds are not there",
            "train these kinds without dropout",
        )


def _bends(delta: Delta) -> bool:
    """Whether a weight may go into the delta's factors."""
    try:
        delta.strengthened(1.0)
    except UnsupportedKind:
        return False
    return True


def _demand_same_model(plan: Plan, names: Collection[str]) -> None:
    """Refuse what takes another model; unlike in a merge, tied parameters may part."""
    plan.check()
    brought = [step.out for step in plan.steps if step.made_whole or step.widened or step.out not in names]
    if brought and plan.words:
        raise Incompatible(
            f"the adapter brings {', '.join(brought[:3])} for {plan.words} words, and the live model knows another "
            "number of them",
            f"model.resize_token_embeddings({plan.words}) first",
        )
    if brought or plan.removed or plan.repeated:
        what = ", ".join(brought[:3]) or "other layers"
        raise Incompatible(
            f"the adapter brings {what}, which a live model of this class has no place for",
            "merge to disk (lorahub merge ... -o FOLDER) and load the result, or build the model with the same head "
            "first",
        )


def _forget_graphs() -> None:
    """Compile again what was compiled: graphs do not see that hooks came or went, and would go on without."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
