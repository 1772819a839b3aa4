"""Where adapters and bases come from: what people write, turned into headers, tensors and indices.

A source is a folder, a file, ``ns/name@1.2`` on a hub, or an object that is open already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorahub import inspection, weighing
from lorahub.adapter import RECORD_FINDINGS, Adapter, AdapterHeader, open_header, recognise
from lorahub.adapter import load as load_tensors
from lorahub.bases.framework import BaseFiles, Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.torch_module import held_parameters
from lorahub.bases.weights import weights_digest
from lorahub.conversion.naming import own_name
from lorahub.conversion.weights import BaseWeights, Read, read_files
from lorahub.deltas.disputes import as_compat
from lorahub.errors import InvalidRef, NotFound, Unavailable, UsageError
from lorahub.hub import open_hub
from lorahub.names import Ref, no_weight, printable
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.remote import Cost, can_read, open_remote

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorahub.hub.hub import Pin

__all__ = [
    "Base",
    "Given",
    "Progress",
    "Pulled",
    "Source",
    "as_ref",
    "header_of",
    "inspect",
    "load",
    "open_base",
    "pull",
    "quiet",
    "recorded_base",
    "weigh",
]

Source: TypeAlias = "str | os.PathLike[str] | Ref"
"""An adapter as people write it: a folder, a file, or ``ns/name[@SELECTOR][/path][:WEIGHT]``."""

Given: TypeAlias = "Source | Adapter | AdapterHeader"
"""An adapter as people write it, or one that is open."""


Progress: TypeAlias = "Callable[[int, int], None]"
"""Called with (done, in all): bytes where files move, parameters where a live model changes."""


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """An adapter that was fetched: its verified folder, and exactly which commit and files it is."""

    folder: Path
    pin: Pin


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an adapter lies: its folder, the weights file that the reference named (or ""), and what people call it."""

    folder: Path
    weight_name: str
    label: str


def as_ref(source: Source, *, bare: bool = False) -> Ref:
    """The reference; a path that exists is taken as a path, also where it could be a name on a hub.

    What exists as a whole is that path, also where it ends as a weight does (``runs/step:30``).

    Args:
        source: what was given.
        bare: also take names without a namespace, as old bases have ("gpt2").

    Raises:
        InvalidRef: it does not follow the grammar, or what is behind the ":" after a path that exists is no number.
        NotFound: one word that is no path here.
    """
    if isinstance(source, Ref):
        return source
    text = os.fspath(source)
    name, equals, place = text.partition("=")
    for head, tail in (("", text), (f"{name}=", place)) if equals else (("", text),):
        clear = Path(tail).is_absolute() or tail.startswith(("./", "../"))
        for path in (tail,) if clear else (f"./{tail}", *([tail] if tail.startswith("~") else [])):
            with suppress(InvalidRef):
                parsed = Ref.parse(f"{head}{path}")
                if parsed.weight is not None and _exists(path):
                    return Ref(name=parsed.name, path=path.rstrip("/"))
                if path != tail and parsed.path is not None and _exists(parsed.path):
                    return parsed
            if before := _unweighed(path):
                raise no_weight(text, f"{head}{before.removeprefix('./')}")
    try:
        return Ref.parse(text, bare=bare)
    except InvalidRef as error:
        if "/" in text or "@" in text or ":" in text:
            raise
        raise NotFound(f"there is no file or folder called {printable(text)} here", error.hint) from None


def _unweighed(path: str) -> str:
    """The path before a ":" behind which stands no weight, where it exists and the whole does not; else ""."""
    before, _, after = path.rpartition(":")
    if not before.strip("./") or "/" in after or "\\" in after or _exists(path) or not _exists(before):
        return ""
    with suppress(InvalidRef):
        return "" if Ref.parse(f"./it:{after}").weight is not None else before
    return before


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111 - Path.exists raises for an over-long name


def _fetch(
    ref: Ref, hub: str | None, local_files_only: bool, progress: Progress, *, token: str | None = None
) -> Pulled:
    opened = open_hub(hub, token=token, local_files_only=local_files_only)
    pin = opened.resolve(ref)
    return Pulled(folder=opened.pull(pin, progress=lambda _file, done, total: progress(done, total)), pin=pin)


def _locate(
    source: Source, hub: str | None, local_files_only: bool, progress: Progress, *, token: str | None = None
) -> _Place:
    ref = as_ref(source)
    if ref.path is None:
        pulled = _fetch(ref, hub, local_files_only, progress, token=token)
        return _Place(folder=pulled.folder, weight_name=pulled.pin.file, label=str(pulled.pin))
    path = Path(ref.path).expanduser()
    if path.is_dir():
        return _Place(folder=path, weight_name="", label=ref.path)
    if path.is_file():
        return _Place(folder=path.parent, weight_name=path.name, label=ref.path)
    raise NotFound(
        f"there is no adapter at {path}", "give a folder, a .safetensors file, or ns/name[@VERSION] on a hub"
    )


def pull(ref: Source, *, hub: str | None = None, local_files_only: bool = False, progress: Progress = quiet) -> Pulled:
    """Fetch an adapter from a hub, verify every file, and say where it lies.

    Args:
        ref: ``ns/name[@SELECTOR][/folder-or-file]``.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        Unavailable: it does not exist, is not accessible, or the network is needed and not there.
        IntegrityError: a file is not what the hub says it is.
    """
    parsed = as_ref(ref)
    if parsed.path is not None:
        raise UsageError(f"{ref} is a local path; only hub references are pulled", "lorahub pull NS/NAME[@VERSION]")
    return _fetch(parsed, hub, local_files_only, progress)


def header_of(
    source: Given,
    registry: Registry,
    *,
    hub: str | None,
    progress: Progress,
    index: BaseIndex | None = None,
    compat: str | None = None,
    whole: bool = True,
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
            said = tuple(each for each in source.findings if each.code in RECORD_FINDINGS)
            return recognise(files, registry, index=index, label=source.label, record=source.record, said=said)
        return open_header(
            source.folder,
            registry,
            index=index,
            weight_name=source.reading.file,
            label=source.label,
            compat=choice or source.files.compat,
        )
    ref = as_ref(source)
    if not whole and ref.path is None:
        opened = open_hub(hub)
        pin = opened.resolve(ref)
        if can_read(pin):
            return open_remote(opened, pin, registry, Cost(), index=index, compat=choice)
    found = _locate(ref, hub, False, progress)
    return open_header(
        found.folder, registry, index=index, weight_name=found.weight_name, label=found.label, compat=choice
    )


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
        return inspection.inspect(open_header(folder, registry, weight_name=pin.file, label=str(pin)), registry)
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
    registry, opened = load_registry(), open_base(base)
    header = header_of(source, registry, hub=hub, progress=quiet, index=opened.index, compat=compat)
    adapter = load_tensors(header, registry, index=opened.index)
    siblings = {
        Target(target.component, target.module, name) for target, each in adapter.deltas.items() for name in each.reads
    }
    layouts = opened.framework.layouts(opened.index, {*adapter.deltas, *siblings})
    with opened.tensors() as read:
        return weighing.weigh(adapter, base=BaseWeights(opened.index, layouts, read), progress=progress)


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
    found = _locate(ref, hub, local_files_only, progress, token=token)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base at hand: its index, the framework that names it, and where it is.

    Attributes:
        files: its files, or None for a live model.
        model: the live model, or None for files.
    """

    index: BaseIndex
    framework: Framework
    files: BaseFiles | None = None
    model: nn.Module | None = None

    @contextmanager
    def tensors(self) -> Iterator[Read]:
        """Its parameters by canonical name, on the CPU, from its files or from the live model, whose own they may be.

        Raises:
            IntegrityError: a file is not the one that was surveyed.
        """
        if self.files is not None:
            with read_files(self.files, self.index) as read:
                yield read
        else:
            assert self.model is not None  # a base is files or a model
            live = self.framework.parameters(self.model, self.index)
            held = held_parameters(self.model, self.index)

            def at_hand(name: str) -> torch.Tensor:
                if name in held:
                    return held[name].read().values().cpu()
                return live[name if name in live else own_name(name, self.index)].detach().cpu()

            yield at_hand


def open_base(base: Source | nn.Module | Base, *, digest: bool = False, progress: Progress = quiet) -> Base:
    """A base by its headers (a folder, a file, ``ns/name[@COMMIT]``) or as a live model; no weights are read.

    Args:
        base: what to open.
        digest: hash the weight files too (once; remembered), which tells equal shapes with other weights apart.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    if isinstance(base, Base):
        return base
    if not isinstance(base, str | os.PathLike | Ref):
        framework, index = index_live(base, registry.frameworks)
        return Base(index=index, framework=framework, model=base)
    ref = as_ref(base, bare=True)
    if ref.path is not None:
        place = Path(ref.path).expanduser()
        if not place.exists():
            raise NotFound(
                f"there is no base at {place}",
                "give a folder with config.json and safetensors files, or NS/NAME[@COMMIT]",
            )
        where = BaseRef(folder=str(place.resolve()))
    else:
        from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

        bases = HuggingFaceHub()
        try:
            pin = bases.base_pin(ref)
        except Unavailable as error:
            if isinstance(base, Ref):  # somebody said that it is a name
                raise
            raise type(error)(f"{error.message}; nor is there a folder {ref} here", error.hint) from None
        place = bases.pull(pin, progress=lambda _file, done, total: progress(done, total))
        where = BaseRef(repo=pin.repo, commit=pin.commit, subfolder=pin.subfolder, folder=str(place))
    files = survey_base(place)
    framework, index = index_base(
        files, where, registry.frameworks, weights=weights_digest(files, progress=progress) if digest else ""
    )
    return Base(index=index, framework=framework, files=files)


def recorded_base(header: AdapterHeader) -> str:
    """The base that the adapter's record names, as a reference.

    Raises:
        UsageError: it names none that can be fetched.
    """
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        return f"{recorded.repo_id}@{recorded.revision}" if recorded.revision else recorded.repo_id
    raise UsageError(
        f"{header.label} does not record a base that can be fetched",
        "name the base: --base FOLDER or --base NS/NAME[@COMMIT]",
    )
