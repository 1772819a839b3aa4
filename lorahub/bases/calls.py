"""What modules do with their weights when they are called: a table of exact classes.

A subclass may do anything (scale an embedding, standardise a kernel), and so may a module whose ``forward`` somebody
replaced; such have no site, and neither has a module that is not called but looked into by another.  Classes are
compared by name, so that no model library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.bases.site import Site
from lorahub.storages.storage import held_by

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SITES", "site_of"]


def _linear(_module: Any) -> Site:
    return Site(op="linear")


def _turned(_module: Any) -> Site:
    return Site(op="linear", transposed=True)


def _embedding(module: Any) -> Site | None:
    """None where looking a row up changes it."""
    return Site(op="embedding") if module.max_norm is None else None


def _convolution(module: Any) -> Site:
    padding = module.padding
    return Site(
        op="conv",
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        padding=padding if isinstance(padding, str) else tuple(padding),
        around=tuple(module._reversed_padding_repeated_twice),  # noqa: SLF001 - what its own forward pads with
        padding_mode=module.padding_mode,
        groups=module.groups,
    )


SITES: Mapping[str, Callable[[Any], Site | None]] = MappingProxyType(
    {
        "torch.nn.modules.linear.Linear": _linear,
        "torch.nn.modules.sparse.Embedding": _embedding,
        "torch.nn.modules.conv.Conv1d": _convolution,
        "torch.nn.modules.conv.Conv2d": _convolution,
        "torch.nn.modules.conv.Conv3d": _convolution,
        "transformers.pytorch_utils.Conv1D": _turned,
        "bitsandbytes.nn.modules.Linear4bit": _linear,
        "bitsandbytes.nn.modules.Linear8bitLt": _linear,
    }
)
"""Qualified class name -> the site of ``weight`` in such a module."""

_ROWS_SECOND = frozenset(
    {
        "torch.nn.modules.transformer.TransformerEncoderLayer",
        "torch.nn.modules.transformer.TransformerDecoderLayer",
    }
)
"""Modules below which the rows of a batch lie along the second axis, unless their attention says otherwise."""


def site_of(model: nn.Module, name: str) -> Site | None:
    """The site of a parameter by its dotted name, or None."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias":
        beside = site_of(model, f"{path}.weight" if path else "weight")
        return None if beside is None else replace(beside, op="bias")
    module = model.get_submodule(path)
    make = SITES.get(_class(module))
    if leaf != "weight" or make is None or _replaced(module):
        if (held := held_by(module).get(leaf)) is None or not held.op:
            return None
        make = _linear if held.op == "linear" else _embedding
    above: Any = model.get_submodule(path.rpartition(".")[0])
    site = make(module)
    if site is not None and _class(above) in _ROWS_SECOND and not above.self_attn.batch_first:
        return Site(op="linear", rows=1)
    return site


def _class(module: Any) -> str:
    """The qualified name of the module's class; of one that FSDP2 shards, of the class that it had."""
    kinds = type(module).__mro__
    kind = kinds[2] if kinds[1].__name__ == "FSDPModule" and kinds[1].__module__.startswith(_FSDP) else kinds[0]
    return f"{kind.__module__}.{kind.__qualname__}"


_FSDP = "torch.distributed.fsdp"


def _replaced(module: Any) -> bool:
    """Whether somebody put another ``forward`` into the module, which may do anything.

    accelerate's calls the module's own, and moves it; that of Transformers' tensor parallelism has inputs or outputs in
    parts.
    """
    own = vars(module)
    if "forward" not in own or ("_old_forward" in own and "_hf_hook" in own):
        return False
    return not str(getattr(own["forward"], "__module__", "")).startswith("transformers.distributed.")
