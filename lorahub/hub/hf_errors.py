"""What huggingface_hub raises, as lorahub's errors with a remedy.

Messages are written here and never taken from a response: its text, its request and its headers may hold a token or
terminal escapes, so the original error is not chained either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

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

__all__ = ["TRANSPORT", "UNREACHED", "stated_delay", "status_of", "typed"]

T = TypeVar("T")

# The client's own base class is the HTTP library's: httpx2 since huggingface_hub 2, httpx before.
TRANSPORT: type[BaseException] = HfHubHTTPError.__bases__[0]

UNREACHED = frozenset({"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"})
"""Names of the HTTP library's classes that mean the server was not there at all."""

_LOGIN = "Log in: hf auth login"
_CACHED = "What was pulled before is there offline: HF_HUB_OFFLINE=1"

Row = tuple[type[LorahubError], str, str]

# The first class that fits decides: gated repositories are a kind of missing ones to the client.
_CLASSES: tuple[tuple[type[BaseException], Row], ...] = (
    (GatedRepoError, (AccessDenied, "{what} is gated: its authors grant access", f"Ask on {{page}}.  Then: {_LOGIN}")),
    (DisabledRepoError, (AccessDenied, "{what} was disabled by the hub or its author", "See {page}")),
    (RevisionNotFoundError, (NotFound, "{what} has no such revision", "")),
    (EntryNotFoundError, (NotFound, "{what} does not hold the file", "")),
    (
        RepositoryNotFoundError,
        (NotFound, "there is no {what}, or it is private", f"See {{page}}.  If it is yours: {_LOGIN}"),
    ),
    (OfflineModeIsEnabled, (Offline, "{what} is not here and the network is switched off", "Unset HF_HUB_OFFLINE.")),
    (LocalTokenNotFoundError, (AccessDenied, "a token is needed for {what} and there is none", _LOGIN)),
    (BadRequestError, (Unavailable, "the hub does not understand the request for {what}", "")),
)
_STATUSES: Mapping[int, Row] = {
    401: (AccessDenied, "the hub does not accept the token", f"{_LOGIN}, or unset HF_TOKEN"),
    403: (
        AccessDenied,
        "the token does not give access to {what}",
        f"See {{page}}.  {_LOGIN}",
    ),
    404: (NotFound, "there is no {what}", "See {page}"),
    429: (Unavailable, "the hub asks for fewer requests{delay}", f"Try again later.  {_LOGIN} for a higher limit."),
}


def status_of(error: BaseException) -> int | None:
    """The HTTP status that ``error`` reports, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def stated_delay(error: BaseException) -> int | None:
    """Seconds the server asked to wait, or None."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if status_of(error) == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    after = headers.get("retry-after", "")
    return int(after) if after.isdecimal() else None


def typed(call: Callable[[], T], *, what: str, page: str, here: bool = False) -> T:
    """The result of ``call``; what the client raises becomes an error about ``what``, to be looked at on ``page``.

    ``here`` says that a folder of that name lies on this machine, which may be what was meant.

    Raises:
        NotFound, AccessDenied, Offline, Unavailable: in place of the client's errors.
        OSError: what the system says about files here passes as it is.
    """
    try:
        return call()
    except LorahubError:
        raise
    except (HfHubHTTPError, TRANSPORT, ConnectionError, LocalTokenNotFoundError) as error:
        failure = _failure(error, what, page, here)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the client trips over a strange answer
        failure = Unavailable(f"the hub answered about {what} with something that is no description of a repository")
    raise failure  # outside the handler, so that the original stays unchained


def _failure(error: BaseException, what: str, page: str, here: bool) -> LorahubError:
    row = next((row for kind, row in _CLASSES if isinstance(error, kind)), None)
    status = status_of(error)
    delay = stated_delay(error)
    if row is None and status is not None:
        row = _STATUSES.get(status, (Unavailable, f"the hub failed with status {status}", "Try again later."))
    if row is None and type(error).__name__ in UNREACHED:
        row = (Offline, "the hub cannot be reached for {what}", _CACHED)
    if row is None:
        row = (Unavailable, f"the connection to the hub failed ({type(error).__name__})", "Run it again; it goes on.")
    kind, message, hint = row
    if here and kind is NotFound:
        hint = "To use the folder that lies here, write ./{what}"
    words = {"what": what, "page": page, "delay": f" and names {delay} seconds" if delay is not None else ""}
    return kind(message.format_map(words), hint.format_map(words))
