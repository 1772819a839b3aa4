"""What a push comes to, worked out before anything is written: shared by every hub, and knowing none.

A publication is a folder that may be published, by content, and where it is meant to go.  Its outcome, in a repository
as it is now, says which files the repository holds afterwards, whether that takes a commit, and which tags it takes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from packaging.version import InvalidVersion, Version

from lorahub.errors import IntegrityError, NotFound, PushRefused, UsageError
from lorahub.files.raw import CHUNK
from lorahub.hub.contents import collisions, secret_in, survey
from lorahub.hub.hub import FilePin, Pin
from lorahub.hub.selection import adapter_folders, select_adapter
from lorahub.hub.versions import VersionTag, version_tags
from lorahub.names import Ref, Selector, printable

__all__ = [
    "DEFAULT_BRANCH",
    "Listing",
    "Outcome",
    "Publication",
    "agree",
    "branch_of",
    "changed",
    "content_of",
    "current_readme",
    "differing",
    "open_unlinked",
    "outcome",
    "publication",
    "repo_of",
    "revised",
]

DEFAULT_BRANCH = "main"
_OFF = frozenset({"", "0", "no", "false", "off"})
_README = "README.md"
_LARGEST_README = 4 << 20

Listing: TypeAlias = Mapping[str, FilePin]
"""Every file of a commit: path -> content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A folder that may be published, and where it is meant to go.

    Attributes:
        folder: where the files lie.
        given: path -> content that counts in place of what lies there, or beside it.
        files: path -> content, of all that is published.
        repo, branch, subpath: where to.
        tag: the version's tag, or None.
        move_tag: whether the version may come to mean other content than it does.
    """

    folder: Path
    given: Mapping[str, bytes]
    files: Listing
    repo: str
    branch: str
    subpath: str
    tag: str | None
    move_tag: bool = False

    @property
    def size(self) -> int:
        """Bytes over all files."""
        return sum(file.size for file in self.files.values())

    def at(self, path: str) -> str:
        """Where a file of the folder comes to lie within the repository."""
        return f"{self.subpath}/{path}" if self.subpath else path

    def read(self, path: str) -> bytes:
        """The content of one file, which is still what was hashed.

        Raises:
            IntegrityError: it changed.
        """
        data = self.given.get(path)
        if data is None:
            data = _read_unlinked(self.folder / path)
        if not agree(content_of(data), self.files[path]):
            raise changed(self.folder / path)
        return data

    def pin(self, commit: str, files: Listing, *, tag: str | None, branch: str, why: str) -> Pin:
        """The pin of the published adapter: what a pull of it gives.

        Args:
            commit: where it is.
            files: every file of that commit.
            tag: the version's tag there.
            branch: the branch or pull request.
            why: what was done.
        """
        ours = {self.at(path): file for path, file in self.files.items()}  # by both hashes, where a hub lists one
        chosen = select_adapter({**files, **ours}, self.subpath, repo=self.repo)
        return Pin(
            repo=self.repo,
            commit=commit,
            subfolder=self.subpath,
            tag=tag,
            branch=branch,
            version=str(Version(tag)) if tag else None,
            why=why,
            files=chosen.files,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a push comes to in a repository as it is now.

    Attributes:
        start: the commit it builds on, or, where nothing is ``new``, the one that has the content; None: it is empty.
        new: whether it takes a commit.
        opens: whether the branch has to be made.
        files: every file of the repository afterwards.
        deleted: what is gone then, sorted.
        tags: tags to set at the commit -> where they point now, or None.
        tag: what the version is called.
        branch: where the commit is.
        what: what was done once it is done, as "published as v1.0.0".
    """

    start: str | None
    new: bool
    opens: bool
    files: Listing
    deleted: tuple[str, ...]
    tags: Mapping[str, str | None]
    tag: str | None
    branch: str
    what: str

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.new or self.opens or self.tags)

    @property
    def said(self) -> str:
        """``what``, with the word that tells a push that had nothing to do."""
        return f"already {self.what}" if self.done else self.what


# ------------------------------------------------------------------------------------------------ the publication


def publication(
    folder: Path,
    ref: Ref,
    *,
    version: str | None,
    move_tag: bool = False,
    given: Mapping[str, bytes] | None = None,
) -> Publication:
    """The folder, looked at and hashed, with every reason not to publish it raised at once; asks no hub.

    Raises:
        PushRefused: publishing is switched off, the folder holds what must not be published, or it is no adapter.
        UsageError: ``ref`` names no repository or no branch, or ``version`` is none that can be published.
        IntegrityError: a file changed while it was read.
    """
    repo, branch, tag = repo_of(ref), branch_of(ref), _tag_of(version)
    if move_tag and tag is None:
        raise UsageError("there is no version whose tag could be moved", "Name it: --version 1.0.0")
    if os.environ.get("LORAHUB_DISABLE_PUSH", "").lower() not in _OFF:
        raise PushRefused("publishing is switched off by LORAHUB_DISABLE_PUSH", "Unset it to publish.")
    given = dict(given or {})
    _test_secrets(given)
    found = survey(folder)
    found.demand()
    files = {path: content_of(folder / path) for path in found.files if path not in given}
    files |= {path: content_of(data) for path, data in given.items()}
    try:
        select_adapter(files, "", repo="the folder")
    except NotFound as error:
        raise PushRefused(error.message, f"Push each by itself: {repo}/FOLDER") from None
    return Publication(
        folder=folder,
        given=given,
        files=dict(sorted(files.items())),
        repo=repo,
        branch=branch,
        subpath=ref.subpath,
        tag=tag,
        move_tag=move_tag,
    )


def _test_secrets(given: Mapping[str, bytes]) -> None:
    if leak := sorted(path for path, data in given.items() if secret_in(data)):
        raise PushRefused(f"{', '.join(leak)} would hold an access token or private key", "Remove it from its sources.")


def current_readme(
    job: Publication, tags: Mapping[str, str], branches: Mapping[str, str], listing: Callable[[str], Listing]
) -> tuple[str, str, FilePin] | None:
    """The README of a repository, where it has one that is not the one to be published: (commit, path, content).

    It is that of the version if that exists already and is to stay, else that of the branch.
    """
    taken = [] if job.move_tag else _taken(job, tags)
    commit = taken[0].commit if taken else branches.get(job.branch) or branches.get(DEFAULT_BRANCH)
    path = job.at(_README)
    found = listing(commit).get(path) if commit else None
    if commit is None or found is None or found.size > _LARGEST_README or agree(found, job.files.get(_README)):
        return None
    return commit, path, found


def revised(job: Publication, given: Mapping[str, bytes]) -> Publication:
    """The publication with other content for some of its files.

    Raises:
        PushRefused: that content holds a token or a key.
    """
    _test_secrets(given)
    files = {**job.files, **{path: content_of(data) for path, data in given.items()}}
    return replace(job, given={**job.given, **given}, files=dict(sorted(files.items())))


def repo_of(ref: Ref) -> str:
    """The repository that ``ref`` names.

    Raises:
        UsageError: it names none, or one without a namespace.
    """
    if ref.repo is None or "/" not in ref.repo:
        raise UsageError(f"{ref} is not in a hub", "Name a repository: namespace/name")
    return ref.repo


def branch_of(ref: Ref) -> str:
    """The branch that ``ref`` names to push to.

    Raises:
        UsageError: it names a version or a commit, which are no branches.
    """
    if ref.selector is None:
        return DEFAULT_BRANCH
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


# ---------------------------------------------------------------------------------------------------- the outcome


def outcome(
    job: Publication, tags: Mapping[str, str], branches: Mapping[str, str], listing: Callable[[str], Listing]
) -> Outcome:
    """What the push comes to where the repository has these refs (name -> commit); ``listing`` gives a commit's files.

    Raises:
        PushRefused: the version exists with other content, or names would clash.
    """
    taken = _taken(job, tags)
    if taken:
        before = listing(taken[0].commit)
        after = _over(job, before)
        others = differing(before, after)
        if not others:
            opens = job.branch not in branches
            return Outcome(
                start=taken[0].commit,
                new=False,
                opens=opens,
                files=before,
                deleted=(),
                tags={},
                tag=taken[0].tag,
                branch=job.branch,
                what=f"published as {taken[0].tag}" + (f", on a new branch {job.branch}" if opens else ""),
            )
        if not job.move_tag:
            spelled = taken[0].tag.removeprefix("v")
            same = "" if taken[0].tag == job.tag else f"It is the same version: say --version {printable(spelled)}. "
            raise PushRefused(
                f"{job.repo} has {printable(taken[0].tag)} already, and it differs in {_few(others)}",
                f"{same}A published version never changes: push under the next version, or say --move-tag.",
            )
    head = branches.get(job.branch)
    start = head or branches.get(DEFAULT_BRANCH)
    old = listing(start) if start else {}
    files = _over(job, old)
    known = set(collisions(old))
    if clash := [pair for pair in collisions(files) if pair not in known]:
        raise PushRefused(f"{job.repo} would hold names that clash: {'; '.join(map(printable, clash[:5]))}")
    new = start is None or bool(differing(old, files))
    tag, wanted = _wanted(job, taken, tags)
    return Outcome(
        start=start,
        new=new,
        opens=head is None,
        files=files,
        deleted=tuple(sorted(old.keys() - files.keys())),
        tags={name: at for name, at in wanted.items() if new or at != start},
        tag=tag,
        branch=job.branch,
        what=f"published as {tag}" if tag else f"published on branch {job.branch}",
    )


def _taken(job: Publication, tags: Mapping[str, str]) -> list[VersionTag]:
    """The tags that mean the version already."""
    return [each for each in version_tags(tags) if job.tag is not None and each.version == Version(job.tag)]


def _wanted(
    job: Publication, taken: list[VersionTag], tags: Mapping[str, str]
) -> tuple[str | None, dict[str, str | None]]:
    """What the version is called, and every tag that has to say so: both spellings of one that has two."""
    if job.tag is None:
        return None, {}
    if not taken:
        return job.tag, {job.tag: None}
    plain = taken[0].tag.removeprefix("v")
    return taken[0].tag, {each.tag: tags[each.tag] for each in taken if each.tag.removeprefix("v") == plain}


def _over(job: Publication, old: Listing) -> dict[str, FilePin]:
    """The repository's files with the pushed adapters in place of what they were; others stay.

    So does a README that was written on the hub, where the folder has none.
    """
    replaced: set[str] = set()
    for folder in {"", *adapter_folders(job.files)}:
        place = "/".join(filter(None, [job.subpath, folder]))
        with suppress(NotFound):  # a new one replaces nothing
            chosen = select_adapter(old, place, repo=job.repo).files
            kept = {path for path in chosen if path.lower() == "readme.md"}
            replaced |= {f"{place}/{path}" if place else path for path in chosen.keys() - kept}
    placed = {job.at(path): file for path, file in job.files.items()}
    return dict(sorted({**{path: file for path, file in old.items() if path not in replaced}, **placed}.items()))


def differing(one: Listing, other: Listing) -> list[str]:
    """The paths whose content is not the same in both listings, sorted."""
    return sorted(path for path in {*one, *other} if not agree(one.get(path), other.get(path)))


def agree(one: FilePin | None, other: FilePin | None) -> bool:
    """Whether two files are known to be the same: a hash that both state is equal, and so is every other one."""
    if one is None or other is None or not one.agrees(other):
        return False
    return (one.sha256 is not None and other.sha256 is not None) or (one.git is not None and other.git is not None)


def _few(paths: Iterable[str]) -> str:
    shown = list(paths)
    return ", ".join(map(printable, shown[:5])) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


# -------------------------------------------------------------------------------------------------------- content


def content_of(source: Path | bytes) -> FilePin:
    """The content by both of its names: sha256, and git's id of it.  A file that became a link is not followed.

    Raises:
        IntegrityError: the file is a link, or changed while it was read.
    """
    if isinstance(source, bytes):
        size, chunks = len(source), iter([source])
        return _pinned(chunks, size)
    with open_unlinked(source) as file:
        size = os.fstat(file.fileno()).st_size
        found = _pinned(iter(lambda: file.read(CHUNK), b""), size)
        if file.tell() != size:
            raise changed(source)
    return found


def _pinned(chunks: Iterable[bytes], size: int) -> FilePin:
    sha = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        sha.update(chunk)
        git.update(chunk)
    return FilePin(size=size, sha256=sha.hexdigest(), git=git.hexdigest())


def _read_unlinked(path: Path) -> bytes:
    with open_unlinked(path) as file:
        return file.read()


def open_unlinked(path: Path) -> io.BufferedReader:
    """Open a file that must not have become a link since it was looked at.

    Raises:
        IntegrityError: it did, or is gone.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise changed(path) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise changed(path) from None
        raise


def changed(path: Path) -> IntegrityError:
    """The error for a file that is not what it was when it was looked at."""
    return IntegrityError(f"{path} changed while it was pushed; nothing was published", "Push again.")
