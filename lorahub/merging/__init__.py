"""Merging, for scripts: plan and judge first, then do it in a live model, in place or to disk."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, overload

from lorahub import patching
from lorahub.bases.torch_module import held_parameters
from lorahub.engine.changing.merge import Arranged, Merged, merge_into
from lorahub.engine.changing.sharding import local_parts
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.planning.plan import Plan
from lorahub.engine.report import MergeReport
from lorahub.engine.undoing.keeper import Policy
from lorahub.engine.undoing.reload import BaseRows
from lorahub.engine.writing.ranks import ALONE, Ranks
from lorahub.engine.writing.where import folded_on
from lorahub.errors import UsageError
from lorahub.fetching import Progress, Source, quiet
from lorahub.merging.apart import Weights
from lorahub.merging.job import Job, demand_own_layers
from lorahub.merging.preparing import Several, open_recorded, prepare
from lorahub.names import Ref
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry

if TYPE_CHECKING:
    from torch import nn

__all__ = ["merge", "plan"]


def plan(
    base: Source | nn.Module | Base,
    adapters: Several,
    *,
    weights: Weights | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
) -> Plan:
    """What merging would do, from headers alone: print ``plan(...).explain()``."""
    return prepare(
        base, adapters, weights=weights, allow=allow, compat=compat, mode=mode, dtype=dtype, hub=hub, whole=False
    ).plan


@overload
def merge(
    base: Source | nn.Module,
    adapters: Several,
    *,
    weights: Weights | None = None,
    out: None = None,
    undo: Policy = "auto",
    origin: Source | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> Merged: ...


@overload
def merge(
    base: Source,
    adapters: Several,
    *,
    weights: Weights | None = None,
    out: str | os.PathLike[str],
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = quiet,
) -> MergeReport: ...


@overload
def merge(
    base: Source,
    adapters: Several,
    *,
    weights: Weights | None = None,
    in_place: Literal[True],
    keep_undo: bool = False,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress = quiet,
) -> MergeReport: ...


def merge(
    base: Source | nn.Module,
    adapters: Several,
    *,
    weights: Weights | None = None,
    out: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    keep_undo: bool = False,
    undo: Policy = "auto",
    origin: Source | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = quiet,
) -> Merged | MergeReport:
    """Merge adapters into a base: a live model in place, a folder to a new folder ``out``, or into the folder itself.

    Every parameter becomes ``W0 + sum of weight * delta(W0)``, rounded once.  All parameters change or none does.

    Args:
        base: a live model (merged in place) or a folder, file or ``ns/name[@COMMIT]`` (then ``out`` is needed).
        adapters: name -> adapter, a list of references, or a sum of open adapters: ``0.7 * a - b``.
        weights: one number for all, or one per adapter, in order or by name; 1 by default, or the weight in the
            reference.  Besides a number each may be one by component (``{"ink": {"unet": 0.8, "text_encoder": 0.3}}``;
            1 where nothing is said), by block or by layer: any rule of a recipe.
        out: the new checkpoint's folder, or its one file (``.safetensors``); must not exist.
        in_place: write to the base's own files, only what changes; a run that was killed is completed by the next
            merge in place there, or has changed nothing.
        keep_undo: with ``in_place``: keep the old bytes beside them, for ``lorahub merge --undo FOLDER``.
        undo: of a live model: what ``Merged.undo`` and ``Merged.swap`` need is kept as a "copy" of each changed weight,
            in a "journal" of what taking the change off gets wrong (a few percent of that; where the change looks at
            the weight or is large, a copy), as copies on the "host" for weights on a GPU, or "reload" reads the files
            at ``origin`` again.  "auto" takes the fastest that leaves half of the free memory; "none" keeps nothing.
        origin: where the live model's weights lie, for undo="reload"; None takes the base that the first adapter
            records.  They are compared bit for bit before anything changes.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        mode: "fast": at least 99.99 % of the elements equal the float64 result rounded once.  "exact": all of them do,
            on every machine alike.  "peft", "peft-safe": the bits of PEFT's ``merge``, default and ``safe_merge``, for
            LoRA.  "stochastic(SEED)": rounded up or down at random, so that small changes survive on average.
        dtype: on disk: every floating-point parameter of the result is stored in "bfloat16", "float16" or "float32",
            also where no adapter changes it.  8-bit tensors and buffers stay as they are.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        device: on disk: where parameters are folded on their way from file to file, as PyTorch spells it ("cuda",
            "cuda:1"); None is the CPU.  In mode "exact" the result does not depend on it; in "fast" two elements in ten
            thousand may differ by one unit in the last place.
        ranks: with ``out``: this process among several that were started alike, as ``Ranks.from_environment()`` says.
        progress: called with (done, in all): parameters in place, bytes on disk.

    Returns:
        In place: ``Merged`` with ``report`` and a bit-exact ``undo()``.  To disk: the report.

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``; nothing was changed.
    """
    if in_place and (out is not None or not isinstance(base, str | os.PathLike | Ref)):
        raise UsageError("in_place is for a folder, and has no other place for the result", "leave one of them out")
    if dtype is not None and out is None:
        raise UsageError(
            f"a merge in place keeps the dtype of what it merges into, and cannot store {dtype}",
            "merge to disk (out=FOLDER), or give the model that dtype first: model.to(...)",
        )
    if device is not None and out is None and not in_place:
        raise UsageError(
            f"a live model is merged into where its weights lie, not on {device}", "move it there first: model.to(...)"
        )
    where = folded_on(device)
    settled = patching.settle_base(base) if in_place and isinstance(base, str | os.PathLike | Ref) else None
    job = prepare(
        base,
        adapters,
        weights=weights,
        allow=allow,
        compat=compat,
        mode=mode,
        dtype=dtype,
        hub=hub,
        progress=progress if out else quiet,
    )
    if in_place:
        return job.write_in_place(keep_undo=keep_undo, settled=settled, threads=threads, where=where, progress=progress)
    job.refuse()
    if out is not None:
        return job.write(out, threads=threads, where=where, ranks=ranks, progress=progress)
    if job.base.model is None:
        raise UsageError(
            "merging a checkpoint on disk needs a place for the result", "pass out=FOLDER, or a live model"
        )
    demand_own_layers(job, "a live model has the layers that it has")
    keeping = Keeping(policy=undo, base=_base_rows(job, origin, hub, progress) if undo == "reload" else None)

    def again(others: Any, factors: Any, allowed: Collection[str]) -> Arranged:
        codes = {*allow, *allowed}
        given = adapters if others is None else others
        other = prepare(job.base, given, weights=factors, allow=codes, compat=compat, mode=mode, hub=hub)
        other.refuse()
        return _arranged(other)

    arranged = _arranged(job)
    return merge_into(
        arranged.parameters,
        arranged.plan,
        arranged.adapters,
        held=arranged.held,
        threads=threads,
        progress=progress,
        keeping=keeping,
        again=again,
    )


def _arranged(job: Job) -> Arranged:
    """A judged merge into a live model, with its tensors."""
    model, index = job.base.model, job.base.index
    assert model is not None
    brought = job.adapters(load_registry())
    local, parameters = local_parts(job.plan, job.base.framework.parameters(model, index), brought)
    return Arranged(parameters=parameters, plan=local, adapters=brought, held=held_parameters(model, index))


def _base_rows(job: Job, origin: Source | None, hub: str | None, progress: Progress) -> BaseRows:
    """The files that a live model's weights came from."""
    recorded = next(iter(job.headers.values()))
    base = open_recorded(recorded, progress, hub=hub) if origin is None else open_base(origin, hub=hub)
    base = base.pulled(progress)
    if base.files is None:
        raise UsageError("origin is a live model", "name the folder that its weights were loaded from")
    return BaseRows(base.files, base.index)
