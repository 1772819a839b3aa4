"""The adapters on a pipeline in parts: which parts a weight asks for, and how one state of them becomes the next.

A choice of adapters and weights is a list of parts and numbers; other weights for the same parts are set without
anything being attached anew.  A state becomes the next at once, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, final

from lorahub.bases.layout import Target
from lorahub.errors import UsageError
from lorahub.live.attached import Live
from lorahub_diffusers.held import Held, within
from lorahub_diffusers.weights import factors, targets_of

__all__ = ["Parts"]


@final
class Parts:
    """What is on one pipeline, by name."""

    def __init__(self) -> None:
        """Nothing is."""
        self.held: Mapping[str, Held] = {}
        self._targets: dict[str, frozenset[Target]] = {}
        self._count = 0
        self._stale: set[str] = set()

    def demand(self, name: str) -> Held:
        """The adapter of that name.

        Raises:
            UsageError: there is none.
        """
        if name not in self.held:
            raise UsageError(f"no adapter '{name}' is on the pipeline", f"there are: {', '.join(self.held) or 'none'}")
        return self.held[name]

    def acting(self, live: Live) -> list[str]:
        """The adapters of which a part acts."""
        return [name for name, one in self.held.items() if one.acts(live.active)]

    def weighed(self, name: str, one: Held, rule: Any) -> Held:
        """The adapter with another weight: the parts that are attached where they do for it, else new ones.

        Raises:
            UsageError: ``rule`` is no weight.
            RecipeError: it speaks of components or blocks that the adapter does not change.
        """
        targets = next(iter(targets_of(one.planned[0]).values()), set())
        numbers = factors(rule, targets, name=name)
        wanted: dict[float, set[Target]] = {}
        for target, number in numbers.items():
            wanted.setdefault(number, set()).add(target)
        parts = {frozenset(each): number for number, each in wanted.items()}
        if one.parts == parts.keys():
            known = {self._targets[group]: group for group in one.groups}
            groups = {known[part]: number for part, number in parts.items()}
            return replace(one, rule=rule, groups=MappingProxyType(groups))
        fresh: dict[str, float] = {}
        for part, number in parts.items():
            self._count += 1
            group = name if len(parts) == 1 and name not in self._targets else f"{name}#{self._count}"
            self._targets[group] = part
            fresh[group] = number
        return replace(one, rule=rule, groups=MappingProxyType(fresh), parts=frozenset(parts))

    def settle(self, live: Live, changed: Mapping[str, Held], acting: Sequence[str]) -> None:
        """Attach what is new, let ``acting`` act, and take off what is no longer needed.

        Raises:
            LorahubError: what attaching raises; nothing changes then.
        """
        after = {**self.held, **changed}
        new = {group: one for one in changed.values() for group in one.groups if group not in live.adapters}
        try:
            for group, one in new.items():
                live.add(group, within(one.planned, self._targets[group]))
            chosen = {group: weight for name in acting for group, weight in after[name].groups.items() if weight}
            live.set_adapters(list(chosen), weights=list(chosen.values()))
        except BaseException:
            for group in new:
                if group in live.adapters:
                    live.remove(group)
                self._targets.pop(group, None)
            raise
        for name, one in changed.items():
            if name in self.held:
                self._stale |= set(self.held[name].groups) - set(one.groups)
        self.held = after
        self._sweep(live)

    def drop(self, live: Live, name: str) -> None:
        """Take one adapter off; the others act as before."""
        acting = [each for each in self.acting(live) if each != name]
        self._stale |= set(self.held[name].groups)
        self.held = {each: one for each, one in self.held.items() if each != name}
        self.settle(live, {}, acting)

    def clear(self) -> None:
        """Forget everything, which is off already."""
        self.held = {}

    def _sweep(self, live: Live) -> None:
        for group in list(self._stale):
            live.remove(group)
            self._stale.discard(group)
            self._targets.pop(group, None)
