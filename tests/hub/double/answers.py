"""What is asked of the double and what it answers, with the Hub's own ways of saying no.

Knows the wording of refusals and the headers the client reads; knows no repository.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["Asked", "Hangup", "Reply", "document", "refused"]

_REQUESTS = itertools.count(1)


class Reply(Exception):
    """An answer; ``ranged`` ones are files, of which a part can be asked for."""

    def __init__(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *, ranged: bool = False
    ) -> None:
        super().__init__(status)
        self.status, self.body, self.ranged = status, body, ranged
        self.headers = dict(headers or {})
        self.cut: int | None = None
        """After so many bytes of the body the connection breaks."""


class Hangup(Exception):
    """The connection is closed without an answer."""


def document(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer in JSON."""
    return Reply(status, json.dumps(value, default=str).encode(), headers)


def refused(status: int, message: str, code: str = "", **more: Any) -> Reply:
    """A refusal as the Hub words it: the message in the body and in a header, the code in another."""
    headers = {"X-Error-Message": message, "X-Request-Id": f"double-{next(_REQUESTS)}"}
    if code:
        headers["X-Error-Code"] = code
    if (commit := more.pop("commit", None)) is not None:
        headers["X-Repo-Commit"] = commit
    return document({"error": message, **more}, status, headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request.

    Attributes:
        where: "hub" or "cdn".
        target: path and query as they were sent.
        headers: names in lower case.
    """

    where: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False, default=b"")

    @property
    def path(self) -> str:
        """The target without its query, still quoted."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        """Every value of every parameter."""
        return parse_qs(urlsplit(self.target).query)

    def option(self, name: str, default: str = "") -> str:
        """The first value of a parameter."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Whether a parameter is set to something true."""
        return self.option(name).lower() in {"1", "true"}

    def json(self) -> dict[str, Any]:
        """The body as an object.

        Raises:
            Reply: 400, it is none.
        """
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise refused(400, "Invalid JSON body")
        return found

    @property
    def token(self) -> str | None:
        """What stands after ``Bearer``, or None."""
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind.lower() == "bearer" else None
