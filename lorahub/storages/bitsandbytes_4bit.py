"""bitsandbytes nf4 and fp4: 16 code points, one absolute maximum for each block, these quantised again or not.

Source: Dettmers et al., QLoRA, arXiv 2305.14314.  On a CPU with bfloat16 instructions the first forward pass in eval
mode lays the codes out anew and rounds the maxima, in the module itself; both layouts are read here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Self, final

from lorahub.errors import IntegrityError
from lorahub.files.dtypes import from_torch
from lorahub.files.header import TensorInfo
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.grid import bits_sum
from lorahub.storages.storage import Coded, Held, Storage, class_names, library, own_parameters
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BitsAndBytes4bit", "FourBit", "lorahub_storages"]

_PARAMETER = "bitsandbytes.nn.modules.Params4bit"
_STATE = ".quant_state.bitsandbytes__"
_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_OPS: Mapping[str, Literal["linear", "embedding"]] = MappingProxyType(
    {"Linear4bit": "linear", "LinearNF4": "linear", "LinearFP4": "linear", "Embedding4bit": "embedding"}
)
"""Class of a module -> what it does; a class derived from one may do anything."""


@final
class BitsAndBytes4bit:
    """bitsandbytes nf4 and fp4."""

    name = "bitsandbytes-4bit"
    library = "bitsandbytes"

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """Every parameter that is quantised: a linear module's weight, an embedding's."""
        return {
            name: _Weight(module, name)
            for name, value in own_parameters(module).items()
            if value is not None and _PARAMETER in class_names(value) and getattr(value, "quant_state", None)
        }

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """The weights with a ``quant_state`` beside them."""
        if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
            return None
        found = [name for name in tensors if _STATE in name]
        return tuple(_stored(name.partition(_STATE)[0], name, tensors, read) for name in found)


@final
@dataclass(frozen=True, slots=True)
class FourBit:
    """Two codes to a byte, and what they mean.

    Attributes:
        data: as stored.
        state: the library's ``QuantState``.
        again: the maxima are quantised too.
        container: dtype in which the bytes are stored.
    """

    data: torch.Tensor
    state: Any
    again: bool
    container: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and maxima."""
        return int(self.data.nbytes + self.state.absmax.nbytes)

    def values(self) -> torch.Tensor:
        """The weight in float32, rounded to the dtype that the library gives it in."""
        plain = self.plain()
        state = plain.state
        if class_names(state)[0].startswith("bitsandbytes."):  # of a live model, whose library is there and faster
            values: torch.Tensor = library("bitsandbytes").functional.dequantize_4bit(plain.data, state)
            return values.to(torch.float32)
        maxima = state.absmax
        if state.nested:
            inner = state.state2
            spread = inner.absmax.repeat_interleave(inner.blocksize)[: maxima.numel()]
            maxima = inner.code[maxima.reshape(-1).long()] * spread + state.offset
        values, size = plain.points(), state.blocksize
        if values.numel() % size:
            values *= maxima.to(torch.float32).reshape(-1).repeat_interleave(size)[: values.numel()]
        else:
            values.view(-1, size).mul_(maxima.to(torch.float32).reshape(-1, 1))
        return values.reshape(tuple(state.shape)).to(state.dtype).to(torch.float32)

    def requantised(self, values: torch.Tensor) -> Self:
        """Other values with fresh maxima, by the library; from float32, with no rounding on the way."""
        given = self.plain().state
        data, state = library("bitsandbytes").functional.quantize_4bit(
            values.contiguous(),
            blocksize=given.blocksize,
            compress_statistics=self.again,
            quant_type=given.quant_type,
            quant_storage=self.container,
        )
        state.dtype = given.dtype
        return replace(self, data=data, state=state)

    def mark(self) -> int:
        """A number made of the codes alone: the maxima are rounded by the first forward pass on some CPUs."""
        codes = self.plain().codes()
        return bits_sum(codes) + (bits_sum(codes[1::2]) << 32)

    def points(self) -> torch.Tensor:
        """The point of the grid that each code means, two to a byte looked up at a time."""
        grid = self.state.code.to(torch.float32)
        byte = torch.arange(256, device=grid.device)
        pairs = torch.stack([grid[byte >> 4], grid[byte & 15]], 1)
        packed = self.data.reshape(-1).view(torch.uint8)
        return pairs.index_select(0, packed.to(torch.int32)).reshape(-1)[: prod(self.state.shape)]

    def codes(self) -> torch.Tensor:
        """One code for each element, in the order of the weight's rows; of data in the layout of files."""
        packed = self.data.reshape(-1).view(torch.uint8)
        return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: prod(self.state.shape)]

    def plain(self) -> Self:
        """The same in the layout of files, where it is in that of a CPU with bfloat16 instructions."""
        if not getattr(self.state, "packing_format_for_cpu", False):
            return self
        state = copy.copy(self.state)
        state.original_nested = False  # the maxima were made plain for good, and are not quantised again to be read
        functional = library("bitsandbytes").functional
        data, state = functional._convert_weight_packed_for_cpu_inverse(  # noqa: SLF001 - the layout is the library's own
            self.data.view(torch.uint8), state
        )
        state.absmax = state.absmax.T.reshape(-1).float()
        return replace(self, data=data, state=state)


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """A ``Params4bit`` of a module."""

    module: Any
    name: str

    bits = 4
    hidden = ()
    scales = "fresh"
    refusal = ""

    @property
    def _parameter(self) -> Any:
        return own_parameters(self.module)[self.name]

    @property
    def storage(self) -> str:
        return f"bitsandbytes {self._parameter.quant_state.quant_type}"

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        name = class_names(self.module)[0]
        return _OPS.get(name.rpartition(".")[2], "") if name.startswith("bitsandbytes.") else ""

    @property
    def identity(self) -> int:
        return id(self._parameter)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._parameter.device
        return device

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._parameter.quant_state.shape)

    @property
    def dtype(self) -> torch.dtype:
        state = self._parameter.quant_state
        dtype: torch.dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
        return dtype

    def read(self) -> FourBit:
        """The tensors themselves: the library replaces them and writes to none, and so does ``write``."""
        weight = self._parameter
        return FourBit(
            data=weight.data,
            state=copy.copy(weight.quant_state),
            again=bool(weight.compress_statistics),
            container=weight.quant_storage,
        )

    def arrange(self) -> None:
        """In evaluation the library packs weights for the bfloat16 instructions of some CPUs, and leaves them so."""
        if getattr(self._parameter.quant_state, "packing_format_for_cpu", False):
            self.write(self.read().plain())

    def write(self, coded: Coded) -> None:
        assert isinstance(coded, FourBit)
        weight = self._parameter
        state = copy.copy(coded.state)  # the first forward pass on some CPUs changes it
        weight.data, weight.quant_state = coded.data, state
        if getattr(self.module, "quant_state", None) is not None:
            self.module.quant_state = state


def _stored(name: str, state: str, tensors: Mapping[str, TensorInfo], read: Read) -> Stored:
    """One weight of a checkpoint, whose shape, block sizes and dtype are JSON in the bytes of a tensor."""
    try:
        said = json.loads(bytes(read(state).tolist()))
        about = _About(
            shape=tuple(int(size) for size in said["shape"]),
            blocksize=int(said["blocksize"]),
            dtype=str(said["dtype"]),
            inner=int(said["nested_blocksize"]) if "nested_blocksize" in said else None,
            offset=float(said.get("nested_offset", 0)),
        )
        code = from_torch(getattr(torch, about.dtype))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{state} does not say how {name} is stored: {error}", "fetch the file again") from None
    wanted = _ENTRIES if about.inner else _ENTRIES[:2]
    parts = (name, *(f"{name}.{entry}" for entry in wanted))
    if lacking := [part for part in parts if part not in tensors]:
        raise IntegrityError(f"{name} is stored in 4 bits, and {lacking[0]} is missing", "fetch the files again")
    return Stored(name=name, shape=about.shape, dtype=code, parts=(*parts, state), values=partial(_values, name, about))


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What a checkpoint says of a weight: sizes of blocks, and of blocks of maxima where these are quantised too."""

    shape: tuple[int, ...]
    blocksize: int
    dtype: str
    inner: int | None
    offset: float


def _values(name: str, about: _About, read: Read) -> torch.Tensor:
    inner = None
    if about.inner:
        inner = SimpleNamespace(
            absmax=read(f"{name}.nested_absmax"), code=read(f"{name}.nested_quant_map"), blocksize=about.inner
        )
    state = SimpleNamespace(
        absmax=read(f"{name}.absmax"),
        code=read(f"{name}.quant_map"),
        blocksize=about.blocksize,
        shape=about.shape,
        dtype=getattr(torch, about.dtype),
        nested=inner is not None,
        state2=inner,
        offset=about.offset,
    )
    data = read(name)
    return FourBit(data=data, state=state, again=inner is not None, container=data.dtype).values()


@hookimpl
def lorahub_storages() -> list[Storage]:
    """The storage of this file."""
    return [BitsAndBytes4bit()]
