"""What a module's call does with one of its parameters, as data: the operation, its geometry, where batch rows lie.

A change that is added to a module's output needs to know how the output comes from the weight.  That is written down
here for three operations; where a parameter is used in any other way there is no site, and whoever applies a change
puts the changed weight in the parameter's place.  Weights are logical, [out, in, *k].  Knows no modules, no adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorahub.lazy import torch

__all__ = ["Site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How a module's output depends on its weight: linearly, through ``call``.

    Attributes:
        op: "linear": ``x @ W.T`` over the last axis; "conv": a convolution in ``len(kernel)`` dimensions; "embedding":
            the rows of W at the positions x; "bias": W [out] itself, at every place that ``kernel`` counts the axes of.
        transposed: the module keeps its weight [in, out].
        kernel, stride, dilation: of a convolution, one number for each dimension.
        padding: of a convolution, likewise, or "same" or "valid".
        around: of a convolution that pads with anything but zeros: what ``torch.nn.functional.pad`` takes.
        padding_mode: "zeros", or a mode of ``torch.nn.functional.pad`` ("circular", "reflect", "replicate").
        groups: of a convolution.
        rows: the axis of input and output along which the batch's rows lie; None where they cannot be told apart, as
            where tokens are sorted by expert.
    """

    op: Literal["linear", "conv", "embedding", "bias"]
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    around: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    rows: int | None = 0

    def call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the module computes from ``x`` with ``weight`` [out, in, *k] and no bias; same dtype but for ids.

        Of a bias, what broadcasts to that.
        """
        if self.op == "linear":
            return torch.nn.functional.linear(x, weight)
        if self.op == "embedding":
            return torch.nn.functional.embedding(x, weight)
        if self.op == "bias":
            return weight.reshape(-1, *(1 for _ in self.kernel))
        return self._convolve(x, weight, self.groups)

    def inner(self, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """The first of the two steps of ``call(x, up @ down)``: what has rank ``r`` in the place of ``out``.

        Args:
            x: the module's input.
            up: [out, r].
            down: [r, in * prod(k)].

        Returns:
            [..., r]; of a convolution [batch, groups * r, *places].
        """
        if self.op == "linear":
            return torch.nn.functional.linear(x, down)
        if self.op == "embedding":
            return torch.nn.functional.embedding(x, up)
        kernels = down.reshape(down.shape[0], -1, *self.kernel)
        # every group of inputs meets the same kernels; `outer` keeps the groups apart
        many = kernels.repeat(self.groups, *(1 for _ in kernels.shape[1:])) if self.groups > 1 else kernels
        return self._convolve(x, many, self.groups)

    def outer(self, inner: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """The second step: ``outer(inner(x, up, down), up, down)`` is ``call(x, up @ down)``."""
        if self.op == "linear":
            return torch.nn.functional.linear(inner, up)
        if self.op == "embedding":
            return inner @ down
        points = up.reshape(*up.shape, *(1 for _ in self.kernel))
        return _convolution(len(self.kernel))(inner, points, groups=self.groups)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x, padding = torch.nn.functional.pad(x, self.around, mode=self.padding_mode), (0,) * len(self.kernel)
        return _convolution(len(self.kernel))(
            x, weight, stride=self.stride, padding=padding, dilation=self.dilation, groups=groups
        )


def _convolution(dimensions: int) -> Callable[..., torch.Tensor]:
    found: Callable[..., torch.Tensor] = getattr(torch.nn.functional, f"conv{dimensions}d")
    return found
