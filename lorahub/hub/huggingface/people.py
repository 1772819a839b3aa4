"""Who is behind a token, and behind the last commits of a repository: every word checked, or made safe to show."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from lorahub.errors import AccessDenied
from lorahub.hub.huggingface.client import HubClient
from lorahub.names import COMMIT, printable

__all__ = ["Said", "Who", "is_commit", "last_commits", "whoami"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """Whose token it is.

    Attributes:
        name: the user.
        spaces: the namespaces that are theirs: their own and their organisations'.
        role: what the token may do, "read", "write" or "fineGrained"; "" where the hub does not say.
    """

    name: str
    spaces: frozenset[str]
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One commit as the history tells it, safe to show."""

    commit: str
    title: str
    author: str
    date: str

    def __str__(self) -> str:
        return f"{self.commit[:12]} ('{self.title}') by {self.author or 'somebody'} at {self.date or 'some time'}"


def is_commit(value: object) -> bool:
    """Whether it is a commit, as 40 hex digits."""
    return isinstance(value, str) and COMMIT.fullmatch(value) is not None


def whoami(client: HubClient, repo: str) -> Who:
    """Whose token goes with the requests; ``repo`` is what it is asked for.

    Raises:
        AccessDenied: there is none, or the hub does not accept it.
        Unavailable, Offline: the hub cannot be asked.
    """
    if not any(name.lower() == "authorization" for name in client.headers()):
        raise AccessDenied(f"publishing to {client.name} needs a token, and there is none", "Log in: hf auth login")
    said, _ = client.json("/api/whoami-v2", what=repo)
    said = said if isinstance(said, dict) else {}
    token = said.get("auth", {}).get("accessToken", {}) if isinstance(said.get("auth"), dict) else {}
    groups = said.get("orgs") if isinstance(said.get("orgs"), list) else []
    names = [said.get("name"), *(group.get("name") for group in groups or [] if isinstance(group, dict))]
    role = token.get("role") if isinstance(token, dict) else None
    return Who(
        name=printable(str(said.get("name", ""))),
        spaces=frozenset(name.lower() for name in names if isinstance(name, str)),
        role=role if isinstance(role, str) else "",
    )


def last_commits(client: HubClient, repo: str, revision: str) -> list[Said]:
    """The last commits that led to ``revision``, newest first; as many as the hub tells at once.

    Raises:
        NotFound: there is no such revision.
    """
    said, _ = client.json(f"/api/models/{repo}/commits/{quote(revision, safe='')}", what=repo)
    return [
        Said(
            commit=each["id"],
            title=printable(str(each.get("title", "")))[:80],
            author=printable(", ".join(_users(each.get("authors"))))[:80],
            date=printable(str(each.get("date", "")))[:40],
        )
        for each in (said if isinstance(said, list) else [])
        if isinstance(each, dict) and is_commit(each.get("id"))
    ]


def _users(authors: object) -> list[str]:
    listed = authors if isinstance(authors, list) else []
    return [str(each.get("user")) for each in listed if isinstance(each, dict) and each.get("user")]
