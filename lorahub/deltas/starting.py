"""How the training of a kind begins: what it can be told, and the tensors a parameter starts with.

A kind that can be trained says so in its declaration.  What it starts with changes nothing yet, as ``Delta.fresh``
does; unlike there it may look at the weight and at settings.  Knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from lorahub.lazy import torch

if TYPE_CHECKING:
    from lorahub.deltas.kind import JSON

__all__ = ["Ground", "Setting", "Started", "Starting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Something a kind can be told when it is made, under PEFT's name for it.

    Attributes:
        default: its value where nobody says; its type is what is accepted.
        says: what it does, as a sentence.
        choices: the values there are, where these can be listed.
    """

    default: JSON
    says: str
    choices: tuple[JSON, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A parameter of the base on which an adapter is to be trained.

    Attributes:
        component: "" or the part of a pipeline.
        module: dotted path of the module.
        parameter: its name within the module.
        shape: logical, ``[out, in, *k]``; of a grouped convolution ``in`` is one group's.
        role: "linear", "conv" or "embedding".
        groups: of a convolution; 1 otherwise.
        device: where the tensors it starts with are to be.
        weight: gives the untouched numbers, logical orientation, float32 at least; only for kinds that look at them.
        settings: of the kind, complete, with what holds for this module alone (its rank, its alpha) in place.
        generator: whatever is drawn at random is drawn from it, in the order of the grounds.
        inputs: gives what the module was given while batches ran, [n, in * prod(k)], for starts that look at it; None
            where none ran.
    """

    component: str = ""
    module: str
    parameter: str = "weight"
    shape: tuple[int, ...]
    role: str = "linear"
    groups: int = 1
    device: torch.device
    weight: Callable[[], torch.Tensor]
    settings: Mapping[str, JSON]
    generator: torch.Generator
    inputs: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What a parameter starts with: the kind's ``build`` makes the delta of it.

    Attributes:
        trained: slot -> tensor, float32, that the optimizer changes.
        fixed: slot -> tensor that belongs to the adapter and stays as it is.
        options: as ``Group.options``: the scale and what else changes the arithmetic.
    """

    trained: Mapping[str, torch.Tensor]
    fixed: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))


Shared: TypeAlias = "Callable[[Sequence[Ground]], Mapping[str, torch.Tensor]]"


def _nothing(_grounds: Sequence[Ground]) -> Mapping[str, torch.Tensor]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """How a kind's training begins.

    Attributes:
        settings: name -> what it can be told; "r" and "alpha" mean what they mean in PEFT.
        start: one parameter -> its tensors.  Raises ``UsageError`` where it cannot stand there, saying why.
        shared: all parameters -> the kind's shared slots (VeRA's projections), which are not trained.
    """

    settings: Mapping[str, Setting]
    start: Callable[[Ground], Started]
    shared: Shared = _nothing
