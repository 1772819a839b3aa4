"""Several adapters' placements brought together into steps, and what stands between them.

Here it shows that two adapters replace one parameter, or that a change to one of two tied names parts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import final

from lorahub.bases.framework import Edits, Framework
from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Piece, Region, Target
from lorahub.deltas.delta import Index
from lorahub.deltas.disputes import REFUSED
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.notes import note
from lorahub.engine.planning.place import FLOATS, Created, Placed, Placement
from lorahub.engine.planning.steps import Form, Step, Term
from lorahub.engine.planning.ties import undeclared_ties
from lorahub.findings import Finding, Verdict

__all__ = ["Assembled", "Given", "assemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """An adapter with its weight, and where it lands.

    Attributes:
        inside: the weight goes where PEFT would have it.
        together: what it does to one copy of a repeated layer it does to all, as in PEFT, where they share storage.
    """

    name: str
    weight: float
    placement: Placement
    inside: bool = False
    together: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """What the adapters do together.

    Attributes:
        steps: in canonical order of their results.
        removed: parameters the result no longer has.
        dropped: names in the base's files that are left out.
        renamed: name in the base's files -> name in the result's, for what is copied.
        reads: parameter that a change looks at -> its name in the base's files.
        config: key -> new value in ``config.json``.
        findings: what stands between adapters, or between an adapter and the base's ties.
    """

    steps: tuple[Step, ...]
    removed: tuple[str, ...]
    dropped: tuple[str, ...]
    renamed: Mapping[str, str]
    reads: Mapping[str, str]
    config: Mapping[str, JSON]
    findings: tuple[Finding, ...]


def assemble(given: Sequence[Given], index: BaseIndex, framework: Framework) -> Assembled:
    """Bring placements together; pure.

    Args:
        given: adapters in the order in which their changes are added.
        index: the base.
        framework: the one that made it; asked how tied parameters part.
    """
    return _Assembly(index, framework).run(given)


@final
@dataclass(slots=True)
class _Assembly:
    """Attributes: ``terms``: (source, out) -> what is added there; ``created``: name -> who brings it."""

    index: BaseIndex
    framework: Framework
    terms: dict[tuple[str, str], list[Term]] = field(default_factory=dict)
    created: dict[str, list[tuple[Given, Created]]] = field(default_factory=dict)
    config: dict[str, JSON] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    whole: list[str] = field(default_factory=list)
    bent: list[Target] = field(default_factory=list)
    wide: dict[str, dict[tuple[str, Target], int]] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)

    def run(self, given: Sequence[Given]) -> Assembled:
        if repeated := self.index.repeated:
            said = self.index.config
            self._edit(Edits(config={key: new for key, new in repeated.config().items() if said.get(key) != new}))
        for each in given:
            self._take(each)
        self._conflicts()
        self._untie()
        self.found += undeclared_ties(self.index, {*self.created, *(source for source, _ in self.terms)})
        if self.whole:
            self.found.append(
                note(
                    "taken-whole",
                    Verdict.UNVERIFIED,
                    "the base has nothing to blend these with, so they are taken whole whatever the weight",
                    self.whole,
                )
            )
        if self.bent:
            self.found.append(_in_turn(self.bent))
        steps = [*self._changed(), *self._copied(), *self._brought()]
        return Assembled(
            steps=tuple(sorted(steps, key=lambda step: natural(step.out))),
            removed=tuple(sorted(self.removed, key=natural)),
            dropped=tuple(sorted({self._stored(name) for name in self.removed | self.stale}.union(self._left_out()))),
            renamed=MappingProxyType(
                {
                    self._stored(name): new
                    for name, new in self.renamed.items()
                    if self._has(name) and self._origin(name) == name
                }
            ),
            reads=MappingProxyType(self.reads),
            config=MappingProxyType(self.config),
            findings=tuple(self.found),
        )

    def _has(self, name: str) -> bool:
        return name in self.index.parameters or name in self.index.extras

    def _origin(self, name: str) -> str:
        """The base's own name of what a parameter is made from, which differs in layers that moved or are repeated."""
        return self.index.repeated.origin(name) if self.index.repeated else name

    def _left_out(self) -> tuple[str, ...]:
        return self.index.repeated.left_out if self.index.repeated else ()

    def _spelled(self, name: str, stored: str) -> str:
        return self.index.repeated.spelled(name, stored) if self.index.repeated else stored

    def _stored(self, name: str) -> str:
        info = self.index.parameters.get(name) or self.index.extras.get(name)
        return info.stored_as if info else name

    def _take(self, given: Given) -> None:
        tied = _tied(given.placement)
        for placed in given.placement.placed:
            self.reads |= {piece.parameter: self._stored(piece.parameter) for piece in placed.siblings.values()}
            for number, piece in enumerate(placed.pieces):
                source, name = piece.parameter, placed.name
                twins = tied.get(source, [])
                if placed.target in twins[1:]:
                    continue  # said once, with the first of them
                shares = name != source and self.index.stored(name) == source
                out = name if shares and not twins else source
                nbytes = placed.nbytes if number == 0 else 0
                term = self._term(given, placed, piece, nbytes, tied=bool(twins), twins=tuple(twins[1:]))
                self.terms.setdefault((source, out), []).append(term)
                if placed.wide is not None:
                    self.wide.setdefault(source, {})[given.name, placed.target] = placed.wide
                if given.together:
                    self._everywhere(term, out)
        for new in given.placement.created:
            self.created.setdefault(new.target.name, []).append((given, new))
            if given.weight != 1:
                self.whole.append(new.target.name)
        self._edit(given.placement.edits)

    def _term(
        self, given: Given, placed: Placed, piece: Piece, nbytes: int, *, tied: bool, twins: tuple[Target, ...]
    ) -> Term:
        touch, weight = placed.touch, given.weight
        if weight != 1 and self.index.parameters[piece.parameter].dtype not in FLOATS:
            self.whole.append(placed.target.name)
            weight = 1.0
        strength = 1.0
        if given.inside and touch.inside:
            weight, strength = 1.0, weight
        return Term(
            adapter=given.name,
            weight=weight,
            target=placed.target,
            piece=piece,
            kind=placed.kind,
            additive=touch.additive,
            replaces=touch.replaces,
            local=touch.local,
            rank=touch.rank,
            reads=touch.reads,
            tied=tied,
            twins=twins,
            strength=strength,
            siblings=placed.siblings,
            nbytes=nbytes,
        )

    def _everywhere(self, term: Term, out: str) -> None:
        """Add a change to every other copy of what it is a change of; a value is each copy's own in PEFT too."""
        source = term.piece.parameter
        repeated = self.index.repeated
        copies = repeated.copies(source) if repeated and source == out and not term.replaces else ()
        if len(copies) > 1 and not term.additive:
            self.bent.append(term.target)
        for copy in copies:
            if copy != source:
                self.terms.setdefault((copy, copy), []).append(replace(term, piece=replace(term.piece, parameter=copy)))

    def _edit(self, edits: Edits) -> None:
        for key, value in edits.config.items():
            if self.config.setdefault(key, value) != value:
                self.found.append(
                    note(
                        "config-conflict",
                        Verdict.INCOMPATIBLE,
                        f"two adapters need another {key} in config.json: {self.config[key]} and {value}",
                        (key,),
                        "merge them one by one, into two results",
                    )
                )
        self.renamed |= edits.renamed
        self.removed |= set(edits.removed)

    def _conflicts(self) -> None:
        for (source, out), terms in self.terms.items():
            values = [term for term in terms if term.replaces]
            for number, first in enumerate(values):
                for second in values[number + 1 :]:
                    if _overlap(first.piece, second.piece, self.index.parameters[source].shape):
                        self._twice(out, first.adapter, second.adapter)
            for given, new in self.created.get(out, ()):
                others = sorted({term.adapter for term in terms})
                self.found.append(
                    note(
                        "two-shapes",
                        Verdict.INCOMPATIBLE,
                        f"'{given.name}' brings {out} as {list(new.shape)}, and {' and '.join(map(repr, others))} "
                        f"changes it as {list(self.index.parameters[source].shape)}",
                        (out,),
                        "merge them one by one, into two results",
                    )
                )
            if self.removed & {source, out}:
                self.found.append(
                    note(
                        "target-removed",
                        Verdict.DEGRADED,
                        "the new head replaces parameters that an adapter changes, and these changes would be lost",
                        (out,),
                        "to go on without them: --allow target-removed",
                    )
                )
        for name, brought in self.created.items():
            if len(brought) > 1:
                self._twice(name, brought[0][0].name, brought[1][0].name)

    def _twice(self, name: str, first: str, second: str) -> None:
        self.found.append(
            note(
                "two-replacements",
                Verdict.INCOMPATIBLE,
                f"'{first}' and '{second}' both replace {name}, and a parameter has one value",
                (name,),
                "leave one adapter out, or merge them one by one, into two results",
            )
        )

    def _untie(self) -> None:
        """Part the tied parameters that adapters change, or say why that cannot be."""
        groups = {group[0]: group for group in self.index.tied}
        changed = {
            source: {out for of, out in self.terms if of == source}
            for source, _ in self.terms
            if source in groups and not self._together(source)
        }
        changed |= {name: {name} for name in self.created if name in groups}
        self.stale |= {alias for source, _ in self.terms for alias in groups.get(source, ())[1:]} & set(
            self.index.extras
        )
        if not changed:
            return
        names = sorted(out for outs in changed.values() for out in outs)
        edits = self.framework.untie(self.index, names)
        resized = sorted(name for name in self.created if name in groups)
        if edits is None and not resized and all(len(outs) == 1 for outs in changed.values()):
            self._change_all(names)
            return
        if edits is None or resized:
            why = f"{resized[0]} changes its shape" if resized else f"{self.framework.name} has no way to say so"
            self.found.append(
                note(
                    "tied-parameter",
                    Verdict.INCOMPATIBLE,
                    f"{names[0]} shares its storage with {', '.join(self.index.tied_with(names[0]))}; changing it "
                    f"would part them, and that cannot be written down: {why}",
                    names,
                )
            )
            return
        self._edit(edits)
        for alias, source in edits.copied.items():
            self.terms.setdefault((source, alias), [])
        self.stale |= {alias for group in groups.values() for alias in group[1:] if alias in self.index.extras}
        parted = [name for name in names if changed.get(self.index.stored(name), set()) != set(self._group(name))]
        if parted:
            others = ", ".join(self.index.tied_with(parted[0]))
            self.found.append(
                note(
                    "tied-parameter",
                    Verdict.DEGRADED,
                    f"{parted[0]} shares its storage with {others}, and the adapter was trained to change it alone; "
                    "the result stores them apart, so it is larger, and is configured as untied",
                    parted,
                    "to untie them knowingly: --allow tied-parameter",
                )
            )

    def _change_all(self, names: Sequence[str]) -> None:
        """Let the change of one name be the change of its parameter, where no checkpoint can hold them apart."""
        for name in names:
            source = self.index.stored(name)
            self.terms[source, source] = self.terms.pop((source, name))
        others = ", ".join(self.index.tied_with(names[0]))
        self.found.append(
            note(
                "tied-parameter",
                Verdict.DEGRADED,
                f"{names[0]} shares its storage with {others}, and the adapter was trained to change it alone; "
                f"{self.framework.name} has no way to store them apart, so the change would be that of all of them",
                names,
                "to change all of them knowingly: --allow tied-parameter",
            )
        )

    def _together(self, source: str) -> bool:
        """Whether all that changes a parameter is meant for every name that it has."""
        return all(term.tied for (of, _), terms in self.terms.items() if of == source for term in terms)

    def _group(self, name: str) -> tuple[str, ...]:
        return (name, *self.index.tied_with(name))

    def _changed(self) -> Iterator[Step]:
        for (source, out), terms in self.terms.items():
            if self.removed & {source, out} or out in self.created:
                continue
            info = self.index.parameters[source]
            form = Form(info.shape, info.dtype)
            widths = self.wide.get(source)
            yield Step(
                out=out,
                source=self._origin(source),
                before=form,
                after=Form((form.shape[0], max(widths.values()), *form.shape[2:]), form.dtype) if widths else form,
                terms=tuple(_narrow(term, widths, form.shape) for term in terms) if widths else tuple(terms),
                stored_as=info.stored_as,
                saved_as=self._spelled(out, self.renamed.get(out, info.stored_as if out == source else out)),
            )

    def _copied(self) -> Iterator[Step]:
        """Layers that moved or are repeated, where nothing else is done to them."""
        for name, info in self.index.parameters.items() if self.index.repeated else ():
            source = self._origin(name)
            if source == name or (name, name) in self.terms or name in self.created or name in self.removed:
                continue
            form = Form(info.shape, info.dtype)
            yield Step(
                out=name,
                source=source,
                before=form,
                after=form,
                terms=(),
                stored_as=info.stored_as,
                saved_as=self._spelled(name, self.renamed.get(name, info.stored_as)),
            )

    def _brought(self) -> Iterator[Step]:
        for name, ((given, new), *_) in self.created.items():
            info = self.index.parameters.get(name)
            touch = new.touch
            yield Step(
                out=name,
                source=name if info else None,
                before=Form(info.shape, info.dtype) if info else None,
                after=Form(new.shape, new.dtype),
                terms=(
                    Term(
                        adapter=given.name,
                        weight=1.0,
                        target=new.target,
                        piece=Piece(parameter=name),
                        kind=new.kind,
                        additive=touch.additive,
                        replaces=True,
                        local=True,
                        rank=touch.rank,
                        nbytes=new.nbytes,
                    ),
                ),
                stored_as=info.stored_as if info else "",
                saved_as=self.renamed.get(name, info.stored_as if info else name),
            )


def _in_turn(targets: Sequence[Target]) -> Finding:
    """That PEFT merges the copies of a layer one into the other, which for some kinds is no sum."""
    return Finding(
        code=REFUSED,
        axis="policy",
        level=Verdict.INCOMPATIBLE,
        message=f"PEFT merges the copies of a repeated layer one after the other into one weight, and a change of "
        f"{targets[0].name} looks at the weight that it finds, so what comes of it is no sum of changes to this base",
        where=tuple(target.name for target in targets),
        remedy="--compat strict (each copy with its own change)",
    )


def _narrow(term: Term, widths: Mapping[tuple[str, Target], int], shape: tuple[int, ...]) -> Term:
    """A change of a weight that another makes wider: it is to the columns that it knows."""
    width = widths.get((term.adapter, term.target), shape[1])
    if width == max(widths.values()):
        return term
    region = term.piece.of_parameter
    start, stop, _ = region.cols.indices(shape[1]) if isinstance(region.cols, slice) else (0, width, 1)
    inner = replace(region, cols=slice(start, stop if width == shape[1] else width))
    return replace(term, piece=replace(term.piece, of_parameter=inner))


def _tied(placement: Placement) -> dict[str, list[Target]]:
    """Parameter -> the targets under which an adapter changes it for all its names, where these all say the same."""
    said: dict[str, dict[str, list[Target]]] = {}
    for placed in placement.placed:
        for piece in placed.pieces if placed.touch.tied else ():
            said.setdefault(piece.parameter, {}).setdefault(placed.touch.tied, []).append(placed.target)
    return {source: next(iter(each.values())) for source, each in said.items() if len(each) == 1}


def _overlap(first: Piece, second: Piece, stored: tuple[int, ...]) -> bool:
    """Whether two regions of a stored parameter share an element."""
    a, b = first.of_parameter, second.of_parameter
    if None not in (a.expert, b.expert) and a.expert != b.expert:
        return False
    return all(_cells(a, axis, stored) & _cells(b, axis, stored) for axis in range(min(2, len(stored))))


def _cells(region: Region, axis: int, stored: tuple[int, ...]) -> set[int]:
    """The positions on a stored axis that a region takes, experts aside."""
    sizes = stored if region.expert is None else stored[1:]
    along: Index = (region.cols, region.rows)[(axis == 0) != region.transposed]
    size = sizes[axis] if axis < len(sizes) else 1
    return set(range(*along.indices(size))) if isinstance(along, slice) else set(along)
