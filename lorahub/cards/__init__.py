"""Model cards: a README that the Hub takes and people can use, made from an adapter's record and its headers.

The author's text and metadata stay as they are; what is ours lies between two comments and is brought up to date in its
place.  Nothing here reads weights, needs torch, or asks a hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from lorahub.adapter import AdapterHeader
from lorahub.cards import block
from lorahub.cards.authors import author_digest, mark, marked
from lorahub.cards.body import Facts, render, title_of
from lorahub.cards.front import FILE, edited, read_front, split
from lorahub.cards.layers import PICTURE, picture_of
from lorahub.cards.reconciling import reconcile
from lorahub.cards.usage import usage_of
from lorahub.cards.wanted import wanted
from lorahub.errors import RecordError
from lorahub.files.raw import open_regular
from lorahub.findings import Finding, Verdict
from lorahub.formats.peft.config import CONFIG
from lorahub.inspection import inspect
from lorahub.names import printable
from lorahub.plugins import load_registry
from lorahub.records import AdapterRecord

__all__ = ["FILE", "PICTURE", "Card", "make_card", "read_card", "replaces"]

LIMIT = 4 << 20
"""Bytes of a README, as much as may be published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A model card.

    Attributes:
        text: the whole README.md.
        findings: what differs between the README and the record; a degraded one is for whoever publishes to refuse.
        pictures: file name -> content, to lie beside it.
    """

    text: str
    findings: tuple[Finding, ...] = ()
    pictures: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))


def read_card(folder: Path) -> str | None:
    """The README of a folder with its line ends as they are, or None where there is none.

    Raises:
        AccessDenied, Unavailable: it is there and cannot be read.
        RecordError: it is no UTF-8 text, or larger than a README may be.
    """
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        return None
    with open_regular(path) as file:
        data = file.read(LIMIT + 1) or b""
    if len(data) > LIMIT:
        raise RecordError(f"{path} is larger than the {LIMIT:,} bytes a README may have", "shorten it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 at byte {error.start}", "save it as UTF-8") from None


def make_card(
    existing: str | None,
    header: AdapterHeader,
    record: AdapterRecord,
    *,
    repo: str,
    subfolder: str = "",
    picture: str | None = None,
) -> Card:
    """The card of an adapter; one made before, or written by hand, is brought up to date.

    Args:
        existing: the README as it is, line ends included, or None.
        header: the adapter.
        record: its record, as it will be published.
        repo: "ns/name", where it will be.
        subfolder: the folder within it, "" for its root.
        picture: an SVG to show instead of the one that is made from the headers.

    Raises:
        RecordError: the README's metadata cannot be read or changed, or our part of it was changed by hand; the message
            names the line, and nothing of the README is lost.
    """
    registry = load_registry()
    header = replace(header, record=record)
    found = inspect(header, registry)
    usage = usage_of(header, record, repo=repo, subfolder=subfolder)
    drawn, says = (picture, "what the adapter changes") if picture is not None else picture_of(header, record, registry)
    facts = Facts(
        header=header,
        record=record,
        found=found,
        usage=usage,
        registry=registry,
        repo=repo,
        picture=PICTURE if drawn else "",
        picture_says=says,
    )
    document = split(existing or "")
    where, before = block.take(document.body, document.body_line)
    have = read_front(document)
    want = wanted(header, record, usage, repo=repo, triggers=found.triggers)
    named = header.files.configs.get(CONFIG, {}).get("base_model_name_or_path")
    merged = reconcile(have, want, before, trained_from=named if isinstance(named, str) else "")
    body = document.body
    if not body.strip() and where is None:
        body = f"{document.newline}# {title_of(facts)}{document.newline}"
    author = mark(merged.values, block.around(body, where), merged.written)
    written = replace(merged.written, author=author)
    body = block.place(body, where, render(facts), written, document.newline)
    front = edited(document, have, dict(merged.values))
    return Card(
        text=document.changed(front=front, body=body).text(),
        findings=(*merged.findings, *_left(document.body, merged.replaced, document.body_line)),
        pictures={PICTURE: drawn.encode()} if drawn else {},
    )


def replaces(new: str, old: str, *, before: str) -> bool:
    """Whether a README in place of another loses what somebody wrote there.

    It does not where both say the same around our part, or where the new one is an edit of the old.

    Args:
        new: as it is published.
        old: as it is there.
        before: the new one as it was before our part was brought up to date, which remembers what it was made around.
    """
    try:
        theirs = author_digest(old)
    except RecordError:  # of what cannot be taken apart, everything counts
        return old.split() != new.split()
    return theirs not in ("", author_digest(new), marked(before))


def _left(body: str, replaced: tuple[str, ...], before: int) -> list[Finding]:
    """Where the author's text still shows what was replaced in the metadata: that is theirs to change."""
    lines = body.splitlines()
    return [
        Finding(
            code="card-path-in-text",
            axis="policy",
            level=Verdict.UNVERIFIED,
            message=f"the text of {FILE} shows {printable(path)[:120]}, a place that nobody else has",
            where=tuple(f"line {before + at + 1}" for at in at_lines),
            remedy="correct these lines by hand: the text is left as it is",
        )
        for path in replaced
        if len(path) > 1 and (at_lines := [at for at, line in enumerate(lines) if path in line])
    ]
