"""A base on a hub, looked at without its weights: configs and headers in place of a folder.

What comes of it is what ``survey_base`` gives for the same files in a folder, and the digest of the weights is the one
that hashing them would give, since the hub lists their hashes.  Knows no framework and no particular hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Protocol

from lorahub.bases.framework import BaseFiles
from lorahub.bases.open import CONFIG_BYTES, CONFIGS, INDEX, choose_weights, parse_config, survey_base
from lorahub.bases.pipelines import PIPELINE, components_of, joined
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.files.header import Header
from lorahub.files.shards import INDEX_BYTES, check_shards, demand_shards, parse_index
from lorahub.hub.hub import FilePin, Hub, Pin, digest_of
from lorahub.names import Ref
from lorahub.pinned import Cost, PinnedFiles

__all__ = ["BaseHub", "DistantBase", "look_at"]

_AT_ONCE = 8
"""Shards whose headers are read at the same time."""

_UNHASHED = 16 << 20
"""Bytes up to which a weights file is read for its sha256 where the hub lists only git's id: such files are small."""


class BaseHub(Hub, Protocol):
    """A hub that has bases too."""

    def base_pin(self, ref: Ref) -> Pin:
        """The exact state of a base: its files with sizes and hashes, and nothing downloaded.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: as ``resolve``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class DistantBase:
    """A base that was looked at where it lies.

    Attributes:
        hub: where that is.
        pin: which state of it.
        files: configs and headers; its ``folder`` is the pin's name and lies nowhere.
        weights: the digest of its weights files, or "" where the hub does not say.
    """

    hub: BaseHub
    pin: Pin
    files: BaseFiles
    weights: str

    def pulled(self, progress: Callable[[int, int], None]) -> BaseFiles:
        """The same files on this machine, each verified; those that were pulled before cost nothing.

        Args:
            progress: called with (bytes done, bytes in all).

        Raises:
            DigestMismatch, WriteFailed: see ``Hub.pull``.
            IntegrityError: they do not say what their headers said when they were looked at.
            NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        """
        folder = self.hub.pull(self.pin, progress=lambda _file, done, total: progress(done, total))
        found = survey_base(folder / self.pin.file if self.pin.file else folder)
        if (found.headers, found.configs) != (self.files.headers, self.files.configs):
            for name in self.files.headers:
                self.hub.forget(self.pin, name)
            raise IntegrityError(
                f"the files of {self.pin} are other ones than the hub showed when it was asked for their headers",
                "try again; if it stays so, the hub or something on the way alters files",
            )
        return found

    def agrees(self, ref: Ref, digest: str, tensors: Collection[str]) -> bool:
        """Whether the files that hold these tensors have the same content in another base.

        Args:
            ref: the other base, on the same hub.
            digest: of the weights it must have for that to count.
            tensors: names in the files.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: the other base cannot be had from here.
            LorahubError: the hub does not list the sha256 of its weights.
        """
        other = self.hub.base_pin(ref)
        holding = {name for name, header in self.files.headers.items() if not header.tensors.keys().isdisjoint(tensors)}
        here, there = ({name: pin.files.get(name) for name in holding} for pin in (self.pin, other))
        known = all(file is not None and file.sha256 is not None for file in here.values())
        return other.digest() == digest and known and here == there

    def read(self, name: str, limit: int) -> bytes:
        """The first bytes of a file besides, at most ``limit``; none where there is no such file.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: as ``look_at``.
        """
        if name not in self.pin.files:
            return b""
        return PinnedFiles(self.hub, self.pin, Cost()).parts(name, (0, min(limit, self.pin.files[name].size)))[0]


def look_at(hub: BaseHub, pin: Pin) -> DistantBase:
    """A pinned base by its configs and headers; no weights are read.

    Raises:
        UnsupportedFormat: there are no safetensors weights, or too many to choose from.
        HeaderError, IntegrityError: a file is malformed, too large, or not what the pin says, or shards contradict
            their index.
        NotFound, AccessDenied, Offline, Unavailable: it, or a shard, cannot be had from here.
    """
    files = PinnedFiles(hub, pin, Cost())
    names = [name for name in pin.files if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    found = None if pin.file else _pipeline(hub, files, names)
    if found is None:
        found = _model(hub, files, names)
    return DistantBase(hub=hub, pin=pin, files=found, weights=_digest(files, found.headers))


def _pipeline(hub: Hub, files: PinnedFiles, names: Sequence[str]) -> BaseFiles | None:
    """A pipeline by its components, or None where it is none."""
    if PIPELINE not in names:
        return None
    pin, where = files.pin, Path(str(files.pin))
    said = parse_config(files.whole(PIPELINE, limit=CONFIG_BYTES), where=f"{pin}/{PIPELINE}")
    components = components_of(said, names, pin)
    if not components:
        return None
    parts = {component: _model(hub, files, own, f"{component}/") for component, own in components.items()}
    return joined(where, parts, MappingProxyType({PIPELINE: said}), names)


def _model(hub: Hub, files: PinnedFiles, names: Sequence[str], folder: str = "") -> BaseFiles:
    """One model.

    Args:
        hub: where it lies.
        files: of the repository.
        names: its files, by their paths within its folder.
        folder: that folder, with a slash; "" where it is the repository's.
    """
    pin, where = files.pin, Path(str(files.pin)) / folder
    weights = pin.file or choose_weights(names, where)
    if weights.endswith(INDEX):
        listed = parse_index(files.whole(f"{folder}{weights}", limit=INDEX_BYTES), where=f"{pin}/{folder}{weights}")
        shards = sorted(set(listed.values()))
        missing = [name for name in shards if f"{folder}{name}" not in pin.files]
        demand_shards(where / weights, shards, missing, "tell its author: the repository is not complete")
        headers = _headers(hub, pin, shards, folder)
        check_shards(where / weights, listed, {where / name: header for name, header in headers.items()})
    elif weights.endswith(".safetensors"):
        headers = {weights: files.header(f"{folder}{weights}")}
    else:
        raise UnsupportedFormat(f"{pin}/{folder}{weights} is no safetensors file")
    configs = {
        name: parse_config(files.whole(f"{folder}{name}", limit=CONFIG_BYTES), where=f"{pin}/{folder}{name}")
        for name in CONFIGS
        if name in names
    }
    return BaseFiles(
        folder=where,
        headers=MappingProxyType(headers),
        configs=MappingProxyType(configs),
        others=tuple(name for name in names if name not in headers and name not in configs),
    )


def _headers(hub: Hub, pin: Pin, shards: Sequence[str], folder: str) -> dict[str, Header]:
    """The header of every shard in a folder, several at a time."""
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(shards))) as pool:
        found = pool.map(lambda name: PinnedFiles(hub, pin, Cost()).header(f"{folder}{name}"), shards)
        return dict(zip(shards, found, strict=True))


def _digest(files: PinnedFiles, headers: Mapping[str, Header]) -> str:
    """What ``weights_digest`` gives for the same files; "" where the hub lists no sha256 of a large one."""
    known: dict[str, FilePin] = {}
    for name in headers:
        file = files.pin.files[name]
        if file.sha256 is None:
            if file.size > _UNHASHED:
                return ""
            file = replace(file, sha256=hashlib.sha256(files.whole(name)).hexdigest())
        known[name] = file
    return digest_of(known)
