"""The deterministic writer: its bytes, its pieces, its refusals, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lorahub.errors import IntegrityError, NotFound, UnsupportedFormat, UsageError, WriteFailed
from lorahub.files import raw
from lorahub.files.atomic import is_partial
from lorahub.files.dtypes import DTYPES, stored_shape, to_torch
from lorahub.files.header import Limits, read_header
from lorahub.files.tensors import FileSource, tensor_bytes
from lorahub.files.writer import StreamWriter, encode_header, save_file, usual_order

GENERATOR = torch.Generator().manual_seed(11)
WITH_TORCH = [code for code, dtype in DTYPES.items() if dtype.torch]


def random_bits(dtype, *shape):
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=GENERATOR).view(dtype)


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


# save_file


@pytest.mark.parametrize("code", WITH_TORCH)
def test_the_reference_reads_back_every_dtype_that_torch_has(code, tmp_path):
    tensor = random_bits(to_torch(code), 3, 4)
    path = save_file(tmp_path / "t.safetensors", {"t": tensor})
    read = reference.load_file(path)["t"]
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_the_bytes_are_those_of_the_reference_writer(tmp_path):
    tensors = {f"{code}.{number}": random_bits(to_torch(code), number, 3) for code in WITH_TORCH for number in (2, 1)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), 'quote"ü😀': torch.ones(1)}
    metadata = {"for\tmat\x7f": 'pt\n"\\\x01ü😀/'}
    reference.save_file(tensors, tmp_path / "theirs", metadata=metadata)
    save_file(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_order_of_the_input_does_not_show_in_the_bytes(tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int8), "c": torch.ones(1, dtype=torch.float64)}
    metadata = {"z": "1", "a": "2", "m": "3"}
    save_file(tmp_path / "one", tensors, metadata)
    save_file(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_any_strides_and_shared_memory_are_written_as_they_read(tmp_path):
    base = torch.randn(6, 4, generator=GENERATOR)
    tensors = {"whole": base, "transposed": base.T, "rows": base[1:3], "expanded": base[:1].expand(3, 4)}
    read = reference.load_file(save_file(tmp_path / "t.safetensors", tensors))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_wide_elements_come_first_so_that_all_are_aligned(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.ones(3).half(),
    }
    header = read_header(save_file(tmp_path / "t.safetensors", tensors))
    assert list(header.tensors) == ["b", "c", "a"]
    for name, info in header.tensors.items():
        assert header.span(name)[0] % (DTYPES[info.dtype].bits // 8) == 0


def test_an_unwritable_tensor_leaves_nothing_behind(tmp_path):
    for tensor in (torch.ones(2, dtype=torch.complex128), torch.ones(2, device="meta")):
        with pytest.raises(UnsupportedFormat):
            save_file(tmp_path / "t.safetensors", {"good": torch.ones(1), "bad": tensor})
    assert names_in(tmp_path) == []


# encode_header

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=8)
ENTRIES = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(WITH_TORCH), st.lists(st.integers(0, 4), min_size=1, max_size=3)), max_size=5
)


@settings(max_examples=100, deadline=None)
@given(
    ENTRIES, st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8")))
)
def test_the_reference_accepts_any_layout(tmp_path_factory, entries, metadata):
    entries = {
        name: (code, stored_shape(code, shape)) for name, (code, shape) in entries.items() if name != "__metadata__"
    }
    path = tmp_path_factory.mktemp("any") / "t.safetensors"
    encoded = encode_header(entries, metadata)
    assert len(encoded) % 8 == 0
    with StreamWriter(path, entries, metadata) as out:
        assert list(out.header.tensors) == list(entries) or any(not info.nbytes for info in out.header.tensors.values())
        for name, info in out.header.tensors.items():
            out.write(name, 0, bytes(info.nbytes))
        out.commit()
    assert path.read_bytes().startswith(encoded)
    with safe_open(path, "pt") as read:
        assert {name: read.get_slice(name).get_shape() for name in read.keys()} == {  # noqa: SIM118 - not a mapping
            name: list(shape) for name, (_, shape) in entries.items()
        }
        assert (read.metadata() or {}) == metadata


def test_tensors_lie_in_the_order_given():
    assert encode_header({"z": ("U8", [1]), "a": ("F32", (2, 0)), "m": ("F4", [2])}, {"k": "vv", "a": ""}) == (
        b'\xc8\0\0\0\0\0\0\0{"__metadata__":{"a":"","k":"vv"},"z":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"F32","shape":[2,0],"data_offsets":[1,1]},"m":{"dtype":"F4","shape":[2],"data_offsets":[1,2]}}'
        + b" "
        * 7
    )


@pytest.mark.parametrize(
    ("entries", "metadata", "reason"),
    [
        ({"__metadata__": ("U8", [1])}, None, "cannot be named"),
        ({"../a": ("U8", [1])}, None, "leaves its folder"),
        ({"": ("U8", [1])}, None, "is empty"),
        ({"a\nb": ("U8", [1])}, None, "cannot be printed"),
        ({"\ud800": ("U8", [1])}, None, "surrogates not allowed"),
        ({"a": ("U8", [-1])}, None, "cannot have the shape"),
        ({"a": ("U8", [-2, -2])}, None, "cannot have the shape"),
        ({"a": ("U8", [1.0])}, None, "cannot be interpreted as an integer"),
        ({"a": ("U8", [2**62, 4])}, None, "too large"),
        ({}, {"k": 1}, "is not a string"),
        ({}, {"k": "\udfff"}, "surrogates not allowed"),
        ({}, {"k": "v" * (2 << 20)}, "takes more than"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, entries, metadata, reason):
    with pytest.raises(UsageError, match=reason):
        StreamWriter(tmp_path / "t.safetensors", entries, metadata)
    assert names_in(tmp_path) == []


def test_limits_hold_for_writing_too(tmp_path):
    metadata = {"k": "v" * (2 << 20)}
    save_file(tmp_path / "t.safetensors", {}, metadata, limits=Limits(metadata=4 << 20))
    assert read_header(tmp_path / "t.safetensors", Limits(metadata=4 << 20)).metadata == metadata


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UnsupportedFormat, match="F31"):
        encode_header({"a": ("F31", [1])})
    with pytest.raises(UnsupportedFormat, match="F31"):
        encode_header(usual_order({"a": ("F31", [1])}))


# StreamWriter


def test_pieces_may_come_in_any_order_from_many_threads(tmp_path):
    data = random.Random(5).randbytes(10_000)
    pieces = [(start, min(start + 37, 10_000)) for start in range(0, 10_000, 37)]
    random.Random(6).shuffle(pieces)
    path = tmp_path / "t.safetensors"
    with StreamWriter(path, {"a": ("U8", [3]), "b": ("U8", [10_000])}) as out:

        def work(part):
            for start, stop in part:
                out.write("b", start, memoryview(data)[start:stop])

        threads = [threading.Thread(target=work, args=(pieces[number::4],)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out.write("a", 0, b"abc")
        assert not path.exists()
        assert out.commit() == path
    with FileSource(path) as read:
        assert bytes(read.read("b").tolist()) == data
        assert bytes(read.read("a").tolist()) == b"abc"
    assert names_in(tmp_path) == ["t.safetensors"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_file_is_committed_exactly_when_every_byte_was_written(tmp_path_factory, data):
    size = data.draw(st.integers(0, 12))
    ranges = data.draw(
        st.lists(st.integers(0, size).flatmap(lambda start: st.tuples(st.just(start), st.integers(start, size))))
    )
    covered = {byte for start, stop in ranges for byte in range(start, stop)}
    path = tmp_path_factory.mktemp("cover") / "t.safetensors"
    with StreamWriter(path, {"t": ("U8", [size])}) as out:
        for start, stop in ranges:
            out.write("t", start, bytes(range(start, stop)))
        if len(covered) == size:
            out.commit()
            assert path.read_bytes().endswith(bytes(range(size)))
        else:
            with pytest.raises(WriteFailed, match="of 1 tensors 1 are incomplete, 't'"):
                out.commit()
            assert names_in(path.parent) == []


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), StreamWriter(path, {"t": ("U8", [2])}) as out:
        out.write("t", 0, None)
    assert path.read_bytes() == b"old"
    with StreamWriter(path, {"t": ("U8", [2])}) as out:
        out.write("t", 0, b"ab")
    assert path.read_bytes() == b"old", "leaving without commit discards"
    assert names_in(tmp_path) == ["t.safetensors"]
    with StreamWriter(path, {"t": ("U8", [2])}) as out:
        out.write("t", 0, b"ab")
        out.commit()
    assert path.read_bytes().endswith(b"ab")


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "t.safetensors").symlink_to("blob")
    save_file(tmp_path / "t.safetensors", {"t": torch.ones(1)})
    assert (tmp_path / "blob").read_bytes() == b"shared"
    assert not (tmp_path / "t.safetensors").is_symlink()


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_file(tmp_path / "t.safetensors", {})
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bytes_outside_a_tensor_and_unknown_tensors_are_refused(tmp_path):
    with StreamWriter(tmp_path / "t", {"a": ("U8", [4]), "b": ("U8", [4])}) as out:
        for offset, data in [(-1, b"x"), (4, b"x"), (0, b"12345"), (5, b"")]:
            with pytest.raises(UsageError, match="lie outside tensor 'a', which has 4"):
                out.write("a", offset, data)
        with pytest.raises(UsageError, match="without a tensor 'c'"):
            out.write("c", 0, b"")
        out.write("a", 0, b"1234")
        out.write("b", 0, b"5678")
        out.commit()
        for call in (lambda: out.write("a", 0, b"x"), out.commit):
            with pytest.raises(UsageError, match="is finished"):
                call()
    assert (tmp_path / "t").read_bytes().endswith(b"12345678")


def test_a_torch_tensor_can_be_written_row_by_row(tmp_path):
    tensor = torch.randn(4, 3, generator=GENERATOR).bfloat16()
    with StreamWriter(tmp_path / "t", {"t": ("BF16", tensor.shape)}) as out:
        for row in range(4):
            out.write("t", row * 6, tensor_bytes(tensor[row]))
        out.commit()
    with FileSource(tmp_path / "t") as read:
        assert torch.equal(read.read("t"), tensor)


PLATFORMS = [
    "kernel",
    "no kernel copy",
    "refused",
    "other device",
    "copies nothing",
    "copies a little",
    "copies once",
    "moves a little",
    "no positioned io",
]


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """The ways a platform can move bytes."""

    def refuse(number):
        def copy_file_range(*args):
            raise OSError(number, os.strerror(number))

        return copy_file_range

    real = {name: getattr(os, name) for name in ("copy_file_range", "preadv", "pwrite")}
    left = [1000]

    def copy_once(source, target, count, *offsets):
        count, left[0] = min(count, left[0]), 0
        return real["copy_file_range"](source, target, count, *offsets) if count else 0

    match request.param:
        case "copies a little":
            monkeypatch.setattr(
                os,
                "copy_file_range",
                lambda one, two, count, *at: real["copy_file_range"](one, two, min(count, 700), *at),
            )
        case "copies once":
            monkeypatch.setattr(os, "copy_file_range", copy_once)
        case "moves a little":
            monkeypatch.delattr(os, "copy_file_range")
            monkeypatch.setattr(os, "preadv", lambda handle, views, at: real["preadv"](handle, [views[0][:70]], at))
            monkeypatch.setattr(os, "pwrite", lambda handle, view, at: real["pwrite"](handle, view[:60], at))
        case "no kernel copy":
            monkeypatch.delattr(os, "copy_file_range")
        case "refused":
            monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
        case "other device":
            monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
        case "copies nothing":
            monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
        case "no positioned io":
            for name in ("copy_file_range", "preadv", "pread", "pwrite", "posix_fallocate"):
                monkeypatch.delattr(os, name)
    monkeypatch.setattr(raw, "CHUNK", 999)
    return request.param


def test_bytes_move_from_another_file_however_the_platform_does_it(tmp_path, platform):
    data = random.Random(9).randbytes(5000)
    (tmp_path / "source").write_bytes(data)
    with StreamWriter(tmp_path / "t", {"a": ("U8", [4000]), "b": ("U8", [10])}) as out:
        out.copy_from("a", tmp_path / "source", 123, 4000)
        out.copy_from("b", tmp_path / "source", 4995, 5)
        out.copy_from("b", tmp_path / "source", 0, 5, at=5)
        out.commit()
    with FileSource(tmp_path / "t") as read:
        assert bytes(read.read("a").tolist()) == data[123:4123]
        assert bytes(read.read("b").tolist()) == data[-5:] + data[:5]


def test_a_source_that_ends_too_early_is_an_integrity_error(tmp_path, platform):
    (tmp_path / "source").write_bytes(bytes(1500))
    with StreamWriter(tmp_path / "t", {"a": ("U8", [2000])}) as out:
        with pytest.raises(IntegrityError, match=r"ends at byte 1500, and \d+ more were expected"):
            out.copy_from("a", tmp_path / "source", 0, 2000)
        with pytest.raises(NotFound):
            out.copy_from("a", tmp_path / "absent", 0, 2000)
        with pytest.raises(UsageError, match="lie outside"):
            out.copy_from("a", tmp_path / "source", 0, 1500, at=501)
        with pytest.raises(WriteFailed, match="incomplete"):
            out.commit()


# what the system refuses


@pytest.mark.parametrize(
    ("place", "hint"), [("absent/t", "mkdir"), ("file/t", "is a file"), (f"{'n' * 300}/t", "shorter path")]
)
def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path, place, hint):
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="cannot be written") as caught:
        save_file(tmp_path / place, {})
    assert hint in caught.value.hint


def test_a_folder_of_that_name_is_not_replaced(tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(WriteFailed, match="cannot be written") as caught:
        save_file(tmp_path / "t", {})
    assert "folder has this name" in caught.value.hint
    assert names_in(tmp_path) == ["t"]


def failing(number):
    def call(*args):
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_is_noticed_before_the_first_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(WriteFailed, match="No space left") as caught:
        StreamWriter(tmp_path / "t", {"a": ("U8", [1000])})
    assert "free some space" in caught.value.hint
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(tmp_path, monkeypatch, call):
    (tmp_path / "t").write_bytes(b"old")

    def write_all():
        with StreamWriter(tmp_path / "t", {"a": ("U8", [4])}) as out:
            monkeypatch.setattr(os, call, failing(errno.ENOSPC))
            out.write("a", 0, b"1234")
            out.commit()

    with pytest.raises(WriteFailed, match="No space left"):
        write_all()
    assert names_in(tmp_path) == ["t"]
    assert (tmp_path / "t").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_room_is_written_to_all_the_same(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    save_file(tmp_path / "t", {"a": torch.ones(3)})
    assert torch.equal(reference.load_file(tmp_path / "t")["a"], torch.ones(3))


def test_a_limit_on_file_sizes_is_met_at_once(tmp_path):
    code = """
import resource, sys
from lorahub.errors import WriteFailed
from lorahub.files.writer import StreamWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    StreamWriter(sys.argv[1], {"a": ("U8", [2 << 20])})
except WriteFailed as error:
    sys.exit(0 if "ulimit" in error.hint else f"wrong hint: {error}")
sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "t"], check=True, cwd=Path(__file__).parents[2])
    assert names_in(tmp_path) == []


# crashes

CHILD = """
import os, sys
from lorahub.files import atomic
from lorahub.files.writer import StreamWriter

path, stage = sys.argv[1:]

def halt(reached):
    if reached == stage:
        print("here", flush=True)
        sys.stdin.read()  # until killed

def halting(name, call):
    def wrapped(*args):
        halt("before " + name)
        result = call(*args)
        halt("after " + name)
        return result
    return wrapped

os.fsync = halting("fsync", os.fsync)
atomic.Path.replace = halting("rename", atomic.Path.replace)

SIZE, PIECE = 1 << 20, 1 << 16
with StreamWriter(path, {"a": ("U8", [SIZE]), "b": ("U8", [SIZE])}, {"new": "yes"}) as out:
    halt("before any write")
    for start in range(0, SIZE, PIECE):
        out.write("b", SIZE - PIECE - start, b"b" * PIECE)
        if start == SIZE // 2:
            halt("between writes")
    out.write("a", 0, b"a" * SIZE)
    halt("after every write")
    out.commit()
print("done", flush=True)
"""


@pytest.mark.parametrize("old", [None, b"what was there before"], ids=["nothing there", "an older file there"])
@pytest.mark.parametrize(
    ("stage", "whole"),
    [
        ("before any write", False),
        ("between writes", False),
        ("after every write", False),
        ("before fsync", False),
        ("after fsync", False),
        ("before rename", False),
        ("after rename", True),
    ],
)
def test_a_killed_writer_leaves_the_old_state_or_the_new_never_half_a_file(tmp_path, stage, whole, old):
    path = tmp_path / "t.safetensors"
    if old is not None:
        path.write_bytes(old)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path, stage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with child:
        assert child.stdout.readline() == b"here\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    left = [name for name in names_in(tmp_path) if name != path.name]
    assert all(map(is_partial, left))
    if whole:
        assert left == []
        assert read_header(path).metadata == {"new": "yes"}
        content = path.read_bytes()
        assert content[-(2 << 20) :] == b"a" * (1 << 20) + b"b" * (1 << 20)
    else:
        assert len(left) == 1
        assert (path.read_bytes() if path.exists() else None) == old
