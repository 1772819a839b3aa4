"""Suffixes of one module brought together into groups, for formats that have no config beside the weights.

Which kind they are, whether its slots are all there and fit, and what scales them.  What is wrong becomes a finding
with the keys it concerns.  Knows shapes and declared spellings; the formats take names apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lorahub.bases.index import natural
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Spelling, TensorRef, Touch
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.families import by_module
from lorahub.shapes import ShapeMisfit, bind

__all__ = ["Choices", "Stem", "Trouble", "Ways", "gather", "gather_placed", "make_factors", "ways_of"]

Ways: TypeAlias = "Sequence[tuple[Kind, Spelling]]"
"""Kinds, each with a way it is spelled."""

Choices: TypeAlias = "dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[Kind, Spelling, Mapping[str, Leaf]] | str]"
"""Places of the ways that can be meant, and suffixes -> the one that is, or what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """What a file says of one module.

    Attributes:
        component: "" or the part of a pipeline.
        module: under the base's name where it was found there, else as spelled.
        keys: suffix -> key, those of factors only.
        whole: parameter -> (kind, slot, key), for tensors that are a change of one parameter by themselves.
        numbers: what the spelling's options read: ``alpha`` and the like.
        number_keys: name -> key of the numbers that are tensors.
    """

    component: str
    module: str
    keys: Mapping[str, str]
    whole: Sequence[tuple[str, str, str, str]] = ()
    numbers: Mapping[str, JSON] = field(default_factory=dict)
    number_keys: Mapping[str, str] = field(default_factory=dict)


class Trouble:
    """What is wrong or worth a word, by code: the keys concerned and the first case in words."""

    _TEXTS: Mapping[str, tuple[Axis, Verdict, str, str]] = {
        "alpha-conflict": (
            "integrity",
            Verdict.INCOMPATIBLE,
            "alpha is stated twice, and differently",
            "ask its author which one holds, and correct the other",
        ),
        "alpha-unused": ("format", Verdict.EXACT, "an alpha beside what is not scaled by it", ""),
        "alpha-void": (
            "format",
            Verdict.UNVERIFIED,
            "an alpha of 0 or NaN is taken for a missing one, as trainers do",
            "",
        ),
        "key-twice": ("integrity", Verdict.INCOMPATIBLE, "two keys say the same", ""),
        "key-unknown": (
            "format",
            Verdict.DEGRADED,
            "tensors are no slot of any kind",
            "to leave them out: --allow key-unknown",
        ),
        "kind-unsupported": (
            "format",
            Verdict.INCOMPATIBLE,
            "a weight change that no installed kind reads",
            "lorahub plugins",
        ),
        "module-ambiguous": ("format", Verdict.INCOMPATIBLE, "one name means several modules of the base", ""),
        "oft-scale-assumed": (
            "format",
            Verdict.UNVERIFIED,
            "the angles of scaled OFT are divided by 2 sqrt(b - 1), as OneTrainer does; drafts used another number",
            "",
        ),
        "slot-misfit": (
            "integrity",
            Verdict.INCOMPATIBLE,
            "tensors of one module do not fit together",
            "fetch the file again, or ask its author",
        ),
        "slot-missing": (
            "integrity",
            Verdict.INCOMPATIBLE,
            "part of a module's tensors is missing",
            "fetch the file again, or ask its author",
        ),
    }

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[str], list[str]]] = {}

    def add(self, code: str, keys: Iterable[str], what: str) -> None:
        """Note one case."""
        cases, where = self._found.setdefault(code, ([], []))
        cases.append(what)
        where.extend(keys)

    def __bool__(self) -> bool:
        return bool(self._found)

    def findings(self) -> tuple[Finding, ...]:
        """One for each code, sorted."""
        result = []
        for code, (cases, where) in sorted(self._found.items()):
            axis, level, text, remedy = self._TEXTS[code]
            more = f" (and {count - 1} more like it)" if (count := len(set(cases))) > 1 else ""
            result.append(
                Finding(
                    code=code,
                    axis=axis,
                    level=level,
                    message=f"{text}: {cases[0]}{more}",
                    where=tuple(sorted(where, key=natural)),
                    remedy=remedy,
                    allowable=level is Verdict.DEGRADED,
                )
            )
        return tuple(result)


def ways_of(format_name: str, own: Mapping[str, Spelling], kinds: Sequence[Kind]) -> Ways:
    """How a format spells each kind: by its own table, and as kinds themselves declare."""
    ways = [(kind, own[kind.name]) for kind in kinds if kind.name in own]
    return [*ways, *((kind, each) for kind in kinds for each in kind.spellings if each.format == format_name)]


def gather(stems: Iterable[Stem], ways: Ways, header: Header, trouble: Trouble) -> tuple[Group, ...]:
    """The groups of all modules, in natural order; modules that make none become ``trouble``."""
    return tuple(group for _, group in gather_placed(dict(enumerate(stems)), ways, header, trouble))


def gather_placed(stems: Mapping[int, Stem], ways: Ways, header: Header, trouble: Trouble) -> list[tuple[int, Group]]:
    """As ``gather``, each group with its module's place.

    A module's name and keys are for messages: what a kind's options and touches are follows from slots and numbers.
    """
    groups: list[tuple[int, Group]] = []
    choices: Choices = {}  # the modules of a file have the same few sets of suffixes
    for at, stem in sorted(stems.items(), key=lambda each: by_module(each[1].component, each[1].module)):
        made = make_factors(stem, ways, header, trouble, choices) if stem.keys else None
        if made:
            groups.append((at, made[0]))
        elif not stem.keys and stem.number_keys:
            code, what = (
                ("alpha-unused", "differences are not scaled") if stem.whole else ("slot-missing", "no factors")
            )
            trouble.add(code, stem.number_keys.values(), f"{stem.module}: {what}")
        for parameter, kind, slot, key in stem.whole:
            info = header.tensors[key]
            ref = TensorRef(key=key, shape=info.shape, dtype=info.dtype)
            made_whole = Group(
                component=stem.component, module=stem.module, parameter=parameter, kind=kind, slots={slot: ref}
            )
            groups.append((at, made_whole))
    return groups


def make_factors(
    stem: Stem, ways: Ways, header: Header, trouble: Trouble, choices: Choices
) -> tuple[Group, tuple[Touch, ...]] | None:
    """The group of one module's factors and what it changes, or None where they make none and became ``trouble``.

    ``choices``: one for many modules under the same ways, empty at first.
    """
    keys = [*stem.keys.values(), *stem.number_keys.values()]
    usable = tuple(at for at, (_, spelling) in enumerate(ways) if spelling.when(stem.numbers))
    which = (usable, tuple(stem.keys))
    chosen = choices.get(which)
    if chosen is None:
        chosen = choices[which] = _choose([ways[at] for at in usable], stem.keys)
    if isinstance(chosen, str):
        trouble.add("slot-missing", keys, f"{stem.module} {chosen}")
        return None
    kind, spelling, leaves = chosen
    slots = {leaf.slot: _ref(header, stem.keys[suffix], leaf) for suffix, leaf in leaves.items()}
    if empty := [ref.key for slot, ref in slots.items() if 0 in ref.shape and not kind.slot(slot).prunable]:
        trouble.add("slot-misfit", keys, f"{empty[0]} is empty")
        return None
    role = next((leaf.role for leaf in leaves.values() if leaf.role), "")
    try:
        bind(tuple([(slot, kind.slot(slot).dims, ref.shape) for slot, ref in slots.items()]))
        options = spelling.options(stem.numbers, stem.module, slots)
        for name, key in stem.number_keys.items():
            slots[name] = _ref(header, key, None)
        group = Group(
            component=stem.component, module=stem.module, kind=kind.name, role=role, slots=slots, options=options
        )
        touched = kind.touches(group)
    except ShapeMisfit as misfit:
        trouble.add("slot-misfit", keys, f"{stem.module}: {misfit}")
    except UnsupportedKind as error:
        trouble.add("kind-unsupported", keys, error.message)
    except IntegrityError as error:
        trouble.add("slot-misfit", keys, error.message)
    else:
        return group, touched
    return None


def _ref(header: Header, key: str, leaf: Leaf | None) -> TensorRef:
    info = header.tensors[key]
    turned = leaf is not None and leaf.transposed
    shape = (*info.shape[1::-1], *info.shape[2:]) if turned and len(info.shape) > 1 else info.shape
    return TensorRef(key=key, shape=shape, dtype=info.dtype, transposed=turned)


def _choose(ways: Ways, present: Collection[str]) -> tuple[Kind, Spelling, Mapping[str, Leaf]] | str:
    """The one kind that knows every suffix and lacks no slot, or what is wrong, to follow the module's name."""
    whole: list[tuple[Kind, Spelling, Mapping[str, Leaf]]] = []
    short: list[list[str]] = []
    for kind, spelling in ways:
        known = {leaf.suffix: leaf for leaf in spelling.leaves}
        leaves = {suffix: known[suffix] for suffix in present if suffix in known}
        slots = [leaf.slot for leaf in leaves.values()]
        if len(leaves) < len(present) or len(set(slots)) < len(slots):
            continue
        lacking = [slot.name for slot in kind.slots if not slot.optional and slot.name not in slots]
        if lacking:
            short.append(
                [next((leaf.suffix for leaf in spelling.leaves if leaf.slot == slot), slot) for slot in lacking]
            )
        else:
            whole.append((kind, spelling, leaves))
    if len(whole) == 1:
        return whole[0]
    has = f"has {', '.join(sorted(present))}"
    if whole:
        return f"{has}, which is {' and '.join(kind.title for kind, _, _ in whole)} alike"
    if not short:
        return f"{has}, which no kind has together"
    return f"{has} without {', '.join(short[min(range(len(short)), key=lambda at: len(short[at]))])}"
