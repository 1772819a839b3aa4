"""Single numbers that formats keep as tensors, such as ``alpha``: read from the file as they are, without torch.

Knows headers, bytes and element types; not what the numbers are for.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from math import prod

from lorahub.errors import IntegrityError
from lorahub.files.raw import open_regular, read_into
from lorahub.formats.format import AdapterFiles

__all__ = ["read_numbers"]

_CODES: Mapping[str, str] = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
    "BOOL": "<?",
}
"""safetensors dtype -> how ``struct`` calls it; BF16 is the upper half of an F32."""


def read_numbers(files: AdapterFiles, file: str, keys: Collection[str]) -> dict[str, float]:
    """The values of tensors with one element each, in double precision.

    Args:
        files: where they lie; ``files.numbers`` instead of the disk for a file that is named there.
        file: the weights file.
        keys: which tensors.

    Raises:
        IntegrityError: a tensor has several elements, or a dtype that no number has; or the file is cut off.
        NotFound, AccessDenied, Unavailable: the file cannot be read.
    """
    header = files.headers[file]
    for key in keys:
        info = header.tensors[key]
        if prod(info.shape) != 1 or info.dtype not in {*_CODES, "BF16"}:
            raise IntegrityError(
                f"{key} should be a single number, not {info.dtype} {list(info.shape)}",
                "the file is damaged, or of another format: ask its author",
            )
    held = files.numbers.get(file)
    if held is not None:
        return {key: _value(header.tensors[key].dtype, held[key]) for key in keys}
    if not keys:
        return {}
    values = {}
    with open_regular(files.folder / file) as opened:
        for key in keys:
            offset, length = header.span(key)
            buffer = bytearray(length)
            read_into(opened, offset, buffer)
            values[key] = _value(header.tensors[key].dtype, bytes(buffer))
    return values


def _value(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":
        dtype, raw = "F32", b"\0\0" + raw
    (value,) = struct.unpack(_CODES[dtype], raw)
    return float(value)
