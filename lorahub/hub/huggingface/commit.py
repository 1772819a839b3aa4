"""One commit on the Hub, made exactly once and read back, or a pull request likewise; see ``pushing``."""

from __future__ import annotations

from urllib.parse import quote

from lorahub.errors import IntegrityError, PushRefused
from lorahub.hub.cache import Refs
from lorahub.hub.hub import Progress
from lorahub.hub.huggingface.people import Said, is_commit
from lorahub.hub.huggingface.place import PAUSES, Place, wait
from lorahub.hub.huggingface.upload import Trouble, Upload, missing_xet, trouble
from lorahub.hub.publication import Outcome, agree, differing
from lorahub.names import printable

__all__ = ["PULL", "find_proposal", "make_commit", "number_of"]

PULL = "refs/pr/"
_PROPOSALS = 5


def make_commit(
    place: Place, plan: Outcome, head: str | None, refs: Refs, *, message: str, progress: Progress
) -> tuple[str, str]:
    """Make the commit on ``head``, exactly once: (commit, branch or pull request).

    Raises:
        PushRefused: somebody else's commit came first; nothing was published.
        IntegrityError: the hub lists other content than was sent, or a file changed meanwhile.
    """
    upload = Upload(
        api=place.api,
        client=place.client,
        job=place.job,
        changed=tuple(
            path
            for path, file in place.job.files.items()
            if head is None or not agree(place.listing(head).get(place.job.at(path)), file)
        ),
        deleted=plan.deleted,
        message=message,
        parent=head,
        create_pr=place.create_pr,
        progress=progress,
    )
    known = frozenset(refs.branches)
    for pause in (*PAUSES, None):
        found = trouble(upload.send)
        commit, name = upload.made
        if found is None and is_commit(commit) and (name or not place.create_pr):
            if not place.create_pr:
                _test_parent(place, commit, head)
            _test_content(place, commit, plan)
            return commit, name or place.job.branch
        if found is not None and found.refused is not None:
            raise found.refused
        if (found is None or found.doubtful) and (landed := _landed(place, plan, head, known)) is not None:
            return landed
        if found is None:
            found = Trouble(error=ValueError("no commit in the answer"), again=True)
        if found.xetless and not upload.plain and missing_xet(place.client, place.job):
            upload.plain = True
        elif pause is None or not found.again:
            place.fail(found)
        else:
            wait(found, pause)
    raise AssertionError("not reached")


def _landed(place: Place, plan: Outcome, head: str | None, known: frozenset[str]) -> tuple[str, str] | None:
    """Where the repository holds what was to be published, after all; None where it is as it was.

    Raises:
        PushRefused: somebody else changed it.
    """
    refs = place.refs()
    if place.create_pr:
        return find_proposal(place, plan, refs, known)
    now = refs.branches.get(place.job.branch)
    if now is None or now == head:
        return None
    if place.holds(now, plan):
        return now, place.job.branch
    since = place.since(now, head)
    for each in since[1:]:
        if place.holds(each.commit, plan):
            return each.commit, place.job.branch
    ours = {place.job.at(path): file for path, file in place.job.files.items()}
    if since and all(agree(place.listing(since[0].commit).get(path), file) for path, file in ours.items()):
        raise _mixed(place, since[0].commit, since[1:])
    raise PushRefused(
        f"{place.job.repo} has changed meanwhile, so nothing was published: {_listed(since) or now}",
        "Look at it, then push again, which builds on that commit.",
    )


def find_proposal(place: Place, plan: Outcome, refs: Refs, known: frozenset[str]) -> tuple[str, str] | None:
    """The newest pull request that proposes exactly this, unless it was ``known`` before."""
    pulls = [name for name in refs.branches if name.startswith(PULL) and name not in known]
    for name in sorted(pulls, key=number_of, reverse=True)[:_PROPOSALS]:
        if place.holds(refs.branches[name], plan):
            return refs.branches[name], name
    return None


def _test_parent(place: Place, commit: str, head: str | None) -> None:
    """That nobody's commit came between, on a hub that does not see to it.

    Raises:
        PushRefused: one did.
    """
    since = place.since(commit, head)
    if since and since[0].commit == commit and len(since) > 1 and head is not None:
        raise _mixed(place, commit, since[1:])


def _mixed(place: Place, commit: str, others: list[Said]) -> PushRefused:
    tag = f" {place.job.tag} was not tagged." if place.job.tag else ""
    return PushRefused(
        f"the hub put commit {commit[:12]} on top of one that came meanwhile: {_listed(others)}.{tag}",
        f"Look at both on {place.client.page(place.job.repo)}/commits/{quote(place.job.branch)}; to publish what is "
        "there now, push again.",
    )


def _test_content(place: Place, commit: str, plan: Outcome) -> None:
    """That the commit holds what was sent and nothing else changed.

    Raises:
        IntegrityError: it does not.
    """
    if wrong := differing(place.listing(commit), plan.files):
        tag = f" {place.job.tag} was not tagged." if place.job.tag else ""
        raise IntegrityError(
            f"commit {commit[:12]} of {place.job.repo} does not hold what was sent: "
            f"{', '.join(map(printable, wrong[:5]))}.{tag}",
            "Push again; if it stays so, tell the hub's operators.",
        )


def number_of(name: str) -> int:
    """N of ``refs/pr/N``; 0 where it is none."""
    tail = name.removeprefix(PULL)
    return int(tail) if tail.isdecimal() and len(tail) < 12 else 0


def _listed(commits: list[Said]) -> str:
    return "; ".join(map(str, commits[:3])) + (f"; and {len(commits) - 3} more" if len(commits) > 3 else "")
