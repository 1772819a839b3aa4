"""The Hugging Face Hub, read-only: what a reference means there, and its files, verified.

Resolving lists refs and one commit's files (two requests, none for a commit that was pulled).  Files are then named
by content hashes that were checked to be such, streamed into our own cache and hashed there: neither the headers of a
download nor the client's cache decide a path or are believed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported at first use

from lorahub.errors import AccessDenied, IntegrityError, NotFound, Offline, PushRefused, RecordError, UsageError
from lorahub.hub.cache import Cache, Refs
from lorahub.hub.download import Ranges, download, patiently, read_range
from lorahub.hub.hf_errors import typed
from lorahub.hub.hub import FilePin, Holds, Listing, Pin, Progress, Span, Taken
from lorahub.hub.ranges import Kept, coalesce, cut, verify_whole
from lorahub.hub.selection import select_adapter, select_base
from lorahub.hub.versions import VersionTag, pick, version_tags
from lorahub.names import COMMIT, Ref, Selector, did_you_mean, printable

__all__ = ["HuggingFaceHub"]

T = TypeVar("T")

_SELECT = {"adapter": select_adapter, "base": select_base}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_TIMEOUT = 30.0
_AT_ONCE = 8
_TRUE = frozenset({"1", "on", "yes", "true"})


class HuggingFaceHub:
    """The Hub at ``endpoint`` (huggingface.co, or ``HF_ENDPOINT``), or behind the client ``api``.

    ``local_files_only``, or ``HF_HUB_OFFLINE`` in the environment, means no request at all: what was pulled is there,
    under its commit, and under the tags and branches that the hub listed when it was last asked.

    Raises:
        UsageError: the endpoint is unencrypted and not on this machine, or the token is no token.
    """

    def __init__(
        self,
        *,
        api: HfApi | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        cache: Cache | None = None,
    ) -> None:
        if token is not None and (not (token := token.strip()) or not token.isascii() or not token.isprintable()):
            raise UsageError("the token holds characters that no token has", "Log in: hf auth login")
        self._api = api or HfApi(endpoint=endpoint, token=token, library_name="lorahub")
        self._cache = cache or Cache.default()
        self._offline = local_files_only or constants.HF_HUB_OFFLINE
        self._offline = self._offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
        parts = urlsplit(self._api.endpoint)
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise UsageError(f"{printable(self._api.endpoint)} is not encrypted", "Use an https:// address.")
        self.name = parts.netloc.rpartition("@")[2]
        self._key = self.name.replace(":", "_").lower()

    # ------------------------------------------------------------------------------------------------ the Hub

    def resolve(self, ref: Ref) -> Pin:
        """The exact state that ``ref`` means now; see ``Hub.resolve``."""
        if ref.repo is not None and "/" not in ref.repo:
            raise UsageError(f"{ref} names no namespace", "A repository is written namespace/name.")
        return self._pin(ref, "adapter")

    def pull(self, pin: Pin, *, progress: Progress | None = None) -> Path:
        """The folder with exactly the pinned files, each verified; see ``Hub.pull``."""
        if (folder := self._cache.folder(self._key, pin)) is not None:
            return folder
        if self._offline:
            raise self._not_here(pin.repo, str(pin))
        headers, linked = self._headers(), set[str]()
        sizes = dict.fromkeys(pin.files, 0)

        def fetch(path: str, file: FilePin, target: Path) -> None:
            def arrived(have: int) -> None:
                sizes[path] = have
                if progress is not None:
                    progress(path, sum(sizes.values()), pin.size)

            # What the client downloaded before saves the transfer; a second call means that it was not sound.
            if path not in linked and _from_client_cache(pin.repo, pin.at(path), pin.commit, file, target):
                linked.add(path)
                arrived(file.size)
                return
            url = hf_hub_url(pin.repo, pin.at(path), revision=pin.commit, endpoint=self._api.endpoint)
            self._ask(pin.repo, lambda: download(url, target, size=file.size, headers=headers, arrived=arrived))

        return self._cache.fill(self._key, pin, fetch)

    def read(self, pin: Pin, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one pinned file without pulling it; see ``Hub.read``."""
        if path not in pin.files:
            raise NotFound(f"{pin} holds no '{printable(path)}'", did_you_mean(path, pin.files).strip())
        left = max(pin.files[path].size - offset, 0)
        length = left if length is None else min(left, length)
        if (folder := self._cache.folder(self._key, pin)) is not None:
            with (folder / path).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        if self._offline:
            raise self._not_here(pin.repo, str(pin))
        if not length:
            return b""
        url = hf_hub_url(pin.repo, pin.at(path), revision=pin.commit, endpoint=self._api.endpoint)
        headers = self._headers()
        return self._ask(
            pin.repo, lambda: patiently(lambda: read_range(url, offset=offset, length=length, headers=headers))
        )

    def read_many(self, pin: Pin, path: str, spans: Sequence[Span]) -> Taken:
        """Parts of one pinned file without pulling it, several at a time; see ``Hub.read_many``."""
        if path not in pin.files:
            raise NotFound(f"{pin} holds no '{printable(path)}'", did_you_mean(path, pin.files).strip())
        file = pin.files[path]
        if self._cache.folder(self._key, pin) is not None:
            return Taken(parts=tuple(self.read(pin, path, offset=start, length=length) for start, length in spans))
        kept = Kept.of(self._cache.root, file)
        asked = coalesce((span for span in spans if cut(kept.pieces, span) is None), file.size)
        if asked and self._offline:
            raise self._not_here(pin.repo, str(pin))
        url = hf_hub_url(pin.repo, pin.at(path), revision=pin.commit, endpoint=self._api.endpoint)
        data = self._ask(pin.repo, lambda: _read_all(Ranges(url, self._headers()), asked))
        if short := [span for span, part in zip(asked, data, strict=True) if len(part) != span[1]]:
            raise IntegrityError(
                f"{printable(path)} of {pin}: the hub sends fewer than the {short[0][1]:,} bytes asked for",
                "Try again later.",
            )
        if (0, file.size) in asked:
            verify_whole(file, data[0], f"{pin}/{path}")
        if asked:
            kept.add((span[0], part) for span, part in zip(asked, data, strict=True))
        return kept.take(spans, asked)

    def forget(self, pin: Pin, path: str) -> None:
        """Drop what is kept of a file; see ``Hub.forget``."""
        Kept.of(self._cache.root, pin.files[path]).drop()

    def push(
        self,
        folder: Path,
        ref: Ref,
        *,
        version: str | None = None,
        message: str = "",
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Pin:
        """Refused: this hub is read-only here.

        Raises:
            PushRefused: always.
        """
        raise PushRefused(
            f"publishing {ref} to {self.name} is not part of this release, which only reads from there",
            f"Publish to a folder hub: lorahub push {ref} {folder} --hub PATH",
        )

    def versions(self, repo: str) -> list[VersionTag]:
        """The published versions, newest first; see ``Hub.versions``."""
        return version_tags(self._refs(repo, None).tags)

    def search(self, text: str = "", *, base: str | None = None, limit: int = 20) -> list[Listing]:
        """Model repositories by name, most downloaded first, and by the base their card names; see ``Hub.search``."""
        if self._offline:
            raise Offline(f"{self.name} cannot be searched: the network is switched off", "Unset HF_HUB_OFFLINE.")
        tags = f"base_model:adapter:{base}" if base is not None else None

        def find() -> list[Listing]:
            found = self._api.list_models(search=text or None, filter=tags, sort="downloads", limit=limit)
            return [
                Listing(repo=printable(info.id), base=base, note=f"{int(info.downloads or 0):,} downloads")
                for info in found
            ]

        return self._ask("the search", lambda: patiently(find))

    # --------------------------------------------------------------------------------------------------- bases

    def base_pin(self, ref: Ref) -> Pin:
        """The exact state of a base: its files with sizes and hashes, and nothing downloaded.

        ``digest()`` of the pin tells its weights from any others.  No selector means the default branch, as in the
        libraries that train on it.

        Raises:
            NotFound: no such repository or revision, or no safetensors in it.
            AccessDenied, Offline, Unavailable, IntegrityError: as ``resolve``.
        """
        return self._pin(ref if ref.selector is not None else replace(ref, selector="refs/heads/main"), "base")

    def pull_base(self, ref: Ref, *, progress: Progress | None = None) -> Path:
        """The folder of a base: safetensors, their index, configs, tokenizer and processor; never a pickle.

        Raises:
            DigestMismatch, WriteFailed: as ``pull``.
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: as ``base_pin``.
        """
        return self.pull(self.base_pin(ref), progress=progress)

    # ---------------------------------------------------------------------------------------------- resolution

    def _pin(self, ref: Ref, holds: Holds) -> Pin:
        if ref.repo is None:
            raise UsageError(f"{ref} is a local path, not in a hub", "Name a repository: namespace/name")
        selector = Selector.parse(ref.selector) if ref.selector is not None else None
        if selector is not None and selector.kind == "commit":  # needs no refs
            picked = pick(selector, {}, {})
        else:
            refs = self._refs(ref.repo, selector)
            picked = pick(selector, refs.tags, refs.branches, repo=ref.repo)
        why = f"{picked.why}, from the cache" if self._offline else picked.why
        found = self._cache.find(self._key, ref.repo, picked.commit, ref.subpath, holds=holds)
        if found is None:
            chosen = _SELECT[holds](self._listing(ref.repo, picked.commit), ref.subpath, repo=ref.repo)
            found = Pin(
                repo=ref.repo,
                commit=picked.commit,
                subfolder=chosen.subfolder,
                file=chosen.file,
                files=chosen.files,
                holds=holds,
            )
        return replace(
            found, requested=ref.selector, tag=picked.tag, branch=picked.branch, version=picked.version, why=why
        )

    def _refs(self, repo: str, selector: Selector | None) -> Refs:
        if self._offline:
            refs = self._cache.refs(self._key, repo)
            if refs is None:
                raise self._not_here(repo, repo)
            return refs
        pulls = selector is not None and selector.text.startswith("refs/pr/")

        def ask() -> tuple[dict[str, str], dict[str, str]]:
            found = self._api.list_repo_refs(repo, include_pull_requests=pulls)
            tags = {each.name: each.target_commit for each in found.tags}
            branches = {each.name: each.target_commit for each in found.branches}
            return tags, branches | {each.ref: each.target_commit for each in found.pull_requests or []}

        tags, branches = self._ask(repo, lambda: patiently(ask))
        if wrong := [name for name, commit in [*tags.items(), *branches.items()] if not _is_commit(name, commit)]:
            raise IntegrityError(f"{self.name} lists '{printable(str(wrong[0]))}' of {repo} at what is no commit")
        refs = Refs(tags=tags, branches=branches)
        self._cache.remember_refs(self._key, repo, refs)
        return refs

    def _listing(self, repo: str, commit: str) -> dict[str, FilePin]:
        """Every file of a commit by content, each hash checked to be one."""
        if (known := self._cache.listing(self._key, repo, commit)) is not None:
            return dict(known)
        if self._offline:
            raise self._not_here(repo, f"{repo}@{commit[:12]}")

        def ask() -> tuple[Any, Any, list[tuple[Any, Any, Any, Any]]]:
            info = self._api.model_info(repo, revision=commit, files_metadata=True, timeout=_TIMEOUT)
            return (
                info.sha,
                info.disabled,
                [
                    (file.rfilename, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
                    for file in info.siblings or []
                ],
            )

        sha, disabled, files = self._ask(repo, lambda: patiently(ask))
        if disabled:
            raise AccessDenied(f"{repo} was disabled by the hub or its author", f"See {self._page(repo)}")
        if sha != commit:
            raise IntegrityError(f"{self.name} answers for another commit of {repo} than was asked for")
        found = dict(_entry(*file, repo) for file in files)
        with suppress(RecordError):  # names that no pin may hold: whether they matter is decided where files are chosen
            self._cache.remember_listing(self._key, repo, commit, found)
        return found

    def _ask(self, repo: str, call: Callable[[], T]) -> T:
        return typed(call, what=repo, page=self._page(repo), here=Path(repo).is_dir())

    def _page(self, repo: str) -> str:
        return f"{self._api.endpoint}/{repo}"

    def _headers(self) -> Mapping[str, str]:
        return build_hf_headers(token=self._api.token, library_name="lorahub")

    def _not_here(self, repo: str, what: str) -> Offline:
        commits = self._cache.commits(self._key, repo)
        refs = self._cache.refs(self._key, repo) or Refs(tags={}, branches={})
        known = [each.tag for each in version_tags(refs.tags) if each.commit in commits] or [c[:12] for c in commits]
        has = f"pulled of it: {', '.join(map(printable, known[:5]))}" if known else "nothing of it was pulled"
        return Offline(f"{what} is not in the cache, and the network is switched off ({has})", "Unset HF_HUB_OFFLINE.")


def _read_all(ranges: Ranges, spans: Sequence[Span]) -> list[bytes]:
    """The bytes of every span: the first shows the way, the others follow several at a time."""
    first = [ranges.read(*span) for span in spans[:1]]
    if len(spans) < 2:
        return first
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return [*first, *pool.map(lambda span: ranges.read(*span), spans[1:])]


def _is_commit(name: object, commit: object) -> bool:
    return isinstance(name, str) and isinstance(commit, str) and COMMIT.fullmatch(commit) is not None


def _entry(name: object, size: object, blob: object, sha256: object, repo: str) -> tuple[str, FilePin]:
    """One listed file; the server says large files' sha256 and git's id of the others."""
    hash_ = blob if sha256 is None else sha256
    with suppress(RecordError):
        if isinstance(name, str) and type(size) is int and isinstance(hash_, str):
            return name, FilePin(size=size, git=hash_) if sha256 is None else FilePin(size=size, sha256=hash_)
    raise IntegrityError(f"{repo} lists '{printable(str(name))}' without a valid size and hash")


def _from_client_cache(repo: str, path: str, commit: str, file: FilePin, target: Path) -> bool:
    """Link or copy a file that the client has already, if it has one of that size; whether it is sound shows later."""
    with suppress(OSError, ValueError):  # any trouble with a foreign cache means to download
        found = try_to_load_from_cache(repo, path, revision=commit)
        if isinstance(found, str) and Path(found).stat().st_size == file.size:
            target.unlink(missing_ok=True)
            try:
                os.link(os.path.realpath(found), target)
            except OSError:
                shutil.copyfile(found, target)
            return True
    return False
