"""Modules of timm whose weights are used otherwise than by calling them, or for more rows than the batch has.

Classes are compared by name, so that timm is not imported; ``tests/test_sites.py`` walks models of every file of timm
and finds no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.bases.calls import site_of
from lorahub.bases.site import Site

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LOOKED_INTO", "REGROUPED", "site"]

LOOKED_INTO: Mapping[str, str] = MappingProxyType(
    {
        "timm.models.beit.Attention": "qkv",
        "timm.models.eva.EvaAttention": "qkv",
        "timm.models.swin_transformer_v2.WindowAttention": "qkv",
    }
)
"""Class -> the child whose weight it takes and uses itself, with biases of its own."""

REGROUPED = frozenset(
    {
        "timm.models.davit.WindowAttention",
        "timm.models.efficientvit_msra.CascadedGroupAttention",
        "timm.models.gcvit.WindowAttentionGlobal",
        "timm.models.hieradet_sam2.MultiScaleAttention",
        "timm.models.maxxvit.AttentionCl",
        "timm.models.mobilevit.MobileVitBlock",
        "timm.models.mvitv2.MultiScaleAttention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
        "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        "timm.models.tiny_vit.Attention",
        "timm.models.tnt.Block",
        "timm.models.tnt.PixelEmbed",
        "timm.models.vision_transformer_sam.Attention",
        "timm.models.xcit.PositionalEncodingFourier",
        "timm.layers.pos_embed_rel.RelPosMlp",
    }
)
"""Classes below which the first axis is windows, heads or positions, and no longer the images of the batch."""


def site(model: nn.Module, name: str) -> Site | None:
    """The site of a parameter by its dotted name, or None."""
    found = site_of(model, name)
    if found is None:
        return None
    path = name.rpartition(".")[0].split(".")
    for depth in range(len(path)):
        above: Any = model.get_submodule(".".join(path[:depth]))
        kind = f"{type(above).__module__}.{type(above).__qualname__}"
        if LOOKED_INTO.get(kind) == ".".join(path[depth:]):
            return None
        if kind in REGROUPED:
            found = replace(found, rows=None)
    return found
