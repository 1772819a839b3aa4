"""The embedded hub: a folder with versions, for one person, a team on a shared disk, or a test.  Needs no network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from lorahub.errors import DigestMismatch, IntegrityError, NotFound, PushRefused, UsageError
from lorahub.files.atomic import write_failed
from lorahub.files.digest import file_digest
from lorahub.files.raw import CHUNK, open_regular, read_into
from lorahub.hub.cache import Cache
from lorahub.hub.contents import collisions, survey
from lorahub.hub.folder_store import Commit, FolderStore, State
from lorahub.hub.hub import FilePin, Listing, Pin, Progress, Span, Taken
from lorahub.hub.ranges import coalesce, cut, verify_whole
from lorahub.hub.selection import adapter_folders, select_adapter
from lorahub.hub.versions import VersionTag, pick, version_tags
from lorahub.names import Ref, Selector, did_you_mean, printable

__all__ = ["FolderHub"]

_DEFAULT_BRANCH = "main"
_CONFIG_LIMIT = 1 << 20


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

    def resolve(self, ref: Ref) -> Pin:
        """The exact state that ``ref`` means now; see ``Hub.resolve``."""
        repo = _repo_of(ref)
        state = self._store.state(repo)
        selector = Selector.parse(ref.selector) if ref.selector is not None else None
        picked = pick(selector, state.tags, state.branches, _DEFAULT_BRANCH, repo=repo)
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
        key = f"folder-{hashlib.sha256(self.name.encode()).hexdigest()[:12]}"
        if (folder := self._cache.folder(key, pin)) is not None:
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

        return self._cache.fill(key, pin, fetch)

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

    def search(self, text: str = "", *, base: str | None = None, limit: int = 20) -> list[Listing]:
        """Repositories by name, and by the base that the newest state's PEFT config names; see ``Hub.search``."""
        found: list[Listing] = []
        for repo in self._store.repos():
            if text.lower() not in repo.lower() or len(found) >= limit:
                continue
            stable = [each for each in self.versions(repo) if not each.version.is_prerelease]
            says = self._base(repo)
            if base is None or says == base:
                found.append(Listing(repo=repo, version=str(stable[0].version) if stable else None, base=says))
        return found

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
        """Publish a folder as one commit; see ``Hub.push``.

        A dry run refuses whatever the push would refuse.  ``@`` in ``ref`` names the branch (main by default), a
        folder after it the place within the repository; other adapters in the repository stay as they are.
        """
        repo, branch, tag = _repo_of(ref), _branch_of(ref), _tag_of(version)
        if os.environ.get("LORAHUB_DISABLE_PUSH", "").lower() not in {"", "0", "no", "false", "off"}:
            raise PushRefused("publishing is switched off by LORAHUB_DISABLE_PUSH", "Unset it to publish.")
        found = survey(folder)
        found.demand()
        text = message.encode("utf-8", "replace").decode()
        job = _Job(self._store, repo, branch, tag, ref.subpath, {p: _hash(folder / p) for p in found.files}, text)
        made = job.adapter()
        plan = job.plan()
        if plan.done or dry_run:
            return job.pin(made, plan, plan.what if plan.done else f"would be {plan.what}")
        total, done = sum(file.size for file in job.files.values()), 0
        try:
            self._store.create()
            for path, file in job.files.items():
                self._store.store(folder / path, file)
                done += file.size
                if progress is not None:
                    progress(path, done, total)
            with self._store.lock(repo):
                plan = job.plan()  # others may have pushed meanwhile
                if not plan.done:
                    self._store.write(repo, plan.state, plan.new)
        except OSError as error:
            raise write_failed(self._store.root, error) from None
        return job.pin(made, plan, plan.what)

    def _base(self, repo: str) -> str | None:
        with suppress(NotFound, IntegrityError, UsageError, ValueError):  # a listing does without what it cannot read
            pin = self.resolve(Ref(repo=repo))
            config = json.loads(self.read(pin, "adapter_config.json", length=_CONFIG_LIMIT))
            base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
            return base if isinstance(base, str) else None
        return None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a push comes to: the refs after it, the commit they point at, and that commit if it is ``new``."""

    commit: str
    tag: str | None
    what: str
    state: State
    new: Commit | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be pushed where."""

    store: FolderStore
    repo: str
    branch: str
    tag: str | None
    subpath: str
    files: Mapping[str, FilePin]
    message: str

    def plan(self) -> _Plan:
        """What the push would do to the repository as it is now; writes nothing.

        Raises:
            PushRefused: the version exists with other content, or the folder is no adapter itself.
        """
        state = self.store.state(self.repo, missing_ok=True)
        if self.tag is not None:
            taken = [each for each in version_tags(state.tags) if each.version == Version(self.tag)]
            if taken:
                return self._published(taken[0], state)
        head = state.branches.get(self.branch) or state.branches.get(_DEFAULT_BRANCH)
        old = self.store.commit(self.repo, head).files if head else {}
        files = self._over(old)
        if clash := collisions(files):
            raise PushRefused(f"{self.repo} would hold names that clash: {'; '.join(map(printable, clash[:5]))}")
        new = Commit(files=files, message=self.message, parent=head) if files != old or head is None else None
        commit = new.id if new is not None else head or ""
        branches, tags = {**state.branches, self.branch: commit}, dict(state.tags)
        what = f"published on branch {self.branch}"
        if self.tag is not None:
            tags[self.tag] = commit
            what = f"published as {self.tag}"
        after = State(branches=branches, tags=tags)
        done = after == state
        return _Plan(commit, self.tag, f"already {what}" if done else what, after, new, done)

    def _published(self, old: VersionTag, state: State) -> _Plan:
        before = self.store.commit(self.repo, old.commit).files
        after = self._over(before)
        if changed := sorted(path for path in {*before, *after} if before.get(path) != after.get(path)):
            raise PushRefused(
                f"{self.repo} has {old.tag} already, and it differs in {', '.join(map(printable, changed[:5]))}",
                "A published version never changes: push under the next version.",
            )
        return _Plan(old.commit, old.tag, f"already published as {old.tag}", state, done=True)

    def _over(self, old: Mapping[str, FilePin]) -> dict[str, FilePin]:
        """The repository's files with the pushed adapters in place of what they were; others stay."""
        replaced: set[str] = set()
        for folder in {"", *adapter_folders(self.files)}:
            place = "/".join(filter(None, [self.subpath, folder]))
            with suppress(NotFound):  # a new one replaces nothing
                chosen = select_adapter(old, place, repo=self.repo)
                replaced |= {f"{place}/{path}" if place else path for path in chosen.files}
        placed = {f"{self.subpath}/{path}" if self.subpath else path: file for path, file in self.files.items()}
        return dict(sorted({**{path: old[path] for path in old.keys() - replaced}, **placed}.items()))

    def adapter(self) -> Mapping[str, FilePin]:
        """The files that a pull of the pushed folder gives.

        Raises:
            PushRefused: the folder is no adapter itself, only holds some.
        """
        try:
            return select_adapter(self.files, "", repo="the folder").files
        except NotFound as error:
            raise PushRefused(error.message, f"Push each by itself: {self.repo}/FOLDER") from None

    def pin(self, adapter: Mapping[str, FilePin], plan: _Plan, why: str) -> Pin:
        """The pin of the pushed adapter."""
        return Pin(
            repo=self.repo,
            commit=plan.commit,
            subfolder=self.subpath,
            tag=plan.tag,
            branch=self.branch,
            version=str(Version(plan.tag)) if plan.tag else None,
            why=why,
            files=adapter,
        )


def _repo_of(ref: Ref) -> str:
    if ref.repo is None or "/" not in ref.repo:
        raise UsageError(f"{ref} is not in a hub", "Name a repository: namespace/name")
    return ref.repo


def _branch_of(ref: Ref) -> str:
    if ref.selector is None:
        return _DEFAULT_BRANCH
    selector = Selector.parse(ref.selector)
    branch = selector.text.removeprefix("refs/heads/")
    if selector.kind != "name" and branch == selector.text:
        raise UsageError(f"'@{ref.selector}' is no branch to push to", f"For a version: --version {ref.selector}")
    return branch


def _tag_of(version: str | None) -> str | None:
    if version is None:
        return None
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise UsageError(f"'{printable(version)}' is not a version", "Versions look like 1.2.0 or 2.0rc1.") from None
    if parsed.local or parsed.epoch:
        raise UsageError(f"'{version}' cannot be published: no epoch, no local part", "Versions look like 1.2.0.")
    return f"v{parsed}"


def _hash(path: Path) -> FilePin:
    sha256, size = file_digest(path)
    return FilePin(size=size, sha256=sha256)
