"""The names that modules have in timm's feature extractors (``features_only=True``), as those of the whole model.

Some extractors hold the model they were made of; others take it apart and give the parts of its first sequences new
names, ``stages_0`` for ``stages.0``.  Which, timm itself says of the same model built on the meta device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["beginnings", "is_extractor"]

_HOLDING = frozenset({"FeatureGetterNet"})
_TAKEN_APART = frozenset({"FeatureDictNet", "FeatureListNet", "FeatureHookNet"})
_NOT_OF_THE_WHOLE = ("features_only", "out_indices", "feature_cls", "output_stride", "num_classes")


def is_extractor(model: object) -> bool:
    """Whether it is one whose names are known here."""
    kind = type(model)
    return kind.__module__ == "timm.models._features" and kind.__qualname__ in _HOLDING | _TAKEN_APART


def beginnings(model: nn.Module) -> list[tuple[str, str]]:
    """(beginning of a live name, the same in the whole model), with a dot at the end or empty; the first counts."""
    if not is_extractor(model):
        return [("", "")]
    if type(model).__qualname__ in _HOLDING:
        return [("model.", "")]
    children = {name for name, _ in model.named_children()}
    return [(f"{new}.", f"{old}.") for new, old in _names_in_parts(model) if new in children]


def _names_in_parts(model: Any) -> list[tuple[str, str]]:
    timm: Any = import_module("timm")
    parts: Any = import_module("timm.models._features")
    arguments = {key: value for key, value in model._model_args.items() if key not in _NOT_OF_THE_WHOLE}  # noqa: SLF001 - written there by timm for whoever builds it again
    with torch.device("meta"):
        whole = timm.create_model(model.pretrained_cfg["architecture"], **arguments)
    return [
        (new, old)
        for flatten in (True, False)
        for new, old, _ in parts._module_list(whole, flatten_sequential=flatten)  # noqa: SLF001 - what the extractor itself was named by
    ]
