"""Single numbers that formats keep as tensors, such as ``alpha``: read from the file as they are, without torch.

Knows headers, bytes and element types; not what the numbers are for.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

from lorahub.errors import IntegrityError
from lorahub.files.entries import Form, forms_of
from lorahub.files.header import Header
from lorahub.files.raw import open_regular, read_into
from lorahub.formats.format import AdapterFiles

__all__ = ["Together", "read_numbers"]

_CODES: Mapping[str, str] = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
    "BOOL": "<?",
}
"""safetensors dtype -> how ``struct`` calls it; BF16 is the upper half of an F32."""


def read_numbers(files: AdapterFiles, file: str, keys: Collection[str]) -> dict[str, float]:
    """The values of tensors with one element each, in double precision; one object for each form and bytes.

    Args:
        files: where they lie; ``files.numbers`` instead of the disk for a file that is named there.
        file: the weights file.
        keys: which tensors.

    Raises:
        IntegrityError: a tensor has several elements, or a dtype that no number has; or the file is cut off.
        NotFound, AccessDenied, Unavailable: the file cannot be read.
    """
    if not keys:
        return {}
    header = files.headers[file]
    found = list(map(forms_of(header.tensors).__getitem__, keys))
    forms = dict(zip(map(id, found), found, strict=True))  # of hundreds of alphas, one or two
    if not all(map(_is_number, forms.values())):
        key, form = next((key, form) for key, form in zip(keys, found, strict=True) if not _is_number(form))
        if prod(form.shape) != 1:
            raise IntegrityError(
                f"{key} should be a single number, not {form.dtype} {list(form.shape)}",
                "the file is damaged, or of another format: ask its author",
            )
        raise IntegrityError(
            f"{key} is stored as {form.dtype}, in which no such number is read: {', '.join(sorted(_CODES))} or BF16",
            f"store {key} as F32, which holds it exactly, and leave the other tensors as they are",
        )
    held = files.numbers.get(file)
    raw: Sequence[bytes]
    if held is None:
        raw = _on_disk(files.folder / file, header, keys)
    else:
        raw = held.several(keys) if isinstance(held, Together) else [held[key] for key in keys]
    if len(forms) == 1:
        alike = {each: _value(found[0].dtype, each) for each in set(raw)}
        return dict(zip(keys, map(alike.__getitem__, raw), strict=True))
    spelled = list(zip(map(id, found), raw, strict=True))
    values = {(form, each): _value(forms[form].dtype, each) for form, each in set(spelled)}
    return dict(zip(keys, map(values.__getitem__, spelled), strict=True))


def _is_number(form: Form) -> bool:
    return prod(form.shape) == 1 and (form.dtype in _CODES or form.dtype == "BF16")


class Together(Mapping[str, bytes]):
    """Numbers that are quicker had together than one by one."""

    @abstractmethod
    def several(self, keys: Collection[str]) -> Sequence[bytes]:
        """The bytes of each of these tensors.

        Raises:
            IntegrityError: the file ends before them.
        """


def _on_disk(path: Path, header: Header, keys: Collection[str]) -> list[bytes]:
    with open_regular(path) as opened:
        found = []
        for key in keys:
            offset, length = header.span(key)
            buffer = bytearray(length)
            read_into(opened, offset, buffer)
            found.append(bytes(buffer))
    return found


def _value(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":
        dtype, raw = "F32", b"\0\0" + raw
    (value,) = struct.unpack(_CODES[dtype], raw)
    return float(value)
