"""FRoD: a weight in a basis that its likes share, with trained lengths and a sparse rotation (see ``source``).

``W' = U @ (S + diag(lengths)) @ basis.T``, where ``basis`` ``[in, in]`` is fixed and shared by the modules that play
the same part in every layer, ``S`` has trained values at fixed places, and ``U`` are the directions of the columns of
``W @ basis^-T``.  PEFT names the parts after the ends of module paths.  Where it did not save the bases
(``save_projection`` false) they follow from the weights of all layers together, which no single change can see: such
adapters are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.kind import (
    JSON,
    Completed,
    Field,
    Group,
    Kind,
    Leaf,
    Slot,
    Spelling,
    Surroundings,
    TensorRef,
    Touch,
)
from lorahub.deltas.peft_config import INERT
from lorahub.deltas.peft_values import PLACES
from lorahub.deltas.singular import expect_finite, whole_only
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["FROD", "Rebased", "category_of"]

_LEAST = 1e-12
"""A column of a shorter length than this has no direction."""

_NOT_SAVED = (
    "save_projection is false, so the bases that modules share are not in the file; they follow from the weights of "
    "all layers together"
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rebased(Delta):
    """``U @ (S + diag(lengths)) @ basis.T - W``.

    Attributes:
        lengths: ``[in]``; PEFT's ``frod_lambda_l``.
        values: ``[n]``, the elements of ``S``; PEFT's ``frod_lambda_s_values``.
        places: ``[2, n]`` whole numbers, their rows and columns.
        basis: ``[in, in]``; PEFT's ``frod_V``.
        category: which basis of the adapter it is.
    """

    lengths: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor
    basis: torch.Tensor
    category: str

    kind: ClassVar[str] = "frod"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Directions are found in float64 and kept in float32, as PEFT does; the rest is in the weight's dtype.

        Raises:
            BaseMismatch: the weight has other sizes.
            NotFinite: the weight holds NaN or infinity.
        """
        if weight.dim() != 2 or weight.shape[1] != self.lengths.shape[0]:
            raise BaseMismatch(
                f"a frod delta for {self.lengths.shape[0]} inputs was given a weight {list(weight.shape)}"
            )
        expect_finite(self.kind, weight)
        basis = self.basis.to(weight)
        rows, cols = self.places.to(weight.device, torch.long)
        middle = torch.diag(self.lengths.to(weight)).index_put((rows, cols), self.values.to(weight), accumulate=True)
        return self._directions(weight) @ middle @ basis.T - weight

    def _directions(self, weight: torch.Tensor) -> torch.Tensor:
        basis, wide = self.basis.to(weight.device, torch.float64), weight.detach().double()
        try:
            columns = torch.linalg.solve(basis, wide.T).T
        except RuntimeError:  # torch's LinAlgError: a basis without an inverse, where PEFT takes the next best
            columns = wide @ torch.linalg.pinv(basis, rtol=1e-6).T
        lengths = torch.linalg.vector_norm(columns, dim=0)
        return torch.where(lengths > _LEAST, columns / lengths, 0).float().to(weight)

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut.
        """
        whole_only(self.kind, rows, cols)
        return self

    def shape(self) -> None:
        """None: any number of outputs will do."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: the lengths that change nothing are the weight's own, and even they round.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind("a frod delta starts from its weight; a shape alone does not give one")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a frod delta changes matrices [out, in], not {list(shape)}")
        inputs, device = shape[1], generator.device
        lengths, values = (torch.randn(n, generator=generator, device=device) for n in (inputs, 2 * r))
        places = torch.randint(inputs, (2, 2 * r), generator=generator, device=device)
        return cls(lengths, values, places, torch.randn(inputs, inputs, generator=generator, device=device), "q")


def category_of(module: str) -> str:
    """What PEFT 0.21.2 calls the part that a module plays: the last two names of its path, or one of them."""
    parts = module.split(".")
    if len(parts) == 1:
        return parts[0]
    if parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole, of any number of outputs."""
    category = group.options["category"]
    slots = ("lengths", "values", f"places.{category}", f"basis.{category}")
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=False, local=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta.

    Raises:
        IntegrityError: a place outside the basis, or sizes that do not go together.
    """
    category = str(group.options["category"])
    places, basis = tensors[f"places.{category}"], tensors[f"basis.{category}"]
    n, inputs = tensors["values"].shape[0], tensors["lengths"].shape[0]
    if tuple(places.shape) != (2, n) or tuple(basis.shape) != (inputs, inputs):
        raise IntegrityError(
            f"{group.module}: {n} values and {inputs} lengths do not fit places {list(places.shape)} and a basis "
            f"{list(basis.shape)}"
        )
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < basis.shape[0]:
        raise IntegrityError(f"{group.module}: frod_s_indices.{category} reaches outside a basis of {basis.shape[0]}")
    return {"weight": Rebased(tensors["lengths"], tensors["values"], places, basis, category)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Rebased() as weight, **others} if not others:
            shared = {
                "places": weight.places,
                "basis": weight.basis,
                "size": torch.tensor([weight.basis.shape[0]] * 2, dtype=torch.long),
            }
            tensors = {"lengths": weight.lengths, "values": weight.values}
            tensors |= {f"{name}.{weight.category}": tensor for name, tensor in shared.items()}
            return tensors, {"category": weight.category}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "frod_dropout": INERT,
        "progressbar": INERT,
        "runtime_offload_base_weight": INERT,
        # how bases and places are made: they are read; without them the missing ones are what is to be said
        "projection_prng_key": INERT,
        "regularization_alpha": INERT,
        "save_projection": INERT,
        "sparse_rate": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(_config: Mapping[str, JSON], module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Which basis the module has, by its name as PEFT spells it."""
    return {"category": category_of(module)}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which PEFT makes room for the tensors of ``groups``.

    Raises:
        CannotCarry: under these names PEFT would look for other bases, or a basis has no share of places that PEFT
            counts from.
    """
    apart = sorted(name for name, group in groups.items() if category_of(name) != group.options["category"])
    if apart:
        raise CannotCarry(f"PEFT finds a module's basis by the end of its name, and would find others for {apart}")
    counts = {(g.slots["lengths"].shape[0], g.slots["values"].shape[0]) for g in groups.values()}
    rate = next((rate for rate in _rates(counts) if all(_placed(n, rate) == count for n, count in counts)), None)
    if rate is None:
        raise CannotCarry("PEFT has one sparse_rate for all modules of an adapter, and none gives these their places")
    return {
        "save_projection": True,
        "projection_prng_key": 0,  # of no effect: bases and places are stored
        "sparse_rate": rate,
        "regularization_alpha": 1e-3,
        "frod_dropout": 0.0,
        "init_weights": True,
    }


def _rates(counts: set[tuple[int, int]]) -> list[float]:
    """Shares that give one of the counts: exactly, and from halfway to the next, against rounding."""
    return [
        0.01,
        0.0,
        *(share / (n * n) for n, count in sorted(counts) for share in (count, count + 0.5) if share <= n * n),
    ]


def _placed(n: int, rate: float) -> int:
    """How many places PEFT 0.21.2 gives a basis of ``n``."""
    most = n * n - n
    return max(min(int(n * n * rate), most), 1 if rate > 0 and most else 0)


def complete(
    config: Mapping[str, JSON],
    groups: Sequence[Group],
    shared: Mapping[str, TensorRef],
    _base: Surroundings | None,
) -> Completed:
    """The groups as they are, where every one has its basis.

    Raises:
        UnsupportedKind: bases were not saved.
        IntegrityError: one is missing, or none uses it.
    """
    if not shared and config.get("save_projection") is False:
        raise UnsupportedKind(_NOT_SAVED, "save the adapter again, in PEFT, with save_projection=True")
    wanted = {f"{slot}.{group.options['category']}" for group in groups for slot in ("places", "basis", "size")}
    if missing := sorted(wanted - shared.keys()):
        raise IntegrityError(f"the file lacks {', '.join(missing)}, which its modules share")
    if unused := sorted(shared[slot].key for slot in shared.keys() - wanted):
        raise IntegrityError(f"{unused[0]} is shared by modules, and no module uses it")
    return Completed(groups=tuple(groups))


FROD = Kind(
    name="frod",
    title="FRoD",
    source="https://doi.org/10.1609/aaai.v40i31.39813",
    slots=(
        Slot(name="lengths", dims="in"),
        Slot(name="values", dims="n", prunable=True),
        Slot(name="basis", dims="in in", shared=True, many=True, optional=True),
        Slot(name="places", dims="2 n", shared=True, many=True, optional=True, holds="integers"),
        Slot(name="size", dims="2", shared=True, many=True, optional=True, holds="integers"),
    ),
    deltas=(Rebased,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="FROD",
            leaves=(
                Leaf(slot="lengths", suffix="frod_lambda_l"),
                Leaf(slot="values", suffix="frod_lambda_s_values"),
                Leaf(slot="basis", suffix="frod_V.*"),
                Leaf(slot="places", suffix="frod_s_indices.*"),
                Leaf(slot="size", suffix="frod_s_size.*"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in FRoD."""
    return [FROD]
