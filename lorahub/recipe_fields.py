"""The language of a recipe: how a weight, or any other number, is said for many targets at once.

Data only; ``composition/weights/resolve.py`` says what it comes to.  A rule is one of

    0.7                                                       for every target
    [0.0, 0.5, 1.0]                                           over depth: the first layer to the last, linear between
    { gradient = [0, 1], layers = 32, elsewhere = 0 }         the same, with the number of layers and the rest said
    { layers = { 0-7 = 0.2, 8- = 1.0 }, default = 0 }         by layer number or range, both ends included
    { unet = 0.8, text_encoder = 0.2 }                        by component; each a rule of its own
    { down = { block_2 = [0.0, 1.0] }, mid = 1, up = 0.5 }    a UNet's attention blocks, as diffusers spells them
    { blocks = [1, 0, 0, ...] } or { blocks = { OUT04 = 1 } } blocks by LoRA Block Weight's names
    { preset = "b-lora-style", value = 0.9 }                  blocks that are known by what they do
    [ { filter = "*.self_attn.*", value = 0.3, count = 64 }, { value = 1.0 } ]   patterns, the first that fits

Which one a table is, its keys tell.  ``schemas/recipe.schema.json`` is generated from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from typing_extensions import TypeAliasType

from lorahub.names import did_you_mean, printable
from lorahub.record_fields import PATTERNS, Finite, Positive, enumerate_problems

__all__ = [
    "BLOCK_LISTS",
    "PRESETS",
    "RULE_KEYS",
    "Blocks",
    "Components",
    "Filter",
    "Gradient",
    "Layers",
    "Preset",
    "RecipePart",
    "Rule",
    "Setting",
    "UNet",
    "explain",
]

PRESETS: Mapping[str, str] = MappingProxyType(
    {"b-lora-content": "up_blocks.0.attentions.0", "b-lora-style": "up_blocks.0.attentions.1"}
)
"""Preset -> the block of the UNet that it keeps; everything else gets 0.  B-LoRA (https://arxiv.org/abs/2403.14572)
found what an SDXL LoRA holds of an image's content and of its style in these two."""

_INPUTS, _OUTPUTS = [f"IN{n:02}" for n in range(12)], [f"OUT{n:02}" for n in range(12)]

BLOCK_LISTS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        12: ("BASE", *(_INPUTS[n] for n in (4, 5, 7, 8)), "MID", *_OUTPUTS[:6]),
        17: ("BASE", *(_INPUTS[n] for n in (1, 2, 4, 5, 7, 8)), "MID", *_OUTPUTS[3:]),
        20: ("BASE", *_INPUTS[:9], "MID", *_OUTPUTS[:9]),
        26: ("BASE", *_INPUTS, "MID", *_OUTPUTS),
        61: ("CLIP", "T5", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT"),
    }
)
"""How many values -> which blocks they are for, in LoRA Block Weight's order: SDXL's attention blocks, SD 1's and 2's,
all blocks of SDXL, all of SD 1 and 2, and Flux's.  BASE is every text encoder."""

_BLOCK = r"^(BASE|CLIP|T5|MID|(IN|OUT)([0-9]{2})?|[DS][0-9]{2})$"
_SIDE_BLOCK = r"^block_[0-9]{1,2}$"
_RANGE = r"^(0|[1-9][0-9]{0,4})(-((0|[1-9][0-9]{0,4}))?)?$"
_COMPONENT = r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"

_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        **dict(PATTERNS.values()),
        _RANGE: "a layer or a range of layers, such as '7', '0-7' or '8-'",
        _BLOCK: "a block by LoRA Block Weight's names, such as 'IN04', 'MID' or 'OUT11'",
        _SIDE_BLOCK: "a block as diffusers numbers them, such as 'block_0'",
        _COMPONENT: "the name of a component, such as 'unet'",
    }
)


class RecipePart(BaseModel):
    """A part of a recipe: frozen; unknown keys are refused, since a recipe is written for this program alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _shape(value: Any) -> str:
    """Which branch of a field that takes a number, numbers or a table."""
    return "<table>" if isinstance(value, Mapping) else "<list>" if isinstance(value, list | tuple) else "<number>"


_Number: TypeAlias = Annotated[Finite, Tag("<number>")]
_Numbers: TypeAlias = Annotated[tuple[Finite, ...], Field(min_length=1)]


_CLOSED = Field(min_length=1, json_schema_extra={"additionalProperties": False})
"""Of a table whose keys follow a pattern."""


class Gradient(RecipePart):
    """Numbers over depth: the first for the first layer, the last for the last, linear between."""

    gradient: tuple[Finite, ...] = Field(min_length=1, description="Evenly spaced over the layers; one is a constant.")
    layers: Positive | None = Field(default=None, description="How many layers there are, where no base tells.")
    elsewhere: Finite | None = Field(
        default=None, description="For targets in no layer; without it there must be none."
    )


class Layers(RecipePart):
    """Numbers by layer; the first that holds a layer counts."""

    layers: dict[Annotated[str, Field(pattern=_RANGE)], Finite] = Field(
        min_length=1,
        description="Layer, or range with both ends included, as '0-7' or '8-' -> number.",
        json_schema_extra={"additionalProperties": False},
    )
    default: Finite | None = Field(default=None, description="For all other targets; without it there must be none.")

    @model_validator(mode="after")
    def _apart(self) -> Layers:
        spans = sorted((start, stop, key) for key, (start, stop) in self.spans.items())
        for (_, stop, one), (start, _, two) in pairwise(spans):
            if start < stop:
                raise ValueError(f"'{one}' and '{two}' both hold layer {start}")
        if empty := [key for start, stop, key in spans if start >= stop]:
            raise ValueError(f"'{empty[0]}' holds no layer: the larger number comes last")
        return self

    @property
    def spans(self) -> dict[str, tuple[int, float]]:
        """Key -> (first layer, first layer behind it)."""
        found = {}
        for key in self.layers:
            first, dash, last = key.partition("-")
            found[key] = (int(first), int(last) + 1 if last else inf if dash else int(first) + 1)
        return found


class Blocks(RecipePart):
    """Numbers by block, under the names that LoRA Block Weight gives the blocks of UNets and of Flux."""

    blocks: Annotated[
        Annotated[dict[Annotated[str, Field(pattern=_BLOCK)], Finite], _CLOSED, Tag("<table>")]
        | Annotated[_Numbers, Tag("<list>")],
        Discriminator(lambda value: "<table>" if isinstance(value, Mapping) else "<list>"),
    ] = Field(description="12, 17, 20, 26 or 61 numbers, or block -> number.")
    default: Finite | None = Field(default=None, description="For targets in other blocks; without it there are none.")

    @model_validator(mode="after")
    def _known_length(self) -> Blocks:
        if isinstance(self.blocks, tuple) and len(self.blocks) not in BLOCK_LISTS:
            raise ValueError(
                f"blocks lists {len(self.blocks)} numbers, and must list {', '.join(map(str, BLOCK_LISTS))}"
            )
        return self

    @property
    def named(self) -> Mapping[str, float]:
        """Block -> number."""
        if isinstance(self.blocks, tuple):
            return dict(zip(BLOCK_LISTS[len(self.blocks)], self.blocks, strict=True))
        return self.blocks


_Block: TypeAlias = Annotated[_Number | Annotated[_Numbers, Tag("<list>")], Discriminator(_shape)]
_Side: TypeAlias = Annotated[
    _Number
    | Annotated[_Numbers, Tag("<list>")]
    | Annotated[dict[Annotated[str, Field(pattern=_SIDE_BLOCK)], _Block], _CLOSED, Tag("<table>")],
    Discriminator(_shape),
]


class UNet(RecipePart):
    """Numbers for a UNet's attention blocks, in the dictionary that diffusers' ``set_adapters`` takes.

    A block's other modules go with the attention of their number, and what is left out counts 1, as there, unless
    ``default`` says otherwise.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["down"]}, {"required": ["mid"]}, {"required": ["up"]}]}
    )

    down: _Side | None = Field(default=None, description="A number, one for each attention, or by 'block_N'.")
    mid: _Block | None = Field(default=None, description="For the block in the middle.")
    up: _Side | None = Field(default=None, description="As down.")
    default: Finite = Field(default=1.0, description="For everything else.")


class Preset(RecipePart):
    """Blocks known by what they do; everything else gets 0."""

    preset: Literal["b-lora-content", "b-lora-style"] = Field(description="Which blocks are kept.")
    value: Finite = Field(default=1.0, description="Their number.")


class Filter(RecipePart):
    """A rule for the targets that fit a pattern and no earlier one."""

    filter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Pattern of a module, a parameter or 'component:parameter', where '*' is any run of characters; "
        "without one every target fits.",
    )
    value: Rule = Field(description="Their number, or a rule for them.")
    count: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How many targets get it; another number is an error."
    )
    optional: bool = Field(default=False, description="No target need fit.")


_SIGNS: Mapping[str, str] = MappingProxyType(
    {
        "gradient": "<gradient>",
        "preset": "<preset>",
        "blocks": "<blocks>",
        "down": "<unet>",
        "mid": "<unet>",
        "up": "<unet>",
        "layers": "<layers>",
    }
)
"""Key -> the sort of table that has it; the first in this order decides."""


class Components(RecipePart):
    """A rule for each component of a pipeline."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "minProperties": 1,
            "propertyNames": {"pattern": _COMPONENT, "not": {"enum": [*sorted(_SIGNS)]}},
        },
    )

    __pydantic_extra__: dict[str, Rule]
    default: Rule | None = Field(default=None, description="For the other components; without it there must be none.")

    @model_validator(mode="after")
    def _component_names(self) -> Components:
        if not self.named and self.default is None:
            raise ValueError("is empty")
        for name in self.named:
            if not re.match(_COMPONENT, name):
                raise ValueError(f"{name[:80]!r} is not {_MEANINGS[_COMPONENT]}")
        return self

    @property
    def named(self) -> Mapping[str, Rule]:
        """Component -> rule."""
        return self.__pydantic_extra__


_TABLES: Mapping[str, type[RecipePart]] = MappingProxyType(
    {
        "<gradient>": Gradient,
        "<preset>": Preset,
        "<blocks>": Blocks,
        "<unet>": UNet,
        "<layers>": Layers,
        "<components>": Components,
    }
)
RULE_KEYS = tuple(_SIGNS)
"""The keys by which a table is told from one of components."""

_WORDS: Mapping[type, str] = MappingProxyType({bool: "<switch>", int: "<whole>", float: "<number>", str: "<word>"})


def _sort(value: Any) -> str:
    """Which sort of rule a value is or wants to be, by its type and keys."""
    if isinstance(value, Mapping):
        return next((sort for sign, sort in _SIGNS.items() if sign in value), "<components>")
    if isinstance(value, list | tuple):
        return "<filters>" if value and isinstance(value[0], Mapping | Filter) else "<list>"
    return next((sort for sort, model in _TABLES.items() if isinstance(value, model)), "<number>")


def _plain_or_rule(value: Any) -> str:
    return _WORDS.get(type(value), "<rule>")


Rule = TypeAliasType(
    "Rule",
    Annotated[
        Annotated[Finite, Tag("<number>")]
        | Annotated[tuple[Finite, ...], Field(min_length=1), Tag("<list>")]
        | Annotated[Gradient, Tag("<gradient>")]
        | Annotated[Layers, Tag("<layers>")]
        | Annotated[Blocks, Tag("<blocks>")]
        | Annotated[UNet, Tag("<unet>")]
        | Annotated[Preset, Tag("<preset>")]
        | Annotated[Components, Tag("<components>")]
        | Annotated[tuple[Filter, ...], Field(min_length=1), Tag("<filters>")],
        Discriminator(_sort),
    ],
)
"""A number for every target."""


class _SettingSchema:
    """JSON Schema of a setting, where a number is a rule: 1 would else be of three sorts, and may be of one."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """A switch, a word, or a rule."""
        return {"anyOf": [{"type": ["boolean", "string"]}, handler(schema["choices"]["<rule>"])]}


Setting: TypeAlias = Annotated[
    Annotated[bool, Tag("<switch>")]
    | Annotated[int, Tag("<whole>")]
    | Annotated[Finite, Tag("<number>")]
    | Annotated[str, Tag("<word>")]
    | Annotated[Rule, Tag("<rule>")],
    Discriminator(_plain_or_rule),
    _SettingSchema(),
]
"""A method's parameter: a switch, a word, a number, or a rule."""

Filter.model_rebuild()
Components.model_rebuild()

_MOST = 100
"""Problems that are listed; whoever has more has another sort of file."""

_SHORTER: Mapping[str, str] = MappingProxyType({"missing": "is missing", "too_short": "is empty"})


def explain(where: str, what: str, error: ValidationError, models: Mapping[str, type[BaseModel]]) -> str:
    """What pydantic found, as text: every problem on its line, with its key path and what belongs there.

    Args:
        where: the file, or what it is called.
        what: what it should be: "a recipe".
        error: what pydantic found.
        models: the last word of a key path, "" for the whole -> the model there, for the nearest key to a wrong one.
    """
    problems = []
    found = error.errors(include_url=False)[:_MOST]
    for one in found:
        loc = one["loc"]
        if one["type"] == "too_short" and any(other["loc"][: len(loc)] == loc for other in found if other is not one):
            continue  # pydantic counts only the items that passed
        text = _SHORTER.get(one["type"]) or one["msg"].removeprefix("Value error, ")
        if one["type"] == "string_pattern_mismatch":
            text = f"'{printable(str(one['input'])[:80])}' is not {_MEANINGS[one['ctx']['pattern']]}"
        elif one["type"] == "extra_forbidden":
            known = _model_at(loc[:-1], models).model_fields
            text = f"there is no such key here.{did_you_mean(str(loc[-1])[:80], known)} Known: {', '.join(known)}"
        problems.append(f"{_key_path(loc)}: {text}")
    if error.error_count() > _MOST:
        problems.append(f"and {error.error_count() - _MOST} more")
    return enumerate_problems(f"{where} does not follow the schema of {what}", list(dict.fromkeys(problems)))


def _model_at(loc: tuple[int | str, ...], models: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    """The model whose key is at fault, by the last telling word of the path to it."""
    words = [part for part in loc if isinstance(part, str)]
    last = words[-1] if words else ""
    return Filter if last == "<filters>" else _TABLES.get(last) or models.get(last, models[""])


def _key_path(loc: tuple[int | str, ...]) -> str:
    """A path as people write it, without pydantic's words for the branches that were tried."""
    parts = [part for part in loc if not (isinstance(part, str) and (part == "[key]" or part in _UNSAID))]
    path = "".join(
        f".{part[:80]}" if isinstance(part, str) and part.isidentifier() else f"[{printable(repr(part)[:80])}]"
        for part in parts
    )
    return path.removeprefix(".") or "the whole"


_UNSAID = frozenset({*_TABLES, *_WORDS.values(), "<number>", "<list>", "<table>", "<filters>", "<rule>"})
