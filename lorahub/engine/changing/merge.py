"""Merge into a live model: every parameter of the plan changes, or none does, and ``undo`` gives back the exact bits.

Weights are changed where they lie, so whatever else refers to them (views, optimizers, captured graphs) goes on doing
so.  Knows no files and no frameworks: parameters come by canonical name.  How weights get from one merge to the next is
in ``passage``, and what undoing needs in ``undo``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self, final

from lorahub.engine.changing.arranged import Arranged, Prepared
from lorahub.engine.changing.passage import Passage
from lorahub.engine.changing.quantised import Quantised
from lorahub.engine.changing.state import State, demand_in_place, demand_unaltered, untouched
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.crew import crew_size
from lorahub.engine.folding.bind import HasDeltas
from lorahub.engine.folding.fold import with_rows
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.engine.report import MergeReport
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.undoing.keeper import Keeper
from lorahub.errors import BaseMismatch, Incompatible, UsageError
from lorahub.files.dtypes import to_torch, torch_shape
from lorahub.lazy import torch
from lorahub.storages.storage import Held

__all__ = ["Again", "Arranged", "Merged", "Prepared", "merge_into"]

Progress = Callable[[int, int], None]


class Again(Protocol):
    """Plans another merge into the same model."""

    def __call__(self, adapters: Any, weights: Any, allow: Collection[str], /) -> Arranged:
        """Plan and judge it.

        Args:
            adapters: as for ``lorahub.merge``; None for those of the merge that this goes on from.
            weights: one per adapter, in order or by name.
            allow: finding codes to accept.
        """


def merge_into(
    parameters: Mapping[str, torch.Tensor],
    plan: Plan,
    adapters: Mapping[str, HasDeltas],
    *,
    held: Mapping[str, Held] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    keeping: Keeping | None = None,
    again: Again | None = None,
) -> Merged:
    """Execute ``plan`` on tensors in place; an error or interrupt at any point leaves every one as it was.

    The result does not depend on ``threads``, and equals bit for bit what streaming the same plan writes.

    Args:
        parameters: canonical name -> the live tensor, on any device; nothing but the plan's parameters is looked at.
        plan: made for exactly these parameters.
        adapters: name -> adapter, as in the plan; they are held as long as the merge can be undone.
        held: canonical name -> what is held there, for parameters that are quantised.
        threads: how many parameters are folded at a time; by default as many as PyTorch would use, or one where they
            are small.
        progress: called from this thread with (parameters done, in all).
        keeping: how it is to be undone; the fastest way that there is room for by default.
        again: plans another merge, for ``Merged.swap``.

    Returns:
        ``report``, ``undo()`` and ``swap()``.  As a context manager it is undone at the end of the block.

    Raises:
        BaseMismatch, Degraded: the plan's findings forbid it, or the parameters are not those it was made for.
        Incompatible: it cannot be done in a live model (new heads, untied weights): merge to disk.
        UsageError: the adapters are not those it was made for, or there is no such way back.
        NotFinite: a result would hold NaN or infinity.
        LorahubError: there is no memory for what undo needs.
    """
    arranged = Arranged(parameters=parameters, plan=plan, adapters=adapters, held=held or {})
    keeping = keeping or Keeping()
    state = _state(arranged, keeping, {})
    count = crew_size(threads, [tensor.nbytes for tensor in state.tensors.values()])
    report = Passage(parameters, None, state, count).run(progress)
    return Merged(parameters, state, report, count, keeping, again)


def _state(arranged: Arranged, keeping: Keeping, old: Mapping[str, Keeper]) -> State:
    """What is to be merged, with keepers that hold nothing yet."""
    plan = arranged.plan
    plan.check()
    folds = arranged.folds()
    steps = tuple(step for step in plan.steps if step.out not in arranged.held)
    if plan.mode != FAST.spelled and len(steps) < len(plan.steps):
        raise Incompatible(
            f"mode {plan.mode} rounds to numbers, and this model holds some of its parameters in quantised form",
            "merge in mode fast, or into the base in 16 bits on disk",
        )
    tensors = _tensors(arranged.parameters, plan, steps)
    return State(
        plan=plan,
        folds=folds,
        steps=steps,
        tensors=tensors,
        keepers=keeping.keepers(steps, tensors, folds, old),
        quantised=Quantised(
            [step for step in plan.steps if step.out in arranged.held],
            arranged.held,
            folds.bound,
            untouched(arranged.parameters, old),
        ),
    )


def _tensors(parameters: Mapping[str, torch.Tensor], plan: Plan, steps: Sequence[Step]) -> dict[str, torch.Tensor]:
    """The tensors to change, as views with an axis 0 and no graph; refuses what cannot be changed in place."""
    _demand_same_architecture(plan)
    faults = [fault for step in steps if (fault := _fault(parameters.get(step.out), step))]
    faults += [f"it has no {name}" for name in plan.reads if name not in parameters]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        elsewhere = "its weights are brought when they are called for: load it without offloading, or merge to disk"
        hint = elsewhere if "meta device" in faults[0] else "plan against this model"
        raise BaseMismatch(f"the model does not fit the plan: {faults[0]}{more}", hint)
    tensors = {step.out: with_rows(parameters[step.out].detach()) for step in steps}
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
    if created and plan.words:
        raise Incompatible(
            f"the adapter brings {', '.join(created[:3])} for {plan.words} words, and the live model knows another "
            "number of them",
            f"model.resize_token_embeddings({plan.words}) first, or merge to disk (out=FOLDER) and load the result",
        )
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
class Merged:
    """A model with adapters merged into it, and the way back.

        with merge_into(parameters, plan, adapters) as merged:
            ...                       # the adapters are in the weights
        # the weights are what they were, bit for bit

    Attributes:
        report: what changed, and how much memory the way back takes.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        state: State,
        report: MergeReport,
        threads: int,
        keeping: Keeping,
        again: Again | None,
    ) -> None:
        self.report = report
        self._parameters = parameters
        self._threads, self._keeping, self._plan_again = threads, keeping, again
        self._now: State | None = state
        self._given: Any = None  # what ``swap`` was given, or None for what ``again`` knows
        self._undoing = False
        self._lock = threading.Lock()
        self._undone = False
        if keeping.policy == "none":
            state.drop()
            self._now = None
            self.report = replace(report, undo={})

    def undo(self) -> None:
        """Give every weight its exact former bits and free what that took.

        Raises:
            UsageError: it was undone already, nothing was kept, the model was moved, or someone changed the weights
                since, which undoing would lose; the message names them.  Then nothing is changed, and ``undo`` works
                again once they are back.
            IntegrityError: what was kept does not give back what was there.  Nothing is changed.
        """
        with self._lock:
            now = self._reachable("undone")
            demand_in_place(self._parameters, now)
            if not self._undoing:
                demand_unaltered(now, self._threads)
            self._undoing = True  # from here on only going on makes sense, whatever is raised
            now.take_off(self._threads)
            now.drop()
            self._now, self._undone = None, True

    def swap(self, adapters: Any, *, weights: Any = None, allow: Collection[str] = ()) -> MergeReport:
        """Put other adapters in the place of these, in one pass: the bits of merging them into the untouched model.

        Whatever is raised, the weights are then as they were; one exception is an ``IntegrityError`` that says that
        nothing is merged any more.

        Args:
            adapters: as for ``lorahub.merge``; or what ``prepare`` gave, which has its weights.
            weights: one per adapter, in order or by name.
            allow: finding codes to accept.

        Raises:
            UsageError: as ``undo``; or the merge was made from a plan: ``swap_to`` takes another.
            LorahubError: as ``lorahub.merge``.
        """
        if isinstance(adapters, Prepared):
            if weights is not None or allow:
                raise UsageError("what was prepared has its weights, and was judged", "prepare(..., weights=, allow=)")
            report = self.swap_to(adapters)
            self._given = adapters.given
        else:
            arranged, given = self._arranged(adapters, weights, allow)
            report = self.swap_to(arranged)
            self._given = given
        return report

    def prepare(self, adapters: Any, *, weights: Any = None, allow: Collection[str] = ()) -> Prepared:
        """Plan and judge a merge into the untouched model and read its tensors, for ``swap``, any number of times.

        Nothing is written.  It holds its adapters, and after the first swap to it their factors as the engine
        multiplies them: in memory, or on the device of the weights.

        Args:
            adapters: as for ``lorahub.merge``.
            weights: one per adapter, in order or by name.
            allow: finding codes to accept.

        Raises:
            UsageError: the merge was made from a plan, so it does not know how to plan.
            LorahubError: as ``lorahub.merge``.
        """
        return Prepared.of(*self._arranged(adapters, weights, allow))

    def _arranged(self, adapters: Any, weights: Any, allow: Collection[str]) -> tuple[Arranged, Any]:
        """Another merge into the same model, and the adapters as they were given for it."""
        if self._plan_again is None:
            raise UsageError("this merge was made from a plan, so other adapters need one too", "swap_to(ARRANGED)")
        given = self._given if adapters is None else adapters
        return self._plan_again(given, weights, allow), given

    def set_weights(self, weights: Any, *, allow: Collection[str] = ()) -> MergeReport:
        """Merge the adapters that ``merge`` or ``swap`` was given last at other weights instead; see ``swap``.

        Args:
            weights: one per adapter, in order or by name.
            allow: finding codes to accept.
        """
        return self.swap(None, weights=weights, allow=allow)

    def swap_to(self, arranged: Arranged, *, progress: Progress | None = None) -> MergeReport:
        """As ``swap``, to a merge that is planned already, into the same model; ``Prepared`` ones are quicker.

        Args:
            arranged: what is to be merged instead.
            progress: called from this thread with (parameters done, in all).
        """
        with self._lock:
            old = self._reachable("swapped")
            if self._undoing:
                raise UsageError("this merge is half undone", "undo() goes on with it")
            demand_in_place(arranged.parameters, old)
            new = _state(arranged, self._keeping, old.keepers)
            passage = Passage(arranged.parameters, old, new, self._threads)
            try:
                self.report = passage.run(progress)
                self._now, self._parameters = new, arranged.parameters
            finally:
                if passage.lost:
                    self._now, self._undone = None, True
            old.drop()
        return self.report

    @property
    def undone(self) -> bool:
        """Whether the weights are what they were."""
        return self._undone

    def _reachable(self, what: str) -> State:
        if self._undone:
            raise UsageError("this merge was undone already", "merge again to have it back")
        if self._now is None:
            raise UsageError(
                f'this merge cannot be {what}: undo="none" kept nothing', "load the base again; or merge with undo="
            )
        return self._now

    def __enter__(self) -> Self:
        self._reachable("undone at the end of a block")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.undone:
            self.undo()
