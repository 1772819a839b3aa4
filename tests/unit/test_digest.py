"""Digests of files and of the tensors in them."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file as reference_save_file

from lorahub.errors import IntegrityError, NotFound
from lorahub.files import digest
from lorahub.files.digest import data_digest, file_digest, git_blob_sha1, tensors_digest
from lorahub.files.header import read_header
from lorahub.files.writer import StreamWriter, save_file


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 7)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1000])
def test_a_file_digest_is_its_sha256_and_size(tmp_path, size):
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "f").write_bytes(content)
    assert file_digest(tmp_path / "f") == (hashlib.sha256(content).hexdigest(), size)


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(range(256)) * 3])
def test_a_blob_id_is_what_git_computes(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    ran = subprocess.run(
        ["git", "hash-object", "--no-filters", "f"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert git_blob_sha1(tmp_path / "f") == ran.stdout.strip()


def test_what_is_absent_or_a_folder_is_not_found(tmp_path):
    for call in (file_digest, git_blob_sha1):
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(NotFound):
                call(path)


def test_the_digest_of_the_data_forgets_the_header_and_refuses_another_file(tmp_path):
    for name, note in (("a", "x"), ("b", "a longer note")):
        save_file(tmp_path / name, {"w": torch.arange(20.0)}, {"note": note})
    one, other = (read_header(tmp_path / name) for name in "ab")
    expected = hashlib.sha256(torch.arange(20.0).numpy().tobytes()).hexdigest()
    assert data_digest(tmp_path / "a", one) == data_digest(tmp_path / "b", other) == expected
    with pytest.raises(IntegrityError):
        data_digest(tmp_path / "a", other)


def tensors():
    return {"b": torch.arange(5.0), "a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "ü": torch.zeros(0, 2)}


def digest_of(path):
    return tensors_digest(path, read_header(path))


def test_the_digest_of_tensors_is_the_documented_encoding(tmp_path):
    save_file(tmp_path / "t", tensors())
    expected = hashlib.sha256()
    expected.update(b'["a","I16",[2,3],12]\n' + tensors()["a"].numpy().tobytes())
    expected.update(b'["b","F32",[5],20]\n' + tensors()["b"].numpy().tobytes())
    expected.update('["ü","F32",[0,2],0]\n'.encode())
    assert digest_of(tmp_path / "t") == f"sha256:{expected.hexdigest()}"


def test_order_padding_and_metadata_do_not_change_the_digest_of_tensors(tmp_path):
    save_file(tmp_path / "one", tensors())
    reference_save_file(tensors(), tmp_path / "two", metadata={"x": "y", "z": "w"})
    with StreamWriter(tmp_path / "three", {"ü": ("F32", [0, 2]), "a": ("I16", [2, 3]), "b": ("F32", [5])}) as out:
        for name in "ab":
            out.write(name, 0, tensors()[name].numpy().data)
        out.commit()
    assert len({digest_of(tmp_path / name) for name in ("one", "two", "three")}) == 1
    assert len({file_digest(tmp_path / name) for name in ("one", "two", "three")}) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.arange(5.0).neg()},
        {"b": torch.arange(5.0).reshape(5, 1)},
        {"b": torch.arange(5.0).view(torch.int32)},
        {"c": torch.zeros(0)},
        {"ü": torch.zeros(0, 3)},
    ],
    ids=["values", "shape", "dtype", "one more", "shape of an empty one"],
)
def test_any_change_of_tensors_changes_their_digest(tmp_path, other):
    save_file(tmp_path / "one", tensors())
    save_file(tmp_path / "two", tensors() | other)
    assert digest_of(tmp_path / "one") != digest_of(tmp_path / "two")


def test_names_and_bytes_cannot_be_shifted_into_each_other(tmp_path):
    line = b'["b","U8",[0],0]\n'
    save_file(tmp_path / "one", {"a": torch.tensor(list(line), dtype=torch.uint8)})
    save_file(tmp_path / "two", {"a": torch.zeros(0, dtype=torch.uint8), "b": torch.zeros(0, dtype=torch.uint8)})
    assert digest_of(tmp_path / "one") != digest_of(tmp_path / "two")


def test_a_header_of_another_file_is_noticed(tmp_path):
    save_file(tmp_path / "t", tensors())
    header = read_header(tmp_path / "t")
    os.truncate(tmp_path / "t", header.size - 1)
    with pytest.raises(IntegrityError, match="its header was read from"):
        tensors_digest(tmp_path / "t", header)
