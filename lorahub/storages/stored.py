"""Quantised weights as files hold them: which stored tensors make one weight, and how.

Knows names, headers and tensors; no files and no models.  Needs none of the libraries that wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lorahub.lazy import torch

__all__ = ["Read", "Settings", "Stored"]

Settings: TypeAlias = "Mapping[str, object]"
"""What a base's configuration says of its quantisation."""

Read: TypeAlias = "Callable[[str], torch.Tensor]"
"""Stored name -> tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight that is stored in quantised form.

    Attributes:
        name: what it is called.
        shape: its logical shape.
        dtype: safetensors code of the dtype in which its library gives it; "" where its files do not say.
        parts: the stored tensors that it is made of, its own first.
        values: gives it in float32, given what reads ``parts``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[str, ...]
    values: Callable[[Read], torch.Tensor]
