"""The text encoders of a pipeline, as files of token vectors name them, with their tokenizers.  Reads no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.errors import BaseMismatch, UsageError
from lorahub.lazy import torch
from lorahub_diffusers.vectors import ANY
from lorahub_diffusers.view import models_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Encoder", "encoder_for"]

_COMPONENT: Mapping[str, str] = MappingProxyType(
    {
        ANY: "text_encoder",
        **dict.fromkeys(("clip_l", "clip_h", "text_encoder", "text_encoders_0"), "text_encoder"),
        **dict.fromkeys(("clip_g", "text_encoder_2", "text_encoders_1"), "text_encoder_2"),
    }
)
"""What files call a text encoder -> the component of a pipeline."""

_MODEL: Mapping[str, str] = MappingProxyType({"t5": "t5", "t5xxl": "t5", "umt5xxl": "umt5", "gemma2_2b": "gemma2"})
"""What files call a text encoder -> ``model_type`` of the component: pipelines count these in different places."""

_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A text encoder of a pipeline.

    Attributes:
        component: its name.
        tokenizer: the name of its tokenizer.
        tables: the modules that look up its vectors, whose weight is one.
        width: of a vector.
    """

    component: str
    tokenizer: str
    tables: tuple[nn.Module, ...]
    width: int


def encoder_for(pipe: Any, called: str, component: str, width: int) -> Encoder:
    """The text encoder that vectors are for.

    Args:
        pipe: the pipeline.
        called: what the file calls it, or ``ANY``.
        component: the one that vectors are for whose file does not say; "" for the first.
        width: of a vector.

    Raises:
        UsageError: the pipeline has no such text encoder, or no tokenizer for it.
        BaseMismatch: its vectors have another width.
    """
    models = {name: model for name, model in models_of(pipe).items() if name.startswith(_ENCODER)}
    wanted = component if component and called == ANY else _COMPONENT.get(called, "")
    if called in _MODEL:
        kinds = {name: getattr(getattr(model, "config", None), "model_type", "") for name, model in models.items()}
        wanted = next((name for name, kind in kinds.items() if kind == _MODEL[called]), "")
    tokenizer = _TOKENIZER + wanted.removeprefix(_ENCODER)
    if wanted not in models or getattr(pipe, tokenizer, None) is None:
        what = f"for the text encoder {called!r}" if called else f"for {wanted or component!r}"
        raise UsageError(
            f"the vectors are {what}, which this {type(pipe).__name__} does not have",
            f"text encoders: {', '.join(models) or 'none'}",
        )
    encoder = _encoder(wanted, tokenizer, models[wanted])
    if encoder.width != width:
        fitting = (name for name, model in models.items() if _encoder(name, "", model).width == width)
        other = next(fitting, "")
        raise BaseMismatch(
            f"the vectors are {width} wide, and those of {wanted} are {encoder.width}: they are for another model",
            f'say which text encoder: component="{other}"'
            if other
            else "take a pipeline of the family it was made for",
        )
    return encoder


def _encoder(component: str, tokenizer: str, model: Any) -> Encoder:
    weight = model.get_input_embeddings().weight
    return Encoder(
        component=component, tokenizer=tokenizer, tables=tuple(_tables(model, weight)), width=weight.shape[1]
    )


def _tables(model: nn.Module, weight: torch.Tensor) -> Iterator[nn.Module]:
    """Every module with that weight: some models have one for themselves and one for their stack."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is weight:
            yield module
