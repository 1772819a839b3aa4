"""Tensors as PyTorch's pickles describe them: storages, which lie outside the pickle, and views into those.

Sizes and offsets only; whether a tensor lies inside its storage is decided here, before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

__all__ = ["DTYPES", "ITEMS", "Storage", "View"]

ITEMS: Mapping[str, int] = MappingProxyType(
    {
        "BFloat16Storage": 2,
        "BoolStorage": 1,
        "ByteStorage": 1,
        "CharStorage": 1,
        "ComplexDoubleStorage": 16,
        "ComplexFloatStorage": 8,
        "DoubleStorage": 8,
        "FloatStorage": 4,
        "HalfStorage": 2,
        "IntStorage": 4,
        "LongStorage": 8,
        "ShortStorage": 2,
        "UntypedStorage": 1,
    }
)
"""Storage class -> bytes of an element."""

DTYPES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz"), 1),
        **dict.fromkeys(("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
        **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
        **dict.fromkeys(("float32", "int32", "uint32"), 4),
        **dict.fromkeys(("complex64", "float64", "int64", "uint64"), 8),
        "complex128": 16,
    }
)
"""torch dtype -> bytes of an element, for tensors that name one of their own."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements that lies outside the pickle: its key, class and number of elements."""

    key: str
    type: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.count * ITEMS[self.type]


@dataclass(frozen=True, slots=True)
class View:
    """One tensor: where it lies in a storage, counted in its elements of ``item`` bytes."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    item: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes when written by itself."""
        return prod(self.size) * self.item

    def fault(self) -> str:
        """Why it does not lie inside its storage, or ""."""
        if len(self.size) != len(self.stride) or min((self.offset, *self.size, *self.stride), default=0) < 0:
            return f"has size {list(self.size)}, stride {list(self.stride)} and offset {self.offset}"
        if 0 in self.size:
            return ""
        last = self.offset + sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
        if (last + 1) * self.item > self.storage.nbytes:
            return f"reaches to byte {(last + 1) * self.item} of a storage of {self.storage.nbytes}"
        if self.nbytes > self.storage.nbytes:
            return f"repeats the elements of its storage: {self.nbytes} bytes from {self.storage.nbytes}"
        return ""
