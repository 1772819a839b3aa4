"""IA3: one learned factor for each output, or for each input of a feed-forward layer.

https://arxiv.org/abs/2205.05638
``W' = gain * W`` with the gain on rows (then the bias is multiplied as well, where the layer has one) or on columns.
Rows and columns are those of the logical weight ``[out, in, *k]``: PEFT stores the gain that way for GPT-2's Conv1D
too.  Grouped convolutions, whose gain on columns is longer than the weight's second axis, are refused by shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.beginning import stands
from lorahub.deltas.delta import Around, Delta, Index, Route, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.patterns import full_match
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["IA3", "Gain"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gain(Delta):
    """``gain * W``, so a change of ``(gain - 1) * W``.

    Attributes:
        gain: ones on every axis but ``axis``: ``[out, 1, *1]``, ``[1, in, *1]``, or ``[out]`` for a vector.
        axis: the axis it runs along, 0 or 1.
    """

    gain: torch.Tensor
    axis: int

    kind: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The difference from one is taken in the weight's dtype, so a gain near one loses nothing.

        Raises:
            BaseMismatch: the weight has other axes or another size along ``axis``.
        """
        if weight.dim() != self.gain.dim() or weight.shape[self.axis] != self.gain.shape[self.axis]:
            raise BaseMismatch(f"an ia3 gain {list(self.gain.shape)} was given a weight {list(weight.shape)}")
        return weight * (self.gain.to(weight) - 1)

    def around(self, site: Site) -> Route | None:
        """Outputs times the gain, or inputs; so too a bias, which is its own output."""
        last = 1 if site.op == "embedding" else 0
        if self.axis == last:
            return Route(lambda _: Around(factor=self.gain.reshape(-1)))
        if site.op == "embedding" or site.groups > 1:
            return None

        def inputs(x: torch.Tensor) -> torch.Tensor:
            return (x * self.gain.to(x.device).reshape(-1, *(1 for _ in site.kernel))).to(x.dtype)

        return Route(lambda _: Around(inputs=inputs), enters=True)

    def region(self, rows: Index, cols: Index) -> Self:
        """The gain along its own axis; the other is broadcast."""
        return replace(self, gain=take(self.gain, (rows, cols)[self.axis], self.axis))

    def shape(self) -> None:
        """None: a gain says one size of its weight."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Ones along axis 0; there is no rank."""
        return cls(torch.ones(along(shape, 0), device=generator.device), 0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Gains between 0.5 and 2 along either axis; vectors have one."""
        axis = int(torch.randint(2, (), generator=generator, device=generator.device)) if len(shape) > 1 else 0
        return cls(torch.rand(along(shape, axis), generator=generator, device=generator.device) * 1.5 + 0.5, axis)


def along(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """``shape`` with ones on every axis but ``axis``.

    Raises:
        BaseMismatch: a scalar has no axis.
    """
    if not shape:
        raise BaseMismatch("an ia3 gain changes weights and vectors, not scalars")
    return tuple(size if dim == axis else 1 for dim, size in enumerate(shape))


def is_feedforward(group: Group) -> bool:
    """Whether the gain is on the inputs."""
    value = group.options["feedforward"]
    assert isinstance(value, bool)
    return value


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, and for gains on outputs the bias where there is one.

    The sizes are numbers here: which axis the gain runs along is an option, so no pattern of the slot can say it.
    """
    shape = group.slots["gain"].shape
    size, feedforward = math.prod(shape), is_feedforward(group)
    dims = ["out", "in", *(f"k{axis}" for axis in range(len(shape) - 2))]
    dims[feedforward] = str(size)
    weight = Touch(parameter="weight", dims=" ".join(dims), slots=("gain",), additive=False)
    if feedforward:
        return (weight,)
    return weight, Touch(parameter="bias", dims=str(size), slots=("gain",), additive=False, if_present=True)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """Gains on the inputs of the weight, or on the outputs of weight and bias.

    PEFT stores a convolution's gain ``[1, C, *1]`` whichever axis it is for.
    """
    gain = tensors["gain"]
    if is_feedforward(group):
        return {"weight": Gain(gain, 1)}
    return {"weight": Gain(gain.reshape(-1, *(1 for _ in gain.shape[1:])), 0), "bias": Gain(gain.reshape(-1), 0)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``.

    A gain on outputs is of this kind together with the same gain on the bias: the file format cannot say one without
    the other.
    """
    match dict(deltas):
        case {"weight": Gain(gain=gain, axis=1), **others} if not others:
            return {"gain": gain}, {"feedforward": True}
        case {"weight": Gain(gain=gain, axis=0), "bias": Gain(gain=bias, axis=0), **others} if not others:
            if bias.dim() != 1 or not torch.equal(gain.reshape(-1), bias):
                return None
            stored = gain if gain.dim() == 2 else gain.transpose(0, 1)
            return {"gain": stored}, {"feedforward": False}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "feedforward_modules": Field(used=True),
        "target_modules": Field(inert=True),
        "exclude_modules": Field(inert=True),
        "fan_in_fan_out": Field(inert=True),  # the layer type decides, and PEFT overrides the flag by it
        "init_ia3_weights": Field(inert=True),
        "inference_mode": Field(inert=True),
        "peft_version": Field(inert=True),
        "task_type": Field(inert=True),
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Whether the gain is on the inputs: what ``feedforward_modules`` says, and the shape where the shape can tell.

    Raises:
        IntegrityError: config and shape contradict each other, or neither tells.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    gain = slots["gain"]
    possible = _possible(gain)
    stated = _stated(config.get("feedforward_modules"), module)
    if stated is None:
        if len(possible) != 1:
            raise IntegrityError(
                f"{module}: feedforward_modules is not given, and {gain.key} {list(gain.shape)} does not tell"
            )
        (stated,) = possible
    if stated not in possible:
        raise IntegrityError(
            f"{module}: feedforward_modules says the gain is on {('outputs', 'inputs')[stated]}, and "
            f"{gain.key} {list(gain.shape)} is one for {('inputs', 'outputs')[stated]}"
        )
    return {"feedforward": stated}


def _possible(gain: TensorRef) -> set[bool]:
    """What the shape allows: ``[out, 1]``, ``[1, in]``, or either for a convolution's ``[1, C, *1]``."""
    match gain.shape:
        case (1, 1):
            return {False, True}
        case (_, 1):
            return {False}
        case (1, _):
            return {True}
        case (1, _, *ones) if ones and all(size == 1 for size in ones):
            return {False, True}
    raise IntegrityError(
        f"{gain.key} {list(gain.shape)} is no gain: one axis may be longer than 1, the first or the second"
    )


def _stated(value: JSON, module: str) -> bool | None:
    """PEFT's rule: a whole match for a pattern, the plain end of the name for a list."""
    if value is None:
        return None
    if isinstance(value, str):
        return full_match(value, module, field="feedforward_modules")
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return any(module.endswith(name) for name in value if isinstance(name, str))
    raise IntegrityError(f"feedforward_modules should be a pattern or a list of names, not {value!r}")


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again finds the same feed-forward modules.

    Raises:
        CannotCarry: a module's name ends with that of a feed-forward module, and is none.
    """
    feedforward = [name for name, group in groups.items() if is_feedforward(group)]
    others = [name for name in groups if name not in feedforward]
    if clashes := [name for name in others if name.endswith(tuple(feedforward))]:
        raise CannotCarry(
            f"PEFT would take these for feed-forward modules by the end of their names: {', '.join(clashes)}"
        )
    return {"feedforward_modules": list(feedforward), "init_ia3_weights": True}


_WHERE: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "no tool knows a gain on the rows of a table",
        "experts": "a gain is for one weight, and no stack of experts",
    }
)


def start(ground: Ground) -> Started:
    """Gains of one: on the inputs of feed-forward modules, on the outputs of all others.

    Raises:
        UsageError: it cannot stand there, or ``feedforward_modules`` is no list of names and no pattern.
    """
    stands(ground, "(IA)³", _WHERE)
    given = ground.settings["feedforward_modules"]
    try:
        feedforward = bool(_stated(given, ground.module))
    except IntegrityError as error:
        raise UsageError(error.message) from None
    if feedforward and ground.groups > 1:
        raise UsageError(
            f"(IA)³ cannot stand on the inputs of {ground.module}, because its weight has {ground.shape[1]} columns "
            f"for {ground.shape[1] * ground.groups} inputs in {ground.groups} groups",
            "leave it out of feedforward_modules: a gain on outputs can stand there",
        )
    size = ground.shape[1 if feedforward else 0]
    if ground.role == "conv":
        gain = torch.ones(1, size, *(1 for _ in ground.shape[2:]), device=ground.device)
    else:
        gain = torch.ones((1, size) if feedforward else (size, 1), device=ground.device)
    return Started(trained={"gain": gain}, options={"feedforward": feedforward})


_FEEDFORWARD = Setting(
    default=[],
    says="Ends of the names of modules, or a pattern, whose inputs are multiplied; of all others, the outputs are.",
)

IA3 = Kind(
    name="ia3",
    title="(IA)³",
    source="https://arxiv.org/abs/2205.05638",
    # [out, 1] or [1, in]; convolutions [1, C, *1] for either: the options say which, see ``touches``
    slots=(Slot(name="gain", dims="*gain"),),
    deltas=(Gain,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="IA3",
            leaves=(Leaf(slot="gain", suffix="ia3_l"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
    starting=Starting(settings={"feedforward_modules": _FEEDFORWARD}, start=start),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in (IA)³."""
    return [IA3]
