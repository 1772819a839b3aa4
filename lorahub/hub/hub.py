"""What a hub is, and the pin: the exact state of an adapter folder that a reference came to.

A hub moves folders; it does not know what an adapter is.  A pin names a commit and every file in it by content, so
that the same pin gives the same bytes from any hub, or none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias, get_args

from lorahub.errors import InvalidRef, LorahubError, RecordError, UnsafePath
from lorahub.findings import Finding
from lorahub.hub.contents import is_behaviour, is_safetensors
from lorahub.hub.versions import VersionTag
from lorahub.names import COMMIT, Ref, check_path, printable

__all__ = [
    "SORTS",
    "FilePin",
    "Holds",
    "Hub",
    "Listing",
    "Pin",
    "Progress",
    "Revise",
    "Span",
    "Standing",
    "Taken",
    "digest_of",
]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called while bytes move: (file, bytes so far over all files, bytes in all)."""

Revise: TypeAlias = Callable[[str, bytes], Mapping[str, bytes]]
"""Called with the commit and the content of a file there; what is to be published instead: path -> content."""

Span: TypeAlias = tuple[int, int]
"""Bytes of a file: (offset, how many)."""

Holds: TypeAlias = Literal["adapter", "base"]

SORTS = ("downloads", "likes", "updated", "created")
"""Orders of what a search finds."""

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePin:
    """One file by content.

    Attributes:
        size: bytes.
        sha256: 64 hex digits, or None where the hub lists only the other hash until the file was pulled.
        git: git's id of the content, 40 hex digits, or None.
    """

    size: int
    sha256: str | None = None
    git: str | None = None

    def __post_init__(self) -> None:
        hashes = [(self.sha256, _SHA256), (self.git, COMMIT)]
        wrong = [value for value, shape in hashes if value is not None and not shape.fullmatch(value)]
        if wrong or self.size < 0 or (self.sha256 is None and self.git is None):
            raise RecordError("a pinned file needs a size and a sha256 of 64 hex digits (or git's id of 40)")

    def agrees(self, other: FilePin) -> bool:
        """Whether both may be the same content: no value that both state differs."""
        pairs = [(self.size, other.size), (self.sha256, other.sha256), (self.git, other.git)]
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def digest_of(files: Mapping[str, FilePin]) -> str:
    """``sha256:`` over lines ``sha256 size path``, sorted by the bytes of the path.

    Raises:
        LorahubError: the sha256 of a file is not known yet.
    """
    sha = hashlib.sha256()
    for path in sorted(files, key=str.encode):
        if files[path].sha256 is None:
            raise LorahubError(f"the sha256 of {printable(path)} is known only once it is pulled", "Pull first.")
        sha.update(f"{files[path].sha256} {files[path].size} {path}\n".encode())
    return f"sha256:{sha.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The exact state a reference came to.

    Attributes:
        repo: "ns/name".
        commit: 40 hex digits.
        subfolder: the adapter's folder within the repository, or "".
        file: the one weight file that was asked for, or "" for all of them.
        requested: the selector as written, or None.
        tag, branch, version: what the selector came to, where it came to one.
        why: how that was decided, or what a push did; for people.
        files: path within the adapter's folder -> content, sorted by path.
        holds: an adapter or a base.
        said: what resolving noticed, such as a version tag that points elsewhere now; part of no document.
    """

    repo: str
    commit: str
    subfolder: str = ""
    file: str = ""
    requested: str | None = None
    tag: str | None = None
    branch: str | None = None
    version: str | None = None
    why: str = ""
    files: Mapping[str, FilePin] = field(default_factory=dict)
    holds: Holds = "adapter"
    said: tuple[Finding, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not COMMIT.fullmatch(self.commit):
            raise RecordError(f"'{printable(self.commit)}' is not a commit of 40 hex digits")
        try:
            Ref(repo=self.repo)
            for path in [*self.files, *filter(None, [self.subfolder, self.file])]:
                check_path(path)
        except (InvalidRef, UnsafePath) as error:
            raise RecordError(f"a pin of {printable(self.repo)} is not valid: {error.message}") from None
        object.__setattr__(self, "files", dict(sorted(self.files.items())))

    def __str__(self) -> str:
        place = f"{self.repo}@{self.tag or self.commit[:12]}"
        return f"{place}/{self.path}" if self.path else place

    @property
    def path(self) -> str:
        """The folder or file within the repository that was asked for, or ""."""
        return "/".join(filter(None, [self.subfolder, self.file]))

    @property
    def size(self) -> int:
        """Bytes over all files."""
        return sum(file.size for file in self.files.values())

    def at(self, path: str) -> str:
        """Where a file of the pin lies within the repository."""
        return f"{self.subfolder}/{path}" if self.subfolder else path

    def digest(self) -> str:
        """``digest_of`` an adapter's behaviour files, or of a base's weights: a changed README is not a new adapter.

        Raises:
            LorahubError: the sha256 of one is not known before it is pulled.
        """
        counts = is_behaviour if self.holds == "adapter" else is_safetensors
        return digest_of({path: file for path, file in self.files.items() if counts(path)})

    def with_files(self, files: Mapping[str, FilePin]) -> Self:
        """The same pin with other file entries, for when a pull has learnt their sha256."""
        return replace(self, files=files)

    def document(self) -> dict[str, Any]:
        """The pin as JSON-ready values; absent values are left out."""
        plain = {name: getattr(self, name) for name in _TEXTS if getattr(self, name)}
        return plain | {
            "files": {
                path: {name: value for name in ("size", "sha256", "git") if (value := getattr(file, name)) is not None}
                for path, file in self.files.items()
            }
        }

    def dumps(self) -> str:
        """The pin as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.document(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The pin that ``document`` gave.

        Raises:
            RecordError: it is none, or holds what no pin may (a hostile path, a hash of the wrong shape).
        """
        if not isinstance(data, dict) or not data.keys() <= {*_TEXTS, "files"}:
            raise RecordError("this is not a pin: an object with repo, commit and files is expected")
        files, texts = data.get("files"), {name: data[name] for name in data if name != "files"}
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise RecordError("this is not a pin: files must be an object, everything else text")
        if not {"repo", "commit"} <= texts.keys() or texts.get("holds", "adapter") not in get_args(Holds):
            raise RecordError("this is not a pin: repo and commit are missing, or what it holds is unknown")
        return cls(files={path: _file_from_json(file) for path, file in files.items()}, **texts)

    @classmethod
    def loads(cls, text: str) -> Self:
        """``from_json`` of JSON text.

        Raises:
            RecordError: as ``from_json``.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise RecordError("this is not a pin: it is not JSON") from None
        return cls.from_json(data)


_TEXTS = ("repo", "commit", "subfolder", "file", "requested", "tag", "branch", "version", "why", "holds")


def _file_from_json(data: object) -> FilePin:
    shapes = {"size": int, "sha256": str, "git": str}
    if not isinstance(data, dict) or not all(name in shapes and type(data[name]) is shapes[name] for name in data):
        raise RecordError("a pinned file is an object with size, sha256 and git")
    return FilePin(**{"size": -1, **data})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One repository that a search found; what the hub does not say is empty, or None.

    Attributes:
        repo: "ns/name".
        version: its newest stable version, where the hub can say without asking again.
        base: the base it says it is for, or None.
        downloads, likes: how many; downloads of the last month.
        updated: the day, as "2026-04-01".
        library, license: by their names on the hub.
        tags: as there.
        gated: its files are only for those whom its authors let in.
    """

    repo: str
    version: str | None = None
    base: str | None = None
    downloads: int | None = None
    likes: int | None = None
    updated: str = ""
    library: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a repository stands on its hub now.

    Attributes:
        repo: what it is called now: another name than was asked for where it was renamed.
        tags, branches: name -> commit.
        private, gated, disabled: as the hub says.
        successor: the repository that its card names as the newer one, or None.
        license: what its card says, or "".
    """

    repo: str
    tags: Mapping[str, str]
    branches: Mapping[str, str]
    private: bool = False
    gated: bool = False
    disabled: bool = False
    successor: str | None = None
    license: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Parts of a file, and what they cost.

    Attributes:
        parts: the bytes of each span, in the order asked for.
        nbytes: how many came from the hub, what lies between two parts included.
        requests: how many reads of the hub that took; 0 where all of it was here.
    """

    parts: tuple[bytes, ...]
    nbytes: int = 0
    requests: int = 0


class Hub(Protocol):
    """Where adapter folders are kept under names, versions and commits."""

    @property
    def name(self) -> str:
        """What people call it: "huggingface.co", or the folder it lies in."""

    def resolve(self, ref: Ref) -> Pin:
        """The exact state that ``ref`` means now.

        What is noticed on the way stands in ``said``: ``tag-moved`` (a version is another commit than it was known to
        be, which callers refuse unless it is allowed), ``repo-renamed``, ``superseded``.

        Raises:
            NotFound: no such repository, version, folder or file.
            AccessDenied, Offline, Unavailable: it cannot be had from here.
            UsageError: ``ref`` is a local path.
            IntegrityError: the hub lists what cannot be true or must not be pulled.
        """

    def pull(self, pin: Pin, *, progress: Progress | None = None) -> Path:
        """The folder with exactly the pinned files, each verified; one that was pulled before costs no request.

        Raises:
            DigestMismatch: a file is not what the pin says; nothing usable is left.
            WriteFailed: the cache cannot be written.
            NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        """

    def read(self, pin: Pin, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one pinned file without pulling it, for headers; they are not verified.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        """

    def read_many(self, pin: Pin, path: str, spans: Sequence[Span]) -> Taken:
        """Parts of one pinned file without pulling it, close ones together; kept, so that none is asked for twice.

        A file taken whole is verified, its parts are not.

        Raises:
            DigestMismatch: the whole file is not what the pin says.
            IntegrityError: fewer bytes come than were asked for.
            NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
        """

    def forget(self, pin: Pin, path: str) -> None:
        """Drop the parts of a file that ``read_many`` kept, since they make no sense: the next look asks again."""

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
        """Publish a folder as one commit, tagged ``v<version>`` if a version is given; ``why`` says what was done.

        The same content under the same version again changes nothing.

        Args:
            folder: what to publish.
            ref: the repository, with ``@branch`` and a folder within it where those are meant.
            version: as "1.2.0".
            message: of the commit.
            dry_run: refuse what the push would refuse, and write nothing.
            private: create the repository private where it does not exist yet.
            create_pr: propose the commit as a pull request, tagging nothing.
            move_tag: let the version mean the new content where it exists with other content.
            given: path -> content that is published in place of what lies there, or beside it.
            readme: called before anything is written where the repository has a README.md that is not the one that
                would be published; of the version if that exists already, else of the branch.
            progress: called while bytes move.

        Raises:
            PushRefused: the folder holds what must not be published, the version exists with other content, or
                publishing is switched off; nothing was written.
            WriteFailed, AccessDenied, Unavailable: the hub cannot be written.
        """

    def page(self, pin: Pin) -> str:
        """The address under which people look at it, or "" where there is none."""

    def standing(self, repo: str) -> Standing:
        """How the repository stands now, in two requests.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable: the repository cannot be had from here.
        """

    def trust(self, pin: Pin) -> None:
        """From now on the version of ``pin`` means its commit: whoever saw ``tag-moved`` accepts it."""

    def versions(self, repo: str) -> list[VersionTag]:
        """The published versions, newest first.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable: the repository cannot be had from here.
        """

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
        """Repositories of adapters that fulfil all that is given.

        Args:
            text: part of the name.
            base: that they say they are for; ``@COMMIT`` behind it is left out.
            author: the namespace.
            library: as "peft" or "diffusers".
            tags: all of them.
            sort: one of ``SORTS``, most or newest first, as far as the hub knows.
            limit: how many at most.

        Raises:
            UsageError: there is no such order, or ``base`` is a path.
            AccessDenied, Offline, Unavailable: the hub cannot be asked.
        """
