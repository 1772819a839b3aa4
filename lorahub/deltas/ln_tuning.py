"""LN tuning: a module's own parameters trained and stored whole, in practice those of normalisation layers.

https://arxiv.org/abs/2312.11420
PEFT puts a trained copy of the module in its place.  Beside ``replace`` this is a kind of its own because the file says
so: every tensor is spelled as a slot, and is written back as one.  Buffers of a copied module (the running statistics
of a batch normalisation) have no slot, so a file with them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_values import PLACES
from lorahub.errors import UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LN_TUNING", "Tuned"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tuned(Delta):
    """``W' = value``.

    Attributes:
        value: the new parameter, as stored.
    """

    value: torch.Tensor

    kind: ClassVar[str] = "ln_tuning"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``value - W`` in the weight's dtype."""
        expect_shape(self, weight)
        return self.value.to(weight) - weight

    def region(self, rows: Index, cols: Index) -> Self:
        """The same rows and columns of ``value``; a vector has rows only."""
        cut = take(self.value, rows, 0)
        return type(self)(take(cut, cols, 1) if cut.dim() > 1 else cut)

    def replacement(self) -> torch.Tensor:
        """``value`` as stored."""
        return self.value

    def shape(self) -> tuple[int, ...]:
        """The shape of ``value``."""
        return tuple(self.value.shape)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: what changes nothing is the parameter itself, and a shape does not tell it.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind(
            f"an ln_tuning delta that changes nothing is the parameter itself; a shape {list(shape)} does not tell it",
            "Make it from the parameter: Tuned(weight.clone()).",
        )

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values."""
        return cls(torch.randn(shape, generator=generator, device=generator.device))


def touches(group: Group) -> tuple[Touch, ...]:
    """The parameters that are there, replaced whole."""
    return tuple(
        Touch(parameter=name, dims=f"*{name}", slots=(name,), additive=False, replaces=True) for name in group.slots
    )


def build(_group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """One replacement for each slot, which has the parameter's name."""
    return {name: Tuned(tensor) for name, tensor in tensors.items()}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    found = {name: delta.value for name, delta in deltas.items() if isinstance(delta, Tuned)}
    if found.keys() != deltas.keys() or not {"weight"} <= found.keys() <= {"weight", "bias"}:
        return None
    return found, {}


def options(_config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """None: the tensors say everything."""
    return {}


def config(_groups: Mapping[str, Group]) -> dict[str, JSON]:
    """PEFT needs no more than the names of the modules."""
    return {}


FIELDS: Mapping[str, Field] = MappingProxyType({**PLACES})

LN_TUNING = Kind(
    name="ln_tuning",
    title="LN tuning",
    source="https://arxiv.org/abs/2312.11420",
    slots=(Slot(name="weight", dims="*weight"), Slot(name="bias", dims="*bias", optional=True)),
    deltas=(Tuned,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LN_TUNING",
            leaves=(
                Leaf(slot="weight", suffix="ln_tuning_layers.weight"),
                Leaf(slot="bias", suffix="ln_tuning_layers.bias"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LN tuning."""
    return [LN_TUNING]
