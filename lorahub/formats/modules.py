"""Modules as files spell them, found among a base's own: by part of a pipeline, dotted or with underscores for dots.

Only what the base has is ever found; a name is never taken apart by guesswork.  Knows no kinds and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import final

from lorahub.bases.index import BaseIndex

__all__ = ["Modules", "flat"]


def flat(module: str) -> str:
    """``layers.0.q_proj`` as ``layers_0_q_proj``."""
    return module.replace(".", "_")


@final
class Modules:
    """A base's modules under the names that files give them.

    Args:
        index: the base, or None where none is known, and then nothing is found.
        spell: how the format writes a module's dotted path.
        synonyms: component -> another that the format calls by the same name.
    """

    def __init__(
        self, index: BaseIndex | None, spell: Callable[[str], str] = str, synonyms: Mapping[str, str] | None = None
    ) -> None:
        self._synonyms = synonyms or {}
        self._here: frozenset[str] = frozenset()  # those of several components whose modules a bare model has
        self._parts: dict[str, dict[str, set[str]]] = {}
        for name in index.modules() if index else ():
            component, module = _split(name)
            part = self._parts.setdefault(component, {})
            for other in index.spellings(name) if index else ():
                part.setdefault(spell(_split(other)[1]), set()).add(module)
        for part in self._parts.values():  # a module's own name wins over what another is also called
            for module in {module for found in part.values() for module in found}:
                found = part[spell(module)]
                part[spell(module)] = {each for each in found if spell(each) == spell(module)}

    def parts(self, named: Mapping[str, Iterable[str]]) -> dict[str, str]:
        """Component as the file calls it -> as the base does; itself where the base has none that fits.

        Of several components, those that a bare model could be keep their names, and ``find`` looks for them there.

        Args:
            named: component -> modules as spelled.
        """
        bare = self._parts.get("", {}) if len(self._parts) == 1 else {}
        here = frozenset(component for component, spelled in named.items() if not bare.keys().isdisjoint(spelled))
        self._here = here if len(named) > 1 else frozenset()
        return {component: self._part(component, spelled, len(named) == 1) for component, spelled in named.items()}

    def _part(self, component: str, spelled: Iterable[str], alone: bool) -> str:
        for name in (component, self._synonyms.get(component, "")):
            if name in self._parts and (name or not component):
                return name
        if not alone:
            return component
        # One part of a pipeline by itself: a bare model of that part fits, and so does a part the file did not name.
        wanted = [""] if component else list(self._parts)
        modules = set(spelled)
        fitting = [part for part in wanted if not modules.isdisjoint(self._parts.get(part, ()))]
        return fitting[0] if len(fitting) == 1 else component

    def find(self, part: str, spelled: str) -> tuple[str, ...]:
        """The base's modules of that name in that part: none, one, or several that the spelling does not tell apart."""
        known = self._parts.get("" if part in self._here else part, {})
        return tuple(sorted(known.get(spelled, ())))


def _split(name: str) -> tuple[str, str]:
    component, colon, module = name.partition(":")
    return (component, module) if colon else ("", name)
