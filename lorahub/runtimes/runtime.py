"""What a runtime is to lorahub: a table of rules about adapters it cannot load, or would load differently.

A rule looks at an adapter's headers and config, and says where it applies; the rest is text.  Nothing here runs or
imports a runtime, and which model will be served is known only where a base is given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import AdapterFiles, Reading

__all__ = ["Case", "Look", "Rule", "Runtime", "Subject", "config_of"]


class Subject(Protocol):
    """An adapter to be judged, by its headers."""

    @property
    def label(self) -> str:
        """What its user calls it."""

    @property
    def files(self) -> AdapterFiles:
        """What lies in its folder."""

    @property
    def reading(self) -> Reading:
        """What its format makes of that."""

    @property
    def index(self) -> BaseIndex | None:
        """The base under whose names it was read, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A rule that applies.

    Attributes:
        value: what stands for ``{value}`` in the rule's texts.
        where: the modules, keys or config fields concerned.
    """

    value: str = ""
    where: tuple[str, ...] = ()


Look: TypeAlias = Callable[[Subject], Case | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing a runtime does not take as it is.

    Attributes:
        code: of the finding.
        level: ``INCOMPATIBLE`` where loading fails or the result is wrong, ``DEGRADED`` where a setting helps.
        message: what the runtime does, as a sentence; may hold ``{value}`` and ``{adapter}``.
        remedy: the command that helps, in the same way.
        look: where the rule applies, or None.
    """

    code: str
    level: Verdict
    message: str
    remedy: str
    look: Look

    def judge(self, subject: Subject) -> Finding | None:
        """The finding, where the rule applies."""
        case = self.look(subject)
        if case is None:
            return None
        return Finding(
            code=self.code,
            axis="libraries",
            level=self.level,
            message=self.message.format(value=case.value, adapter=subject.label),
            where=case.where,
            remedy=self.remedy.format(value=case.value, adapter=subject.label),
            allowable=self.level is Verdict.DEGRADED,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A runtime that loads adapters itself.

    Attributes:
        name: what ``--for`` takes.
        title: how people write it.
        versions: the versions whose code the rules were read from.
        rules: in the order in which they are told.
    """

    name: str
    title: str
    versions: str
    rules: tuple[Rule, ...]

    def judge(self, subject: Subject) -> tuple[Finding, ...]:
        """What keeps the runtime from loading the adapter as its author meant it; empty where nothing does."""
        found = tuple(finding for rule in self.rules if (finding := rule.judge(subject)))
        return found or (self._accepted(),)

    def _accepted(self) -> Finding:
        return Finding(
            code="runtime-accepts",
            axis="libraries",
            level=Verdict.EXACT,
            message=(
                f"nothing in the adapter's files speaks against {self.title} {self.versions}; "
                "whether the served model has these modules shows only there"
            ),
        )


def config_of(subject: Subject, name: str) -> Mapping[str, JSON]:
    """A JSON file of the adapter's folder; empty where there is none."""
    return subject.files.configs.get(name, {})
