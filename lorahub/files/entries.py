"""What a header lists: tensors with their forms and places, and what a form or a name may be.

A form is a dtype with a shape: folders of thousands of tensors have a few dozen of them.  Knows no files and no JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import sub
from typing import Any, NamedTuple, final

from lorahub.files.dtypes import DTYPES
from lorahub.files.grammar import Malformed, show

__all__ = ["METADATA", "Form", "Limits", "TensorInfo", "Tensors", "form_of", "forms_of", "name_fault", "sizes"]

METADATA = "__metadata__"
"""The key of the free-form strings; no tensor can have this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a header may ask of the reader.

    Attributes:
        header: bytes of JSON.
        tensors: how many.
        metadata: bytes of all metadata keys and values together.
        name: characters in one tensor's name.
    """

    header: int = 8 << 20
    tensors: int = 100_000
    metadata: int = 1 << 20
    name: int = 1024


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: safetensors dtype code, stored shape, and its bytes, ``start`` to ``stop`` of the data section.

    ``turned``: the bytes are those of the tensor with its axes reversed (numpy's Fortran order).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    turned: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.stop - self.start


class Form(NamedTuple):
    """A dtype and a shape."""

    dtype: str
    shape: tuple[int, ...]


@final
class Tensors(Mapping[str, TensorInfo]):
    """Tensors by name, in the order of their bytes; kept as columns, for few are ever looked at one by one.

    Args:
        forms: name -> form.
        starts: where each begins, in bytes from the start of the data section.
        stops: where each ends.
    """

    __slots__ = ("__weakref__", "_order", "_starts", "_stops", "forms")

    def __init__(self, forms: Mapping[str, Form], starts: Sequence[int], stops: Sequence[int]) -> None:
        self.forms = forms
        self._starts, self._stops = starts, stops
        self._order: dict[str, int] = {}

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return self._stops[-1] if self._stops else 0

    def spans(self, names: Iterable[str]) -> tuple[list[int], list[int]]:
        """Where some tensors begin, and how many bytes each takes."""
        places = list(map(self._places().__getitem__, names))
        begin = list(map(self._starts.__getitem__, places))
        return begin, list(map(sub, map(self._stops.__getitem__, places), begin))

    def _places(self) -> Mapping[str, int]:
        if len(self._order) < len(self.forms):
            self._order = dict(zip(self.forms, range(len(self.forms)), strict=True))
        return self._order

    def __getitem__(self, name: str) -> TensorInfo:
        form = self.forms[name]
        at = self._places()[name]
        return TensorInfo(*form, self._starts[at], self._stops[at])

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def keys(self) -> KeysView[str]:
        """The names."""
        return self.forms.keys()

    def __repr__(self) -> str:
        return f"Tensors({dict(self)!r})"


def forms_of(tensors: Mapping[str, TensorInfo]) -> Mapping[str, Form]:
    """Name -> form; equal forms are one object where the tensors were read from a safetensors header."""
    if isinstance(tensors, Tensors):
        return tensors.forms
    return {name: Form(info.dtype, info.shape) for name, info in tensors.items()}


def name_fault(name: str, limits: Limits | None = None) -> str:
    """Why a tensor may not have this name, or "" if it may.

    Names are printed, become module paths and sometimes file names, so they are printable and stay where they are put.
    """
    longest = (limits or Limits()).name
    if not name:
        return "is empty"
    if len(name) > longest:
        return f"has {len(name)} characters, more than {longest}"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if "\\" in name or name.startswith("/") or ".." in name.split("/"):
        return "reads like a path that leaves its folder"
    if name == METADATA:
        return "is reserved"
    return ""


def form_of(dtype: Any, shape: Any, what: str) -> tuple[Form, int]:
    """A form, and how many bits a tensor of it takes.

    Raises:
        Malformed: it is none; ``what`` has it.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Malformed(f"{what} has an unknown dtype: {show(str(dtype))}", f"known ones: {', '.join(DTYPES)}")
    if not sizes(shape):
        raise Malformed(f"{what} has a shape that is no list of sizes: {show(str(shape))}")
    # Zeros are left out first: [0, 2**40, 2**40] holds nothing, yet no library can make strides for it.
    if prod(size for size in shape if size) >= 1 << 63:
        raise Malformed(f"{what} has a shape too large to count: {show(str(shape))}")
    return Form(dtype, tuple(shape)), DTYPES[dtype].bits * prod(shape)


def sizes(value: Any) -> bool:
    """Whether it is a list of integers from 0 on; ``true`` is not one, though Python counts it."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
