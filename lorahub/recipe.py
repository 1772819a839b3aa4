"""A recipe: which adapters, combined by which method, into what; ``recipe.toml`` and its command-line form.

A document and nothing else: it opens no adapter, resolves no reference and knows no method.  What a weight comes to for
a target is worked out in ``composition/weights/resolve.py``; the fields of weights are in ``recipe_fields.py``.

    schema_version = "1.0"
    method = "ties"
    rank = 32

    [parameters]
    density = 0.4

    [[adapters]]
    ref = "acme/ink@1.2"
    weight = 0.7

    [[adapters]]
    ref = "acme/sql@~=1.0"
    weight = [0.0, 0.5, 1.0]
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from lorahub import strict_json, strict_toml
from lorahub.errors import InvalidRef, RecipeError
from lorahub.files.raw import open_regular
from lorahub.names import Ref, printable
from lorahub.recipe_fields import RecipePart, Rule, Setting, explain
from lorahub.record_fields import Finite, KindName, Positive, SchemaVersion

__all__ = ["FILENAME", "LIMIT", "SCHEMA_VERSION", "Ingredient", "Recipe"]

FILENAME: Final = "recipe.toml"
SCHEMA_VERSION: Final = "1.0"
LIMIT: Final = 1 << 20
"""Bytes of a recipe: room for a number for every target of several adapters, and no more."""

_HINT = "correct the recipe; its fields are described in schemas/recipe.schema.json"


def _checked(text: str, *, bare: bool) -> str:
    """A reference that parses, and carries neither name nor weight."""
    try:
        ref = Ref.parse(text, bare=bare)
    except InvalidRef as error:
        raise ValueError(error.message.splitlines()[0]) from None
    if ref.weight is not None or ref.name is not None:
        raise ValueError(f"'{printable(text)}' carries a name or a weight; these are fields of their own")
    return text


def _adapter_ref(text: str) -> str:
    return _checked(text, bare=False)


def _base_ref(text: str) -> str:
    return _checked(text, bare=True)


_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
_Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Ingredient(RecipePart):
    """One adapter of a recipe, and how much of it."""

    ref: Annotated[_Text, AfterValidator(_adapter_ref)] = Field(
        description="Which adapter, as 'acme/ink@1.2' or './folder'; a relative path starts at the recipe's folder."
    )
    name: _Name | None = Field(default=None, description="What it is called here.")
    weight: Rule = Field(default=1.0, description="Its weight in weight space; never normalised unless asked.")
    parameters: dict[_Name, Setting] = Field(
        default={},
        description="The method's parameters for this adapter alone, such as density.",
        json_schema_extra={"additionalProperties": False},
    )

    def reference(self, folder: str | os.PathLike[str] | None = None) -> Ref:
        """The parsed reference; a relative path starts at ``folder``, the recipe's own, where it is given."""
        return _located(Ref.parse(self.ref), folder)

    @property
    def label(self) -> str:
        """Its name, or else the last part of its reference."""
        ref = Ref.parse(self.ref)
        return self.name or (ref.subpath or ref.repo or Path(ref.path or "").name or self.ref).rpartition("/")[2]


class Recipe(RecipePart):
    """Adapters in, one adapter or checkpoint out."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"output": {"const": "checkpoint"}}, "required": ["output"]},
            "then": {"required": ["base"]},
        }
    )

    schema_version: SchemaVersion = Field(default=SCHEMA_VERSION, description="Version of this schema.")
    description: str = Field(default="", description="What it is for; not part of the fingerprint.")
    method: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        default="linear", description="How changes become one, as 'linear', 'ties' or 'dare_ties'."
    )
    parameters: dict[_Name, Setting] = Field(
        default={},
        description="The method's parameters.  A list of numbers is one for each adapter; over depth is "
        "{ gradient = [...] }.",
        json_schema_extra={"additionalProperties": False},
    )

    rank: Positive | None = Field(default=None, description="Of every target, at most.")
    energy: Finite | None = Field(default=None, gt=0, le=1, description="Keep this share of each squared norm.")
    error: Finite | None = Field(default=None, ge=0, lt=1, description="Lose at most this share of each norm.")
    adaptive: bool = Field(default=False, description="Meet energy or error over all targets together.")
    max_parameters: Positive | None = Field(
        default=None, description="Spend so many numbers on all factors together, where they keep most."
    )

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Of the result's tensors; float32 where it is missing."
    )
    format: KindName | None = Field(default=None, description="Of the written adapter, as 'peft' or 'kohya'.")
    base: Annotated[_Text, AfterValidator(_base_ref)] | None = Field(
        default=None, description="The base, where the method, a kind or the output needs it."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="What every random draw follows from.")
    output: Literal["adapter", "checkpoint"] = Field(
        default="adapter", description="An adapter, or the base with it merged in."
    )
    non_additive: Literal["refuse", "linearise", "dense"] = Field(
        default="refuse",
        description="What becomes of kinds that look at the weight, such as DoRA: refused, taken without the part that "
        "does, or as their difference at the base's weight.",
    )
    compat: Literal["peft", "strict"] | None = Field(
        default=None, description="Whose result counts where PEFT's is not the declared one."
    )
    allow: tuple[KindName, ...] = Field(default=(), description="Codes of findings that are accepted.")

    adapters: tuple[Ingredient, ...] = Field(min_length=1, description="The adapters, in order.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [each.name for each in self.adapters if each.name is not None]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two adapters are called '{twice}'")
        if self.output == "checkpoint" and self.base is None:
            raise ValueError("a checkpoint is made of a base, and none is named: add base = 'ns/name' or './folder'")
        if self.output == "checkpoint" and self.format is not None:
            raise ValueError("format is that of a written adapter, and the output is a checkpoint")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The recipe in a file.

        Raises:
            NotFound, AccessDenied, Unavailable: it cannot be read.
            RecipeError: it is no recipe; the message lists every problem with its key path.
        """
        with open_regular(path) as file:
            text = file.read(LIMIT + 1) or b""
        return cls.from_text(text, where=os.fspath(path))

    @classmethod
    def from_text(cls, text: str | bytes, *, where: str = "recipe") -> Self:
        """The recipe in a TOML text.

        Raises:
            RecipeError: it is no recipe; the message lists every problem with its key path.
        """
        try:
            document = strict_toml.read(text, limit=LIMIT)
        except strict_json.NotStrict as error:
            raise RecipeError(f"{where}: {error}", _HINT) from None
        return cls.from_document(document, where=where)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], *, where: str = "recipe") -> Self:
        """The recipe in plain values; types are exact, so the text "8" is no rank.

        Raises:
            RecipeError: it is no recipe; the message lists every problem with its key path.
        """
        dates = [f"{key}: a date, where no field holds one" for key in _dates(document)]
        try:
            text = json.dumps(document, default=str)
            result = cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            message = explain(where, "a recipe", error, _MODELS)
            raise RecipeError("\n  ".join([message, *dates]), _hint(document)) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: {error}", _HINT) from None
        if dates:
            raise RecipeError("\n  ".join([f"{where} does not follow the schema of a recipe:", *dates]), _HINT)
        return result

    @classmethod
    def inline(
        cls,
        refs: Sequence[str | Ref],
        method: str = "linear",
        parameters: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Self:
        """The recipe that a command line says: ``lorahub compose a@1.0:0.7 b:0.3 --method ties --rank 32``.

        Args:
            refs: references, each with its name and weight, 1 where it has none.
            method: the method.
            parameters: the method's parameters.
            fields: any other field of a recipe, as ``rank=32``; None leaves one out.

        Raises:
            InvalidRef: a reference does not follow the grammar.
            RecipeError: they make no recipe; the message lists every problem.
        """
        adapters = []
        for each in refs:
            ref = each if isinstance(each, Ref) else Ref.parse(each)
            given: dict[str, Any] = {"name": ref.name, "weight": ref.weight}
            bare = str(replace(ref, name=None, weight=None))
            adapters.append({"ref": bare, **{key: value for key, value in given.items() if value is not None}})
        kept = {key: value for key, value in fields.items() if value is not None}
        document = {"method": method, "parameters": dict(parameters or {}), **kept, "adapters": adapters}
        return cls.from_document(document, where="the request")

    def changed(self, **fields: Any) -> Self:
        """This recipe with some fields replaced, checked like one that is read; None removes a field.

        Raises:
            RecipeError: a value does not follow the schema.
        """
        kept = {key: value for key, value in self.document().items() if key not in fields}
        new = {key: _plain(value) for key, value in fields.items() if value is not None}
        return type(self).from_document(kept | new)

    def document(self) -> dict[str, Any]:
        """The recipe as JSON-ready values in the order of the fields, without those that hold their default."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return {"schema_version": self.schema_version, "method": self.method} | dumped

    def to_toml(self) -> str:
        """The text of ``recipe.toml``, which reads back as this recipe; equal recipes are equal bytes."""
        document = self.document()
        fields = [name for name in type(self).model_fields if name in document]
        return strict_toml.write({name: document[name] for name in fields})

    def fingerprint(self) -> str:
        """``sha256:`` over what the recipe says, its description left out: however it was written, 1 or 1.0."""
        document = {key: value for key, value in self.document().items() if key != "description"}
        return f"sha256:{hashlib.sha256(strict_json.compact(_canonical(document)).encode()).hexdigest()}"

    def budget(self) -> dict[str, Any]:
        """What the result may cost, as ``budget_of`` takes it."""
        return {
            "rank": self.rank,
            "energy": self.energy,
            "error": self.error,
            "adaptive": self.adaptive,
            "parameters": self.max_parameters,
        }

    def labels(self) -> tuple[str, ...]:
        """What the adapters are called, in order: by name, or by the last part of the reference; each another."""
        found: list[str] = []
        taken = {each.name for each in self.adapters}
        for each in self.adapters:
            label = each.label
            if each.name is None and (label in taken or label in found):
                label = next(new for n in count(2) if (new := f"{label}-{n}") not in taken and new not in found)
            found.append(label)
        return tuple(found)

    def base_reference(self, folder: str | os.PathLike[str] | None = None) -> Ref | None:
        """The base's parsed reference, or None; a relative path starts at ``folder`` where it is given."""
        return _located(Ref.parse(self.base, bare=True), folder) if self.base is not None else None


_MODELS: Mapping[str, type[RecipePart]] = {"": Recipe, "adapters": Ingredient}


def _located(ref: Ref, folder: str | os.PathLike[str] | None) -> Ref:
    if folder is None or ref.local is None or ref.local.is_absolute():
        return ref
    absolute = os.path.abspath(folder)  # noqa: PTH100 - Path.resolve would follow links
    return replace(ref, path=os.fspath(Path(absolute) / ref.local))


def _hint(document: Mapping[str, Any]) -> str:
    version = document.get("schema_version")
    if not isinstance(version, str) or version == SCHEMA_VERSION:
        return _HINT
    return f"it says version {printable(version[:20])}: pip install --upgrade lorahub-core"


def _plain(value: Any) -> Any:
    """A value with models as JSON-ready objects."""
    if isinstance(value, RecipePart):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _canonical(value: Any) -> Any:
    """A value with whole floats as integers, so that 1 and 1.0 are one number, and 0 and -0."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _dates(value: Any, where: str = "") -> Iterator[str]:
    """Key paths of what TOML reads as dates and times."""
    if isinstance(value, dt.date | dt.time):
        yield where
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _dates(item, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _dates(item, f"{where}[{index}]")
