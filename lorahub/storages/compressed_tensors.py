"""compressed-tensors: linear modules with a quantisation scheme, compressed or run with simulated quantisation.

A compressed 8-bit module keeps codes and scales; the library expands it before the model's first forward pass, and from
then on rounds the expanded weight to the same grid in every pass.  Both states are read and written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self, final

from lorahub.errors import Incompatible, IntegrityError
from lorahub.files.header import TensorInfo
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.grid import Grid, bits_sum
from lorahub.storages.storage import Coded, Held, Storage, class_names, device_of, own_parameters, own_tensors
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CompressedTensors", "lorahub_storages"]

_SCHEME = "compressed_tensors.quantization.quant_scheme"
_ALONGSIDE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
    "weight_shape",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)
_SCALE = ".weight_scale"
_FLOAT_BITS = 8
_BLOCKS = {"tensor", "channel", "group", "block"}  # strategies with scales that lie as the blocks do


@final
class CompressedTensors:
    """compressed-tensors."""

    name = "compressed-tensors"
    library = "compressed-tensors"

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """The weight of a module with a scheme for weights."""
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or type(scheme).__module__ != _SCHEME or scheme.weights is None:
            return {}
        return {"weight": _Weight(module)}

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """The 8-bit weights with scales beside them.

        Raises:
            Incompatible: a weight is packed, or its scales lie in the order of activations.
        """
        if settings.get("quant_method") != "compressed-tensors":
            return None
        for name in tensors:
            if name.endswith((".weight_packed", ".weight_g_idx", ".weight_global_scale")):
                raise Incompatible(
                    f"{name} belongs to a weight that compressed-tensors packs in a way of its own",
                    "load it with dequantize=True in its configuration, and save that",
                )
        modules = [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]
        return tuple(_stored(module, tensors, _structure(settings)) for module in modules)


@final
@dataclass(frozen=True, slots=True)
class _Expanded:
    """A weight in 16 or 32 bits that the module rounds to its grid in each pass, as it lies, and its grid."""

    weight: torch.Tensor
    grid: Grid

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + self.grid.scale.nbytes)

    def values(self) -> torch.Tensor:
        return self.grid.requantised(self.weight.to(torch.float32)).values()

    def requantised(self, values: torch.Tensor) -> Self:
        grid = self.grid.requantised(values)
        return replace(self, weight=grid.values().to(self.weight.dtype), grid=grid)

    def mark(self) -> int:
        return bits_sum(self.grid.codes) + bits_sum(self.grid.scale)


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight of a module with a scheme."""

    module: Any

    scales = "kept"

    @property
    def _args(self) -> Any:
        return self.module.quantization_scheme.weights

    @property
    def storage(self) -> str:
        return f"compressed-tensors {'fp' if self._float else 'int'}{self.bits}"

    @property
    def bits(self) -> int:
        return int(self._args.num_bits)

    @property
    def _float(self) -> bool:
        return str(getattr(self._args.type, "value", self._args.type)) == "float"

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        """The library's own ``forward`` stands in the module; around that of the class, it rounds."""
        return "linear" if class_names(self.module)[0] == "torch.nn.modules.linear.Linear" else ""

    @property
    def identity(self) -> int:
        return id(self.module)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        weight = own_parameters(self.module).get("weight")
        return tuple(weight.shape) if weight is not None else (self.module.out_features, self.module.in_features)

    @property
    def dtype(self) -> torch.dtype:
        weight = own_parameters(self.module).get("weight")
        known = weight if weight is not None and weight.dtype.itemsize > 1 else self.module.weight_scale
        dtype: torch.dtype = known.dtype
        return dtype

    @property
    def hidden(self) -> tuple[str, ...]:
        return tuple(sorted(own_tensors(self.module).intersection(_ALONGSIDE)))

    @property
    def refusal(self) -> str:
        strategy = str(getattr(self._args.strategy, "value", self._args.strategy))
        if own_parameters(self.module).get("weight") is None:
            return f"its codes are packed as {self.storage}; running the model once makes the library expand them"
        if self._float and self.bits != _FLOAT_BITS:
            return f"{self.storage} is written by its own library only"
        if strategy not in _BLOCKS or hasattr(self.module, "weight_g_idx"):
            return f"its scales lie by {strategy}, or in an order of activations"
        return ""

    def read(self) -> Coded:
        if self.refusal:
            raise Incompatible(
                f"a weight cannot be read, because {self.refusal}", "load the base with its weights dequantised"
            )
        weight, grid = self.module.weight.data, self._grid()
        if weight.dtype == grid.codes.dtype:
            return grid.copy()
        return _Expanded(weight.clone(), grid.copy())

    def write(self, coded: Coded) -> None:
        weight = self.module.weight.data
        grid = coded.grid if isinstance(coded, _Expanded) else coded
        assert isinstance(grid, Grid)
        if weight.dtype == grid.codes.dtype:
            weight.copy_(grid.codes)
        elif isinstance(coded, _Expanded):
            weight.copy_(coded.weight)
        else:  # the library has expanded it since it was read, and expands by its scale's dtype
            weight.copy_(grid.values_in(grid.scale.dtype))
        self.module.weight_scale.data.copy_(grid.scale.reshape(self.module.weight_scale.shape))

    def _grid(self) -> Grid:
        """The grid, with the codes that lie there or that an expanded weight is rounded to."""
        weight, scale, args = self.module.weight.data, self.module.weight_scale.data, self._args
        low, high = -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        dtype: torch.dtype = torch.int8
        if self._float:
            dtype = torch.float8_e4m3fn
            high = float(torch.finfo(dtype).max)
            low = -high
        zero = getattr(self.module, "weight_zero_point", None)
        grid = Grid(
            codes=weight if weight.dtype == dtype else torch.empty(weight.shape, dtype=dtype, device=weight.device),
            scale=scale,
            block=_block(args, weight.shape, scale),
            low=low,
            high=high,
            zero=None if zero is None or args.symmetric else zero.data,
        )
        return grid if weight.dtype == dtype else _coded(grid, weight)


def _coded(grid: Grid, weight: torch.Tensor) -> Grid:
    """The codes an expanded weight is rounded to; scales stay, since the module rounds with these."""
    return replace(grid.requantised(weight.to(torch.float32)), scale=grid.scale)


def _block(args: Any, shape: torch.Size, scale: torch.Tensor) -> tuple[int, ...]:
    """The shape of the part of a weight that one scale is for."""
    if args.block_structure is not None:
        return tuple(args.block_structure)
    if scale.numel() == 1:
        return tuple(shape)
    return tuple(-(-size // count) for size, count in zip(shape, scale.shape, strict=True))


def _structure(settings: Settings) -> tuple[int, ...]:
    """The blocks that all groups of a configuration agree on; none where there are no blocks, or several sorts."""
    groups = settings.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        sizes = weights.get("block_structure") if isinstance(weights, Mapping) else None
        found.add(tuple(sizes) if isinstance(sizes, list) and all(isinstance(size, int) for size in sizes) else ())
    return found.pop() if len(found) == 1 else ()


def _stored(module: str, tensors: Mapping[str, TensorInfo], structure: tuple[int, ...]) -> Stored:
    weight, scale, zero = f"{module}.weight", f"{module}{_SCALE}", f"{module}.weight_zero_point"
    if weight not in tensors or tensors[weight].dtype not in ("F8_E4M3", "I8"):
        raise IntegrityError(f"{scale} is there, and {weight} is not, or is not in 8 bits", "fetch the files again")
    shape, scales = tuple(tensors[weight].shape), tuple(tensors[scale].shape)
    by_block = prod(scales) > 1
    block = (
        shape
        if not by_block
        else structure or tuple(size // count for size, count in zip(shape, scales, strict=False) if count)
    )
    if by_block and scales != tuple(-(-size // each) for size, each in zip(shape, block, strict=False) if each):
        raise IntegrityError(f"{scale} is {list(scales)} for a weight {list(shape)}", "fetch the files again")

    def values(read: Read) -> torch.Tensor:
        zeros = read(zero) if zero in tensors else None
        grid = Grid(codes=read(weight), scale=read(scale), block=block, low=0, high=0, zero=zeros)
        return grid.values()

    parts = tuple(name for name in (weight, *(f"{module}.{each}" for each in _ALONGSIDE)) if name in tensors)
    return Stored(name=weight, shape=shape, dtype=tensors[scale].dtype, parts=parts, values=values)


@hookimpl
def lorahub_storages() -> list[Storage]:
    """The storage of this file."""
    return [CompressedTensors()]
