"""The way back from a merge: which keeper serves which parameter, and going back all at once or not at all.

Knows plans and tensors; what is kept and how is in ``undoing``, one file each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from lorahub.engine.changing.arranged import Folds
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.engine.folding.bind import Bound
from lorahub.engine.kernels.choice import native, summer
from lorahub.engine.planning.steps import Step
from lorahub.engine.undoing.checksum import checksums
from lorahub.engine.undoing.choice import can_journal, choose, held_bytes
from lorahub.engine.undoing.copies import Copies, HostCopies
from lorahub.engine.undoing.journal import InPassing, Journal
from lorahub.engine.undoing.keeper import POLICIES, Keeper, Policy
from lorahub.engine.undoing.memory import free_bytes
from lorahub.engine.undoing.reload import BaseRows, Reload
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Keeping", "altered", "restore"]

_SAMPLE = 64  # rows of a parameter that its norm is taken from


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How a merge is to be undone.

    Attributes:
        policy: as ``lorahub.merge`` takes it.
        base: the files that the weights came from, for "reload"; None where nobody knows.
    """

    policy: Policy = "auto"
    base: BaseRows | None = None

    def __post_init__(self) -> None:
        """Refuse what does not exist.

        Raises:
            UsageError: no such policy, or "reload" without files.
        """
        if self.policy not in POLICIES:
            raise UsageError(f"undo={self.policy!r} is no way back", f"one of {', '.join(POLICIES)}")
        if self.policy == "reload" and self.base is None:
            raise UsageError(
                'undo="reload" reads the weights again, and nobody said where they lie', "name the base: origin=FOLDER"
            )

    def keepers(
        self,
        steps: Sequence[Step],
        tensors: Mapping[str, torch.Tensor],
        folds: Folds,
        old: Mapping[str, Keeper],
    ) -> dict[str, Keeper]:
        """A keeper for each parameter that is changed.

        Args:
            steps: of the plan.
            tensors: the parameters, with an axis 0.
            folds: of the plan.
            old: the keepers of what is merged now; their copies are shared.

        Raises:
            LorahubError: there is no room.
            BaseMismatch: the files do not have a parameter.
        """
        policy, sizes = self._policy(steps, tensors, folds.bound)
        passing = policy == "copy" and self.policy != "copy"  # chosen as the fastest, and noting in passing is faster
        if policy == "reload":
            assert self.base is not None  # demanded when this was made
            self.base.demand(tensors)
        result: dict[str, Keeper] = {}
        for step in steps:
            name, tensor, before = step.out, tensors[step.out], old.get(step.out)
            if policy == "reload" and self.base is not None:
                result[name] = Reload(name, tensor, self.base)
            elif passing and _is_noted_in_passing(step, tensor):
                result[name] = InPassing(name, tensor, partial(folds.reverse, step, tensor.device))
            elif policy == "journal" and can_journal(step, *([sizes[name]] if name in sizes else [])):
                result[name] = Journal(name, tensor, partial(folds.reverse, step, tensor.device))
            else:
                kind = HostCopies if policy == "host" else Copies
                result[name] = kind(name, tensor, instead_of=before if type(before) is kind else None)
        return result

    def _policy(
        self, steps: Sequence[Step], tensors: Mapping[str, torch.Tensor], bound: Bound
    ) -> tuple[Policy, Mapping[str, float]]:
        """The policy that was asked for, or the one that fits, and sizes of changes where it needs them.

        "none" needs one too, until all is done.
        """
        chosen, needs = self.policy, dict[Policy, int]()
        if chosen in {"auto", "none"}:
            devices, cpu = {tensor.device for tensor in tensors.values()}, torch.device("cpu")
            free = [room for device in devices if (room := free_bytes(device)) is not None]
            here = min(free) if free else None
            rooms: dict[Policy, int | None] = {"copy": here, "journal": here, "host": free_bytes(cpu)}
            needs["copy"] = held_bytes(steps, "copy")
            chosen = choose(needs | {"journal": 0}, rooms)
        if chosen != "journal":
            return chosen, {}
        sizes = {
            step.out: size
            for step in steps
            if can_journal(step) and (size := _relative(step, bound, tensors[step.out])) is not None
        }
        if needs:  # copies are too large
            needs["journal"] = held_bytes(steps, "journal", sizes)
            if devices - {cpu}:
                needs["host"] = needs["copy"]
            if self.base is not None:
                needs["reload"] = 0
            chosen = choose(needs, rooms)
        return chosen, sizes


def _is_noted_in_passing(step: Step, tensor: torch.Tensor) -> bool:
    """Whether the pass that merges can note a journal on its way: of ordinary changes, which is for it to see."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dim() > 1
    if not plain or not step.products or not can_journal(step):
        return False
    kernel = native().kernel
    return kernel is not None and kernel.takes(tensor.dtype, sum(term.rank or 0 for term in step.terms))


def _relative(step: Step, bound: Bound, tensor: torch.Tensor) -> float | None:
    """About how large a step's change is to its weights (Frobenius norms), or None where that takes more than a look.

    The norm of the weights is that of some of their rows.  Of a change that is cut the whole counts.
    """
    added = 0.0
    for item in bound.ingredients(step, lambda _: tensor):
        low = item.delta.low_rank()
        if low is None:
            return None
        up, down = low.up.float(), low.down.float()
        added += (item.weight * low.scale) ** 2 * float(((up.T @ up) * (down @ down.T)).sum())
    rows = tensor[:: max(len(tensor) // _SAMPLE, 1)].float()
    weights = float(rows.square().mean()) * tensor.numel() if rows.numel() else 0.0
    return float((max(added, 0.0) / weights) ** 0.5) if weights else None


def altered(keepers: Mapping[str, Keeper], threads: int) -> list[str]:
    """The parameters that no longer hold what was written, sorted; for the others, that they can be restored.

    Nothing is written.

    Raises:
        IntegrityError: one holds what was written, and cannot be restored.
    """
    names: set[str] = set()
    together, apart = _by_device(keepers.values())

    def look_at_all(some: list[Keeper]) -> Job:
        def job(_: Workspace) -> None:
            names.update(_unlike(some))

        return job

    def look(keeper: Keeper) -> Job:
        def each(_: Workspace) -> list[Job]:
            way = keeper.open() if keeper.verified else None

            def unit(rows: slice) -> Job:
                def job(space: Workspace) -> None:
                    if not keeper.matches(rows, keeper.tensor[rows]):
                        names.add(keeper.name)
                    elif way is not None:
                        way.demand(rows, space)

                return job

            return [unit(rows) for rows in keeper.units]

        return each

    run_jobs([*map(look_at_all, together), *map(look, apart)], threads)
    return sorted(names)


def _by_device(keepers: Iterable[Keeper]) -> tuple[list[list[Keeper]], list[Keeper]]:
    """Those of each device that has a kernel, whose copies need no trying: all at once; and the others."""
    together: dict[torch.device, list[Keeper]] = {}
    apart: list[Keeper] = []
    for keeper in keepers:
        device = keeper.tensor.device
        at_once = not keeper.verified and summer(device).name != "torch"
        (together.setdefault(device, []) if at_once else apart).append(keeper)
    return [*together.values()], apart


def _unlike(keepers: Sequence[Keeper]) -> list[str]:
    """The parameters, all of one device, that no longer hold what was written: asked of the device once."""
    written = [(keeper, rows) for keeper in keepers for rows in keeper.units]
    if not written:
        return []
    found = checksums([keeper.tensor[rows] for keeper, rows in written])
    differs = found != torch.stack([keeper.marked(rows) for keeper, rows in written])
    return [keeper.name for (keeper, _), other in zip(written, differs.tolist(), strict=True) if other]


def restore(keepers: Mapping[str, Keeper], threads: int) -> None:
    """Put back what every written row held before, each once; an interrupt waits until that is done.

    Raises:
        IntegrityError: a row cannot be restored; it is left, and those that were not reached.  Going on is possible.
    """

    def put(keeper: Keeper) -> Job:
        def each(_: Workspace) -> list[Job]:
            way = keeper.open()

            def unit(rows: slice) -> Job:
                def job(space: Workspace) -> None:
                    keeper.tensor[rows].copy_(way.recover(rows, space))
                    keeper.forget(rows)

                return job

            return [unit(rows) for rows in keeper.units]

        return each

    def put_all(some: list[Keeper]) -> Job:
        def job(space: Workspace) -> None:
            written = [(keeper, rows) for keeper in some for rows in keeper.units]
            live = [keeper.tensor[rows] for keeper, rows in written]
            torch._foreach_copy_(live, [keeper.open().recover(rows, space) for keeper, rows in written])
            for keeper, rows in written:
                keeper.forget(rows)

        return job

    together, apart = _by_device(keeper for keeper in keepers.values() if keeper.units)
    run_jobs([*map(put_all, together), *map(put, apart)], threads, to_the_end=True)
