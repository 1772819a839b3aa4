"""Xet without its servers: ``hf_xet`` keeps chunks in a folder when it is told the address ``local://FOLDER``.

What a client uploaded is found again by its sha256 in the shards that ``hf_xet`` writes there (blocks of 48 bytes: a
file's hash with flags and counts, its segments, perhaps as many checks, perhaps its sha256), and read back through
``hf_xet`` itself.  It knows no repository.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["LocalCas"]

_BLOCK = 48
_CHECKS, _SHA256 = 1 << 31, 1 << 30
_FOREVER = 4_000_000_000  # seconds since 1970: no token of these expires


class LocalCas:
    """A Xet store in ``folder``, which is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    @property
    def url(self) -> str:
        """What a client is told as the store's address."""
        return f"local://{self.folder}"

    def token(self) -> dict[str, Any]:
        """What hf_xet reads when it asks for a token."""
        return {"accessToken": "xet", "exp": _FOREVER, "casUrl": self.url}

    def headers(self) -> dict[str, str]:
        """The same for huggingface_hub, which reads headers."""
        return {
            "X-Xet-Cas-Url": self.url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(_FOREVER),
        }

    def keep(self, data: bytes) -> str:
        """Store a file, while no client is uploading; gives its Xet hash."""
        from hf_xet import XetSession  # type: ignore[import-untyped]  # begins a log file when it is imported

        with XetSession().new_upload_commit(**_access(self.folder)) as commit:
            handle = commit.start_upload_bytes(data, sha256=hashlib.sha256(data).hexdigest())
        return str(handle.result().xet_info.hash)

    def find(self, sha256: str) -> str | None:
        """The Xet hash of the file with that sha256, or None where nobody uploaded it."""
        return next((name for name, digest in self._files() if digest == sha256), None)

    def read(self, xet: str, size: int) -> bytes:
        """A file by its Xet hash, from a copy: hf_xet lets one process into a store, and a client may be in it."""
        from hf_xet import XetFileInfo, XetSession

        with tempfile.TemporaryDirectory() as place:
            copy, target = Path(place) / "cas", Path(place) / "file"
            shutil.copytree(self.folder / "xet" / "xorbs", copy / "xet" / "xorbs")
            with XetSession().new_file_download_group(**_access(copy)) as group:
                group.start_download_file(XetFileInfo(xet, size), str(target))
            return target.read_bytes()

    def _files(self) -> Iterator[tuple[str, str]]:
        """(Xet hash, sha256) of every file in the store."""
        for shard in sorted(self.folder.glob("xet/xorbs/shards/*.mdb")):
            data, at = shard.read_bytes(), _BLOCK
            while data[at : at + 32] != b"\xff" * 32:
                name = _hash(data[at : at + 32])
                flags, segments = (int.from_bytes(data[start : start + 4], "little") for start in (at + 32, at + 36))
                at += _BLOCK * (1 + segments * (2 if flags & _CHECKS else 1))
                if flags & _SHA256:
                    yield name, _hash(data[at : at + 32])
                    at += _BLOCK


def _access(folder: Path) -> dict[str, Any]:
    return {"endpoint": f"local://{folder}", "token": "xet", "token_expiry_unix_secs": _FOREVER}


def _hash(data: bytes) -> str:
    """Four little-endian numbers, as hf_xet writes them in hex."""
    return b"".join(data[start : start + 8][::-1] for start in range(0, 32, 8)).hex()
