"""The metadata record of an adapter, ``lorahub.json``: what its native files have no word for, and their digests.

The native files stay the authority for the arithmetic; the record says what they cannot, above all which base the
adapter was made for.  Knows no format and opens no weights.  The fields are in ``record_fields.py``, the JSON Schema is
generated from both, and a newer minor version's fields are kept as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Final, Self

from pydantic import Field, JsonValue, ValidationError

from lorahub import strict_json
from lorahub.errors import NotFound, RecordError
from lorahub.files.digest import file_digest
from lorahub.files.raw import open_regular
from lorahub.record_fields import (
    BaseRecord,
    Compat,
    Derivation,
    Digests,
    Evaluation,
    FileRecord,
    KindName,
    ModuleRecord,
    Moment,
    Name,
    Parent,
    Path,
    Recipe,
    RecordPart,
    SchemaVersion,
    Strength,
    Training,
    Version,
    enumerate_problems,
    explain,
)

__all__ = ["FILENAME", "LIMIT", "SCHEMA_VERSION", "AdapterRecord", "BaseRecord", "Compat", "FileRecord", "ModuleRecord"]

FILENAME: Final = "lorahub.json"
SCHEMA_VERSION: Final = "1.0"
LIMIT: Final = 4 << 20
"""Bytes of a record: room for the modules of a mixture of experts, and no more."""

_ROOTS = "home|Users|root|mnt|tmp|var|opt|data|workspace|content|kaggle|private|Volumes|scratch|srv|media|usr|etc"
_MACHINE = re.compile(
    rf"(?:^|[\s\"'`=(,;\[])(?:/(?:{_ROOTS})/|~/|[A-Za-z]:[\\/](?!/)|\\\\[\w.-]+\\|file://)"  # anywhere in a text
    r"|^/[\w.@+-]+/[\w.@+/ -]*$"  # or all of it
)


class AdapterRecord(RecordPart):
    """What is known of an adapter beyond its native files."""

    schema_version: SchemaVersion = Field(description="Version of this schema; another major is refused.")
    kinds: tuple[KindName, ...] = Field(min_length=1, description="Every kind the adapter uses, as ['lora'].")

    name: Name | None = Field(default=None, description="What the adapter is called.")
    title: str = Field(default="", description="Its name for people.")
    description: str = Field(default="", description="What it does, in a sentence or two.")
    authors: tuple[str, ...] = Field(default=(), description="Who made it.")
    created: Moment | None = Field(default=None, description="When it was made.")
    version: Version | None = Field(default=None, description="Version of the adapter, as '1.2.0'.")

    modules: tuple[ModuleRecord, ...] = Field(default=(), description="What changes, module by module.")
    components: tuple[str, ...] = Field(
        default=(), description="Parts of a pipeline that change, as ['unet', 'text_encoder']."
    )
    base: BaseRecord | None = Field(default=None, description="The base it was made for.")
    compat: Compat | None = Field(default=None, description="What else it goes with.")

    parents: tuple[Parent, ...] = Field(default=(), description="The adapters it was composed from.")
    recipe: Recipe | None = Field(default=None, description="How they were composed.")
    derivation: Derivation | None = Field(default=None, description="How its files were converted.")
    training: Training | None = Field(default=None, description="How it was trained.")

    trigger_words: tuple[str, ...] = Field(default=(), description="Words that call it.")
    usage_hint: str = Field(default="", description="How to use it well.")
    strength: Strength | None = Field(default=None, description="Which weights make sense.")
    prompt_template: str = Field(default="", description="The template it was trained with.")
    activation: tuple[int, ...] = Field(default=(), description="Tokens that activate it (aLoRA).")

    pipeline_tag: str = Field(default="", description="The Hub's name for its task.")
    tags: tuple[str, ...] = Field(default=(), description="The Hub's tags.")
    language: tuple[str, ...] = Field(default=(), description="Languages it is for, as ['en'].")
    license: str = Field(default="", description="SPDX identifier, or 'other' with license_link.")
    license_link: str = Field(default="", description="Where the licence's text is.")
    inherits_from: tuple[str, ...] = Field(
        default=(), description="Whose licences bind it too: the base, parents, datasets."
    )
    evals: tuple[Evaluation, ...] = Field(default=(), description="What was measured.")
    thumbnail: str = Field(default="", description="A picture: a path within the folder, or a URL.")

    files: dict[Path, FileRecord] = Field(
        default={}, description="The native files as they were.", json_schema_extra={"additionalProperties": False}
    )
    digest: Digests | None = Field(default=None, description="Digests that do not depend on how files are written.")
    extra: dict[str, JsonValue] = Field(default={}, description="Anything else; never interpreted.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The record in a file.

        Raises:
            NotFound, AccessDenied, Unavailable: it cannot be read.
            RecordError: it is no record; the message lists every problem with its key path.
        """
        with open_regular(path) as file:
            text = file.read(LIMIT + 1) or b""
        return cls.from_json(text, where=os.fspath(path))

    @classmethod
    def from_json(cls, document: str | bytes | Mapping[str, Any], *, where: str = "record") -> Self:
        """The record in a JSON text or object; types are exact, so the string "8" is no rank.

        Raises:
            RecordError: it is no record; the message lists every problem with its key path.
        """
        hint = "correct it, or write it anew: lorahub record FOLDER"
        try:
            text = strict_json.compact(dict(document)) if isinstance(document, Mapping) else document
            value = strict_json.read(text, limit=LIMIT)
        except (strict_json.NotStrict, TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"{where}: {error}", hint) from None
        if isinstance(value, dict) and (newer := _other_major(value.get("schema_version"))):
            raise RecordError(
                f"{where}: schema_version: the record is written in version {newer}, and this lorahub reads 1.x",
                "pip install --upgrade lorahub-core",
            )
        try:
            return cls.model_validate_json(strict_json.compact(value), strict=True)
        except ValidationError as error:
            raise RecordError(explain(where, error), hint) from None

    def changed(self, **fields: Any) -> Self:
        """This record with some fields replaced, checked like one that is read; None removes a field.

        Raises:
            RecordError: a value does not follow the schema.
        """
        kept = {key: value for key, value in self.document().items() if key not in fields}
        return type(self).from_json(kept | {key: _plain(new) for key, new in fields.items() if new is not None})

    def document(self) -> dict[str, Any]:
        """The record as JSON-ready values, without the fields that hold their default."""
        result: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return result

    def to_json(self) -> str:
        """The text of ``lorahub.json``: canonical, so equal records are equal bytes.

        Raises:
            RecordError: a value looks like a path on somebody's machine, or the text would be over the limit.
        """
        document = self.document()
        private = [f"{key}: {text!r} is a path on one machine" for key, text in _strings(document) if is_path(text)]
        if private:
            raise RecordError(
                enumerate_problems("a record must not carry what only its author can reach", private), "remove them"
            )
        text = strict_json.pretty(document)
        if len(text.encode()) > LIMIT:
            raise RecordError(f"the record would take {len(text):,} bytes, and readers take {LIMIT:,}", "shorten it")
        return text

    def maths(self) -> dict[str, Any]:
        """The fields that describe the arithmetic, for the safetensors header; never version or licence."""
        document = self.document()
        return {key: document[key] for key in ("schema_version", "kinds", "components", "modules") if key in document}

    def metadata_digest(self) -> str:
        """``sha256:`` over the canonical record without ``digest``."""
        document = {key: value for key, value in self.document().items() if key != "digest"}
        return f"sha256:{hashlib.sha256(strict_json.compact(document).encode()).hexdigest()}"

    def stale(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """The recorded files of ``folder`` that are missing or have other content now, sorted.

        Raises:
            AccessDenied, Unavailable: a file is there and cannot be read.
        """
        return tuple(name for name, file in sorted(self.files.items()) if not _same(FilePath(folder) / name, file))

    def missing_for_push(self) -> list[str]:
        """The fields that publishing demands and this record lacks, as key paths."""
        base = self.base
        named = base is not None and bool(base.repo_id or base.weights_digest)
        present = {
            "name": self.name,
            "version": self.version,
            "license": self.license,
            "base.repo_id": named,  # a base that is in no repository is known by its digest
            "files": self.files,
        }
        return [key for key, value in present.items() if not value]

    def advised_for_push(self) -> list[str]:
        """The fields that publishing does not demand, but without which a check can say less."""
        base = self.base or BaseRecord()
        present = {
            "base.revision": base.revision or not base.repo_id,
            "base.weights_digest": base.weights_digest,
            "description": self.description,
        }
        return [key for key, value in present.items() if not value]


def is_path(text: str) -> bool:
    """Whether ``text`` is, or holds, what looks like an absolute or home path on one machine."""
    return _MACHINE.search(text) is not None


def _same(path: FilePath, recorded: FileRecord) -> bool:
    try:
        if path.stat().st_size != recorded.size:
            return False
        return file_digest(path) == (recorded.sha256, recorded.size)
    except (FileNotFoundError, NotFound):
        return False


def _plain(value: Any) -> Any:
    """A value with records as JSON-ready objects."""
    if isinstance(value, RecordPart):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every (key path, string) in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{where}{'.' if where else ''}{key}"
            yield inner, key
            yield from _strings(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")


def _other_major(found: object) -> str:
    """``found`` where it is the version of a schema with another major than ours, else ""."""
    match = re.fullmatch(r"(\d{1,6})(\.\d{1,6}){0,2}", found) if isinstance(found, str) else None
    return match[0] if match and match[1] != SCHEMA_VERSION.split(".")[0] else ""
