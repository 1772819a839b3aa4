"""Tuned minus base, as an adapter: parameter after parameter, each read once from both sides and let go.

A matrix's difference becomes the best factors that a budget allows; what no factors fit is kept whole, at the tuned
value.  Differences are taken in float32, which is exact or one rounding for 16-bit and float32 weights, and in float64
where one side is float64.  Knows no files: whoever calls gives two ways to read a parameter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias, final

from lorahub.bases.layout import Target
from lorahub.composition.algebra.budgeting import Shared, Spectrum
from lorahub.composition.algebra.differences import has_arithmetic, matrices, norm_of, same_bits, subtract
from lorahub.composition.algebra.factorise import factorise, spectrum
from lorahub.composition.algebra.stacked import Stacked, break_even, combined
from lorahub.composition.algebra.truncate import Budget
from lorahub.composition.reducing.pairing import Pair, Way
from lorahub.composition.reducing.report import Rewritten, Row
from lorahub.deltas.delta import Delta
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.errors import CannotCarry, NotFinite
from lorahub.lazy import torch

__all__ = ["Extracted", "Read", "extract"]

Read: TypeAlias = "Callable[[Pair], torch.Tensor]"
"""Gives a parameter as stored; the caller may write to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What came of it.

    Attributes:
        deltas: target -> change; a LoRA of scale 1 (of every expert, for a stack), or the tuned value.
        roles: target name -> what its module is, for formats that spell embeddings apart.
        rows: one for each parameter, in the base's order.
    """

    deltas: dict[Target, Delta]
    roles: dict[str, str]
    rows: tuple[Row, ...]


def extract(
    pairs: Sequence[Pair],
    base: Read,
    tuned: Read,
    budget: Budget | Shared,
    *,
    dtype: torch.dtype,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Make factors of every difference.

    At any time each thread holds one parameter of both sides, their difference, and what factorising it takes.  The
    result does not depend on ``threads``.  A common budget without a bound on ranks reads matrices twice: once for all
    their singular values, once for the factors.

    Args:
        pairs: what to compare.
        base: reads a parameter of the base.
        tuned: reads a parameter of the tuned checkpoint.
        budget: of every target by itself, or of all together.
        dtype: of the factors.
        threads: how many.
        progress: called with (numbers compared, in all).

    Raises:
        CannotCarry: parameters differ that must not; they are compared before anything else.
        NotFinite: a difference holds NaN or infinity.
    """
    work = _Work(base, tuned, budget, dtype)
    numbered = list(enumerate(pairs))
    counted = [pair for pair in pairs if pair.way is not Way.LEFT_OUT]
    unbounded = isinstance(budget, Shared) and budget.most is None
    if unbounded:
        counted += [pair for pair in pairs if pair.way is Way.FACTORS]
    total = sum(math.prod(pair.shape) for pair in counted)

    def tick() -> None:
        if progress:
            progress(work.done, total)

    run_jobs([work.compare(number, pair) for number, pair in numbered if pair.way is Way.EQUAL], threads, tick=tick)
    work.demand_equal(pairs)
    if unbounded:
        run_jobs(
            [work.measure(number, pair) for number, pair in numbered if pair.way is Way.FACTORS], threads, tick=tick
        )
        work.allot()
    run_jobs(
        [work.compare(number, pair) for number, pair in numbered if pair.way in (Way.FACTORS, Way.WHOLE)],
        threads,
        tick=tick,
    )
    return work.finish(pairs)


@dataclass(slots=True)
class _Found:
    """What came of one pair: factors that wait for their share, factors as they will be stored, or a whole value."""

    norm: float = 0.0
    before: float = 0.0
    waiting: Stacked | None = None
    stored: Delta | None = None
    rank: int | None = None
    whole: torch.Tensor | None = None
    error: float | None = None
    reason: str = ""


@final
@dataclass(slots=True)
class _Work:
    base: Read
    tuned: Read
    budget: Budget | Shared
    dtype: torch.dtype
    done: int = 0
    spectra: dict[int, Spectrum] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    found: dict[int, _Found] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, number: int, pair: Pair) -> Job:
        """The job that makes of a pair what it becomes."""

        def job(_: Workspace) -> None:
            with self._naming(pair):
                found = self._compare(number, pair)
            with self.lock:
                self.found[number] = found
                self.done += math.prod(pair.shape)

        return job

    def measure(self, number: int, pair: Pair) -> Job:
        """The job that finds the singular values of a pair's difference."""

        def job(_: Workspace) -> None:
            with self._naming(pair):
                difference = subtract(self.tuned(pair), self.base(pair))
                found = matrices(difference, stack=pair.stack, transposed=pair.transposed)
                values = combined([spectrum(each) for each in found])
            with self.lock:
                self.spectra[number] = Spectrum(values=values, cost=len(found) * sum(found[0].shape))
                self.done += math.prod(pair.shape)

        return job

    def allot(self) -> None:
        """Every measured pair's rank out of the common budget."""
        assert isinstance(self.budget, Shared)  # nothing else measures
        numbers = sorted(self.spectra)
        self.ranks = dict(zip(numbers, self.budget.ranks([self.spectra[number] for number in numbers]), strict=True))

    @staticmethod
    @contextmanager
    def _naming(pair: Pair) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"{pair.name}: {error.message}", error.hint) from None

    def demand_equal(self, pairs: Sequence[Pair]) -> None:
        """Refuse, by name, what differs and cannot be carried."""
        differing = [
            f"{pairs[number].name} {list(pairs[number].shape)}: {pairs[number].why}"
            for number, found in sorted(self.found.items())
            if found.norm
        ]
        if differing:
            raise CannotCarry(
                f"{len(differing)} parameters differ, and no part of an adapter can say how\n  "
                + "\n  ".join(differing),
                "keep them whole: --whole PATTERN; or go without them: --leave-out PATTERN",
            )

    def finish(self, pairs: Sequence[Pair]) -> Extracted:
        """Deltas and rows, when all is compared."""
        self._share(pairs)
        deltas: dict[Target, Delta] = {}
        roles: dict[str, str] = {}
        rows = []
        for number, pair in enumerate(pairs):
            found = self.found.get(number) or _Found(reason="not compared")
            if found.whole is not None:
                deltas |= {target: Replace(found.whole) for target in pair.targets}
            if found.stored:
                deltas |= dict.fromkeys(pair.targets, found.stored)
                roles |= {target.name: role for target, role in zip(pair.targets, pair.roles, strict=True) if role}
            rows.append(_row(pair, found))
        return Extracted(deltas=deltas, roles=roles, rows=tuple(rows))

    def _compare(self, number: int, pair: Pair) -> _Found:
        value = self.tuned(pair)
        if pair.base is None:
            return _Found(norm=_length(value), whole=value, error=0.0, reason="the base has no such parameter")
        before = self.base(pair)
        if before.shape != value.shape:
            return _Found(norm=_length(value), whole=value, error=0.0, reason="its shape changed")
        if same_bits(before, value):
            return _Found()
        if not has_arithmetic(before, value):
            if pair.way is Way.EQUAL:
                return _Found(norm=1.0)  # that it is not 0 is all that is asked
            return _Found(whole=value, error=0.0, reason="its dtype has no differences")
        difference = subtract(value, before)
        found = _Found(norm=_length(difference), before=norm_of(before))
        if pair.way is Way.EQUAL or not found.norm:
            return found
        del before, value
        if pair.way is Way.FACTORS:
            self._factorise(number, pair, found, difference)
        else:
            found.whole, found.error = self.tuned(pair), 0.0
        return found

    def _factorise(self, number: int, pair: Pair, found: _Found, difference: torch.Tensor) -> None:
        """Factors within the budget; in a common one with a bound, as many singular values as that allows."""
        parts = matrices(difference, stack=pair.stack, transposed=pair.transposed)
        limit = break_even((parts[0].shape[0], parts[0].shape[1]))
        if number in self.ranks:
            rank = self.ranks[number]
            budget = Budget(rank=min(rank, limit)) if rank else None
        elif isinstance(self.budget, Budget):
            budget = replace(self.budget, rank=min(self.budget.rank or limit, limit))
        else:
            budget = Budget(rank=min(self.budget.most or limit, limit))
        factors = Stacked(parts=tuple(factorise(each, budget) for each in parts)) if budget else None
        if isinstance(self.budget, Shared) and number not in self.ranks:
            # all targets wait for the last one: in the precision that they will have at most
            found.waiting = factors.narrowed() if factors else None
        else:
            self._settle(pair, found, factors)

    def _settle(self, pair: Pair, found: _Found, factors: Stacked | None) -> None:
        """The factors as they will be stored, or the tuned value where they would take as many numbers."""
        if factors is None:
            found.error, found.reason = 1.0, "nothing of the common budget is left for it"
        elif factors.rank < break_even(factors.shape):
            found.stored, found.rank, found.error = _delta(factors, pair, self.dtype)
        else:
            found.whole, found.error, found.reason = self.tuned(pair), 0.0, "factors would take as many numbers"

    def _share(self, pairs: Sequence[Pair]) -> None:
        """Cut every target that waits to its share of the common budget."""
        waiting = [(number, found.waiting) for number, found in sorted(self.found.items()) if found.waiting]
        if isinstance(self.budget, Budget) or not waiting:
            return
        spectra = [
            Spectrum(values=factors.values, cost=factors.cost, missing=(factors.error * factors.norm) ** 2)
            for _, factors in waiting
        ]
        for (number, factors), rank in zip(waiting, self.budget.ranks(spectra), strict=True):
            found = self.found[number]
            found.waiting = None
            self._settle(pairs[number], found, factors.cut(rank) if rank else None)


def _length(tensor: torch.Tensor) -> float:
    """The norm of what an adapter will carry."""
    length = norm_of(tensor)
    if not math.isfinite(length):
        raise NotFinite("its difference holds NaN or infinity", "one of the two checkpoints is damaged")
    return length


def _delta(factors: Stacked, pair: Pair, dtype: torch.dtype) -> tuple[Delta, int, float]:
    """The factors as they will be stored, their rank, and their error, rounding included."""
    up, down, error = factors.stored(dtype)
    if pair.stack:
        return ExpertLoRA(up, down, 1.0, pair.transposed), factors.rank, error
    shape = (pair.shape[1], pair.shape[0]) if pair.transposed else pair.shape
    kernel = shape[2:]
    up, down = up[0].reshape(shape[0], -1, *(1 for _ in kernel)), down[0].reshape(-1, shape[1], *kernel)
    return LoRA(up, down, 1.0), factors.rank, error


def _row(pair: Pair, found: _Found) -> Row:
    ways: tuple[tuple[bool, Rewritten], ...] = (
        (pair.way is Way.LEFT_OUT, "left out"),
        (found.whole is not None, "whole"),
        (found.stored is not None, "factors"),
        (bool(found.norm), "dropped"),
        (True, "equal"),
    )
    return Row(
        target=pair.name,
        way=next(way for holds, way in ways if holds),
        shape=pair.shape,
        rank=found.rank,
        norm=found.norm,
        relative=found.norm / found.before if found.before else None,
        error=found.error,
        reason=found.reason,
    )
