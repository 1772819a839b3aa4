"""Checksums of tensors as fast as memory: whether bits are the ones that were there before.

The bits are taken as 64-bit words in a table of 64 columns.  The sums of its rows and the sums of its columns, modulo
2**64, are each multiplied with the odd number of their place and added up.  One word that differs changes both for
sure; words that have changed places differ in the row or in the column.  It is no defence against whoever wants two
tensors to agree.

This is the plain twin, for any device; ``merge.c`` and ``checksum_triton`` give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lorahub.lazy import torch

__all__ = ["COLUMNS", "ROWS", "STEP", "checksum_weights", "checksums", "flat"]

COLUMNS = 64
"""Words of a row.  Measured: rows of 64 are summed at 80 GB/s and columns at 55 GB/s on one core, one product at 15."""

ROWS = 1 << 14
"""Rows of a table; of more there are several tables, whose sums are the digits of a number."""

STEP = 0x5851F42D4C957F2D
"""The base of that number; odd: the multiplier of Knuth's linear congruential generator MMIX."""

_BYTES = 8 * COLUMNS


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """64-bit checksums of the bits of tensors of one device, int64 ``[n]`` there; shapes and strides do not count."""
    found = [_checksum(flat(tensor)) for tensor in tensors]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)


def _checksum(data: torch.Tensor) -> torch.Tensor:
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // _BYTES * _BYTES
    weights = checksum_weights(data.device)
    rows, columns = weights[:ROWS], weights[ROWS:]
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in torch.split(data[:whole].view(torch.int64).view(-1, COLUMNS), ROWS):
        total = total * STEP + (part.sum(1) * rows[: len(part)]).sum() + (part.sum(0) * columns).sum()
    rest = data[whole:]
    return total * STEP + (rest.long() * rows[: len(rest)]).sum() + data.numel() if len(rest) else total


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order, as ``uint8``: a view where that can be."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@cache
def checksum_weights(device: torch.device) -> torch.Tensor:
    """An odd number for each row of the table, then one for each column."""
    generator = torch.Generator().manual_seed(STEP & 0xFFFFFFFF)
    with torch.inference_mode(False):
        numbers = torch.randint(-(1 << 62), 1 << 62, (ROWS + COLUMNS,), generator=generator) * 2 + 1
        return numbers.to(device)
