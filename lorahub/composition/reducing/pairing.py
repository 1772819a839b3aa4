"""A base and what was tuned from it, paired by names and shapes: which parameter can differ in which way.

Headers only.  Linear, embedding and convolution weights become factors; vectors, and matrices of modules that no
factors fit beside, are kept whole; what could be neither must be equal, and is refused by name where it is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import final

from lorahub.bases.index import BaseIndex, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.errors import UsageError
from lorahub.findings import Finding, Verdict
from lorahub.names import did_you_mean, matches

__all__ = ["FLOATS", "Pair", "Way", "pair"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes in which a difference is a number; narrower ones are codes of a quantised weight."""

FACTORED = frozenset({"linear", "embedding", "conv"})
"""Roles of modules beside which factors fit."""


class Way(StrEnum):
    """What a difference becomes."""

    FACTORS = "factors"
    WHOLE = "whole"
    EQUAL = "equal"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One parameter in both checkpoints.

    Attributes:
        name: its canonical name.
        targets: what an adapter calls it, as the base's own files spell it, and every other name it is tied to.
        roles: what the module of each target is: "linear", "embedding", "conv" or "".
        way: what a difference becomes; EQUAL: there must be none.
        base: the parameter in the base, or None where only the tuned checkpoint has it.
        tuned: its name in the tuned index, or "" where it is left out.
        shape: as stored.
        why: why no difference can be carried, for EQUAL.
    """

    name: str
    targets: tuple[Target, ...]
    roles: tuple[str, ...]
    way: Way
    base: ParameterInfo | None
    tuned: str
    shape: tuple[int, ...]
    why: str = ""

    @property
    def stack(self) -> bool:
        """Whether it holds a matrix for each of several experts, [E, out, in] or [E, in, out]."""
        return self.way is Way.FACTORS and self.base is not None and _stacks(self.base)

    @property
    def transposed(self) -> bool:
        """Whether its matrices are stored [in, out]."""
        return self.base is not None and bool(self.base.turned if self.stack else self.base.transposed)


def pair(
    base: BaseIndex,
    tuned: BaseIndex,
    *,
    whole: Collection[str] = (),
    leave_out: Collection[str] = (),
    embedding: Collection[str] = (),
) -> tuple[tuple[Pair, ...], tuple[Finding, ...]]:
    """Pair every parameter of two checkpoints, and say what cannot be paired.

    Args:
        base: what was started from.
        tuned: what came of it.
        whole: patterns (``*``) of parameters that are kept whole, whatever they are.
        leave_out: patterns of parameters whose difference is not looked at.
        embedding: patterns of parameters that are embeddings, where no framework knows.

    Raises:
        UsageError: a pattern fits no parameter.
    """
    pairing = _Pairing(base, tuned, whole, leave_out, embedding)
    pairing.demand_patterns()
    pairs = pairing.pairs()
    return pairs, pairing.findings()


@final
class _Pairing:
    def __init__(
        self,
        base: BaseIndex,
        tuned: BaseIndex,
        whole: Collection[str],
        leave_out: Collection[str],
        embedding: Collection[str],
    ) -> None:
        self._base, self._tuned = base, tuned
        self._whole, self._left, self._embedding = whole, leave_out, embedding
        self._other = _spellings(tuned)
        self._found: dict[str, list[str]] = {}
        self._new: list[str] = []

    def demand_patterns(self) -> None:
        names = {*self._base.parameters, *self._tuned.parameters}
        for pattern in (*self._whole, *self._left, *self._embedding):
            if not any(matches(pattern, name) for name in names):
                raise UsageError(f"no parameter is called {pattern}{did_you_mean(pattern, names)}", "lorahub inspect")

    def pairs(self) -> tuple[Pair, ...]:
        twins = {name: self._find(name) for name in self._base.parameters}
        new = [name for name in self._tuned.parameters if name not in twins.values()]
        self._new = [name for name in new if not self._asked(self._left, name)]
        result = [self._pair(name, info, twins[name]) for name, info in self._base.parameters.items()]
        below = {target.module for each in result if each.way is Way.FACTORS for target in each.targets}
        result = [self._beside(each, below) for each in result]
        tied = {name for group in self._base.tied for name in group[1:]}
        for name in self._new:
            if self._find_in_base(name) in tied and not self._asked(self._whole, name):
                self._add("tied-differently", name)
        return (*result, *(self._alone(name) for name in new))

    def _alone(self, name: str) -> Pair:
        """A parameter that the base does not have."""
        info = self._tuned.parameters[name]
        return Pair(
            name=name,
            targets=(_target(_as_stored(name, info, self._tuned), info),),
            roles=("",),
            way=Way.WHOLE if name in self._new else Way.LEFT_OUT,
            base=None,
            tuned=name,
            shape=info.shape,
        )

    def _spelled(self, name: str, info: ParameterInfo, twin: str | None) -> str:
        """What an adapter calls a parameter: as the class of the base does, or, with a new head, that of the tuned."""
        if self._new and twin is not None:
            return _as_stored(twin, self._tuned.parameters[twin], self._tuned)
        return _as_stored(name, info, self._base)

    def _find(self, name: str) -> str | None:
        """The parameter of the tuned checkpoint that a base's parameter became, under any of its spellings."""
        module, _, parameter = name.rpartition(".")
        for spelled in self._base.spellings(module):
            full = f"{spelled}.{parameter}" if spelled else parameter
            if full in self._other:
                return self._other[full]
        return None

    def _find_in_base(self, name: str) -> str:
        module, _, parameter = name.rpartition(".")
        found = {f"{spelled}.{parameter}" if spelled else parameter for spelled in self._tuned.spellings(module)}
        return next((each for group in self._base.tied for each in group if each in found), name)

    def _asked(self, patterns: Collection[str], name: str) -> bool:
        return any(matches(pattern, name) for pattern in patterns)

    def _add(self, code: str, name: str) -> None:
        self._found.setdefault(code, []).append(name)

    def _pair(self, name: str, info: ParameterInfo, twin: str | None) -> Pair:
        others = self._base.tied_with(name)
        targets = (_target(self._spelled(name, info, twin), info), *(_target(other, info) for other in others))
        role = "embedding" if self._asked(self._embedding, name) else info.role
        roles = (role, *(("linear",) if len(others) == 1 and role == "embedding" else ("",) * len(others)))
        made = Pair(
            name=name, targets=targets, roles=roles, way=Way.LEFT_OUT, base=info, tuned=twin or "", shape=info.shape
        )
        if self._asked(self._left, name):
            return made
        if twin is None:
            self._add("base-parameter-missing", name)
            return made
        after = self._tuned.parameters[twin]
        if self._asked(self._whole, name):
            return replace(made, way=Way.WHOLE, shape=after.shape)
        if after.shape != info.shape:
            self._add("shape-differs", f"{name} {list(info.shape)} -> {list(after.shape)}")
            return made
        if not {info.dtype, after.dtype} <= FLOATS:
            return replace(made, way=Way.EQUAL, why=f"it is stored as {info.dtype}, no difference of which is a weight")
        way, why = self._way(targets[0], roles, info)
        if way is Way.EQUAL:
            return replace(made, way=way, why=why)
        if others and way is Way.FACTORS and "" in roles[1:]:
            return replace(
                made, way=Way.EQUAL, why=f"it is tied to {', '.join(others)}, and nothing says what those are"
            )
        return replace(made, way=way)

    def _way(self, target: Target, roles: tuple[str, ...], info: ParameterInfo) -> tuple[Way, str]:
        """What a difference of a float parameter would become, by role and number of dimensions."""
        dims = sum(size > 1 for size in info.shape)
        factored = roles[0] in FACTORED or (not self._base.declared and len(info.shape) in (2, 4))
        if target.parameter == "weight" and dims > 1 and factored:
            return Way.FACTORS, ""
        if _stacks(info) and target.module:
            return Way.FACTORS, ""
        if dims > 2:
            return Way.EQUAL, "it is a stack of matrices, as experts are, and nothing says what its axes mean"
        if not target.module:
            return Way.EQUAL, "it belongs to no module that could be kept whole"
        return Way.WHOLE, ""

    def _beside(self, each: Pair, factored: Collection[str]) -> Pair:
        """A parameter that would be kept whole with its module, where the module holds factors as well."""
        target = each.targets[0]
        if each.way is not Way.WHOLE or target.parameter in ("weight", "bias") or self._asked(self._whole, each.name):
            return each
        around = f"{target.module}." if target.module else ""
        if any(f"{module}.".startswith(around) for module in factored):
            return replace(
                each, way=Way.EQUAL, why="it could only be kept with its module, in which others get factors"
            )
        return each

    def findings(self) -> tuple[Finding, ...]:
        result = [
            replace(_TEXTS[code], message=_TEXTS[code].message.format(count=len(names)), where=tuple(names))
            for code, names in self._found.items()
        ]
        if self._new:
            result.append(
                Finding(
                    code="parameter-new",
                    axis="placement",
                    level=Verdict.COMPATIBLE,
                    message=f"{len(self._new)} parameters are in the tuned checkpoint alone and are kept whole",
                    where=tuple(self._new),
                )
            )
        if not self._base.declared:
            result.append(
                Finding(
                    code="base-undeclared",
                    axis="libraries",
                    level=Verdict.UNVERIFIED,
                    message="no plugin knows this architecture: every matrix called weight is taken for that of a "
                    "linear layer, also where it is an embedding",
                    remedy="name the embeddings: --embedding PATTERN; see also: lorahub plugins",
                )
            )
        return tuple(result)


_TEXTS: Mapping[str, Finding] = {
    "base-parameter-missing": Finding(
        code="base-parameter-missing",
        axis="placement",
        level=Verdict.DEGRADED,
        message="{count} parameters of the base are not in the tuned checkpoint; the adapter leaves them as they are",
        remedy="if that is how it should be: --allow base-parameter-missing",
        allowable=True,
    ),
    "shape-differs": Finding(
        code="shape-differs",
        axis="placement",
        level=Verdict.INCOMPATIBLE,
        message="{count} parameters changed their shape, as a changed vocabulary or a new head does",
        remedy="keep them whole: --whole PATTERN; or go without them: --leave-out PATTERN",
    ),
    "tied-differently": Finding(
        code="tied-differently",
        axis="placement",
        level=Verdict.INCOMPATIBLE,
        message="{count} parameters are tied in the base and stored apart in the tuned checkpoint",
        remedy="keep them whole: --whole PATTERN; or go without them: --leave-out PATTERN",
    ),
}


def _stacks(info: ParameterInfo) -> bool:
    """Whether a parameter stacks matrices, and the framework knows which way round they are."""
    return info.turned is not None and not info.role and len(info.shape) == 3 and min(info.shape) > 1


def _as_stored(name: str, info: ParameterInfo, index: BaseIndex) -> str:
    """The spelling of a parameter that the class of its checkpoint uses: a bare encoder has no prefix."""
    module, _, parameter = name.rpartition(".")
    spelled = {f"{each}.{parameter}" if each else parameter for each in index.spellings(module)}
    return info.stored_as if info.stored_as in spelled else name


def _target(name: str, info: ParameterInfo) -> Target:
    component = info.component
    bare = name.removeprefix(f"{component}:") if component else name
    module, _, parameter = bare.rpartition(".")
    return Target(component, module, parameter)


def _spellings(index: BaseIndex) -> dict[str, str]:
    """Every way to spell a parameter of the index, tied names too -> its name there."""
    found: dict[str, str] = {}
    for module, parameters in index.modules().items():
        for spelled in index.spellings(module):
            for parameter in parameters:
                name = f"{module}.{parameter}" if module else parameter
                found.setdefault(f"{spelled}.{parameter}" if spelled else parameter, index.stored(name))
    return found | {name: name for name in index.parameters}
