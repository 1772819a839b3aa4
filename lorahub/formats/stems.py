"""What the tensors of one module say, for formats that keep numbers as tensors: slots, whole differences and numbers.

The rules for alpha are here and nowhere else: a tensor comes before what a header states, an alpha of 0 or NaN is
taken for a missing one, and two that differ are an error with both.  Knows suffixes; formats take names apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import compress
from types import MappingProxyType
from typing import Self

from lorahub.deltas.kind import JSON, Group
from lorahub.formats.families import representatives
from lorahub.formats.flat_spellings import AXES, NUMBERS, REFUSED, ROOT, STAGED, UNSCALED, WHOLE
from lorahub.formats.format import AdapterFiles, Part
from lorahub.formats.gather import Stem, Trouble, Ways
from lorahub.formats.numbers import read_numbers
from lorahub.formats.runs import Runs, bring_together

__all__ = ["NOTHING", "TOLERANCE", "Stated", "Stems", "note_unused", "suffixes_of"]

TOLERANCE = 1e-3
"""Relative; alphas are stored in half precision."""

_NUMBERS = frozenset(NUMBERS)

_NEEDS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "on_input": lambda suffix: suffix == "weight",
        "oft_R.scaled_oft": lambda suffix: suffix == "oft_R.weight",
        "scalar": lambda suffix: suffix.startswith(("lora_", "hada_", "lokr_", "a1.")),
    }
)
"""Suffix of a number -> what must stand beside it for the number to mean anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What something else than the module's own tensors says of it.

    Attributes:
        alpha: None where it says nothing.
        source: who says so, for the message: "lora_adapter_metadata in the header".
        numbers: whatever else the spelling's options read.
    """

    alpha: float | None = None
    source: str = ""
    numbers: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))


NOTHING = Stated()
"""Nothing is said."""


class Stems:
    """Modules of one file, made one by one.

    Args:
        files: where the numbers lie.
        file: the weights file.
        ways: how the format spells kinds.
        trouble: takes what is wrong.

    Attributes:
        values: key -> number, of those that were read.
        unknown: keys that mean nothing.
    """

    def __init__(self, files: AdapterFiles, file: str, ways: Ways, trouble: Trouble) -> None:
        self._files, self._file = files, file
        self._known = suffixes_of(ways)
        self.trouble = trouble
        self.values: dict[str, float] = {}
        self.unknown: list[str] = []

    def apart(self, trouble: Trouble) -> Self:
        """The same with other places for what is wrong and what is unknown."""
        other = copy(self)
        other.trouble, other.unknown = trouble, []
        return other

    def bring_together(
        self,
        stems: Sequence[tuple[str, str]],
        suffixes: Sequence[str],
        parts: Mapping[str, Part],
        *,
        clash: bool,
    ) -> Runs:
        """The modules of the file's keys, with their numbers read; keys of no module and no part are ``unknown``.

        Args:
            stems: of each key of the file, in its order.
            suffixes: of each; "" for a key that is of no module.
            parts: what is no change of a module, and has its keys for itself.
            clash: whether two keys may say the same.

        Raises:
            IntegrityError: a number is no single number.
        """
        keys = [*self._files.headers[self._file].tensors]
        if parts or "" in suffixes:
            taken = {ref.key for part in parts.values() for ref in part.tensors.values()}
            self.unknown += [key for key, suffix in zip(keys, suffixes, strict=True) if not suffix and key not in taken]
            used = [bool(suffix) and key not in taken for key, suffix in zip(keys, suffixes, strict=True)]
            keys, stems = list(compress(keys, used)), list(compress(stems, used))
            suffixes = list(compress(suffixes, used))
        runs = bring_together(keys, stems, suffixes, self._twice, clash=clash)
        self._read(runs.keys, runs.suffixes)
        return runs

    def _twice(self, key: str, other: str) -> None:
        self.trouble.add("key-twice", [key], f"{key} and {other}")

    def _read(self, keys: Sequence[str], suffixes: Sequence[str]) -> None:
        """Read all numbers among these keys, each with its suffix.

        Raises:
            IntegrityError: one of them is no single number.
        """
        numbers = list(compress(keys, map(_NUMBERS.__contains__, suffixes)))
        self.values |= read_numbers(self._files, self._file, numbers)

    def make(self, component: str, module: str, keys: Mapping[str, str], stated: Stated = NOTHING) -> Stem | None:
        """What a module's keys are, or None where they are refused as a whole.

        Args:
            component: the part of a pipeline, as the base has it.
            module: as the base has it, or as spelled.
            keys: suffix -> key.
            stated: what holds where the tensors do not say.
        """
        refused = sorted({REFUSED[suffix] for suffix in keys if suffix in REFUSED and suffix not in self._known})
        header = self._files.headers[self._file]
        if "oft_R.scaled_oft" in keys and header.tensors[keys["oft_R.scaled_oft"]].dtype == "I64":
            refused.append("scaled OFT of a OneTrainer before its release, which divides by another number")
        if refused:
            self.trouble.add("kind-unsupported", keys.values(), f"{module} is {' and '.join(refused)}")
            return None
        idle = {name for name, needs in _NEEDS.items() if name in keys and not any(map(needs, keys))}
        factors = {s: key for s, key in keys.items() if s in self._known and s not in WHOLE and s not in NUMBERS}
        self.unknown += [
            key
            for s, key in keys.items()
            if s in idle or (s not in self._known and s not in NUMBERS and s not in WHOLE)
        ]
        numbers, number_keys = self._numbers(module, {s: keys[s] for s in NUMBERS if s in keys and s not in idle}, keys)
        alpha = self._alpha(module, keys, stated)
        if alpha is not None:
            numbers["alpha"], numbers["lora_alpha"] = alpha, alpha
            # a tensor's alpha has the root in it already, as LyCORIS stores it
            numbers[ROOT] = stated.numbers.get("use_rslora") is True and "alpha" not in number_keys
        if STAGED in keys:
            numbers[AXES] = len(header.tensors[keys[STAGED]].shape)
        return Stem(
            component=component,
            module=module,
            keys=factors,
            whole=[(WHOLE[suffix], "full", "diff", key) for suffix, key in keys.items() if suffix in WHOLE],
            numbers={**stated.numbers, **numbers},
            number_keys=number_keys,
        )

    def _numbers(
        self, module: str, found: Mapping[str, str], keys: Mapping[str, str]
    ) -> tuple[dict[str, JSON], dict[str, str]]:
        """The numbers that are tensors and mean something, but for alpha's value; and their keys."""
        numbers: dict[str, JSON] = {}
        number_keys: dict[str, str] = {}
        for suffix, key in found.items():
            value = self.values[key]
            if suffix == "alpha" and (math.isnan(value) or (not value and STAGED not in keys)):
                self.trouble.add("alpha-void", [key], f"{key} is {value}")
            elif not math.isfinite(value):
                self.trouble.add("slot-misfit", [key], f"{key} is {value}")
            else:
                number_keys[NUMBERS[suffix]] = key
                if suffix != "alpha":
                    numbers[NUMBERS[suffix]] = int(value) if value.is_integer() else value
        if "scaled" in numbers:
            self.trouble.add("oft-scale-assumed", [], module)
        return numbers, number_keys

    def _alpha(self, module: str, keys: Mapping[str, str], stated: Stated) -> float | None:
        """The alpha that holds: the tensor's, or what is stated; none where neither says anything that counts."""
        key, wanted = keys.get("alpha"), stated.alpha
        if wanted is not None and (not wanted or math.isnan(wanted)):
            self.trouble.add("alpha-void", [], f"{stated.source} says {wanted:g} for {module}")
            wanted = None
        value = self.values[key] if key else math.nan
        if key and math.isfinite(value) and (value or STAGED in keys):
            if wanted is not None and STAGED not in keys and abs(wanted - value) > TOLERANCE * abs(value):
                self.trouble.add("alpha-conflict", [key], f"{stated.source} says {wanted:g}, and {key} says {value:g}")
            return value
        return None if STAGED in keys else wanted


def suffixes_of(ways: Ways) -> frozenset[str]:
    """Every suffix that the kinds have in a format."""
    return frozenset(leaf.suffix for _, spelling in ways for leaf in spelling.leaves)


def note_unused(groups: Sequence[Group], trouble: Trouble, kinds: Collection[str] = UNSCALED) -> None:
    """Say of alphas beside what no alpha scales that they change nothing."""
    if not any(each.kind in kinds and "alpha" in each.slots for each in representatives(groups)):
        return
    for group in groups:
        if group.kind in kinds and (ref := group.slots.get("alpha")):
            trouble.add("alpha-unused", [ref.key], f"{group.module}: {group.kind} has no scale")
