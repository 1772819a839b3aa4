"""A search on a Hub: the question as its parameters, the answers as listings.

An adapter's base, library and licence are tags there; nothing of an answer is believed to have the shape it should.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorahub.errors import Unavailable, UsageError
from lorahub.hub.hub import SORTS, Listing
from lorahub.hub.huggingface.describing import repository
from lorahub.hub.searches import base_name
from lorahub.names import printable

__all__ = ["listings", "query"]

_PAGE = 100
_SORT = {"downloads": "downloads", "likes": "likes", "updated": "lastModified", "created": "createdAt"}
_EXPAND = ["author", "createdAt", "downloads", "gated", "lastModified", "library_name", "likes", "tags"]
_ADAPTERS = "lora"
_OF_BASE = "base_model:adapter:"
_MOST_TAGS = 100


def query(
    text: str,
    *,
    base: str | None,
    author: str | None,
    library: str | None,
    tags: Sequence[str],
    sort: str,
    limit: int,
) -> dict[str, str | list[str]]:
    """The parameters of ``GET /api/models``.

    Where neither base, library nor tag says what kind of repositories are meant, those tagged ``lora`` are.

    Raises:
        UsageError: there is no such order, no such count, or the base is a path.
    """
    if sort not in SORTS or limit < 1:
        raise UsageError(f"a search has no order '{printable(sort)}' or no results", f"One of: {', '.join(SORTS)}")
    filters = [*tags, *([library] if library else [])]
    if base is not None:
        filters.append(f"{_OF_BASE}{base_name(base)}")
    elif not filters:
        filters.append(_ADAPTERS)
    asked: dict[str, str | list[str]] = {"filter": filters, "sort": _SORT[sort], "limit": str(min(limit, _PAGE))}
    words = {"search": text, "author": author}
    return asked | {name: value for name, value in words.items() if value} | {"expand": _EXPAND}


def listings(pages: Iterable[Any], limit: int) -> list[Listing]:
    """Up to ``limit`` listings out of the pages, none asked for beyond that.

    Raises:
        Unavailable: a page is no list of repositories.
    """
    found: dict[str, Listing] = {}
    for page in pages:
        if not isinstance(page, list):
            raise Unavailable("the hub answered the search with something that is no list of repositories")
        before = len(found)
        for entry in page:
            listing = _listing(entry) if isinstance(entry, dict) else None
            if listing is not None:
                found.setdefault(listing.repo, listing)
        if len(found) >= limit or len(found) == before:  # a page with nothing new is no way forward
            break
    return list(found.values())[:limit]


def _listing(entry: dict[str, Any]) -> Listing | None:
    """One repository; None where its name is none, so that nothing could be done with it."""
    repo = repository(entry.get("id"))
    if repo is None:
        return None
    given = entry.get("tags")
    words = given[:_MOST_TAGS] if isinstance(given, list) else []
    tags = tuple(printable(word) for word in words if isinstance(word, str))
    bases = [repository(tag.removeprefix(_OF_BASE)) for tag in tags if tag.startswith(_OF_BASE)]
    return Listing(
        repo=repo,
        base=next(filter(None, bases), None),
        downloads=_count(entry.get("downloads")),
        likes=_count(entry.get("likes")),
        updated=_text(entry.get("lastModified"))[:10],
        library=_text(entry.get("library_name")),
        license=next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), ""),
        tags=tags,
        gated=bool(entry.get("gated")),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _text(value: object) -> str:
    return printable(value[:64]) if isinstance(value, str) else ""
