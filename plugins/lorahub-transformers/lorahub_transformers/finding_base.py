"""The base that an adapter was made for: found where it lies, by headers alone, at its recorded commit.

What Transformers has fetched before is used where it lies; everything else comes from the Hub, file by file verified.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lorahub.bases.framework import BaseFiles, Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.distant_bases import look_at
from lorahub.errors import Unavailable, UnsupportedFormat, UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.names import COMMIT, Ref
from lorahub.opening import Base, open_base, recorded_base
from lorahub.plugins import load_registry
from lorahub_transformers.building import build
from lorahub_transformers.origin import digest_of_files, snapshots

if TYPE_CHECKING:
    from lorahub.adapter import AdapterHeader

__all__ = ["find_base"]


def find_base(
    header: AdapterHeader,
    given: Source | None,
    *,
    hub: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Base:
    """The base, opened by headers; nothing of its weights is read.

    Args:
        header: the adapter.
        given: a folder or ``ns/name[@COMMIT]``; None takes what the adapter records.
        hub: the address of a server like Hugging Face's; a folder hub holds no bases.
        token: for the Hub.
        local_files_only: ask nobody.
        progress: called with (bytes hashed, in all).

    Raises:
        UsageError: none is recorded, and none given.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here; the message says whose base it is.
        UnsupportedFormat, IntegrityError: its files cannot be read.
    """
    ref = _recorded(header) if given is None else as_ref(given, bare=True)
    if ref.path is not None:
        return _local(ref, progress)
    if ref.selector and COMMIT.fullmatch(ref.selector) and not ref.subpath:
        for files in snapshots(ref.repo or ""):
            if files.folder.name == ref.selector:
                where = BaseRef(repo=ref.repo or "", commit=ref.selector)
                return _base(files, where, digest_of_files(files))
    try:
        return _distant(ref, hub, token, local_files_only)
    except Unavailable as error:
        whose = f"{header.label} was made for {ref}, which cannot be had: " if given is None else ""
        raise type(error)(f"{whose}{error.message}", error.hint or "give a base that is at hand: base=FOLDER") from None


def _recorded(header: AdapterHeader) -> Ref:
    try:
        return Ref.parse(recorded_base(header), bare=True)  # never a path that lies here
    except UsageError as error:
        named = header.reading.base_repo
        hint = f"its files name one, without saying which weights it had then: base={named!r}" if named else ""
        raise UsageError(error.message, hint or "say which it is: base='NS/NAME@COMMIT' or base=FOLDER") from None


def _local(ref: Ref, progress: Progress) -> Base:
    try:
        return open_base(ref, digest=True, progress=progress)
    except UnsupportedFormat:
        files = survey_base(os.path.expanduser(ref.path or ""))  # noqa: PTH111 - what it is, survey_base says
        if "quantization_config" not in files.config:
            raise
        return _base(files, BaseRef(folder=str(files.folder.resolve())), digest_of_files(files))


def _distant(ref: Ref, hub: str | None, token: str | None, local_files_only: bool) -> Base:
    from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

    name = hub if hub is not None else os.environ.get("LORAHUB_HUB", "")
    bases = HuggingFaceHub(endpoint=name if "://" in name else None, token=token, local_files_only=local_files_only)
    pin = bases.base_pin(ref)
    distant = look_at(bases, pin)
    where = BaseRef(repo=pin.repo, commit=pin.commit, subfolder=pin.subfolder)
    found = _base(distant.files, where, distant.weights)
    return replace(found, files=None, distant=distant, findings=pin.said)


def _base(files: BaseFiles, where: BaseRef, weights: str) -> Base:
    framework, index = _indexed(files, where, weights)
    return Base(index=index, framework=framework, files=files)


def _indexed(files: BaseFiles, where: BaseRef, weights: str) -> tuple[Framework, BaseIndex]:
    """The index; of a checkpoint that is stored quantised, that of the model which its class builds."""
    frameworks = load_registry().frameworks
    if "quantization_config" not in files.config:
        return index_base(files, where, frameworks, weights=weights)
    plain = {key: value for key, value in files.config.items() if key != "quantization_config"}
    bare = build(plain, files.tensors)
    if bare is None:
        return index_base(files, where, frameworks)  # which says why not
    framework, index = index_live(bare, frameworks)
    return framework, replace(index, ref=where, weights=weights, config=files.config)
