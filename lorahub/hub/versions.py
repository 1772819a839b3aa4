"""What a selector comes to in a repository: the newest version in a range, a tag, a branch, a commit.

Works on the names and commits of refs alone; knows no hub and no file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lorahub.errors import InvalidRef, NotFound
from lorahub.names import Selector, as_version, did_you_mean, printable

__all__ = ["Picked", "VersionTag", "pick", "version_tags"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTag:
    """A tag that parses as a version (PEP 440, an optional ``v`` before it)."""

    tag: str
    version: Version
    commit: str


def version_tags(tags: Mapping[str, str]) -> list[VersionTag]:
    """The tags that name versions, newest first; of two spellings of one version the longer comes first."""
    found = [
        VersionTag(tag=tag, version=version, commit=commit)
        for tag, commit in tags.items()
        if (version := as_version(tag)) is not None
    ]
    return sorted(found, key=lambda each: (each.version, len(each.tag), each.tag), reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """What a selector came to: the commit, the tag or branch that led to it, the version if any, and the reason."""

    commit: str
    tag: str | None = None
    branch: str | None = None
    version: str | None = None
    why: str


def pick(
    selector: Selector | None,
    tags: Mapping[str, str],
    branches: Mapping[str, str],
    default_branch: str = "main",
    *,
    repo: str = "the repository",
) -> Picked:
    """The commit that ``selector`` means in a repository with these refs (name -> commit).

    No selector means the highest stable version, else the default branch.  Pre-releases count only for an exact
    version, or a range that names one.  A tag typed with its ``v`` (``v1``) is that tag before it is a series.  Where
    no version fits, a tag or branch of that name does.  Pull requests are looked up in ``branches`` under
    ``refs/pr/N``.

    Raises:
        NotFound: nothing matches; the message lists the first versions there are.
        InvalidRef: two tags of one version, or a tag and a branch of one name, lie on different commits.
    """
    versions = version_tags(tags)
    stable = [each for each in versions if not each.version.is_prerelease]
    if selector is None:
        if stable:
            return _newest(stable, versions, f"the newest of {len(stable)} version{'s' * (len(stable) > 1)}")
        if default_branch in branches:
            lacking = f"only pre-releases are tagged, {versions[0].tag}" if versions else "no version is tagged"
            return Picked(commit=branches[default_branch], branch=default_branch, why=f"the default branch: {lacking}")
        raise NotFound(f"{repo} is empty: no version tags and no branch '{default_branch}'")
    text = selector.text
    if selector.kind == "commit":
        return Picked(commit=text, why="the commit that was named")
    if selector.kind == "ref":
        return _literal(text, tags, branches) or _missing(text, tags, branches, repo)
    fitting: list[VersionTag] = []
    if selector.kind == "range":
        wanted = SpecifierSet(text)
        early = any(_names_early(clause.version) for clause in wanted)
        fitting = [each for each in versions if wanted.contains(each.version, prereleases=early)]
        why = f"the newest that satisfies {text}"
    elif selector.kind == "series":
        if text.startswith("v") and text in tags:
            return _named(text, tags, branches, repo)
        release = tuple(map(int, text.removeprefix("v").split(".")))
        fitting = [each for each in stable if _starts(each.version, release)]
        why = f"the newest {text}"
    elif selector.kind == "version":
        fitting = [each for each in versions if each.version == as_version(text)]
        fitting.sort(key=lambda each: _spelling(each.tag) != _spelling(text))
        why = "the version that was named"
    return _newest(fitting, versions, why) if fitting else _named(text, tags, branches, repo)


def _names_early(clause: str) -> bool:
    version = as_version(clause.removesuffix(".*"))
    return version is not None and version.is_prerelease


def _starts(version: Version, release: tuple[int, ...]) -> bool:
    padded = version.release + (0,) * len(release)
    return version.epoch == 0 and padded[: len(release)] == release


def _spelling(tag: str) -> str:
    """A version tag without its ``v``: ``v1`` may point elsewhere than ``v1.0.0``, ``1.0.0`` may not."""
    return tag.removeprefix("v")


def _newest(fitting: Collection[VersionTag], versions: Collection[VersionTag], why: str) -> Picked:
    best = next(iter(fitting))
    twins = [each for each in versions if _spelling(each.tag) == _spelling(best.tag)]
    if len({twin.commit for twin in twins}) > 1:
        spelled = " and ".join(f"'{twin.tag}'" for twin in twins)
        raise InvalidRef(
            f"version {best.version} is ambiguous: the tags {spelled} lie on different commits",
            f"Name one of them: @refs/tags/{best.tag}, or a commit.",
        )
    return Picked(commit=best.commit, tag=best.tag, version=str(best.version), why=why)


def _literal(text: str, tags: Mapping[str, str], branches: Mapping[str, str]) -> Picked | None:
    if (tag := text.removeprefix("refs/tags/")) in tags and tag != text:
        version = as_version(tag)
        named = str(version) if version is not None else None
        return Picked(commit=tags[tag], tag=tag, version=named, why="the tag that was named")
    if (branch := text.removeprefix("refs/heads/")) in branches:
        return Picked(commit=branches[branch], branch=branch, why="the branch that was named")
    return None


def _named(text: str, tags: Mapping[str, str], branches: Mapping[str, str], repo: str) -> Picked:
    tag, branch = (_literal(f"refs/{kind}/{text}", tags, branches) for kind in ("tags", "heads"))
    if tag and branch and tag.commit != branch.commit:
        raise InvalidRef(
            f"'{text}' is both a tag and a branch of {repo}, on different commits",
            f"Write @refs/tags/{text} or @refs/heads/{text}.",
        )
    return tag or branch or _missing(text, tags, branches, repo)


def _missing(text: str, tags: Mapping[str, str], branches: Mapping[str, str], repo: str) -> Picked:
    versions = [each.tag for each in version_tags(tags)]
    others = sorted(set(tags) - set(versions)) + sorted(branches)
    there = versions or others
    more = ", ..." if len(there) > 5 else ""
    listed = f"{', '.join(map(printable, there[:5]))}{more}" if there else "it is empty"
    hint = did_you_mean(text, [*versions, *others, *map(_spelling, versions)]).strip()
    if not hint and re.fullmatch(r"[0-9a-f]{7,39}", text):
        hint = "A commit must be given in full, 40 hex digits."
    if not hint and "/" in repo:
        hint = f"lorahub versions {repo}"
    what = "versions: " if versions else "there are: " if others else ""
    raise NotFound(f"{repo} has nothing that '{printable(text)}' could mean ({what}{listed})", hint)
