"""Converting an adapter to another layout, for scripts: every key accounted for, the change proven unchanged."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorahub.adapter import AdapterHeader
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.conversion.approximate import approximator
from lorahub.conversion.carry import Carrier, fit
from lorahub.conversion.change import Change
from lorahub.conversion.home import at_home, called
from lorahub.conversion.naming import as_part, choose_component, respell_hints
from lorahub.conversion.report import ConversionReport
from lorahub.converting.opened import Opened
from lorahub.converting.request import DTYPES, Request, budget_of, dtype_of, plain_of
from lorahub.converting.unpacking import Unpacked, unpacked
from lorahub.converting.writing import stored_as, write
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat, UsageError, WriteFailed
from lorahub.fetching import Progress, Source, quiet
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.sources import Given, header_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DTYPES", "convert"]


def convert(
    source: Given,
    to: str,
    out: str | os.PathLike[str],
    *,
    base: Source | nn.Module | Base | None = None,
    component: str = "",
    kind: Literal["", "lora"] = "",
    compat: str | None = None,
    approximate: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    verify: bool | None = None,
    dtype: str = "",
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = quiet,
) -> ConversionReport:
    """Write an adapter in another layout; what there is no exact word for is refused by name.

    Args:
        source: a folder, a file, a reference, or an adapter that is open.
        to: the format ("peft", "diffusers", "kohya", "mlx", ...).
        out: a new folder, or a file where the format is a single file (``x.safetensors``).
        base: the base, where names, sizes or weights are needed.
        component: of an adapter for several models, the one to keep; else what to call the one it is for.
        kind: "lora" rewrites everything that is LoRA in another dress, also where the format has a word for it.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one; see ``lorahub.load``.
        approximate: allow changes of full rank to become LoRA of a lower one, within the budget of the next three.
        rank: at most this.
        energy: at least this share of the squared norm.
        error: at most this relative error.
        verify: compare every target; None compares all that were only renamed, and the others where that is cheap.
        dtype: store floating tensors as this; as they are by default, and float32 where something was computed.
        allow: finding codes to accept.
        hub: path of a folder hub.
        progress: called with (targets done, in all).

    Raises:
        CannotCarry: the format has no word for part of it, and ``findings`` list every target; nothing was written.
        Degraded, IntegrityError, UnsupportedKind: the source cannot be read without doubt.
        UsageError: there is no such format, or options contradict each other.
        WriteFailed: ``out`` is there already, or there is no space or no permission.
    """
    request = Request(
        to=to,
        out=Path(out),
        component=component,
        plain=plain_of(kind),
        budget=budget_of(approximate, rank, energy, error),
        verify=verify,
        dtype=dtype_of(dtype),
        allow=tuple(allow),
    )
    registry = load_registry()
    _demand_known(to, registry)
    if request.out.exists() and not (request.out.is_dir() and not any(request.out.iterdir())):
        raise WriteFailed(f"{request.out} exists", "name another place, or remove it yourself")
    with ExitStack() as held:
        opened = open_base(base, hub=hub) if base is not None else None
        given = held.enter_context(unpacked(source, hub))
        with given.named():
            header, index = _read(given.source, registry, opened, component, hub, compat)
            if opened is not None and index is not None:
                opened = replace(opened, index=index)
            header = replace(header, label=given.label) if given.label else header
            return _convert(request, registry, Opened(request, registry, header, opened, held), given, progress)


def _demand_known(to: str, registry: Registry) -> None:
    try:
        registry.format(to)
    except UnsupportedFormat as error:  # said of a file elsewhere; here it is what was typed
        raise UsageError(error.message, error.hint) from None


def _read(
    source: Given, registry: Registry, base: Base | None, component: str, hub: str | None, compat: str | None
) -> tuple[AdapterHeader, BaseIndex | None]:
    """The source's header under the base's names; of a single model, as the part of a pipeline that is wanted.

    A source without parts finds the model's own names; then the component is only what to call it afterwards.
    """

    def read(index: BaseIndex | None) -> AdapterHeader:
        return header_of(source, registry, hub=hub, progress=quiet, index=index, compat=compat)

    if base is None:
        return read(None), None
    header, modules = read(base.index), base.index.modules()
    part = as_part(base.index, component)
    if part is base.index or any(group.component == "" and group.module in modules for group in header.reading.groups):
        return header, base.index
    return read(part), part


def _convert(
    request: Request, registry: Registry, source: Opened, given: Unpacked, progress: Progress
) -> ConversionReport:
    """From what was opened to what is written."""
    source.demand()
    adapter = load_tensors(source.header, registry)
    changes = source.changes(adapter)
    hints = source.hints(adapter, changes)

    def hinted(some: Sequence[Change]) -> Mapping[str, JSON]:
        return respell_hints(hints, some)

    carrier = Carrier(registry.format(request.to), tuple(registry.kinds.values()), hinted)
    part = called(request.component, {change.target.component for change in changes})
    chosen = choose_component(changes, part, carrier.takes, request.to)
    if source.renames:
        home = at_home(chosen.changes, request.to, source.base.index if source.base else None, source.weight)
        chosen = replace(chosen, changes=home.changes)
        source.note(home.findings, home.settled)
        hints |= {name: value for name, value in home.hints.items() if name not in hints}
    fitted = fit(
        chosen.changes,
        carrier,
        plain=request.plain,
        weight=source.weight,
        approximate=approximator(request.budget, source.weight) if request.budget else None,
        leave_out="cannot-carry" in request.allow,
        complete=source.complete,
    )
    if request.dtype:
        fitted = replace(fitted, changes=tuple(stored_as(change, request.dtype) for change in fitted.changes))
    return write(source, given, adapter, chosen, fitted, carrier, progress)
