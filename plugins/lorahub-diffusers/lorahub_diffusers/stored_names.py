"""How files of older releases call parameters, and copies that nobody reads.  Names alone."""

from __future__ import annotations

import re
from collections.abc import Container

__all__ = ["canonical", "is_copy"]

_OLD = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention blocks of autoencoders and of UNets without text, as releases before 0.13 saved them."""

_STILL = frozenset({"UNet1DModel"})
"""Classes that have these names to this day."""

_FUSED = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj"}
"""What ``fuse_qkv_projections`` makes -> one of those that it is a copy of, beside it."""


def canonical(class_name: str, stored: str) -> str:
    """The live name of a stored parameter."""
    found = None if class_name in _STILL else _OLD.fullmatch(stored)
    return f"{found[1]}.{_NEW[found[2]]}.{found[3]}" if found else stored


def is_copy(name: str, names: Container[str]) -> bool:
    """Whether a parameter is a fused copy of others that are there too: such are saved, and left unread."""
    module, _, parameter = name.rpartition(".")
    above, _, leaf = module.rpartition(".")
    return leaf in _FUSED and f"{above}.{_FUSED[leaf]}.{parameter}" in names
