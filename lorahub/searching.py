"""What there is on a hub: adapters by name, base and card, and the versions of one.  Knows hubs, and no adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorahub.errors import Offline, UsageError
from lorahub.fetching import Source, as_ref
from lorahub.findings import Finding, Verdict
from lorahub.hub import open_hub
from lorahub.hub.hub import Standing
from lorahub.hub.noticed import renamed, superseded
from lorahub.hub.versions import VersionTag, version_tags
from lorahub.names import Ref

if TYPE_CHECKING:
    from lorahub.hub.hub import Listing

__all__ = ["Versions", "search", "versions"]


def search(
    text: str = "",
    *,
    base: str | None = None,
    author: str | None = None,
    library: str | None = None,
    tags: Sequence[str] = (),
    sort: str = "downloads",
    limit: int = 20,
    hub: str | None = None,
    token: str | None = None,
) -> list[Listing]:
    """Adapters on a hub that fulfil all that is given, as their cards say it.

    Args:
        text: part of the name.
        base: the base that they are for, as "ORG/NAME"; ``@COMMIT`` behind it is left out.
        author: the namespace.
        library: as "peft" or "diffusers".
        tags: all of them.  Where neither base, library nor tag is given, Hugging Face is asked for the tag "lora".
        sort: "downloads", "likes", "updated" or "created".
        limit: how many at most.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        token: for Hugging Face; None takes ``HF_TOKEN`` or that of ``hf auth login``.

    Raises:
        UsageError: there is no such order, or ``base`` is a path.
        Unavailable: the hub cannot be asked.
    """
    opened = open_hub(hub, token=token)
    return opened.search(text, base=base, author=author, library=library, tags=tags, sort=sort, limit=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The versions of a repository.

    Attributes:
        versions: newest first.
        standing: how it stands now, with all tags and branches.
        findings: that it is called otherwise now, or names a successor.
    """

    versions: tuple[VersionTag, ...]
    standing: Standing
    findings: tuple[Finding, ...] = ()


def versions(ref: Source, *, hub: str | None = None, token: str | None = None) -> Versions:
    """What versions a repository has, and how it stands, in two requests; offline, the versions that are known here.

    Args:
        ref: ``ns/name``; a selector or folder behind it is left out.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        token: for Hugging Face; None takes ``HF_TOKEN`` or that of ``hf auth login``.

    Raises:
        UsageError: ``ref`` is a local path.
        Unavailable: it does not exist, or cannot be had from here.
    """
    repo = as_ref(ref).repo
    if repo is None:
        raise UsageError(f"{ref} is a local path, and versions are on a hub", "lorahub versions NS/NAME")
    opened = open_hub(hub, token=token)
    try:
        standing = opened.standing(repo)
    except Offline:
        known = opened.versions(repo)  # raises that again, unless the network is switched off and they are known here
        standing = Standing(repo=repo, tags={each.tag: each.commit for each in known}, branches={})
        return Versions(versions=tuple(known), standing=standing, findings=(_known_here(repo),))
    said = [renamed(Ref(repo=repo), standing.repo)] if standing.repo != repo else []
    said += [superseded(repo, standing.successor)] if standing.successor else []
    return Versions(versions=tuple(version_tags(standing.tags)), standing=standing, findings=tuple(said))


def _known_here(repo: str) -> Finding:
    return Finding(
        code="versions-from-cache",
        axis="policy",
        level=Verdict.UNVERIFIED,
        message=f"the network is switched off: these are the versions of {repo} that were known here before",
        remedy="once with the network: unset HF_HUB_OFFLINE",
    )
