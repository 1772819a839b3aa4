"""The base's weights, one target at a time: for approximations, and for proofs about changes that depend on them.

A target's weight is put together from the pieces that the layouts name, in logical orientation.  Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias, final

from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Target
from lorahub.engine.planning.place import FLOATS, logical_shape
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.files.tensors import FileSource
from lorahub.lazy import torch

__all__ = ["BaseWeights", "Read", "read_files"]

Read: TypeAlias = "Callable[[str], torch.Tensor]"
"""Canonical name -> the parameter as stored."""


@contextmanager
def read_files(files: BaseFiles, index: BaseIndex) -> Iterator[Read]:
    """Tensors by canonical name, from the base's files, which stay open meanwhile.

    Raises:
        IntegrityError: a file is not the one that was surveyed.
    """
    where = {name: file for file, header in files.headers.items() for name in header.tensors}
    with ExitStack() as opened:
        sources: dict[str, FileSource] = {}

        def read(name: str) -> torch.Tensor:
            stored = index.parameters[name].stored_as
            file = where[stored]
            if file not in sources:
                source = opened.enter_context(FileSource(files.folder / file, prefix=files.prefix(file)))
                if source.header != files.headers[file]:
                    raise IntegrityError(f"{files.folder / file} changed since it was surveyed", "try again")
                sources[file] = source
            return sources[file].read(stored)

        yield read


_COUNTS = frozenset({"I64", "BOOL"})
"""Dtypes of counters and masks, which hold what they say: no quantised weight is stored so."""


@final
class BaseWeights:
    """A base by target."""

    def __init__(self, index: BaseIndex, layouts: Mapping[Target, Layout], read: Read) -> None:
        self._index, self._layouts, self._read = index, layouts, read

    def shape(self, target: Target) -> tuple[int, ...] | None:
        """The shape of a target, [out, in, *k], or None where the base has no such target."""
        layout = self._layouts.get(target)
        return logical_shape(layout, self._index) if layout else None

    def weight(self, target: Target) -> torch.Tensor | None:
        """The untouched parameter in float64, or None where the base has no such target.

        Raises:
            UnsupportedFormat: it is stored in quantised form.
        """
        layout = self._layouts.get(target)
        if layout is None:
            return None
        result = torch.empty(logical_shape(layout, self._index), dtype=torch.float64)
        for piece in layout.pieces:
            info = self._index.parameters[piece.parameter]
            if info.dtype not in FLOATS | _COUNTS:
                raise UnsupportedFormat(
                    f"{piece.parameter} is stored as {info.dtype}, in quantised form", "give the base in 16 bits"
                )
            piece.of_delta.put(result, piece.of_parameter.of(self._read(piece.parameter)).to(torch.float64))
        return result
