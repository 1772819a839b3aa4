"""Publishing to the Hugging Face Hub: one commit, read back and compared, then one tag.

The order of things: the folder is judged before any request; the account, the refs and the version before any byte is
sent; then one ``create_commit`` with an explicit list of files and the parent it builds on.  The client does not try
that again, and a lost reply may mean either outcome, so after every doubt the repository is read: where it holds what
was to be published, that is success; where somebody else's commit came first, nothing is published; only where nothing
happened is it tried again.  What a push comes to is decided in ``publication``; here it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi

from lorahub.errors import AccessDenied, LorahubError, NotFound, PushRefused, UsageError
from lorahub.hub.cache import Refs
from lorahub.hub.hub import Pin, Progress, Revise
from lorahub.hub.huggingface.client import HubClient
from lorahub.hub.huggingface.commit import PULL, find_proposal, make_commit, number_of
from lorahub.hub.huggingface.people import whoami
from lorahub.hub.huggingface.place import PAUSES, Place, wait
from lorahub.hub.huggingface.upload import Trouble, trouble
from lorahub.hub.publication import DEFAULT_BRANCH, Outcome, Publication, current_readme, outcome, publication, revised
from lorahub.names import Ref, printable

__all__ = ["page", "push"]

_UNKNOWN = "0" * 40


def push(
    api: HfApi,
    client: HubClient,
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
    """Publish a folder; see ``Hub.push``.

    The commit of a dry run that would make one is 40 zeros.  A pull request's pin has ``refs/pr/N`` as its branch.

    Raises:
        PushRefused, UsageError: see ``publication``; or somebody else's commit came first, the repository has another
            name now, or is public though ``private`` was asked for.
        IntegrityError: a file changed meanwhile, or the hub lists other content than was sent.
        AccessDenied, Unavailable, Offline: the hub cannot be asked, or does not let this token write.
    """
    job = publication(folder, ref, version=version, move_tag=move_tag, given=given)
    if create_pr and job.branch != DEFAULT_BRANCH:
        raise UsageError("a pull request is made against the main branch alone", f"Leave out @{ref.selector}.")
    place = Place(
        api=api,
        client=client,
        job=replace(job, tag=None, move_tag=False) if create_pr else job,
        who=whoami(client, job.repo),
        private=private,
        create_pr=create_pr,
        listings={},
    )
    return _run(
        place,
        version=job,
        message=message.strip() or f"Publish {job.tag.removeprefix('v') if job.tag else 'adapter'} with lorahub",
        progress=progress or (lambda _path, _done, _total: None),
        readme=readme,
        dry_run=dry_run,
    )


def page(client: HubClient, pin: Pin) -> str:
    """Where people look at what ``pin`` names: the version's or branch's files, or the pull request."""
    if pin.branch is not None and pin.branch.startswith(PULL):
        return f"{client.page(pin.repo)}/discussions/{number_of(pin.branch)}"
    at = pin.tag or (pin.branch if pin.commit == _UNKNOWN else pin.commit) or pin.commit
    return "/".join(filter(None, [client.page(pin.repo), "tree", quote(at, safe=""), quote(pin.subfolder)]))


def _run(
    place: Place, *, version: Publication, message: str, progress: Progress, readme: Revise | None, dry_run: bool
) -> Pin:
    """Everything from the first question to the tag; ``version`` says which one a pull request is to become."""
    if place.who.role == "read":
        raise AccessDenied(
            f"the token of {place.who.name} may only read, and publishing to {place.job.repo} writes",
            f"Make one that may write on {place.client.endpoint}/settings/tokens, then: hf auth login",
        )
    refs = _refs(place)
    exists = refs is not None
    if exists and not place.create_pr and place.outside:
        place.may_write()
    if exists:
        place.test_private()
    refs = refs or Refs(tags={}, branches={})
    if readme is not None and (theirs := current_readme(place.job, refs.tags, refs.branches, place.listing)):
        place = replace(place, job=revised(place.job, readme(theirs[0], place.read(*theirs))))
    job = place.job
    where = "" if exists else f" in a new {'private ' * place.private}repository"
    plan = place.outcome(refs)
    if place.create_pr:  # what could never be tagged is not proposed
        outcome(replace(job, tag=version.tag, move_tag=version.move_tag), refs.tags, refs.branches, place.listing)
    if place.create_pr and plan.new and (found := find_proposal(place, plan, refs, frozenset())) is not None:
        return _pin(place, plan, *found, why=f"already proposed as {found[1]}")
    if dry_run or plan.done:
        would = "proposed as a pull request" if place.create_pr else plan.what + where
        why = plan.said if plan.done else f"would be {would}"
        return _pin(place, plan, _UNKNOWN if plan.new else plan.start or _UNKNOWN, plan.branch, why=why)
    if not exists:
        place.create()
        place.test_private()
        refs = place.refs()  # a new repository starts with a commit of the hub's own
        plan = place.outcome(refs)
    if place.create_pr:
        commit, name = make_commit(place, plan, plan.start, refs, message=message, progress=progress)
        return _pin(place, plan, commit, name, why=f"proposed as {name}")
    head = refs.branches.get(job.branch)
    if plan.opens and plan.start is not None:
        place.open_branch(plan.start)
        head = plan.start
    commit = plan.start or _UNKNOWN
    if plan.new:
        commit, _ = make_commit(place, plan, head, refs, message=message, progress=progress)
    for tag, before in plan.tags.items():
        _tag(place, tag, before, commit)
    return _pin(place, plan, commit, plan.branch, why=plan.what + where)


def _refs(place: Place) -> Refs | None:
    """The refs as they are, or None where there is no repository (or none that this token may see).

    Raises:
        NotFound: there is none, and a change to it was to be proposed.
    """
    try:
        return place.refs()
    except NotFound:
        if place.create_pr:
            raise NotFound(
                f"there is no {place.job.repo} to propose a change to",
                "Publish it first, without --create-pr, or see whether the token may read it.",
            ) from None
        return None


def _tag(place: Place, tag: str, before: str | None, commit: str) -> None:
    """Let ``tag`` point at ``commit``, and see that it does.

    Raises:
        PushRefused: somebody else made it meanwhile.
    """
    now, lost = before, None
    for pause in (*PAUSES, None):
        if now is not None:
            lost = trouble(lambda: place.api.delete_tag(place.job.repo, tag=tag))
        if now is None or lost is None or lost.status == 404:
            lost = trouble(lambda: place.api.create_tag(place.job.repo, tag=tag, revision=commit))
        now = place.refs().tags.get(tag)
        if now == commit:
            return
        if now is not None and now != before:
            raise PushRefused(
                f"{printable(tag)} of {place.job.repo} was made at commit {now[:12]} meanwhile; "
                f"commit {commit[:12]} is published without a version",
                "Push under the next version.",
            )
        if pause is None or (lost is not None and not (lost.again or lost.status == 409)):
            break
        wait(lost, pause)
    try:
        place.fail(lost or Trouble(error=ValueError("the tag is not there"), again=True))
    except LorahubError as error:
        hint = f"Push again, which only tags it.  {error.hint}".strip()
        message = f"commit {commit[:12]} of {place.job.repo} is published, but not tagged {tag}: {error.message}"
        failure = type(error)(message, hint, error.findings)
    raise failure


def _pin(place: Place, plan: Outcome, commit: str, branch: str, *, why: str) -> Pin:
    return place.job.pin(commit, plan.files, tag=plan.tag, branch=branch, why=why)
