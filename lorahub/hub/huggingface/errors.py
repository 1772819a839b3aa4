"""What huggingface_hub raises, as lorahub's errors with a remedy.

Messages are written here and never taken from a response: its text, its request and its headers may hold a token or
terminal escapes, so the original error is not chained either.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # exported at first use

from lorahub.errors import AccessDenied, LorahubError, NotFound, Offline, Unavailable
from lorahub.findings import Finding, Verdict
from lorahub.hub.noticed import commit_gone

__all__ = ["TRANSPORT", "UNREACHED", "stated_delay", "status_of", "typed"]

T = TypeVar("T")

# The client's own base class is the HTTP library's: httpx2 since huggingface_hub 2, httpx before.
TRANSPORT: type[BaseException] = HfHubHTTPError.__bases__[0]

UNREACHED = frozenset({"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"})
"""Names of the HTTP library's classes that mean the server was not there at all."""

_LOGIN = "Log in: hf auth login"
_CACHED = "What was pulled before is there offline: HF_HUB_OFFLINE=1"
_LONG_HEADER = 200
_LONGEST_DELAY = 7 * 86_400
_PORTAL = "If this network has a log-in page or a proxy, open {page} in a browser."


class _Row(NamedTuple):
    """What a failure becomes: the class, message and hint, and a code for programs where there is one."""

    kind: type[LorahubError]
    message: str
    hint: str
    code: str = ""


_MISSING = _Row(
    NotFound,
    "there is no {what}, or it is private",
    "See {page}.  If it is yours, log in as its owner: hf auth login",
    "repo-missing",
)

# The first class that fits decides: gated repositories are a kind of missing ones to the client.
_CLASSES: tuple[tuple[type[BaseException], _Row], ...] = (
    (
        GatedRepoError,
        _Row(
            AccessDenied,
            "{what} is gated: its authors grant access",
            "Ask for access on {page}, and log in as who asked: hf auth login",
            "gated",
        ),
    ),
    (
        DisabledRepoError,
        _Row(AccessDenied, "{what} was disabled by the hub or its author", "See {page}", "disabled"),
    ),
    (RevisionNotFoundError, _Row(NotFound, "{what} has no such revision", "lorahub versions {what}")),
    (EntryNotFoundError, _Row(NotFound, "{what} does not hold the file", "lorahub versions {what}")),
    (RepositoryNotFoundError, _MISSING),
    (
        OfflineModeIsEnabled,
        _Row(Offline, "{what} is not here and the network is switched off", "Unset HF_HUB_OFFLINE."),
    ),
    (LocalTokenNotFoundError, _Row(AccessDenied, "a token is needed for {what} and there is none", _LOGIN)),
    (BadRequestError, _Row(Unavailable, "the hub does not understand the request for {what}", "See {page}")),
)
_STATUSES: Mapping[int, _Row] = {
    401: _Row(AccessDenied, "the hub does not accept the token", f"{_LOGIN}, or unset HF_TOKEN", "token-refused"),
    403: _Row(
        AccessDenied,
        "the token does not give access to {what}",
        "See {page}.  Log in as one who may: hf auth login",
        "access-denied",
    ),
    402: _Row(
        AccessDenied,
        "the plan of the account does not cover this for {what}",
        "See what it covers, and what is left of it, on {page}/settings",
        "payment-required",
    ),
    404: _Row(NotFound, "there is no {what}", "See {page}"),
    413: _Row(
        Unavailable,
        "the hub, or a proxy before it, takes no request of this size for {what}",
        "Look with --dry-run at what is sent; what is large and no part of the adapter can go elsewhere.",
        "too-large",
    ),
    429: _Row(Unavailable, "the hub asks for fewer requests{delay}", "Try again then.", "rate-limited"),
    507: _Row(
        AccessDenied,
        "the storage of the account that owns {what} is full",
        "Free some, or have it extended, on {page}/settings",
        "storage-full",
    ),
}
_ANONYMOUS: Mapping[int, _Row] = {
    401: _MISSING,
    403: _Row(AccessDenied, "{what} is not open to everybody", f"See {{page}}.  {_LOGIN}", "access-denied"),
    429: _Row(
        Unavailable,
        "the hub asks for fewer requests{delay}",
        "Try again then, or log in for a higher limit: hf auth login",
        "rate-limited",
    ),
}

# What lies beneath a connection that did not come about, the first that fits.
_BENEATH: tuple[tuple[type[BaseException], _Row], ...] = (
    (
        ssl.SSLError,
        _Row(
            Unavailable,
            "the certificate of the hub is not accepted, so nothing was asked about {what}",
            "If a proxy of yours stands between: SSL_CERT_FILE=its-certificate.pem",
        ),
    ),
    (
        socket.gaierror,
        _Row(Offline, "the hub cannot be reached for {what}: nobody knows its name here (no network?)", _CACHED),
    ),
    (
        ConnectionRefusedError,
        _Row(Offline, "the hub cannot be reached for {what}: nobody answers at its address", _CACHED),
    ),
)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that ``error`` reports, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def stated_delay(error: BaseException) -> int | None:
    """Seconds the server asked to wait, or None where it named none, or one beyond all sense."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    if status_of(error) == 429 and len(headers.get("ratelimit", "")) < _LONG_HEADER:
        limit = parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0 and limit.reset_in_seconds <= _LONGEST_DELAY:
            return limit.reset_in_seconds
    after = headers.get("retry-after", "")
    sensible = after.isdecimal() and len(after) < _LONG_HEADER and int(after) <= _LONGEST_DELAY
    return int(after) if sensible else None


def typed(
    call: Callable[[], T], *, what: str, page: str, here: bool = False, anonymous: bool = False, commit: str = ""
) -> T:
    """The result of ``call``; what the client raises becomes an error about ``what``, to be looked at on ``page``.

    Args:
        call: asks the hub.
        what: the repository.
        page: where people look at it.
        here: a folder of that name lies on this machine, which may be what was meant.
        anonymous: no token went with the request.
        commit: which state of it was asked for, where one was: that it is missing then has a finding of its own.

    Raises:
        NotFound, AccessDenied, Offline, Unavailable: in place of the client's errors.
        OSError: what the system says about files here passes as it is.
    """
    try:
        return call()
    except LorahubError:
        raise
    except (HfHubHTTPError, TRANSPORT, ConnectionError, LocalTokenNotFoundError) as error:
        failure = _failure(error, what, page, here, anonymous, commit)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the client trips over a strange answer
        message = f"the hub answered about {what} with something that is no description of a repository"
        failure = Unavailable(message, _PORTAL.format(page=page))
    raise failure  # outside the handler, so that the original stays unchained


def _failure(error: BaseException, what: str, page: str, here: bool, anonymous: bool, commit: str) -> LorahubError:
    if commit and isinstance(error, RevisionNotFoundError):
        gone = commit_gone(what, commit)
        return NotFound(gone.message, gone.remedy, (gone,))
    row = next((row for kind, row in _CLASSES if isinstance(error, kind)), None)
    status, delay = status_of(error), stated_delay(error)
    if row is None and status is not None:
        rows = {**_STATUSES, **_ANONYMOUS} if anonymous else _STATUSES
        row = rows.get(status, _Row(Unavailable, f"the hub failed with status {status}", "Try again later."))
    if row is None and type(error).__name__ in UNREACHED:
        below = _beneath(error)
        plain = _Row(Offline, "the hub cannot be reached for {what}", _CACHED)
        row = next((row for kind, row in _BENEATH if any(isinstance(each, kind) for each in below)), plain)
    if row is None:
        name = type(error).__name__
        row = _Row(Unavailable, f"the connection to the hub failed ({name})", "Run it again; it goes on.")
    words = {"what": what, "page": page, "delay": "" if delay is None else f" {_until(delay)}"}
    message, hint = row.message.format_map(words), row.hint.format_map(words)
    if here and row.kind is NotFound:
        hint = f"To use the folder that lies here, write ./{what}"
    found = Finding(code=row.code, axis="policy", level=Verdict.INCOMPATIBLE, message=message, remedy=hint)
    return row.kind(message, hint, (found,) if row.code else ())


def _until(delay: int) -> str:
    """How long to wait, and by which clock."""
    return f"for {delay:,} seconds, until {time.strftime('%H:%M:%S', time.localtime(time.time() + delay))}"


def _beneath(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and len(found) < 10:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found
