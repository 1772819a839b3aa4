"""Merge into a live model: every parameter of the plan changes, or none does, and ``undo`` gives back the exact bits.

Weights are changed where they lie, so whatever else refers to them (views, optimizers, captured graphs) goes on doing
so.  Knows no files and no frameworks: parameters come by canonical name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import TracebackType
from typing import Self, final

from lorahub.bases.layout import Piece
from lorahub.engine.bind import Bound, HasDeltas
from lorahub.engine.crew import Job, Workspace, crew_size, run_jobs
from lorahub.engine.fold import Change, Fold, Unit, with_rows
from lorahub.engine.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.steps import Step
from lorahub.engine.undo import Copies
from lorahub.errors import BaseMismatch, Incompatible, UsageError
from lorahub.files.dtypes import to_torch, torch_shape
from lorahub.lazy import torch

__all__ = ["Merged", "merge_into"]

Progress = Callable[[int, int], None]


def merge_into(
    parameters: Mapping[str, torch.Tensor],
    plan: Plan,
    adapters: Mapping[str, HasDeltas],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Execute ``plan`` on tensors in place; an error or interrupt at any point leaves every one as it was.

    The result does not depend on ``threads``, and equals bit for bit what streaming the same plan writes.

    Args:
        parameters: canonical name -> the live tensor, on any device; nothing but the plan's parameters is looked at.
        plan: made for exactly these parameters.
        adapters: name -> adapter, as in the plan.
        threads: how many parameters are folded at a time; as many as PyTorch would use by default.
        progress: called from this thread with (parameters done, in all).

    Returns:
        ``report``, and ``undo()``.  As a context manager it is undone at the end of the block.

    Raises:
        BaseMismatch, Degraded: the plan's findings forbid it, or the parameters are not those it was made for.
        Incompatible: it cannot be done in a live model (new heads, untied weights): merge to disk.
        UsageError: the adapters are not those it was made for.
        NotFinite: a result would hold NaN or infinity.
        LorahubError: there is no memory for the copies that undo needs.
    """
    plan.check()
    count = crew_size(threads)
    bound = Bound(plan, adapters)
    tensors = _tensors(parameters, plan)
    return _Merging(parameters, tensors, plan, bound, count).run(progress)


def _tensors(parameters: Mapping[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """The tensors to change, as views with an axis 0 and no graph; refuses what cannot be changed in place."""
    _demand_same_architecture(plan)
    faults = [fault for step in plan.steps if (fault := _fault(parameters.get(step.out), step))]
    faults += [f"it has no {name}" for name in plan.reads if name not in parameters]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BaseMismatch(f"the model does not fit the plan: {faults[0]}{more}", "plan against this model")
    tensors = {step.out: with_rows(parameters[step.out].detach()) for step in plan.steps}
    owners: list[tuple[torch.device, int, int, str]] = sorted(
        (
            (tensor.device, tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
            for name, tensor in tensors.items()
            if tensor.numel()
        ),
        key=lambda owner: (str(owner[0]), owner[1]),
    )
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(owners):
        if device == other_device and start < stop:
            raise BaseMismatch(
                f"{name} and {other} share memory, and the plan changes each by itself", "plan against this model"
            )
    return tensors


def _demand_same_architecture(plan: Plan) -> None:
    created = [step.out for step in plan.steps if step.made_whole]
    untied = [step.out for step in plan.steps if step.source != step.out and not step.made_whole]
    if created:
        raise Incompatible(
            f"the adapter brings {', '.join(created[:3])}, which a live model of this class has no place for",
            "merge to disk (out=FOLDER, or lorahub merge ... -o FOLDER) and load the result, or build the model with "
            "the same head first",
        )
    if untied or plan.config_edits or plan.removed:
        what = f"untying {untied[0]}" if untied else "changing the model's configuration"
        raise Incompatible(
            f"{what} takes another model, not other weights in this one",
            "merge to disk (out=FOLDER, or lorahub merge ... -o FOLDER) and load the result",
        )


def _fault(tensor: torch.Tensor | None, step: Step) -> str:
    """Why a tensor is not the parameter the step was planned for, or cannot be changed in place; "" if it can."""
    form = step.before
    assert form is not None
    if tensor is None:
        return f"it has no {step.out}"
    if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
        return f"{step.out} is a {type(tensor).__name__} ({tensor.layout}), which keeps its numbers elsewhere"
    if tuple(tensor.shape) != torch_shape(form.dtype, form.shape) or tensor.dtype != to_torch(form.dtype):
        return f"{step.out} is {list(tensor.shape)} {tensor.dtype} and was planned as {form}"
    if tensor.is_meta:
        return f"{step.out} is on the meta device and holds no numbers"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return f"{step.out} is expanded: several of its elements share memory"
    return ""


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.dtype.itemsize)


@final
class _Merging:
    """A merge under way."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        tensors: dict[str, torch.Tensor],
        plan: Plan,
        bound: Bound,
        threads: int,
    ) -> None:
        self._parameters, self._tensors = parameters, tensors
        self._plan, self._bound, self._threads = plan, bound, threads
        self._copies = Copies(tensors)
        self._held: dict[str, torch.Tensor] = {}
        self._changes: dict[str, dict[int, Change]] = {step.out: {} for step in plan.steps}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self._finished = 0

    def run(self, progress: Progress | None) -> Merged:
        start = time.perf_counter()

        def tick() -> None:
            if progress:
                progress(self._finished, len(self._plan.steps))

        # What reads siblings is folded before any of them changes, and put in place with the others.
        reading = [step for step in self._plan.steps if any(term.siblings for term in step.terms)]
        try:
            run_jobs((self._ahead(step) for step in reading), self._threads)
            run_jobs((self._open(step) for step in self._plan.steps), self._threads, tick=tick)
            report = self._report(time.perf_counter() - start)
        except BaseException:
            self._copies.restore(self._threads)
            raise
        return Merged(self._copies, report, self._threads)

    def _fold(self, step: Step) -> Fold:
        def sibling(piece: Piece) -> torch.Tensor:
            return self._parameters[piece.parameter].detach()

        return Fold(step, self._bound.ingredients(step, sibling), self._tensors[step.out].device)

    def _ahead(self, step: Step) -> Job:
        def job(space: Workspace) -> None:
            tensor, fold = self._tensors[step.out], self._fold(step)
            held = torch.empty_like(tensor)
            for unit in fold.units:
                self._note(step, unit, fold.run(unit, tensor[unit.rows], held[unit.rows], space))
            self._held[step.out] = held

        return job

    def _open(self, step: Step) -> Job:
        def put(_: Workspace) -> None:
            tensor, rows = self._tensors[step.out], slice(0, None)
            self._copies.save(step.out, rows)
            tensor.copy_(self._held.pop(step.out))
            self._copies.mark(step.out, rows)
            self._finish(step)

        def job(_: Workspace) -> Iterator[Job]:
            fold = self._fold(step)
            self._left[step.out] = len(fold.units)
            if not fold.units:
                self._finish(step)
            for unit in fold.units:
                yield self._one(step, fold, unit)

        return put if step.out in self._held else job

    def _one(self, step: Step, fold: Fold, unit: Unit) -> Job:
        def job(space: Workspace) -> None:
            rows = unit.rows
            before = self._copies.save(step.out, rows)
            self._note(step, unit, fold.run(unit, before, self._tensors[step.out][rows], space))
            self._copies.mark(step.out, rows)
            with self._lock:
                self._left[step.out] -= 1
                last = not self._left[step.out]
            if last:
                self._finish(step)

        return job

    def _note(self, step: Step, unit: Unit, change: Change) -> None:
        self._changes[step.out][unit.rows.start] = change

    def _finish(self, step: Step) -> None:
        with self._lock:
            self._finished += 1

    def _report(self, seconds: float) -> MergeReport:
        changes = {
            name: sum((parts[start] for start in sorted(parts)), Change()).relative
            for name, parts in self._changes.items()
        }
        return MergeReport(changes=changes, seconds=seconds, threads=self._threads, plan=self._plan.digest())


@final
class Merged:
    """A model with adapters merged into it, and the way back.

        with merge_into(parameters, plan, adapters) as merged:
            ...                       # the adapters are in the weights
        # the weights are what they were, bit for bit

    Attributes:
        report: what changed.
    """

    def __init__(self, copies: Copies, report: MergeReport, threads: int) -> None:
        self.report = report
        self._copies, self._threads = copies, threads
        self._state = "merged"
        self._lock = threading.Lock()

    def undo(self) -> None:
        """Give every weight its exact former bits and free the copies.

        Raises:
            UsageError: it was undone already, or someone changed the weights since, which undoing would lose; the
                message names them.  Then nothing is changed, and ``undo`` works again once they are back.
        """
        with self._lock:
            if self._state == "undone":
                raise UsageError("this merge was undone already", "merge again to have it back")
            if self._state == "merged" and (names := self._copies.altered(self._threads)):
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UsageError(
                    f"{', '.join(names[:3])}{more} changed since they were merged, and undoing would lose that",
                    "undo later merges first, the last one before the others; or load the base again",
                )
            self._state = "undoing"  # from here on only going on makes sense, whatever is raised
            self._copies.restore(self._threads)
            self._copies.drop()
            self._state = "undone"

    @property
    def undone(self) -> bool:
        """Whether the weights are what they were."""
        return self._state == "undone"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.undone:
            self.undo()
