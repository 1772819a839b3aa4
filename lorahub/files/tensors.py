"""Tensors by name, read when asked for: from one weights file, from shards with an index, or from memory.

Nothing is mapped into memory: what ``read`` gives is the caller's own, and a file that is cut while it is read is an
``IntegrityError``, never a crash.  Sources may be read from several threads.  Knows nothing of adapters or bases.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self, final

from lorahub.errors import IntegrityError, NotFound, Unavailable, UnsupportedFormat, UsageError
from lorahub.files.bulk import Span, read_views
from lorahub.files.containers import weights_header_of
from lorahub.files.digest import digest_tensors
from lorahub.files.dtypes import DTYPES, from_torch, stored_shape, to_torch, torch_shape
from lorahub.files.gguf import dequantise
from lorahub.files.grammar import show
from lorahub.files.header import Header, Known, Limits, TensorInfo, prefixed
from lorahub.files.raw import CHUNK, Bytes, as_bytes, open_regular, read_into
from lorahub.files.shards import check_shards, read_index, shard_paths
from lorahub.lazy import torch

__all__ = [
    "WEIGHT_FILES",
    "DictSource",
    "FileSource",
    "Location",
    "ShardedSource",
    "TensorSource",
    "open_weights",
    "tensor_bytes",
]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
"""What ``open_weights`` looks for in a folder, in this order; a single file wins over an index, as in transformers."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = "ask its author for safetensors, or convert it where you trust it"


class Location(NamedTuple):
    """Where a tensor's bytes lie: file, offset from its start, how many."""

    path: Path
    offset: int
    nbytes: int


class TensorSource(ABC):
    """Tensors by name.  Close it, or use it in a ``with`` statement.

    Attributes:
        headers: file -> header, for every file behind this source; empty for tensors in memory.
    """

    headers: Mapping[Path, Header] = MappingProxyType({})

    def __init__(self, label: str, infos: Mapping[str, TensorInfo]) -> None:
        self._label = label
        self._infos = infos

    def names(self) -> tuple[str, ...]:
        """All names, in the order their bytes are stored."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype, stored shape and size; no tensor is read.

        Raises:
            NotFound: there is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise NotFound(f"{self._label} has no tensor {show(name)}") from None

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor, on the CPU, in the dtype it is stored in; the caller may change it.

        Raises:
            NotFound, UsageError, IntegrityError: as ``read_into``.
            UnsupportedFormat: torch has no such dtype.
        """
        info = self.info(name)
        dtype, shape = to_torch(info.dtype), torch_shape(info.dtype, info.shape)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)  # aligned as torch likes it, and not zeroed first
        self.read_into(name, 0, raw.numpy().data)
        if info.dtype == "BOOL" and int(raw.max()) > 1:  # torch's behaviour is undefined for such a truth value
            raise IntegrityError(f"tensor {show(name)} of {self._label} is BOOL and holds bytes other than 0 and 1")
        if info.turned:
            return raw.view(dtype).reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
        return raw.view(dtype).reshape(shape)

    def read_into(self, name: str, start: int, buffer: Bytes) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on (little-endian, row-major unless ``turned``).

        Raises:
            NotFound: there is no such tensor.
            UsageError: more bytes are asked for than the tensor has, or the source is closed.
            IntegrityError: the file ends too early.
        """
        info, view = self.info(name), as_bytes(buffer)
        stop = start + len(view)
        if not 0 <= start <= stop <= info.nbytes:
            raise UsageError(f"bytes {start} to {stop} were asked of tensor {show(name)}, which has {info.nbytes}")
        self._fill(name, start, view)

    def location(self, name: str) -> Location | None:
        """Where the bytes lie on disk, to copy them as they are; None for tensors in memory.

        Raises:
            NotFound: there is no such tensor.
        """
        self.info(name)
        return self._locate(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of a few MiB; each is valid until the next is asked for."""
        total = self.info(name).nbytes
        buffer = memoryview(bytearray(min(CHUNK, total)))
        for start in range(0, total, CHUNK):
            part = buffer[: total - start]
            self.read_into(name, start, part)
            yield part

    def digest(self) -> str:
        """``sha256:`` over names, dtypes, shapes and bytes; equal for equal tensors however they are stored."""
        return digest_tensors(self._infos, self.chunks)

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held; afterwards nothing can be read."""

    @abstractmethod
    def _fill(self, name: str, start: int, view: memoryview) -> None: ...

    @abstractmethod
    def _locate(self, name: str) -> Location | None: ...

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} tensors of {self._label}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class FileSource(TensorSource):
    """The tensors of one weights file in any container, which stays open until the source is closed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        limits: Limits | None = None,
        known: Known | None = None,
        *,
        prefix: str = "",
    ) -> None:
        """Open the file and check its header; ``known`` is as for ``parse_header``.

        Args:
            path: where it lies.
            limits: how much its header may ask for.
            known: as for ``parse_header``.
            prefix: what tensors are called here, before their names in the file.

        Raises:
            HeaderError, NotFound, AccessDenied: as ``read_weights_header``.
        """
        self.path = Path(path)
        with ExitStack() as undo:
            self._file = undo.enter_context(open_regular(self.path))
            self.header = prefixed(weights_header_of(self._file, limits, known), prefix)
            undo.pop_all()
        self.headers = MappingProxyType({self.path: self.header})
        super().__init__(str(self.path), self.header.tensors)

    def read(self, name: str) -> torch.Tensor:
        """As any source; of a quantised element type, the values as float32 where those are exact.

        Raises:
            NotFound, UsageError, IntegrityError, UnsupportedFormat: as any source.
            MissingDependency: what unpacks it is not installed.
        """
        info = self.info(name)
        if info.dtype in DTYPES:
            return super().read(name)
        raw = bytearray(info.nbytes)
        self.read_into(name, 0, raw)
        return dequantise(info, bytes(raw), f"tensor {show(name)} of {self.path}")

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors at once; those that lie one behind the other share a piece of memory, and no number of it.

        Raises:
            NotFound, UsageError, IntegrityError, UnsupportedFormat, MissingDependency: as ``read``.
        """
        infos = {name: self.info(name) for name in names}
        spans = {name: self._span(info) for name, info in infos.items() if _plain(info)}
        views = dict(zip(spans, read_views(list(spans.values()), self._read_at), strict=True))
        return {name: views[name] if name in views else self.read(name) for name in infos}

    def _span(self, info: TensorInfo) -> Span:
        start = self.header.data_start + info.start
        return Span(start, start + info.nbytes, to_torch(info.dtype), torch_shape(info.dtype, info.shape))

    def _read_at(self, offset: int, view: memoryview) -> None:
        if self._file.closed:
            raise UsageError(f"{self.path} was closed and cannot be read from any more")
        read_into(self._file, offset, view)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fill(self, name: str, start: int, view: memoryview) -> None:
        self._read_at(self.header.span(name)[0] + start, view)

    def _locate(self, name: str) -> Location:
        return Location(self.path, *self.header.span(name))


def _plain(info: TensorInfo) -> bool:
    """Whether a tensor's bytes are its values, whatever they are."""
    return bool(info.nbytes) and info.dtype in DTYPES and info.dtype != "BOOL" and not info.turned


@final
class ShardedSource(TensorSource):
    """The tensors of a checkpoint in several files, as its index says, in the order of the shards' names."""

    def __init__(self, index: str | os.PathLike[str], limits: Limits | None = None) -> None:
        """Open every shard and check index and headers against each other.

        Raises:
            HeaderError, IntegrityError, NotFound, AccessDenied: as ``read_shards``.
        """
        self.index = Path(index)
        weight_map = read_index(self.index)
        with ExitStack() as undo:
            shards = [undo.enter_context(FileSource(path, limits)) for path in shard_paths(self.index, weight_map)]
            self.headers = MappingProxyType({shard.path: shard.header for shard in shards})
            check_shards(self.index, weight_map, self.headers)
            self._shards = undo.pop_all()
        self._where = {name: shard for shard in shards for name in shard.names()}
        super().__init__(str(self.index), {name: shard.info(name) for name, shard in self._where.items()})

    def close(self) -> None:
        """Close every shard."""
        self._shards.close()

    def _fill(self, name: str, start: int, view: memoryview) -> None:
        self._where[name].read_into(name, start, view)

    def _locate(self, name: str) -> Location | None:
        return self._where[name].location(name)


@final
class DictSource(TensorSource):
    """Tensors that are in memory already, on any device; not copied before they are read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look at dtypes and shapes.

        Raises:
            UnsupportedFormat: a tensor that no safetensors file could hold.
        """
        self._tensors = dict(tensors)
        infos = {name: _describe(tensor) for name, tensor in self._tensors.items()}
        super().__init__("the mapping in memory", infos)

    def close(self) -> None:
        """Do nothing: the tensors belong to the caller."""

    def _fill(self, name: str, start: int, view: memoryview) -> None:
        view[:] = tensor_bytes(self._tensors[name], start, start + len(view))

    def _locate(self, name: str) -> None:
        return None


def _describe(tensor: torch.Tensor) -> TensorInfo:
    reason = (
        "has no data (meta device)"
        if tensor.is_meta
        else f"is {tensor.layout}, not dense"
        if tensor.layout != torch.strided
        else f"is a {type(tensor).__name__}, which keeps its data in other tensors"
        if hasattr(tensor, "__tensor_flatten__")
        else ""
    )
    if reason:
        raise UnsupportedFormat(f"a tensor of shape {list(tensor.shape)} {reason}", "make it a plain tensor first")
    code = from_torch(tensor.dtype)
    return TensorInfo(code, stored_shape(code, tensor.shape), 0, tensor.numel() * tensor.element_size())


def tensor_bytes(tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> memoryview:
    """Bytes ``start`` to ``stop`` of a tensor as a file holds it (little-endian, row-major); a view where that can be.

    Raises:
        UnsupportedFormat: a tensor without plain data, or of a dtype that no safetensors file can hold.
    """
    if not _describe(tensor).nbytes:
        return memoryview(b"")
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return as_bytes(flat[start:stop].cpu().numpy().data)


def open_weights(path: str | os.PathLike[str], limits: Limits | None = None) -> TensorSource:
    """The tensors of a checkpoint: a safetensors file, an index, or a folder that holds one of ``WEIGHT_FILES``.

    Raises:
        NotFound: there is none; the message lists what was looked for and what lies there instead.
        UnsupportedFormat: a pickle; those are never opened.
        HeaderError, IntegrityError: malformed, or index and shards disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    if path.suffix in _PICKLES:
        raise UnsupportedFormat(f"{path} may be a pickle, which can run any code when opened: it never is", _CONVERT)
    return ShardedSource(path, limits) if path.name.endswith(".index.json") else FileSource(path, limits)


def _find(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise Unavailable(f"{folder} cannot be listed: {error.strerror}", "look at its permissions: ls -ld") from None
    others = [name for name in present if name.endswith(".safetensors")]
    pickles = [name for name in present if name.endswith(_PICKLES)]
    lies = f"; it holds {', '.join(others[:3])}" if others else ""
    lies += f"; {', '.join(pickles[:3])} may be pickles, which are never opened (unpickled)" if pickles else ""
    hint = "name the file itself" if others else _CONVERT if pickles else "is it the right folder?"
    raise NotFound(f"no weights in {folder}: looked for {', '.join(WEIGHT_FILES)}{lies}", hint)
