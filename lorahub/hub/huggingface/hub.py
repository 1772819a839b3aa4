"""The Hugging Face Hub: what a reference means there, and its files, verified.

Resolving lists refs and one commit's files: two requests, one for a version that was pulled, none for a commit that
was.  Files are then named by content hashes that were checked to be such, streamed into our own cache and hashed there:
neither the headers of a download nor the client's cache decide a path or are believed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache

from lorahub.errors import IntegrityError, NotFound, Offline, RecordError, UsageError
from lorahub.findings import Finding
from lorahub.hub.cache import Cache, Refs
from lorahub.hub.hub import FilePin, Holds, Listing, Pin, Progress, Revise, Span, Standing, Taken
from lorahub.hub.huggingface import pushing, searching
from lorahub.hub.huggingface.client import HubClient, check_token, own_version
from lorahub.hub.huggingface.describing import describe, list_refs
from lorahub.hub.huggingface.download import Ranges, download, patiently, read_range
from lorahub.hub.noticed import moved, renamed, superseded
from lorahub.hub.ranges import Kept, coalesce, cut, verify_whole
from lorahub.hub.selection import select_adapter, select_base
from lorahub.hub.versions import VersionTag, pick, version_tags
from lorahub.names import Ref, Selector, did_you_mean, printable

__all__ = ["HuggingFaceHub"]

_SELECT = {"adapter": select_adapter, "base": select_base}
_MAIN = "refs/heads/main"
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
        token = check_token(token) if token is not None else None
        self._api = api or HfApi(endpoint=endpoint, token=token, library_name="lorahub", library_version=own_version())
        self._client = HubClient(self._api)
        self._cache = cache or Cache.default()
        self._offline = local_files_only or constants.HF_HUB_OFFLINE
        self._offline = self._offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
        self.name, self._key = self._client.name, self._client.key
        self._ranges: dict[str, Ranges] = {}

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
            raise self._not_here(pin.repo, str(pin), pin)
        linked = set[str]()
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
            self._client.ask(
                pin.repo,
                lambda headers: download(url, target, size=file.size, headers=headers, arrived=arrived),
                commit=pin.commit,
            )

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
        return self._client.ask(
            pin.repo,
            lambda headers: patiently(lambda: read_range(url, offset=offset, length=length, headers=headers)),
            commit=pin.commit,
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
        data = self._client.ask(
            pin.repo,
            lambda headers: self._ranges.setdefault(url, Ranges(url, headers)).read_all(asked),
            commit=pin.commit,
        )
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
        private: bool = False,
        create_pr: bool = False,
        move_tag: bool = False,
        given: Mapping[str, bytes] | None = None,
        readme: Revise | None = None,
        progress: Progress | None = None,
    ) -> Pin:
        """Publish a folder as one commit; see ``Hub.push`` and ``pushing``."""
        if self._offline:
            raise Offline(f"{ref} cannot be published: the network is switched off", "Unset HF_HUB_OFFLINE.")
        with _needs_network("Push again once it can; a push goes on where it stopped."):
            pin = pushing.push(
                self._api,
                self._client,
                folder,
                ref,
                version=version,
                message=message,
                dry_run=dry_run,
                private=private,
                create_pr=create_pr,
                move_tag=move_tag,
                given=given,
                readme=readme,
                progress=progress,
            )
        if not dry_run:
            self.trust(pin)  # who publishes a version knows what it is
        return pin

    def page(self, pin: Pin) -> str:
        """Where people look at a state, or at a pull request; see ``Hub.page``."""
        return pushing.page(self._client, pin)

    def trust(self, pin: Pin) -> None:
        """The version of ``pin`` means its commit from now on; see ``Hub.trust``."""
        if pin.tag is not None:
            self._cache.trust(self._key, pin.repo, pin.tag, pin.commit)

    def standing(self, repo: str) -> Standing:
        """How a repository stands now; see ``Hub.standing``."""
        if self._offline:
            raise Offline(f"how {repo} stands cannot be asked: the network is switched off", "Unset HF_HUB_OFFLINE.")
        refs, name = list_refs(self._client, repo, pulls=False)
        self._cache.remember_refs(self._key, repo, refs.tags, refs.branches)
        about = describe(self._client, repo)
        return Standing(
            repo=about.name if about.name != repo else name,
            tags=refs.tags,
            branches=refs.branches,
            private=about.private,
            gated=about.gated,
            disabled=about.disabled,
            successor=about.successor,
            license=about.license,
        )

    def versions(self, repo: str) -> list[VersionTag]:
        """The published versions, newest first; see ``Hub.versions``."""
        return version_tags(self._refs(Ref(repo=repo))[0].tags)

    def search(
        self,
        text: str = "",
        *,
        base: str | None = None,
        author: str | None = None,
        library: str | None = None,
        tags: Sequence[str] = (),
        sort: str = "downloads",
        limit: int = 20,
    ) -> list[Listing]:
        """Model repositories, page after page; see ``Hub.search``."""
        if self._offline:
            raise Offline(f"{self.name} cannot be searched: the network is switched off", "Unset HF_HUB_OFFLINE.")
        asked = searching.query(text, base=base, author=author, library=library, tags=tags, sort=sort, limit=limit)
        with _needs_network("Search again once it can."):
            return searching.listings(self._client.pages("/api/models", asked, what="the search"), limit)

    # --------------------------------------------------------------------------------------------------- bases

    def base_pin(self, ref: Ref) -> Pin:
        """The exact state of a base: its files with sizes and hashes, and nothing downloaded.

        ``digest()`` of the pin tells its weights from any others.  No selector means the default branch, as in the
        libraries that train on it.

        Raises:
            NotFound: no such repository or revision, or no safetensors in it.
            AccessDenied, Offline, Unavailable, IntegrityError: as ``resolve``.
        """
        if ref.selector is not None:
            return self._pin(ref, "base")
        found = None if self._offline else self._look(ref)
        return self._pin(replace(ref, selector=_MAIN), "base", known=found)

    def pull_base(self, ref: Ref, *, progress: Progress | None = None) -> Path:
        """The folder of a base: safetensors, their index, configs, tokenizer and processor; never a pickle.

        Raises:
            DigestMismatch, WriteFailed: as ``pull``.
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: as ``base_pin``.
        """
        return self.pull(self.base_pin(ref), progress=progress)

    # ---------------------------------------------------------------------------------------------- resolution

    def _look(self, ref: Ref) -> tuple[Refs, list[Finding]] | None:
        """Where the main branch is now, with its files kept here, in one request; None where there is none."""
        repo = ref.repo or ""
        try:
            about = describe(self._client, repo, branch="main")
        except NotFound:  # asking for the refs says which is missing, repository or branch
            return None
        with suppress(RecordError):  # as in _listing
            self._cache.remember_listing(self._key, repo, about.commit, about.files)
        before = self._cache.refs(self._key, repo) or Refs(tags={}, branches={})
        branches = {**before.branches, "main": about.commit}
        refs = self._cache.remember_refs(self._key, repo, before.tags, branches)
        said = [renamed(ref, about.name)] if about.name != repo else []
        return refs, said + ([superseded(repo, about.successor)] if about.successor else [])

    def _pin(self, ref: Ref, holds: Holds, *, known: tuple[Refs, list[Finding]] | None = None) -> Pin:
        if ref.repo is None:
            raise UsageError(f"{ref} is a local path, not in a hub", "Name a repository: namespace/name")
        selector = Selector.parse(ref.selector) if ref.selector is not None else None
        said: list[Finding] = []
        if selector is not None and selector.kind == "commit":  # needs no refs
            picked = pick(selector, {}, {})
        else:
            refs, said = known or self._refs(ref, selector)
            picked = pick(selector, refs.tags, refs.branches, repo=ref.repo)
            before = refs.known.get(picked.tag or "", picked.commit)
            if picked.tag is not None and before != picked.commit:
                said.append(moved(ref, picked.tag, before, picked.commit))
        found = self._cache.find(self._key, ref.repo, picked.commit, ref.subpath, holds=holds)
        if found is None:
            files, more = self._listing(ref, picked.commit)
            said += [each for each in more if each.code not in {known.code for known in said}]
            chosen = _SELECT[holds](files, ref.subpath, repo=ref.repo)
            found = Pin(
                repo=ref.repo,
                commit=picked.commit,
                subfolder=chosen.subfolder,
                file=chosen.file,
                files=chosen.files,
                holds=holds,
            )
        return replace(
            found,
            requested=ref.selector,
            tag=picked.tag,
            branch=picked.branch,
            version=picked.version,
            why=f"{picked.why}, from the cache" if self._offline else picked.why,
            said=tuple(said),
        )

    def _refs(self, ref: Ref, selector: Selector | None = None) -> tuple[Refs, list[Finding]]:
        """Tags and branches now, and what the answer lets on; offline as they are known here."""
        repo = ref.repo or ""
        if self._offline:
            kept = self._cache.refs(self._key, repo)
            if kept is None:
                raise self._not_here(repo, repo)
            return replace(kept, tags=kept.trusted), []
        pulls = selector is not None and selector.text.startswith("refs/pr/")
        listed, name = list_refs(self._client, repo, pulls=pulls)
        refs = self._cache.remember_refs(self._key, repo, listed.tags, listed.branches)
        return refs, [renamed(ref, name)] if name != repo else []

    def _listing(self, ref: Ref, commit: str) -> tuple[dict[str, FilePin], list[Finding]]:
        """Every file of a commit by content, and what the answer lets on, where the hub has to be asked."""
        repo = ref.repo or ""
        if (known := self._cache.listing(self._key, repo, commit)) is not None:
            return dict(known), []
        if self._offline:
            raise self._not_here(repo, f"{repo}@{commit[:12]}")
        about = describe(self._client, repo, commit)
        with suppress(RecordError):  # names that no pin may hold: whether they matter is decided where files are chosen
            self._cache.remember_listing(self._key, repo, commit, about.files)
        said = [renamed(ref, about.name)] if about.name != repo else []
        return dict(about.files), said + ([superseded(repo, about.successor)] if about.successor else [])

    def _not_here(self, repo: str, what: str, pin: Pin | None = None) -> Offline:
        commits = self._cache.commits(self._key, repo)
        refs = self._cache.refs(self._key, repo) or Refs(tags={}, branches={})
        known = [each.tag for each in version_tags(refs.trusted) if each.commit in commits] or [c[:12] for c in commits]
        has = f"pulled of it: {', '.join(map(printable, known[:5]))}" if known else "nothing of it was pulled"
        missing = self._cache.missing(self._key, pin) if pin is not None else []
        if pin is not None and len(missing) < len(pin.files):
            lost = ", ".join(map(printable, missing[:5])) or "its record"
            has = f"of {len(pin.files)} files there is no whole {lost}{', ...' if len(missing) > 5 else ''}"
        message = f"{what} is not in the cache, and the network is switched off ({has})"
        return Offline(message, "Once with the network: leave out --offline, and unset HF_HUB_OFFLINE.")


@contextmanager
def _needs_network(hint: str) -> Iterator[None]:
    """What is done here cannot be had from a cache, so the hint does not speak of one.

    Raises:
        Offline: with ``hint``.
    """
    try:
        yield
    except Offline as error:
        raise Offline(error.message, hint, error.findings) from None


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
