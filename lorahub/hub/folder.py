"""The embedded hub: a folder with versions, for one person, a team on a shared disk, or a test.  Needs no network."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorahub.errors import DigestMismatch, IntegrityError, NotFound, UsageError
from lorahub.files.atomic import write_failed
from lorahub.files.raw import CHUNK, open_regular, read_into
from lorahub.front_matter import front_matter
from lorahub.hub.cache import Cache
from lorahub.hub.folder_store import Commit, FolderStore, State
from lorahub.hub.hub import SORTS, FilePin, Listing, Pin, Progress, Revise, Span, Standing, Taken
from lorahub.hub.noticed import moved
from lorahub.hub.publication import (
    DEFAULT_BRANCH,
    Outcome,
    Publication,
    current_readme,
    outcome,
    publication,
    repo_of,
    revised,
)
from lorahub.hub.ranges import coalesce, cut, verify_whole
from lorahub.hub.searches import base_name
from lorahub.hub.selection import select_adapter
from lorahub.hub.versions import VersionTag, pick, version_tags
from lorahub.names import Ref, Selector, did_you_mean, printable

__all__ = ["FolderHub"]

_CONFIG_LIMIT = 1 << 20
_CARD_LIMIT = 4 << 20
_NAMES_OF_BASES = {"lorahub.json": ("base", "repo_id"), "adapter_config.json": ("base_model_name_or_path",)}
"""File -> the keys that lead to the name of the base."""


class FolderHub:
    """The hub in the folder ``root``, which the first push creates; what is pulled goes through ``cache``.

    Raises:
        UsageError: ``root`` holds something else.
    """

    def __init__(self, root: Path, *, cache: Cache | None = None) -> None:
        self._store = FolderStore(root)
        self._cache = cache or Cache.default()

    @property
    def name(self) -> str:
        """The folder it lies in."""
        return str(self._store.root)

    @property
    def _key(self) -> str:
        """What it is called in the cache, under whichever of its names it is opened."""
        return f"folder-{hashlib.sha256(str(self._store.root.resolve()).encode()).hexdigest()[:12]}"

    def resolve(self, ref: Ref) -> Pin:
        """The exact state that ``ref`` means now; see ``Hub.resolve``."""
        pin, state = self._pin(ref), self._store.state(repo_of(ref))
        refs = self._cache.remember_refs(self._key, pin.repo, state.tags, state.branches)
        before = refs.known.get(pin.tag or "", pin.commit)
        if pin.tag is None or before == pin.commit:
            return pin
        return replace(pin, said=(moved(ref, pin.tag, before, pin.commit),))

    def _pin(self, ref: Ref) -> Pin:
        repo = repo_of(ref)
        state = self._store.state(repo)
        selector = Selector.parse(ref.selector) if ref.selector is not None else None
        picked = pick(selector, state.tags, state.branches, DEFAULT_BRANCH, repo=repo)
        chosen = select_adapter(self._store.commit(repo, picked.commit).files, ref.subpath, repo=repo)
        return Pin(
            repo=repo,
            commit=picked.commit,
            subfolder=chosen.subfolder,
            file=chosen.file,
            requested=ref.selector,
            tag=picked.tag,
            branch=picked.branch,
            version=picked.version,
            why=picked.why,
            files=chosen.files,
        )

    def pull(self, pin: Pin, *, progress: Progress | None = None) -> Path:
        """The folder with exactly the pinned files, copied and verified; see ``Hub.pull``."""
        if (folder := self._cache.folder(self._key, pin)) is not None:
            return folder
        listed = self._store.commit(pin.repo, pin.commit).files
        if wrong := [path for path, file in pin.files.items() if listed.get(pin.at(path)) != file]:
            raise DigestMismatch(
                f"commit {pin.commit} of {pin.repo} holds another {printable(wrong[0])} than is pinned"
            )
        done = 0

        def fetch(path: str, file: FilePin, target: Path) -> None:
            nonlocal done
            with open_regular(self._store.blob(file)) as source, target.open("wb") as copy:
                while chunk := source.read(CHUNK):
                    copy.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(path, done, pin.size)

        return self._cache.fill(self._key, pin, fetch)

    def read(self, pin: Pin, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one pinned file without pulling it; see ``Hub.read``."""
        if path not in pin.files:
            raise NotFound(f"{pin} holds no '{printable(path)}'", did_you_mean(path, pin.files).strip())
        left = max(pin.files[path].size - offset, 0)
        data = bytearray(left if length is None else min(left, length))
        with open_regular(self._store.blob(pin.files[path])) as file:
            read_into(file, offset, data)
        return bytes(data)

    def read_many(self, pin: Pin, path: str, spans: Sequence[Span]) -> Taken:
        """Parts of one pinned file without pulling it; see ``Hub.read_many``.  Nothing is kept: it lies here."""
        asked = coalesce(spans, pin.files[path].size)
        pieces = [(offset, self.read(pin, path, offset=offset, length=length)) for offset, length in asked]
        if (0, pin.files[path].size) in spans:
            verify_whole(pin.files[path], pieces[0][1] if pieces else b"", f"{pin}/{path}")
        parts = [cut(pieces, span) for span in spans]
        if short := next((span for span, part in zip(spans, parts, strict=True) if part is None), None):
            raise IntegrityError(f"{printable(path)} of {pin} holds no {short[1]} bytes from {short[0]} on")
        return Taken(
            parts=tuple(part for part in parts if part is not None),
            nbytes=sum(len(data) for _, data in pieces),
            requests=len(asked),
        )

    def forget(self, pin: Pin, path: str) -> None:
        """Nothing is kept; see ``Hub.forget``."""

    def versions(self, repo: str) -> list[VersionTag]:
        """The published versions, newest first; see ``Hub.versions``."""
        return version_tags(self._store.state(repo).tags)

    def trust(self, pin: Pin) -> None:
        """The version of ``pin`` means its commit from now on; see ``Hub.trust``."""
        if pin.tag is not None:
            self._cache.trust(self._key, pin.repo, pin.tag, pin.commit)

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
        """Repositories by name, by the base that the newest state's record or PEFT config names, and by its card.

        See ``Hub.search``; nothing is counted here, so the order is that of the names.
        """
        if sort not in SORTS or limit < 1:
            raise UsageError(f"a search has no order '{printable(sort)}' or no results", f"One of: {', '.join(SORTS)}")
        wanted = base_name(base) if base is not None else None
        found: list[Listing] = []
        for repo in self._store.repos():
            if text.lower() not in repo.lower() or author not in {None, repo.partition("/")[0]}:
                continue
            bases = self._bases(repo)
            listing = self._listing(repo, bases)
            if wanted not in {None, listing.base, *bases} or library not in {None, listing.library}:
                continue
            if set(tags) <= set(listing.tags):
                found.append(listing)
        return found[:limit]

    def _listing(self, repo: str, bases: Sequence[str]) -> Listing:
        stable = [each for each in self.versions(repo) if not each.version.is_prerelease]
        card = self._card(repo)
        words = {name: card[name] for name in ("library_name", "license") if isinstance(card.get(name), str)}
        tags = card.get("tags")
        return Listing(
            repo=repo,
            version=str(stable[0].version) if stable else None,
            base=bases[0] if bases else None,
            library=printable(words.get("library_name", "")),
            license=printable(words.get("license", "")),
            tags=tuple(printable(tag) for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        )

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
        """Publish a folder as one commit; see ``Hub.push``.

        A dry run refuses whatever the push would refuse.  ``@`` in ``ref`` names the branch (main by default), a
        folder after it the place within the repository; other adapters in the repository stay as they are.

        Raises:
            UsageError: a private repository or a pull request is asked for, and a folder has neither.
        """
        if create_pr:
            raise UsageError("a folder hub has no pull requests", f"Push to a branch of your own: {ref.repo}@BRANCH")
        if private:
            raise UsageError(
                "a folder hub has no private repositories: who may read its folder may read all of it",
                f"Set the permissions of the folder: chmod -R go= {shlex.quote(self.name)}",
            )
        job = self._revised(publication(folder, ref, version=version, move_tag=move_tag, given=given), readme)
        job = replace(job, files={path: replace(file, git=None) for path, file in job.files.items()})
        text = message.encode("utf-8", "replace").decode()
        plan = self._plan(job, text)
        if dry_run:
            return plan.pin(job, plan.outcome.said if plan.outcome.done else f"would be {plan.outcome.said}")
        if not plan.outcome.done:
            plan = self._write(job, text, folder, progress)
        pin = plan.pin(job, plan.outcome.said)
        self.trust(pin)  # who publishes a version knows what it is
        return pin

    def _write(self, job: Publication, text: str, folder: Path, progress: Progress | None) -> _Plan:
        """Store the files and enter the commit; what was done, which may be nothing any more."""
        done = 0
        try:
            self._store.create()
            for path, file in job.files.items():
                self._store.store(job.given.get(path, folder / path), file)
                done += file.size
                if progress is not None:
                    progress(path, done, job.size)
            with self._store.lock(job.repo):
                plan = self._plan(job, text)  # others may have pushed meanwhile
                if not plan.outcome.done:
                    self._store.write(job.repo, plan.state, plan.new)
        except OSError as error:
            raise write_failed(self._store.root, error) from None
        return plan

    def _revised(self, job: Publication, readme: Revise | None) -> Publication:
        """The publication as it is once the README that the repository has is known."""
        state = self._store.state(job.repo, missing_ok=True)
        theirs = current_readme(job, state.tags, state.branches, lambda at: self._store.commit(job.repo, at).files)
        if readme is None or theirs is None:
            return job
        commit, path, file = theirs
        with open_regular(self._store.blob(file)) as source:
            data = source.read() or b""
        verify_whole(file, data, f"{path} of {job.repo}")
        return revised(job, readme(commit, data))

    def standing(self, repo: str) -> Standing:
        """How the repository stands now; see ``Hub.standing``."""
        state = self._store.state(repo)
        says = self._card(repo)
        successor, licence = says.get("new_version"), says.get("license")
        return Standing(
            repo=repo,
            tags=state.tags,
            branches=state.branches,
            successor=successor if isinstance(successor, str) else None,
            license=licence if isinstance(licence, str) else "",
        )

    def page(self, pin: Pin) -> str:
        """No page shows a folder; see ``Hub.page``."""
        return ""

    def _plan(self, job: Publication, message: str) -> _Plan:
        """What the push would do to the repository as it is now; writes nothing.

        Raises:
            PushRefused: the version exists with other content, or names would clash.
        """
        state = self._store.state(job.repo, missing_ok=True)
        found = outcome(job, state.tags, state.branches, lambda commit: self._store.commit(job.repo, commit).files)
        new = Commit(files=found.files, message=message, parent=found.start) if found.new else None
        commit = new.id if new is not None else found.start or ""
        branches = {**state.branches, found.branch: commit} if new or found.opens else state.branches
        return _Plan(
            commit=commit,
            outcome=found,
            state=State(branches=branches, tags={**state.tags, **dict.fromkeys(found.tags, commit)}),
            new=new,
        )

    def _card(self, repo: str) -> Mapping[str, Any]:
        with suppress(NotFound, IntegrityError, UsageError):  # a repository need have no card
            pin = self._pin(Ref(repo=repo))
            return front_matter(self.read(pin, "README.md", length=_CARD_LIMIT).decode("utf-8", "replace"))
        return {}

    def _bases(self, repo: str) -> list[str]:
        """What the newest state calls its base: the record, then PEFT's config, where it may be a path."""
        found: list[str] = []
        with suppress(NotFound, IntegrityError, UsageError):  # a listing does without what it cannot read
            pin = self._pin(Ref(repo=repo))
            for path, keys in _NAMES_OF_BASES.items():
                with suppress(NotFound, IntegrityError, ValueError, RecursionError):
                    said = json.loads(self.read(pin, path, length=_CONFIG_LIMIT))
                    for key in keys:
                        said = said.get(key) if isinstance(said, dict) else None
                    found += [said] if isinstance(said, str) and said else []
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a push comes to here: the commit it ends at, the refs after it, and that commit if it is ``new``."""

    commit: str
    outcome: Outcome
    state: State
    new: Commit | None

    def pin(self, job: Publication, why: str) -> Pin:
        """The pin of the pushed adapter."""
        return job.pin(self.commit, self.outcome.files, tag=self.outcome.tag, branch=self.outcome.branch, why=why)
