"""What a Hub says of one repository: its refs, and one commit's files, each name and hash checked to be one.

Answers are plain values from a server: nothing is believed to have the shape it should, and what is not needed is
not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lorahub.errors import AccessDenied, IntegrityError, InvalidRef, RecordError
from lorahub.findings import Finding, Verdict
from lorahub.hub.cache import Refs
from lorahub.hub.hub import FilePin
from lorahub.hub.huggingface.client import HubClient
from lorahub.names import COMMIT, Ref, printable

__all__ = ["About", "describe", "list_refs", "repository"]

_LONGEST_WORD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """A repository at one commit.

    Attributes:
        name: what it is called now.
        commit: which one; "" where only the repository was asked about.
        files: every path by content; empty where only the repository was asked about.
        private, gated, disabled: as the hub says.
        successor: the repository that the card names as the newer one, or None.
        license: the card's, or "".
    """

    name: str
    files: Mapping[str, FilePin]
    commit: str = ""
    private: bool = False
    gated: bool = False
    disabled: bool = False
    successor: str | None = None
    license: str = ""


def list_refs(client: HubClient, repo: str, *, pulls: bool) -> tuple[Refs, str]:
    """Tags and branches, and what the repository is called now; pull requests under ``refs/pr/N`` where asked for.

    Raises:
        IntegrityError: a ref lies at what is no commit.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
    """

    def call() -> tuple[dict[str, str], dict[str, str], str]:
        value, place = client.json(f"/api/models/{repo}/refs", {"include_prs": "1"} if pulls else None, what=repo)
        tags = {each["name"]: each["targetCommit"] for each in value.get("tags") or []}
        branches = {each["name"]: each["targetCommit"] for each in value["branches"]}
        found = {each["ref"]: each["targetCommit"] for each in value.get("pullRequests") or []}
        return tags, branches | found, place

    tags, branches, place = client.ask(repo, lambda _: call())
    if wrong := [name for name, commit in [*tags.items(), *branches.items()] if not _is_commit(name, commit)]:
        raise IntegrityError(f"{client.name} lists '{printable(str(wrong[0]))}' of {repo} at what is no commit")
    return Refs(tags=tags, branches=branches), _name_in(place) or repo


def describe(client: HubClient, repo: str, commit: str = "", *, branch: str = "") -> About:
    """The repository at a commit, or where a branch is now, with all its files; or without them as its default is.

    Raises:
        IntegrityError: the answer is about another commit, or lists a file without a proper size and hash.
        AccessDenied: it is disabled, which asking for the repository alone only tells.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
    """
    at = commit or branch
    path = f"/api/models/{repo}" + (f"/revision/{quote(at, safe='')}" if at else "")
    parameters = {"blobs": "true"} if at else None

    def call() -> tuple[dict[str, Any], list[tuple[object, object, object, object]]]:
        info, _ = client.json(path, parameters, what=repo, commit=commit)
        files = [] if not at else [_fields(file) for file in info["siblings"] or []]
        return {name: info.get(name) for name in _FIELDS}, files

    info, files = client.ask(repo, lambda _: call(), commit=commit)
    if at and info["disabled"]:
        message = f"{repo} was disabled by the hub or its author"
        found = Finding(code="disabled", axis="policy", level=Verdict.INCOMPATIBLE, message=message)
        raise AccessDenied(message, f"See {client.page(repo)}", (found,))
    if commit and info["sha"] != commit:
        raise IntegrityError(f"{client.name} answers for another commit of {repo} than was asked for")
    if branch and not _is_commit(branch, info["sha"]):
        raise IntegrityError(f"{client.name} lists '{printable(branch)}' of {repo} at what is no commit")
    card = info["cardData"] if isinstance(info["cardData"], dict) else {}
    successor = repository(card.get("new_version"))
    return About(
        name=repository(info["id"]) or repo,
        files=dict(_entry(*file, repo) for file in files),
        commit=info["sha"] if at else "",
        private=bool(info["private"]),
        gated=bool(info["gated"]),
        disabled=bool(info["disabled"]),
        successor=successor if successor != repo else None,
        license=_word(card.get("license")),
    )


_FIELDS = ("id", "sha", "private", "gated", "disabled", "cardData")


def repository(name: object) -> str | None:
    """``name`` if it is what a repository can be called, else None."""
    with suppress(InvalidRef):
        return Ref(repo=name).repo if isinstance(name, str) and name else None
    return None


def _name_in(place: str) -> str | None:
    """The repository in the path of an answer, ``/api/models/NS/NAME/refs``."""
    parts = place.strip("/").split("/")
    return repository("/".join(parts[2:-1])) if parts[:2] == ["api", "models"] and parts[-1] == "refs" else None


def _word(text: object) -> str:
    return printable(text) if isinstance(text, str) and len(text) <= _LONGEST_WORD else ""


def _is_commit(name: object, commit: object) -> bool:
    return isinstance(name, str) and isinstance(commit, str) and COMMIT.fullmatch(commit) is not None


def _fields(file: dict[str, Any]) -> tuple[object, object, object, object]:
    """(name, size, git's id, sha256 or None) of a listed file."""
    large = file.get("lfs")
    return file["rfilename"], file.get("size"), file.get("blobId"), large["sha256"] if large else None


def _entry(name: object, size: object, blob: object, sha256: object, repo: str) -> tuple[str, FilePin]:
    """One listed file; the server says large files' sha256 and git's id of the others."""
    hash_ = blob if sha256 is None else sha256
    with suppress(RecordError):
        if isinstance(name, str) and type(size) is int and isinstance(hash_, str):
            return name, FilePin(size=size, git=hash_) if sha256 is None else FilePin(size=size, sha256=hash_)
    raise IntegrityError(f"{repo} lists '{printable(str(name))}' without a valid size and hash")
