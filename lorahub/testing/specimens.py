"""What the laws of formats are tried on: adapters of every kind as a format writes them, and files that others wrote.

Files lie in memory only: a header laid out as it would be written, configs, and the tensors by key.  Knows no spelling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self, final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import BaseMismatch, CannotCarry
from lorahub.files.dtypes import from_torch, stored_shape
from lorahub.files.emit import lay_out
from lorahub.files.header import Header, TensorInfo
from lorahub.files.tensors import FileSource
from lorahub.formats.assembly import build_deltas
from lorahub.formats.format import AdapterFiles, Format, Reading
from lorahub.formats.survey import survey
from lorahub.lazy import torch
from lorahub.plugins import load_registry
from lorahub.testing.cases import SHAPES

__all__ = [
    "FormatCase",
    "Specimen",
    "adapters",
    "differing",
    "foreign",
    "header_of",
    "specimens",
    "spelled",
    "unknown_adapter",
    "writes",
]

Deltas = Mapping[Target, Delta]
Hints = dict[str, JSON]

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_RANK = 2
"""At which the scale of an example is an alpha over the rank, exactly."""

_MODULES = ("layers.2.q", "layers.10.k", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCase:
    """What a format is tried with; as it stands, every registered kind under names of its own.

    Attributes:
        kinds: further kinds, which need not be registered.
        modules: three modules to spell, for a format that has no word for any others.
        hints: what writing is told, for a format that does not write without.
        folders: adapters in this format that others wrote; one at least for a format that only reads.
    """

    kinds: Sequence[Kind] = ()
    modules: tuple[str, ...] = _MODULES
    hints: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    folders: Sequence[Path] = ()

    @property
    def every_kind(self) -> dict[str, Kind]:
        """The registered kinds and the further ones, by name."""
        return {**load_registry().kinds, **{kind.name: kind for kind in self.kinds}}

    @property
    def kinds_given(self) -> tuple[Kind, ...]:
        """The same, as formats are given them."""
        return tuple(self.every_kind.values())

    @property
    def every_format(self) -> Mapping[str, Format]:
        """The registered formats by name."""
        return load_registry().formats


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """An adapter's files.

    Attributes:
        label: for messages.
        files: headers and configs.
        file: the weights file.
        tensors: by key; empty for files of others.
        index: what the spelling took for granted of the base.
    """

    label: str
    files: AdapterFiles
    file: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    index: BaseIndex | None = None

    @property
    def header(self) -> Header:
        """Of the weights file."""
        return self.files.headers[self.file]


def adapters(kind: Kind, case: FormatCase, *, briefly: bool = False) -> Iterator[tuple[Deltas, Hints]]:
    """Adapters of one module and of three, on weights, biases and both, in every dtype; without and with roles.

    ``briefly``: of all modules at once, in float32 and on the first shape that the kind takes.
    """
    for cls in kind.deltas:
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(len(shape))
            try:
                examples = [cls.example(shape, r=_RANK, generator=generator) for _ in case.modules]
            except BaseMismatch:
                continue
            if briefly:
                yield from ((deltas, {}) for deltas in _placed(examples, case.modules, shape))
                break
            for dtype in _DTYPES:
                cast = [_cast(each, getattr(torch, dtype)) for each in examples]
                for deltas in _placed(cast, case.modules, shape):
                    first = {target: each for target, each in deltas.items() if target.module == case.modules[0]}
                    yield deltas, {}
                    yield first, {}
                    roles: JSON = {target.name: "embedding" for target in deltas}
                    yield deltas, {"roles": roles}


def _placed(examples: Sequence[Delta], modules: Sequence[str], shape: tuple[int, ...]) -> Iterator[Deltas]:
    both = [("weight", "bias")] if len(shape) > 1 else []
    for parameters in (("weight",), ("bias",), *both):
        yield {
            Target("", module, parameter): delta
            for module, delta in zip(modules, examples, strict=True)
            for parameter in parameters
        }


def _cast(delta: Delta, dtype: torch.dtype) -> Delta:
    values = {each.name: getattr(delta, each.name) for each in fields(delta)}  # type: ignore[arg-type]  # a dataclass
    return type(delta)(**values | {name: tensor.to(dtype) for name, tensor in delta.tensors().items()})


def writes(carrier: Format, case: FormatCase, deltas: Deltas, hints: Hints) -> bool:
    """Whether the format has words for the adapter."""
    return spelled(carrier, case, deltas, hints) is not None


def spelled(carrier: Format, case: FormatCase, deltas: Deltas, hints: Hints) -> Specimen | None:
    """The files that the format writes, or None where it refuses."""
    try:
        written = carrier.write(deltas, case.kinds_given, {**case.hints, **hints})
    except CannotCarry:
        return None
    entries = {}
    for key, tensor in written.tensors.items():
        code = from_torch(tensor.dtype)
        entries[key] = (code, stored_shape(code, tensor.shape))
    numbers = {
        key: bytes(tensor.detach().reshape(1).view(torch.uint8).tolist())
        for key, tensor in written.tensors.items()
        if tensor.numel() == 1
    }
    files = AdapterFiles(
        folder=Path(),
        headers={written.file: lay_out(written.file, entries, written.metadata)},
        configs=json.loads(json.dumps(written.configs)),
        numbers={written.file: numbers},
    )
    kinds = " and ".join(sorted({delta.kind for delta in deltas.values()}))
    return Specimen(
        label=f"{kinds} as it writes it",
        files=files,
        file=written.file,
        tensors=written.tensors,
        index=written.index,
    )


def specimens(carrier: Format, case: FormatCase, *, briefly: bool = False) -> Iterator[Specimen]:
    """One adapter of each kind that the format writes (``briefly``: the first of them), and the case's folders."""
    for kind in case.every_kind.values():
        found = (spelled(carrier, case, deltas, hints) for deltas, hints in adapters(kind, case, briefly=True))
        first = next((each for each in found if each is not None), None)
        if first is not None:
            yield first
            if briefly:
                return
    for folder in case.folders:
        files = survey(folder)
        file = carrier.read(files, case.kinds_given, None).file
        numbers = {}
        with FileSource(folder / file) as source:
            for key, info in files.headers[file].tensors.items():
                if info.stop - info.start <= _LARGEST_NUMBER:
                    numbers[key] = bytes(source.read(key).contiguous().reshape(-1).view(torch.uint8).tolist())
        known = AdapterFiles(
            folder=files.folder,
            headers=files.headers,
            configs=files.configs,
            others=files.others,
            numbers={file: numbers},
        )
        yield Specimen(label=f"the folder {folder.name}", files=known, file=file)


_LARGEST_NUMBER = 8
"""Bytes of a tensor of one element."""


def differing(reading: Reading, specimen: Specimen, deltas: Deltas, case: FormatCase) -> list[str]:
    """The targets that the files do not give back bit for bit."""
    again, _ = build_deltas(reading, specimen.tensors.__getitem__, case.every_kind, specimen.index)
    return [target.name for target in {**deltas, **again} if not _same(deltas.get(target), again.get(target))]


def _same(one: Delta | None, other: Delta | None) -> bool:
    if one is None or other is None or type(one) is not type(other):
        return False
    for each in fields(one):  # type: ignore[arg-type]  # every delta is a dataclass
        ours, theirs = getattr(one, each.name), getattr(other, each.name)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                return False
        elif ours != theirs:
            return False
    return True


def header_of(header: Header, tensors: Mapping[str, TensorInfo]) -> Header:
    """The same file with other tensors."""
    return Header(
        tensors=MappingProxyType(dict(tensors)),
        metadata=header.metadata,
        data_start=header.data_start,
        size=header.size,
    )


def foreign() -> Iterator[tuple[str, AdapterFiles]]:
    """What is no adapter of any format: (what it is, its files)."""
    yield "a folder without weights", _files({}, {})
    shapes = {"model.embed_tokens.weight": (9, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4), "lm_head": (9, 4)}
    config: dict[str, JSON] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    yield "a base model", _files({"model.safetensors": shapes}, {"config.json": config})
    yield "tensors with names of no meaning", _files({"data.safetensors": {"x": (2, 3), "y.z": (4, 4)}}, {})


def _files(
    weights: Mapping[str, Mapping[str, tuple[int, ...]]], configs: Mapping[str, dict[str, JSON]]
) -> AdapterFiles:
    headers = {
        file: lay_out(file, {name: ("F32", shape) for name, shape in shapes.items()}, {})
        for file, shapes in weights.items()
    }
    return AdapterFiles(folder=Path(), headers=headers, configs=configs)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Unknown(Delta):
    """A change of a kind that is registered nowhere."""

    number: torch.Tensor

    kind: ClassVar[str] = "law-unknown"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        return torch.full_like(weight, float(self.number))

    def shape(self) -> None:
        return

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        return cls(torch.zeros(()))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        return cls(torch.ones(()))


def unknown_adapter(modules: Sequence[str]) -> Deltas:
    """Two changes of a kind that is registered nowhere."""
    return {Target("", module, "weight"): _Unknown(torch.ones(())) for module in modules[:2]}
