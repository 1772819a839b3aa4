"""The result of a conversion: written beside its place, read back, compared, and only then put there."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorahub import __version__
from lorahub.adapter import Adapter, AdapterHeader, open_header
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.conversion.carry import Carrier, Fitted
from lorahub.conversion.change import Change
from lorahub.conversion.losses import about_metadata, told, with_metadata
from lorahub.conversion.naming import Chosen
from lorahub.conversion.report import ConversionReport, Converted
from lorahub.conversion.verify import UNSEEN, cost, difference
from lorahub.converting.opened import Opened
from lorahub.converting.request import Request
from lorahub.converting.unpacking import Unpacked
from lorahub.deltas.kind import JSON
from lorahub.errors import CannotCarry
from lorahub.fetching import Progress
from lorahub.files.atomic import atomic_write, new_staging, put_in_place, replace_dir, write_failed
from lorahub.files.digest import file_digest
from lorahub.files.dtypes import from_torch
from lorahub.lazy import torch
from lorahub.recording import make_record
from lorahub.records import FILENAME, AdapterRecord, Compat
from lorahub.saving import write_folder

__all__ = ["stored_as", "write"]

CHEAP = 1 << 30
"""Numbers that are compared without being asked: a rewritten adapter of a model with a billion parameters, seconds."""

_FILES = (".safetensors", ".gguf")
"""Endings of a result that is a file by itself."""


def write(
    source: Opened,
    given: Unpacked,
    adapter: Adapter,
    chosen: Chosen,
    fitted: Fitted,
    carrier: Carrier,
    progress: Progress,
) -> ConversionReport:
    """Write what was fitted, and say what became of every target.

    Args:
        source: the source and its base.
        given: where its files came from.
        adapter: its changes.
        chosen: what was left out for a component.
        fitted: what the format takes.
        carrier: the format.
        progress: called with (targets compared, in all).

    Raises:
        CannotCarry: something that calls itself exact is not, or a file was asked for where the format is a folder.
        WriteFailed: no space or no permission; nothing is left.
    """
    request = source.request
    staging = new_staging(request.out)
    try:
        folder = staging / "adapter"
        deltas = {change.target: change.delta for change in fitted.changes}
        write_folder(
            folder,
            deltas,
            registry=source.registry,
            format=request.to,
            hints=dict(carrier.hints(fitted.changes)),
            record=None,
        )
        again = open_header(folder, source.registry, index=_index(source, fitted, carrier))
        targets = tuple(_compare(source, adapter, fitted.changes, again, progress))
        written = again.files.headers[again.reading.file].metadata
        about, unread = about_metadata(source.header, written)
        losses = told(source.findings, request.allow, chosen.left_out, fitted.misfits, unread, chosen.said)
        losses += [f"not taken from the pickle: {name}" for name in given.left_out]
        report = ConversionReport(
            adapter=source.header.label,
            before=source.header.format,
            after=request.to,
            out=os.fspath(request.out),
            targets=targets,
            losses=tuple(losses),
            findings=source.findings,
        )
        if request.out.suffix in _FILES:
            _place_file(folder, again, request)
        else:
            atomic_write(folder / FILENAME, _record(source, given, report, about, again).to_json().encode())
            replace_dir(folder, request.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone by then, or what a failure left
    return report


def _index(source: Opened, fitted: Fitted, carrier: Carrier) -> BaseIndex | None:
    """What the result has to be read against to have the names and the orientation that were meant."""
    spelled = carrier.write(fitted.changes).index
    if spelled is not None or source.base is None or not carrier.hints(fitted.changes).get("transposed"):
        return spelled
    return source.base.index


def _compare(
    source: Opened, adapter: Adapter, changes: Sequence[Change], header: AdapterHeader, progress: Progress
) -> Iterator[Converted]:
    """Every target: what was meant against what reads back.

    Raises:
        CannotCarry: something that calls itself exact is not.
    """
    found = load_tensors(header, source.registry).deltas
    rules = _scale_rules(source.header), _scale_rules(header)
    total = sum(cost(change, found[change.target]) for change in changes)
    everything = source.request.verify is True or (source.request.verify is None and total <= CHEAP)
    for done, change in enumerate(changes):
        written, first = found[change.target], change.origins[0].target
        looked = everything or (source.request.verify is None and not change.rules)
        apart = difference(change, written, adapter.deltas, source.weight) if looked else None
        if apart is not None and apart > UNSEEN and change.error is None and not source.request.dtype:
            raise CannotCarry(
                f"{change.target.name} would change by {apart:.1e} of its norm ({', '.join(change.rules)})",
                "store wider numbers: --dtype float64",
            )
        before = rules[0].get((first.component, first.module))
        after = rules[1].get((change.target.component, change.target.module))
        folded = ("rslora-folded",) if before == "alpha/sqrt(r)" != after else ()
        touch, now = source.header.touches.get(first), header.touches.get(change.target)
        yield Converted(
            target=change.target.name,
            sources=tuple(dict.fromkeys(origin.target.name for origin in change.origins)),
            before=adapter.deltas[first].kind,
            after=written.kind,
            rank_before=touch.rank if touch else None,
            rank_after=now.rank if now else None,
            rules=(*change.rules, *folded),
            difference=apart,
            approximated=change.error is not None,
        )
        progress(done + 1, len(changes))


def _record(
    source: Opened, given: Unpacked, report: ConversionReport, about: Mapping[str, Any], written: AdapterHeader
) -> AdapterRecord:
    """The source's record, or a new one, brought up to date for what was written, with how it came about."""
    names = [source.header.reading.file, *(name for name in source.header.files.configs if name != FILENAME)]
    paths = given.originals or tuple(source.header.folder / name for name in names)
    sources = {path.name: file_digest(path)[0] for path in paths}
    error = report.max_error
    derivation = {
        "converted_from": report.before,
        "tool": "lorahub",
        "tool_version": __version__,
        "sources": sources,
        "rules": dict(report.rules),
        **({"max_error": error} if error is not None and math.isfinite(error) else {}),
        "losses": list(report.losses),
    }
    fields: dict[str, Any] = {"derivation": derivation}
    start = with_metadata(source.header.record, about)
    if choice := source.header.reading.hints.get("compat"):
        fields["compat"] = (start.compat or Compat()).model_copy(update={"choice": choice})
    return make_record(replace(written, record=start), source.registry, base=None, plan=None, fields=fields)


def _scale_rules(header: AdapterHeader) -> dict[tuple[str, str], JSON]:
    """(component, module) -> where its scale comes from."""
    return {(group.component, group.module): group.options.get("scale_rule") for group in header.reading.groups}


def stored_as(change: Change, dtype: str) -> Change:
    """The change with its floating tensors stored in ``dtype``."""
    wanted: torch.dtype = getattr(torch, dtype)
    delta = change.delta
    tensors = {name: each for name, each in delta.tensors().items() if each.is_floating_point()}
    if all(each.dtype == wanted for each in tensors.values()):
        return change
    known = {field.name for field in fields(delta)}  # type: ignore[arg-type]  # every delta is a dataclass
    values = {name: each.to(wanted) for name, each in tensors.items() if name in known}
    return change.become(replace(delta, **values), f"stored-as-{from_torch(wanted).lower()}")  # type: ignore[type-var]


def _place_file(folder: Path, header: AdapterHeader, request: Request) -> None:
    """Put the one file that was written where it was asked for.

    Raises:
        CannotCarry: the format needs more than one file, or another kind of file.
    """
    if request.out.suffix != Path(header.reading.file).suffix:
        raise CannotCarry(
            f"the format '{request.to}' writes {header.reading.file}, and {request.out.name} would say otherwise",
            f"name it so: -o {request.out.with_suffix(Path(header.reading.file).suffix)}",
        )
    others = sorted(path.name for path in folder.iterdir() if path.name != header.reading.file)
    if others:
        raise CannotCarry(
            f"the format '{request.to}' is a folder: beside its weights it has {', '.join(others)}",
            f"name a folder: -o {request.out.with_suffix('')}",
        )
    try:
        put_in_place(folder / header.reading.file, request.out)
    except OSError as error:
        raise write_failed(request.out, error) from None
