"""Changes under the words of another vocabulary: split, fused and turned around as each word says.

A size that a word does not allow is refused rather than guessed at.  What each written change is of the source is kept
through both steps where a base had words of its own, so that the proof looks at the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.conversion.carry import Misfit, refusal
from lorahub.conversion.change import Change, Origin, Weight
from lorahub.conversion.fused import land
from lorahub.conversion.vocabulary import PREFIXES, Lexicon, Word
from lorahub.deltas.delta import ALL

__all__ = ["in_words", "short"]


def short(module: str) -> str:
    """A module's name without what an original checkpoint puts before it."""
    return next((module.removeprefix(each) for each in PREFIXES if module.startswith(each)), module)


def in_words(
    changes: list[Change], lexicon: Lexicon, component: str, to: str, remedy: str, weight: Weight
) -> list[Change]:
    """The changes in the other vocabulary, split or fused as its words say.

    Args:
        changes: of one model, all of whose modules the lexicon has.
        lexicon: the family's words.
        component: what to call the model.
        to: the format, for messages.
        remedy: for a change that cannot be moved.
        weight: the base's weights, for kinds that must become LoRA before they are cut or fused.

    Raises:
        CannotCarry: a size is none that the words allow, or parts cannot stand beside each other.
    """
    fresh = [replace(change, origins=(Origin(target=change.target),)) for change in changes]
    layouts: dict[Target, Layout] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    stuck: dict[Target, str] = {}
    for change in fresh:
        word, at = lexicon.names[short(change.target.module)]
        shape = change.extent
        if shape is None:
            stuck[change.target] = "its parts have sizes that only a base tells"
            continue
        own = change.target.parameter
        parameter = word.other(own) if at < 0 else word.own(own)
        if not parameter:
            stuck[change.target] = f"{own} is no parameter that {word.name} has in both"
            continue
        layout = _layout(change.target, word, at, shape, Target(component, "", parameter), shapes)
        if layout is None:
            stuck[change.target] = f"{list(shape)} is no size that {word.name} has"
        else:
            layouts[change.target] = layout
    infos = {name: ParameterInfo(shape=shape, dtype="F32", stored_as=name) for name, shape in shapes.items()}
    if not stuck:
        landed, stuck = land(fresh, layouts, BaseIndex(ref=BaseRef(), framework="", parameters=infos), weight)
    by_target = {change.target: change for change in changes}
    if not stuck:
        result = []
        for change in landed:
            origins = [found for origin in change.origins for found in _composed(by_target[origin.target], origin)]
            result.append(replace(change, origins=tuple(origins)))
            if len(origins) < len(change.origins):
                stuck |= {origin.target: "it was fused for the base already" for origin in change.origins}
    if stuck:
        raise refusal(
            to, [Misfit(changes=(by_target[each],), reason=reason, remedy=remedy) for each, reason in stuck.items()]
        )
    return result


def _layout(
    target: Target, word: Word, at: int, shape: tuple[int, ...], there: Target, shapes: dict[str, tuple[int, ...]]
) -> Layout | None:
    """Where a parameter lands in the other vocabulary, or None where its size is none that the word allows.

    ``there`` has the component and the parameter that it has in the other vocabulary.
    """

    def named(module: str) -> str:
        return replace(there, module=module).name

    size, rest, total = shape[0] if shape else 0, shape[1:], sum(word.shares)
    if len(word.parts) == 1:
        if word.halves_swapped and size % 2:
            return None
        half = (*range(size // 2, size), *range(size // 2))
        name = named(word.parts[0] if at < 0 else word.name)
        shapes[name] = shape
        cut = Region(rows=half) if word.halves_swapped else Region()
        return Layout(target=target, pieces=(Piece(parameter=name, of_delta=cut),))
    share = total if at < 0 else word.shares[at]
    unit = size // share
    if not unit or size % share or (rest and unit != rest[0]):
        return None  # the projections of these models are as wide as what they see
    bands = []
    start = 0
    for each in word.shares:
        bands.append(slice(start, start + each * unit))
        start += each * unit
    if at < 0:
        pieces = []
        for part, share, rows in zip(word.parts, word.shares, bands, strict=True):
            shapes[named(part)] = (share * unit, *rest)
            pieces.append(Piece(parameter=named(part), of_delta=Region(rows=rows)))
        return Layout(target=target, pieces=tuple(pieces))
    name = named(word.name)
    shapes[name] = (total * unit, *rest)
    return Layout(target=target, pieces=(Piece(parameter=name, of_parameter=Region(rows=bands[at])),))


def _composed(before: Change, after: Origin) -> Iterator[Origin]:
    """What of the source a part of an intermediate change is."""
    for origin in before.origins:
        if origin.of_parameter.whole and after.of_delta.whole:
            yield replace(origin, of_parameter=after.of_parameter)
        elif origin.whole:
            yield replace(after, target=origin.target)
        elif origin.of_parameter.rows == after.of_delta.rows and after.of_delta.cols == ALL:
            yield replace(origin, of_parameter=after.of_parameter)
        elif (
            origin.of_parameter.whole
            and isinstance(once := origin.of_delta.rows, tuple)
            and isinstance(twice := after.of_delta.rows, tuple)
        ):
            rows = tuple(once[at] for at in twice)
            cut = Region() if rows == tuple(range(len(rows))) else Region(rows=rows)
            yield replace(origin, of_delta=cut, of_parameter=after.of_parameter)
