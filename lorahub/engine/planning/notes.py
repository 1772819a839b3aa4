"""What a placement has to say, gathered place by place and told once for each reason.

A finding names the first place in full and lists the others, since what is wrong with one of many layers is mostly
wrong with all.  Decides levels, not policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.conversion.vocabulary import PREFIXES, is_foreign, lexicons
from lorahub.findings import Finding, Verdict
from lorahub.names import did_you_mean

__all__ = ["Notes", "note"]


@final
@dataclass(slots=True)
class Notes:
    """Gathers what does not land in one base, and why.

    Attributes:
        index: the base.
        absent: targets whose module the base lacks, or that the framework has no place for.
        elsewhere: targets of other components of a pipeline than the one that the base is.
        alone: targets whose module the base has, without that parameter.
        misfits: reason -> (target name, what disagrees).
        refused: (code, reason) -> target names; what is stored or laid out in a way that nothing can be added to.
        missing: what a new head needs and nobody brings.
    """

    index: BaseIndex
    absent: list[Target] = field(default_factory=list)
    elsewhere: list[Target] = field(default_factory=list)
    alone: list[Target] = field(default_factory=list)
    misfits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    refused: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def misfit(self, target: Target, details: str, why: str) -> None:
        """Note that shapes disagree: ``details`` names both, ``why`` explains where more is known."""
        self.misfits.setdefault(why, []).append((target.name, details))

    def refuse(self, code: str, reason: str, target: Target) -> None:
        """Note that nothing can be added to a target; ``reason`` ends the sentence "... cannot be changed, because"."""
        self.refused.setdefault((code, reason), []).append(target.name)

    def findings(self, touched: int, landed: int) -> tuple[Finding, ...]:
        """Everything gathered, of an adapter that makes ``touched`` changes of which ``landed`` found a place."""
        found = [*self._absent(touched - len(self.elsewhere), landed), *self._elsewhere(touched), *self._alone()]
        found += [*self._misfits(), *self._refused(), *self._missing()]
        if not touched:
            found.append(_stop("nothing-lands", "the adapter changes no weight, so there is nothing to merge", ()))
        return tuple(found)

    def _absent(self, touched: int, landed: int) -> list[Finding]:
        if not self.absent:
            return []
        names = tuple(target.name for target in self.absent)
        message = f"{len(names)} of {touched} targets are not in {self.index.ref}, first {names[0]}."
        message += did_you_mean(names[0].rpartition(".")[0], self.index.modules())
        if landed:
            others = f"to go on with the other {touched - len(names)}: --allow target-missing"
            return [note("target-missing", Verdict.DEGRADED, message, names, others)]
        remedy = "is it the right base? compare the names: lorahub inspect ADAPTER"
        if self._named_by_makers():
            remedy = (
                "the file has the original makers' names, and this base those of diffusers; translate it first: "
                "lorahub convert ADAPTER --to diffusers --base BASE -o FOLDER"
            )
        parts = sorted({target.component for target in self.absent})
        if len(parts) > 1 and not any(":" in name for name in self.index.parameters):
            remedy = f"take the component that this base is: lorahub convert ADAPTER --to peft --component {parts[0]}"
        return [_stop("target-missing", f"nothing of the adapter finds a place: {message}", names, remedy)]

    def _named_by_makers(self) -> bool:
        """Whether the vocabulary knows all that is absent as another name for what this base has."""
        model = self.index.config.get("_class_name")
        own = [_short(name.rpartition(":")[2]) for name in self.index.modules()]
        known = lexicons(
            {_short(target.module) for target in self.absent}, own, model if isinstance(model, str) else ""
        )
        return len(known) == 1 and known[0].original and not any(map(is_foreign, own))

    def _elsewhere(self, touched: int) -> list[Finding]:
        if not self.elsewhere:
            return []
        names = tuple(target.name for target in self.elsewhere)
        parts = " and ".join(sorted({target.component for target in self.elsewhere}))
        message = f"{len(names)} of {touched} targets are in {parts}, and {self.index.ref} is another component alone"
        remedy = (
            f"merge it into the folder of {parts} too; to merge only what belongs here: --allow component-elsewhere"
        )
        return [note("component-elsewhere", Verdict.DEGRADED, message, names, remedy)]

    def _alone(self) -> list[Finding]:
        if not self.alone:
            return []
        first = self.alone[0]
        return [
            _stop(
                "parameter-missing",
                f"{first.module} has no {first.parameter} in {self.index.ref}, so the adapter's change to it, which it "
                "was trained with, has nothing to be added to",
                tuple(target.name for target in self.alone),
                "use the base it was trained on: the same architecture with that parameter",
            )
        ]

    def _misfits(self) -> list[Finding]:
        return [
            _stop(
                "shape-mismatch",
                f"{places[0][1]}{why and f'; {why}'}",
                tuple(name for name, _ in places),
                "" if why else "use the base that it was trained on; what it says of that: lorahub inspect ADAPTER",
            )
            for why, places in self.misfits.items()
        ]

    def _refused(self) -> list[Finding]:
        return [
            _stop(code, f"{names[0]} cannot be changed, because {reason}", tuple(names))
            for (code, reason), names in self.refused.items()
        ]

    def _missing(self) -> list[Finding]:
        if not self.missing:
            return []
        message = (
            "the head that the adapter brings needs parameters that neither it nor the base has; they would be random"
        )
        remedy = "to write the checkpoint without them: --allow head-incomplete"
        return [note("head-incomplete", Verdict.DEGRADED, message, self.missing, remedy)]


def _short(module: str) -> str:
    return next((module.removeprefix(each) for each in PREFIXES if module.startswith(each)), module)


def note(code: str, level: Verdict, message: str, where: Sequence[str], remedy: str = "") -> Finding:
    """A finding on the placement axis; degraded ones may be allowed."""
    return Finding(
        code=code,
        axis="placement",
        level=level,
        message=message,
        where=tuple(where),
        remedy=remedy,
        allowable=level is Verdict.DEGRADED,
    )


def _stop(code: str, message: str, where: Sequence[str], remedy: str = "") -> Finding:
    return note(code, Verdict.INCOMPATIBLE, message, where, remedy)
