"""The part of a plan that one process of many executes: sharded parameters become the rows and columns it holds.

FSDP2 and tensor parallelism keep a parameter as a ``DTensor``, of which each process holds a part.  A change is cut to
that part before anything is computed: a low-rank one needs only its own rows of ``up`` or columns of ``down``, so
every process merges by itself and nothing is sent between them.  Placements follow
https://docs.pytorch.org/docs/stable/distributed.tensor.html; knows no adapters' formats and no arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from lorahub.bases.layout import Piece, Region
from lorahub.bases.placements import Runs, held_positions, is_sharded
from lorahub.deltas.delta import ALL, Index
from lorahub.engine.folding.bind import HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Form, Step, Term
from lorahub.engine.rounding.stochastic import Stochastic
from lorahub.engine.rounding.table import read_mode
from lorahub.errors import Incompatible, NotLocal
from lorahub.files.dtypes import stored_shape
from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["local_parts"]

_GATHER = "merge to disk (out=FOLDER, or lorahub merge ... -o FOLDER) and load the result in shards"


def local_parts(
    plan: Plan, parameters: Mapping[str, torch.Tensor], adapters: Mapping[str, HasDeltas]
) -> tuple[Plan, Mapping[str, torch.Tensor]]:
    """``plan`` and ``parameters`` for what this process holds of them; both as they are where nothing is sharded.

    Every process that holds part of the model has to do the same merge.  One that fails leaves its own part as it
    was, and raises; the others are not told.

    Args:
        plan: for the whole model.
        parameters: canonical name -> the live tensor, sharded or not.
        adapters: name -> adapter, as in the plan; looked at only to make sure that each change can be cut.

    Raises:
        Incompatible: a change cannot be cut to the part that is here, or a parameter is sharded along an axis
            that no change is cut on, or holds partial sums.
    """
    sharded: dict[str, DTensor] = {name: tensor for name, tensor in parameters.items() if is_sharded(tensor)}
    if not sharded:
        return plan, parameters
    if isinstance(read_mode(plan.mode), Stochastic):  # an element's bits follow from its place in the whole
        raise Incompatible(f"mode {plan.mode} cannot tell where a shard's elements lie in their parameter", _GATHER)
    steps = []
    for step in plan.steps:
        tensor = sharded.get(step.out)
        local = step if tensor is None else _local_step(step, tensor)
        if local is not None:
            _demand_cuttable(local, sharded, adapters)
            steps.append(local)
    here = {name: _here(tensor) for name, tensor in sharded.items()}
    return replace(plan, steps=tuple(steps)), {**parameters, **here}


def _here(tensor: DTensor) -> torch.Tensor:
    """What this process holds: the memory itself."""
    with torch.no_grad():
        return tensor.to_local()


def _local_step(step: Step, tensor: DTensor) -> Step | None:
    """The step over this process's part, or None where nothing of it changes here."""
    axes = held_positions(step.out, tensor)
    shape = tuple(_here(tensor).shape)
    if shape != tuple(sum(map(len, runs)) for runs in axes):
        raise Incompatible(
            f"{step.out} is {tensor.placements} over {tensor.device_mesh.shape}, which gives this process "
            f"{list(shape)}: lorahub cannot tell which rows and columns these are",
            _GATHER,
        )
    terms = tuple(local for term in step.terms for local in _local_terms(term, step.out, axes, tensor.shape))
    if not terms or not all(shape):
        return None
    form = Form(stored_shape(step.after.dtype, shape), step.after.dtype)
    return replace(step, before=form, after=form, terms=terms)


def _local_terms(term: Term, name: str, axes: Sequence[Runs], shape: Sequence[int]) -> Iterator[Term]:
    """The term cut to what is held: one for each rectangle that lies together both here and in the change."""
    region, of_delta = term.piece.of_parameter, term.piece.of_delta
    left, sizes, expert = list(axes), list(shape), region.expert
    if expert is not None:
        position = _local_position(left.pop(0), expert)
        sizes.pop(0)
        if position is None:
            return
        expert = position
    if region.transposed:
        left[0], left[1] = left[1], left[0]
        sizes[0], sizes[1] = sizes[1], sizes[0]
    if any(runs != (range(size),) for runs, size in zip(left[2:], sizes[2:], strict=True)):
        raise Incompatible(f"{name} is sharded along an axis of its kernel, on which no change is cut", _GATHER)
    rows = list(_overlaps(region.rows, of_delta.rows, left[0], sizes[0]))
    cols = list(_overlaps(region.cols, of_delta.cols, left[1], sizes[1])) if len(left) > 1 else [(ALL, ALL)]
    for (here, of), (across, of_across) in product(rows, cols):
        yield replace(
            term,
            piece=Piece(
                parameter=term.piece.parameter,
                of_delta=replace(of_delta, rows=of, cols=of_across),
                of_parameter=Region(expert=expert, transposed=region.transposed, rows=here, cols=across),
            ),
        )


def _local_position(runs: Runs, position: int) -> int | None:
    at = 0
    for run in runs:
        if position in run:
            return at + position - run.start
        at += len(run)
    return None


def _overlaps(index: Index, of_delta: Index, runs: Runs, size: int) -> Iterator[tuple[Index, Index]]:
    """(part of the local axis, part of the change's axis) wherever they meet.

    Args:
        index: which positions of the parameter's axis the change goes to.
        of_delta: which positions of the change's axis go there.
        runs: the positions that are held.
        size: of the parameter's axis.
    """
    if not isinstance(index, slice) or not isinstance(of_delta, slice):
        yield from _scattered(index, of_delta, runs, size)
        return
    to = range(*index.indices(size))
    source = range(of_delta.start or 0, sys.maxsize)  # as long as ``to``, by the layout
    at, held = 0, sum(map(len, runs))
    for run in runs:
        start, stop = max(run.start, to.start), min(run.stop, to.stop)
        if start < stop:
            here = slice(at + start - run.start, at + stop - run.start)
            of = slice(source[start - to.start], source[stop - to.start])
            yield ALL if here == slice(0, held) else here, ALL if of_delta == ALL and len(to) == stop - start else of
        at += len(run)


def _scattered(index: Index, of_delta: Index, runs: Runs, size: int) -> Iterator[tuple[Index, Index]]:
    to = range(*index.indices(size)) if isinstance(index, slice) else index
    source = range(of_delta.start or 0, sys.maxsize) if isinstance(of_delta, slice) else of_delta
    local = {position: here for here, position in enumerate(position for run in runs for position in run)}
    met = [(local[position], source[number]) for number, position in enumerate(to) if position in local]
    if met:
        yield tuple(here for here, _ in met), tuple(of for _, of in met)


def _demand_cuttable(step: Step, sharded: Mapping[str, torch.Tensor], adapters: Mapping[str, HasDeltas]) -> None:
    for term in step.terms:
        if apart := [piece.parameter for piece in term.siblings.values() if piece.parameter in sharded]:
            raise Incompatible(
                f"the change of '{term.adapter}' to {step.out} looks at {apart[0]}, which is sharded", _GATHER
            )
        of = term.piece.of_delta
        if of.rows == ALL and of.cols == ALL:
            continue
        delta = adapters[term.adapter].deltas[term.target]
        try:
            (delta if of.expert is None else delta.expert(of.expert)).region(of.rows, of.cols)
        except NotLocal as error:
            raise Incompatible(
                f"this process holds a part of {step.out}, and the change of '{term.adapter}' there cannot be cut to "
                f"it: {error.message}",
                _GATHER,
            ) from None
