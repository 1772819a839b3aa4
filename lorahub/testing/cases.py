"""What the laws are tried on: random deltas of a kind, with weights that they fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.errors import BaseMismatch
from lorahub.lazy import torch
from lorahub.testing.judging import hold

__all__ = ["RANK", "SEEDS", "SHAPES", "Case", "cases", "groups"]

SHAPES: tuple[tuple[int, ...], ...] = ((8, 6), (6, 6), (6, 4, 3), (4, 6, 3, 2), (4, 3, 2, 2, 2), (8,))
"""Linear (one of them square), convolutions in one to three dimensions, a vector."""

RANK = 3
SEEDS = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A delta and a weight that it fits.

    Attributes:
        name: for messages: kind, class, shape, seed.
        delta: a random instance.
        other: a second one for the same shape.
        weight: float64, standard normal.
        generator: seeded by the case, for whatever else a law draws.
    """

    name: str
    delta: Delta
    other: Delta
    weight: torch.Tensor
    generator: torch.Generator


def cases(kind: Kind) -> Iterator[Case]:
    """Every delta class of the kind on every shape that it takes.

    Raises:
        AssertionError: a class takes none of the shapes, or makes a change too small for any law to notice.
    """
    for cls in kind.deltas:
        made = 0
        for shape, seed in itertools.product(SHAPES, SEEDS):
            generator = torch.Generator().manual_seed(seed)
            try:
                delta, other = (cls.example(shape, r=RANK, generator=generator) for _ in range(2))
            except BaseMismatch:
                continue
            made += 1
            name = f"{kind.name}: {cls.__name__} on {list(shape)}, seed {seed}"
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            size = float((delta.delta(weight).norm() / weight.norm()).item())
            hold(size > 1e-2, f"{name}: example changes the weight by {size:.1e} of its norm, too little to test with")
            yield Case(name=name, delta=delta, other=other, weight=weight, generator=generator)
        hold(made > 0, f"{kind.name}: {cls.__name__}.example refuses every shape the laws know")


def groups(kind: Kind) -> Iterator[tuple[Case, str, Group, dict[str, torch.Tensor]]]:
    """Every example that dissolves, with its parameter, as the group a file would hold.

    Kinds differ in what they change: the weight, the bias, or always both alike.
    """
    for case in cases(kind):
        both = [("weight", "bias")] if case.weight.dim() > 1 else []
        for parameters in (("weight",), ("bias",), *both):
            dissolved = kind.dissolve(dict.fromkeys(parameters, case.delta))
            if dissolved is not None:
                tensors, options = dissolved
                yield case, parameters[0], _group(kind, tensors, options), tensors
                break


def _group(kind: Kind, tensors: Mapping[str, torch.Tensor], options: Mapping[str, JSON]) -> Group:
    slots = {
        name: TensorRef(key=f"layers.0.proj.{name}", shape=tuple(tensor.shape), dtype="F32")
        for name, tensor in tensors.items()
    }
    return Group(module="layers.0.proj", kind=kind.name, slots=slots, options=dict(options))
