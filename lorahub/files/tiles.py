"""Headers as the safetensors library writes them, read in one pass: each entry in the same words, without blanks.

What is accepted here is what the scanner of ``header`` accepts, with the same result, in a fraction of the time; of
anything else this says nothing, and the scanner finds what is wrong.  That the two agree rests on three things.  The
entries found take up the text to the last character.  Names and forms pass the scanner's own checks, once for each
text that spells them.  And offsets are not believed but computed: they must be spelled as the sizes of the forms say.

The pattern takes time proportional to the text, whatever the text: a part of it that may be long ends at the next
quote, and no attempt begins between the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lorahub.files.entries import Form, Limits, Tensors, form_of, name_fault
from lorahub.files.grammar import INTEGERS_ONLY, Malformed, Scanner

__all__ = ["Known", "tiled"]

_ENTRY = re.compile(r'"([^"]*)":\{"(dtype":"[^"]*","shape":\[[^"]*)"data_offsets":\[')
"""What stands in front of a tensor's offsets; these, to the next quote, are what lies between two matches."""

_NEXT, _LAST = '%d,%d]},"', "%d,%d]}}"
"""Offsets, to the next quote, and to the header's end."""

_EACH = '"data_offsets":['
_SHORTEST = 45
"""Characters that an entry takes at least."""

_LONGEST = 256
"""Characters of a form; real ones take thirty, and the scanner takes entries of up to 4,096."""

_DIGITS = 19
_TOO_FAR = 10**_DIGITS
_NAMES = 1 << 16
"""Names kept: those of some thirty bases, 200 bytes each."""

_FORMS = 1 << 12
"""Forms kept: bases have a dozen shapes of weights, and adapters a dozen ranks."""

_END = 64
"""Characters that tell one structure from another, nearly always: the offsets of the last tensor are among them."""

_STRUCTURES = 64
"""Headers kept, of up to a MiB each: in a folder of adapters of one trainer there are a handful."""


@dataclass(frozen=True, slots=True)
class Known:
    """What was found sound in headers that were read before, for whoever reads many; empty at first, and bounded.

    Several threads may share one: what another has thrown away meanwhile is worked out again.

    Attributes:
        limits: what held for them.
        structures: length and end of what follows the metadata -> all of it, and the tensors it lists.
        names: as spelled -> a name.
        forms: as spelled -> a form, and how many bytes a tensor of it takes.
    """

    limits: Limits = field(default_factory=Limits)
    structures: dict[tuple[int, str], tuple[str, Tensors]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    forms: dict[str, tuple[Form, int]] = field(default_factory=dict)

    def met(self, text: str) -> Tensors | None:
        """What was kept for the same text; to compare with one text is quicker than to hash this one."""
        found = self.structures.get((len(text), text[-_END:]))
        return found[1] if found is not None and found[0] == text else None

    def keep(self, text: str, tensors: Tensors) -> None:
        """Remember a structure; the oldest goes where there are too many."""
        if len(self.structures) >= _STRUCTURES:
            self.structures.pop(list(self.structures)[0], None)  # noqa: RUF015 - a list is made at once, for threads
        self.structures[len(text), text[-_END:]] = text, tensors


def tiled(text: str, limits: Limits, known: Known) -> Tensors | None:
    """The tensors of a header in the usual words, or None where it is in others, or not sound.

    Args:
        text: a comma and what follows it, to the closing brace of the header; without metadata.
        limits: how much the header may ask for.
        known: what was read before under the same limits.
    """
    if len(text) > _SHORTEST * limits.tensors and text.count(_EACH) > limits.tensors:
        return None
    parts = _ENTRY.split(text)  # strings alone, without a tuple for each entry
    if len(parts) == 1 or parts[0] != "," or len(parts) > 3 * limits.tensors + 1:
        return None
    names, forms = _names(parts[1::3], limits, known), _forms(parts[2::3], known)
    if names is None or forms is None:
        return None
    return _placed(names, *forms, '"'.join(parts[3::3]))  # of which none has a quote, so that all can be compared


def _placed(names: list[str], forms: list[Form], nbytes: list[int], offsets: str) -> Tensors | None:
    """The tensors, if offsets are spelled as the forms say, in the order of their bytes."""
    bounds = list(accumulate(nbytes, initial=0))
    if _spelled(bounds[:-1], bounds[1:]) != offsets:  # another order than that of their bytes, as old writers had it
        order = _order(offsets)
        if order is None or len(order) != len(names):
            return None
        bounds = list(accumulate(map(nbytes.__getitem__, order), initial=0))
        back = sorted(range(len(order)), key=order.__getitem__)
        if _spelled([bounds[at] for at in back], [bounds[at + 1] for at in back]) != offsets:
            return None
        names, forms = [names[at] for at in order], [forms[at] for at in order]
    if bounds[-1] >= _TOO_FAR:
        return None
    listed = dict(zip(names, forms, strict=True))
    return Tensors(listed, bounds[:-1], bounds[1:]) if len(listed) == len(names) else None


def _spelled(starts: Sequence[int], stops: Sequence[int]) -> str:
    """How a header has these offsets, to its end."""
    both = [0] * (2 * len(starts))
    both[::2], both[1::2] = starts, stops
    return (_NEXT * (len(starts) - 1) + _LAST) % tuple(both)


def _order(offsets: str) -> list[int] | None:
    """The tensors by where they begin and end, if that is told by numbers; that they are well spelled is for later."""
    numbers = offsets.removesuffix("]}}").replace(']},"', ",").split(",")
    if max(map(len, numbers)) > _DIGITS:
        return None
    try:
        found = list(map(int, numbers))
    except ValueError:
        return None
    places = list(zip(found[::2], found[1::2], strict=False))
    return sorted(range(len(places)), key=places.__getitem__)


def _names(spelled: list[str], limits: Limits, known: Known) -> list[str] | None:
    try:
        return list(map(known.names.__getitem__, spelled))
    except KeyError:  # some are new
        if len(known.names) + len(spelled) > _NAMES:
            known.names.clear()
    names = []
    for text in spelled:
        name = known.names.get(text)
        if name is None:
            name = _name(text, limits)
            if name is None:
                return None
            known.names[text] = name
        names.append(name)
    return names


def _name(text: str, limits: Limits) -> str | None:
    if "\\" not in text and text.isprintable():  # it stands for itself
        return None if name_fault(text, limits) else text
    scanner = Scanner(f'"{text}"')
    try:
        name = scanner.string("a name")
        scanner.end("a name")
    except Malformed:
        return None
    return None if name_fault(name, limits) else name


def _forms(spelled: list[str], known: Known) -> tuple[list[Form], list[int]] | None:
    if len(known.forms) > _FORMS:
        known.forms.clear()
    forms: dict[str, Form] = {}
    nbytes: dict[str, int] = {}
    for text in set(spelled):
        found = known.forms.get(text) or _form(text)
        if found is None:
            return None
        forms[text], nbytes[text] = known.forms[text] = found
    return list(map(forms.__getitem__, spelled)), list(map(nbytes.__getitem__, spelled))


def _form(text: str) -> tuple[Form, int] | None:
    """A form, and how many bytes a tensor of it takes."""
    if not text.endswith("],"):
        return None
    scanner = Scanner(f'{{"{text[:-1]}}}')
    try:
        value = scanner.small("a form", decoder=INTEGERS_ONLY, limit=_LONGEST)
        scanner.end("a form")
        if value.keys() != {"dtype", "shape"}:
            return None
        form, bits = form_of(value["dtype"], value["shape"], "a form")
    except Malformed:
        return None
    return None if bits % 8 else (form, bits // 8)
