"""``lorahub.toml``: the base and the adapters that a project uses, what it accepts, and what it composes of them.

A document and nothing else: it asks no hub and opens no adapter.  What its references came to is in ``lockfile.py``.

    base = "acme/base@main"

    [adapters]
    ink = "acme/ink@~=1.2"
    sql = { ref = "acme/sql@1.0", weight = 0.5 }
    own = "./own"

    [policy]
    verdict = "compatible"
    owners = ["acme"]
    licenses = ["apache-2.0"]

    [compositions.mix]
    method = "ties"
    parameters = { density = 0.4 }
    adapters = ["ink", "sql"]
    weights = [0.7, 0.3]
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from lorahub import strict_json, strict_toml
from lorahub.errors import InvalidRef, ManifestError
from lorahub.files.raw import open_regular
from lorahub.findings import Verdict
from lorahub.names import Ref, path_problem, printable
from lorahub.recipe_fields import RecipePart, Rule, Setting, explain
from lorahub.record_fields import Finite, KindName, Positive, SchemaVersion

__all__ = ["FILENAME", "LIMIT", "SCHEMA_VERSION", "BaseEntry", "Composition", "Entry", "Manifest", "Policy", "name_of"]

FILENAME: Final = "lorahub.toml"
SCHEMA_VERSION: Final = "1.0"
LIMIT: Final = 1 << 20
"""Bytes of a manifest: room for thousands of adapters, and no more."""

_HINT = "correct it; its fields are described in schemas/manifest.schema.json"
_WORD = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,95}$"
_NAME = r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"


def name_of(text: str) -> str:
    """``text`` itself, if an adapter may be called so: it becomes the name of a folder.

    Raises:
        ValueError: it may not; the message says why.
    """
    try:
        Ref(name=text, repo="a/b")
    except InvalidRef:
        raise ValueError(
            f"'{printable(text[:80])}' is no name: letters, digits, '_', '-' or '.', a letter first"
        ) from None
    if problem := path_problem(text):
        raise ValueError(f"'{printable(text)}' cannot name a folder: it {problem}")
    return text


def _reference(text: str, *, bare: bool) -> str:
    try:
        ref = Ref.parse(text, bare=bare)
    except InvalidRef as error:
        raise ValueError(error.message.splitlines()[0]) from None
    if ref.weight is not None or ref.name is not None:
        raise ValueError(f"'{printable(text)}' carries a name or a weight; these are keys of their own")
    if ref.path is not None and not ref.path.startswith((".", "..")):
        raise ValueError(f"'{printable(text)}' is a path on one machine; write it from this file on, as './folder'")
    return text


def _adapter_ref(text: str) -> str:
    return _reference(text, bare=False)


def _base_ref(text: str) -> str:
    return _reference(text, bare=True)


def _beside(text: str) -> str:
    if problem := path_problem(text.removeprefix("./")):
        raise ValueError(f"'{printable(text)}' {problem}; a recipe lies beside this file or below")
    return text


def _one_word(text: str) -> str:
    if not re.fullmatch(_WORD, text):
        raise ValueError(f"'{printable(text[:80])}' is not one word, such as 'acme' or 'apache-2.0'")
    return text


def _shape(value: Any) -> str:
    """Which branch of a field that takes a text or a table."""
    return "<table>" if isinstance(value, Mapping | RecipePart) else "<word>"


def _base_shape(value: Any) -> str:
    return _shape(value).replace("<table>", "<rule>")  # another word, by which a wrong key's table is known


def _several(value: Any) -> str:
    return "<table>" if isinstance(value, Mapping) else "<list>"


Name = Annotated[str, AfterValidator(name_of), WithJsonSchema({"type": "string", "pattern": _NAME})]
_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_AdapterRef = Annotated[_Text, AfterValidator(_adapter_ref)]
_BaseRef = Annotated[_Text, AfterValidator(_base_ref)]
_Word = Annotated[str, AfterValidator(_one_word), WithJsonSchema({"type": "string", "pattern": _WORD})]
_CLOSED: dict[str, JsonValue] = {"additionalProperties": False}


class Entry(RecipePart):
    """One adapter, where there is more to say than its reference."""

    ref: _AdapterRef = Field(description="Which, as 'acme/ink@~=1.2/folder' or './folder', from this file on.")
    weight: Finite = Field(default=1.0, description="Its weight where it is attached or composed.")

    def reference(self) -> Ref:
        """The parsed reference."""
        return Ref.parse(self.ref)


class BaseEntry(RecipePart):
    """The base, where repository and revision are written apart."""

    repo: _BaseRef = Field(description="Its repository, as 'acme/base'.")
    revision: _Text | None = Field(default=None, description="A commit, branch, tag or version; 'main' where missing.")

    @model_validator(mode="after")
    def _one_selector(self) -> Self:
        self.reference()
        return self

    def reference(self) -> Ref:
        """The parsed reference.

        Raises:
            ValueError: the two do not go together.
        """
        ref = Ref.parse(self.repo, bare=True)
        if self.revision is None:
            return ref
        if ref.path is not None or ref.selector is not None:
            raise ValueError(f"revision stands beside a {'path' if ref.path else 'selector'}; write one of the two")
        try:
            return replace(ref, selector=self.revision)
        except InvalidRef as error:
            raise ValueError(error.message.splitlines()[0]) from None


class Policy(RecipePart):
    """What may be locked."""

    verdict: Literal["exact", "compatible", "unverified"] = Field(
        default="compatible", description="The worst verdict against the base that is accepted."
    )
    allow: tuple[KindName, ...] = Field(default=(), description="Codes of findings that are accepted for all.")
    owners: tuple[_Word, ...] = Field(
        default=(), description="Namespaces that adapters may come from; empty: any.  Local folders always may."
    )
    licenses: tuple[_Word, ...] = Field(
        default=(), description="Licences that adapters may have, as 'apache-2.0'; empty: any.  Case does not count."
    )

    @property
    def worst(self) -> Verdict:
        """The worst verdict that is accepted."""
        return Verdict[self.verdict.upper()]


class Composition(RecipePart):
    """One adapter that is made of others when they are installed: a recipe's file, or its fields here."""

    recipe: Annotated[_Text, AfterValidator(_beside)] | None = Field(
        default=None, description="A recipe's file beside this one; it says everything itself."
    )
    adapters: tuple[Name, ...] = Field(default=(), description="Which of this file's adapters, in order.")
    weights: (
        Annotated[
            Annotated[tuple[Rule, ...], Tag("<list>")] | Annotated[dict[Name, Rule], Tag("<table>")],
            Discriminator(_several),
        ]
        | None
    ) = Field(default=None, description="One for each adapter, in order or by name; the adapters' own where missing.")
    method: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="How changes become one, as 'linear', 'ties' or 'dare_ties'; linear where missing."
    )
    parameters: dict[Annotated[str, Field(pattern=_NAME)], Setting] = Field(
        default={}, description="The method's parameters.", json_schema_extra=_CLOSED
    )
    rank: Positive | None = Field(default=None, description="Of every target, at most.")
    energy: Finite | None = Field(default=None, gt=0, le=1, description="Keep this share of each squared norm.")
    error: Finite | None = Field(default=None, ge=0, lt=1, description="Lose at most this share of each norm.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="Of its tensors.")
    format: KindName | None = Field(default=None, description="Of its files, as 'peft' or 'kohya'.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="Of every random draw.")
    non_additive: Literal["refuse", "linearise", "dense"] | None = Field(
        default=None, description="What becomes of kinds that look at the weight, such as DoRA."
    )
    compat: Literal["peft", "strict"] | None = Field(
        default=None, description="Whose result counts where PEFT's is not the declared one."
    )
    allow: tuple[KindName, ...] = Field(default=(), description="Codes of findings that are accepted.")
    base: bool = Field(default=False, description="Compose over this file's base, where the method or a kind needs it.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        beside = sorted(self.model_fields_set - {"recipe"})
        if self.recipe is not None and beside:
            raise ValueError(f"a recipe's file says everything itself, and {', '.join(beside)} stands beside it")
        if self.recipe is None and not self.adapters:
            raise ValueError("names neither adapters nor a recipe: adapters = [...] or recipe = 'mix.toml'")
        if isinstance(self.weights, tuple) and len(self.weights) != len(self.adapters):
            raise ValueError(f"{len(self.weights)} weights for {len(self.adapters)} adapters")
        if isinstance(self.weights, dict) and (odd := sorted(self.weights.keys() - {*self.adapters})):
            raise ValueError(f"weights name what is not among the adapters: {', '.join(odd)}")
        return self


class Manifest(RecipePart):
    """What a project uses."""

    schema_version: SchemaVersion = Field(default=SCHEMA_VERSION, description="Version of this schema.")
    base: (
        Annotated[
            Annotated[_BaseRef, Tag("<word>")] | Annotated[BaseEntry, Tag("<rule>")],
            Discriminator(_base_shape),
        ]
        | None
    ) = Field(default=None, description="The base of them all, as 'acme/base@main' or './base'.")
    adapters: dict[
        Name, Annotated[Annotated[_AdapterRef, Tag("<word>")] | Annotated[Entry, Tag("<table>")], Discriminator(_shape)]
    ] = Field(default={}, description="Name -> adapter.", json_schema_extra=_CLOSED)
    policy: Policy = Field(default=Policy(), description="What adapters must be like to be locked.")
    compositions: dict[Name, Composition] = Field(
        default={}, description="Name -> what is made of them.", json_schema_extra=_CLOSED
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        seen: dict[str, str] = {}
        for name in [*self.adapters, *self.compositions]:
            if other := seen.get(name.casefold()):
                raise ValueError(f"'{other}' and '{name}' would be one folder: call one of them otherwise")
            seen[name.casefold()] = name
        for name, made in self.compositions.items():
            if unknown := [each for each in made.adapters if each not in self.adapters]:
                raise ValueError(f"compositions.{name}: '{unknown[0]}' is not among the adapters")
            if made.base and self.base is None:
                raise ValueError(f"compositions.{name}: base = true, and this file names no base")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The manifest in a file.

        Raises:
            NotFound, AccessDenied, Unavailable: it cannot be read.
            ManifestError: it is none; the message lists every problem with its key path.
        """
        with open_regular(path) as file:
            text = file.read(LIMIT + 1) or b""
        return cls.from_text(text, where=os.fspath(path))

    @classmethod
    def from_text(cls, text: str | bytes, *, where: str = FILENAME) -> Self:
        """The manifest in a TOML text.

        Raises:
            ManifestError: it is none; the message lists every problem with its key path.
        """
        document: dict[str, Any] = {}
        try:
            document = strict_toml.read(text, limit=LIMIT)
            return cls.model_validate_json(strict_json.compact(document), strict=True)
        except ValidationError as error:
            made = document.get("compositions")
            models = dict.fromkeys(made if isinstance(made, dict) else (), Composition) | dict(_MODELS)
            raise ManifestError(explain(where, "a manifest", error, models), _hint(document, error)) from None
        except (TypeError, ValueError) as error:  # no TOML; a date or NaN, which no field holds
            raise ManifestError(f"{where}: {error}", _HINT) from None

    def document(self) -> dict[str, Any]:
        """The manifest as JSON-ready values, without those at their default."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return dumped

    def fingerprint(self) -> str:
        """``sha256:`` over what it says, however it is written."""
        document = {**self.document(), "base": str(self.base_ref() or ""), "adapters": self.plain()}
        return f"sha256:{hashlib.sha256(strict_json.compact(document).encode()).hexdigest()}"

    def plain(self) -> dict[str, list[Any]]:
        """Name -> [reference, weight], sorted."""
        return {name: [each.ref, each.weight] for name, each in sorted(self.entries().items())}

    def entries(self) -> dict[str, Entry]:
        """Every adapter in the long form, in the file's order."""
        return {name: Entry(ref=each) if isinstance(each, str) else each for name, each in self.adapters.items()}

    def base_ref(self) -> Ref | None:
        """The base's parsed reference, or None; a path starts at the manifest's folder."""
        if self.base is None:
            return None
        return Ref.parse(self.base, bare=True) if isinstance(self.base, str) else self.base.reference()


_MODELS: Mapping[str, type[RecipePart]] = {"": Manifest, "<rule>": BaseEntry, "<table>": Entry, "policy": Policy}
"""The last telling word of a key path -> the model there."""


_COMPOSITION = (
    'a composition of adapters that [adapters] names reads: adapters = ["ink", "sql"], weights = [0.7, 0.3], '
    'method = "linear"'
)


def _hint(document: Mapping[str, Any], error: ValidationError) -> str:
    version = document.get("schema_version")
    if any(each["loc"][:1] == ("compositions",) and "adapters" in each["loc"] for each in error.errors()):
        return _COMPOSITION
    if not isinstance(version, str) or version.startswith("1."):
        return _HINT
    return f"it says version {printable(version[:20])}: pip install --upgrade lorahub-core"
