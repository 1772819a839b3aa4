"""The index of a checkpoint in several files: which tensor lies in which shard.  No torch, no tensor bytes.

An index comes from the same place as the weights and is trusted as little: shards are plain file names beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from lorahub.errors import HeaderError, IntegrityError, NotFound
from lorahub.files.grammar import Malformed, Scanner, show
from lorahub.files.header import Header, Limits, name_fault, read_header
from lorahub.files.raw import open_regular, read_into

__all__ = [
    "INDEX_BYTES",
    "check_shards",
    "demand_shards",
    "encode_index",
    "parse_index",
    "read_index",
    "read_shards",
    "shard_paths",
]

INDEX_BYTES = 64 << 20  # a trillion-parameter checkpoint with 200 000 tensors has an index of about 20 MiB
_ASIDE = 64 << 10  # characters of any member that is not the map
_ANY = json.JSONDecoder()
_HINT = "fetch the index again, or ask its author"


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """A ``*.safetensors.index.json`` as transformers and diffusers read it; same input, same bytes.

    Args:
        weight_map: tensor name -> shard file name.
        total_size: bytes of all tensors together.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_index(path: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor name -> shard file name, in the order of the file.

    Raises:
        HeaderError: it is malformed, or names a shard outside its folder.
        NotFound, AccessDenied: it cannot be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = bytearray(min(size, INDEX_BYTES + 1))
        read_into(file, 0, raw)
    return parse_index(raw, where=os.fspath(path))


def parse_index(raw: bytes | bytearray, *, where: str) -> dict[str, str]:
    """As ``read_index``, of bytes that came from elsewhere.

    Args:
        raw: the whole index.
        where: what to call it in messages.

    Raises:
        HeaderError: as ``read_index``.
    """
    try:
        return _walk(raw)
    except Malformed as fault:
        raise HeaderError(f"{where}: {fault.reason}", fault.hint or _HINT) from None


def _walk(raw: bytes | bytearray) -> dict[str, str]:
    if len(raw) > INDEX_BYTES:
        raise Malformed(f"the index takes more than {INDEX_BYTES} bytes")
    try:
        scanner = Scanner(raw.decode())
    except UnicodeDecodeError as error:
        raise Malformed(f"the index is not UTF-8 (byte {error.start})") from None
    weight_map: dict[str, str] | None = None
    for key in scanner.members("the index"):
        if key != "weight_map":
            scanner.small(f"the index's {show(key)}", decoder=_ANY, limit=_ASIDE)
            continue
        weight_map = {}
        for name in scanner.members("weight_map"):
            shard = scanner.string(f"the shard of {show(name)}")
            if fault := name_fault(name):
                raise Malformed(f"the tensor name {show(name)} {fault}")
            if name_fault(shard) or "/" in shard or ":" in shard or not shard.endswith(".safetensors"):
                raise Malformed(f"the shard of {show(name)} is {show(shard)}: no safetensors file beside the index")
            weight_map[name] = shard
    scanner.end("the index")
    if not weight_map:
        raise Malformed("the index has no weight_map, or an empty one")
    return weight_map


def shard_paths(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shards that an index names, sorted by file name.

    Raises:
        NotFound: some are missing; the message lists them.
    """
    paths = [path.with_name(name) for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in paths if not shard.is_file()]
    demand_shards(path, paths, missing, "fetch the missing files into the same folder")
    return paths


def demand_shards(path: Path, shards: Sized, missing: Sequence[str], hint: str) -> None:
    """Make sure that none of the shards an index names is missing.

    Raises:
        NotFound: some are; the message lists them.
    """
    if missing:
        raise NotFound(
            f"{path} names {len(shards)} shards and {len(missing)} are missing: {', '.join(missing[:3])}", hint
        )


def check_shards(path: Path, weight_map: Mapping[str, str], headers: Mapping[Path, Header]) -> None:
    """Make sure that each tensor is in the shard the index names, and that there are no others.

    Raises:
        IntegrityError: listing what is absent and what is extra.
    """
    listed = set(weight_map.items())
    present = {(name, shard.name) for shard, header in headers.items() for name in header.tensors}
    faults = [_some(listed - present, "not in the shard the index names"), _some(present - listed, "not in the index")]
    if any(faults):
        raise IntegrityError(
            f"{path} and its shards disagree: {'; '.join(filter(None, faults))}",
            "index and shards must be of one checkpoint: fetch them together",
        )


def _some(pairs: set[tuple[str, str]], what: str) -> str:
    if not pairs:
        return ""
    name, shard = min(pairs)
    return f"{len(pairs)} tensors are {what}, first {show(name)} in {shard}"


def read_shards(path: str | os.PathLike[str], limits: Limits | None = None) -> dict[Path, Header]:
    """The header of every shard of an index, sorted by file name, checked against each other.

    Raises:
        NotFound, AccessDenied: a file is missing or may not be read.
        HeaderError: the index or a shard is malformed.
        IntegrityError: index and shards disagree.
    """
    path = Path(path)
    weight_map = read_index(path)
    headers = {shard: read_header(shard, limits) for shard in shard_paths(path, weight_map)}
    check_shards(path, weight_map, headers)
    return headers
