"""bitsandbytes ``Linear8bitLt``: int8 codes and one absolute maximum for each row.

The maxima are at the parameter until the first forward pass, which moves them into the module's state.  A layer that
keeps 16-bit weights and quantises as it runs (``has_fp16_weights``) holds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from lorahub.errors import IntegrityError
from lorahub.files.header import TensorInfo
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.grid import Grid
from lorahub.storages.storage import Coded, Held, Storage, class_names, own_parameters
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BitsAndBytesInt8", "lorahub_storages"]

_MODULE = "bitsandbytes.nn.modules.Linear8bitLt"
_MAXIMA = ".SCB"
_REACH = 127  # a row's maximum is this code


@final
class BitsAndBytesInt8:
    """bitsandbytes int8."""

    name = "bitsandbytes-int8"
    library = "bitsandbytes"

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """Its weight, once it is quantised."""
        weight = own_parameters(module).get("weight") if _MODULE in class_names(module) else None
        return {} if weight is None or weight.dtype != torch.int8 else {"weight": _Weight(module)}

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """The weights with maxima (``SCB``) beside them."""
        if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_8bit"):
            return None
        modules = [name.removesuffix(_MAXIMA) for name in tensors if name.endswith(_MAXIMA)]
        return tuple(_stored(module, tensors) for module in modules)


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight of a ``Linear8bitLt``."""

    module: Any

    storage = "bitsandbytes int8"
    bits = 8
    hidden = ()
    scales = "kept"
    refusal = ""

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        return "linear" if class_names(self.module)[0] == _MODULE else ""

    @property
    def identity(self) -> int:
        return id(self.module.weight)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.weight.device
        return device

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.module.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        bias = self.module.bias
        return torch.float16 if bias is None else bias.dtype  # the codes came from float16, whatever was given

    def read(self) -> Coded:
        return self._grid().copy()

    def write(self, coded: Coded) -> None:
        assert isinstance(coded, Grid)
        grid = self._grid()
        grid.codes.copy_(coded.codes)
        grid.scale.copy_(coded.scale)

    def _grid(self) -> Grid:
        """What the module computes with, not a copy."""
        weight = self.module.weight
        maxima = weight.SCB if weight.SCB is not None else self.module.state.SCB
        return Grid(
            codes=weight.data,
            scale=maxima.reshape(-1, 1),
            block=(1, weight.shape[1]),
            low=-_REACH,
            high=_REACH,
            unit=_REACH,
        )


def _stored(module: str, tensors: Mapping[str, TensorInfo]) -> Stored:
    weight, maxima = f"{module}.weight", f"{module}{_MAXIMA}"
    if weight not in tensors or tensors[weight].dtype != "I8":
        raise IntegrityError(f"{maxima} is there, and {weight} is not, or holds no int8", "fetch the files again")
    shape = tuple(tensors[weight].shape)

    def values(read: Read) -> torch.Tensor:
        codes = read(weight)
        scale = read(maxima).reshape(-1, 1)
        return Grid(codes=codes, scale=scale, block=(1, codes.shape[1]), low=-_REACH, high=_REACH, unit=_REACH).values()

    parts = tuple(name for name in (weight, maxima, f"{module}.weight_format") if name in tensors)
    return Stored(name=weight, shape=shape, dtype="", parts=parts, values=values)


@hookimpl
def lorahub_storages() -> list[Storage]:
    """The storage of this file."""
    return [BitsAndBytesInt8()]
