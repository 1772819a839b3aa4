"""What a rule of a recipe is asked, and the answer for targets that it does not name.  Names only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorahub.bases.layout import Target
from lorahub.composition.weights.depth import Depths
from lorahub.errors import RecipeError

__all__ = ["Ask", "by_default", "named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a rule is asked for.

    Attributes:
        targets: for which targets, in natural order.
        depths: where they stand.
        where: the rule's key path.
        strict: whether a rule that speaks of nothing, or leaves a target out, is an error; else it gives 0.
    """

    targets: Sequence[Target]
    depths: Depths
    where: str
    strict: bool = True

    def of(self, targets: Sequence[Target], where: str) -> Ask:
        """The same for some of the targets and a part of the rule."""
        return replace(self, targets=targets, where=where)

    def complain(self, error: RecipeError) -> None:
        """Raise an error, where the rule is held to what it says."""
        if self.strict:
            raise error


def by_default(value: float | None, rest: Sequence[Target], ask: Ask) -> dict[Target, float]:
    """The number of targets that a rule does not name.

    Raises:
        RecipeError: there are some, and it has none for them.
    """
    if rest and value is None:
        ask.complain(
            RecipeError(
                f"{ask.where} says nothing of {named(rest)}",
                "say what they get: default = 0 in a table, { value = 0 } as the last of a list of filters",
            )
        )
    return dict.fromkeys(rest, value or 0.0)


def named(targets: Sequence[Target]) -> str:
    """The first few names."""
    more = f" and {len(targets) - 2} more" if len(targets) > 2 else ""
    return ", ".join(target.name for target in targets[:2]) + more
