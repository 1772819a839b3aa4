"""PEANuT: a change that a small network computes from the weight itself (https://arxiv.org/abs/2410.01870).

Over the weight's columns, ``h = f(W.T @ down.T)``; then encoders ``h = f(h @ E.T)``, as many decoders ``h = f(h @ D.T)
+ what h was before the matching encoder``, and ``change.T = scale * h @ up.T``.  A column of the change follows from
that column of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, integer, number
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ACTIVATIONS", "PEANUT", "Network"]

CUBIC = 0.044715


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """The approximation of GELU by a hyperbolic tangent."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + CUBIC * x**3)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """``x`` times the normal distribution's share below it."""
    return torch.nn.functional.gelu(x)


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x`` times its sigmoid."""
    return x * torch.sigmoid(x)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "gelu": gelu,
        "gelu_10": lambda x: gelu(x).clamp(-10, 10),
        "gelu_accurate": tanh_gelu,
        "gelu_fast": tanh_gelu,
        "gelu_new": tanh_gelu,
        "gelu_python": gelu,
        "gelu_python_tanh": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
        "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
        "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
        "linear": lambda x: x,
        "mish": lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
        "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),  # PEFT makes a new, untrained one for every use
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": lambda x: x.relu(),
        "relu2": lambda x: torch.relu(x) ** 2,
        "relu6": lambda x: x.clamp(0, 6),
        "sigmoid": lambda x: x.sigmoid(),
        "silu": silu,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
        "swish": silu,
        "tanh": lambda x: x.tanh(),
    }
)
"""``act_fn`` by the names of the transformers library; functions of ours, so that naming them loads no torch."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Network(Delta):
    """``scale * (network of W's columns).T``.

    Attributes:
        down: ``[r, out]``; PEFT's ``peanut_A``.
        up: ``[out, r]``; PEFT's ``peanut_B``.
        encoders: ``[depth, r, r]``, or None where there are none.
        decoders: the same.
        scale: multiplies the change.
        activation: a name in ``ACTIVATIONS``.
    """

    down: torch.Tensor
    up: torch.Tensor
    encoders: torch.Tensor | None
    decoders: torch.Tensor | None
    scale: float
    activation: str

    kind: ClassVar[str] = "peanut"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype.

        Raises:
            BaseMismatch: the weight has another number of rows, or is no matrix.
        """
        if weight.dim() != 2 or weight.shape[0] != self.up.shape[0]:
            raise BaseMismatch(f"a peanut delta for {self.up.shape[0]} outputs was given a weight {list(weight.shape)}")
        bend = ACTIVATIONS[self.activation]
        hidden, before = bend(weight.T @ self.down.to(weight).T), []
        for encoder in () if self.encoders is None else self.encoders.to(weight):
            before.append(hidden)
            hidden = bend(hidden @ encoder.T)
        for decoder in () if self.decoders is None else self.decoders.to(weight):
            hidden = bend(hidden @ decoder.T) + before.pop()
        return self.up.to(weight) @ hidden.T * self.scale

    def region(self, rows: Index, cols: Index) -> Self:
        """Any columns; all rows, which the network reads.

        Raises:
            NotLocal: a cut through the rows.
        """
        if rows != ALL:
            raise NotLocal("a peanut delta reads whole columns of its weight; it cannot be cut through its rows")
        return self

    def shape(self) -> None:
        """None: any number of columns will do."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``up`` of zeros.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        return cls(like.down, torch.zeros_like(like.up), like.encoders, like.decoders, 1.0, like.activation)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal matrices, with and without hidden layers.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a peanut delta changes matrices [out, in], not {list(shape)}")
        depth = int(torch.randint(3, (), generator=generator, device=generator.device))
        down, up, encoders, decoders = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in ((r, shape[0]), (shape[0], r), (depth, r, r), (depth, r, r))
        )
        if not depth:
            return cls(down, up, None, None, 0.7, "tanh")
        return cls(down, up, encoders, decoders, 0.7, "silu")


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, of any number of columns."""
    rank = group.slots["down"].shape[0]
    slots = tuple(group.slots)
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=False, local=False, rank=rank),)


def layers(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The layers ``name.0``, ``name.1`` ... as one tensor, or None."""
    depth = sum(slot.startswith(f"{name}.") for slot in tensors)
    return torch.stack([tensors[f"{name}.{at}"] for at in range(depth)]) if depth else None


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    scale, activation = group.options["scale"], group.options["activation"]
    assert isinstance(scale, int | float)
    assert isinstance(activation, str)
    encoders, decoders = layers(tensors, "encoder"), layers(tensors, "decoder")
    return {"weight": Network(tensors["down"], tensors["up"], encoders, decoders, float(scale), activation)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Network() as weight, **others} if not others:
            tensors = {"down": weight.down, "up": weight.up}
            for name, stack in (("encoder", weight.encoders), ("decoder", weight.decoders)):
                tensors |= {f"{name}.{at}": layer for at, layer in enumerate(() if stack is None else stack)}
            return tensors, {"scale": weight.scale, "activation": weight.activation, "rank": weight.down.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**PLACES, "r": USED, "depth": USED, "act_fn": USED, "scaling": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale and activation.

    Raises:
        IntegrityError: the config states another rank or depth, or layers are missing.
        UnsupportedKind: an activation that is not known.
    """
    depth, found = integer(config, "depth", 0), slots.keys() - {"down", "up"}
    fits = len(found) == 2 * depth  # before as many names are made as the config says
    if not fits or found != {f"{name}.{at}" for name in ("encoder", "decoder") for at in range(depth)}:
        raise IntegrityError(
            f"{module}: depth is {depth}, and the file has {', '.join(sorted(found)) or 'no encoders and decoders'}"
        )
    activation = config.get("act_fn") or "relu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedKind(f"{module}: act_fn is {activation!r}, and known are {', '.join(ACTIVATIONS)}")
    down = slots["down"]
    rank = stated_rank(config, module, down.shape[0], down.key, patterns="")
    return {"scale": number(config, "scaling", 1.0), "activation": activation, "rank": rank}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once.
    """

    def depth(group: Group) -> int:
        return sum(name.startswith("encoder.") for name in group.slots)

    return {
        "r": one_for_all(groups, "r", lambda group: group.options["rank"]),
        "depth": one_for_all(groups, "depth", depth),
        "act_fn": one_for_all(groups, "act_fn", lambda group: group.options["activation"]),
        "scaling": one_for_all(groups, "scaling", lambda group: group.options["scale"]),
        "init_weights": True,
    }


PEANUT = Kind(
    name="peanut",
    title="PEANuT",
    source="https://arxiv.org/abs/2410.01870",
    slots=(
        Slot(name="down", dims="r out"),
        Slot(name="up", dims="out r"),
        Slot(name="encoder", dims="r r", optional=True, many=True),
        Slot(name="decoder", dims="r r", optional=True, many=True),
    ),
    deltas=(Network,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="PEANUT",
            leaves=(
                Leaf(slot="down", suffix="peanut_A.weight"),
                Leaf(slot="up", suffix="peanut_B.weight"),
                Leaf(slot="encoder", suffix="peanut_encoders.*.weight"),
                Leaf(slot="decoder", suffix="peanut_decoders.*.weight"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in PEANuT."""
    return [PEANUT]
