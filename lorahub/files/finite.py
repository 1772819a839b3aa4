"""Which tensors of a file hold NaN or infinity, found without torch or numpy, at nearly the speed of the disk.

A number is not finite where the bits of its exponent are all set.  Many numbers are looked at in one addition of long
integers: with the exponent's bits turned round, a lane that is zero does not reach its top bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from lorahub.files.header import Header
from lorahub.files.raw import open_regular, read_bytes

__all__ = ["not_finite"]

_PIECE = 1 << 18  # the fastest: longer integers leave the processor's cache


def not_finite(path: str | os.PathLike[str], header: Header) -> list[str]:
    """The names of the tensors in a file that hold NaN or infinity, in the order of the file.

    Integers and packed numbers cannot, and are not read.

    Raises:
        NotFound, AccessDenied, Unavailable: the file cannot be read.
        IntegrityError: it ends before the header says so.
    """
    found: list[str] = []
    with open_regular(Path(path)) as file:
        for name, info in header.tensors.items():
            holds = _TESTS.get(info.dtype)
            if holds is None:
                continue
            start, length = header.span(name)
            pieces = (
                read_bytes(file, at, min(_PIECE, start + length - at)) for at in range(start, start + length, _PIECE)
            )
            if any(map(holds, pieces)):
                found.append(name)
    return found


@cache
def _lanes(width: int, exponent: int, count: int) -> tuple[int, int, int]:
    """For ``count`` numbers of ``width`` bytes: the exponents' bits, all bits but the top ones, the top ones."""
    top = 1 << (8 * width - 1)
    return tuple(int.from_bytes(each.to_bytes(width, "little") * count, "little") for each in (exponent, top - 1, top))  # type: ignore[return-value]  # three of them


def _exponent(width: int, exponent: int) -> Callable[[bytes], bool]:
    def holds(piece: bytes) -> bool:
        bits, below, tops = _lanes(width, exponent, len(piece) // width)
        turned = (int.from_bytes(piece, "little") & bits) ^ bits
        return (turned + below) & tops != tops

    return holds


def _one_code(code: bytes) -> Callable[[bytes], bool]:
    return lambda piece: code in piece


_TESTS: Mapping[str, Callable[[bytes], bool]] = MappingProxyType(
    {
        "F16": _exponent(2, 0x7C00),
        "BF16": _exponent(2, 0x7F80),
        "F32": _exponent(4, 0x7F80_0000),
        "C64": _exponent(4, 0x7F80_0000),
        "F64": _exponent(8, 0x7FF0_0000_0000_0000),
        "F8_E5M2": _exponent(1, 0x7C),
        "F8_E4M3": _exponent(1, 0x7F),  # no infinity, and one NaN of either sign
        "F8_E4M3FNUZ": _one_code(b"\x80"),
        "F8_E5M2FNUZ": _one_code(b"\x80"),
        "F8_E8M0": _one_code(b"\xff"),
    }
)
"""safetensors dtype -> whether some of its numbers in a piece of bytes are not finite."""
