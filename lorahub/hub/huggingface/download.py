"""Bytes over HTTP, patiently: transient failures are tried again, and a file goes on where it stopped.

Uses huggingface_hub's session, so that proxies, certificates and the rule that a token never follows a redirect to
another host are its own.  What arrives is not believed: the caller hashes it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, final

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # at first use

from lorahub.errors import IntegrityError
from lorahub.hub.huggingface.errors import TRANSPORT, UNREACHED, stated_delay, status_of

__all__ = ["PAUSES", "Ranges", "download", "patiently", "read_range"]

T = TypeVar("T")

PAUSES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try."""

_LONGEST_PAUSE = 30
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_CHUNK = 1 << 20
_AT_ONCE = 8


def patiently(call: Callable[[], T]) -> T:
    """``call()``, tried again after transient failures.

    A delay that the server states is kept if it is at most 30 seconds.  A server that cannot be reached at all is
    not tried again.
    """
    for tries in range(len(PAUSES)):
        try:
            return call()
        except TRANSPORT as error:
            pause = _pause(error, tries)
            if pause is None:
                raise
        time.sleep(pause)
    return call()


def download(url: str, target: Path, *, size: int, headers: Mapping[str, str], arrived: Callable[[int], None]) -> None:
    """Bring ``size`` bytes to ``target``, going on after what lies there; ``arrived`` hears how many there are.

    Raises:
        IntegrityError: the server sends more than ``size`` bytes, or ends early again and again.
        OSError: the file cannot be written, or the client gave up.
    """
    fruitless = 0
    with target.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
        furthest = file.tell()  # what begins again and again with the same few bytes comes no nearer
        while (have := file.seek(0, io.SEEK_END)) < size:
            pause = 0.0
            try:
                _fetch(url, file, have, size, headers, arrived)
            except TRANSPORT as error:
                wait = _pause(error, fruitless)
                if wait is None:
                    raise
                pause = wait
            fruitless = 0 if file.tell() > furthest else fruitless + 1
            furthest = max(furthest, file.tell())
            if fruitless > len(PAUSES):
                raise IntegrityError(f"the hub sends {furthest:,} of {size:,} bytes and no more", "Try again later.")
            time.sleep(pause)


def _fetch(
    url: str, file: io.BufferedWriter, have: int, size: int, headers: Mapping[str, str], arrived: Callable[[int], None]
) -> None:
    with _stream(url, headers, f"bytes={have}-" if have else None) as response:
        if response.status_code == 416:  # what lies here is no start of what lies there
            file.truncate(0)
            return
        hf_raise_for_status(response)
        if have and not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
            file.truncate(0)  # the whole file comes, or another part than was asked for
            file.seek(0)
            if response.status_code == 206:
                return
        for chunk in response.iter_bytes(_CHUNK):
            if file.tell() + len(chunk) > size:
                raise IntegrityError(
                    f"the hub sends more than the {size:,} bytes that it listed",
                    "Try again; if it stays so, something on the way answers in its place: a login page, a proxy.",
                )
            file.write(chunk)
            arrived(file.tell())


def read_range(
    url: str, *, offset: int, length: int, headers: Mapping[str, str], landed: Callable[[str], None] | None = None
) -> bytes:
    """Up to ``length`` bytes from ``offset`` on; fewer at the end of the file.

    ``landed`` hears at which address they were, after redirects.

    Raises:
        OSError: the client gave up.
    """
    with _stream(url, headers, f"bytes={offset}-{offset + length - 1}") as response:
        if response.status_code == 416:
            return b""
        if landed is not None and response.status_code == 206:
            landed(str(response.url))
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else offset
        data = bytearray()
        for chunk in response.iter_bytes(_CHUNK):
            data += chunk
            if len(data) >= skip + length:
                break
        return bytes(data[skip : skip + length])


@final
class Ranges:
    """Ranges of one file: the first through the hub, the others from where that came to, which spares a redirect each.

    A token goes to the hub alone.  An address that does not serve any more, as signed ones do for a while only, is
    forgotten, and the hub is asked again.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = url, headers
        self._place = ""

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset`` on; may be called from several threads.

        Raises:
            OSError: the client gave up.
        """
        place = self._place
        if place and place != self._url:
            bare = {name: value for name, value in self._headers.items() if name.lower() != "authorization"}
            try:
                return patiently(lambda: read_range(place, offset=offset, length=length, headers=bare))
            except TRANSPORT:
                self._place = ""
        return patiently(
            lambda: read_range(self._url, offset=offset, length=length, headers=self._headers, landed=self._landed)
        )

    def read_all(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of every span, (offset, length): the first shows the way, the others follow several at a time.

        Raises:
            OSError: the client gave up.
        """
        first = [self.read(*span) for span in spans[:1]]
        if len(spans) < 2:
            return first
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            return [*first, *pool.map(lambda span: self.read(*span), spans[1:])]

    def _landed(self, place: str) -> None:
        self._place = place


def _stream(url: str, headers: Mapping[str, str], part: str | None):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """The client's own streaming context; its type is that of the HTTP library it was built with."""
    ask = {**headers, "accept-encoding": "identity"} | ({"range": part} if part else {})
    return get_session().stream(
        "GET", url, headers=ask, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    )


def _pause(error: BaseException, tries: int) -> float | None:
    """Seconds to wait before the next try, or None where there should be none."""
    if tries >= len(PAUSES) or type(error).__name__ in UNREACHED:
        return None
    if isinstance(error, HfHubHTTPError):
        stated = stated_delay(error)
        if status_of(error) not in _TRANSIENT or (stated or 0) > _LONGEST_PAUSE:
            return None
        if stated is not None:
            return float(stated)
    return PAUSES[tries]
