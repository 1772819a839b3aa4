"""Writing past the page cache: the same bytes on every alignment, and on systems that do without."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from lorahub.files.direct import BLOCK, Direct
from lorahub.files.writer import StreamWriter

SIZE = 3 * BLOCK + (1 << 17)


def _memory(phase: int, nbytes: int) -> memoryview:
    """Random bytes that begin at ``phase`` within a block (a mapping begins at 0)."""
    mapping = mmap.mmap(-1, nbytes + BLOCK)
    mapping[phase : phase + nbytes] = os.urandom(nbytes)
    return memoryview(mapping)[phase : phase + nbytes]


def _write(path: Path, offset: int, data: memoryview | bytes) -> None:
    with path.open("x+b", buffering=0) as file:
        file.write(b"x" * (offset + len(data) + 5))
        direct = Direct(file, path)
        direct.write(offset, data)
        direct.close()
        direct.close()


@pytest.mark.parametrize("offset", [0, 1, 8, BLOCK - 1, BLOCK, BLOCK + 8, 3 * BLOCK + 100])
@pytest.mark.parametrize("nbytes", [0, 1, BLOCK, SIZE, SIZE + 7])
@pytest.mark.parametrize("shift", [0, 8])
def test_bytes_arrive_where_they_belong_and_their_neighbours_stay(tmp_path, offset, nbytes, shift):
    data = _memory((offset + shift) % BLOCK, nbytes)
    _write(tmp_path / "f", offset, data)
    assert (tmp_path / "f").read_bytes() == b"x" * offset + bytes(data) + b"x" * 5


def test_memory_that_may_not_be_changed_is_written_too(tmp_path):
    data = os.urandom(SIZE)
    _write(tmp_path / "f", 8, data)
    assert (tmp_path / "f").read_bytes()[8:-5] == data


def test_whole_blocks_go_past_the_cache_where_the_file_system_can(tmp_path, monkeypatch):
    lengths, real = [], os.pwrite

    def spy(handle, data, offset):
        lengths.append(len(data))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", spy)
    _write(tmp_path / "f", 100, _memory(100, SIZE))
    whole = (100 + SIZE) // BLOCK * BLOCK - BLOCK
    assert lengths in ([SIZE], [whole, BLOCK - 100, SIZE - whole - BLOCK + 100])  # all, or whole blocks first


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_will_not_gets_the_bytes_the_usual_way(tmp_path, monkeypatch, number):
    real, refused = os.pwrite, []

    def pwrite(handle, data, offset):
        if len(data) >= 1 << 16 and not refused:
            refused.append(offset)
            raise OSError(number, "no")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = _memory(100, SIZE)
    _write(tmp_path / "f", 100, data)
    assert refused
    assert (tmp_path / "f").read_bytes()[100:-5] == bytes(data)


def test_a_write_that_stops_half_way_goes_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[: max(len(data) // 2, 1)], offset))
    data = _memory(100, SIZE)
    _write(tmp_path / "f", 100, data)
    assert (tmp_path / "f").read_bytes()[100:-5] == bytes(data)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def pwrite(handle, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (tmp_path / "f").open("x+b", buffering=0) as file:
        direct = Direct(file, tmp_path / "f")
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space"):
            direct.write(0, _memory(0, SIZE))
        direct.close()


@pytest.mark.parametrize("without", ["O_DIRECT", "pwrite", "copy_file_range", "posix_fallocate"])
def test_a_system_without_a_call_writes_the_same_file(tmp_path, monkeypatch, without):
    (tmp_path / "source").write_bytes(os.urandom(200_000))
    entries = {"a": ("U8", [SIZE]), "b": ("U8", [100_000])}
    data = _memory(0, SIZE)

    def write(path: Path) -> bytes:
        with StreamWriter(path, entries) as out:
            out.write("a", 0, data)
            out.copy_from("b", tmp_path / "source", 77, 100_000)
            return out.commit().read_bytes()

    expected = write(tmp_path / "one")
    monkeypatch.delattr(os, without, raising=False)
    assert write(tmp_path / "other") == expected


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_kernel_that_will_not_copy_between_these_files_leaves_it_to_us(tmp_path, monkeypatch, number):
    source = os.urandom(200_000)
    (tmp_path / "source").write_bytes(source)

    def refuse(*args):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    with StreamWriter(tmp_path / "out", {"b": ("U8", [100_000])}) as out:
        out.copy_from("b", tmp_path / "source", 77, 100_000)
        assert out.commit().read_bytes()[-100_000:] == source[77:100_077]
