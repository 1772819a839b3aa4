"""The lock beside a recipe, ``recipe.lock``: which commits and bytes its references came to, and what was made of them.

A document and nothing else: it resolves nothing and computes no digest.  Equal locks are equal bytes, so a lock in a
repository changes only where something did.  ``compare`` says precisely what moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path as FilePath
from typing import Any, Final, Self

from pydantic import Field, ValidationError

from lorahub import strict_json, strict_toml
from lorahub.errors import RecordError
from lorahub.files.atomic import atomic_write
from lorahub.files.raw import open_regular
from lorahub.findings import Finding, Verdict
from lorahub.recipe_fields import RecipePart, explain
from lorahub.record_fields import Commit, Digest, KindName, Path, RepoId, SchemaVersion, Sha256

__all__ = ["FILENAME", "LIMIT", "SCHEMA_VERSION", "LockedAdapter", "LockedBase", "RecipeLock", "compare"]

FILENAME: Final = "recipe.lock"
SCHEMA_VERSION: Final = "1.0"
LIMIT: Final = 4 << 20
"""Bytes of a lock: room for the shards of many bases, and no more."""

_HINT = "write it anew: lorahub compose without --locked"


class LockedAdapter(RecipePart):
    """One adapter as it was."""

    ref: str = Field(min_length=1, description="As the recipe names it.")
    name: str | None = Field(default=None, min_length=1, description="What the recipe calls it.")
    repo: RepoId | None = Field(default=None, description="Repository on the hub; missing for a local one.")
    commit: Commit | None = Field(default=None, description="Commit of that repository, in full.")
    format: KindName = Field(description="How its files spell it.")
    tensors: Digest = Field(description="Digest of its tensors, however they are written.")
    files: dict[Path, Sha256] = Field(
        default={}, description="File -> digest of its bytes.", json_schema_extra={"additionalProperties": False}
    )


class LockedBase(RecipePart):
    """The base as it was."""

    ref: str = Field(min_length=1, description="As the recipe names it.")
    repo: RepoId | None = Field(default=None, description="Repository on the hub; missing for a local one.")
    commit: Commit | None = Field(default=None, description="Commit of that repository, in full.")
    weights: Digest | None = Field(default=None, description="Over its weight files; missing where none were read.")
    structure: Digest | None = Field(default=None, description="Over the names and shapes of its parameters.")


class RecipeLock(RecipePart):
    """Everything a recipe came to, so that it comes to the same again."""

    schema_version: SchemaVersion = Field(default=SCHEMA_VERSION, description="Version of this schema.")
    recipe: Digest = Field(description="The recipe's fingerprint.")
    method: str = Field(min_length=1, description="The composition method.")
    output: Digest | None = Field(default=None, description="Digest of the result's tensors.")
    lorahub: str = Field(min_length=1, description="Version that composed it.")
    torch: str | None = Field(default=None, min_length=1, description="Version of torch it computed with.")
    base: LockedBase | None = Field(default=None, description="The base, where one was named.")
    adapters: tuple[LockedAdapter, ...] = Field(min_length=1, description="The adapters, in the recipe's order.")

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
            RecordError: it is no lock; the message lists every problem with its key path.
        """
        try:
            document = strict_toml.read(text, limit=LIMIT)
            return cls.model_validate_json(strict_json.compact(document), strict=True)
        except ValidationError as error:
            raise RecordError(explain(where, "a recipe's lock", error, _MODELS), _HINT) from None
        except (TypeError, ValueError) as error:  # no TOML; a date or NaN, which no field holds
            raise RecordError(f"{where}: {error}", _HINT) from None

    def to_toml(self) -> str:
        """The text of ``recipe.lock``: fields in their order, files by name."""
        return f"# What a recipe came to, written by lorahub compose.\n{strict_toml.write(self.document())}"

    def document(self) -> dict[str, Any]:
        """The lock as JSON-ready values, without missing ones; files by name."""
        result: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        for adapter in result["adapters"]:
            adapter["files"] = dict(sorted(adapter["files"].items()))
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it; whoever looks sees the old lock or the new one.

        Raises:
            WriteFailed: it could not be written; the old one stays.
        """
        atomic_write(path, self.to_toml().encode())

    @staticmethod
    def beside(recipe: str | os.PathLike[str]) -> FilePath:
        """Where the lock of a recipe's file lies: ``mix.toml`` has ``mix.lock``."""
        return FilePath(recipe).with_suffix(".lock")


_MODELS: Mapping[str, type[RecipePart]] = {"": RecipeLock, "adapters": LockedAdapter, "base": LockedBase}


def compare(lock: RecipeLock, found: RecipeLock) -> list[Finding]:
    """What is otherwise now than when a recipe was locked.

    ``DEGRADED`` findings change the result; ``UNVERIFIED`` ones name what moved though its weights did not; ``EXACT``
    ones are notes.  An output is compared where both have one.

    Args:
        lock: as it was.
        found: as it is.
    """
    findings = list(_of_recipe(lock, found))
    for number, one in enumerate(lock.adapters):
        if number < len(found.adapters) and found.adapters[number].ref == one.ref:
            findings += _of_adapter(f"adapters[{number}]", one, found.adapters[number])
    if lock.base is not None and found.base is not None and lock.base.ref == found.base.ref:
        findings += _of_base(lock.base, found.base)
    if lock.output and found.output and lock.output != found.output:
        findings.append(
            _changed("lock-output-differs", f"the result's tensors are {found.output}, and were {lock.output}")
        )
    return findings


def _of_recipe(lock: RecipeLock, found: RecipeLock) -> Iterator[Finding]:
    if lock.recipe != found.recipe:
        yield _changed(
            "lock-recipe-changed", f"the recipe says something else now: {found.recipe}, and was {lock.recipe}"
        )
    if lock.method != found.method:
        yield _changed("lock-recipe-changed", f"the method is {found.method}, and was {lock.method}")
    refs = [each.ref for each in lock.adapters], [each.ref for each in found.adapters]
    for before, now in zip_longest(*refs):
        if before != now:
            what = f"there is {now} now" if before is None else f"{before} was there" + (f", now {now}" if now else "")
            yield _changed("lock-adapters-differ", f"other adapters than were locked: {what}", now or before or "")
    before, now = (each.base.ref if each.base else "none" for each in (lock, found))
    if before != now:
        yield _changed("lock-base-moved", f"the base is {now}, and was {before}", now)
    for name in ("lorahub", "torch"):
        then, today = getattr(lock, name), getattr(found, name)
        if then != today:
            yield Finding(
                code="lock-versions-differ", axis="libraries", level=Verdict.EXACT,
                message=f"{name} is {today or 'not there'}, and was {then or 'not there'}: the last bits may differ",
            )  # fmt: skip


def _of_adapter(where: str, lock: LockedAdapter, found: LockedAdapter) -> Iterator[Finding]:
    same = lock.tensors == found.tensors
    if not same:
        yield _changed(
            "lock-weights-differ",
            f"{where}: the tensors of {lock.ref} are {found.tensors}, and were {lock.tensors}",
            where,
        )
    yield from _moved("lock-adapter-moved", where, lock, found, same=same)
    if lock.format != found.format:
        yield _moves(
            "lock-adapter-moved", f"{where}: {lock.ref} is in {found.format} files, and was in {lock.format}", where
        )
    names = sorted({*lock.files, *found.files})
    for name in names:
        if lock.files.get(name) != found.files.get(name):
            state = "is new" if name not in lock.files else "is gone" if name not in found.files else "has other bytes"
            told = _moves if name.endswith((".safetensors", ".gguf", ".npz")) else _changed  # a config decides scales
            yield told("lock-file-differs", f"{where}: {name} of {lock.ref} {state}", where)


def _of_base(lock: LockedBase, found: LockedBase) -> Iterator[Finding]:
    same = lock.weights is not None and lock.weights == found.weights
    if lock.weights and found.weights and not same:
        yield _changed(
            "lock-weights-differ",
            f"base: the weights of {lock.ref} are {found.weights}, and were {lock.weights}",
            "base",
        )
    if lock.structure and found.structure and lock.structure != found.structure:
        yield _changed("lock-weights-differ", f"base: {lock.ref} has other parameters or shapes than it had", "base")
    yield from _moved("lock-base-moved", "base", lock, found, same=same)


def _moved(
    code: str, where: str, lock: LockedAdapter | LockedBase, found: LockedAdapter | LockedBase, *, same: bool
) -> Iterator[Finding]:
    """Another place or commit; only that, where the weights are the same."""
    if (lock.repo, lock.commit) != (found.repo, found.commit):
        tail = "; its weights are the same" if same else ""
        yield _moves(code, f"{where}: {lock.ref} is {_place(found)} now, and was {_place(lock)}{tail}", where)


def _place(one: LockedAdapter | LockedBase) -> str:
    return f"{one.repo}@{one.commit}" if one.repo else "a local folder"


def _changed(code: str, message: str, where: str = "") -> Finding:
    return _finding(code, Verdict.DEGRADED, message, where)


def _moves(code: str, message: str, where: str) -> Finding:
    return _finding(code, Verdict.UNVERIFIED, message, where)


def _finding(code: str, level: Verdict, message: str, where: str) -> Finding:
    return Finding(
        code=code, axis="integrity", level=level, message=message, where=(where,) if where else (),
        remedy="take the new state with a lock written anew: lorahub compose without --locked",
    )  # fmt: skip
