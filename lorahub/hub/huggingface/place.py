"""The repository that a push goes to, as it is now: what it holds, who may write there, what one request does to it.

Everything is read anew but the files of a commit, which cannot change.  Knows what a push is to come to, and not how.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from huggingface_hub import HfApi, hf_hub_url

from lorahub.errors import AccessDenied, NotFound, PushRefused
from lorahub.hub.cache import Refs
from lorahub.hub.hub import FilePin
from lorahub.hub.huggingface.client import HubClient
from lorahub.hub.huggingface.describing import describe, list_refs
from lorahub.hub.huggingface.download import patiently, read_range
from lorahub.hub.huggingface.people import Said, Who, last_commits
from lorahub.hub.huggingface.upload import Trouble, trouble
from lorahub.hub.publication import Listing, Outcome, Publication, differing, outcome
from lorahub.hub.ranges import verify_whole
from lorahub.names import printable

__all__ = ["PAUSES", "Place", "wait"]

PAUSES: tuple[float, ...] = (1.0, 3.0, 9.0)
"""Seconds before each further try of a write that has certainly not happened."""


def wait(found: Trouble | None, pause: float) -> None:
    """Wait before another try: as long as the hub asked for, or ``pause`` seconds."""
    time.sleep((found.delay if found is not None else None) or pause)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where ``job`` goes.

    Attributes:
        api, client: the hub.
        job: what is published.
        who: whose token it is.
        private: everybody else is to be kept out.
        create_pr: it is only proposed.
        listings: the files of the commits that were looked at.
    """

    api: HfApi
    client: HubClient
    job: Publication
    who: Who
    private: bool
    create_pr: bool
    listings: dict[str, Listing]

    # ----------------------------------------------------------------------------------------------- reading

    def refs(self) -> Refs:
        """The refs as they are.

        Raises:
            NotFound: there is no such repository, or none that this token may see.
            PushRefused: it has another name now.
        """
        refs, name = list_refs(self.client, self.job.repo, pulls=self.create_pr)
        self._test_name(name)
        return refs

    def listing(self, commit: str) -> Listing:
        """Every file of a commit, asked for once.

        Raises:
            PushRefused: the repository has another name now.
        """
        if commit not in self.listings:
            held = describe(self.client, self.job.repo, commit)
            self._test_name(held.name)
            self.listings[commit] = held.files
        return self.listings[commit]

    def read(self, commit: str, path: str, file: FilePin) -> bytes:
        """One small file of a commit, whole and verified."""
        url = hf_hub_url(self.job.repo, path, revision=commit, endpoint=self.client.endpoint)
        data = self.client.ask(
            self.job.repo,
            lambda headers: patiently(lambda: read_range(url, offset=0, length=file.size, headers=headers)),
            commit=commit,
        )
        verify_whole(file, data, f"{printable(path)} of {self.job.repo}")
        return data

    def test_private(self) -> None:
        """That the repository is private where that was asked for.

        Raises:
            PushRefused: everybody can read it.
        """
        if self.private and not describe(self.client, self.job.repo).private:
            raise PushRefused(
                f"{self.job.repo} is there already and everybody can read it; nothing was sent",
                f"Make it private first: {self.client.page(self.job.repo)}/settings, or leave out --private.",
            )

    def _test_name(self, name: str) -> None:
        if name != self.job.repo:
            now = printable(name)
            there = "/".join(filter(None, [now, self.job.subpath]))
            raise PushRefused(
                f"{self.job.repo} is called {now} now",
                f"Push there: lorahub push {there} {shlex.quote(str(self.job.folder))}",
            )

    def outcome(self, refs: Refs) -> Outcome:
        """What the push comes to; see ``publication.outcome``."""
        return outcome(self.job, refs.tags, refs.branches, self.listing)

    def holds(self, commit: str, plan: Outcome) -> bool:
        """Whether the commit is what the push was to come to."""
        return not differing(self.listing(commit), plan.files)

    def since(self, commit: str, head: str | None) -> list[Said]:
        """The commits after ``head`` up to ``commit``, newest first."""
        history = last_commits(self.client, self.job.repo, commit)
        ids = [each.commit for each in history]
        return history[: ids.index(head)] if head in ids else history

    def may_write(self) -> None:
        """Ask whether a repository in a namespace that is not the user's may be written all the same.

        Raises:
            AccessDenied: it may not.
        """
        try:
            self.client.ask(self.job.repo, lambda _headers: self.api.auth_check(self.job.repo, write=True))
        except (AccessDenied, NotFound):
            raise self._foreign() from None

    def _foreign(self) -> AccessDenied:
        own = ", ".join(sorted(self.who.spaces)) or "nobody's"
        return AccessDenied(
            f"{self.who.name or 'this token'} may not write to {self.job.repo}: its namespaces are {printable(own)}",
            "Push to one of those, propose the change with --create-pr, or log in as one who may: hf auth login",
        )

    # ----------------------------------------------------------------------------------------------- writing

    def attempt(self, call: Callable[[], object]) -> None:
        """``call()``, which may be done twice without harm, until it goes through.

        Raises:
            AccessDenied, Unavailable, Offline, NotFound: it does not.
        """
        for pause in (*PAUSES, None):
            found = trouble(call)
            if found is None:
                return
            if pause is None or not found.again:
                self.fail(found)
            wait(found, pause)

    def fail(self, found: Trouble) -> NoReturn:
        """What went wrong, as the error that people see."""
        if found.refused is not None:
            raise found.refused
        if found.status in {401, 403} and not self.create_pr:
            raise self._foreign() if self.outside else self._denied()

        def again(_headers: object) -> NoReturn:
            assert found.error is not None
            raise found.error

        self.client.ask(self.job.repo, again)
        raise AssertionError("not reached")

    @property
    def outside(self) -> bool:
        """Whether the namespace is none of the user's own."""
        return self.job.repo.partition("/")[0].lower() not in self.who.spaces

    def _denied(self) -> AccessDenied:
        return AccessDenied(
            f"the token of {self.who.name} may not write to {self.job.repo}",
            f"Give it that permission on {self.client.endpoint}/settings/tokens, or propose the change: --create-pr",
        )

    def create(self) -> None:
        """Make the repository."""
        private = True if self.private else None
        self.attempt(lambda: self.api.create_repo(self.job.repo, private=private, exist_ok=True))

    def open_branch(self, start: str) -> None:
        """Make the branch, at ``start``."""
        self.attempt(
            lambda: self.api.create_branch(self.job.repo, branch=self.job.branch, revision=start, exist_ok=True)
        )
