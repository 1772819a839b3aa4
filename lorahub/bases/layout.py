"""Where a delta lands: pieces of a target mapped onto regions of stored parameters.

A layout is data that a framework declares; nothing here guesses from shapes.  Most targets are one whole parameter.
A fused projection gives a target a band of rows; GPT-2's Conv1D stores its weight transposed; a mixture of experts
stacks many weights on a leading axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorahub.deltas.delta import ALL, Index, take
from lorahub.lazy import torch

__all__ = ["Layout", "Piece", "Region", "Target"]


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """The unit of change: one parameter of one module.

    Attributes:
        component: "" or the part of a pipeline ("unet", "text_encoder").
        module: dotted path; canonical names of the base once one is known, else as the file spells it.
        parameter: "weight", "bias", or any parameter name of that module.
    """

    component: str
    module: str
    parameter: str

    @property
    def name(self) -> str:
        """``component:module.parameter``, without the empty parts."""
        dotted = f"{self.module}.{self.parameter}" if self.module else self.parameter
        return f"{self.component}:{dotted}" if self.component else dotted


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a tensor, and how to look at it.

    Attributes:
        expert: position on a leading axis that is taken first, or None.
        transposed: the remaining first two axes are exchanged before rows and columns are taken.
        rows: which rows (axis 0) after that.
        cols: which columns (axis 1) after that; ``ALL`` for vectors.
    """

    expert: int | None = None
    transposed: bool = False
    rows: Index = field(default_factory=lambda: ALL)  # a factory, since slices are unhashable before Python 3.12
    cols: Index = field(default_factory=lambda: ALL)

    @property
    def whole(self) -> bool:
        """Whether this is the tensor as it is."""
        return self.expert is None and not self.transposed and self.rows == ALL and self.cols == ALL

    @property
    def is_view(self) -> bool:
        """Whether ``of`` gives a view that can be written through."""
        return isinstance(self.rows, slice) and isinstance(self.cols, slice)

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """The region of ``stored``, logical orientation [out, in, *k]; a view where ``is_view``."""
        tensor = stored if self.expert is None else stored[self.expert]
        if self.transposed:
            tensor = tensor.transpose(0, 1)
        tensor = take(tensor, self.rows, 0)
        return take(tensor, self.cols, 1) if tensor.dim() > 1 else tensor

    def put(self, stored: torch.Tensor, value: torch.Tensor) -> None:
        """Write ``value`` (shape of ``of(stored)``) into the region of ``stored``, in place."""
        if self.is_view:
            self.of(stored).copy_(value)
            return
        tensor = stored if self.expert is None else stored[self.expert]
        if self.transposed:
            tensor = tensor.transpose(0, 1)
        rows, cols = (
            torch.arange(size)[index] if isinstance(index, slice) else torch.tensor(index)
            for index, size in ((self.rows, tensor.shape[0]), (self.cols, tensor.shape[1] if tensor.dim() > 1 else 1))
        )
        if tensor.dim() > 1:
            tensor[rows[:, None], cols[None, :]] = value.to(tensor.dtype)
        else:
            tensor[rows] = value.to(tensor.dtype)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of ``of`` for a stored shape."""
        sizes = list(stored if self.expert is None else stored[1:])
        if self.transposed:
            sizes[0], sizes[1] = sizes[1], sizes[0]
        for axis, index in enumerate((self.rows, self.cols)[: len(sizes)]):
            sizes[axis] = len(range(*index.indices(sizes[axis]))) if isinstance(index, slice) else len(index)
        return tuple(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One region of a delta landing in one region of a stored parameter."""

    parameter: str
    of_delta: Region = Region()
    of_parameter: Region = Region()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All pieces of one target; together they cover the delta exactly once."""

    target: Target
    pieces: tuple[Piece, ...]
