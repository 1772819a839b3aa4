"""What a route gets: the request, who asks, which repository, and the site it belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from hub.double.answers import Asked, Reply, document, refused
from hub.double.files import Commit
from hub.double.store import Account, Repo, Store

__all__ = ["Call", "Site", "Upload"]

MIB = 1 << 20


@dataclass(slots=True, kw_only=True)
class Upload:
    """An LFS object on its way: what was announced, and the parts that came."""

    oid: str
    size: int
    repo: str
    parts: dict[int, bytes] = field(default_factory=dict, repr=False)


@dataclass(slots=True, kw_only=True)
class Site:
    """The settings of a double, and what both of its servers know.

    Attributes:
        hub, cdn: their addresses.
        page_size: entries in an answer before it names a next page.
        multipart_above: bytes from which LFS objects go up in parts of ``chunk``.
        resolve_cache: small files come by a relative redirect, as on the real Hub today.
        downloads: signature -> sha256, of addresses that were given out.
        uploads: number -> what may be put there.
    """

    store: Store
    hub: str = ""
    cdn: str = ""
    page_size: int = 1000
    multipart_above: int = 50 * MIB
    chunk: int = 16 * MIB
    resolve_cache: bool = False
    downloads: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def sign(self, repo: Repo, path: str, sha256: str) -> str:
        """A new address of an LFS object, ending in the file's path; no two are alike."""
        signature = f"d{next(self.numbers)}"
        self.downloads[signature] = sha256
        return f"{self.cdn}/{repo.name}/{sha256}/{quote(path)}?{urlencode({'signature': signature, 'expires': 3600})}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a route.

    Attributes:
        account: who asks, or None.
        parts: what the route's pattern named, unquoted.
        found: the repository, where the route is about one; ``repo`` gives it.
    """

    site: Site
    asked: Asked
    account: Account | None
    parts: dict[str, str]
    found: Repo | None = None

    @property
    def repo(self) -> Repo:
        """The repository the route is about."""
        assert self.found is not None
        return self.found

    @property
    def user(self) -> Account:
        """Who asks.

        Raises:
            Reply: 401, nobody.
        """
        if self.account is None:
            raise refused(401, "Invalid username or password.")
        return self.account

    def commit(self, revision: str | None = None) -> Commit:
        """The commit of ``revision``, or of the one in the address.

        Raises:
            Reply: 404, there is none.
        """
        revision = self.parts.get("rev", "main") if revision is None else revision
        found = self.repo.commits.get(self.repo.find(revision) or "")
        if found is None:
            raise refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def own(self, namespace: str) -> None:
        """Pass if the one who asks may write there.

        Raises:
            Reply: 401, 403.
        """
        if self.user.role != "write":
            raise refused(403, "You don't have the required permissions: this token only reads.")
        if not self.user.owns(namespace):
            raise refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')

    def page(self, items: Sequence[Any], *, commit: str | None = None) -> Reply:
        """A page of ``items``, with the absolute address of the next one."""
        size = min(int(self.asked.option("limit") or self.site.page_size), self.site.page_size)
        start = int(self.asked.option("cursor", "0"))
        headers = {} if commit is None else {"X-Repo-Commit": commit}
        if start + size < len(items):
            query = urlencode(self.asked.query | {"cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.site.hub}{self.asked.path}?{query}>; rel="next"'
        return document(items[start : start + size], headers=headers)
