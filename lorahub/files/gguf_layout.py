"""Lay out GGUF files: everything in front of the tensors, and where each of them goes.

The counterpart of ``gguf``, without the package of that name.  Knows nothing of adapters but which of their keys are
numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType

from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.files.gguf import ALIGNMENT, DIMS, MAGIC, PLAIN, SCALARS, STRING, WIDTH, padded
from lorahub.files.grammar import show

__all__ = ["encode_gguf"]

_NAME = 63  # characters that ggml keeps of a tensor's name

_WRITTEN: Mapping[str, str] = MappingProxyType(
    {
        "adapter.lora.alpha": "<f",
        "general.base_model.count": "<I",
        "general.file_type": "<I",
        "general.quantization_version": "<I",
        "lorahub.lora.alpha": "<d",
    }
)
"""Keys whose values are written as numbers; all others as strings."""


def encode_gguf(
    entries: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """A file in the making: the header with its padding, where each tensor's bytes begin, and the size of it all.

    Args:
        entries: name -> (safetensors code, shape), in the order the bytes shall lie.
        metadata: key -> value as ``Header.metadata`` has it; ``_WRITTEN`` says which ones are numbers.

    Raises:
        UsageError: a name that ggml would cut, more than four dimensions, or a value that is no number.
        UnsupportedFormat: a dtype that ggml lacks.
    """
    kinds = {code: kind for kind, code in PLAIN.items()}
    out = bytearray()
    out += struct.pack("<4sIQQ", MAGIC, 3, len(entries), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _encoded_value(key, value)
    end = 0
    places = {}
    for name, (code, shape) in entries.items():
        if len(name.encode()) > _NAME or len(shape) > DIMS:
            raise UsageError(f"GGUF cannot hold a tensor named {show(name)} of {len(shape)} dimensions")
        if code not in kinds:
            raise UnsupportedFormat(
                f"a GGUF file cannot hold {code}", "convert the tensor first, for example to float32"
            )
        start = padded(end, ALIGNMENT)
        end = start + WIDTH[code] * prod(shape)
        out += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kinds[code], start)
        places[name] = start
    out += bytes(-len(out) % ALIGNMENT)
    begin = len(out)
    return bytes(out), {name: begin + start for name, start in places.items()}, begin + padded(end, ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encoded_value(key: str, value: str) -> bytes:
    if key not in _WRITTEN:
        return struct.pack("<I", STRING) + _text(value)
    kind = next(kind for kind, layout in SCALARS.items() if layout == _WRITTEN[key])
    try:
        number = json.loads(value)
        return struct.pack("<I", kind) + struct.pack(_WRITTEN[key], number)
    except (ValueError, struct.error, OverflowError):
        raise UsageError(f"{key} is {show(value)}, not a number that GGUF holds there") from None
