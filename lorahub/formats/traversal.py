"""Modules by position: the order in which a walk over a model meets them, for files that store no names.

A walk visits children in the order in which they were registered, which no name tells; tables say it for the few
classes that such files were trained on.  Where releases differ, every order they had is a candidate, and the shapes of
the factors decide: one candidate must fit at all positions, or nothing is placed.  Knows names and shapes of a base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorahub.bases.index import BaseIndex

__all__ = ["CLASSES", "Pair", "Walk", "walks"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The sizes that factors show: of the weight they fit, outputs, inputs and kernel."""

    out: int
    into: int
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Walk:
    """One way to meet modules: which model, which order, and the modules in it."""

    component: str
    order: str
    modules: tuple[str, ...]


CLASSES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "CLIPAttention": {"self_attn": ("k_proj", "v_proj", "q_proj", "out_proj")},
    "CLIPMLP": {"mlp": ("fc1", "fc2")},
    "CrossAttention": dict.fromkeys(("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out.0")),
    "GEGLU": {"ff.net.0": ("proj",)},
}
"""Class -> how its modules' paths end -> its layers, in the order in which they are registered."""
_ATTENTION = CLASSES["CrossAttention"]
_TEXT = ("self_attn", "mlp")
_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")

_ORDERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "old": (("down_blocks", "up_blocks", "mid_block"), ("attentions", "resnets"), ("attn1", "ff", "attn2"), _TEXT),
    "new": (("down_blocks", "up_blocks", "mid_block"), ("attentions", "resnets"), ("attn1", "attn2", "ff"), _TEXT),
}
"""Where diffusers has the feed-forward layer: early between both attentions, later behind -> ranks of siblings."""


def walks(index: BaseIndex, classes: Sequence[str]) -> Iterator[Walk]:
    """Every way to meet the layers below modules of ``classes``, in every part of the base that has any.

    Classes nobody here knows are left out: then no walk has as many modules as the file, or their shapes differ.
    """
    parts: dict[str, list[str]] = {}
    for name in index.modules():
        component, colon, module = name.rpartition(":")
        parts.setdefault(component if colon else "", []).append(module)
    wanted = {end: children for name in classes for end, children in _children(name).items()}
    for component, modules in parts.items():
        found = [module for module in modules if _wanted(module, wanted)]
        seen = set()
        for order, ranks in _ORDERS.items():
            walk = tuple(sorted(found, key=lambda module: _rank(module, ranks, wanted)))
            if walk and walk not in seen:
                seen.add(walk)
                yield Walk(component, order, walk)


def _children(name: str) -> Mapping[str, tuple[str, ...]]:
    if name == "Attention":  # what CrossAttention is called since
        return _ATTENTION
    if name == "ResnetBlock2D":
        return {"resnets.*": _RESNET}
    return CLASSES.get(name, {})


def _wanted(module: str, wanted: Mapping[str, tuple[str, ...]]) -> bool:
    return any(_below(module, end, children) is not None for end, children in wanted.items())


def _below(module: str, end: str, children: tuple[str, ...]) -> int | None:
    """The place among ``children`` of a layer below a module whose path ends as ``end`` says, or None."""
    for place, child in enumerate(children):
        if module.endswith(f".{child}"):
            path = module.removesuffix(f".{child}")
            above = path.rpartition(".")[0] if end.endswith(".*") else path
            plain = end.removesuffix(".*")
            if above == plain or above.endswith(f".{plain}"):
                return place
    return None


def _rank(
    module: str, ranks: Sequence[Sequence[str]], wanted: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[int, int, str], ...]:
    """A key under which modules sort as a walk meets them: segment by segment, layers by their own table."""
    order = {name: place for siblings in ranks for place, name in enumerate(siblings)}
    place, child = next(
        (found, children[found])
        for end, children in wanted.items()
        if (found := _below(module, end, children)) is not None
    )
    path = module.removesuffix(f".{child}").split(".")
    keys = [(0, int(each), "") if each.isdigit() else (1, order.get(each, -1), each) for each in path]
    return (*keys, (2, place, child))
