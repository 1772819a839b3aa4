"""Copies of the weights a merge changes, and the way back to them: exact bits, or a refusal.

A fingerprint of what the merge wrote tells whether anyone changed the weights since; then going back would lose that
change, and is refused.  Knows tensors and rows; no plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.errors import LorahubError
from lorahub.lazy import torch

__all__ = ["Copies", "fingerprint"]

_WORD = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits as integers, modulo 2**64, as a scalar tensor: another after nearly any change."""
    tensor = tensor.detach()
    width = tensor.dtype.itemsize
    if tensor.is_contiguous() and (tensor.numel() * width) % 8 == 0 and (tensor.storage_offset() * width) % 8 == 0:
        return tensor.reshape(-1).view(torch.int64).sum()
    word: torch.dtype = getattr(torch, _WORD.get(width, "uint8"))
    return tensor.contiguous().view(word).sum(dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class _Saved:
    name: str
    rows: slice
    copy: torch.Tensor
    mark: torch.Tensor | None  # None until the merge has written these rows


@final
class Copies:
    """Copies of rows of tensors, taken before they are written to; safe to use from several threads on other rows."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Reserve memory for a copy of each tensor; it is used when rows are saved.

        Raises:
            LorahubError: the system will not give that much.
        """
        self._tensors = tensors
        self._space = _reserve(tensors)
        self._saved: dict[tuple[str, int], _Saved] = {}

    def save(self, name: str, rows: slice) -> torch.Tensor:
        """Copy some rows of a tensor, before anything is written to them; gives the copy."""
        copy = self._space[name][rows].copy_(self._tensors[name][rows])
        self._saved[name, rows.start] = _Saved(name, rows, copy, None)
        return copy

    def mark(self, name: str, rows: slice) -> None:
        """Remember what was written to saved rows."""
        saved = self._saved[name, rows.start]
        self._saved[name, rows.start] = _Saved(name, rows, saved.copy, fingerprint(self._tensors[name][rows]))

    def altered(self, threads: int) -> list[str]:
        """The tensors whose saved rows no longer hold what was marked, sorted."""
        names: set[str] = set()

        def look(saved: _Saved) -> Job:
            def job(_: Workspace) -> None:
                if saved.mark is not None and not torch.equal(
                    saved.mark, fingerprint(self._tensors[saved.name][saved.rows])
                ):
                    names.add(saved.name)

            return job

        run_jobs(map(look, self._saved.values()), threads)
        return sorted(names)

    def restore(self, threads: int) -> None:
        """Put every saved row back; an interrupt waits until that is done."""

        def put(saved: _Saved) -> Job:
            def job(_: Workspace) -> None:
                self._tensors[saved.name][saved.rows].copy_(saved.copy)

            return job

        run_jobs(map(put, list(self._saved.values())), threads, to_the_end=True)

    def drop(self) -> None:
        """Free the memory."""
        self._saved.clear()
        self._space.clear()


def _reserve(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    except (RuntimeError, MemoryError) as error:  # torch says RuntimeError where memory is short
        raise LorahubError(
            f"there is no room for copies of the {len(tensors)} parameters that would change: {error}",
            "merge to disk instead, which needs no copies",
        ) from None
