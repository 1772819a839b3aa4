"""Where an adapter lands in a base, from headers alone: the stored parameters it changes, and everything in the way.

The shapes of base and adapter are checked in one binding for each module.  Knows no key spelling and no other
adapter; what a base would need for a new head, its framework says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import final

from lorahub.bases.framework import Edits, Framework, Widens
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.delta import ALL, Index
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef, Touch
from lorahub.engine.planning.misfits import reason
from lorahub.engine.planning.notes import Notes
from lorahub.files.dtypes import nbytes
from lorahub.findings import Finding
from lorahub.shapes import Binding, ShapeMisfit, instantiate, unify

__all__ = ["FLOATS", "Created", "Placed", "Placement", "components_here", "logical_shape", "place"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Dtypes in which a weight is a number of its own, so that a change can be added to it."""

_SCALES = ("_scale", "_scale_inv", "_scales")  # behind a parameter's name: its elements are only codes

_NONE: Mapping[str, JSON] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One parameter that an adapter changes, found in the base.

    Attributes:
        target: what is changed, under the base's names.
        name: what the base calls it; that of the target, but for its component where the base is that one.
        kind: registered kind name.
        touch: what its kind says of the change.
        pieces: where it lands.
        siblings: name -> where a sibling parameter lies that the change reads.
        nbytes: bytes of the adapter's tensors for it.
        wide: how many columns the parameter gets for it, where the base has fewer; or None.
    """

    target: Target
    name: str
    kind: str
    touch: Touch
    pieces: tuple[Piece, ...]
    siblings: Mapping[str, Piece] = field(default_factory=lambda: MappingProxyType({}))
    nbytes: int
    wide: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """A parameter that an adapter brings whole: one that the base lacks, or has in another shape.

    Attributes:
        target: what it is, under the base's names.
        kind: registered kind name.
        touch: what its kind says of it.
        shape: its shape.
        dtype: safetensors code, as the adapter stores it.
    """

    target: Target
    kind: str
    touch: Touch
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What became of every change that an adapter makes.

    Attributes:
        placed: changes to parameters the base has.
        created: parameters that the result has in addition, or in another shape.
        edits: what ``created`` changes elsewhere, as the framework says.
        findings: what does not land, and why.
    """

    placed: tuple[Placed, ...]
    created: tuple[Created, ...] = ()
    edits: Edits = field(default_factory=Edits)
    findings: tuple[Finding, ...] = ()


def place(
    groups: Sequence[Group],
    kinds: Mapping[str, Kind],
    index: BaseIndex,
    framework: Framework,
    *,
    shared: Mapping[tuple[str, str], TensorRef] = MappingProxyType({}),
    hints: Mapping[str, JSON] = _NONE,
) -> Placement:
    """Find the place of every change that ``groups`` make.

    Args:
        groups: what a format read, modules under the base's names where they were found there.
        kinds: by name.
        index: the base.
        framework: the one that made the index.
        shared: (kind, slot) -> tensor, for slots that an adapter has once.
        hints: what the adapter says of its task, for the framework.
    """
    could_be = components_here(groups, index)
    placer = _Placer(kinds, index, framework, shared)
    touched = list(placer.touched(groups))
    wanted = {placer.there(target, could_be) for _, _, target in touched}
    wanted |= {replace(target, parameter=name) for _, touch, target in touched for name in touch.reads}
    wanted |= {placer.there(target, could_be) for target in wanted}
    layouts = framework.layouts(index, wanted)
    placer.choose(could_be, touched, layouts)
    placed = [found for one in touched if (found := placer.put(*one, layouts))]
    created, edits = placer.create(hints)
    return Placement(
        placed=tuple(placed),
        created=created,
        edits=replace(edits, config={**edits.config, **placer.widened}) if placer.widened else edits,
        findings=placer.notes.findings(len(touched), len(placed) + len(created)),
    )


def components_here(groups: Sequence[Group], index: BaseIndex) -> frozenset[str]:
    """Which of an adapter's components a base could be that has none itself: those with modules in it.

    What has no component any more was found in the base under another name, and the rest is elsewhere.
    """
    components = {group.component for group in groups}
    if len(components) < 2 or any(":" in name for name in index.parameters):
        return frozenset()
    if "" in components:
        return frozenset({""})
    modules = index.modules()
    return frozenset(group.component for group in groups if group.module in modules)


def logical_shape(layout: Layout, index: BaseIndex) -> tuple[int, ...]:
    """The shape of a target, [out, in, *k], from the stored parameters its pieces lie in."""
    sizes: list[int] = []
    for piece in layout.pieces:
        shape = piece.of_parameter.shape(index.parameters[piece.parameter].shape)
        axes = (piece.of_delta.rows, piece.of_delta.cols)
        extent = [_reach(at, size) for at, size in zip(axes, shape, strict=False)] + list(shape[2:])
        if piece.of_delta.expert is not None:
            extent.insert(0, piece.of_delta.expert + 1)
        sizes = [max(pair) for pair in zip(extent, sizes or extent, strict=True)]
    return tuple(sizes)


def _reach(index: Index, size: int) -> int:
    """One past the last position that ``size`` positions of ``index`` take."""
    if index == ALL:
        return size
    return (index.start or 0) + (size - 1) * (index.step or 1) + 1 if isinstance(index, slice) else max(index) + 1


@final
class _Placer:
    """One adapter's changes on the way to their places."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        index: BaseIndex,
        framework: Framework,
        shared: Mapping[tuple[str, str], TensorRef],
    ) -> None:
        self.notes = Notes(index)
        self._here: frozenset[str] = frozenset()  # the component that the base is, of an adapter with several
        self._kinds, self._index, self._framework, self._shared = kinds, index, framework, shared
        self._modules = frozenset(index.modules())
        self._bindings: dict[int, Binding] = {}
        self._counted: set[str] = set()
        self.widened: dict[str, JSON] = {}  # what that changes in the configuration
        self._candidates: list[tuple[Created, str, str]] = []  # with what disagrees where the shape differs, and why

    def touched(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Touch, Target]]:
        """Every change, with its target."""
        for group in groups:
            for touch in self._kinds[group.kind].touches(group):
                yield group, touch, Target(group.component, group.module, touch.parameter)

    def there(self, target: Target, here: frozenset[str] | None = None) -> Target:
        """The target as the base would name it, were it one of these components; without any, the one it is."""
        return replace(target, component="") if target.component in (self._here if here is None else here) else target

    def choose(
        self,
        could_be: frozenset[str],
        touched: Sequence[tuple[Group, Touch, Target]],
        layouts: Mapping[Target, Layout],
    ) -> None:
        """Settle which component the base is: the only one that it could be, or of several the only one that fits."""
        wrong = set()
        for group, touch, target in touched if len(could_be) > 1 else ():
            layout = layouts.get(self.there(target, could_be))
            if layout and self._misfit(group, touch, target, logical_shape(layout, self._index)):
                wrong.add(target.component)
        left = could_be - wrong
        self._here = left if len(left) == 1 else frozenset()

    def put(self, group: Group, touch: Touch, target: Target, layouts: Mapping[Target, Layout]) -> Placed | None:
        """The place of one change, or None, and then a note says why."""
        there = self.there(target)
        layout = layouts.get(there)
        if layout is None:
            if self._here and target.component not in self._here:
                self.notes.elsewhere.append(target)
            elif touch.replaces and there == target:
                self._candidates.append((self._new(group, touch, target), "", ""))
            elif not touch.if_present:
                known = there.name.rpartition(".")[0] in self._modules
                (self.notes.alone if known else self.notes.absent).append(target)
            return None
        shape = logical_shape(layout, self._index)
        first = layout.pieces[0].of_parameter
        if touch.replaces and len(layout.pieces) == 1 and first.transposed and first.expert is None:
            shape = shape[1::-1]  # values lie in files as the base stores them; one matrix of a stack lies by itself
        wide: int | None = None
        if details := self._misfit(group, touch, target, shape):
            wide = self._wider(group, touch, target, layout, shape)
        if details and wide is None:
            only = layout.pieces[0]
            plain = len(layout.pieces) == 1 and only.of_parameter.whole and only.parameter == target.name
            if touch.replaces and plain:
                why = self._why(group, touch, target, shape)
                self._candidates.append((self._new(group, touch, target), details, why))
            else:
                self.notes.misfit(target, details, self._why(group, touch, target, shape))
            return None
        if not self._takes(group, touch, target, layout):
            return None
        siblings = {name: layouts.get(replace(there, parameter=name)) for name in touch.reads}
        if any(found is None or len(found.pieces) != 1 for found in siblings.values()):
            reads = ", ".join(touch.reads)
            self.notes.refuse(
                "layout-unsupported", f"it reads {reads}, which lies in no one place of this base", target
            )
            return None
        return Placed(
            target=target,
            name=there.name,
            kind=group.kind,
            touch=touch,
            pieces=self._apart(layout.pieces, touch),
            siblings={name: found.pieces[0] for name, found in siblings.items() if found},
            nbytes=self._nbytes(group, touch),
            wide=wide,
        )

    def _wider(self, group: Group, touch: Touch, target: Target, layout: Layout, shape: tuple[int, ...]) -> int | None:
        """How many columns a change wants that fits in all else, where the framework has a way to widen the layer."""
        piece = layout.pieces[0]
        whole = len(layout.pieces) == 1 and piece.of_delta.whole and piece.of_parameter.whole
        if touch.replaces or touch.reads or not (touch.additive and whole) or not isinstance(self._framework, Widens):
            return None
        try:
            new = self._new(group, touch, target).shape
        except ShapeMisfit:
            return None
        if len(shape) < 2 or len(new) != len(shape) or new[1] <= shape[1] or new[:1] + new[2:] != shape[:1] + shape[2:]:
            return None
        edits = self._framework.widening(self._index, piece.parameter, new)
        if edits is None:
            return None
        self.widened |= edits.config
        return new[1]

    def create(self, hints: Mapping[str, JSON]) -> tuple[tuple[Created, ...], Edits]:
        """The parameters to create and what that changes elsewhere; none where the framework has no place for them."""
        if not self._candidates:
            return (), Edits()
        wanted = {new.target.name: (new.shape, new.dtype) for new, _, _ in self._candidates}
        edits = self._framework.edits(self._index, wanted, hints)
        if edits is None:
            for new, details, why in self._candidates:
                if details:
                    self.notes.misfit(new.target, details, why)
                else:
                    self.notes.absent.append(new.target)
            return (), Edits()
        self.notes.missing = tuple(name for name in edits.missing if name not in wanted)
        return tuple(new for new, _, _ in self._candidates), edits

    def _slots(self, group: Group, touch: Touch) -> Iterator[tuple[str, TensorRef]]:
        for name in touch.slots:
            if ref := group.slots.get(name) or self._shared.get((group.kind, name)):
                yield self._kinds[group.kind].slot(name).dims, ref

    def _new(self, group: Group, touch: Touch, target: Target) -> Created:
        binding: Binding = {}
        slots = list(self._slots(group, touch))
        for dims, ref in slots:
            binding = unify(dims, ref.shape, binding, name=ref.key)
        shape = instantiate(touch.dims, binding)
        return Created(target=target, kind=group.kind, touch=touch, shape=shape, dtype=slots[0][1].dtype)

    def _misfit(self, group: Group, touch: Touch, target: Target, shape: tuple[int, ...]) -> str:
        """What disagrees, both shapes named, or "" where all fits."""
        try:
            self._bindings[id(group)] = self._bind(group, touch, target, shape)
        except ShapeMisfit as misfit:
            keys = ", ".join(f"{ref.key} {list(ref.shape)}" for _, ref in self._slots(group, touch))
            return f"{target.name} is {list(shape)} in {self._index.ref} and the adapter brings {keys}: {misfit}"
        return ""

    def _bind(self, group: Group, touch: Touch, target: Target, shape: tuple[int, ...]) -> Binding:
        binding = unify(touch.dims, shape, self._bindings.get(id(group), {}), name=target.name)
        for dims, ref in self._slots(group, touch):
            binding = unify(dims, ref.shape, binding, name=ref.key)
        return binding

    def _why(self, group: Group, touch: Touch, target: Target, shape: tuple[int, ...]) -> str:
        def turned() -> bool:
            try:
                self._bind(group, touch, target, shape[::-1])
            except ShapeMisfit:
                return False
            return True

        return reason(self._index, touch, [*self._slots(group, touch)], shape, turned)

    def _takes(self, group: Group, touch: Touch, target: Target, layout: Layout) -> bool:
        """Whether something can be added to the stored parameters; a note says why not."""
        for piece in layout.pieces:
            stored = self._index.parameters[piece.parameter]
            copied = touch.replaces and all(ref.dtype == stored.dtype for _, ref in self._slots(group, touch))
            scaled = any(piece.parameter + end in self._index.parameters for end in _SCALES)
            if not copied and (stored.dtype not in FLOATS or (scaled and stored.dtype.startswith("F8"))):
                reason = f"it is stored as {stored.dtype}, in quantised form"
                self.notes.refuse("storage-unsupported", f"{reason}: use the base in 16 bits", target)
                return False
            cut = piece.of_delta
            turned = cut.transposed or (cut.expert is not None and not touch.stacks)
            if not touch.replaces and (turned or not (cut.whole or touch.local)):
                reason = f"this base keeps it in several places and a {group.kind} change cannot be cut"
                self.notes.refuse("layout-unsupported", reason, target)
                return False
        return True

    def _apart(self, pieces: tuple[Piece, ...], touch: Touch) -> tuple[Piece, ...]:
        """One piece for each matrix where a stack lies whole in one parameter: each is then a low-rank change."""
        whole = len(pieces) == 1 and pieces[0].of_delta.whole and pieces[0].of_parameter.whole
        if not (touch.stacks and whole):
            return pieces
        name = pieces[0].parameter
        of_each = (Region(expert=expert) for expert in range(self._index.parameters[name].shape[0]))
        return tuple(Piece(parameter=name, of_delta=each, of_parameter=each) for each in of_each)

    def _nbytes(self, group: Group, touch: Touch) -> int:
        fresh = [ref for _, ref in self._slots(group, touch) if ref.key not in self._counted]
        self._counted.update(ref.key for ref in fresh)
        return sum(nbytes(ref.dtype, ref.shape) for ref in fresh)
