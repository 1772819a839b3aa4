"""``lorahub.lock``: which commits and bytes a manifest's references came to.

A document and nothing else: it asks no hub.  It is a function of what was locked and of nothing else, so equal locks
are equal bytes on every machine, and one in a repository changes only where something did.  It holds no token, no
address of a server and no path outside the project.  Keys of a newer minor version are kept when it is written again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from lorahub import __version__, strict_json, strict_toml
from lorahub.errors import LorahubError, RecordError
from lorahub.files.atomic import atomic_write
from lorahub.files.raw import open_regular
from lorahub.hub.contents import collisions, rule_for
from lorahub.hub.hub import FilePin, Pin
from lorahub.manifest.document import Name
from lorahub.names import COMMIT, Ref, as_version, path_problem, printable
from lorahub.recipe_fields import explain
from lorahub.record_fields import Commit, Count, Digest, RecordPart, RepoId, SchemaVersion, Sha256
from lorahub.report import Level

__all__ = ["CREATED_BY", "FILENAME", "LIMIT", "Lock", "LockedAdapter", "LockedBase", "LockedComposition", "LockedFile"]

FILENAME: Final = "lorahub.lock"
VERSION: Final = "1.0"
CREATED_BY: Final = f"lorahub {__version__}"
LIMIT: Final = 16 << 20
"""Bytes of a lock: room for every file of thousands of adapters, and no more."""

_HINT = "take it from version control, or make it anew: rm lorahub.lock, then lorahub lock"
_HEAD = "# Written by lorahub lock from lorahub.toml; not meant to be edited.\n"

_Text = Annotated[str, Field(min_length=1, max_length=4096)]


def _portable(text: str) -> str:
    if problem := path_problem(text):
        raise ValueError(f"'{printable(text)}' {problem}")
    return text


def _travels(path: str, size: int) -> bool:
    """Whether a hub would give such a file: a lock opens no door to others, such as pickles."""
    rule = rule_for(path)
    return rule.role in {"behaviour", "companion", "document", "picture"} and size <= rule.limit


def _version(text: str) -> str:
    if as_version(text) is None:
        raise ValueError(f"'{printable(text[:80])}' is no version, such as '1.2.0'")
    return text


def _from_here(text: str) -> str:
    if not text.startswith(("./", "../")) and text not in {".", ".."}:
        raise ValueError(f"'{printable(text)}' is no path from the manifest's folder on, as './own'")
    return text


_PART = r"(?!\.{1,2}(/|$))[^/\\:]+"
Path = Annotated[
    str, AfterValidator(_portable), WithJsonSchema({"type": "string", "pattern": rf"^{_PART}(/{_PART})*$"})
]
_Local = Annotated[str, AfterValidator(_from_here), WithJsonSchema({"type": "string", "pattern": r"^\.{1,2}(/|$)"})]
"""A path from the manifest's folder on."""


class LockPart(RecordPart):
    """A part of the lock: frozen; unknown keys are kept."""

    model_config = ConfigDict(
        frozen=True, extra="allow", populate_by_name=True, alias_generator=lambda name: name.replace("_", "-")
    )


class LockedFile(LockPart):
    """One file by content."""

    path: Path = Field(description="Within the adapter's folder.")
    size: Count = Field(description="Bytes.")
    sha256: Sha256 = Field(description="Digest of its bytes.")

    @property
    def pin(self) -> FilePin:
        """The same, as hubs take it."""
        return FilePin(size=self.size, sha256=self.sha256)


class LockedBase(LockPart):
    """The base as it was."""

    requested: _Text = Field(description="As the manifest names it.")
    repo: RepoId | None = Field(default=None, description="Repository; missing for a local one.")
    path: _Local | None = Field(default=None, description="Where a local one lies, from the manifest's folder on.")
    commit: Commit | None = Field(default=None, description="Commit of the repository, in full.")
    weights: Digest | None = Field(default=None, description="Over its weight files.")
    structure: Digest | None = Field(default=None, description="Over the names and shapes of its parameters.")

    def reference(self, folder: FilePath) -> Ref:
        """Exactly this base: at its commit, or where it lies from the manifest's ``folder`` on."""
        if self.path is not None:
            return Ref(path=os.path.abspath(folder / self.path))  # noqa: PTH100 - Path.resolve would follow links
        return replace(Ref.parse(self.requested, bare=True), selector=self.commit)


class LockedAdapter(LockPart):
    """One adapter as it was: from a repository, or from a folder of the project."""

    name: Name = Field(description="What the manifest calls it, and the name of its folder.")
    requested: _Text = Field(description="As the manifest names it.")
    repo: RepoId | None = Field(default=None, description="Repository; missing for a local one.")
    path: _Local | None = Field(default=None, description="Where a local one lies, from the manifest's folder on.")
    resolved: _Text | None = Field(
        default=None, description="What the selector came to: a tag, 'refs/heads/' and a branch, or a commit."
    )
    version: Annotated[_Text, AfterValidator(_version)] | None = Field(
        default=None, description="The version of that tag."
    )
    commit: Commit | None = Field(default=None, description="Commit of the repository, in full.")
    subfolder: Path | None = Field(default=None, description="Its folder within the repository.")
    weight_name: Path | None = Field(default=None, description="The one weights file that was asked for.")
    digest: Digest = Field(description="Over the files that decide what it computes.")
    license: _Text | None = Field(default=None, description="As its record or model card says.")
    verdict: Level | None = Field(default=None, description="Against the locked base; missing where there is none.")
    file: tuple[LockedFile, ...] = Field(min_length=1, description="Its files, by path.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.repo is None) == (self.path is None) or (self.repo is None) != (self.commit is None):
            raise ValueError("is either from a repository, at a commit, or from a path")
        paths = [each.path for each in self.file]
        if odd := [each.path for each in self.file if not _travels(each.path, each.size)]:
            raise ValueError(f"'{printable(odd[0])}' is no file that an adapter may have")
        if len(set(paths)) < len(paths) or collisions(paths):
            raise ValueError("two of its files have one name")
        try:
            digest = self.pin().digest()
        except LorahubError as error:
            raise ValueError(error.message) from None
        if digest != self.digest:
            raise ValueError("digest is not that of the files listed: the lock was edited or merged by hand")
        return self

    def pin(self) -> Pin:
        """The exact state; one that is local stands at a commit of zeros in a repository of that name."""
        resolved = self.resolved or ""
        tag = resolved if not resolved.startswith("refs/") and not COMMIT.fullmatch(resolved) else ""
        return Pin(
            repo=self.repo or f"local/{self.name}",
            commit=self.commit or "0" * 40,
            subfolder=self.subfolder or "",
            file=self.weight_name or "",
            tag=tag or None,
            version=self.version,
            files={each.path: each.pin for each in self.file},
        )

    def place(self) -> str:
        """Where it comes from, for people: ``acme/ink@v1.2.3`` or ``./own``."""
        return str(self.pin()) if self.repo else self.path or ""


class LockedComposition(LockPart):
    """What is made of adapters, and what came of it."""

    name: Name = Field(description="What the manifest calls it, and the name of its folder.")
    recipe: Digest = Field(description="Fingerprint of its recipe.")
    inputs: Digest = Field(description="Over the recipe, the digests of its adapters and the base's weights.")
    output: Digest | None = Field(default=None, description="Over the result's tensors, once it was composed.")
    adapter: tuple[LockedAdapter, ...] = Field(
        default=(), description="The adapters that a recipe's file names, in its order."
    )


class Lock(LockPart):
    """Everything a manifest came to."""

    lock_version: SchemaVersion = Field(default=VERSION, description="Version of this schema.")
    created_by: _Text = Field(default_factory=lambda: CREATED_BY, description="The program that wrote it.")
    manifest: Digest = Field(description="Fingerprint of the manifest.")
    base: LockedBase | None = Field(default=None, description="The base, where the manifest names one.")
    adapter: tuple[LockedAdapter, ...] = Field(default=(), description="The adapters, by name.")
    composition: tuple[LockedComposition, ...] = Field(default=(), description="The compositions, by name.")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        names = [*(each.name.casefold() for each in self.adapter), *(each.name.casefold() for each in self.composition)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"'{twice[0]}' is there twice: the lock was merged by hand")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The lock in a file.

        Raises:
            NotFound, AccessDenied, Unavailable: it cannot be read.
            RecordError: it is no lock; the message lists every problem with its key path.
        """
        with open_regular(path) as file:
            text = file.read(LIMIT + 1) or b""
        return cls.from_text(text, where=os.fspath(path))

    @classmethod
    def from_text(cls, text: str | bytes, *, where: str = FILENAME) -> Self:
        """The lock in a TOML text.

        Raises:
            RecordError: it is no lock, or one of another major version; the message lists every problem.
        """
        try:
            document = strict_toml.read(text, limit=LIMIT)
            plain = strict_json.compact(document)
        except (TypeError, ValueError) as error:  # no TOML; a date or NaN, which no field holds
            raise RecordError(f"{where}: {error}", _HINT) from None
        if newer := _other_major(document.get("lock-version")):
            raise RecordError(
                f"{where}: lock-version: the lock is written in version {newer}, and this lorahub reads 1.x",
                "pip install --upgrade lorahub-core",
            )
        try:
            return cls.model_validate_json(plain, strict=True)
        except ValidationError as error:
            raise RecordError(explain(where, "a lock", error, _MODELS), _HINT) from None

    def document(self) -> dict[str, Any]:
        """The lock as JSON-ready values, without missing ones: adapters and compositions by name, files by path."""
        result: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for kind in ("adapter", "composition"):
            result[kind] = sorted(result[kind], key=lambda each: str(each["name"]))
        for one in [*result["adapter"], *(inner for each in result["composition"] for inner in each["adapter"])]:
            one["file"] = sorted(one["file"], key=lambda each: str(each["path"]).encode())
        result["composition"] = [_without_empty(each) for each in result["composition"]]
        return _without_empty(result)

    def to_toml(self) -> str:
        """The text of ``lorahub.lock``: fields in their order, unknown ones behind them."""
        return f"{_HEAD}{strict_toml.write(self.document())}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it; whoever looks sees the old lock or the new one.

        Raises:
            WriteFailed: it could not be written; the old one stays.
        """
        atomic_write(FilePath(path).resolve(), self.to_toml().encode())  # a link stays one

    def places(self) -> Iterator[LockedAdapter]:
        """Every locked adapter, those of recipes' files among them."""
        yield from self.adapter
        for each in self.composition:
            yield from each.adapter


def _without_empty(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value or key not in {"adapter", "composition"}}


def _other_major(found: object) -> str:
    text = found if isinstance(found, str) else ""
    major = text.partition(".")[0]
    return printable(text[:20]) if major.isdecimal() and major != VERSION.partition(".")[0] else ""


_MODELS: Mapping[str, type[LockPart]] = {"": Lock, "adapter": LockedAdapter, "file": LockedFile, "base": LockedBase}
