"""Bases at hand: a folder, a file, a repository or a live model, opened by names and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import BaseFiles, Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.open import as_module, index_base, index_live, survey_base
from lorahub.bases.torch_module import held_parameters
from lorahub.bases.weights import weights_digest
from lorahub.conversion.naming import own_name
from lorahub.conversion.weights import Read, read_files
from lorahub.distant_bases import DistantBase, look_at
from lorahub.errors import InvalidRef, LorahubError, NotFound, Unavailable, UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.files.raw import open_regular
from lorahub.findings import Finding
from lorahub.front_matter import front_matter
from lorahub.hub.hub import Pin
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.record_fields import BaseRecord

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Base", "open_base", "recorded_base"]

_CARD = "README.md"
_CARD_BYTES = 256 << 10
"""Of a card, how much is read: what it says for machines stands at its beginning."""

_RELATIONS = frozenset({"finetune", "merge", "quantized"})
"""What a whole model may be to another, as its card says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base at hand: its index, the framework that names it, and where it is.

    Attributes:
        files: its files on this machine, or None.
        model: the live model, of a pipeline the view of its models; or None.
        distant: its files on a hub, of which configs and headers alone were read, or None.
        findings: what there was to say on the way to it, such as a repository that has another name now.
    """

    index: BaseIndex
    framework: Framework
    files: BaseFiles | None = None
    model: nn.Module | None = None
    distant: DistantBase | None = None
    findings: tuple[Finding, ...] = ()

    def pulled(self, progress: Progress = quiet) -> Base:
        """The same base with its files on this machine, fetched where they lie on a hub; others are as they were.

        Args:
            progress: called with (bytes done, bytes in all).

        Raises:
            DigestMismatch, IntegrityError, WriteFailed: its files are not what the hub says, or cannot be kept.
            NotFound, AccessDenied, Offline, Unavailable: they cannot be had from here.
        """
        if self.distant is None:
            return self
        files = self.distant.pulled(progress)
        where = replace(self.index.ref, folder=str(files.folder))
        return replace(self, index=replace(self.index, ref=where), files=files, distant=None)

    @contextmanager
    def tensors(self, progress: Progress = quiet) -> Iterator[Read]:
        """Its parameters by canonical name, on the CPU, from its files or from the live model, whose own they may be.

        Files on a hub are fetched when the first parameter is asked for.

        Args:
            progress: called with (bytes fetched, in all).

        Raises:
            IntegrityError: a file is not the one that was surveyed.
        """
        if self.model is None:
            with _read_when_asked(self, progress) as read:
                yield read
        else:
            live = self.framework.parameters(self.model, self.index)
            held = held_parameters(self.model, self.index)

            def at_hand(name: str) -> torch.Tensor:
                if name in held:
                    return held[name].read().values().cpu()
                return live[name if name in live else own_name(name, self.index)].detach().cpu()

            yield at_hand

    def relatives(self) -> Mapping[str, str]:
        """The repositories that its card says it was made from -> how: "finetune", "merge" or "quantized".

        Nothing where it has no card, or none that can be read.
        """
        try:
            said = front_matter(self._card().decode("utf-8", "replace"))
        except LorahubError:  # a card that cannot be had declares nothing, and what is undeclared is judged harder
            return {}
        named, relation = said.get("base_model"), said.get("base_model_relation", "finetune")
        if not isinstance(relation, str) or relation not in _RELATIONS:
            return {}
        return {each: relation for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)}

    def agrees(self, recorded: BaseRecord, names: Collection[str]) -> bool:
        """Whether the files that hold these parameters are known to be those of the recorded base, byte for byte.

        Asked of the hub where this base lies, by the hashes it lists; what cannot be had there is not known.

        Args:
            recorded: a base as a record names it.
            names: canonical names of parameters.
        """
        if self.distant is None or not names or not recorded.repo_id or not recorded.revision:
            return False
        stored = {self.index.parameters[name].stored_as for name in names if name in self.index.parameters}
        try:
            ref = Ref(repo=recorded.repo_id, selector=recorded.revision, subpath=recorded.subfolder or "")
            return self.distant.agrees(ref, recorded.weights_digest or "", stored)
        except LorahubError:  # as for a card
            return False

    def _card(self) -> bytes:
        if self.distant is not None:
            return self.distant.read(_CARD, _CARD_BYTES)
        if self.files is None or _CARD not in self.files.others:
            return b""
        with open_regular(self.files.folder / _CARD) as file:
            return file.read(_CARD_BYTES) or b""


@contextmanager
def _read_when_asked(base: Base, progress: Progress) -> Iterator[Read]:
    """Tensors out of files, which are fetched and opened when the first is asked for."""
    lock, opened = Lock(), list[Read]()
    with ExitStack() as held:

        def read(name: str) -> torch.Tensor:
            with lock:
                if not opened:
                    files = base.pulled(progress).files
                    assert files is not None  # a base is files, here or on a hub, or a model
                    opened.append(held.enter_context(read_files(files, base.index)))
            return opened[0](name)

        yield read


def open_base(
    base: Source | nn.Module | Base, *, digest: bool = False, hub: str | None = None, progress: Progress = quiet
) -> Base:
    """A base by its headers (a folder, a file, ``ns/name[@COMMIT]``) or as a live model or pipeline; no weights read.

    Of one on a hub configs and headers are read where it lies; ``Base.pulled`` fetches it.

    Args:
        base: what to open.
        digest: hash the weight files of a folder too (once; remembered), which tells equal shapes with other weights
            apart.  A hub lists the hashes of its own.
        hub: the address of a server like Hugging Face's; None takes ``LORAHUB_HUB`` where that is one, and a folder hub
            holds no bases.
        progress: called with (bytes hashed, in all).

    Raises:
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        UnsupportedFormat: it holds no weights that can be read, or no framework knows it.
        HeaderError, IntegrityError: its files are malformed.
    """
    if isinstance(base, Base):
        return base
    if not isinstance(base, str | os.PathLike | Ref):
        frameworks = load_registry().frameworks
        model = as_module(base, frameworks)
        framework, index = index_live(model, frameworks)
        return Base(index=index, framework=framework, model=model)
    ref = as_ref(base, bare=True)
    if ref.path is not None:
        return _open_folder(Path(ref.path).expanduser(), digest, progress)
    try:
        return _open_distant(ref, hub)
    except Unavailable as error:
        if isinstance(base, Ref):  # somebody said that it is a name
            raise
        raise type(error)(f"{error.message}; nor is there a folder {ref} here", error.hint) from None


def _open_folder(place: Path, digest: bool, progress: Progress) -> Base:
    if not place.exists():
        raise NotFound(
            f"there is no base at {place}",
            "give a folder with config.json and safetensors files, or NS/NAME[@COMMIT]",
        )
    files = survey_base(place)
    weights = weights_digest(files, progress=progress) if digest else ""
    ref = BaseRef(folder=str(place.resolve()))
    framework, index = index_base(files, ref, load_registry().frameworks, weights=weights)
    return Base(index=index, framework=framework, files=files)


def _open_distant(ref: Ref, hub: str | None) -> Base:
    from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

    name = hub if hub is not None else os.environ.get("LORAHUB_HUB", "")
    bases = HuggingFaceHub(endpoint=name if "://" in name else None)
    pin = bases.base_pin(ref)
    distant = look_at(bases, pin)
    where = BaseRef(repo=pin.repo, commit=pin.commit, subfolder=pin.subfolder)
    framework, index = index_base(distant.files, where, load_registry().frameworks, weights=distant.weights)
    return Base(
        index=index, framework=framework, distant=distant, findings=tuple(_about_base(each, pin) for each in pin.said)
    )


def _about_base(noticed: Finding, pin: Pin) -> Finding:
    """What a hub let on, with a remedy for a base: nothing of it is trusted for later."""
    if noticed.code != "tag-moved":
        return noticed
    return replace(noticed, remedy=f"name the commit that is meant: --base {pin.repo}@{pin.commit}")


def recorded_base(header: AdapterHeader) -> str:
    """The base that the adapter's record names, as a reference.

    Raises:
        UsageError: it names none that can be fetched.
    """
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        named = f"{recorded.repo_id}@{recorded.revision}" if recorded.revision else recorded.repo_id
        return f"{named}/{recorded.subfolder}" if recorded.subfolder else named
    claimed = _claimed(header)
    raise UsageError(
        f"{header.label} does not record a base{f'; its files name {claimed} without a commit' if claimed else ''}",
        f"name the base: --base {claimed or 'FOLDER or --base NS/NAME[@COMMIT]'}",
    )


def _claimed(header: AdapterHeader) -> str:
    """The base that an adapter's files name without a commit or digest, where that is a name on a hub; or ""."""
    claimed = header.reading.base_repo
    try:
        return claimed if claimed and Ref.parse(claimed, bare=True).repo == claimed else ""
    except InvalidRef:
        return ""
