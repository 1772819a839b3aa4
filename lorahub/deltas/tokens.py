"""Trainable tokens: single rows of an embedding replaced, as in PEFT (no paper; see ``source``).

Files hold the new rows; which rows they are is said in the config alone.  PEFT has them as an adapter type and, under
``trainable_token_indices``, beside LoRA.  Where the base ties the embedding to its output, PEFT keeps them tied: the
rows are replaced in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import counts_from_the_end
from lorahub.deltas.delta import ALL, Delta, Index, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all
from lorahub.deltas.peft_values import PLACES
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["TOKENS", "Rows"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rows(Delta):
    """``W'[places[j]] = values[j]``; every other row stays.

    Attributes:
        values: ``[n, d]``.
        places: n different rows.
    """

    values: torch.Tensor
    places: tuple[int, ...]

    kind: ClassVar[str] = "tokens"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``values`` less the rows they replace, in the weight's dtype.

        Raises:
            BaseMismatch: the weight is no matrix of that width, or lacks one of the rows.
        """
        if (
            weight.dim() != 2
            or weight.shape[1] != self.values.shape[1]
            or weight.shape[0] <= max(self.places, default=-1)
        ):
            raise BaseMismatch(
                f"rows up to {max(self.places, default=-1)} of width {self.values.shape[1]} were given a weight "
                f"{list(weight.shape)}"
            )
        places = torch.tensor(self.places, dtype=torch.long, device=weight.device)
        return torch.zeros_like(weight).index_copy(0, places, self.values.to(weight) - weight[places])

    def region(self, rows: Index, cols: Index) -> Self:
        """The replaced rows that are among ``rows``, renumbered.

        Raises:
            NotLocal: rows are counted from the end, which is not known here.
        """
        values = take(self.values, cols, 1)
        if rows == ALL:
            return type(self)(values, self.places)
        if counts_from_the_end(rows):
            raise NotLocal("a tokens delta does not know how many rows its weight has, to count from the end of them")
        kept = [(here, source) for source, place in enumerate(self.places) for here in _found(rows, place)]
        chosen = take(values, tuple(source for _, source in kept), 0)
        return type(self)(chosen, tuple(here for here, _ in kept))

    def shape(self) -> None:
        """None: how many rows there are beside the replaced ones is not known."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: rows that change nothing are the weight's own, and a shape does not tell them.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind(
            f"rows that change nothing are the weight's own, which a shape {list(shape)} does not tell",
            "Make it from the weight: Rows(weight[places].clone(), places).",
        )

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values for ``r`` rows, in no order.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a tokens delta changes matrices [rows, width], not {list(shape)}")
        places = torch.randperm(shape[0], generator=generator, device=generator.device)[:r].tolist()
        return cls(torch.randn(len(places), shape[1], generator=generator, device=generator.device), tuple(places))


def _found(rows: Index, place: int) -> list[int]:
    """Where ``rows`` puts one row; a slice does not count from the end."""
    if not isinstance(rows, slice):
        return [here for here, row in enumerate(rows) if row == place]
    start, step = rows.start or 0, rows.step or 1
    inside = place >= start and (rows.stop is None or place < rows.stop) and (place - start) % step == 0
    return [(place - start) // step] if inside else []


def places_of(group: Group) -> tuple[int, ...]:
    """The rows that the group's options name."""
    places = group.options["places"]
    assert isinstance(places, list)
    return tuple(place for place in places if isinstance(place, int))


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, which must have all the rows."""
    dims = f">{max(places_of(group), default=-1) + 1} width"
    tied = f"rows {', '.join(map(str, places_of(group)))}"
    return (Touch(parameter="weight", dims=dims, slots=("values",), additive=False, tied=tied),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Rows(tensors["values"], places_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Rows(values=values, places=places), **others} if not others:
            return {"values": values}, {"places": list(places)}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "token_indices": USED,
        "modules_to_save": Field(refuse="PEFT keeps no modules beside trainable tokens"),
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Which rows are replaced.

    Raises:
        IntegrityError: ``token_indices`` is no list of different rows, one for each that the file holds.
    """
    values, given = slots["values"], config.get("token_indices")
    places = given if isinstance(given, list) else []
    known = all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in places)
    if not isinstance(given, list) or not known or len({*map(str, places)}) != len(places):
        raise IntegrityError(f"{module}: token_indices should list different rows, not be {str(given)[:80]}")
    if len(places) != values.shape[0]:
        raise IntegrityError(
            f"{module}: token_indices lists {len(places)} rows, and {values.key} has {values.shape[0]}"
        )
    return {"places": list(places)}


def options_beside(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Which rows are replaced, beside LoRA: a list, for the input embedding, or a list for each of several modules.

    Raises:
        IntegrityError: ``trainable_token_indices`` names no rows for the module, or another number of them.
    """
    given = config.get(_BESIDE)
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if module.endswith(name)), None)  # PEFT's rule
    values = slots["values"]
    places = given if isinstance(given, list) else []
    known = all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in places)
    if not places or not known or len({*map(str, places)}) != len(places):
        raise IntegrityError(f"{module}: {_BESIDE} should list different rows, not be {str(given)[:80]}")
    if len(places) != values.shape[0]:
        raise IntegrityError(f"{module}: {_BESIDE} lists {len(places)} rows, and {values.key} has {values.shape[0]}")
    return {"places": [*places]}


def config_beside(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The rows of each module."""
    return {_BESIDE: {name: group.options["places"] for name, group in groups.items()}}


_BESIDE = "trainable_token_indices"


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The same rows for all modules.

    Raises:
        CannotCarry: modules differ in them.
    """
    return {
        "token_indices": one_for_all(groups, "token_indices", lambda group: group.options["places"]),
        "init_weights": True,
    }


TOKENS = Kind(
    name="tokens",
    title="trainable tokens",
    source="https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    slots=(Slot(name="values", dims="n width"),),
    deltas=(Rows,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="TRAINABLE_TOKENS",
            leaves=(Leaf(slot="values", suffix="trainable_tokens_delta"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(Leaf(slot="values", suffix="token_adapter.trainable_tokens_delta"),),
            fields=MappingProxyType({_BESIDE: USED}),
            options=options_beside,
            config=config_beside,
            beside=True,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in trainable tokens."""
    return [TOKENS]
