"""The element types a safetensors file can hold: how wide each is, and which torch dtype it is.

A table and look-ups; knows nothing of files.  ``F4`` packs two elements into one torch item, so its stored shape is
twice as wide in the last dimension as the torch shape; the two shape functions say so in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from lorahub.errors import UnsupportedFormat
from lorahub.lazy import torch

__all__ = ["DTYPES", "DType", "from_torch", "nbytes", "stored_shape", "to_torch", "torch_shape"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        bits: width of one element.
        torch: name of the torch dtype, or "" where torch has none (such tensors move as bytes).
        packed: elements in one torch item.
    """

    bits: int
    torch: str
    packed: int = 1


# In the order of the reference implementation, whose writer lays tensors out by it, last to first.
DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "BOOL": DType(8, "bool"),
        "F4": DType(4, "float4_e2m1fn_x2", packed=2),
        "F6_E2M3": DType(6, ""),
        "F6_E3M2": DType(6, ""),
        "U8": DType(8, "uint8"),
        "I8": DType(8, "int8"),
        "F8_E5M2": DType(8, "float8_e5m2"),
        "F8_E4M3": DType(8, "float8_e4m3fn"),
        "F8_E8M0": DType(8, "float8_e8m0fnu"),
        "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
        "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
        "I16": DType(16, "int16"),
        "U16": DType(16, "uint16"),
        "F16": DType(16, "float16"),
        "BF16": DType(16, "bfloat16"),
        "I32": DType(32, "int32"),
        "U32": DType(32, "uint32"),
        "F32": DType(32, "float32"),
        "C64": DType(64, "complex64"),
        "F64": DType(64, "float64"),
        "I64": DType(64, "int64"),
        "U64": DType(64, "uint64"),
    }
)
_CODES = {dtype.torch: code for code, dtype in DTYPES.items() if dtype.torch}


def _look_up(code: str) -> DType:
    try:
        return DTYPES[code]
    except KeyError:
        raise UnsupportedFormat(f"{code!r} is no safetensors dtype", f"known ones: {', '.join(DTYPES)}") from None


def nbytes(code: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this dtype and stored shape takes.

    Raises:
        UnsupportedFormat: the dtype is unknown, or its elements do not fill whole bytes.
    """
    bits = _look_up(code).bits * prod(shape)
    if bits % 8:
        raise UnsupportedFormat(f"{code} {list(shape)} takes {bits} bits, which do not fill whole bytes")
    return bits // 8


def to_torch(code: str) -> torch.dtype:
    """The torch dtype of a code.

    Raises:
        UnsupportedFormat: the code is unknown, or this torch has no such dtype.
    """
    name = _look_up(code).torch
    dtype = getattr(torch, name, None) if name else None
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedFormat(
            f"torch {torch.__version__} has no dtype for {code}",
            "such a tensor can be copied as bytes, not computed with",
        )
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """The code of a torch dtype.

    Raises:
        UnsupportedFormat: safetensors has no such element type.
    """
    name = str(dtype).removeprefix("torch.")
    try:
        return _CODES[name]
    except KeyError:
        raise UnsupportedFormat(
            f"a safetensors file cannot hold {dtype}", "convert the tensor first, for example with .float()"
        ) from None


def torch_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape torch gives a tensor stored with ``shape``.

    Raises:
        UnsupportedFormat: the last dimension does not fill whole torch items.
    """
    return _scaled(code, shape, divide=True)


def stored_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape a file gives a torch tensor of ``shape``.

    Raises:
        UnsupportedFormat: a packed dtype without a last dimension to widen.
    """
    return _scaled(code, shape, divide=False)


def _scaled(code: str, shape: Sequence[int], *, divide: bool) -> tuple[int, ...]:
    packed = _look_up(code).packed
    if packed == 1:
        return tuple(shape)
    if not shape or (divide and shape[-1] % packed):
        raise UnsupportedFormat(f"{code} {list(shape)} has no torch shape: {packed} elements make one torch item")
    return (*shape[:-1], shape[-1] // packed if divide else shape[-1] * packed)
