"""NaN and infinity are found in every floating-point dtype, at every place, and nowhere else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from lorahub.files.finite import not_finite
from lorahub.files.header import read_header

# dtype -> (bytes of a number, the largest that is finite, what is not finite), little-endian
NUMBERS = {
    "F16": (2, 0x7BFF, [0x7C00, 0xFC00, 0x7E00, 0x7C01]),
    "BF16": (2, 0x7F7F, [0x7F80, 0xFF80, 0x7FC0, 0xFF81]),
    "F32": (4, 0x7F7FFFFF, [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]),
    "F64": (8, 0x7FEFFFFFFFFFFFFF, [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000]),
    "F8_E5M2": (1, 0x7B, [0x7C, 0xFC, 0x7F]),
    "F8_E4M3": (1, 0x7E, [0x7F, 0xFF]),
    "F8_E4M3FNUZ": (1, 0x7F, [0x80]),
    "F8_E5M2FNUZ": (1, 0x7F, [0x80]),
    "F8_E8M0": (1, 0xFE, [0xFF]),
}
COUNT = 300_000  # more than one piece, and the last one is not whole


def write(path: Path, dtype: str, numbers: bytearray, width: int) -> Path:
    header = {"a": {"dtype": dtype, "shape": [len(numbers) // width], "data_offsets": [0, len(numbers)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


@pytest.mark.parametrize("dtype", NUMBERS)
def test_what_is_not_finite_is_found_wherever_it_is(tmp_path, dtype):
    width, largest, wrong = NUMBERS[dtype]
    for signed in (0, 1 << (8 * width - 1)):
        bits = largest if dtype.endswith(("FNUZ", "E8M0")) else largest | signed
        numbers = bytearray(bits.to_bytes(width, "little") * COUNT)
        path = write(tmp_path / "x.safetensors", dtype, numbers, width)
        assert not_finite(path, read_header(path)) == []
        for at in (0, COUNT // 2, COUNT - 1):
            for spoilt in wrong:
                copy = bytearray(numbers)
                copy[at * width : (at + 1) * width] = spoilt.to_bytes(width, "little")
                path = write(tmp_path / "x.safetensors", dtype, copy, width)
                assert not_finite(path, read_header(path)) == ["a"], (at, hex(spoilt))


def test_integers_are_never_wrong(tmp_path):
    path = write(tmp_path / "x.safetensors", "I32", bytearray(b"\xff" * 400), 4)
    assert not_finite(path, read_header(path)) == []
