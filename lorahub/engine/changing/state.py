"""What is merged into live weights now: the plan and its deltas, the tensors, and the way back for each.

Also whether it is still there as it was left, which is asked before anything is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorahub.bases.layout import Piece
from lorahub.engine.changing.arranged import Folds
from lorahub.engine.changing.quantised import Quantised
from lorahub.engine.changing.undo import altered, restore
from lorahub.engine.crew import Workspace
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.engine.undoing.keeper import Keeper
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["State", "demand_in_place", "demand_unaltered", "untouched"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is merged into live weights.

    Attributes:
        plan: what was done.
        folds: with which deltas, and how.
        steps: those of the plan that change plain tensors.
        tensors: these, with an axis 0.
        keepers: the way back for each.
        quantised: the other steps.
    """

    plan: Plan
    folds: Folds
    steps: tuple[Step, ...]
    tensors: Mapping[str, torch.Tensor]
    keepers: Mapping[str, Keeper]
    quantised: Quantised

    def step(self, name: str) -> Step:
        """The step that changes a plain parameter."""
        return next(step for step in self.steps if step.out == name)

    def take_off(self, threads: int) -> None:
        """Put back what was there before, everywhere; what is done already is not done again."""
        restore(self.keepers, threads)
        self.quantised.restore()

    def drop(self) -> None:
        """Free what is held."""
        for keeper in self.keepers.values():
            keeper.drop()
        self.quantised.drop()


def demand_in_place(parameters: Mapping[str, torch.Tensor], state: State) -> None:
    """Return where the parameters are still the memory that was merged into.

    Args:
        parameters: canonical name -> live tensor.
        state: what is merged.

    Raises:
        UsageError: one was moved, converted or replaced since, so undoing would not reach it.
    """
    for name, tensor in state.tensors.items():
        live = parameters.get(name)
        if live is None or live.device != tensor.device or live.data_ptr() != tensor.data_ptr():
            raise UsageError(
                f"{name} was moved, converted or replaced since it was merged, and undoing would not reach it",
                "move it back, or load the base again; move a model before merging, not after",
            )


def demand_unaltered(state: State, threads: int) -> None:
    """Return where every parameter holds what was merged and can be restored; nothing is written.

    Raises:
        UsageError: someone changed one since.
        IntegrityError: one cannot be restored.
    """
    if names := sorted([*altered(state.keepers, threads), *state.quantised.altered()]):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(
            f"{', '.join(names[:3])}{more} changed since they were merged, and undoing would lose that",
            "undo later merges first, the last one before the others; or load the base again",
        )


def untouched(parameters: Mapping[str, torch.Tensor], kept: Mapping[str, Keeper]) -> Callable[[Piece], torch.Tensor]:
    """What gives the parameter that a piece lies in, as it was before anything was merged.

    Args:
        parameters: canonical name -> live tensor.
        kept: the keepers of those that are merged into.
    """

    def of(piece: Piece) -> torch.Tensor:
        live, keeper = parameters[piece.parameter].detach(), kept.get(piece.parameter)
        return live if keeper is None else keeper.whole(Workspace()).view(live.shape)

    return of
