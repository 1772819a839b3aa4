"""The double itself: two servers on this machine, a log of every request, and the faults a test asks for."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from hub.double.answers import Asked, Hangup, Reply, refused
from hub.double.calls import Site
from hub.double.cas import LocalCas
from hub.double.cdn_routes import answer_cdn
from hub.double.faults import Action, Fault
from hub.double.hub_routes import answer_hub
from hub.double.store import Account, Repo, Store
from hub.double.wire import Seen, body_of, send
from huggingface_hub import HfApi

__all__ = ["NOBODY", "READER", "STRANGER", "TOKEN", "Double"]

TOKEN = "hf_" + "s3cret0Tok3n" * 3
"""Writes; alice's, who is in the organisation acme."""
READER = "hf_" + "r3ad0nlyTok3" * 3
"""Only reads; alice's too."""
STRANGER = "hf_" + "str4ng3rTok3" * 3
"""Writes; mallory's, who is in no organisation."""
NOBODY = "hf_" + "n0b0dysTok3n" * 3
"""No account has it."""

_READS = ("GET", "HEAD")
_NO_CHANGE = ("/api/validate-yaml", "/preupload/", "/paths-info/", "/objects/batch", "/objects/verify")


class Double:
    """A Hugging Face Hub on this machine; see the package.

    Attributes:
        store, site: what it holds, and its settings; ``repo`` and ``site`` are for tests.
        faults: what goes wrong, in the order it is done.
        log: every request since the start or ``log.clear()``.
        broken: errors of the double's own, which a test must not leave behind.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.store = Store(
            accounts={
                TOKEN: Account(name="alice", orgs=("acme",)),
                READER: Account(name="alice", role="read", orgs=("acme",)),
                STRANGER: Account(name="mallory"),
            }
        )
        self.site = Site(store=self.store)
        self.faults: list[Fault] = []
        self.log: list[Seen] = []
        self.broken: list[BaseException] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._servers = [self._serve("hub", answer_hub, port), self._serve("cdn", answer_cdn, 0)]
        hub, cdn = (server.server_port for server in self._servers)
        # Two names, too: a client of 1.x takes one host for one origin, whatever its ports.
        self.site.hub, self.site.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"

    # ----------------------------------------------------------------------------------------- for tests

    @property
    def endpoint(self) -> str:
        """The hub's address, for ``HF_ENDPOINT``."""
        return self.site.hub

    def repo(self, name: str, *, private: bool = False) -> Repo:
        """The repository of that name, made if need be; see ``Repo`` for what can be done with it."""
        return self.store.repo(name, private=private)

    def api(self, token: str | bool | None = TOKEN) -> HfApi:
        """The real client, at this hub."""
        return HfApi(endpoint=self.endpoint, token=token)

    def fault(
        self,
        action: Action,
        part: str = "",
        *,
        where: str | None = None,
        method: str | None = None,
        times: int | None = 1,
        after: int = 0,
    ) -> Fault:
        """Do ``action`` to the next ``times`` requests (None: to all) whose address holds ``part``."""
        fault = Fault(action, part, where, method, times, after)
        self.faults.append(fault)
        return fault

    def seen(self, part: str = "", *, where: str | None = None, method: str | None = None) -> list[Seen]:
        """The requests of the log whose address holds ``part``."""
        return [
            each
            for each in list(self.log)
            if (part in each.target or part in unquote(each.target))
            and where in {None, each.where}
            and method in {None, each.method}
        ]

    def paths(self, where: str | None = None) -> list[str]:
        """The paths of the log, without queries."""
        return [each.path for each in self.seen(where=where)]

    def writes(self) -> list[Seen]:
        """The requests that may have changed something: neither reads nor questions asked by POST."""
        return [
            each
            for each in list(self.log)
            if each.method not in _READS and not any(part in each.path for part in _NO_CHANGE)
        ]

    def bytes_of(self, part: str = "", *, where: str | None = None) -> int:
        """Bytes served for addresses that hold ``part``, such as ".safetensors"."""
        return sum(each.served for each in self.seen(part, where=where))

    def enable_xet(self, folder: Path) -> None:
        """From now on offer Xet, with its store in ``folder``; before anything is committed."""
        self.store.cas = LocalCas(folder)

    def close(self) -> None:
        """Stop both servers and break what is connected."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by the other side meanwhile
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, folder: Path) -> None:
        """Commit every ``namespace/name`` folder below ``folder`` as a repository."""
        for place in sorted(folder.glob("*/*/")):
            files = {
                path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()
            }
            self.repo(f"{place.parent.name}/{place.name}").commit(files)

    # ------------------------------------------------------------------------------------------- serving

    def _serve(self, where: str, honest: Callable[[Site, Asked], Reply], port: int) -> ThreadingHTTPServer:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                with double._lock:
                    double._open.add(self.request)
                super().setup()

            def finish(self) -> None:
                with double._lock:
                    double._open.discard(self.request)
                super().finish()

            def answer(self) -> None:
                double._answer(self, where, honest)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the names the base class calls

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Silence: the double keeps its own log."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients hang up as they please; anything else is a mistake of the double's."""
                error = sys.exception()
                if error is not None and not isinstance(error, OSError):
                    double.broken.append(error)

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def _answer(self, handler: BaseHTTPRequestHandler, where: str, honest: Callable[[Site, Asked], Reply]) -> None:
        asked = Asked(
            where=where,
            method=handler.command,
            target=handler.path,
            headers={name.lower(): value for name, value in handler.headers.items()},
            body=body_of(handler),
        )
        seen = Seen(where, asked.method, asked.target, dict(asked.headers), len(asked.body))
        with self._lock:
            self.log.append(seen)
            faults = [fault.action for fault in self.faults if fault.takes(asked)]

        def plain() -> Reply:
            try:
                return honest(self.site, asked)
            except Reply as reply:
                return reply

        answer: Callable[[], Reply] = plain
        for action in reversed(faults):
            answer = _wrapped(action, asked, answer)
        try:
            reply = answer()
        except Reply as raised:  # by an action of a test's own
            reply = raised
        except Hangup:
            handler.close_connection = True
            return
        except Exception as error:  # noqa: BLE001 - a mistake of the double's, which the fixture reports
            self.broken.append(error)
            reply = refused(500, f"the double failed: {error!r}")
        send(handler, asked, seen, reply)


def _wrapped(action: Action, asked: Asked, answer: Callable[[], Reply]) -> Callable[[], Reply]:
    return lambda: action(asked, answer)
