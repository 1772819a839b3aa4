"""The base's files as the way back: nothing is held but checksums, and undoing reads the weights again.

Every row is compared with the files before it is written, so a base that was loaded from elsewhere, or changed since,
is refused while it can be.  Weights that were converted to another floating dtype on loading are converted alike.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from typing import ClassVar, Self, final

from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseIndex
from lorahub.engine.crew import Workspace
from lorahub.engine.kernels.checksum_torch import flat
from lorahub.engine.undoing.checksum import checksum
from lorahub.engine.undoing.keeper import Keeper, Policy
from lorahub.errors import BaseMismatch, IntegrityError, UsageError
from lorahub.files.dtypes import DTYPES, to_torch, torch_shape
from lorahub.files.header import TensorInfo
from lorahub.files.tensors import FileSource
from lorahub.lazy import torch

__all__ = ["BaseRows", "Reload"]


@final
class BaseRows:
    """Rows of a base's parameters, read from its files, which stay open."""

    def __init__(self, files: BaseFiles, index: BaseIndex) -> None:
        """Look at headers.

        Args:
            files: the base's.
            index: made of them.
        """
        self._files, self._index = files, index
        self._file_of = {name: file for file, header in files.headers.items() for name in header.tensors}
        self._lock = threading.Lock()
        self._opened = ExitStack()
        weakref.finalize(self, self._opened.close)
        self._sources: dict[str, FileSource] = {}

    def demand(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make sure that the files have these parameters as plain tensors.

        Raises:
            BaseMismatch: they do not.
        """
        for name, tensor in tensors.items():
            info = self._info(name)
            plain = info is not None and info.dtype in DTYPES and not info.turned
            if info is None or not plain or prod(torch_shape(info.dtype, info.shape)) != tensor.numel():
                kept = f"as {list(info.shape)} {info.dtype}" if info else "not at all"
                raise BaseMismatch(
                    f"undo by reading again needs {name} {list(tensor.shape)} as it is in the files of "
                    f"{self._index.ref}, which have it {kept}",
                    'undo="journal" or undo="copy" needs no files',
                )

    def read(self, name: str, rows: slice, like: torch.Tensor) -> torch.Tensor:
        """Rows of a parameter, with the shape, dtype and device of ``like``.

        Raises:
            IntegrityError: a file is not the one that was surveyed.
        """
        info = self._info(name)
        assert info is not None  # demanded
        count = like.numel()
        per_row, width = count // max(rows.stop - rows.start, 1), to_torch(info.dtype).itemsize
        raw = torch.empty(count * width, dtype=torch.uint8)
        stored = self._index.parameters[name].stored_as
        self._source(stored).read_into(stored, rows.start * per_row * width, raw.numpy().data)
        return raw.view(to_torch(info.dtype)).view(like.shape).to(like.device, like.dtype)

    def close(self) -> None:
        """Close the files; they are opened again where they are needed."""
        with self._lock:
            self._opened.close()
            self._sources.clear()

    def _info(self, name: str) -> TensorInfo | None:
        known = self._index.parameters.get(name)
        file = self._file_of.get(known.stored_as) if known else None
        return self._files.headers[file].tensors[known.stored_as] if known and file else None

    def _source(self, stored: str) -> FileSource:
        file = self._file_of[stored]
        with self._lock:
            if file not in self._sources:
                path, prefix = self._files.folder / file, self._files.prefix(file)
                source = self._opened.enter_context(FileSource(path, prefix=prefix))
                if source.header != self._files.headers[file]:
                    raise IntegrityError(f"{self._files.folder / file} changed since it was surveyed", "try again")
                self._sources[file] = source
            return self._sources[file]


@final
class Reload(Keeper):
    """Checksums of one parameter, whose numbers are in files."""

    policy: ClassVar[Policy] = "reload"

    def __init__(self, name: str, tensor: torch.Tensor, base: BaseRows) -> None:
        """Nothing is read yet."""
        super().__init__(name, tensor)
        self._base = base
        self._sums: dict[int, torch.Tensor] = {}

    def open(self) -> Self:
        """Nothing is to be made ready."""
        return self

    def keep(self, rows: slice, untouched: torch.Tensor | None, space: Workspace) -> torch.Tensor:
        """Compare the rows with the files; see ``Way``.

        Raises:
            UsageError: the files hold other numbers.
        """
        live = self.tensor[rows]
        before = self._base.read(self.name, rows, live)
        if not torch.equal(flat(before), flat(live if untouched is None else untouched)):
            raise UsageError(
                f"{self.name} is not what its files hold, so undoing could not read it again",
                'undo="journal" or undo="copy" needs no files',
            )
        self._sums[rows.start] = checksum(before)
        return before

    def written(self, rows: slice, before: torch.Tensor, space: Workspace) -> None:
        """See ``Way``."""
        self.mark(rows)

    def demand(self, rows: slice, space: Workspace) -> None:
        """Read the rows; see ``Way``."""
        self.recover(rows, space)

    def recover(self, rows: slice, space: Workspace) -> torch.Tensor:
        """Read the rows; see ``Way``."""
        found = self._base.read(self.name, rows, self.tensor[rows])
        if not torch.equal(checksum(found), self._sums[rows.start]):
            raise IntegrityError(
                f"{self.name} is not what it was in the files that it has to be read from again",
                "fetch the base again: undo works once its files hold what they held",
            )
        return found

    @property
    def held(self) -> int:
        """Nothing to speak of."""
        return 0

    def drop(self) -> None:
        """Forget the checksums and close the files."""
        super().drop()
        self._sums.clear()
        self._base.close()
