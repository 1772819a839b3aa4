"""FourierFT: a change given by a few of its Fourier coefficients (https://arxiv.org/abs/2405.03003).

``scale * Re(ifft2(S))`` with ``S`` zero but at random positions, which are not stored but follow from a seed in the
config and the weight's whole shape, so the delta finds them when it sees a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, by_dotted_end, integer, number
from lorahub.deltas.scatter import amount, scattered
from lorahub.errors import IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["FOURIERFT", "Spectrum"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Spectrum(Delta):
    """The real part of an inverse Fourier transform.

    Attributes:
        spectrum: ``[n]`` coefficients, real.
        scale: multiplies the change.
        seed: of the positions.
    """

    spectrum: torch.Tensor
    scale: float
    seed: int

    kind: ClassVar[str] = "fourierft"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The transform is taken in the weight's dtype.

        Raises:
            BaseMismatch: the weight is no matrix, or has fewer elements than there are coefficients.
        """
        dense = scattered(self.kind, self.spectrum, self.seed, weight)
        change: torch.Tensor = torch.fft.ifft2(dense).real * self.scale
        return change

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut: the positions follow from the whole weight's shape, which a part does not tell.
        """
        if rows != ALL or cols != ALL:
            raise NotLocal("a fourierft delta follows from the shape of the whole weight; it cannot be cut")
        return self

    def shape(self) -> None:
        """None: coefficients fit every weight with as many elements or more."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``r * (in + out)`` zeros, as many numbers as a LoRA has, at PEFT's scale and seed.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        return cls(torch.zeros(amount("fourierft", shape, r), device=generator.device), 150.0, 777)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal coefficients, any seed.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        n, seed = (
            amount("fourierft", shape, r),
            int(torch.randint(1000, (), generator=generator, device=generator.device)),
        )
        return cls(torch.randn(n, generator=generator, device=generator.device), 5.7, seed)


def touches(_group: Group) -> tuple[Touch, ...]:
    """The weight, of any size, whole."""
    return (Touch(parameter="weight", dims="out in", slots=("spectrum",), additive=True, local=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    scale, seed = group.options["scale"], group.options["seed"]
    assert isinstance(scale, int | float)
    assert isinstance(seed, int)
    return {"weight": Spectrum(tensors["spectrum"], float(scale), seed)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Spectrum(spectrum=spectrum, scale=scale, seed=seed), **others} if not others:
            return {"spectrum": spectrum}, {"scale": scale, "seed": seed}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "scaling": USED,
        "random_loc_seed": USED,
        # the spectrum's length says these
        "n_frequency": INERT,
        "n_frequency_pattern": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale and seed.

    Raises:
        IntegrityError: the seed is none that torch takes.
    """
    seed = integer(config, "random_loc_seed", 777)
    if not -(2**63) <= seed < 2**64:
        raise IntegrityError(f"random_loc_seed should be a 64-bit number, not {seed}")
    return {"scale": number(config, "scaling", 150.0), "seed": seed}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """One scale and one seed for all modules, and every module's number of coefficients where PEFT finds it.

    Raises:
        CannotCarry: modules differ in scale or seed, or PEFT cannot tell their numbers apart by name.
    """
    lengths = {name: group.slots["spectrum"].shape[0] for name, group in groups.items()}
    base, others = by_dotted_end(lengths, "n_frequency_pattern")
    return {
        "n_frequency": base,
        "n_frequency_pattern": others,
        "scaling": one_for_all(groups, "scaling", lambda group: group.options["scale"]),
        "random_loc_seed": one_for_all(groups, "random_loc_seed", lambda group: group.options["seed"]),
        "init_weights": True,
    }


FOURIERFT = Kind(
    name="fourierft",
    title="FourierFT",
    source="https://arxiv.org/abs/2405.03003",
    slots=(Slot(name="spectrum", dims="n"),),
    deltas=(Spectrum,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="FOURIERFT",
            leaves=(Leaf(slot="spectrum", suffix="fourierft_spectrum"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in FourierFT."""
    return [FOURIERFT]
