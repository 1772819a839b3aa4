"""An adapter's factors cut to other ranks: QR of the factors, never a dense SVD.

LoRA is resized, on linear layers, embeddings, convolutions and stacks of experts.  Every other kind is kept as it is
and named; converting it to LoRA first is a choice of its own.  A target whose rank would not fall keeps its factors bit
for bit, and all keep their scale.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.algebra.budgeting import Shared, Spectrum
from lorahub.composition.algebra.stacked import Stacked, combined
from lorahub.composition.algebra.truncate import Budget, norm, singular_values, truncate
from lorahub.composition.reducing.report import Rewritten, Row
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.lora import LoRA
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.errors import NotFinite, UnsupportedKind
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch

__all__ = ["Resized", "resize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """What came of it: every target's change, a row for each, and what there is to say."""

    deltas: dict[Target, Delta]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def resize(
    deltas: Mapping[Target, Delta],
    budget: Budget | Shared,
    *,
    dtype: torch.dtype | None,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Resized:
    """Cut every LoRA to a budget.

    Args:
        deltas: target -> change.
        budget: of every target by itself, or of all together.
        dtype: of new factors; None: that of the old ones.
        threads: how many; the result does not depend on it.
        progress: called with (targets done, in all).

    Raises:
        UnsupportedKind: there is no LoRA in it.
        NotFinite: factors hold NaN or infinity, or do not fit into ``dtype``.
    """
    order = sorted(deltas, key=lambda target: natural(target.name))
    plain = {target: delta for target in order if isinstance(delta := deltas[target], LoRA | ExpertLoRA)}
    if not plain:
        kinds = ", ".join(sorted({delta.kind for delta in deltas.values()})) or "nothing"
        raise UnsupportedKind(
            f"only LoRA factors can be cut to another rank, and this adapter is {kinds}",
            "make LoRA of it first, where that can be done: lorahub convert --help",
        )
    budgets = _budgets(list(plain.items()), budget, threads)
    made: dict[Target, tuple[Delta | None, Row]] = {}
    lock = threading.Lock()

    def job(target: Target, delta: LoRA | ExpertLoRA) -> Job:
        def run(_: Workspace) -> None:
            try:
                result = _cut(target, delta, budgets[target], dtype)
            except NotFinite as error:
                raise NotFinite(f"{target.name}: {error.message}", error.hint) from None
            with lock:
                made[target] = result

        return run

    def tick() -> None:
        if progress:
            progress(len(made), len(plain))

    run_jobs([job(target, delta) for target, delta in plain.items()], threads, tick=tick)
    result = {target: made[target][0] if target in made else deltas[target] for target in order}
    rows = [made[target][1] if target in made else _kept(target, deltas[target]) for target in order]
    others = [target.name for target in order if target not in plain]
    return Resized(
        deltas={target: delta for target, delta in result.items() if delta is not None},
        rows=tuple(rows),
        findings=_about(others, deltas),
    )


def _budgets(
    plain: Sequence[tuple[Target, LoRA | ExpertLoRA]], budget: Budget | Shared, threads: int
) -> dict[Target, Budget | int]:
    """What each target may keep: its own budget, or its rank out of a common one; 0 is nothing."""
    if isinstance(budget, Budget):
        return dict.fromkeys((target for target, _ in plain), budget)
    found: dict[int, torch.Tensor] = {}

    def job(number: int, delta: LoRA | ExpertLoRA) -> Job:
        def run(_: Workspace) -> None:
            found[number] = combined([singular_values(each.up, each.down, each.scale) for each in _factors(delta)])

        return run

    run_jobs([job(number, delta) for number, (_, delta) in enumerate(plain)], threads)
    spectra = []
    for number, (_, delta) in enumerate(plain):
        factors = _factors(delta)
        values, most = found[number], budget.most
        missing = 0.0 if most is None else float((values[most:] ** 2).sum())
        cost = len(factors) * (factors[0].up.shape[0] + factors[0].down.shape[1])
        spectra.append(Spectrum(values=values[:most], cost=cost, missing=missing))
    return {target: rank for (target, _), rank in zip(plain, budget.ranks(spectra), strict=True)}


def _factors(delta: LoRA | ExpertLoRA) -> list[LowRank]:
    """The factors as matrices: one pair, or one for each expert."""
    if isinstance(delta, LoRA):
        return [delta.low_rank()]
    return [LowRank(up, down, delta.scale) for up, down in zip(delta.up, delta.down, strict=True)]


def _cut(
    target: Target, delta: LoRA | ExpertLoRA, budget: Budget | int, dtype: torch.dtype | None
) -> tuple[Delta | None, Row]:
    """One target within its budget; None where it gets nothing.

    The scale stays, as in kohya's tool: what else is scaled by it, and formats with one scale for all, go on to hold.
    """
    factors, shape = _factors(delta), delta.shape() or ()
    before = factors[0].down.shape[0]

    def row(way: Rewritten, rank: int | None, error: float) -> Row:
        length = math.hypot(*(norm(each.up, each.down, each.scale) for each in factors))
        return Row(target=target.name, way=way, shape=shape, before=before, rank=rank, norm=length, error=error)

    if budget == 0:
        return None, row("dropped", None, 1.0)
    wanted = Budget(rank=budget) if isinstance(budget, int) else budget
    found = Stacked(parts=tuple(truncate(each.up, each.down, 1.0, wanted) for each in factors))
    if found.rank >= before:
        return delta, row("kept", before, 0.0)
    up, down, error = found.stored(dtype or torch.promote_types(delta.up.dtype, delta.down.dtype))
    if isinstance(delta, ExpertLoRA):
        return replace(delta, up=up, down=down), row("factors", found.rank, error)
    stored = LoRA(
        up[0].reshape(-1, found.rank, *delta.up.shape[2:]),
        down[0].reshape(found.rank, *delta.down.shape[1:]),
        delta.scale,
    )
    return stored, row("factors", found.rank, error)


def _kept(target: Target, delta: Delta) -> Row:
    return Row(
        target=target.name, way="kept", shape=delta.shape() or (), reason=f"{delta.kind} has no factors that can be cut"
    )


def _about(others: Sequence[str], deltas: Mapping[Target, Delta]) -> tuple[Finding, ...]:
    if not others:
        return ()
    kinds = sorted({delta.kind for delta in deltas.values() if not isinstance(delta, LoRA | ExpertLoRA)})
    return (
        Finding(
            code="not-resized",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"{len(others)} targets of kind {', '.join(kinds)} are kept as they are",
            where=tuple(others),
        ),
    )
