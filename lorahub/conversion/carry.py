"""What the target format can carry, asked of the format itself, and the rewritings that bring an adapter within it.

A format says by ``write`` what it has words for, so there is no second table of that to keep in step.  The whole
adapter is tried as it is; then each module alone, to find those without a word, which are rewritten; then the ladder of
rewritings of the whole.  What is left over is listed with the nearest remedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lorahub.conversion.change import Change, Weight, by_module
from lorahub.conversion.rewrite import Obstacle, as_difference, as_replacement, rewrite, unscaled
from lorahub.conversion.unify import biases_beside, ladder, one_kind
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import Format, Written
from lorahub.lazy import torch

__all__ = ["Approximate", "Carrier", "Fitted", "Misfit", "fit", "refusal"]

Approximate = Callable[[Change], Change]
"""A change as LoRA of a lower rank; raises ``Obstacle`` where its size or the base is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A module that the format has no word for.

    Attributes:
        changes: what it does.
        reason: why not, in the format's words or the rewriting's.
        remedy: options that would help, "" for none.
    """

    changes: tuple[Change, ...]
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What the format takes, and what was left out because it was allowed."""

    changes: tuple[Change, ...]
    misfits: tuple[Misfit, ...] = ()


@final
class Carrier:
    """A format, asked what it can write.

    Args:
        writer: the format.
        kinds: every registered kind.
        hints: what goes along; see ``Adapter.hints``.
    """

    def __init__(
        self, writer: Format, kinds: Sequence[Kind], hints: Callable[[Sequence[Change]], Mapping[str, JSON]]
    ) -> None:
        self.name = writer.name
        self.hints = hints
        self._writer, self._kinds = writer, tuple(kinds)

    def refuses(self, changes: Sequence[Change]) -> CannotCarry | None:
        """Why the format cannot write these together, or None where it can."""
        try:
            self.write(changes)
        except CannotCarry as error:
            return error
        return None

    def write(self, changes: Sequence[Change]) -> Written:
        """The changes as the format spells them.

        Raises:
            CannotCarry: it cannot.
        """
        deltas = {change.target: change.delta for change in changes}
        return self._writer.write(deltas, self._kinds, self.hints(changes))

    def takes(self, change: Change) -> bool:
        """Whether the format has a word for a change's component and module, asked with a plain LoRA in its place."""
        return self.refuses([change.become(LoRA(torch.zeros(4, 2), torch.zeros(2, 4), 1.0), "asked")]) is None


def fit(
    changes: Sequence[Change],
    carrier: Carrier,
    *,
    plain: bool,
    weight: Weight,
    approximate: Approximate | None,
    leave_out: bool,
    complete: Callable[[Sequence[Change]], bool] = lambda _: False,
) -> Fitted:
    """The changes in a form that the format takes, rewritten no more than it needs.

    Args:
        changes: as they are.
        carrier: the format.
        plain: everything that can be LoRA shall be.
        weight: the base's weights, for rewritings that need them.
        approximate: for what has no exact form; None refuses it.
        leave_out: modules without a word are left out, and told.
        complete: whether changes of a module are of all that the base has in it, so that it can be kept whole.

    Raises:
        CannotCarry: there is no such form; ``findings`` list every target.
    """
    fitter = _Fitter(carrier, weight, approximate, complete)
    now = fitter.plain(changes) if plain else list(changes)
    error = carrier.refuses(now)
    if error is None:
        return Fitted(changes=tuple(now))
    empty = carrier.refuses([])
    if empty is not None and empty.message == error.message:
        raise error  # nothing of this adapter: the format writes none
    now, misfits = fitter.modules(now)
    done, error = fitter.climb(now)
    if not done and approximate:
        done, error = fitter.climb([fitter.approximated(change) for change in now])
    if not done:
        done, more = fitter.without_a_kind(now)
        misfits = [*misfits, *more]
    if misfits and not (leave_out and done):
        raise refusal(carrier.name, misfits)
    if not done:
        raise CannotCarry(
            f"the format '{carrier.name}' cannot carry this adapter as a whole: {error.message if error else 'empty'}",
            (error.hint if error else "")
            or "look at its kinds, ranks and scales: lorahub inspect; another format may have words for them",
        )
    return Fitted(changes=tuple(done), misfits=tuple(misfits))


def _kept(change: Change) -> bool:
    """Whether there is nothing to approximate: it is LoRA already, a new value, or the difference of a vector."""
    kind, shape = change.delta.kind, change.delta.shape()
    return kind in ("lora", "replace") or (kind == "full" and (shape is None or len(shape) < 2))


_DIFFERENCE = Obstacle("a difference of full rank is no LoRA", "--approximate --rank 32")


@final
class _Fitter:
    """The rewritings that are at hand, applied where the format needs them."""

    def __init__(
        self,
        carrier: Carrier,
        weight: Weight,
        approximate: Approximate | None,
        complete: Callable[[Sequence[Change]], bool],
    ) -> None:
        self._carrier, self._weight, self._approximate, self._complete = carrier, weight, approximate, complete

    def plain(self, changes: Sequence[Change]) -> list[Change]:
        """Everything as LoRA that can be, by approximation too where that was asked for."""
        return [self.approximated(change) for change in one_kind(changes, self._weight)]

    def approximated(self, change: Change) -> Change:
        """The change as an approximation, where it is none of those that are kept."""
        if self._approximate is None or _kept(change):
            return change
        try:
            return self._approximate(change)
        except Obstacle:
            return change

    def climb(self, changes: Sequence[Change]) -> tuple[list[Change], CannotCarry | None]:
        """The changes as the first rung of the ladder makes them that the format takes, or none and why not."""
        error: CannotCarry | None = None
        for steps in ladder(self._weight) if changes else ():
            tried = list(changes)
            for step in steps:
                tried = step(tried)
            error = self._carrier.refuses(tried)
            if error is None:
                return tried, None
        return [], error

    def without_a_kind(self, changes: Sequence[Change]) -> tuple[list[Change], list[Misfit]]:
        """Where leaving out all modules with one kind, the rarest first, lets the rest fit: the rest, and those."""
        modules = [*by_module(changes).values()]
        counts = Counter(change.delta.kind for change in changes)
        for kind, _ in reversed(counts.most_common()):
            out = [module for module in modules if any(change.delta.kind == kind for change in module)]
            rest = [change for module in modules if module not in out for change in module]
            done, _ = self.climb(rest)
            if done:
                reason, hint = _short(self._carrier.refuses([*rest, *out[0]]), out[0])
                return done, [
                    Misfit(changes=tuple(module), reason=reason, remedy=self._module(module)[1][1] or hint)
                    for module in out
                ]
        return [], []

    def modules(self, changes: Sequence[Change]) -> tuple[list[Change], list[Misfit]]:
        """Modules that the format has words for, rewritten where they need it, and the others."""
        refuses, modules = self._carrier.refuses, [*by_module(changes).values()]
        anchor: list[Change] = next((module for module in modules if not refuses(module)), [])

        def fits(module: list[Change]) -> CannotCarry | None:
            """None, or why not; some formats take a replaced module only beside another with factors."""
            alone = refuses(module)
            return refuses([*anchor, *module]) if alone and anchor and anchor != module else alone

        taken: list[Change] = []
        left: list[Misfit] = []
        for module in modules:
            if fits(module) is None:
                taken += module
                continue
            moved = [as_difference(change, self._weight) for change in module]
            other, (reason, remedy) = self._gently(moved, fits), ("", "")
            if not other:
                other, (reason, remedy) = self._module(moved)
            again = fits(other)
            if again is None:
                anchor = anchor or other
                taken += other
            else:
                short, hint = _short(again, other)
                left.append(Misfit(changes=tuple(module), reason=reason or short, remedy=remedy or hint))
        misfits = []
        for misfit in left:  # again: there may be an anchor by now
            if fits(list(misfit.changes)) is None:
                taken += misfit.changes
            else:
                misfits.append(misfit)
        return taken, misfits

    def _gently(self, module: Sequence[Change], fits: Callable[[list[Change]], CannotCarry | None]) -> list[Change]:
        """One module in the first of the forms that keep its kinds and that the format takes, or nothing."""
        gentle = [unscaled(change) for change in module]
        kept = self._approximate is None and self._complete(module)
        whole = [as_replacement(change, self._weight) for change in module] if kept else gentle
        return next((each for each in (gentle, biases_beside(gentle), whole) if fits(each) is None), [])

    def _module(self, module: Sequence[Change]) -> tuple[list[Change], tuple[str, str]]:
        """One module rewritten as far as it can be, and the first (reason, remedy) why it is not plain, or two ""."""
        result, why = [], ("", "")
        for change in module:
            if _kept(change):
                result.append(unscaled(change))
                continue
            said = _DIFFERENCE
            try:
                if change.delta.kind != "full":
                    result.append(rewrite(change, self._weight))
                    continue
            except Obstacle as obstacle:
                said = obstacle
            if self._approximate:
                try:
                    result.append(self._approximate(change))
                    continue
                except Obstacle as obstacle:
                    said = obstacle
            why = why if why[0] else (said.reason, said.remedy)
            result.append(change)
        return result, why


def _short(error: CannotCarry | None, module: Sequence[Change]) -> tuple[str, str]:
    """A format's complaint about one module without its heading and without the names, which are listed apart; hint."""
    if error is None:
        return "", ""
    head, _, rest = error.message.partition("\n")
    text = rest.partition("\n")[0].strip() or head
    at = min((at for change in module if (at := text.find(change.target.module)) > 0), default=len(text))
    option = error.hint.find("--")
    hint = error.hint[option:] if option >= 0 else ""
    return text[:at].rstrip(" :,'").removesuffix(" on"), hint


def refusal(name: str, misfits: Sequence[Misfit]) -> CannotCarry:
    """The error that lists every target, by reason, with the nearest remedy."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for misfit in misfits:
        by_reason.setdefault((misfit.reason, misfit.remedy), []).extend(each.target.name for each in misfit.changes)
    findings = tuple(
        Finding(
            code="cannot-carry",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{len(targets)} targets have no word in '{name}': {reason}",
            where=tuple(targets),
            remedy=remedy or "to leave them out: --allow cannot-carry",
            allowable=True,
        )
        for (reason, remedy), targets in sorted(by_reason.items())
    )
    count = sum(len(targets) for targets in by_reason.values())
    hint = next((remedy for _, remedy in sorted(by_reason) if remedy), "--allow cannot-carry")
    return CannotCarry(f"the format '{name}' has no word for {count} targets of this adapter", f"add: {hint}", findings)
