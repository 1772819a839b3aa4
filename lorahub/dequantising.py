"""A quantised checkpoint as the numbers that it stands for: what an adapter that was trained on it was trained with.

The result is an ordinary checkpoint in 16 bits, to merge into like any other.  The library that wrote the quantised one
is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lorahub import strict_json
from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseRef
from lorahub.bases.open import index_base, survey_base
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.casting import DTYPES
from lorahub.errors import NotFinite, UnsupportedFormat, UsageError, WriteFailed
from lorahub.fetching import Progress, quiet
from lorahub.files.atomic import atomic_write, new_staging, replace_dir
from lorahub.files.dtypes import DTYPES as CODES
from lorahub.files.dtypes import to_torch
from lorahub.files.tensors import FileSource, tensor_bytes
from lorahub.files.writer import StreamWriter
from lorahub.lazy import torch
from lorahub.plugins import load_registry
from lorahub.storages.stored import Read, Settings, Stored

__all__ = ["Dequantised", "dequantise"]

_FLOATS = ("BF16", "F16", "F32")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantised:
    """What was written.

    Attributes:
        out: where.
        storage: the registered storage that read the weights.
        weights: how many were quantised.
        dtypes: the dtypes that they have now.
        rounded: the largest part of a weight's size that was lost where ``dtypes`` cannot hold its numbers; 0 where
            all are exact.
        bytes_read: of the weights' files.
        bytes_written: of the weights' files.
    """

    out: Path
    storage: str
    weights: int
    dtypes: tuple[str, ...]
    rounded: float
    bytes_read: int
    bytes_written: int

    def document(self) -> dict[str, JSON]:
        """The report as JSON-ready values."""
        return {
            "out": str(self.out),
            "storage": self.storage,
            "weights": self.weights,
            "dtypes": list(self.dtypes),
            "rounded": self.rounded,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


def dequantise(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Progress = quiet,
) -> Dequantised:
    """Write a quantised checkpoint as an ordinary one, with its configuration, tokenizer and template files.

    Args:
        base: its folder.
        out: the new folder; absent, or an empty one.
        dtype: what the weights that were quantised are stored in ("bfloat16", "float16", "float32"); by default what
            their library gives them in, as the files or the configuration say.
        progress: called with (bytes written, in all).

    Raises:
        UsageError: there is no such ``dtype``, or the base is not quantised.
        UnsupportedFormat: nobody knows how it is quantised.
        Incompatible: it is quantised in a way that only its own library reads.
        IntegrityError: what a weight is made of is not all there.
        NotFinite: a weight is not finite in ``dtype``.
        WriteFailed: ``out`` is there already, or there is no space or no permission; nothing is left.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is no dtype for weights", f"one of {', '.join(DTYPES)}")
    files, out = survey_base(base), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WriteFailed(f"{out} exists already", "name a new folder, or remove it yourself")
    settings = files.config.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        raise UsageError(f"{files.folder} is not quantised, so far as its config.json says")
    staging = new_staging(out)
    try:
        with ExitStack() as opened:
            sources = {name: opened.enter_context(FileSource(files.folder / name)) for name in sorted(files.headers)}
            writing = _Writing(files, sources, settings, DTYPES[dtype] if dtype else "")
            writing.run(staging, progress)
        _write_rest(files, staging, writing)
        report = writing.report(out)
        replace_dir(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone by then, or what a failure left
    return report


@final
class _Writing:
    """One checkpoint on its way."""

    def __init__(
        self, files: BaseFiles, sources: Mapping[str, FileSource], settings: Mapping[str, object], dtype: str
    ) -> None:
        self._files, self._sources, self._given = files, sources, dtype
        self._where = {name: file for file, header in files.headers.items() for name in header.tensors}
        self.storage, found = _claimed(files, settings, self._read)
        self._stored = {each.name: each for each in found}
        self._turned = _turned(files)
        self._inside = {part for each in found for part in each.parts} - self._stored.keys()
        self._rounded = 0.0
        self.sizes: dict[str, int] = {}  # name in the result -> bytes
        self.home: dict[str, str] = {}  # name in the result -> file

    def _read(self, name: str) -> torch.Tensor:
        return self._sources[self._where[name]].read(name)

    def dtype(self, stored: Stored) -> str:
        """What a weight is written in."""
        said = self._files.config.get("dtype") or self._files.config.get("torch_dtype")
        known = next((code for code, each in CODES.items() if each.torch == said and code in _FLOATS), "")
        return self._given or stored.dtype or known or "F16"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the weights are written in."""
        return tuple(sorted({self.dtype(each) for each in self._stored.values()}))

    def run(self, folder: Path, progress: Progress) -> None:
        layouts = {file: dict(self._entries(file)) for file in sorted(self._files.headers)}
        total = sum(self._size(*form) for entries in layouts.values() for form in entries.values())
        done = 0
        for file, entries in layouts.items():
            header = self._files.headers[file]
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with StreamWriter(folder / file, entries, header.metadata) as writer:
                for name, form in entries.items():
                    if name in self._stored:
                        writer.write(name, 0, tensor_bytes(self._values(name)))
                    else:
                        start, size = header.span(name)
                        writer.copy_from(name, self._files.folder / file, start, size)
                    self.sizes[name], self.home[name] = self._size(*form), file
                    done += self.sizes[name]
                    progress(done, total)
                writer.commit()

    def _entries(self, file: str) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        for name, info in self._files.headers[file].tensors.items():
            if stored := self._stored.get(name):
                yield name, (self.dtype(stored), stored.shape[::-1] if name in self._turned else stored.shape)
            elif name not in self._inside:
                yield name, (info.dtype, tuple(info.shape))

    @staticmethod
    def _size(code: str, shape: tuple[int, ...]) -> int:
        count = CODES[code].bits
        for size in shape:
            count *= size
        return count // 8

    def _values(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        values = stored.values(self._read)
        values = values.T if name in self._turned else values
        result = values.to(to_torch(self.dtype(stored)))
        if not bool(torch.isfinite(result).all()):
            raise NotFinite(
                f"{name} is not finite in {self.dtype(stored)}", "give a dtype with more range: bfloat16, float32"
            )
        size = float(values.norm())
        lost = float((result.to(torch.float32) - values).norm())
        self._rounded = max(self._rounded, lost / size if size else 0.0)
        return result.contiguous()

    def report(self, out: Path) -> Dequantised:
        return Dequantised(
            out=out,
            storage=self.storage,
            weights=len(self._stored),
            dtypes=self.dtypes,
            rounded=self._rounded,
            bytes_read=sum(header.size for header in self._files.headers.values()),
            bytes_written=sum(self.sizes.values()),
        )


def _turned(files: BaseFiles) -> frozenset[str]:
    """The weights that the architecture stores [in, out]; those that were quantised were turned around for it."""
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    plain = replace(files, configs={**files.configs, "config.json": config})
    _, index = index_base(plain, BaseRef(folder=str(files.folder)), load_registry().frameworks)
    return frozenset(info.stored_as for info in index.parameters.values() if info.transposed)


def _claimed(files: BaseFiles, settings: Settings, read: Read) -> tuple[str, tuple[Stored, ...]]:
    for name, storage in load_registry().storages.items():
        found = storage.stored(settings, files.tensors, read)
        if found is not None:
            if not found:
                break
            return name, found
    method = settings.get("quant_method", "unnamed")
    raise UnsupportedFormat(
        f"nobody knows how the weights in {files.folder} are quantised (method {method})",
        "load it with its own library, dequantise it there, and save that",
    )


def _write_rest(files: BaseFiles, staging: Path, writing: _Writing) -> None:
    """Configuration without its quantisation, index, and what goes along."""
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    if len(writing.dtypes) == 1:
        said = CODES[writing.dtypes[0]].torch
        config |= {key: said for key in ("dtype", "torch_dtype") if key in config}
    atomic_write(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for name in files.others:
        if name.endswith(_INDEX):
            index = {"metadata": {"total_size": sum(writing.sizes.values())}, "weight_map": dict(writing.home)}
            atomic_write(staging / name, strict_json.pretty(index).encode())
    framework, _ = index_base(survey_base(staging), BaseRef(folder=str(staging)), load_registry().frameworks)
    for name in framework.companions(files):
        if name != "config.json":
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(staging / name, (files.folder / name).read_bytes())
