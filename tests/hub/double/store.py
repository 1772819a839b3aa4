"""What the Hub holds, in memory: accounts, and repositories with their commits, tags, branches and pull requests.

Tests fill it by these methods, the routes read and change it under ``Store.lock``.  It knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from hub.double.cards import card_data
from hub.double.cas import LocalCas
from hub.double.files import Commit, File

__all__ = ["Account", "Gate", "Repo", "Store"]

Gate = Literal["auto", "manual"]

_START = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who a token belongs to; ``role`` is the token's, and "write" reaches what is the user's or the organisations'."""

    name: str
    role: Literal["read", "write"] = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether the namespace is theirs."""
        return namespace == self.name or namespace in self.orgs


@dataclass(slots=True)
class Repo:
    """A model repository.

    Attributes:
        commits: id -> commit; what is not in here is gone.
        branches, tags: name -> commit id.
        pulls: number -> commit id of ``refs/pr/N``.
        discussions: number -> title.
        gated: nobody but members and ``granted`` gets a file.
        disabled: files and writes are refused; with ``"whole"`` everything is.
        oids: sha256 of the LFS objects that this repository has.
    """

    name: str
    store: Store = field(repr=False)
    private: bool = False
    gated: Gate | Literal[False] = False
    granted: set[str] = field(default_factory=set)
    disabled: bool | Literal["whole"] = False
    downloads: int = 7
    likes: int = 0
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)
    discussions: dict[int, str] = field(default_factory=dict)
    oids: set[str] = field(default_factory=set, repr=False)

    # ------------------------------------------------------------------------------------- what tests do

    def commit(
        self,
        files: Mapping[str, bytes],
        tag: str = "",
        branch: str = "main",
        *,
        message: str = "Upload",
        author: str = "alice",
    ) -> str:
        """Commit exactly ``files`` on the branch (made if need be), tag it if asked, and give the commit's id."""
        with self.store.lock:
            tree = {path: File.of(path, data) for path, data in files.items()}
            oid = self.record(tree, parent=self.branches.get(branch), title=message, author=author)
            self.branches[branch] = oid
            if tag:
                self.tags[tag] = oid
            return oid

    def edit(self, files: Mapping[str, bytes], tag: str = "", branch: str = "main", *, message: str = "Edit") -> str:
        """As ``commit``, keeping the branch's other files."""
        with self.store.lock:
            return self.commit({**self.files(branch), **files}, tag, branch, message=message)

    def open_pull(self, files: Mapping[str, bytes], *, title: str = "Proposal", base: str = "main") -> int:
        """Open a pull request with exactly ``files``; gives its number."""
        with self.store.lock:
            tree = {path: File.of(path, data) for path, data in files.items()}
            return self.propose(self.record(tree, parent=self.branches.get(base), title=title), title)

    def gate(self, kind: Gate = "auto", *, granted: tuple[str, ...] = ()) -> Self:
        """Give files to members of the namespace and to ``granted`` users only."""
        self.gated, self.granted = kind, set(granted)
        return self

    def disable(self, *, whole: bool = False) -> Self:
        """Refuse files and writes, as for a repository that was taken down; ``whole``: also its description."""
        self.disabled = "whole" if whole else True
        return self

    def rename(self, name: str) -> Self:
        """Move to another name; the old one redirects."""
        with self.store.lock:
            self.store.move(self.name, name)
        return self

    def squash(self, branch: str = "main", *, message: str = "Squash") -> str:
        """Make the branch one commit; the ones that nothing refers to any more are gone."""
        with self.store.lock:
            tip = self.commits[self.branches[branch]]
            self.branches[branch] = self.record(tip.files, parent=None, title=message)
            self.sweep()
            return self.branches[branch]

    def forget(self, commit: str) -> None:
        """Make a commit vanish, with the refs to it."""
        with self.store.lock:
            del self.commits[commit]
            for refs in (self.branches, self.tags, self.pulls):
                for name in [name for name, oid in refs.items() if oid == commit]:
                    del refs[name]  # type: ignore[arg-type]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """path -> content at a revision; empty where there is none."""
        oid = self.find(revision)
        return {path: file.data for path, file in self.commits[oid].files.items()} if oid in self.commits else {}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        oid, found = self.find(revision), []
        while oid is not None and (commit := self.commits.get(oid)) is not None:
            found.append(commit)
            oid = commit.parent
        return found

    # ------------------------------------------------------------------------------------ what routes do

    @property
    def namespace(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, commit id or full ref comes to, or None."""
        kinds: Mapping[str, Mapping[str, str]] = {
            "refs/heads/": self.branches,
            "refs/tags/": self.tags,
            "refs/pr/": {str(number): oid for number, oid in self.pulls.items()},
        }
        for prefix, refs in kinds.items():
            if revision.startswith(prefix):
                return refs.get(revision.removeprefix(prefix))
        return revision if revision in self.commits else self.branches.get(revision) or self.tags.get(revision)

    def record(
        self, files: Mapping[str, File], *, parent: str | None, title: str, message: str = "", author: str = "alice"
    ) -> str:
        """Keep a commit that no ref names yet; gives its id."""
        number = next(self.store.numbers)
        files = {path: self._kept(file) for path, file in sorted(files.items())}
        lines = "".join(f"{path} {files[path].oid}\n" for path in files)
        oid = hashlib.sha1(f"{parent}\n{number}\n{title}\n{lines}".encode()).hexdigest()
        self.commits[oid] = Commit(
            oid=oid,
            parent=parent,
            title=title,
            message=message,
            author=author,
            date=_START + timedelta(minutes=number),
            files=files,
        )
        return oid

    def _kept(self, file: File) -> File:
        """The file, with what is beside git put there."""
        if file.lfs:
            self.oids.add(file.sha256)
            self.store.objects[file.sha256] = file.data
            if self.store.cas is not None and file.xet is None:
                return replace(file, xet=self.store.cas.find(file.sha256) or self.store.cas.keep(file.data))
        return file

    def propose(self, oid: str, title: str) -> int:
        """Open a pull request at a commit; gives its number."""
        number = len(self.discussions) + 1
        self.discussions[number] = title
        self.pulls[number] = oid
        return number

    def sweep(self) -> None:
        """Drop the commits that no ref reaches."""
        kept = {
            commit.oid
            for ref in [*self.branches.values(), *self.tags.values(), *self.pulls.values()]
            for commit in self.history(ref)
        }
        for oid in self.commits.keys() - kept:
            del self.commits[oid]

    def head(self) -> Commit | None:
        """The tip of main."""
        return self.commits.get(self.branches.get("main", ""))

    def card(self, commit: Commit | None) -> dict[str, Any]:
        """What the card of a commit says; nothing where it says nothing legible."""
        readme = commit.files.get("README.md") if commit else None
        try:
            return card_data(readme.data) if readme else {}
        except ValueError:
            return {}


@dataclass(slots=True)
class Store:
    """Everything on the Hub.

    Attributes:
        lock: held while anything is read or changed, so that comparing a parent and committing is one step.
        objects: sha256 -> content of every LFS object of any repository.
        moved: old name -> new one.
        cas: where Xet stores, or None for a Hub without it.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    accounts: dict[str, Account] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    cas: LocalCas | None = None

    def repo(self, name: str, *, private: bool = False) -> Repo:
        """The repository of that name, made (and still without a commit) if there is none."""
        with self.lock:
            if name not in self.repos:
                self.repos[name] = Repo(name, self, private=private)
                self.moved.pop(name, None)
            return self.repos[name]

    def move(self, old: str, new: str) -> None:
        """Rename a repository."""
        repo = self.repos.pop(old)
        self.moved = {name: new if to == old else to for name, to in self.moved.items()} | {old: new}
        self.moved.pop(new, None)
        repo.name = new
        self.repos[new] = repo
