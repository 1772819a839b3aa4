"""Questions to a Hub, through huggingface_hub's session and headers: bounded, retried, answered in plain values.

The client's own methods for these leave the time, the size of an answer and a redirect to another name unbounded or
untold, so the session is asked directly.  Knows addresses and tokens; knows neither pins nor files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, final
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from lorahub.errors import UsageError
from lorahub.hub.huggingface.download import patiently
from lorahub.hub.huggingface.errors import typed
from lorahub.names import printable

__all__ = ["HubClient", "check_token", "own_version"]

T = TypeVar("T")
Params = Mapping[str, "str | list[str]"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_TIMEOUT = 30.0
_LARGEST_ANSWER = 64 << 20
_TOKEN = re.compile(r"[!-~]+")


@cache
def own_version() -> str | None:
    """The version of lorahub for the user agent, or None where it is run from its source and not installed."""
    try:
        return metadata.version("lorahub-core")
    except metadata.PackageNotFoundError:
        return None


def check_token(token: str) -> str:
    """The token without the white space around it, if it can be one.

    Raises:
        UsageError: it holds what no token holds; it is not shown.
    """
    if not _TOKEN.fullmatch(token.strip()):
        raise UsageError("the token holds characters that no token has", "Log in: hf auth login")
    return token.strip()


@final
class HubClient:
    """The Hub behind ``api``: its name, its pages, and what it answers.

    Attributes:
        endpoint: its address, without a slash at the end.
        name: what people call it.
        key: ``name`` as a folder name.

    Raises:
        UsageError: the endpoint is unencrypted and not on this machine.
    """

    def __init__(self, api: HfApi) -> None:
        self._api = api
        self.endpoint = api.endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise UsageError(f"{printable(self.endpoint)} is not encrypted", "Use an https:// address.")
        self.name = parts.netloc.rpartition("@")[2]
        self.key = self.name.replace(":", "_").lower()

    def page(self, repo: str) -> str:
        """Where people look at a repository."""
        return f"{self.endpoint}/{repo}"

    def headers(self) -> dict[str, str]:
        """What goes with every request: who asks, and the token where there is one.

        Raises:
            UsageError: the token is none.
            AccessDenied: one is demanded, and there is none.
        """
        build = partial(build_hf_headers, token=self._api.token, library_name="lorahub", library_version=own_version())
        headers = dict(typed(build, what=self.name, page=self.endpoint))
        for name, value in headers.items():
            if name.lower() == "authorization":
                check_token(value.removeprefix("Bearer "))
        return headers

    def ask(self, what: str, call: Callable[[dict[str, str]], T], *, commit: str = "") -> T:
        """``call(headers)``, whatever it raises said about ``what``, a repository as a rule, and the ``commit`` of it.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable: in place of the client's errors.
            UsageError: the token is none.
        """
        headers = self.headers()
        known = any(name.lower() == "authorization" for name in headers)
        page = self.page(what) if "/" in what else self.endpoint  # a search is about no repository
        here = Path(what).is_dir()
        return typed(lambda: call(headers), what=what, page=page, here=here, anonymous=not known, commit=commit)

    def json(self, path: str, params: Params | None = None, *, what: str, commit: str = "") -> tuple[Any, str]:
        """The answer to ``GET path`` below the endpoint, and the path there that it came from after redirects.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, UsageError: as ``ask``.
        """

        def call(headers: Mapping[str, str]) -> tuple[Any, str]:
            value, _, place = patiently(lambda: _get(f"{self.endpoint}{path}", headers, params))
            return value, urlsplit(place).path.removeprefix(urlsplit(self.endpoint).path)

        return self.ask(what, call, commit=commit)

    def pages(self, path: str, params: Params, *, what: str) -> Iterator[Any]:
        """The answers to ``GET path`` and to what it names as the next page, for as long as they are wanted.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, UsageError: as ``ask``.
        """
        url, given = f"{self.endpoint}{path}", params

        def call(headers: Mapping[str, str]) -> tuple[Any, str, str]:
            return patiently(lambda: _get(url, headers, given))

        while url:
            value, after, _ = self.ask(what, call)
            yield value
            url, given = self._next(url, after), {}

    def _next(self, url: str, after: str) -> str:
        """The address of the next page at the endpoint, or "" where there is none.

        A mirror passes on addresses of the server it stands for, which lack the path that it has itself before
        theirs.  Their path and query are asked of the mirror, so no page is lost and the token goes nowhere else.
        """
        if not after:
            return ""
        there, here = urlsplit(urljoin(url, after)), urlsplit(self.endpoint)
        path = there.path if there.path.startswith(f"{here.path}/") else f"{here.path}{there.path}"
        place = there._replace(scheme=here.scheme, netloc=here.netloc, path=path).geturl()
        return place if place != url else ""


def _get(url: str, headers: Mapping[str, str], params: Params | None) -> tuple[Any, str, str]:
    """(value, address of the next page or "", address it came from)."""
    query = "&".join(f"{quote(name)}={quote(each, safe='')}" for name, each in _pairs(params or {}))
    address = f"{url}?{query}" if query else url
    with get_session().stream("GET", address, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
        hf_raise_for_status(response)
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _LARGEST_ANSWER:
                raise ValueError("an answer without end")
        after = response.links.get("next", {}).get("url", "")
        return json.loads(body), after, str(response.url)


def _pairs(params: Params) -> list[tuple[str, str]]:
    return [(name, each) for name, value in params.items() for each in ([value] if isinstance(value, str) else value)]
