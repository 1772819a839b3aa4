"""A mergekit configuration of adapters as a recipe: ``lorahub compose --from-mergekit FILE``.

mergekit (0.1.5) merges whole models; a model may be ``base+lora``.  Where all of them stand on one base, merging the
models is merging the adapters, and that is what is carried over: method, parameters with mergekit's own defaults
written out, filters, numbers over depth.  What would come out otherwise here, and what an adapter cannot hold, is
refused by name; what makes no difference is left out, and told.  Nothing is opened but the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub import strict_yaml
from lorahub.composition.mergekit.methods import METHODS, OPTIONAL_BASE, REFUSED, WHOLE, WITHOUT_EFFECT, Spelling
from lorahub.composition.mergekit.models import Model, model_of
from lorahub.composition.mergekit.settings import Settings
from lorahub.errors import RecipeError
from lorahub.files.raw import open_regular
from lorahub.names import did_you_mean, printable
from lorahub.recipe import SCHEMA_VERSION, Recipe
from lorahub.strict_json import NotStrict

__all__ = ["LIMIT", "Imported", "from_mergekit", "load_mergekit"]

LIMIT = 1 << 17
"""Bytes of a configuration: hundreds of filters, and no more."""

_TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype")
_TOKENIZER = ("tokenizer", "tokenizer_source", "chat_template")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What a configuration came to.

    Attributes:
        recipe: to be looked at, written and composed.
        notes: what was left out, or is otherwise, in words.
    """

    recipe: Recipe
    notes: tuple[str, ...]


def load_mergekit(path: str | os.PathLike[str]) -> Imported:
    """The recipe for a mergekit configuration in a file; local paths in it are taken as from there.

    Raises:
        NotFound, AccessDenied, Unavailable: it cannot be read.
        RecipeError: see ``from_mergekit``.
    """
    with open_regular(path) as file:
        text = file.read(LIMIT + 1) or b""
    return from_mergekit(text, where=os.fspath(path), folder=Path(path).parent)


def from_mergekit(text: str | bytes, *, where: str = "configuration", folder: Path | None = None) -> Imported:
    """The recipe for a mergekit configuration.

    Args:
        text: YAML.
        where: what it is called in messages.
        folder: where the recipe will lie; local paths become relative to it.

    Raises:
        RecipeError: it is no configuration, or asks for what cannot be carried over; each with what to do.
    """
    try:
        config = strict_yaml.read(text, limit=LIMIT)
    except NotStrict as error:
        raise RecipeError(f"{where}: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{where}: a configuration is a mapping with merge_method and models")
    return _Reader(config, where, folder).read()


class _Reader:
    """One configuration being read."""

    def __init__(self, config: Mapping[str, Any], where: str, folder: Path | None) -> None:
        self._config = config
        self._where = where
        self._folder = folder
        self._notes: list[str] = []

    def read(self) -> Imported:
        """The recipe, and what there is to say."""
        name, method = self._method()
        self._other_keys()
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "method": name}
        if dtype := self._dtype():
            document["dtype"] = dtype
        inputs, scopes, layers = self._inputs()
        base, models = self._models(name, method, inputs)
        if method.note:
            self._notes.append(f"{name}: {method.note}")
        if method.inputs == "changes" and name not in OPTIONAL_BASE and not base.named and base.model is not None:
            self._notes.append(f"base_model is missing, which mergekit's {name} demands: taken from the models")
        if name in OPTIONAL_BASE and not base.named:
            self._notes.append(f"{name}: {WHOLE}; with base_model, mergekit does the same")
        self._left_over(name, method, [each.own for each in models], scopes)
        settings = Settings(self._refuse, layers)
        document["parameters"] = {
            **{key: settings.one(key, scopes, default) for key, default in method.common.items()},
            **method.fixed,
        }
        if document["parameters"].get("rescale") is True:
            document["parameters"]["rescale"] = "l1"
        document["adapters"] = [self._adapter(each, method, scopes, settings) for each in models]
        if name == "linear":
            self._as_adapters(document, base, scopes, settings)
        if base.model is not None:
            self._say_base(document, base.model.base_ref(self._folder))
        return Imported(recipe=Recipe.from_document(document, where=self._where), notes=tuple(self._notes))

    def _say_base(self, document: dict[str, Any], base: str) -> None:
        """The base, where numbers over depth need to know how many layers it has; adapters are combined without it."""
        if _over_depth(document):
            document["base"] = base
            return
        self._notes.append(f"{base} is not read, since adapters are combined without it; to hold them to it: --base")

    def _refuse(self, message: str, hint: str = "") -> RecipeError:
        return RecipeError(f"{self._where}: {message}", hint)

    def _method(self) -> tuple[str, Spelling]:
        name = self._config.get("merge_method")
        if not isinstance(name, str):
            raise self._refuse("merge_method is missing")
        if name in REFUSED:
            raise self._refuse(f"merge_method {name} cannot be carried over", REFUSED[name])
        if name not in METHODS:
            raise self._refuse(
                f"merge_method '{printable(name)}' is not known.{did_you_mean(name, METHODS)}", ", ".join(METHODS)
            )
        return name, METHODS[name]

    def _other_keys(self) -> None:
        """Tokenizers and templates, which no adapter holds, and what mergekit does not read."""
        config = self._config
        base = config.get("base_model")
        source = config.get("tokenizer_source")
        tokenizer = config.get("tokenizer")
        if isinstance(tokenizer, dict) and set(tokenizer) == {"source"}:
            source, tokenizer = tokenizer["source"], None
        if source is not None and source not in ("base", base):
            raise self._refuse(
                f"tokenizer_source {printable(str(source))}: an adapter has no tokenizer, and the base's stays",
                "remove the line; new tokens need an adapter that trained their embeddings",
            )
        for key, value in (("tokenizer", tokenizer), ("chat_template", config.get("chat_template"))):
            if value is not None:
                raise self._refuse(
                    f"{key} cannot be carried over: an adapter has none", f"remove {key}, and set it where the base is"
                )
        if source is not None:
            self._notes.append("the tokenizer stays the base's, as an adapter has none")
        for key in config:
            if key not in _TOP:
                self._notes.append(
                    f"'{printable(key)}' is left out: mergekit does not read it.{did_you_mean(key, _TOP)}"
                )

    def _dtype(self) -> str | None:
        """The dtype of the result's tensors."""
        name = self._config.get("out_dtype") or self._config.get("dtype")
        if name is None:
            return None
        short = str(name).removeprefix("torch.")
        if short == "float64":
            self._notes.append("dtype float64: everything is computed in it, and stored as float32")
            return "float32"
        if short not in _DTYPES:
            raise self._refuse(f"dtype {printable(str(name))} cannot be stored", f"choose one of {', '.join(_DTYPES)}")
        return short

    def _inputs(self) -> tuple[list[Any], list[Any], int | None]:
        """What is merged, the parameters for all in order of precedence, and how many layers are named."""
        config = self._config
        common = config.get("parameters")
        given = [key for key in ("models", "slices", "modules") if config.get(key)]
        if len(given) != 1:
            raise self._refuse("it names exactly one of models, slices and modules", "list the adapters under models")
        if given == ["modules"]:
            raise self._refuse(
                "modules cannot be carried over: one method and one list of adapters serve all components",
                "list the adapters under models, and tell parts apart by filters",
            )
        if given == ["models"]:
            return self._list("models", config["models"]), [common], None
        slices = self._list("slices", config["slices"])
        if len(slices) > 1:
            raise self._refuse(
                f"{len(slices)} slices put layers together anew, and an adapter changes layers where they are",
                "for other weights by depth use one slice, or models, and numbers over depth: weight: [0, 0.5, 1]",
            )
        one = slices[0]
        if one.get("residual_weight") is not None:
            raise self._refuse("residual_weight cannot be carried over", "remove it")
        sources = self._list("slices[0].sources", one.get("sources"))
        ranges = [each.get("layer_range") for each in sources]
        first = ranges[0]
        if (
            not (isinstance(first, list) and len(first) == 2 and all(isinstance(n, int) for n in first))
            or first[0] != 0
        ):
            raise self._refuse(
                f"layer_range {printable(str(first))} takes part of the layers, which an adapter cannot leave out",
                "use models instead of slices, and a weight of 0 for layers that shall not change",
            )
        if any(each != first for each in ranges):
            raise self._refuse(
                "its sources take different layers", "an adapter's layers stay where they are: use models"
            )
        if one.get("base_model") is not None and one["base_model"] != config.get("base_model"):
            raise self._refuse("slices[0].base_model is another than base_model", "name one base")
        self._notes.append(f"layer_range [0, {first[1]}] is taken for all layers: an adapter leaves none out")
        return sources, [one.get("parameters"), common], first[1]

    def _list(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self._refuse(f"{key} is no list of mappings")
        return value

    def _models(self, name: str, method: Spelling, inputs: Sequence[Mapping[str, Any]]) -> tuple[_Base, list[_Input]]:
        """The base, and the adapters in order; the first of two is the one that mergekit calls the base."""
        found = [_Input(model_of(each.get("model"), self._refuse), each.get("parameters")) for each in inputs]
        named = self._config.get("base_model")
        start = model_of(named, self._refuse) if named is not None else None
        if twice := next(
            (each.model for at, each in enumerate(found) if each.model in [x.model for x in found[:at]]), None
        ):
            raise self._refuse(f"{twice} is named twice", "name it once, at the sum of its weights")
        if method.inputs == "two":
            return self._two(name, start, found)
        if start is not None and start.lora is not None:
            raise self._refuse(
                f"base_model {start} is an adapter, and {name} takes differences from it",
                "name the base alone; to take one adapter from others give it weight -1 in a linear recipe",
            )
        own = next((each for each in found if start is not None and each.model == start), None)
        adapters = [each for each in found if each is not own]
        if start is not None and name == "karcher":
            raise self._refuse("karcher counts base_model as one of the models to average", "list the adapters alone")
        return _Base(self._one_base(start, adapters), start is not None, own), self._are_adapters(adapters)

    def _two(self, name: str, start: Model | None, found: list[_Input]) -> tuple[_Base, list[_Input]]:
        """Two models, that of base_model first."""
        if start is None:
            raise self._refuse(f"{name} goes from base_model to the other model, and none is named", "add base_model")
        if not any(each.model == start for each in found):
            found = [_Input(start, None), *found]
        found = sorted(found, key=lambda each: each.model != start)
        if len(found) != 2:
            raise self._refuse(f"{name} takes two models, base_model among them, and there are {len(found)}")
        if start.lora is None and found[1].model.lora is not None:
            raise self._refuse(
                f"{name} between {start}, a model without adapter, and {found[1].model}",
                "that is the adapter at a weight: lorahub merge ADAPTER:0.5 --base BASE",
            )
        return _Base(self._one_base(None, found), False, None), self._are_adapters(found)

    def _one_base(self, start: Model | None, adapters: Sequence[_Input]) -> Model | None:
        """The one base of all models."""
        bases = {str(each.model.model): Model(each.model.model) for each in adapters if each.model.lora is not None}
        if start is not None:
            bases[str(start.model)] = start
        if len(bases) > 1:
            raise self._refuse(
                f"the models stand on different bases: {' and '.join(bases)}",
                "changes of one base mean nothing on another: take adapters of one base, and name it alike everywhere",
            )
        return next(iter(bases.values()), None)

    def _are_adapters(self, inputs: list[_Input]) -> list[_Input]:
        if not inputs:
            raise self._refuse("it names no adapter", "write base+adapter, or list adapters under models")
        for each in inputs:
            if each.model.is_full_model():
                raise self._refuse(
                    f"{each.model} is a whole model, and recipes are of adapters",
                    f"make an adapter of it: lorahub extract {each.model} BASE -o FOLDER",
                )
            if each.model.lora is None:
                self._notes.append(f"{each.model} is taken for an adapter, as no '+' stands in it")
        return inputs

    def _left_over(self, name: str, method: Spelling, owns: Sequence[Any], scopes: Sequence[Any]) -> None:
        """Parameters that mergekit's method does not read."""
        for scope in (*scopes, *owns):
            if scope is not None and not isinstance(scope, dict):
                raise self._refuse("parameters is no mapping")
        known = {*method.each, *method.common}
        for key in sorted({key for scope in (*scopes, *owns) for key in scope or {}} - known):
            why = WITHOUT_EFFECT.get(key, f"mergekit's {name} does not read it")
            self._notes.append(f"parameter '{printable(key)}' is left out: {why}.{did_you_mean(key, known)}")
        for key in sorted({key for own in owns for key in own or {}} & {*method.common}):
            self._notes.append(
                f"parameter '{key}' of a single model is left out: mergekit's {name} reads it for all alone"
            )

    def _adapter(self, one: _Input, method: Spelling, scopes: Sequence[Any], settings: Settings) -> dict[str, Any]:
        """One adapter of the recipe."""
        result: dict[str, Any] = {"ref": one.model.ref(self._folder)}
        own = {key: settings.one(key, [one.own, *scopes], default) for key, default in method.each.items()}
        if "weight" in own:
            result["weight"] = own.pop("weight")
        if own:
            result["parameters"] = own
        return result

    def _as_adapters(self, document: dict[str, Any], base: _Base, scopes: Sequence[Any], settings: Settings) -> None:
        """Linear sums of whole models as sums of changes: the base must come out once."""
        weights = [each["weight"] for each in document["adapters"]]
        normalize = document["parameters"]["normalize"]
        if base.own is not None or base.named:
            own = base.own.own if base.own is not None else None
            weights.append(settings.one("weight", [own, *scopes], None))
        numbers = [weight for weight in weights if isinstance(weight, int | float)]
        if len(numbers) == len(weights):
            total = sum(numbers)
            if not normalize and abs(total - 1) > 1e-6:
                raise self._refuse(
                    f"linear without normalize, at weights of {total:g} together, also multiplies the base by that",
                    "let the weights sum to 1, or take task_arithmetic, which adds the changes alone",
                )
            if len(weights) > len(document["adapters"]):
                if abs(total) < 1e-12:
                    raise self._refuse("linear: the weights sum to zero", "change them")
                for each in document["adapters"]:
                    each["weight"] = each["weight"] / total if normalize else each["weight"]
                document["parameters"]["normalize"] = False
                self._notes.append(
                    "linear: the base is one of the models, so that the weights are written as their shares"
                )
            return
        if not normalize or len(weights) > len(document["adapters"]):
            raise self._refuse(
                "linear adds whole models, and with weights that differ by target it cannot be said here how often the "
                "base comes out",
                "take task_arithmetic, which adds the changes alone, or leave normalize at true and the base out",
            )


@dataclass(frozen=True, slots=True)
class _Input:
    """One model, and its own parameters."""

    model: Model
    own: Any


@dataclass(frozen=True, slots=True)
class _Base:
    """The base; whether base_model names it, and the entry that it has among the models, if any."""

    model: Model | None
    named: bool
    own: _Input | None


def _over_depth(value: Any) -> bool:
    """Whether numbers over depth are anywhere in a document."""
    if isinstance(value, Mapping):
        return "gradient" in value or any(map(_over_depth, value.values()))
    return isinstance(value, list | tuple) and any(map(_over_depth, value))
