"""The steps of a plan that change quantised parameters: read as numbers, folded, rounded back to the same grid.

Everything is worked out beside the model first, with the share of each change that the grid keeps.  Putting it in place
is then a matter of copies, and so is going back.  Knows no library; how numbers are stored is in ``storages``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from lorahub.bases.layout import Piece
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.engine.folding.bind import Bound
from lorahub.engine.folding.fold import Change, Fold
from lorahub.engine.folding.retention import LOST, REFUSE, WARN
from lorahub.engine.folding.sums import all_finite
from lorahub.engine.planning.steps import Form, Step
from lorahub.errors import BaseMismatch, Degraded, Incompatible, NotFinite
from lorahub.files.dtypes import from_torch, stored_shape
from lorahub.findings import Finding, Verdict, worst
from lorahub.lazy import torch
from lorahub.storages.storage import Coded, Held

__all__ = ["COARSE", "Quantised"]

COARSE = "quantised-merge"
"""Code of the finding that a change would be rounded to a grid of 4 bits or fewer, where little of it is left."""

_FINE = 8  # bits from which a merge is tried without being asked for by name
_INSTEAD = "attach the adapter live, or merge it into the base in 16 bits: lorahub merge --base BASE ADAPTER -o FOLDER"


@dataclass(frozen=True, slots=True)
class _Staged:
    """A parameter as it was, as it becomes, and what that means."""

    before: Coded
    after: Coded
    change: Change


@final
class Quantised:
    """The changes to quantised parameters that a plan makes; ``stage``, then ``commit``, and ``restore`` to go back."""

    def __init__(
        self, steps: Iterable[Step], held: Mapping[str, Held], bound: Bound, sibling: Callable[[Piece], torch.Tensor]
    ) -> None:
        """Look at what is asked for, without reading a weight.

        Args:
            steps: those of the plan whose parameters are in ``held``.
            held: canonical name -> what is held there.
            bound: the plan with its deltas.
            sibling: the untouched parameter that a piece lies in, as stored.

        Raises:
            BaseMismatch: a parameter is not the one that was planned.
            Incompatible: its storage does not take other numbers.
        """
        self._steps, self._held, self._bound, self._sibling = tuple(steps), held, bound, sibling
        self._staged: dict[str, _Staged] = {}
        for step in self._steps:
            self._demand(step)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes that the way back takes."""
        return sum(staged.before.nbytes for staged in self._staged.values())

    def _demand(self, step: Step) -> None:
        held = self._held[step.out]
        if held.refusal:
            raise Incompatible(f"{step.out} cannot be merged into, because {held.refusal}", _INSTEAD)
        code = from_torch(held.dtype)
        form = Form(stored_shape(code, held.shape), code)
        if step.before is None or step.before.shape != form.shape:
            raise BaseMismatch(
                f"the model does not fit the plan: {step.out} is {form} and was planned as {step.before}",
                "plan against this model",
            )

    def stage(self, threads: int, allowed: Collection[str] = ()) -> None:
        """Work everything out beside the model.

        Args:
            threads: how many parameters are folded at a time.
            allowed: finding codes to accept.

        Raises:
            Degraded: the grid keeps too little, and that was not allowed; the message says how much.
            NotFinite: a result would hold NaN or infinity.
        """
        run_jobs((self._job(step) for step in self._steps), threads)
        if worst(self.findings, allowed=allowed) >= Verdict.DEGRADED:
            stopping = tuple(each for each in self.findings if worst([each], allowed=allowed) >= Verdict.DEGRADED)
            codes = dict.fromkeys(each.code for each in stopping)
            raise Degraded(
                "; ".join(each.message for each in stopping),
                f"{_INSTEAD}; to go on all the same: {' '.join(f'--allow {code}' for code in codes)}",
                stopping,
            )

    def _job(self, step: Step) -> Job:
        def job(space: Workspace) -> None:
            held = self._held[step.out]
            before = held.read()
            values = before.values()
            form = Form(tuple(values.shape), "F32")
            fold = Fold(
                replace(step, before=form, after=form), self._bound.ingredients(step, self._sibling), values.device
            )
            wanted = torch.empty_like(values)
            for unit in fold.units:
                fold.run(unit, values[unit.rows], wanted[unit.rows], space)
            after = before.requantised(wanted)
            kept = after.values()
            if not all_finite(kept):
                raise NotFinite(f"{step.out} would hold NaN or infinity once it is stored as {held.storage} again")
            self._staged[step.out] = _Staged(before, after, Change.of(values, wanted.sub_(values), kept))

        return job

    def commit(self) -> None:
        """Put the results in place."""
        for name, staged in self._staged.items():
            self._held[name].write(staged.after)

    def restore(self) -> None:
        """Put back what was there."""
        for name, staged in self._staged.items():
            self._held[name].write(staged.before)

    def altered(self) -> list[str]:
        """The parameters that no longer hold what was put there, sorted."""
        return sorted(
            name for name, staged in self._staged.items() if self._held[name].read().mark() != staged.after.mark()
        )

    def drop(self) -> None:
        """Free the memory."""
        self._staged = {}

    @property
    def sums(self) -> dict[str, Change]:
        """Parameter -> what happened to it, measured on all of its elements."""
        return {step.out: self._staged[step.out].change for step in self._steps}

    @property
    def retained(self) -> dict[str, float]:
        """Parameter -> the share of its change that is there along itself: 1 for all, 0 where all is rounded back."""
        return {name: _gain(change) for name, change in self.sums.items()}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is lost, by how finely the parameters are stored; nothing where that is little."""
        coarse = [step.out for step in self._steps if self._held[step.out].bits < _FINE]
        fine = [step.out for step in self._steps if self._held[step.out].bits >= _FINE]
        found = [self._finding(COARSE, coarse, Verdict.DEGRADED)] if coarse else []
        if fine and (lost := 1 - self._share(fine)) >= WARN:
            found.append(self._finding(LOST, fine, Verdict.DEGRADED if lost >= REFUSE else Verdict.UNVERIFIED))
        return tuple(found)

    def _share(self, names: Collection[str]) -> float:
        return _gain(sum((self._staged[name].change for name in names), Change()))

    def _finding(self, code: str, names: list[str], level: Verdict) -> Finding:
        shares = self.retained
        worst_first = sorted(names, key=lambda name: shares[name])
        stored = " and ".join(sorted({self._held[name].storage for name in names}))
        least = worst_first[0]
        message = (
            f"{len(names)} parameters are stored as {stored}, and rounding to that again keeps "
            f"{self._share(names):.1%} of the change (least in {least}: {shares[least]:.1%})"
        )
        return Finding(
            code=code,
            axis="placement",
            level=level,
            message=message,
            where=tuple(worst_first),
            remedy=_INSTEAD,
            allowable=True,
        )


def _gain(change: Change) -> float:
    return change.kept / change.wanted if change.wanted else 1.0
