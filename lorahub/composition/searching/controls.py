"""What a composition found with examples is held against, and what that says, in words.

Weights that were fitted to examples lower the loss on them whatever the adapters know: with a thousand adapters of
other people, random ones did about as well, and one trained afresh on the same examples did too
(https://arxiv.org/abs/2602.12323).  So a result comes with what the base, equal weights, each adapter alone, random
adapters under the same search, and a fresh adapter come to.  Knows numbers; no adapters, no models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from lorahub.deltas.kind import JSON

__all__ = ["AS_WELL", "Control", "Controls", "Role"]

AS_WELL = 0.95
"""The share of the result's gain over the base from which on a control does as well as the result."""

Role: TypeAlias = Literal["base", "uniform", "single", "random", "fresh"]

_SHOWN: Mapping[Role, str] = MappingProxyType(
    {"base": "{}", "uniform": "{}", "single": "{} alone", "random": "random adapters, {}", "fresh": "{}"}
)
"""Role -> how a row of the table begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One thing that the result is held against.

    Attributes:
        role: what it is: the base alone, all adapters at 1/n, one adapter at 1, random adapters with weights found as
            the result's were, an adapter trained afresh.
        name: of which adapter, or which draw.
        loss: by the same objective; NaN where that is no finite number; None where it was not run.
        weights: of adapters, where they have one weight each.
        note: what else there is to say, and why it was not run.
    """

    role: Role
    name: str
    loss: float | None
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""

    def document(self) -> dict[str, JSON]:
        """The control as JSON-ready values."""
        known = self.loss is not None and math.isfinite(self.loss)
        return {
            "control": self.role,
            "name": self.name,
            "loss": self.loss if known else None,
            "weights": dict(self.weights),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """All controls of one result.

    Attributes:
        loss: the result's own.
        rows: every control.
    """

    loss: float
    rows: tuple[Control, ...]

    def of(self, role: Role) -> tuple[Control, ...]:
        """Those of one role."""
        return tuple(each for each in self.rows if each.role == role)

    @property
    def base(self) -> Control:
        """The model as it is."""
        return self.of("base")[0]

    @property
    def uniform(self) -> Control:
        """All adapters at equal weights that add up to 1."""
        return self.of("uniform")[0]

    @property
    def best_single(self) -> Control:
        """The adapter that does best alone, at weight 1."""
        return min(self.of("single"), key=_order)

    @property
    def best_random(self) -> Control | None:
        """The best draw of random adapters; None where none was run."""
        return min((each for each in self.of("random") if each.loss is not None), key=_order, default=None)

    @property
    def fresh(self) -> Control:
        """The adapter trained afresh on the same examples."""
        return self.of("fresh")[0]

    def remarks(self) -> tuple[str, ...]:
        """What the controls say of the result, in sentences; the last are of what was not run."""
        base = _number(self.base)
        gain = base - self.loss
        if not gain > 0:
            first = f"the result is no better than the base alone: {_shown(self.loss)}, base {_shown(base)}"
            return (first, *self._left_out())
        said = [f"the result lowers the loss from {_shown(base)} (base) to {_shown(self.loss)}"]
        if not math.isfinite(gain):
            said = [f"the base alone gives no finite loss; the result gives {_shown(self.loss)}"]
        said += [
            sentence
            for control, name, moral in (
                (self.uniform, "equal weights do", "nothing had to be searched for"),
                (self.best_single, f"'{self.best_single.name}' alone does", "the others are not needed"),
                (self.fresh, f"{self.fresh.name} does", "these adapters add nothing that the examples do not teach"),
            )
            if (sentence := self._verdict(control, name, moral, gain))
        ]
        return (*said, *self._random(gain), *self._left_out())

    def _verdict(self, control: Control, name: str, moral: str, gain: float) -> str:
        loss = _number(control)
        if loss < self.loss:
            return f"{name} better ({_shown(loss)}): {moral}"
        return f"{name} as well ({_shown(loss)}): {moral}" if self._as_well(control, gain) else ""

    def _as_well(self, control: Control, gain: float) -> bool:
        return self.loss + gain - _number(control) >= AS_WELL * gain if math.isfinite(gain) else False

    def _random(self, gain: float) -> list[str]:
        best = self.best_random
        if best is None:
            return ["random adapters were not tried, so nothing tells whether these adapters matter"]
        draws = [each for each in self.of("random") if each.loss is not None]
        good = [draw for draw in draws if self._as_well(draw, gain) or _number(draw) <= self.loss]
        if good:
            count = f"{len(good)} of {len(draws)} draws ({_shown(_number(best))} at best)"
            moral = "the gain is not owed to what these adapters know"
            return [f"random adapters of the same shapes and norms do as well in {count}: {moral}"]
        if not math.isfinite(gain) or not math.isfinite(_number(best)):
            return [f"random adapters of the same shapes and norms come to {_shown(_number(best))} at best"]
        share = (self.loss + gain - _number(best)) / gain
        return [f"random adapters of the same shapes and norms reach {max(share, 0.0):.0%} of that gain at best"]

    def _left_out(self) -> list[str]:
        return [
            f"{_SHOWN[each.role].format(each.name)}: not run, {each.note}" for each in self.rows if each.loss is None
        ]

    def show(self) -> str:
        """A table for people, and the remarks."""
        rows = [("the result", self.loss), *((_SHOWN[each.role].format(each.name), each.loss) for each in self.rows)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {'not run' if loss is None else _shown(loss)}" for name, loss in rows]
        return "\n".join([*lines, *self.remarks()])

    def document(self) -> dict[str, JSON]:
        """Controls and remarks as JSON-ready values."""
        best = self.best_random
        return {
            "rows": [each.document() for each in self.rows],
            "best_single": self.best_single.name,
            "best_random": best.name if best else None,
            "remarks": [*self.remarks()],
        }


def _number(control: Control) -> float:
    """The loss; infinite where there is none."""
    return control.loss if control.loss is not None and math.isfinite(control.loss) else math.inf


def _order(control: Control) -> float:
    return _number(control)


def _shown(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "no finite number"
