"""Whatever bytes are called .npz or .gguf, reading their header gives a sound header or one HeaderError."""

from __future__ import annotations

import io
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.adapter import load, open_header
from lorahub.errors import HeaderError, IntegrityError, LorahubError, UnsupportedFormat
from lorahub.files.containers import parse_weights, read_weights_header
from lorahub.files.header import Header, Limits
from lorahub.files.tensors import FileSource
from lorahub.plugins import load_registry

REGISTRY = load_registry()


def parsed(raw: bytes, name: str, limits: Limits | None = None) -> Header:
    return parse_weights(lambda at, length: raw[at : at + length], len(raw), where=name, limits=limits)


# ---- npz

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
DATA = np.arange(6, dtype="<f4").tobytes()


def npy(text: str | bytes = HEADER, data: bytes = DATA, *, version: int = 1, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + raw + data


def npz(entries: dict[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in ({"a.npy": npy()} if entries is None else entries).items():
            archive.writestr(zipfile.ZipInfo(name), raw, compress_type=method)
    return out.getvalue()


def array(**said: str) -> bytes:
    fields = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2, 3)"} | said
    return npz({"a.npy": npy("{" + ", ".join(f"'{name}': {value}" for name, value in fields.items()) + ", }")})


def patched(raw: bytes, signature: bytes, offset: int, layout: str, *values: int) -> bytes:
    """``raw`` with numbers written behind the last place where a zip record of that signature begins."""
    at = raw.rindex(signature) + offset
    packed = struct.pack(layout, *values)
    return raw[:at] + packed + raw[at + len(packed) :]


GOOD = npz()
END, ENTRY, LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
TWO = npz({"a.npy": npy(), "b.npy": npy()})

NPZ: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "one byte": (b"P", "is none"),
    "zeros": (bytes(100), "is none"),
    "a pickle": (pickle.dumps({"a": 1}), "is none"),
    "the first half of an archive": (GOOD[: len(GOOD) // 2], "cut off"),
    "an archive without its last byte": (GOOD[:-1], "cut off"),
    "an end record alone": (END + bytes(17), "is none"),
    "a table of contents beyond the file": (patched(GOOD, END, 16, "<I", 1 << 30), "claims"),
    "a table of contents larger than the file": (patched(GOOD, END, 12, "<I", 1 << 30), "claims"),
    "more entries than there are": (patched(GOOD, END, 10, "<H", 7), "damaged"),
    "fewer entries than there are": (patched(TWO, END, 10, "<H", 1), "its 1 entries take"),
    "a missing 64-bit end record": (patched(GOOD, END, 10, "<H", 0xFFFF), "64-bit"),
    "another signature in the table of contents": (patched(GOOD, ENTRY, 0, "<I", 0), "damaged"),
    "a name that is too long": (patched(GOOD, ENTRY, 28, "<H", 60_000), "cut off"),
    "an encrypted entry": (patched(GOOD, ENTRY, 8, "<H", 1), "encrypted"),
    "a compressed entry": (npz(method=zipfile.ZIP_DEFLATED), "compressed"),
    "a bomb": (npz({"a.npy": bytes(1 << 20)}, method=zipfile.ZIP_DEFLATED), "compressed"),
    "stored and yet larger": (patched(GOOD, ENTRY, 24, "<I", 1 << 20), "takes"),
    "larger than the file": (patched(GOOD, ENTRY, 20, "<II", 1 << 20, 1 << 20), "reaches into"),
    "64-bit sizes without a field": (patched(GOOD, ENTRY, 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF), "64-bit"),
    "an entry beyond the file": (patched(GOOD, ENTRY, 42, "<I", 1 << 30), "belong to none"),
    "an entry that begins elsewhere": (patched(GOOD, ENTRY, 42, "<I", 3), "not where"),
    "overlapping entries": (patched(TWO, ENTRY, 42, "<I", 0), "overlaps"),
    "a compressed local header": (patched(GOOD, LOCAL, 8, "<H", 8), "another in its own header"),
    "another name in the local header": (GOOD.replace(b"a.npy", b"b.npy", 1), "another in its own header"),
    "a PyTorch archive": (npz({"archive/data.pkl": pickle.dumps([])}), "no array"),
    "a folder": (npz({"a/": b""}), "no array"),
    "a traversal name": (npz({"../../a.npy": npy()}), "leaves its folder"),
    "an absolute name": (npz({"/etc/a.npy": npy()}), "leaves its folder"),
    "a nameless array": (npz({".npy": npy()}), "is empty"),
    "a name of control characters": (npz({"a\x07.npy": npy()}), "cannot be printed"),
    "no array at all": (npz({"a.npy": b"hello, world"}), "no numpy array"),
    "an empty array file": (npz({"a.npy": b""}), "no numpy array"),
    "a version from the future": (npz({"a.npy": npy(version=9)}), "version 9"),
    "a header longer than the entry": (npz({"a.npy": npy(length=60_000)}), "claims a header"),
    "a header of four gigabytes": (npz({"a.npy": npy(version=2, length=1 << 31)}), "claims a header"),
    "a header of nested brackets": (npz({"a.npy": npy("(" * 9000)}), "does not write"),
    "a header that is code": (npz({"a.npy": npy("__import__('os').system('true')")}), "does not write"),
    "a header without a shape": (npz({"a.npy": npy("{'descr': '<f4', 'fortran_order': False, }")}), "does not write"),
    "objects": (array(descr="'|O'"), "pickle"),
    "a structured dtype": (array(descr="[('a', '<f4'), ('b', '<i8')]"), "no weights have"),
    "a structured dtype with objects": (array(descr="[('a', '|O')]"), "pickle"),
    "text": (array(descr="'<U4'"), "no weights have"),
    "dates": (array(descr="'<M8[s]'"), "no weights have"),
    "big-endian": (array(descr="'>f4'"), "big-endian"),
    "a shape of another size": (array(shape="(2, 4)"), "takes 32 bytes"),
    "a negative size": (array(shape="(-1, 3)"), "does not write"),
    "a size of a hundred digits": (array(shape=f"({'9' * 100},)"), "shape"),
    "a shape that overflows": (array(shape="(4294967296, 4294967296)"), "too large to count"),
    "a zero beside what overflows": (array(shape="(0, 4294967296, 4294967296)"), "too large to count"),
    "forty dimensions": (array(shape=f"({'1, ' * 40})"), "shape"),
    "an archive behind other bytes": (b"#!/bin/sh\n" * 20 + GOOD, "damaged"),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_malformed_npz_is_one_error_with_its_reason_and_a_remedy(name: str) -> None:
    raw, reason = NPZ[name]
    with pytest.raises(HeaderError, match=reason) as caught:
        parsed(raw, "adapters.npz")
    assert caught.value.hint
    assert "adapters.npz" in caught.value.message


def test_the_good_npz_that_the_others_are_made_from_is_read() -> None:
    info = parsed(GOOD, "adapters.npz").tensors["a"]
    assert (info.dtype, info.shape, GOOD[info.start : info.stop]) == ("F32", (2, 3), DATA)


def test_two_arrays_of_one_name_are_refused(recwarn: pytest.WarningsRecorder) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", npy())
        archive.writestr("b.npy", npy())
    raw = out.getvalue().replace(b"b.npy", b"a.npy")
    with pytest.raises(HeaderError, match="twice"):
        parsed(raw, "adapters.npz")


# ---- gguf


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int = 8, value: bytes | None = None) -> bytes:
    return text(key) + struct.pack("<I", kind) + (text("v") if value is None else value)


def tensor(
    name: str | bytes = "a", shape: tuple[int, ...] = (3, 2), kind: int = 0, start: int = 0, *, dims: int | None = None
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, start)


def gguf(
    *tensors: bytes,
    pairs: tuple[bytes, ...] = (pair("general.type"),),
    data: bytes = DATA + bytes(8),
    counts: tuple[int, int] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    listed = tensors or (tensor(),)
    header = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(listed), len(pairs))))
    header += b"".join((*pairs, *listed))
    return header + bytes(-len(header) % alignment) + data


PLAIN = gguf()
HUGE = 1 << 62

GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "three bytes": (b"GGU", "not with GGUF"),
    "the magic alone": (b"GGUF", "cut off"),
    "a version alone": (PLAIN[:8], "cut off"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}", "not with GGUF"),
    "ggla": (b"algg" + bytes(100), "ggla"),
    "ggla as the notes spell it": (b"ggla" + bytes(100), "ggla"),
    "version 1": (gguf(version=1), "version 1"),
    "version 4": (gguf(version=4), "version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "tensors without end": (gguf(counts=(HUGE, 1)), "claims"),
    "tensors up to the limit that are not there": (gguf(counts=(100_000, 1)), "is empty"),
    "keys without end": (gguf(counts=(1, HUGE)), "claims"),
    "keys up to the limit that are not there": (gguf(counts=(1, 65_536)), "a key claims"),
    "a key longer than the file": (gguf(pairs=(struct.pack("<Q", HUGE) + b"k",)), "characters"),
    "a key of a gigabyte": (gguf(pairs=(struct.pack("<Q", 1 << 30),)), "characters"),
    "a nameless key": (gguf(pairs=(pair(""),)), "printed"),
    "a key of control characters": (gguf(pairs=(pair("a\n"),)), "printed"),
    "a key that is no UTF-8": (gguf(pairs=(pair(b"\xff\xfe"),)), "UTF-8"),
    "one key twice": (gguf(pairs=(pair("k"), pair("k"))), "twice"),
    "a type that is none": (gguf(pairs=(pair("k", 99),)), "type 99"),
    "a value longer than the file": (gguf(pairs=(pair("k", 8, struct.pack("<Q", HUGE)),)), "characters"),
    "a value that is no UTF-8": (gguf(pairs=(pair("k", 8, text(b"\xff")),)), "UTF-8"),
    "numbers without end": (gguf(pairs=(pair("k", 9, struct.pack("<IQ", 4, HUGE)),)), "cut off"),
    "as many numbers as fit no header": (gguf(pairs=(pair("k", 9, struct.pack("<IQ", 0, 1 << 33)),)), "cut off"),
    "strings without end": (gguf(pairs=(pair("k", 9, struct.pack("<IQ", 8, HUGE)),)), "claims"),
    "strings up to the limit that are not there": (
        gguf(pairs=(pair("k", 9, struct.pack("<IQ", 8, 1_999_999)),)),
        "cut off",
    ),
    "strings that overflow together": (
        gguf(pairs=(pair("k", 9, struct.pack("<IQ", 8, 2) + text("a") + struct.pack("<Q", HUGE)),)),
        "cut off",
    ),
    "an array of arrays": (gguf(pairs=(pair("k", 9, struct.pack("<IQIQ", 9, 1, 9, 1)),)), "array of type 9"),
    "an array of nothing known": (gguf(pairs=(pair("k", 9, struct.pack("<IQ", 77, 1)),)), "array of type 77"),
    "an alignment of 0": (gguf(pairs=(pair("general.alignment", 4, struct.pack("<I", 0)),)), "power of two"),
    "an alignment of 3": (gguf(pairs=(pair("general.alignment", 4, struct.pack("<I", 3)),)), "power of two"),
    "an alignment of 2**31": (gguf(pairs=(pair("general.alignment", 4, struct.pack("<I", 1 << 31)),)), "power of two"),
    "an alignment that is text": (gguf(pairs=(pair("general.alignment", 8, text("a")),)), "power of two"),
    "a tensor's name longer than the file": (gguf(struct.pack("<Q", HUGE)), "characters"),
    "a nameless tensor": (gguf(tensor("")), "is empty"),
    "a traversal name": (gguf(tensor("../../etc/passwd")), "leaves its folder"),
    "a name of control characters": (gguf(tensor("a\0b")), "cannot be printed"),
    "a name that is no UTF-8": (gguf(tensor(b"\xff")), "UTF-8"),
    "a name of 2000 characters": (gguf(tensor("a" * 2000)), "characters"),
    "one tensor twice": (gguf(tensor("a"), tensor("a", start=32)), "twice"),
    "five dimensions": (gguf(tensor(shape=(1, 1, 1, 2, 3))), "dimensions"),
    "four billion dimensions": (gguf(tensor(dims=2**32 - 1)), "dimensions"),
    "a shape that overflows": (gguf(tensor(shape=(1 << 40, 1 << 40))), "too large to count"),
    "a zero beside what overflows": (gguf(tensor(shape=(0, 1 << 40, 1 << 40))), "too large to count"),
    "a shape larger than the file": (gguf(tensor(shape=(1 << 20, 1 << 20))), "cut off"),
    "a type from the future": (gguf(tensor(kind=4096)), "type 4096"),
    "a type that ggml removed": (gguf(tensor(kind=4)), "type 4"),
    "half a block": (gguf(tensor(shape=(33, 2), kind=8)), "whole blocks"),
    "a block of no dimension": (gguf(tensor(shape=(), kind=8)), "whole blocks"),
    "an offset that is not aligned": (gguf(tensor(start=4)), "multiple"),
    "an offset beyond the file": (gguf(tensor(start=1 << 40)), "hole"),
    "overlapping tensors": (gguf(tensor("a"), tensor("b")), "overlaps"),
    "a hole": (gguf(tensor("a"), tensor("b", start=96), data=bytes(160)), "hole"),
    "data cut off": (PLAIN[:-20], "cut off"),
    "no data at all": (gguf(data=b""), "cut off"),
    "data behind the last tensor": (gguf(data=bytes(4096)), "belong to none"),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_malformed_gguf_is_one_error_with_its_reason_and_a_remedy(name: str) -> None:
    raw, reason = GGUF[name]
    with pytest.raises(HeaderError, match=reason) as caught:
        parsed(raw, "adapter.gguf")
    assert caught.value.hint
    assert "adapter.gguf" in caught.value.message


def test_the_good_gguf_that_the_others_are_made_from_is_read() -> None:
    header = parsed(PLAIN, "adapter.gguf")
    start, length = header.span("a")
    assert (header.tensors["a"].shape, PLAIN[start : start + length]) == ((2, 3), DATA)
    assert header.metadata == {"general.type": "v"}


def test_metadata_over_the_limit_are_refused() -> None:
    raw = gguf(pairs=tuple(pair(f"k{at}", 8, text("x" * 1000)) for at in range(20)))
    with pytest.raises(HeaderError, match="keys and values"):
        parsed(raw, "a.gguf", Limits(metadata=10_000))


def test_more_tensors_than_the_limit_are_refused() -> None:
    with pytest.raises(HeaderError, match="more than 1"):
        parsed(npz({"a.npy": npy(), "b.npy": npy()}), "a.npz", Limits(tensors=1))
    with pytest.raises(HeaderError, match="more than 1"):
        parsed(gguf(tensor("a"), tensor("b", start=32), data=bytes(64)), "a.gguf", Limits(tensors=1))


# ---- both


@pytest.mark.parametrize("name", [*NPZ, *GGUF])
def test_no_malformed_file_takes_memory_that_it_does_not_have(name: str) -> None:
    raw, where = (NPZ[name][0], "a.npz") if name in NPZ else (GGUF[name][0], "a.gguf")
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            parsed(raw, where)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (4 << 20)


@settings(max_examples=200)
@given(
    source=st.sampled_from([(TWO, "a.npz"), (PLAIN, "a.gguf")]),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    keep=st.integers(0, 10_000),
)
def test_a_damaged_file_is_an_error_or_lies_within_itself(
    source: tuple[bytes, str], flips: list[tuple[int, int]], keep: int
) -> None:
    raw, name = bytearray(source[0]), source[1]
    for at, value in flips:
        raw[at % len(raw)] = value
    whole = bytes(raw[: max(1, keep % (len(raw) + 1))] if keep % 3 == 0 else raw)
    try:
        header = parsed(whole, name)
    except HeaderError:
        return
    spans = sorted(header.span(key) for key in header.tensors)
    assert all(start + length <= len(whole) for start, length in spans)
    assert all(one[0] + one[1] <= other[0] for one, other in pairwise(spans))


@settings(max_examples=100)
@given(raw=st.binary(max_size=300), name=st.sampled_from(["a.npz", "a.gguf"]), magic=st.booleans())
def test_noise_is_an_error(raw: bytes, name: str, magic: bool) -> None:
    start = {"a.npz": LOCAL, "a.gguf": b"GGUF\x03\0\0\0"}[name] if magic else b""
    try:
        header = parsed(start + raw, name)
    except HeaderError:
        return
    assert header.size == len(start + raw)


def adapters() -> dict[str, bytes]:
    """Small whole adapters, by the name of their file."""
    down, up = np.ones((2, 4), dtype="<f4"), np.ones((3, 2), dtype="<f4")
    turned = {"q.lora_a": np.ones((4, 2), dtype="<f4"), "q.lora_b": np.ones((2, 3), dtype="<f4")}
    out = io.BytesIO()
    np.savez(out, **turned)
    said = (pair("general.architecture", 8, text("llama")), pair("general.type", 8, text("adapter")))
    alpha = pair("adapter.lora.alpha", 6, struct.pack("<f", 4.0))
    name = "blk.0.attn_v.weight"
    listed = (tensor(f"{name}.lora_a", (4, 2)), tensor(f"{name}.lora_b", (2, 3), start=32))
    data = down.tobytes() + up.tobytes() + bytes(8)
    return {"adapters.npz": out.getvalue(), "a.gguf": gguf(*listed, pairs=(*said, alpha), data=data)}


ADAPTERS = adapters()


@settings(max_examples=150)
@given(
    name=st.sampled_from([*ADAPTERS]),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
)
def test_a_damaged_adapter_is_read_or_refused_by_a_typed_error(name: str, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(ADAPTERS[name])
    for at, value in flips:
        raw[at % len(raw)] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(raw)
        try:
            header = open_header(folder, REGISTRY)
            load(header, REGISTRY)
        except LorahubError:
            return
        assert header.format == {"adapters.npz": "mlx", "a.gguf": "gguf"}[name]


@pytest.mark.parametrize(("suffix", "raw"), [(".npz", TWO), (".gguf", PLAIN)])
def test_a_file_that_is_cut_after_its_header_was_read_is_an_error(tmp_path: Path, suffix: str, raw: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw)
    with FileSource(path) as source:
        start, _ = source.header.span("a")
        with path.open("r+b") as file:
            file.truncate(start + 3)
        with pytest.raises(IntegrityError, match="ends at byte"):
            source.read("a")


def test_a_quantised_type_that_float32_cannot_hold_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(tensor(shape=(256, 1), kind=12), data=bytes(160)))
    assert read_weights_header(path).tensors["a"].dtype == "Q4_K"
    with FileSource(path) as source, pytest.raises(UnsupportedFormat, match="Q4_K"):
        source.read("a")
