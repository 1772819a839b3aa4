"""What a file that may be a pickle is, from outside: size, first bytes, a zip's table of contents, every instruction.

Nothing is unpickled and nothing unpacked here; what passes is a file that PyTorch wrote and that makes dense tensors
inside its own storages, under limits.  Knows no adapters, and needs no torch.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorahub.errors import HeaderError, IntegrityError, LorahubError, UnsupportedFormat
from lorahub.files.grammar import show
from lorahub.files.header import read_header
from lorahub.files.opcodes import NotAProgram, Program, trace
from lorahub.files.raw import open_regular, read_into

__all__ = ["AGAIN", "ASK", "PickleLimits", "demand", "examine"]

AGAIN = "fetch the file again, or ask its author"
ASK = "ask its author for safetensors"

_LFS = b"version https://git-lfs"
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_NUMPY = ("numpy", "_codecs")
_PROTOCOL = 2  # what torch.save writes, and all that weights_only follows


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleLimits:
    """How much a file may ask for.

    Attributes:
        file: bytes of a file that can be mapped.
        whole: bytes of one that has to be read whole (written by PyTorch before 1.6).
        pickle: bytes of the pickle in it, without tensors.
        steps: instructions of it.
        tensors: how many.
        growth: how much larger the tensors may be, each written for itself, than the file.
        config: bytes of a JSON file that is taken along.
    """

    file: int = 64 << 30
    whole: int = 4 << 30
    pickle: int = 32 << 20
    steps: int = 3_000_000
    tensors: int = 100_000
    growth: int = 64
    config: int = 1 << 20


def examine(path: Path, limits: PickleLimits) -> bool:
    """Test everything that can be known without loading; whether the file can be mapped.

    Raises:
        NotFound: there is no such file.
        UnsupportedFormat: it is no file of tensors: it asks for code (named), or is another format.
        IntegrityError: it is damaged, over a limit, or a Git LFS pointer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = bytearray(min(size, 512))
        read_into(file, 0, start)
        if size > limits.file:
            raise IntegrityError(f"{path} has {size:,} bytes, over the limit of {limits.file:,}", ASK)
        if fault := _impostor(path, bytes(start), size):
            raise fault
        if start.startswith(b"PK\x03\x04"):
            with file:
                _examine_zip(path, file, size, limits)
            return True
        head = bytearray(min(size, limits.pickle))
        read_into(file, 0, head)
    _examine_stream(path, bytes(head), size, limits)
    return False


def _impostor(path: Path, start: bytes, size: int) -> LorahubError | None:
    """What else lies under such names, by its first bytes."""
    if not size:
        return IntegrityError(
            f"{path} is empty (0 bytes)", "an interrupted download leaves such a file: fetch it again"
        )
    if start.startswith(_LFS):
        return IntegrityError(f"{path} is a Git LFS pointer, not the file itself", "git lfs pull")
    if start[257:262] == b"ustar":
        return UnsupportedFormat(
            f"{path} is a tar archive, as PyTorch wrote before 0.2, which cannot be read without running it",
            "save it again with a newer PyTorch, where you trust it",
        )
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            return UnsupportedFormat(f"{path} is {what}, not a PyTorch file", ASK)
    if not start.startswith(b"PK") and _is_safetensors(path):
        return UnsupportedFormat(f"{path} is a safetensors file under another name", "let its name end in .safetensors")
    return None


_OTHERS: Mapping[bytes, str] = MappingProxyType(
    {
        b"GGUF": "a GGUF file",
        b"\x93NUMPY": "a numpy array",
        b"\x89HDF": "an HDF5 file",
        b"\x1f\x8b": "compressed with gzip",
        b"<": "a web page or XML",
        b"{": "JSON",
    }
)
"""First bytes -> what it is."""


def _is_safetensors(path: Path) -> bool:
    try:
        read_header(path)
    except HeaderError:
        return False
    return True


def _examine_zip(path: Path, file: io.FileIO, size: int, limits: PickleLimits) -> None:
    """The table of contents and the pickle of a file that PyTorch has written since 1.6."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            demand(not archive.comment, path, "has a comment at its end, which PyTorch never writes")
            prefix = _contents(path, entries, size, limits)
            records = {each.filename: each for each in entries}
            order = records.get(f"{prefix}/byteorder")
            if order is not None and order.file_size < 16 and archive.read(order).strip() == b"big":
                raise UnsupportedFormat(f"{path} was written on a big-endian machine", ASK)
            program = _trace(path, archive.read(f"{prefix}/data.pkl"), limits)
    except (
        zipfile.BadZipFile,
        struct.error,
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        OverflowError,
        RuntimeError,
        UnicodeError,
        ValueError,
    ) as error:  # what zipfile says of archives that are damaged, encrypted or of a later make
        raise IntegrityError(f"{path} is no whole zip archive: {error}", AGAIN) from None
    for key, storage in program.storages.items():
        record = records.get(f"{prefix}/data/{key}")
        demand(record is not None, path, f"has no storage {show(key)}, which its pickle names")
        if record is not None and storage.nbytes > record.file_size:
            demand(False, path, f"says {storage.nbytes:,} bytes of storage {show(key)}, which has {record.file_size:,}")
    _limit_growth(path, program, size, limits)


def _contents(path: Path, entries: Sequence[zipfile.ZipInfo], size: int, limits: PickleLimits) -> str:
    """What every entry's name begins with; nothing is unpacked to find out."""
    names = [each.filename for each in entries]
    demand(len(set(names)) == len(names), path, "lists an entry twice")
    if any(name.endswith(".npy") for name in names):
        raise UnsupportedFormat(f"{path} is an archive of numpy arrays, not a PyTorch file", ASK)
    pickles = [each for each in entries if each.filename.count("/") == 1 and each.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsupportedFormat(f"{path} is a zip archive without PyTorch's data.pkl", ASK)
    prefix = pickles[0].filename.partition("/")[0]
    if any(name == f"{prefix}/constants.pkl" or name.startswith(f"{prefix}/code/") for name in names):
        raise UnsupportedFormat(
            f"{path} is a TorchScript program, not a file of tensors",
            "save its state dict where you trust it: torch.save(torch.jit.load(FILE).state_dict(), ...)",
        )
    demand(pickles[0].file_size <= limits.pickle, path, f"holds a pickle of {pickles[0].file_size:,} bytes")
    end = 0
    for each in sorted(entries, key=lambda entry: entry.header_offset):
        packed = each.compress_type != zipfile.ZIP_STORED or each.compress_size != each.file_size
        demand(not packed, path, f"compresses {show(each.filename)}, which PyTorch never does")
        demand(each.filename.startswith(f"{prefix}/"), path, f"holds {show(each.filename)} beside {prefix}/")
        demand(each.header_offset >= end, path, f"has entries that overlap at {show(each.filename)}")
        end = each.header_offset + 30 + len(each.filename.encode()) + each.file_size
    demand(end <= size, path, "lists more bytes than it has")
    return prefix


def _examine_stream(path: Path, head: bytes, size: int, limits: PickleLimits) -> None:
    """The pickles and storages of a file that PyTorch wrote before 1.6, or another pickle, which is refused."""
    magic = _trace(path, head, limits)
    if magic.result != _MAGIC:
        raise UnsupportedFormat(f"{path} is a Python pickle, and none that PyTorch wrote", ASK)
    at = magic.size
    programs = []
    for _ in range(4):  # version, system, the object, its storages' keys
        programs.append(_trace(path, head[at:], limits))
        at += programs[-1].size
    version, _, program, _ = programs
    demand(version.result == _VERSION, path, f"has version {str(version.result)[:20]}, and PyTorch wrote {_VERSION}")
    demand(size <= limits.whole, path, f"must be read whole, and its {size:,} bytes are over {limits.whole:,}")
    stored = sum(8 + storage.nbytes for storage in program.storages.values())
    if at + stored != size:
        demand(False, path, f"should have {at + stored:,} bytes by what its pickle says, and has {size:,}")
    _limit_growth(path, program, size, limits)


def _trace(path: Path, data: bytes, limits: PickleLimits) -> Program:
    """What a pickle would do, where that is to make tensors.

    Raises:
        UnsupportedFormat: it asks for anything else, by name.
        IntegrityError: it is no whole pickle, or its tensors lie outside their storages.
    """
    try:
        program = trace(data, steps=limits.steps)
    except NotAProgram as error:
        raise IntegrityError(f"{path}: its pickle {error}", AGAIN) from None
    if foreign := program.foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        wants = f"{', '.join(foreign[:3])}{more}"
        if foreign[0].startswith("numpy") and all(name.startswith(_NUMPY) for name in foreign):
            raise UnsupportedFormat(
                f"{path} holds numpy objects ({wants}), which cannot be made without running code",
                "save it again with tensors only, where you trust it",
            )
        raise UnsupportedFormat(
            f"{path} asks to load {wants}, which is code and no tensor: nothing of it was run",
            f"{ASK}, or save its tensors alone, where you trust it",
        )
    if program.faults:
        raise IntegrityError(f"{path}: {program.faults[0]}", AGAIN)
    if program.protocol > _PROTOCOL:
        raise UnsupportedFormat(
            f"{path} is written in pickle's protocol {program.protocol}; only {_PROTOCOL} is read without running it",
            "save it again where you trust it, with torch.save as it comes",
        )
    return program


def _limit_growth(path: Path, program: Program, size: int, limits: PickleLimits) -> None:
    demand(len(program.views) <= limits.tensors, path, f"makes {len(program.views):,} tensors")
    total = sum(view.nbytes for view in program.views)
    if total > limits.growth * size:
        demand(False, path, f"would grow from {size:,} bytes to {total:,}, since its tensors share memory")


def demand(fine: bool, path: Path, what: str) -> None:
    """Refuse a file that is not ``fine``.

    Raises:
        IntegrityError: saying ``what`` it is or does, after its name.
    """
    if not fine:
        raise IntegrityError(f"{path} {what}", AGAIN)
