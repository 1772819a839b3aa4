"""Checking, for scripts: whether an adapter goes with a base or a serving runtime, on six axes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lorahub.bases.layers import shown
from lorahub.fetching import Progress, Source, quiet
from lorahub.findings import Finding
from lorahub.merging.job import Job
from lorahub.merging.preparing import prepare
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub.report import CheckReport
from lorahub.sources import Given, header_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check"]


def check(
    source: Given,
    base: Source | nn.Module | Base | None = None,
    *,
    runtime: str | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> CheckReport:
    """Say whether an adapter goes with a base, on six axes, with the evidence; refuses nothing, no torch.

    Args:
        source: the adapter.
        base: what to hold it against; None takes the base it records, unless ``runtime`` is given.
        runtime: a serving runtime to judge for ("vllm").
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    header = header_of(source, registry, hub=hub, progress=progress, compat=compat, whole=False)
    found: tuple[Finding, ...] = header.findings
    against = []
    judged = registry.runtime(runtime) if runtime is not None else None
    if base is not None or judged is None:
        job = prepare(base, {header.label: header}, allow=allow, compat=compat, hub=hub, whole=False, progress=progress)
        found, against, header = job.findings, [_against(job)], job.headers[header.label]
    if judged is not None:
        found = (*found, *judged.judge(header))
        against.append(judged.title)
    return CheckReport.of(adapter=header.label, against=" and ".join(against), findings=found, allowed=tuple(allow))


def _against(job: Job) -> str:
    """The base, and what is made of it where the adapter is for a deeper model."""
    ref, deeper = str(job.base.index.ref), job.plan.repeated
    if deeper is None:
        return ref
    return f"{ref}, its {deeper.depth} layers made {len(deeper.sources)} ({shown(deeper.ranges)})"
