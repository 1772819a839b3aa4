"""Adapters out of checkpoints and out of adapters, for scripts: extract, resize, and compare two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub import checks, recording
from lorahub.adapter import Adapter, save
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composition.algebra.budgeting import budget_of
from lorahub.composition.reducing import extract as extraction
from lorahub.composition.reducing import resize as resizing
from lorahub.composition.reducing.pairing import Pair, Way, pair
from lorahub.composition.reducing.report import ReduceReport, Row, unmet
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.kind import JSON
from lorahub.descent import derived, new_folder, parent, written
from lorahub.engine.crew import crew_size
from lorahub.errors import CannotCarry, UsageError
from lorahub.fetching import Progress, Source, quiet
from lorahub.lazy import torch
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.sources import Given, header_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DTYPES", "ReduceReport", "extract", "resize"]

DTYPES = ("float32", "bfloat16", "float16")
"""What factors may be stored as."""


def extract(
    tuned: Source | nn.Module | Base,
    base: Source | nn.Module | Base,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    adaptive: bool = False,
    parameters: int | None = None,
    dtype: str = "float32",
    whole: Collection[str] = (),
    leave_out: Collection[str] = (),
    embedding: Collection[str] = (),
    base_repo: str | None = None,
    base_revision: str | None = None,
    allow: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = quiet,
) -> ReduceReport:
    """Write what makes a tuned checkpoint of its base as a PEFT folder, parameter by parameter; no model is loaded.

    Linear, embedding and convolution weights become LoRA factors; biases, norms and what no factors fit are kept whole,
    at the tuned value; equal parameters are skipped.  Memory is that of the result and, for each thread, a few times
    the largest parameter.

    Args:
        tuned: a folder, a file, ``ns/name[@COMMIT]`` or a live model.
        base: what it was tuned from, likewise.
        out: a new folder.
        rank: of every factored parameter, at most.
        energy: keep at least this share of the squared norm of each difference.
        error: lose at most this share of the norm of each difference.
        adaptive: meet energy or error over all differences together, with the fewest singular values; ``rank`` bounds
            each parameter's, and without it the checkpoints are read twice.
        parameters: spend so many numbers on all factors together, where they keep most.
        dtype: of the factors: "float32", "bfloat16" or "float16".
        whole: patterns (``*``) of parameters to keep whole.
        leave_out: patterns of parameters to leave as they are in the base.
        embedding: patterns of parameters that are embeddings, where no plugin knows the architecture.
        base_repo: what a local base is called on the Hub.
        base_revision: its commit there, 40 hex digits.
        allow: finding codes to accept.
        threads: how many; the result does not depend on it.
        progress: called with (bytes fetched, in all) where one is on a hub, then with (numbers compared, in all).

    Raises:
        BaseMismatch, Degraded: the two do not fit each other; the findings name every parameter.
        CannotCarry: parameters differ for which an adapter has no word.
        NotFinite: a difference holds NaN or infinity.
        UsageError: nothing differs, or the budget makes no sense.
        WriteFailed: ``out`` is there already.
    """
    start = time.perf_counter()
    folder = new_folder(out)
    if dtype not in DTYPES:
        raise UsageError(f"factors cannot be stored as {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    budget = budget_of(rank, energy, error, adaptive=adaptive, parameters=parameters)
    count = crew_size(threads)
    before, after = open_base(base, digest=True), open_base(tuned, digest=True)
    pairs, findings = pair(before.index, after.index, whole=whole, leave_out=leave_out, embedding=embedding)
    checks.refuse(findings, allowed=allow, subject=f"{after.index.ref} minus {before.index.ref}")
    before, after = before.pulled(progress), after.pulled(progress)
    with ExitStack() as held:
        found = extraction.extract(
            pairs,
            held.enter_context(_reader(before, lambda each: each.name)),
            held.enter_context(_reader(after, lambda each: each.tuned)),
            budget,
            dtype=getattr(torch, dtype),
            threads=count,
            progress=progress,
        )
    if not found.deltas:
        raise UsageError(
            f"{after.index.ref} and {before.index.ref} hold the same weights, so there is nothing to extract",
            "is it the checkpoint that was meant?",
        )
    _demand_factors(found.rows)
    settings = _settings(
        rank=rank, energy=energy, error=error, adaptive=adaptive, parameters=parameters, dtype=dtype,
        whole=[*whole], leave_out=[*leave_out], embedding=[*embedding],
    )  # fmt: skip
    touched = {row.target for row in found.rows if row.way in ("factors", "whole")} & before.index.parameters.keys()
    described = recording.describe_base(before.index, before.framework, touched, repo=base_repo, revision=base_revision)
    tuned_from = {"ref": _called(after.index), "role": "tuned checkpoint", "revision": after.index.ref.commit}
    parents = [{name: value for name, value in tuned_from.items() if value}]
    about = {"tuned_weights": after.index.weights} if after.index.weights else {}
    made = derived(None, "extract", {**settings, **about}, parents).changed(base=described)
    adapter = Adapter(deltas=found.deltas, record=made, hints=_hints(found, pairs, before, after))
    save(adapter, folder)
    return ReduceReport(
        out=os.fspath(out),
        rows=found.rows,
        findings=(*findings, *unmet(found.rows, budget)),
        seconds=time.perf_counter() - start,
        bytes_written=written(folder),
        settings=settings,
    )


def _demand_factors(rows: Collection[Row]) -> None:
    """Refuse a budget under which factors would be as large as the matrices, so that all of these are kept whole."""
    kept = [row.target for row in rows if row.way == "whole" and len(row.shape) > 1]
    if not kept or any(row.way == "factors" for row in rows):
        return
    more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
    raise CannotCarry(
        f"no factors reach what is asked for: they would be as large as the matrices, which would all be kept whole, "
        f"and PEFT has no adapter without factors: {', '.join(kept[:3])}{more}",
        "say how large they may be: --rank R, or allow a larger --error or less --energy",
    )


def resize(
    adapter: Given,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    adaptive: bool = False,
    parameters: int | None = None,
    dtype: str | None = None,
    base: Source | nn.Module | Base | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> ReduceReport:
    """Cut an adapter's LoRA factors to other ranks and write it in its own format; other kinds are kept and named.

    Args:
        adapter: a folder, a file, a reference, or an open adapter.
        out: a new folder.
        rank: of every target, at most.
        energy: keep at least this share of the squared norm of each change.
        error: lose at most this share of the norm of each change.
        sv_ratio: keep singular values of at least one sv_ratio-th of the largest (kohya's name).
        sv_fro: keep at least this share of the norm: the energy ``sv_fro ** 2`` (kohya's name).
        sv_cumulative: keep at least this share of the sum of the singular values (kohya's name).
        adaptive: meet energy or error over all targets together, with the fewest singular values.
        parameters: spend so many numbers on all factors together, where they keep most.
        dtype: of new factors: "float32", "bfloat16" or "float16"; that of the old ones by default.
        base: the base, for files that leave to it what their keys mean.
        allow: finding codes to accept.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (bytes fetched, in all), then with (targets done, in all).

    Raises:
        UnsupportedKind: there is no LoRA in it.
        CannotCarry: it holds what is no weight change.
        UsageError: the budget makes no sense.
        WriteFailed: ``out`` is there already.
    """
    start = time.perf_counter()
    folder = new_folder(out)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"factors cannot be stored as {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    if sv_fro is not None:
        if not 0 < sv_fro <= 1 or energy is not None:
            raise UsageError(f"sv_fro {sv_fro} is a share of the norm, and the energy its square", "give one of them")
        energy = sv_fro**2
    budget = budget_of(
        rank, energy, error, adaptive=adaptive, parameters=parameters, ratio=sv_ratio, cumulative=sv_cumulative
    )
    registry = load_registry()
    index = open_base(base, hub=hub).index if base is not None else None
    header = header_of(adapter, registry, hub=hub, progress=progress, index=index)
    checks.refuse(header.findings, allowed=allow, subject=header.label)
    loaded = adapter if isinstance(adapter, Adapter) and index is None else load_tensors(header, registry)
    found = resizing.resize(
        loaded.deltas,
        budget,
        dtype=getattr(torch, dtype) if dtype else None,
        threads=crew_size(threads),
        progress=progress,
    )
    settings = _settings(
        rank=rank, energy=energy, error=error, sv_ratio=sv_ratio, sv_cumulative=sv_cumulative, adaptive=adaptive,
        parameters=parameters, dtype=dtype,
    )  # fmt: skip
    record = derived(header.record, "resize", settings, [parent(header, "resized")])
    made = replace(loaded, deltas=found.deltas, record=record, header=None)
    save(made, folder, registry=registry, format=header.format)
    return ReduceReport(
        out=os.fspath(out),
        rows=found.rows,
        findings=(*header.findings, *found.findings, *unmet(found.rows, budget)),
        seconds=time.perf_counter() - start,
        bytes_written=written(folder),
        settings=settings,
    )


@contextmanager
def _reader(base: Base, name_of: Callable[[Pair], str]) -> Iterator[extraction.Read]:
    """Reads a pair's parameter from files or a live model; what it gives may be written to."""
    with base.tensors() as read:
        plain = base.model is None
        yield (lambda each: read(name_of(each))) if plain else (lambda each: read(name_of(each)).clone())


def _settings(**given: JSON) -> dict[str, JSON]:
    return {name: value for name, value in given.items() if value not in (None, False, [])}


def _hints(found: extraction.Extracted, pairs: Collection[Pair], base: Base, tuned: Base) -> dict[str, JSON]:
    """What the format is told besides: roles, transposed storage, the class with a new head, the order in modules."""
    hints: dict[str, JSON] = {"roles": dict(found.roles)}
    if any(each.transposed and not each.stack and each.way is Way.FACTORS for each in pairs):
        hints["fan_in_fan_out"] = True
    classes = tuned.index.config.get("architectures")
    if any(each.base is None and each.way is Way.WHOLE for each in pairs) and isinstance(classes, list) and classes:
        hints["auto_mapping"] = {"base_model_class": classes[0], "parent_library": tuned.framework.name}
    if base.model is not None:
        order: dict[str, list[JSON]] = {}
        for name in base.framework.parameters(base.model, base.index):
            module, _, parameter = name.rpartition(".")
            if isinstance(found.deltas.get(Target("", module, parameter)), ExpertLoRA):
                order.setdefault(module, []).append(parameter)
        hints["parameter_order"] = {module: names for module, names in order.items() if len(names) > 1}
    return hints


def _called(index: BaseIndex) -> str:
    """What a checkpoint is called: its name on a hub, or that of its folder; never a path."""
    return index.ref.repo or (Path(index.ref.folder).name if index.ref.folder else "a live model")
