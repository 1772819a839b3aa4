"""Which parameters of a model an adapter is trained on: presets, names, patterns, layers.

Names are matched as PEFT matches them, and a name that matches nothing is refused.  Knows indexes and frameworks; no
kinds and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast, final

from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.errors import UsageError
from lorahub.names import did_you_mean, matches

__all__ = ["Pattern", "Patterns", "Resolver", "of_layer"]

Pattern: TypeAlias = "str | re.Pattern[str]"
"""A preset ("attention"), the end of a module's path ("q_proj"), a glob ("*.mlp.*"), or a regular expression."""

Patterns: TypeAlias = "Pattern | Iterable[Pattern]"

_MATRIX = 2


def of_layer(module: str) -> int | None:
    """The first number in a path, which is that of its layer."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def named(pattern: Pattern, path: str) -> bool:
    """Whether a pattern means a path: all of it, or its end after a dot; a regular expression takes all of it."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return matches(pattern, path) or matches(f"*.{pattern}", path)


def _listed(patterns: Patterns, what: str) -> tuple[Pattern, ...]:
    if not isinstance(patterns, str | re.Pattern | Iterable):
        raise UsageError(f"{what} is {patterns!r}, which is neither a name nor a pattern", f'as {what}=["q_proj"]')
    given = (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)
    for each in cast("tuple[object, ...]", given):
        if not isinstance(each, str | re.Pattern) or not each:
            raise UsageError(f"{what} holds {each!r}, which is neither a name nor a pattern")
    return given


@final
@dataclass(frozen=True, slots=True)
class Resolver:
    """A base, asked for what patterns mean in it.

    Attributes:
        index: its names.
        framework: the one that made the index.
        roles: module -> "linear", "conv" or "embedding", for every module that is one, tied ones under each name.
    """

    index: BaseIndex
    framework: Framework
    roles: Mapping[str, str]

    def targets(
        self,
        wanted: Patterns | None,
        *,
        exclude: Patterns = (),
        kept: Collection[str] = (),
        layers: Collection[int] | None = None,
        parameters: Patterns = (),
    ) -> list[Target]:
        """What is to be trained, in the order of the base.

        Args:
            wanted: what to train; None takes "attention" where the base has that, else "all-linear".
            exclude: modules to leave out of it.
            kept: modules that are trained in full, and take no adapter.
            layers: numbers of the layers to train, the first number in a path; None for all.
            parameters: names or patterns of parameters that are no weight of a layer, as stacks of experts.

        Raises:
            UsageError: a pattern means nothing here, or what it means is no layer an adapter can stand on.
        """
        found: dict[Target, None] = {}
        if wanted is None:
            found |= dict.fromkeys(self._by_default())
        else:
            for pattern in _listed(wanted, "target_modules"):
                found |= dict.fromkeys(self._meant(pattern))
        for pattern in _listed(parameters, "target_parameters"):
            found |= dict.fromkeys(self._parameters(pattern))
        if not found:
            raise UsageError("nothing was named to be trained", 'name modules: target_modules="all-linear"')
        left = [target for target in found if target.module not in kept]
        for pattern in _listed(exclude, "exclude_modules"):
            before = len(left)
            left = [target for target in left if not named(pattern, target.module)]
            if len(left) == before and not any(named(pattern, module) for module in self.roles):
                raise self._unknown("exclude_modules", pattern)
        if layers is not None:
            chosen = set(layers)
            numbers = {of_layer(target.module) for target in left}
            if missing := sorted(chosen - {number for number in numbers if number is not None}):
                raise UsageError(
                    f"layers names {', '.join(map(str, missing[:5]))}, where nothing is to be trained",
                    f"there are {_ranged(numbers)}",
                )
            left = [target for target in left if of_layer(target.module) in chosen]
        if not left:
            raise UsageError("everything that target_modules names is excluded", "name fewer in exclude_modules")
        place = {name: at for at, name in enumerate(self.index.order)}
        return sorted(left, key=lambda each: (place.get(each.name, len(place)), natural(each.name)))

    def modules(self, patterns: Patterns, what: str) -> list[str]:
        """The modules that patterns mean, whole: those that are no part of another one found.

        Raises:
            UsageError: a pattern means none.
        """
        every = self._every_module()
        found: dict[str, None] = {}
        for pattern in _listed(patterns, what):
            own = [module for module in every if named(pattern, module)]
            if not own:
                raise self._unknown(what, pattern, every)
            found |= dict.fromkeys(own)
        return [each for each in found if not any(each.startswith(f"{other}.") for other in found)]

    # ---- how

    def _every_module(self) -> list[str]:
        paths: set[str] = set()
        for module in self.index.modules():
            parts = module.split(".")
            paths |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return sorted(paths - {""}, key=natural)

    def _by_default(self) -> list[Target]:
        try:
            return self.framework.targets(self.index, "attention")
        except UsageError:
            return self._preset("all-linear")

    def _preset(self, preset: str) -> list[Target]:
        found = self.framework.targets(self.index, preset)
        if not found:
            raise UsageError(f"this base has no modules that '{preset}' means", "name modules: target_modules=[...]")
        return found

    def _meant(self, pattern: Pattern) -> list[Target]:
        if isinstance(pattern, str) and "*" not in pattern and not self._named(pattern):
            try:
                return self._preset(pattern)
            except UsageError as error:
                preset = error
            found = list(self._within(pattern)) or self._parameters(pattern, refuse=False)
            if found:
                return found
            if pattern in _PRESETS:
                raise preset
            raise self._cannot_stand(pattern) or self._unknown("target_modules", pattern)
        found = [Target(*_placed(module), "weight") for module in self.roles if named(pattern, module)]
        found = found or self._parameters(pattern, refuse=False)
        if not found:
            raise self._unknown("target_modules", pattern)
        return found

    def _named(self, name: str) -> bool:
        return any(named(name, module) for module in self.roles)

    def _within(self, name: str) -> Iterator[Target]:
        """A projection that the base keeps together with others ("q" beside "qkv"), where its layout is declared."""
        above: dict[str, None] = {}
        for module in self.roles:
            above.setdefault(module.rpartition(".")[0])
        head, _, last = name.rpartition(".")
        wanted = [
            Target("", f"{path}.{last}" if path else last, "weight") for path in above if not head or named(head, path)
        ]
        layouts = self.framework.layouts(self.index, wanted)
        own = self.index.parameters
        yield from (target for target in wanted if target in layouts and target.name not in own)

    def _parameters(self, pattern: Pattern, *, refuse: bool = True) -> list[Target]:
        found = []
        for name, info in self.index.parameters.items():
            module, _, parameter = name.rpartition(".")
            path = module.rpartition(":")[2]
            if len(info.shape) < _MATRIX or (module in self.roles and parameter == "weight"):
                continue
            if named(pattern, f"{path}.{parameter}" if path else parameter):
                found.append(Target(*_placed(module), parameter))
        if not found and refuse:
            names = [name for name, info in self.index.parameters.items() if len(info.shape) >= _MATRIX]
            raise UsageError(
                f"target_parameters: no parameter is called {_shown(pattern)}.{_nearest(pattern, names)}",
                "name them as model.named_parameters() does",
            )
        return found

    def _cannot_stand(self, name: str) -> UsageError | None:
        """Why a module that is there is no target."""
        own = self.index.modules()
        there = [module for module in own if named(name, module)]
        if there:
            module = there[0]
            sizes = [list(self.index.parameters[self.index.stored(f"{module}.{each}")].shape) for each in own[module]]
            return UsageError(
                f"target_modules: {module} is no linear layer, convolution or embedding (its parameters are {sizes})",
                "train it in full: modules_to_save=[...]",
            )
        inside = [module for module in self.roles if f".{name}." in f".{module}"]
        if inside:
            return UsageError(
                f"target_modules: {_shown(name)} is no layer itself, but holds some, as {inside[0]}",
                f'name what is meant: target_modules="{name}.*"',
            )
        return None

    def _unknown(self, what: str, pattern: Pattern, names: Iterable[str] | None = None) -> UsageError:
        known = [*self.roles] if names is None else [*names]
        near = _nearest(pattern, [*known, *(_PRESETS if what == "target_modules" else ())])
        return UsageError(
            f"{what}: no module is called {_shown(pattern)}.{near}",
            f"there are: {', '.join(_ends(known)[:12])}{_OR if what == 'target_modules' else ''}",
        )


_PRESETS = ("attention", "all-linear", "all-conv", "all-embedding", "feed-forward", "experts")
_OR = f"; presets: {', '.join(_PRESETS)}"


def _placed(module: str) -> tuple[str, str]:
    component, _, path = module.rpartition(":")
    return component, path


def _shown(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def _ends(modules: Sequence[str]) -> list[str]:
    ends = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    return [each for each in ends if not each.isdigit()] or list(modules)


def _nearest(pattern: Pattern, names: Sequence[str]) -> str:
    if isinstance(pattern, re.Pattern):
        return ""
    return did_you_mean(pattern, _ends(names)) or did_you_mean(pattern, names)


def _ranged(numbers: Collection[int | None]) -> str:
    known = sorted(number for number in numbers if number is not None)
    return f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
