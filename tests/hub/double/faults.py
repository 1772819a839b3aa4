"""What can go wrong between a client and the double, as values: which request, how often, and what is done to it.

An action is given the request and a way to get the honest answer; it may hold back, spoil or replace either.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote

from hub.double.answers import Asked, Hangup, Reply

__all__ = [
    "Action",
    "Cut",
    "Delay",
    "Do",
    "DropAfter",
    "DropBefore",
    "Edit",
    "Fault",
    "Flip",
    "Headers",
    "Hold",
    "Status",
    "Swap",
    "Truncate",
]

Answer: TypeAlias = Callable[[], Reply]


class Action(Protocol):
    """What a fault does."""

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        """The answer to send; ``answer()`` is the honest one, and applies what was asked."""


@dataclass(frozen=True, slots=True)
class Status:
    """Answer so, without applying anything: ``Status(503)``, ``Status(429, {"Retry-After": "3"})``."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "as the test wants it"}'

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        return Reply(self.status, self.body, self.headers)


@dataclass(frozen=True, slots=True)
class Delay:
    """Answer so many seconds later."""

    seconds: float

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        time.sleep(self.seconds)
        return answer()


@dataclass(frozen=True, slots=True)
class Hold:
    """Answer once ``release`` is called; ``reached.wait()`` lets a test act while a client waits, or kill it."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    apply_first: bool = False

    def release(self) -> None:
        """Let what waits go on."""
        self.released.set()

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer() if self.apply_first else None
        self.reached.set()
        self.released.wait(60)
        return answer() if reply is None else reply


@dataclass(frozen=True, slots=True)
class Do:
    """Call something first, such as a commit by somebody else: ``Do(lambda: repo.edit({...}))``; then answer."""

    call: Callable[[], object]

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        self.call()
        return answer()


@dataclass(frozen=True, slots=True)
class DropBefore:
    """Close the connection; nothing is applied."""

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        raise Hangup


@dataclass(frozen=True, slots=True)
class DropAfter:
    """Apply what was asked and close the connection without an answer."""

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        answer()
        raise Hangup


@dataclass(frozen=True, slots=True)
class Flip:
    """Change one byte of the file, at that place of the whole of it."""

    at: int = 0

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        if self.at < len(reply.body):
            body = bytearray(reply.body)
            body[self.at] ^= 1
            reply.body = bytes(body)
        return reply


@dataclass(frozen=True, slots=True)
class Truncate:
    """Send only the first so many bytes, as if there were no more."""

    length: int

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        reply.body = reply.body[: self.length]
        return reply


@dataclass(frozen=True, slots=True)
class Swap:
    """Send other bytes in place of the body."""

    body: bytes

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        reply.body = self.body
        return reply


@dataclass(frozen=True, slots=True)
class Cut:
    """Announce the whole body and break the connection after so many bytes of it."""

    after: int = 0

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        reply.cut = self.after
        return reply


@dataclass(frozen=True, slots=True)
class Headers:
    """Send these headers too, or in place of the honest ones: ``Headers({"ETag": '"../../../x"'})``."""

    headers: Mapping[str, str]

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        reply.headers |= self.headers
        return reply


@dataclass(frozen=True, slots=True)
class Edit:
    """Change an answer in JSON: the function changes what it is given, or returns something else."""

    change: Callable[[Any], Any]

    def __call__(self, asked: Asked, answer: Answer) -> Reply:
        reply = answer()
        value = json.loads(reply.body)
        changed = self.change(value)
        reply.body = json.dumps(value if changed is None else changed).encode()
        return reply


@dataclass(slots=True)
class Fault:
    """An action, and the requests it is done to.

    Attributes:
        part: what the path or query holds, quoted or not.
        where: "hub" or "cdn", or None for both.
        method: "GET", or None for any; several are separated by blanks.
        times: how often, or None for ever.
        after: so many requests of the kind pass first.
        hits: how often it was done.
    """

    action: Action
    part: str = ""
    where: str | None = None
    method: str | None = None
    times: int | None = 1
    after: int = 0
    hits: int = 0

    def takes(self, asked: Asked) -> bool:
        """Whether this request is meant; counts it if so."""
        meant = (
            (self.part in asked.target or self.part in unquote(asked.target))
            and self.where in {None, asked.where}
            and (self.method is None or asked.method in self.method.split())
            and (self.times is None or self.hits < self.times)
        )
        if meant and self.after:
            self.after -= 1
            return False
        self.hits += meant
        return meant
