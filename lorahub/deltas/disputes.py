"""Where PEFT's result and the one that is declared differ, and whose is wanted.

A dispute is a fact about one group of tensors: the options that give PEFT's own result, those that give the declared
one or the reason why there is none, and where upstream this is known.  Which of them counts is the user's choice,
``compat``: without one nothing is guessed, and with one it is told.  Knows no files and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, final, get_args

from lorahub.errors import UsageError
from lorahub.findings import Finding, Verdict

__all__ = ["CHOSEN", "COMPATS", "REFUSED", "UNDECIDED", "Choice", "Compat", "Dispute", "as_compat"]

Compat: TypeAlias = Literal["peft", "strict"]
"""``peft``: as PEFT computes, also where it errs; ``strict``: as declared, or not at all."""

COMPATS: Final[tuple[Compat, ...]] = get_args(Compat)

UNDECIDED, CHOSEN, REFUSED = "compat-choice", "compat-chosen", "compat-refused"
"""Codes of findings: the choice is missing; it was made; ``strict`` has no result."""

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


def as_compat(value: str | None) -> Compat | None:
    """``value`` as a choice.

    Raises:
        UsageError: it is neither "peft" nor "strict".
    """
    if value is None:
        return None
    found = next((each for each in COMPATS if each == value), None)
    if found is None:
        raise UsageError(f"compat is {value!r}", f"it is one of: {', '.join(COMPATS)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispute:
    """One way in which PEFT and the declared formula part.

    Attributes:
        topic: short, the same for every group that it concerns.
        says: what differs, as a sentence without a full stop.
        upstream: the issue or pull request.
        holds: for which releases it was found to be so.
        peft: what PEFT does, in a few words.
        strict: what is declared, in a few words; or why there is no result, where ``declared`` is None.
        followed: options that give PEFT's result.
        declared: options that give the declared one; None: there is none.
    """

    topic: str
    says: str
    upstream: str
    holds: str
    peft: str
    strict: str
    followed: Mapping[str, JSON]
    declared: Mapping[str, JSON] | None


@final
@dataclass(slots=True)
class Choice:
    """Applies one choice to all groups of an adapter, and gathers what there is to tell of it."""

    compat: Compat | None
    _found: dict[str, tuple[Dispute, list[str], list[str]]] = field(default_factory=dict)

    def settle(
        self, dispute: Dispute | None, options: Mapping[str, JSON], *, target: str, keys: Collection[str]
    ) -> dict[str, JSON] | None:
        """``options`` of a group with the choice made; PEFT's where nobody chose, None where there is no result."""
        if dispute is None:
            return dict(options)
        _, targets, where = self._found.setdefault(dispute.topic, (dispute, [], []))
        targets.append(target)
        where.extend(sorted(keys))
        if self.compat != "strict":
            return {**options, **dispute.followed}
        return None if dispute.declared is None else {**options, **dispute.declared}

    def hint(self) -> dict[str, JSON]:
        """The choice as a hint of the adapter, where it decided anything."""
        return {"compat": self.compat} if self.compat and self._found else {}

    def findings(self) -> list[Finding]:
        """One for each dispute."""
        return [self._finding(*found) for _, found in sorted(self._found.items())]

    def _finding(self, dispute: Dispute, targets: list[str], where: list[str]) -> Finding:
        count = f"{len(targets)} target{'s' * (len(targets) != 1)}"
        known = f"{dispute.says} ({dispute.holds}; {dispute.upstream})"
        if self.compat is None:
            code, level = UNDECIDED, Verdict.INCOMPATIBLE
            message = f"for {count}, PEFT's result is not the declared one, and nobody chose: {known}"
            remedy = f"--compat peft ({dispute.peft}) or --compat strict ({dispute.strict})"
        elif self.compat == "strict" and dispute.declared is None:
            code, level = REFUSED, Verdict.INCOMPATIBLE
            message = f"{count} cannot be had under compat strict, because {dispute.strict}: {known}"
            remedy = f"--compat peft ({dispute.peft})"
        else:
            code, level, remedy = CHOSEN, Verdict.EXACT, ""
            chosen = dispute.peft if self.compat == "peft" else dispute.strict
            message = f"compat {self.compat} for {count}: {chosen}; {known}"
        return Finding(code=code, axis="policy", level=level, message=message, where=tuple(where), remedy=remedy)
