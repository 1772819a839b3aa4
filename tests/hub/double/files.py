"""Files and commits: their content, git's names for them, and what goes beside git."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Self

__all__ = ["Commit", "File", "git_id", "is_lfs"]

_LFS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5", ".npy", ".npz", ".zip"}
    | {".model", ".pkl", ".pickle", ".gz"}
)
_LARGE = 10_000_000


def git_id(data: bytes) -> str:
    """git's name for a blob of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether a file of that name, size and beginning is kept beside git."""
    return bool(size) and (PurePosixPath(path).suffix in _LFS or size > _LARGE or b"\0" in sample[:512])


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a commit.

    Attributes:
        data: the content.
        lfs: kept beside git, so that listings name its sha256, and git's id is that of a pointer.
        xet: its hash in the Xet store, or None.
    """

    data: bytes = field(repr=False)
    sha256: str
    lfs: bool
    xet: str | None = None

    @classmethod
    def of(cls, path: str, data: bytes, *, lfs: bool | None = None, xet: str | None = None) -> Self:
        """A file with that content; whether it goes to LFS follows from its name and size."""
        lfs = is_lfs(path, len(data), data) if lfs is None else lfs
        return cls(data=data, sha256=hashlib.sha256(data).hexdigest(), lfs=lfs, xet=xet)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """git's id."""
        return git_id(self.pointer if self.lfs else self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit: the whole tree, and what came before."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, File] = field(repr=False)
