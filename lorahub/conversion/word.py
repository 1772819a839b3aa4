"""A word: one module in one vocabulary, and the modules that it is in the other.  Knows no families."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Word", "fused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One module in one vocabulary, and what it is in the other.

    Attributes:
        name: of the one module.
        parts: of the other ones, in the order of their rows.
        shares: of the rows, one for each part.
        halves_swapped: its second half of rows comes first in the other vocabulary.
        parameter: what the one calls a parameter that the other calls ``{}``; without braces, what it calls "weight".
    """

    name: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    halves_swapped: bool = False
    parameter: str = "{}"

    def own(self, parameter: str) -> str:
        """What the one calls a parameter of the other; "" for one that it does not have."""
        if "{}" not in self.parameter and parameter != "weight":
            return ""
        return self.parameter.format(parameter)

    def other(self, parameter: str) -> str:
        """What the other calls a parameter of the one; "" for one that it does not have."""
        before, braces, after = self.parameter.partition("{}")
        if not braces:
            return "weight" if parameter == self.parameter else ""
        inner = parameter.removeprefix(before).removesuffix(after)
        return inner if self.parameter.format(inner) == parameter else ""


def fused(name: str, *parts: str, shares: tuple[int, ...] = ()) -> Word:
    """A word for one module that is all of ``parts``, in equal shares by default."""
    return Word(name=name, parts=parts, shares=shares or (1,) * len(parts))
