"""A live model as it is without the layers that PEFT put around its own, to be indexed under its own names.

Pipelines load adapters themselves by putting such layers in; the model's own stays inside as ``base_layer``.  What is
made here shares every module and tensor that it can with the model, and is looked at, never called or changed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.errors import UnsupportedFormat

if TYPE_CHECKING:
    from torch import nn

__all__ = ["demand_apart", "fused_attentions", "own_path", "unwrapped"]

_TUNER = ("peft.tuners.tuners_utils", "BaseTunerLayer")
_INNER = "base_layer"
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where nothing is wrapped, else one of the same class with its own layers in their places."""
    if _is_tuner(model):
        return unwrapped(model.get_submodule(_INNER))
    children = {name: child if child is None else unwrapped(child) for name, child in model._modules.items()}  # noqa: SLF001 - unlike named_children, with what is absent or twice
    if all(child is model._modules[name] for name, child in children.items()):  # noqa: SLF001
        return model
    twin: nn.Module = object.__new__(type(model))
    vars(twin).update(vars(model))
    vars(twin)["_modules"] = children
    return twin


def own_path(model: nn.Module, name: str) -> str:
    """The name that ``unwrapped`` has for a parameter of the model."""
    if f".{_INNER}." not in f".{name}":
        return name
    module: Any = model
    kept = []
    for part in name.split("."):
        if not (part == _INNER and _is_tuner(module)):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


def fused_attentions(model: nn.Module) -> tuple[str, ...]:
    """The attentions whose queries, keys and values one fused projection computes, and not those of their names."""
    fused = [name for name, module in model.named_modules() if getattr(module, "fused_projections", False)]
    return tuple(name for name in fused if _in_use(model.get_submodule(name)))


def demand_apart(kind: str, fused: Collection[str], targets: Collection[Target]) -> None:
    """Return where the projections that are to be changed are in use.

    Args:
        kind: the model's class, for the message.
        fused: see ``fused_attentions``.
        targets: what is to be changed.

    Raises:
        UnsupportedFormat: they were fused; the modules that adapters name are there and out of use.
    """
    idle = {f"{name}.{projection}" for name in fused for projection in _PROJECTIONS}
    there = sorted({target.module for target in targets} & idle, key=natural)
    if there:
        raise UnsupportedFormat(
            f"{len(fused)} attention layers of this {kind} are fused: the projections that adapters change are out of "
            f"use, the first {there[0]}",
            "take that back first (unfuse_qkv_projections()), merge, and fuse again; attached adapters need them apart",
        )


def _in_use(attention: Any) -> bool:
    """Whether fused projections are called; those of UNets stay behind when they are taken back."""
    return hasattr(attention, "unfuse_projections") or type(attention.processor).__name__.startswith("Fused")


def _is_tuner(module: nn.Module) -> bool:
    return any((each.__module__, each.__qualname__) == _TUNER for each in type(module).__mro__)
