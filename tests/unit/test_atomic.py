"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorahub.errors import WriteFailed
from lorahub.files.atomic import atomic_write, flush_folder, is_partial, new_staging, replace_dir


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def failing(number):
    def call(*args):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("data", [b"", b"new", bytearray(b"new"), memoryview(b"new")])
def test_a_written_file_holds_exactly_the_data(tmp_path, data):
    (tmp_path / "a.json").write_bytes(b"something older and longer")
    atomic_write(tmp_path / "a.json", data)
    assert (tmp_path / "a.json").read_bytes() == bytes(data)
    assert names_in(tmp_path) == ["a.json"]


def test_the_content_is_on_disk_before_the_name_is_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync

    def watched(handle):
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().name, (tmp_path / "a").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    atomic_write(tmp_path / "a", b"x")
    (file, named_before), (folder, named_after) = seen
    assert is_partial(file)
    assert not named_before
    assert folder == tmp_path.name
    assert named_after


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(WriteFailed, match="No space left") as caught:
        atomic_write(tmp_path / "a", b"new")
    assert "free some space" in caught.value.hint
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_a_forbidden_or_absent_folder_is_a_write_failure(tmp_path, monkeypatch):
    with pytest.raises(WriteFailed) as caught:
        atomic_write(tmp_path / "absent" / "a", b"")
    assert caught.value.hint == f"make the folder first: mkdir -p {tmp_path / 'absent'}"
    monkeypatch.setattr("lorahub.files.atomic.new_partial", failing(errno.ENOENT))
    with pytest.raises(WriteFailed) as caught:
        atomic_write(tmp_path / "a", b"")
    assert "takes no new files" in caught.value.hint  # as /proc, which is there
    monkeypatch.setattr("lorahub.files.atomic.new_partial", failing(errno.EACCES))
    with pytest.raises(WriteFailed, match="Permission denied") as caught:
        atomic_write(tmp_path / "a", b"")
    assert "permissions" in caught.value.hint


def test_partial_names_are_told_from_real_ones(tmp_path):
    assert is_partial(new_staging(tmp_path / "out").name)
    for name in ("adapter_model.safetensors", ".lorahub-notes", "x.partial", "lorahub.json"):
        assert not is_partial(name)


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_a_finished_folder_takes_a_place_that_is_free(tmp_path, there):
    final = tmp_path / "out"
    if there:
        final.mkdir()
    staging = new_staging(final)
    (staging / "a").write_bytes(b"x")
    replace_dir(staging, final)
    assert names_in(tmp_path) == ["out"]
    assert names_in(final) == ["a"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert final.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_a_finished_folder_takes_no_place_that_is_in_use(tmp_path, kind):
    final = tmp_path / "out"
    if kind == "full":
        final.mkdir()
        (final / "mine").touch()
    elif kind == "file":
        final.write_bytes(b"mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        final.symlink_to("elsewhere")
    staging = new_staging(final)
    (staging / "a").touch()
    before = names_in(tmp_path)
    with pytest.raises(WriteFailed, match="out cannot be written") as caught:
        replace_dir(staging, final)
    assert "name another place" in caught.value.hint
    assert names_in(tmp_path) == before
    assert names_in(staging) == ["a"]


def test_a_staging_folder_without_a_parent_is_a_write_failure(tmp_path):
    with pytest.raises(WriteFailed, match="cannot be written"):
        new_staging(tmp_path / "absent" / "out")
    with pytest.raises(WriteFailed, match="No such file"):
        replace_dir(tmp_path / "absent", tmp_path / "out")


def test_a_file_system_that_cannot_flush_folders_is_accepted_and_a_real_failure_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    flush_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        flush_folder(tmp_path)
