"""PiSSA and OLoRA: factors that began as part of the weight, which was taken from it before training.

``W' = W - first(W) + scale * up @ down``.  For PiSSA (https://arxiv.org/abs/2404.02948) ``first`` is the part of ``W``
with the r largest singular values; for OLoRA (https://arxiv.org/abs/2406.01775) ``scale`` times the first r columns of
Q and rows of R, where ``W = Q @ R``.  PEFT takes the part away again whenever it loads such an adapter; it does not
depend on the signs of singular vectors.  The other starts that change the base cannot be found again from files:
``pissa_niter_N`` and ``lora_ga`` are drawn at random or from data, ``corda`` from data, and ``loftq`` quantises the
base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import lora, peft_lora
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.factors import dissolve_factors, example_factors, product, scale_of
from lorahub.deltas.kind import (
    JSON,
    Completed,
    Field,
    Group,
    Kind,
    Slot,
    Spelling,
    Surroundings,
    TensorRef,
    Touch,
)
from lorahub.deltas.peft_config import USED, one_for_all
from lorahub.deltas.singular import Factors, expect_sizes, first_of_qr, largest, whole_only
from lorahub.errors import BaseMismatch, CannotCarry, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PISSA", "Moved"]


def qr_scaled(weight: torch.Tensor, r: int, scale: float) -> Factors:
    """The first r columns of Q, times the scale, and rows of R."""
    up, down = first_of_qr(weight, r)
    return up * scale, down


_TAKEN: Mapping[str, Callable[[torch.Tensor, int, float], Factors]] = MappingProxyType(
    {"pissa": lambda weight, r, _scale: largest(weight, r), "olora": qr_scaled}
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moved(Delta):
    """``scale * up @ down - first(W)``.

    Attributes:
        up: ``[out, r]``; PEFT's ``lora_B``.
        down: ``[r, in]``; PEFT's ``lora_A``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)``.
        start: "pissa" or "olora".
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    start: str

    kind: ClassVar[str] = "pissa"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype, the decomposition too.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        left, right = self.taken(weight)
        return product(self.up, self.down, self.scale, weight) - left @ right

    def taken(self, weight: torch.Tensor) -> Factors:
        """What was taken from the weight, as factors of rank r.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        r = self.down.shape[0]
        expect_sizes(self.kind, weight, self.up.shape[0], self.down.shape[1], r)
        return _TAKEN[self.start](weight, r, self.scale)

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut.
        """
        whole_only(self.kind, rows, cols)
        return self

    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self.up.shape[0], self.down.shape[1]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: what changes nothing is part of the weight itself, which a shape does not tell.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind("a pissa delta starts from its weight; a shape alone does not give one")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, either start.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a pissa delta changes matrices [out, in], not {list(shape)}")
        up, down = example_factors("pissa", shape, min(r, *shape), generator)
        return cls(up, down, 0.7, list(_TAKEN)[int(torch.randint(2, (), generator=generator, device=generator.device))])


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole; an embedding has plain LoRA."""
    if group.role == "embedding":
        return lora.touches(group)
    rank = group.slots["down"].shape[0]
    return (Touch(parameter="weight", dims="out in", slots=("up", "down"), additive=False, local=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    if group.role == "embedding":
        return lora.build(group, tensors)
    return {"weight": Moved(tensors["up"], tensors["down"], scale_of(group), str(group.options["start"]))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Moved() as weight, **others} if not others:
            tensors, options = dissolve_factors(weight.up, weight.down, weight.scale)
            return tensors, {**options, "start": weight.start}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**peft_lora.FIELDS, "init_lora_weights": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank, and the start.

    Raises:
        IntegrityError: see ``peft_lora.lora_options``.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    return {**peft_lora.lora_options(config, module, slots), "start": str(config["init_lora_weights"]).lower()}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: two starts, an embedding, or a scale that no alpha gives.
    """
    if embeddings := sorted(name for name, group in groups.items() if group.role == "embedding"):
        raise CannotCarry(f"PEFT starts no embedding from its own weight: {', '.join(embeddings)}")
    start = one_for_all(groups, "init_lora_weights", lambda group: group.options["start"])
    return {**peft_lora.config(groups), "init_lora_weights": start}


def complete(
    config: Mapping[str, JSON],
    groups: Sequence[Group],
    _shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """The groups as they are; refuses OLoRA where PEFT begins it the wrong way round.

    Raises:
        UnsupportedKind: a weight that the base stores [in, out]: PEFT 0.21.2 decomposes it as it lies there, so that
            the factors it begins with are those of the transposed weight.
    """
    matrices = base.matrices if base else {}
    turned = [group.module for group in groups if group.module in matrices and matrices[group.module].transposed]
    if turned and peft_lora.start(config) == "olora":
        raise UnsupportedKind(
            f"{turned[0]} is stored [in, out], and there PEFT begins OLoRA with the factors of the transposed weight",
            "make it plain LoRA where it was trained: save_pretrained with path_initial_model_for_weight_conversion",
        )
    return Completed(groups=tuple(groups))


PISSA = Kind(
    name="pissa",
    title="PiSSA or OLoRA",
    source="https://arxiv.org/abs/2404.02948",
    slots=(Slot(name="down", dims="r in"), Slot(name="up", dims="out r")),
    deltas=(Moved,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=peft_lora.LEAVES,
            fields=FIELDS,
            options=options,
            config=config,
            when=peft_lora.from_the_weight,
            complete=complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in PiSSA and OLoRA."""
    return [PISSA]
