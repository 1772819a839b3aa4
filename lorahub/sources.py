"""Adapters at hand: what people write, turned into a header, a description or tensors.

A source is a folder, a file, ``ns/name@1.2`` on a hub, or an object that is open already.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from lorahub import inspection, weighing
from lorahub.adapter import RECORD_FINDINGS, Adapter, AdapterHeader, open_header, recognise
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.conversion.settled import settled
from lorahub.conversion.translate import TRANSLATED
from lorahub.conversion.weights import BaseWeights
from lorahub.deltas.disputes import as_compat
from lorahub.errors import UsageError
from lorahub.fetching import Progress, Source, as_ref, locate, pull, quiet
from lorahub.findings import Finding
from lorahub.hub import open_hub
from lorahub.hub.noticed import NOTICED
from lorahub.names import Ref
from lorahub.opening import Base, open_base
from lorahub.pinned import Cost
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.remote import can_read, open_remote

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Given", "header_of", "inspect", "load", "weigh"]

Given: TypeAlias = "Source | Adapter | AdapterHeader"
"""An adapter as people write it, or one that is open."""


def header_of(
    source: Given,
    registry: Registry,
    *,
    hub: str | None,
    progress: Progress,
    index: BaseIndex | None = None,
    compat: str | None = None,
    whole: bool = True,
    allow: Collection[str] = (),
) -> AdapterHeader:
    """The header of an adapter, read against a base where ``index`` is given.

    Args:
        source: the adapter.
        registry: kinds and formats.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all).
        index: the base.
        compat: see ``load``; None leaves an open header's own choice.
        whole: its tensors will be wanted too, so one on a hub is pulled; else parts of its files are read there.
        allow: see ``fetching.pull``.

    Raises:
        UsageError: it lies in no folder yet, or ``compat`` is no choice.
        NotFound, UnsupportedFormat, IntegrityError: see ``lorahub.load``.
    """
    if isinstance(source, Adapter):
        if source.header is None:
            raise UsageError(
                "this adapter lies in no folder yet", "save it first: lorahub.adapter.save(adapter, FOLDER)"
            )
        source = source.header
    choice = as_compat(compat)
    if isinstance(source, AdapterHeader):
        if index is None and choice in (None, source.files.compat):
            return source
        if not source.folder.is_dir():  # it was read on a hub
            files = replace(source.files, compat=choice or source.files.compat)
            said = tuple(each for each in source.findings if each.code in RECORD_FINDINGS | NOTICED)
            return recognise(files, registry, index=index, label=source.label, record=source.record, said=said)
        again = open_header(
            source.folder,
            registry,
            index=index,
            weight_name=source.reading.file,
            label=source.label,
            compat=choice or source.files.compat,
        )
        return _with(again, [each for each in source.findings if each.code in NOTICED])
    ref = as_ref(source)
    if ref.path is not None:
        found = locate(ref, hub, False, progress)
        return open_header(
            found.folder, registry, index=index, weight_name=found.weight_name, label=found.label, compat=choice
        )
    if not whole:
        opened = open_hub(hub)
        pin = opened.resolve(ref)
        if can_read(pin):
            return open_remote(opened, pin, registry, Cost(), index=index, compat=choice)
    pulled = pull(ref, hub=hub, allow=allow, progress=progress)
    header = open_header(
        pulled.folder, registry, index=index, weight_name=pulled.pin.file, label=str(pulled.pin), compat=choice
    )
    return _with(header, pulled.findings)


def _with(header: AdapterHeader, said: Collection[Finding]) -> AdapterHeader:
    """The same header with what its hub let on."""
    return replace(header, findings=(*header.findings, *said)) if said else header


def inspect(source: Source, *, hub: str | None = None, progress: Progress = quiet) -> inspection.Inspection:
    """Say what an adapter is, from headers alone; no torch.

    Of one on a hub nothing is pulled where it has safetensors: parts of its files are read, and kept for the next time.

    Raises:
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        UnsupportedFormat, UnsupportedKind: nobody can read it.
        HeaderError, IntegrityError: its files are malformed, or not what the hub lists.
    """
    registry, ref = load_registry(), as_ref(source)
    if ref.path is not None:
        return inspection.inspect(header_of(ref, registry, hub=hub, progress=progress), registry)
    opened = open_hub(hub)
    pin = opened.resolve(ref)
    if not can_read(pin):
        folder = opened.pull(pin, progress=lambda _file, done, total: progress(done, total))
        header = open_header(folder, registry, weight_name=pin.file, label=str(pin))
        return inspection.inspect(_with(header, pin.said), registry)
    cost = Cost()
    header = open_remote(opened, pin, registry, cost)
    distance = inspection.Distance(
        pin=str(pin),
        commit=pin.commit,
        why=pin.why,
        files={path: file.size for path, file in pin.files.items()},
        sha256=pin.files[header.reading.file].sha256 or "",
        bytes_read=cost.nbytes,
        requests=cost.requests,
    )
    return inspection.inspect(header, registry, distance=distance)


def weigh(
    source: Source,
    base: Source | nn.Module | Base | None = None,
    *,
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> weighing.Weighing:
    """How much an adapter changes, target by target: norms, spectra, energy; reads its tensors.

    Where there is a base, under its names, into which those of another vocabulary are translated as for a merge.

    Args:
        source: a folder, a file, or a reference, which is pulled.
        base: see ``open_base``: for relative norms, and for changes that depend on weights.
        compat: see ``load``.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        progress: called with (targets done, targets in all).

    Raises:
        NotFound, UnsupportedFormat, UnsupportedKind, IntegrityError: as ``load`` and ``open_base``.
        MissingDependency: torch is not installed.
    """
    if base is None:
        return weighing.weigh(load(source, compat=compat, hub=hub), progress=progress)
    registry, opened = load_registry(), open_base(base, hub=hub)
    header = header_of(source, registry, hub=hub, progress=quiet, index=opened.index, compat=compat)
    home = settled(header, opened.index, opened.framework, registry.kinds)
    adapter = load_tensors(home.header, registry, index=opened.index)
    adapter = replace(adapter, deltas=home.deltas(adapter.deltas))
    touches = home.header.touches.items()
    siblings = {replace(target, parameter=name) for target, touch in touches for name in touch.reads}
    layouts = opened.framework.layouts(opened.index, {*adapter.deltas, *siblings})
    noted = tuple(each for each in home.header.findings if each.code == TRANSLATED)
    with opened.tensors() as read:
        found = weighing.weigh(adapter, base=BaseWeights(opened.index, layouts, read), progress=progress)
    return replace(found, findings=noted)


def load(
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str = "",
    weight_name: str = "",
    hub: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    compat: str | None = None,
    progress: Progress = quiet,
) -> Adapter:
    """An adapter with its tensors.

    Args:
        source: a folder, a file, or a reference.
        revision: the selector, where the reference has none.
        subfolder: the adapter's folder within the repository or folder.
        weight_name: which weights file, where a folder holds several.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        token: of Hugging Face; None takes the one that is set up.
        local_files_only: use the cache alone.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one.  None takes what the
            adapter's record or file says.
        progress: called with (bytes done, bytes in all).

    Raises:
        Incompatible: whose result counts matters here, and nobody chose.
        UsageError: ``revision`` and the reference both select, or a local path has no revisions.
        UnsupportedFormat, UnsupportedKind: nobody can read it, or it is no weight change.
        IntegrityError: its files contradict themselves, or hold NaN or infinity.
    """
    registry = load_registry()
    ref = _narrowed(as_ref(source), revision, subfolder)
    found = locate(ref, hub, local_files_only, progress, token=token)
    header = open_header(
        found.folder,
        registry,
        weight_name=weight_name or found.weight_name,
        label=found.label,
        compat=as_compat(compat),
    )
    return load_tensors(header, registry)


def _narrowed(ref: Ref, revision: str | None, subfolder: str) -> Ref:
    """``ref`` with a selector and a folder given apart from it."""
    if revision is not None and (ref.path is not None or ref.selector is not None):
        why = "a local path has no revisions" if ref.path is not None else f"it selects {ref.selector} already"
        raise UsageError(f"{ref} cannot be taken at revision {revision}: {why}", "give the one or the other")
    if ref.path is not None:
        return replace(ref, path=f"{ref.path.rstrip('/')}/{subfolder}") if subfolder else ref
    return replace(
        ref, selector=ref.selector or revision, subpath="/".join(filter(None, [ref.subpath, subfolder.strip("/")]))
    )
