"""Which base an adapter's own files name, where nobody recorded one: a name, and never a guess at its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorahub.adapter import AdapterHeader
from lorahub.errors import InvalidRef
from lorahub.front_matter import front_matter
from lorahub.names import COMMIT, Ref, printable
from lorahub.records import BaseRecord

__all__ = ["Named", "named_base"]

_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What was found: the base, or the ``local`` path that stands where its name should, and ``where`` that is."""

    base: BaseRecord | None = None
    local: str = ""
    where: str = ""


def named_base(header: AdapterHeader, readme: str) -> Named:
    """The base that the PEFT config names, with its commit where that is one; else the one that the README names.

    A path is no name: it means another base, or none, on every other machine.  So does a name under which a folder
    lies here, since that is what it meant when the adapter was trained here.
    """
    local = Named()
    for where, text, revision in _claims(header, readme):
        repo = _repo(text)
        if repo is None or Path(text).is_dir():
            local = local if local.local else Named(local=printable(text), where=where)
            continue
        commit = revision if isinstance(revision, str) and COMMIT.fullmatch(revision) else None
        return Named(base=BaseRecord.checked(repo_id=repo, **({"revision": commit} if commit else {})), where=where)
    return local


def _claims(header: AdapterHeader, readme: str) -> Iterator[tuple[str, str, object]]:
    """(file, name, revision) of every place that names a base."""
    config = header.files.configs.get(_CONFIG, {})
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        yield _CONFIG, named, config.get("revision")
    card = front_matter(readme).get("base_model")
    card = card[0] if isinstance(card, list) and len(card) == 1 else card
    if isinstance(card, str) and card:
        yield "README.md", card, None


def _repo(text: str) -> str | None:
    try:
        ref = Ref.parse(text, bare=True)
    except InvalidRef:
        return None
    return ref.repo if ref.repo == text else None
