"""Bytes on the wire: a request's body, and an answer with its ranges and breaks; and the note that is kept of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from hub.double.answers import Asked, Reply

__all__ = ["Seen", "body_of", "send"]

_PIECE = 1 << 16


@dataclass(slots=True)
class Seen:
    """One request that came, and what went out.

    Attributes:
        target: path and query, as sent.
        path: without the query.
        headers: names in lower case.
        status: of the answer, 0 where there was none.
        served: bytes of the body that were sent, up to one piece of 64 KiB more where the client hung up.
        received: bytes of the body that came.
    """

    where: str
    method: str
    target: str
    headers: dict[str, str] = field(repr=False)
    received: int = 0
    status: int = 0
    served: int = 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


def body_of(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request.

    Raises:
        ConnectionError: the client went away in the middle: what came must not be taken for all of it.
    """
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        body = handler.rfile.read(size := int(handler.headers.get("Content-Length") or 0))
        if len(body) < size:
            raise ConnectionAbortedError
        return body
    chunks = []
    while line := handler.rfile.readline():
        chunks.append(handler.rfile.read(size := int(line.partition(b";")[0], 16)))
        handler.rfile.readline()
        if not size:
            return b"".join(chunks)
    raise ConnectionAbortedError


def _part(asked: Asked, reply: Reply) -> tuple[int, bytes, dict[str, str]]:
    """Row 23: the part of a file that a Range names."""
    wanted, size = asked.headers.get("range"), len(reply.body)
    if not reply.ranged or reply.status != 200:
        return reply.status, reply.body, {}
    if wanted is None:
        return 200, reply.body, {"Accept-Ranges": "bytes"}
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size or start >= stop:
        return 416, b"", {"Content-Range": f"bytes */{size}"}
    return 206, reply.body[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}


def send(handler: BaseHTTPRequestHandler, asked: Asked, seen: Seen, reply: Reply) -> None:
    status, body, extra = _part(asked, reply)
    seen.status = status
    try:
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **extra, **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if asked.method == "HEAD":
            return
        if reply.cut is not None and reply.cut < len(body):
            body = body[: reply.cut]
            handler.close_connection = True
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            seen.served += len(piece)  # before they are sent, for a test looks as soon as its client has the last one
            handler.wfile.write(piece)
    except OSError:  # the client hung up, as some tests make it do
        handler.close_connection = True
