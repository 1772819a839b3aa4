"""Heads that were trained beside a prompt or a prefix: what the model has to be built with, and their values.

They lie in the adapter's file among the prompt's own tensors, under the names of PEFT's wrapper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lorahub.deltas.kind import JSON
from lorahub.lazy import torch
from lorahub_transformers.parts import HEAD, VECTORS

if TYPE_CHECKING:
    from torch import nn

    from lorahub.live.parts import OpenPart

__all__ = ["labels_for", "names_in", "take"]


def names_in(parts: Iterable[OpenPart]) -> dict[str, torch.Tensor]:
    """The parameters that parts bring, by their names in the model."""
    return {key.removeprefix(HEAD): value for part in parts for key, value in part.tensors.items() if key != VECTORS}


def labels_for(brought: Mapping[str, torch.Tensor], config: Mapping[str, JSON]) -> dict[str, JSON]:
    """What the configuration has to say so that a model is built with as many labels as the head has."""
    counts = [value.shape[0] for name, value in brought.items() if name.endswith(".weight")]
    known = config.get("id2label")
    if not counts or counts[-1] == (len(known) if isinstance(known, dict) else 2):
        return {}
    labels = {str(number): f"LABEL_{number}" for number in range(counts[-1])}
    named: dict[str, JSON] = {"id2label": {**labels}, "label2id": {name: int(at) for at, name in labels.items()}}
    return named


def take(model: nn.Module, brought: Mapping[str, torch.Tensor], there: Iterable[str]) -> None:
    """Put the values into the model where the base has none: there is no other head for when the adapter is off."""
    known = set(there)
    own: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in brought.items():
            if name not in known and name in own and own[name].shape == value.shape:
                own[name].copy_(value)
