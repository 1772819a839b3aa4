"""Live weights on their way from one merge to the next: every parameter gets there, or every one stays as it was.

From nothing merged to a plan is a merge, from one plan to another is a swap.  What a parameter held before anything
was merged comes from its keeper, the new change is folded into that, and it is written over the old result.  Knows no
files and no policies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TypeAlias, final

from lorahub.engine.changing.launch import Launch, launch_for
from lorahub.engine.changing.state import State, demand_unaltered, untouched
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.retention import judge, measured, overall
from lorahub.engine.interrupts import held
from lorahub.engine.planning.steps import Step
from lorahub.engine.report import MergeReport
from lorahub.engine.rounding.fast import FAST, told_of_kernels
from lorahub.engine.undoing.keeper import Keeper, Way
from lorahub.errors import IntegrityError
from lorahub.lazy import torch

__all__ = ["Passage"]

Progress = Callable[[int, int], None]

_Source: TypeAlias = "Callable[[slice, Workspace], torch.Tensor]"
"""Gives what rows held before anything was merged."""


@final
class Passage:
    """One way from one state to another."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], old: State | None, new: State, threads: int) -> None:
        """Nothing is done yet.

        Args:
            parameters: canonical name -> live tensor, for what changes look at besides their own.
            old: what is merged now, or None.
            new: what will be merged.
            threads: how many parameters at a time.
        """
        self.lost = False
        self._parameters, self._old, self._new, self._threads = parameters, old, new, threads
        self._kept = old.keepers if old else {}
        self._changes: dict[str, dict[int, Change]] = {step.out: {} for step in new.steps}
        self._ahead: dict[str, torch.Tensor] = {}  # results of what reads siblings, before any of these changes
        self._before: dict[str, torch.Tensor] = {}  # untouched parameters that old and new cut in different ways
        self._aside: dict[str, torch.Tensor] = {}  # old results that cannot be folded again while siblings change
        self._bare: dict[str, set[int]] = {name: set() for name in self._kept}  # rows where no old result is any more
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self._finished = 0

    def run(self, progress: Progress | None = None) -> MergeReport:
        """Go there; whatever is raised, all weights are then as they were.

        Raises:
            UsageError: someone changed what is merged now.
            IntegrityError: what is merged now cannot be taken off; or (``lost``) it could not be put back after a
                failure, and nothing is merged any more.
            BaseException: what a fold or ``progress`` raised.
        """
        with held() as interrupts:
            return self._run(progress, interrupts.demand_none)

    def _run(self, progress: Progress | None, demand_no_interrupt: Callable[[], None]) -> MergeReport:
        start = time.perf_counter()
        old, new, steps = self._old, self._new, self._new.steps
        if old is not None:
            demand_unaltered(old, self._threads)
        over = [keeper for name, keeper in self._kept.items() if name not in self._changes]

        def tick() -> None:
            if progress:
                progress(self._finished, len(new.plan.steps))

        try:
            if old is not None:
                self._set_aside(old)
                old.quantised.restore()
            if len(new.quantised):
                new.quantised.stage(self._threads, new.plan.allowed)
            if reading := [self._fold_ahead(step) for step in steps if _reads(step)]:
                run_jobs(reading, self._threads)
            run_jobs([*map(self._clear, over), *self._changing(steps)], self._threads, tick=tick)
            new.quantised.commit()
            report = self._report(time.perf_counter() - start)
            demand_no_interrupt()  # from here on there is a way back, and whoever merges gets it
        except BaseException:
            with held(deaf=True):
                self._go_back()
            raise
        return report

    # ------------------------------------------------------------------------------------------------- forward

    def _set_aside(self, old: State) -> None:
        for step in old.steps:
            if _reads(step):
                self._aside[step.out] = old.tensors[step.out].clone()

    def _fold(self, state: State, step: Step) -> Fold:
        device = state.tensors[step.out].device
        return state.folds.of(step, device, untouched(self._parameters, self._kept))

    def _fold_ahead(self, step: Step) -> Job:
        def job(space: Workspace) -> None:
            tensor, fold = self._new.tensors[step.out], self._fold(self._new, step)
            before = self._kept[step.out].whole(space) if step.out in self._kept else tensor
            result = torch.empty_like(tensor)
            for unit in fold.units:
                self._note(step, unit, fold.run(unit, before[unit.rows], result[unit.rows], space))
            self._ahead[step.out] = result

        return job

    def _change(self, step: Step, ready: Fold | None = None) -> Job:
        def put(space: Workspace) -> None:
            tensor, rows = self._new.tensors[step.out], slice(0, len(self._new.tensors[step.out]))
            way = self._new.keepers[step.out].open()
            source = self._source(step.out, None, space)
            before = way.keep(rows, source(rows, space) if source else None, space)
            self._write(step.out, rows, way, before, space, lambda: tensor.copy_(self._ahead.pop(step.out)))
            self._finish()

        def job(space: Workspace) -> Iterator[Job]:
            fold, way = ready or self._fold(self._new, step), self._new.keepers[step.out].open()
            source = self._source(step.out, fold, space)
            self._left[step.out] = len(fold.units)
            if not fold.units:
                self._finish()
            for unit in fold.units:
                yield self._one(step, fold, unit, way, source)

        return put if _reads(step) else job

    def _changing(self, steps: Iterable[Step]) -> list[Job]:
        """A launch for each device that has a kernel and each way back, and whatever changes by itself."""
        together: dict[tuple[torch.device, type[Launch]], list[Step]] = {}
        apart: list[Job] = []
        fast = self._new.plan.mode == FAST.spelled
        for step in steps:
            keeper = self._new.keepers[step.out]
            kind = launch_for(keeper, merged=step.out in self._kept) if fast and step.windowed else None
            if kind is None:
                apart.append(self._change(step))
            else:
                together.setdefault((keeper.tensor.device, kind), []).append(step)
        return [*(self._launch(kind(self._new.folds), several) for (_, kind), several in together.items()), *apart]

    def _launch(self, launch: Launch, steps: Iterable[Step]) -> Job:
        def job(space: Workspace) -> list[Job]:
            apart: list[Job] = []
            taken: dict[str, tuple[Step, Fold]] = {}
            for step in steps:
                fold = self._fold(self._new, step)
                self._source(step.out, fold, space)  # going back has to know of rows that were cut in another way
                if launch.take(self._new.keepers[step.out], fold):
                    taken[step.out] = step, fold
                else:
                    apart.append(self._change(step, fold))
            try:
                left = launch.run(lambda name, rows, change: self._changes[name].update({rows.start: change}), space)
            except BaseException:
                for step, fold in taken.values():
                    for unit in fold.units:
                        self._take_off(step.out, unit.rows)
                raise
            for _ in range(len(taken) - len(left)):
                self._finish()
            return [*apart, *(self._change(*taken[name]) for name in left)]

        return job

    def _source(self, name: str, fold: Fold | None, space: Workspace) -> _Source | None:
        """Where the untouched rows come from; None where they are in place."""
        keeper = self._kept.get(name)
        if keeper is None:
            return None
        if fold is not None and keeper.units == tuple(unit.rows for unit in fold.units):
            return keeper.open().recover
        whole = self._before[name] = keeper.whole(space)
        return lambda rows, _: whole[rows]

    def _one(self, step: Step, fold: Fold, unit: Unit, way: Way, source: _Source | None) -> Job:
        def job(space: Workspace) -> None:
            rows, live = unit.rows, self._new.tensors[step.out][unit.rows]
            untouched = source(rows, space) if source else None
            change = self._at_once(step.out, fold, unit, way, untouched, space)
            if change is not None:
                self._note(step, unit, change)
            else:
                before = way.keep(rows, untouched, space)

                def fill() -> None:
                    given = before if source else live  # adding where weights lie takes one pass less
                    if given.device != live.device:  # it is kept elsewhere
                        given = live.copy_(before)
                    self._note(step, unit, fold.run(unit, given, live, space))

                self._write(step.out, rows, way, before, space, fill)
            with self._lock:
                self._left[step.out] -= 1
                last = not self._left[step.out]
            if last:
                self._finish()

        return job

    def _at_once(
        self, name: str, fold: Fold, unit: Unit, way: Way, untouched: torch.Tensor | None, space: Workspace
    ) -> Change | None:
        try:
            return way.fold(fold, unit, untouched, space)
        except BaseException:
            self._take_off(name, unit.rows)
            raise

    def _write(
        self, name: str, rows: slice, way: Way, before: torch.Tensor, space: Workspace, fill: Callable[[], object]
    ) -> None:
        try:
            fill()
            way.written(rows, before, space)
        except BaseException:
            self._new.keepers[name].forget(rows)
            self._new.tensors[name][rows].copy_(before)
            self._take_off(name, rows)
            raise

    def _clear(self, keeper: Keeper) -> Job:
        def job(_: Workspace) -> list[Job]:
            way = keeper.open()
            return [one(way, rows) for rows in keeper.units]

        def one(way: Way, rows: slice) -> Job:
            def clear(space: Workspace) -> None:
                keeper.tensor[rows].copy_(way.recover(rows, space))
                self._take_off(keeper.name, rows)

            return clear

        return job

    def _take_off(self, name: str, rows: slice) -> None:
        if name in self._bare:
            self._bare[name].add(rows.start)

    def _note(self, step: Step, unit: Unit, change: Change) -> None:
        self._changes[step.out][unit.rows.start] = change

    def _finish(self) -> None:
        with self._lock:
            self._finished += 1

    def _report(self, seconds: float) -> MergeReport:
        sums = {name: sum((parts[start] for start in sorted(parts)), Change()) for name, parts in self._changes.items()}
        quantised = self._new.quantised  # judged before anything was changed
        plan = self._new.plan
        judged = judge(sums, allowed=plan.allowed, dtypes={step.after.dtype for step in plan.steps})
        forms = {name: (tensor.device, tensor.dtype) for name, tensor in self._new.tensors.items()}
        told = told_of_kernels(self._new.steps, forms) if plan.mode == FAST.spelled else ()
        findings = (*judged, *quantised.findings, *told)
        sums |= quantised.sums
        changes = {step.out: sums[step.out].relative for step in self._new.plan.steps}
        held: dict[str, int] = {"copy": quantised.nbytes} if len(quantised) else {}
        for keeper in self._new.keepers.values():
            for policy, count in keeper.account().items():
                held[policy] = held.get(policy, 0) + count
        return MergeReport(
            changes=changes,
            seconds=seconds,
            threads=self._threads,
            plan=self._new.folds.digest,
            undo=held,
            retained=measured(sums),
            retention=overall(sums),
            findings=findings,
        )

    # ------------------------------------------------------------------------------------------------- back

    def _go_back(self) -> None:
        """Take off what was written, then put the old results back where they were."""
        for name, keeper in self._new.keepers.items():
            for rows in keeper.units:
                self._take_off(name, rows)
        self._new.take_off(self._threads)
        if self._old is not None:
            self._old.quantised.commit()
        bare = [name for name, rows in self._bare.items() if rows]
        if self._old is None or not bare:
            return
        missing: list[str] = []
        run_jobs([self._again(self._old, name, missing) for name in bare], self._threads, to_the_end=True)
        if missing:
            self._give_up(missing)

    def _again(self, old: State, name: str, missing: list[str]) -> Job:
        """Fold the old result of a parameter again where it was taken off, and see that it is the same."""

        def job(space: Workspace) -> None:
            keeper, tensor = self._kept[name], old.tensors[name]
            if name in self._aside:
                tensor.copy_(self._aside[name])
                self._bare[name].clear()
                return
            fold, whole = self._fold(old, old.step(name)), self._before.get(name)
            if whole is not None:  # what was written was cut in another way, so all of it is done again
                tensor.copy_(whole)
                self._bare[name] = {unit.rows.start for unit in fold.units}
            for unit in fold.units:
                if unit.rows.start not in self._bare[name]:
                    continue
                live = tensor[unit.rows]
                scratch = space.take("undo: again", live.shape, live.dtype, live.device)
                with suppress(Exception):  # then it does not match, whatever the device says
                    fold.run(unit, live, scratch, space)
                if keeper.matches(unit.rows, scratch):
                    live.copy_(scratch)
                    self._bare[name].discard(unit.rows.start)
                else:
                    missing.append(name)

        return job

    def _give_up(self, missing: list[str]) -> None:
        """Take the old results off everywhere, since some of them cannot be had again."""
        self.lost = True
        for name, starts in self._bare.items():
            for start in starts:
                self._kept[name].forget(slice(start, None))
        if self._old is not None:
            self._old.take_off(self._threads)
        raise IntegrityError(
            f"{missing[0]} could not be put back as it was merged: the same change gives other numbers now. Every "
            "weight is what it was before anything was merged",
            "if a setting of PyTorch's arithmetic changed since (torch.set_float32_matmul_precision, "
            "torch.backends.mkldnn), set it back; then merge again",
        )


def _reads(step: Step) -> bool:
    return any(term.siblings for term in step.terms)
