"""Which method suits adapters that are to be composed: rules of thumb, each with the numbers that it goes by.

The rules follow what methods were made for: exact sums where changes do not meet (task arithmetic,
https://arxiv.org/abs/2212.04089), election of signs where they oppose each other (TIES, https://arxiv.org/abs/2306.01708,
and DARE, https://arxiv.org/abs/2311.03099), alignment where the same directions are used for different ends (KnOTS,
https://arxiv.org/abs/2410.19735), interpolation where they are one direction.  Thresholds are conventions, not laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorahub.deltas.kind import JSON

__all__ = ["Advice", "Pair", "advise", "advise_all"]

ALIKE = 0.5
"""Cosine from which on two changes are one direction rather than two: an angle of 60 degrees."""

APART = 0.1
"""Cosine up to which they are as good as orthogonal."""

MEETING = 0.2
"""Overlap beyond chance, of what is written to and of what is read from, from which on the same directions are used."""

OPPOSED = 0.55
"""Weighted share of opposite signs from which on it is more than the half that chance gives."""

UNEVEN = 3.0
"""Ratio of norms from which on the larger change drowns the smaller one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The numbers of two adapters; None where there is nothing to say it by."""

    names: tuple[str, str]
    shared: int
    same: bool
    cosine: float | None
    overlap_out: float | None
    overlap_in: float | None
    chance_out: float | None
    chance_in: float | None
    conflict: float | None
    count: float | None
    norms: tuple[float | None, float | None]

    @property
    def overlap(self) -> float | None:
        """The smaller of the two: changes meet where they read from and write to the same directions."""
        if self.overlap_out is None or self.overlap_in is None:
            return None
        return min(self.overlap_out, self.overlap_in)

    @property
    def meeting(self) -> float | None:
        """The same beyond chance: 0 for directions drawn at random, 1 for equal ones; the smaller of the two."""
        both = ((self.overlap_out, self.chance_out), (self.overlap_in, self.chance_in))
        found = [
            (overlap - chance) / (1 - chance) if chance < 1 else 0.0
            for overlap, chance in both
            if overlap is not None and chance is not None
        ]
        return min(found) if len(found) == len(both) else None

    @property
    def ratio(self) -> float | None:
        """The larger norm over the smaller; None where one of them is zero."""
        low, high = sorted(norm or 0.0 for norm in self.norms)
        return high / low if low else None

    def document(self) -> dict[str, JSON]:
        """JSON-ready values."""
        return {
            "adapters": list(self.names),
            "shared": self.shared,
            "cosine": self.cosine,
            "overlap_out": self.overlap_out,
            "overlap_in": self.overlap_in,
            "chance_out": self.chance_out,
            "chance_in": self.chance_in,
            "conflict": self.conflict,
            "count": self.count,
            "norms": list(self.norms),
            "ratio": self.ratio,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What suits, and why.

    Attributes:
        code: of the rule.
        methods: by their registered names, the most fitting first.
        words: the rule in words, with its numbers.
    """

    code: str
    methods: tuple[str, ...]
    words: str

    def document(self) -> dict[str, JSON]:
        """JSON-ready values."""
        return {"code": self.code, "methods": list(self.methods), "words": self.words}


@dataclass(frozen=True, slots=True)
class _Rule:
    """One row of the table: the first that applies counts."""

    code: str
    applies: Callable[[Pair], bool]
    methods: tuple[str, ...]
    words: Callable[[Pair], str]


def _two(value: float | None) -> str:
    """Two decimals, and no minus before a zero."""
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"


def _at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound


_RULES: tuple[_Rule, ...] = (
    _Rule(
        "nothing-known",
        lambda pair: bool(pair.shared) and pair.cosine is None,
        (),
        lambda _: "nothing of what both change could be compared",
    ),
    _Rule(
        "other-targets",
        lambda pair: not pair.shared,
        ("linear", "cat"),
        lambda _: "they change different targets, so a sum keeps each as it is: linear or cat, at any weights",
    ),
    _Rule(
        "same-change",
        lambda pair: pair.same,
        (),
        lambda _: "they are the same change: there is nothing to compose, a sum only makes it stronger",
    ),
    _Rule(
        "same-direction",
        lambda pair: _at_least(pair.cosine, ALIKE),
        ("linear", "slerp", "karcher"),
        lambda pair: (
            f"one direction (cosine {_two(pair.cosine)}): linear with weights that sum to 1, or slerp (karcher for "
            "more than two), which keep the norm"
        ),
    ),
    _Rule(
        "opposite-signs",
        lambda pair: _at_least(pair.conflict, OPPOSED),
        ("ties", "dare_ties"),
        lambda pair: (
            f"they work against each other (opposite signs {pair.conflict:.0%}, cosine {_two(pair.cosine)}): ties or "
            "dare_ties, which keep one sign for each element"
        ),
    ),
    _Rule(
        "same-subspace",
        lambda pair: _at_least(pair.meeting, MEETING) and pair.cosine is not None and pair.cosine < APART,
        ("ties", "dare_ties", "knots"),
        lambda pair: (
            f"the same directions used in different ways (cosine {_two(pair.cosine)}{_overlap(pair)}"
            f"{_signs(pair)}): ties or dare_ties, or knots, which aligns the directions first"
        ),
    ),
    _Rule(
        "near-orthogonal",
        lambda pair: pair.cosine is not None and abs(pair.cosine) < APART,
        ("linear", "cat"),
        lambda pair: (
            f"near-orthogonal (cosine {_two(pair.cosine)}{_overlap(pair)}): linear or cat, weights of 1 keep both whole"
        ),
    ),
    _Rule(
        "partly-alike",
        lambda pair: pair.cosine is not None and pair.cosine >= APART,
        ("linear", "ties"),
        lambda pair: (
            f"partly alike (cosine {_two(pair.cosine)}{_overlap(pair)}): linear, with weights below 1, as what they "
            "share is counted twice otherwise; or ties"
        ),
    ),
    _Rule(
        "opposite-directions",
        lambda pair: pair.cosine is not None,
        ("ties", "dare_ties"),
        lambda pair: f"they undo each other in part (cosine {_two(pair.cosine)}): ties or dare_ties",
    ),
)


def _signs(pair: Pair) -> str:
    return "" if pair.conflict is None else f", opposite signs {pair.conflict:.0%}"


def _overlap(pair: Pair) -> str:
    if pair.overlap is None or pair.chance_out is None or pair.chance_in is None:
        return ""
    return f", overlap {_two(pair.overlap)}, {_two(max(pair.chance_out, pair.chance_in))} by chance"


def advise(pair: Pair) -> tuple[Advice, ...]:
    """What suits two adapters: one rule for how they lie, and one more where their norms are far apart."""
    rule = next((each for each in _RULES if each.applies(pair)), None)
    found = [Advice(code=rule.code, methods=rule.methods, words=rule.words(pair))] if rule else []
    if pair.ratio is not None and pair.ratio >= UNEVEN and pair.shared and not pair.same:
        larger, smaller = pair.names if (pair.norms[0] or 0.0) > (pair.norms[1] or 0.0) else pair.names[::-1]
        words = (
            f"norms are far apart ({larger} has {pair.ratio:.1f} times the norm of {smaller}): nuslerp, which turns "
            "between directions whatever their lengths, or linear with weights that make the norms even"
        )
        found.append(Advice(code="norms-apart", methods=("nuslerp", "linear"), words=words))
    return tuple(found)


_ALL: dict[str, tuple[tuple[str, ...], str]] = {
    "opposite-signs": (("ties", "dare_ties"), "some pairs work against each other: ties or dare_ties over all"),
    "opposite-directions": (("ties", "dare_ties"), "some pairs undo each other in part: ties or dare_ties over all"),
    "same-subspace": (
        ("ties", "dare_ties", "knots"),
        "some pairs use the same directions in different ways: ties, dare_ties or knots over all",
    ),
    "partly-alike": (("linear", "ties"), "some pairs are partly alike: linear with weights below 1, or ties"),
    "near-orthogonal": (("linear", "cat"), "all pairs are near-orthogonal or apart: linear or cat, at weights of 1"),
    "other-targets": (("linear", "cat"), "no two change the same targets: linear or cat, at any weights"),
}
"""Code -> what it means for all adapters together; the first that a pair has counts."""


def advise_all(found: Sequence[Pair]) -> Advice | None:
    """What suits all of them together: that pair decides which asks for most care."""
    codes = [advice.code for pair in found for advice in advise(pair)[:1]]
    if "same-direction" in codes and set(codes) <= {"same-direction", "same-change"}:
        return Advice(
            code="same-direction",
            methods=("karcher", "linear", "model_stock"),
            words="all are one direction: karcher, linear with weights that sum to 1, or model_stock",
        )
    code = next((code for code in _ALL if code in codes), None)
    if code is None:
        return None
    if code in ("near-orthogonal", "other-targets") and {"same-direction", "same-change"} & set(codes):
        words = "some are one direction, the others apart: average the like ones first, then linear or cat"
        return Advice(code="groups", methods=("linear", "cat"), words=words)
    methods, words = _ALL[code]
    return Advice(code=code, methods=methods, words=words)
