"""What a hub lets on about a repository while it is asked for something else, as findings.

A version tag that points elsewhere than before is refused unless allowed; a new name and a successor are notes.
"""

from __future__ import annotations

from lorahub.findings import Finding, Verdict
from lorahub.names import Ref

__all__ = ["NOTICED", "commit_gone", "moved", "renamed", "superseded"]

NOTICED = frozenset({"commit-gone", "repo-renamed", "superseded", "tag-moved"})
"""The codes of all of them."""


def moved(ref: Ref, tag: str, before: str, now: str, *, when: str = "when this machine first saw it") -> Finding:
    """A version tag that was at another commit before; ``when`` says how that is known."""
    return Finding(
        code="tag-moved",
        axis="integrity",
        level=Verdict.DEGRADED,
        message=f"{tag} of {ref.repo} was commit {before[:12]} {when} and is {now[:12]} now; "
        "a published version should never change",
        remedy=f"for what it was: lorahub pull {Ref(repo=ref.repo, selector=before, subpath=ref.subpath)}",
        allowable=True,
    )


def renamed(ref: Ref, name: str) -> Finding:
    """A repository that answers under another name."""
    return Finding(
        code="repo-renamed",
        axis="policy",
        level=Verdict.EXACT,
        message=f"{ref.repo} is called {name} now",
        remedy=f"write {Ref(repo=name, selector=ref.selector, subpath=ref.subpath)}: somebody else may take the old "
        "name",
    )


def superseded(repo: str, by: str) -> Finding:
    """A repository whose card names a newer one."""
    return Finding(
        code="superseded",
        axis="policy",
        level=Verdict.EXACT,
        message=f"the card of {repo} names {by} as its new version",
        remedy=f"lorahub inspect {by}",
    )


def commit_gone(repo: str, commit: str) -> Finding:
    """A commit that the hub does not have, or no longer."""
    return Finding(
        code="commit-gone",
        axis="integrity",
        level=Verdict.INCOMPATIBLE,
        message=f"{repo} has no commit {commit}, or no longer: its history was rewritten, or it never was",
        remedy=f"lorahub versions {repo}",
    )
