"""WaveFT: a change given by a few of its wavelet coefficients (https://arxiv.org/abs/2505.12532).

The coefficients lie at random positions, as in FourierFT.  ``scale * idwt2(S)``, one level of the inverse transform
with the quadrants of ``S`` as its bands; or ``scale * S`` itself where PEFT's ``use_idwt`` is false.  The families are
those whose filters PEFT 0.21.2 has: Haar's (``db1``, the default) and what ``wavelets`` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, one_for_all, patterned
from lorahub.deltas.peft_values import PLACES, integer, number, switch
from lorahub.deltas.scatter import amount, scattered
from lorahub.deltas.wavelets import LOW_PASS, synthesis
from lorahub.errors import IntegrityError, NotLocal, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["WAVEFT", "Wavelets"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Wavelets(Delta):
    """An inverse wavelet transform, or the coefficients themselves.

    Attributes:
        spectrum: ``[n]`` coefficients, real.
        scale: multiplies the change.
        seed: of the positions.
        inverted: the inverse transform is taken.
        family: of the wavelets; "db1" is Haar's.
    """

    spectrum: torch.Tensor
    scale: float
    seed: int
    inverted: bool = True
    family: str = "db1"

    kind: ClassVar[str] = "waveft"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The transform is taken in the weight's dtype, over a row or column of zeros more where a size is odd.

        Raises:
            BaseMismatch: the weight is no matrix, or has fewer elements than there are coefficients.
        """
        dense = scattered(self.kind, self.spectrum, self.seed, weight)
        if self.inverted and self.family != "db1":
            dense = synthesis(dense, self.family)
        elif self.inverted:
            rows, cols = weight.shape
            dense = haar(torch.nn.functional.pad(dense, (0, cols % 2, 0, rows % 2)))[:rows, :cols]
        return dense * self.scale

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut: the positions follow from the whole weight's shape, which a part does not tell.
        """
        if rows != ALL or cols != ALL:
            raise NotLocal("a waveft delta follows from the shape of the whole weight; it cannot be cut")
        return self

    def shape(self) -> None:
        """None: coefficients fit every weight with as many elements or more."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``r * (in + out)`` zeros, as many numbers as a LoRA has, at PEFT's scale and seed.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        return cls(torch.zeros(amount("waveft", shape, r), device=generator.device), 25.0, 777)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal coefficients, any seed, transformed or not, of two families.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        n = amount("waveft", shape, r)
        seed, inverted, other = (
            int(torch.randint(high, (), generator=generator, device=generator.device)) for high in (1000, 2, 2)
        )
        spectrum = torch.randn(n, generator=generator, device=generator.device)
        return cls(spectrum, 0.7, seed, bool(inverted), "sym3" if inverted and other else "db1")


def haar(bands: torch.Tensor) -> torch.Tensor:
    """One level of the inverse transform of ``[2 m, 2 n]``: each 2 x 2 square from one number of every quadrant."""
    m, n = bands.shape[0] // 2, bands.shape[1] // 2
    across, down = bands[:m, n:], bands[m:, :n]
    mean, both = bands[:m, :n], bands[m:, n:]
    # PEFT 0.21.2 takes the upper right quadrant for the differences between rows, the lower left for those of columns
    squares = torch.stack(
        [
            torch.stack([mean + across + down + both, mean + across - down - both], dim=2),
            torch.stack([mean - across + down - both, mean - across - down + both], dim=2),
        ],
        dim=1,
    )
    return squares.reshape(2 * m, 2 * n) / 2


def touches(_group: Group) -> tuple[Touch, ...]:
    """The weight, of any size, whole."""
    return (Touch(parameter="weight", dims="out in", slots=("spectrum",), additive=True, local=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    scale, seed = group.options["scale"], group.options["seed"]
    assert isinstance(scale, int | float)
    assert isinstance(seed, int)
    inverted, family = bool(group.options["inverted"]), str(group.options["family"])
    return {"weight": Wavelets(tensors["spectrum"], float(scale), seed, inverted, family)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Wavelets() as wavelets, **others} if not others:
            said: dict[str, JSON] = {name: getattr(wavelets, name) for name in ("scale", "seed", "inverted", "family")}
            return {"spectrum": wavelets.spectrum}, said
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "scaling": USED,
        "random_loc_seed": USED,
        "use_idwt": USED,
        "wavelet_family": USED,
        # the spectrum's length says these
        "n_frequency": INERT,
        "n_frequency_pattern": INERT,
        "proportional_parameters": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale and seed, and which transform is taken, if any.

    Raises:
        IntegrityError: the seed is none that torch takes.
        UnsupportedKind: a family whose filter is not known, here or in PEFT.
    """
    seed = integer(config, "random_loc_seed", 777)
    if not -(2**63) <= seed < 2**64:
        raise IntegrityError(f"random_loc_seed should be a 64-bit number, not {seed}")
    inverted, family = switch(config, "use_idwt", True), config.get("wavelet_family", "db1")
    if not inverted:
        family = "db1"  # of no effect
    if family != "db1" and family not in LOW_PASS:
        raise UnsupportedKind(f"{module}: wavelet_family is {family!r}, and known are db1, {', '.join(LOW_PASS)}")
    return {"scale": number(config, "scaling", 25.0), "seed": seed, "inverted": inverted, "family": family}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """One scale, seed and transform for all modules, and every module's number of coefficients.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once.
    """
    lengths = {name: group.slots["spectrum"].shape[0] for name, group in groups.items()}
    base, others = patterned(lengths)
    return {
        "n_frequency": base,
        "n_frequency_pattern": dict(others),
        "scaling": one_for_all(groups, "scaling", lambda group: group.options["scale"]),
        "random_loc_seed": one_for_all(groups, "random_loc_seed", lambda group: group.options["seed"]),
        "use_idwt": one_for_all(groups, "use_idwt", lambda group: group.options["inverted"]),
        "wavelet_family": one_for_all(groups, "wavelet_family", lambda group: group.options["family"]),
        "proportional_parameters": False,
        "init_weights": True,
    }


WAVEFT = Kind(
    name="waveft",
    title="WaveFT",
    source="https://arxiv.org/abs/2505.12532",
    slots=(Slot(name="spectrum", dims="n"),),
    deltas=(Wavelets,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="WAVEFT",
            leaves=(Leaf(slot="spectrum", suffix="waveft_spectrum"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in WaveFT."""
    return [WAVEFT]
