"""Reading well-formed headers, from files and in ranges; malformed ones are in tests/hostile."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorahub.errors import HeaderError, NotFound
from lorahub.files.header import Header, Limits, TensorInfo, parse_header, read_header


def blob(header, data=b"", pad=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += pad
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def parse(content, **options):
    return parse_header(lambda offset, length: content[offset : offset + length], len(content), where="it", **options)


def test_a_file_of_the_reference_writer_reads_as_its_reader_reads_it(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "b.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "a.weight": torch.ones(4),
        "scalar": torch.tensor(1, dtype=torch.int8),
        "empty": torch.zeros(0, 5),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "ünïcode\n"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "ünïcode\n"}
    assert header.size == path.stat().st_size
    content = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert set(header.tensors) == set(reference.keys())
        for name, info in header.tensors.items():
            there = reference.get_slice(name)
            assert (info.dtype, list(info.shape)) == (there.get_dtype(), there.get_shape())
            offset, length = header.span(name)
            raw = tensors[name].contiguous().view(-1).view(torch.uint8)
            assert content[offset : offset + length] == bytes(raw.tolist())


def test_tensors_come_in_the_order_of_their_bytes():
    header = parse(blob({"late": entry("U8", [1], 2, 3), "early": entry("U8", [2], 0, 2)}, b"abc"))
    assert list(header.tensors.items()) == [
        ("early", TensorInfo("U8", (2,), 0, 2)),
        ("late", TensorInfo("U8", (1,), 2, 3)),
    ]


def test_an_empty_tensor_may_lie_between_two_others():
    tensors = {"a": entry("F32", [1], 0, 4), "none": entry("F32", [0, 9], 4, 4), "b": entry("F32", [1], 4, 8)}
    assert list(parse(blob(tensors, bytes(8))).tensors) == ["a", "none", "b"]


def test_a_file_without_tensors_parses():
    header = parse(blob({}))
    assert (dict(header.tensors), dict(header.metadata), header.data_start, header.size) == ({}, {}, 10, 10)


@pytest.mark.parametrize("pad", [b"", b" ", b"  \n\t"])
def test_the_length_of_a_header_need_not_be_a_multiple_of_eight(pad):
    content = blob({"a": entry("U8", [1], 0, 1)}, b"x", pad)
    header = parse(content)
    assert content[header.data_start :] == b"x"


def test_metadata_may_stand_anywhere_and_hold_any_text():
    text = '{"a":{"shape":[1],"data_offsets":[0,1],"dtype":"U8"},"__metadata__":{"{\\"[":"]}\\u0000\\ud83d\\ude00"}}'
    assert parse(blob(text.encode(), b"x")).metadata == {'{"[': "]}\0😀"}


def test_metadata_may_be_null_as_mlx_writes_it():
    header = parse(blob({"__metadata__": None, "a": entry("U8", [1], 0, 1)}, b"x"))
    assert (dict(header.metadata), list(header.tensors)) == ({}, ["a"])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight",
        "unet:0:up",
        "<s1>",
        "down_blocks.0/attn.1",
        "weight with a blank",
        "a..b",
        "层.权重",
        "onnx::MatMul_12",
    ],
)
def test_names_that_the_field_uses_are_accepted(name):
    assert list(parse(blob({name: entry("U8", [1], 0, 1)}, b"x")).tensors) == [name]


def test_a_short_header_takes_one_ranged_read_and_a_long_one_two():
    def reads(content):
        asked = []

        def read(offset, length):
            asked.append((offset, length))
            return content[offset : offset + length]

        parse_header(read, len(content), where="it")
        return asked

    short = blob({"a": entry("U8", [200_000], 0, 200_000)}, bytes(200_000))
    assert reads(short) == [(0, 64 << 10)]
    many = {f"tensor.{number:05}": entry("U8", [1], number, number + 1) for number in range(2000)}
    long = blob(many, bytes(2000))
    length = int.from_bytes(long[:8], "little")
    assert length > 64 << 10
    assert reads(long) == [(0, 64 << 10), (64 << 10, length + 8 - (64 << 10))]


def test_an_error_of_the_reader_passes_through():
    def read(offset, length):
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        parse_header(read, 100, where="it")


@pytest.mark.parametrize("came", [b"", b"x" * 99, b"x" * 101])
def test_a_reader_that_gives_another_length_than_asked_is_not_believed(came):
    with pytest.raises(HeaderError, match="100 bytes were asked for"):
        parse_header(lambda offset, length: came, 100, where="it")


def test_limits_can_be_raised_and_lowered():
    content = blob({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 1, 2), "__metadata__": {"k": "v"}}, b"xy")
    assert len(parse(content).tensors) == 2
    for limits in (Limits(header=50), Limits(tensors=1), Limits(metadata=1), Limits(name=0)):
        with pytest.raises(HeaderError):
            parse(content, limits=limits)
    big = blob({"__metadata__": {"k": "v" * (9 << 20)}})
    with pytest.raises(HeaderError, match="over the limit") as caught:
        parse(big)
    assert "Limits(header=" in caught.value.hint
    assert len(parse(big, limits=Limits(header=10 << 20, metadata=10 << 20)).metadata["k"]) == 9 << 20


def test_a_link_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(blob({"a": entry("U8", [1], 0, 1)}, b"x"))
    (tmp_path / "a.safetensors").symlink_to("blob")
    assert list(read_header(tmp_path / "a.safetensors").tensors) == ["a"]


def test_what_is_no_regular_file_is_not_found(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.safetensors")
    places = {
        "folder.safetensors": "is a folder",
        "dangling.safetensors": "link to nothing",
        "absent.safetensors": "does not exist",
        "file/inside.safetensors": "does not exist",
        "pipe.safetensors": "not a regular file",
    }
    for name, reason in places.items():
        with pytest.raises(NotFound, match=reason):
            read_header(tmp_path / name)


def test_a_header_cannot_be_changed():
    header = parse(blob({"a": entry("U8", [1], 0, 1)}, b"x"))
    assert isinstance(header, Header)
    with pytest.raises(TypeError):
        header.tensors["b"] = header.tensors["a"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        header.size = 0  # type: ignore[misc]


def test_the_error_says_where_and_what_now_and_survives_pickling(tmp_path):
    path = tmp_path / "pointer.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.message == f"{path}: this is a Git LFS pointer, not the file itself"
    assert copy.hint == "git lfs pull"
    assert copy.exit_code == 5


def test_headers_digests_and_indices_are_read_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import lorahub.files.header, lorahub.files.digest, lorahub.files.shards, lorahub.files.atomic
import lorahub.files.writer, lorahub.files.tensors
assert sys.modules["torch"] is None and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
