"""C3A: a change made of circulant blocks (https://arxiv.org/abs/2407.19342).

Block ``(i, j)`` of the change is ``kernel[i, j, (column - row) mod b] / in``: a circular convolution of ``b`` inputs.
PEFT computes it by Fourier transforms; every element is one stored number, and is taken as it is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, positions, then
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED
from lorahub.deltas.peft_values import PLACES, by_dotted_end, integer
from lorahub.errors import BaseMismatch, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["C3A", "Circulant"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Circulant(Delta):
    """Circulant blocks.

    Attributes:
        kernel: ``[out / b, in / b, b]``, each block's first row.
        rows, cols: cuts of the whole change.
    """

    kernel: torch.Tensor
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "c3a"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Divided by the inputs of the whole weight, as PEFT does, also where the delta is cut."""
        expect_shape(self, weight)
        m, n, b = self.kernel.shape
        at = torch.arange(b, device=weight.device)
        blocks = self.kernel.to(weight)[:, :, (at[None] - at[:, None]) % b]
        whole = blocks.permute(0, 2, 1, 3).reshape(m * b, n * b)
        return cut(cut(whole, self.rows, 0), self.cols, 1) / (n * b)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """To a linear layer: a circular correlation for each block, by Fourier transforms, in float32 at least."""
        if site.op != "linear" or self.rows or self.cols:
            return None
        if not x.numel():
            return torch.zeros_like(y)  # before PyTorch 2.9, MKL has no transform of nothing
        _, n, b = self.kernel.shape
        wide = torch.promote_types(y.dtype, torch.float32)
        inputs = torch.fft.rfft(torch.unflatten(x.to(wide), -1, (n, b)))
        kernel = torch.fft.rfft(self.kernel.to(y.device, wide))
        outputs: torch.Tensor = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", inputs, kernel.conj()), n=b)
        return (outputs / (n * b)).flatten(-2).to(y.dtype)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def shape(self) -> tuple[int, int]:
        """``[out, in]``, of what is left."""
        m, n, b = self.kernel.shape
        device = torch.device("cpu")
        return positions(m * b, self.rows, device).numel(), positions(n * b, self.cols, device).numel()

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros, in the largest blocks that fit; there is no rank.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        return cls(torch.zeros(kernel_shape(shape), device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal numbers, as large as undoes the division.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        return cls(torch.randn(kernel_shape(shape), generator=generator, device=generator.device) * shape[1])


def kernel_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The fewest blocks for a matrix of ``shape``.

    Raises:
        BaseMismatch: it is no matrix.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a c3a delta changes matrices [out, in], not {list(shape)}")
    b = math.gcd(*shape)
    return shape[0] // b, shape[1] // b, b


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    m, n, b = group.slots["kernel"].shape
    return (Touch(parameter="weight", dims=f"{m * b} {n * b}", slots=("kernel",), additive=True),)


def build(_group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Circulant(tensors["kernel"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut no longer has whole blocks."""
    match dict(deltas):
        case {"weight": Circulant(kernel=kernel, rows=(), cols=()), **others} if not others:
            return {"kernel": kernel}, {}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "block_size": USED,
        "block_size_pattern": USED,
        "fan_in_fan_out": INERT,  # early releases had it; PEFT adapts no layer that stores [in, out]
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """None: the tensor says everything, and a block size stated for all modules must agree with it.

    Raises:
        IntegrityError: the config states another block size.
    """
    kernel = slots["kernel"]
    stated = integer(config, "block_size", kernel.shape[2])
    if stated != kernel.shape[2] and not config.get("block_size_pattern"):
        raise IntegrityError(f"{module}: block_size is {stated}, and {kernel.key} has blocks of {kernel.shape[2]}")
    return {}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """Every module's block size, where PEFT finds it.

    Raises:
        CannotCarry: sizes that PEFT cannot tell apart by name.
    """
    sizes = {name: group.slots["kernel"].shape[2] for name, group in groups.items()}
    base, others = by_dotted_end(sizes, "block_size_pattern")
    return {"block_size": base, "block_size_pattern": others, "init_weights": True}


C3A = Kind(
    name="c3a",
    title="C3A",
    source="https://arxiv.org/abs/2407.19342",
    slots=(Slot(name="kernel", dims="m n b"),),
    deltas=(Circulant,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="C3A",
            leaves=(Leaf(slot="kernel", suffix="c3a_kernel"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in C3A."""
    return [C3A]
