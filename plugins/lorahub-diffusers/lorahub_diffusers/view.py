"""A pipeline as one ``nn.Module``, which pipelines are not: its models as children, under their components' names.

The children are the pipeline's own modules and not copies, so what is attached to them or merged into them is so in
the pipeline.  Nothing calls the view itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lorahub.deltas.kind import JSON
from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["as_view", "config_of", "is_pipeline", "is_view", "models_of"]

_PIPELINES = frozenset(
    {
        ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
        ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
    }
)
_MARK = "_lorahub_pipeline"


def is_pipeline(given: object) -> bool:
    """Whether something is a pipeline of diffusers, by the classes it derives from."""
    return any((each.__module__, each.__qualname__) in _PIPELINES for each in type(given).__mro__)


def is_view(model: nn.Module) -> bool:
    """Whether a module is what ``as_view`` made."""
    return _MARK in vars(model)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Component -> model, in the pipeline's order; what torch.compile returned is looked through, twins left out."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, component in pipe.components.items():
        model = getattr(component, "_orig_mod", component)
        if isinstance(model, torch.nn.Module) and id(model) not in seen:
            seen.add(id(model))
            found[name] = model
    return found


def config_of(view: nn.Module) -> Mapping[str, JSON]:
    """What ``model_index.json`` would say of a view's pipeline."""
    said: Mapping[str, JSON] = vars(view)[_MARK]
    return said


def as_view(pipe: object) -> nn.Module:
    """The view of a pipeline, as its components are now."""
    view: Any = torch.nn.Module()
    given: Any = pipe
    for name, model in models_of(pipe).items():
        view.add_module(name, model)
    vars(view)[_MARK] = {**_plain(dict(given.config)), "_class_name": type(pipe).__name__}
    return cast("nn.Module", view)


def _plain(config: dict[str, Any]) -> dict[str, JSON]:
    said: dict[str, JSON] = json.loads(json.dumps(config, default=str))
    return said
