"""torchao: weights that are tensor subclasses, in modules of the ordinary classes.

Those on a plain grid of codes, scales and zeros are written back; the others (packed 4-bit, microscaling, opaque
layouts) are read by the library's own ``dequantize`` and run live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, final

from lorahub.errors import Incompatible
from lorahub.files.header import TensorInfo
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.grid import Grid
from lorahub.storages.storage import Coded, Held, Storage, class_names, own_parameters
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TorchAO", "lorahub_storages"]

_BASE = "torchao.utils.TorchAOBaseTensor"


def _int8(weight: Any) -> tuple[int, float, float]:
    half = 2 if weight.reduce_range else 1
    return 8, -128 // half, 127 // half


def _float8(weight: Any) -> tuple[int, float, float]:
    most = float(torch.finfo(weight.qdata.dtype).max)
    return 8, -most, most


def _intx(weight: Any) -> tuple[int, float, float]:
    bits = int(str(weight.target_dtype).removeprefix("torch.int"))
    return bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


_GRIDS: Mapping[str, Callable[[Any], tuple[int, float, float]]] = MappingProxyType(
    {"Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _intx}
)
"""Class of a weight on a plain grid -> its bits, its least and its largest code."""


@final
class TorchAO:
    """torchao."""

    name = "torchao"
    library = "torchao"

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """Every parameter that is one of its tensors."""
        return {
            name: _Weight(module, name)
            for name, value in own_parameters(module).items()
            if value is not None and _BASE in class_names(value)
        }

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """Refuse: its checkpoints hold the library's own classes, taken apart.

        Raises:
            Incompatible: it is this library's.
        """
        if settings.get("quant_method") != "torchao":
            return None
        raise Incompatible("a checkpoint of torchao is read by torchao only", "load it and give the live model")


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter that is a tensor subclass of torchao."""

    module: Any
    name: str

    hidden = ()
    scales = "kept"

    @property
    def _tensor(self) -> Any:
        return own_parameters(self.module)[self.name]

    @property
    def _kind(self) -> str:
        return type(self._tensor).__name__

    @property
    def storage(self) -> str:
        what = str(self._tensor.target_dtype).removeprefix("torch.") if self._kind.startswith("Intx") else self._kind
        return f"torchao {what.removesuffix('Tensor').lower()}"

    @property
    def bits(self) -> int:
        if self._kind in _GRIDS:
            return _GRIDS[self._kind](self._tensor)[0]
        return 4 if "4" in self._kind else 8

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        return ""

    @property
    def identity(self) -> int:
        return id(self._tensor)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._tensor.device
        return device

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._tensor.dtype
        return dtype

    @property
    def refusal(self) -> str:
        return "" if self._kind in _GRIDS else f"torchao's {self._kind} packs its codes in a way of its own"

    def read(self) -> Coded:
        if self._kind in _GRIDS:
            return self._grid().copy()
        try:
            return _Opaque(self._tensor.dequantize().to(torch.float32))
        except NotImplementedError as error:
            raise Incompatible(
                f"{self.refusal}, and torchao cannot read it back", "load the base without quantisation"
            ) from error

    def write(self, coded: Coded) -> None:
        assert isinstance(coded, Grid)
        grid = self._grid()
        grid.codes.copy_(coded.codes)
        grid.scale.copy_(coded.scale)

    def _grid(self) -> Grid:
        """The tensors within, not a copy."""
        weight = self._tensor
        _, low, high = _GRIDS[self._kind](weight)
        return Grid(
            codes=weight.qdata,
            scale=weight.scale,
            block=tuple(weight.block_size),
            low=low,
            high=high,
            zero=getattr(weight, "zero_point", None),
        )


@final
@dataclass(frozen=True, slots=True)
class _Opaque:
    """Numbers whose stored form stays where it is."""

    numbers: torch.Tensor

    @property
    def nbytes(self) -> int:
        return int(prod(self.numbers.shape) * 4)

    def values(self) -> torch.Tensor:
        return self.numbers.clone()

    def requantised(self, values: torch.Tensor) -> Coded:
        raise Incompatible("this stored form can be read and not written", "attach the adapter live instead")

    def mark(self) -> int:
        return 0


@hookimpl
def lorahub_storages() -> list[Storage]:
    """The storage of this file."""
    return [TorchAO()]
