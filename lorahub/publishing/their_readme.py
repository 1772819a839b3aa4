"""What becomes of the README that a repository has already, edited there perhaps: nothing of it is lost unsaid.

Where the folder has none, the card is made around that one.  Where both have one, the folder's is published, and where
that replaces what somebody wrote there a finding says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorahub import cards
from lorahub.errors import PushRefused, RecordError
from lorahub.findings import Finding, Verdict
from lorahub.names import Ref
from lorahub.publishing.readiness import Ready

__all__ = ["TheirReadme"]


@dataclass(slots=True, kw_only=True)
class TheirReadme:
    """Asked by a hub with the README that it has; a ``hub.Revise``.

    Attributes:
        ready: what is published.
        to: where to.
        card: whether a card is made.
        given: what is published instead.
        said: what there is to say of it, in place of what was said of a card made from nothing.
    """

    ready: Ready
    to: Ref
    card: bool
    given: Mapping[str, bytes] = field(default_factory=dict)
    said: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        self.said = self.ready.said

    def __call__(self, commit: str, data: bytes) -> Mapping[str, bytes]:
        """What is published in place of what was to be, now that the repository's README is known.

        Raises:
            PushRefused: the card cannot be made around it.
        """
        ours = self.ready.readme
        if ours is not None:
            new = self.ready.given.get(cards.FILE, b"").decode() or ours
            if cards.replaces(new, data.decode("utf-8", "replace"), before=ours):
                self.said = (*self.ready.said, self._replaced(commit))
        elif self.card:
            self.given = self._around(data)
        return self.given

    def _around(self, data: bytes) -> Mapping[str, bytes]:
        try:
            made = cards.make_card(
                data.decode(),
                self.ready.header,
                self.ready.record,
                repo=self.to.repo or "",
                subfolder=self.to.subpath,
            )
        except (RecordError, UnicodeDecodeError) as error:
            why = error.message if isinstance(error, RecordError) else "it is not UTF-8"
            raise PushRefused(
                f"the card of {self.to} cannot be made around the {cards.FILE} that it has: {why}; nothing was sent",
                f"Correct it there, or write {cards.FILE} in {self.ready.header.folder}, or leave it alone: --no-card",
            ) from None
        if wrong := tuple(each for each in made.findings if each.level >= Verdict.DEGRADED):
            raise PushRefused(f"{self.to} cannot be published; nothing was sent", "", wrong)
        self.said = made.findings
        return {cards.FILE: made.text.encode(), **made.pictures}

    def _replaced(self, commit: str) -> Finding:
        there = Ref(repo=self.to.repo, selector=commit, subpath=self.to.subpath)
        file = shlex.quote(str(self.ready.header.folder / cards.FILE))
        return Finding(
            code="card-replaces-hub-text",
            axis="policy",
            level=Verdict.UNVERIFIED,
            message=f"{cards.FILE} on the hub says what the folder's does not, and the folder's takes its place",
            where=(f"commit {commit[:12]}",),
            remedy=f"to keep the hub's: delete {file} before the push; to look at it: lorahub pull {there}",
        )
