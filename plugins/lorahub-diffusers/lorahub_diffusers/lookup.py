"""Vectors that stand beside a table of embeddings: looked up by numbers that the table need not have.

No weight is changed: the table is asked for row 0 in those places, and what it gives there is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import local
from typing import TYPE_CHECKING, Any, final

from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Lookup"]


@final
class Lookup:
    """Vectors beside the tables of one text encoder, until ``remove``."""

    def __init__(self, tables: Iterable[nn.Module], rows: Mapping[int, torch.Tensor]) -> None:
        """Stand beside ``tables``; ``rows`` has [width] for each number."""
        self._numbers = torch.tensor(list(rows))
        self._vectors = torch.stack(list(rows.values()))
        self._asked = local()
        self._hooks = [
            hook
            for table in tables
            for hook in (table.register_forward_pre_hook(self._ask), table.register_forward_hook(self._answer))
        ]

    def remove(self) -> None:
        """Take the vectors off."""
        for hook in self._hooks:
            hook.remove()

    def _ask(self, _table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        numbers, *rest = args
        same = numbers.unsqueeze(-1) == self._numbers.to(numbers.device)
        there = same.any(-1)
        self._asked.found = (there, same.int().argmax(-1))
        return (numbers.masked_fill(there, 0), *rest)

    def _answer(self, _table: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        there, at = self._asked.found
        return torch.where(there.unsqueeze(-1), self._vectors.to(output)[at], output)
