"""The tensors that an adapter trains, and how deltas are made of them: each time anew, whoever has replaced them since.

A seat is one group of tensors on one module, as a format would read them from a file, so that a plan takes it for an
adapter like any other.  Knows kinds; no models and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import final

from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.deltas.replace import REPLACE
from lorahub.errors import CannotCarry
from lorahub.files.dtypes import from_torch
from lorahub.findings import Finding
from lorahub.formats.format import Reading
from lorahub.lazy import torch

__all__ = ["Heading", "Seat", "Seats", "replacing", "seats_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seat:
    """One module's or parameter's share of an adapter.

    Attributes:
        kind: what its deltas are.
        target: the parameter it stands for.
        role: of the module, "embedding" or "".
        options: as ``Group.options``.
        trained: slot -> tensor, that the optimizer changes.
        fixed: slot -> tensor that stays as it is.
        turned: of a parameter that is trained in full, that the base keeps it [in, out], and so do files.
    """

    kind: Kind
    target: Target
    role: str = ""
    options: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    trained: Mapping[str, torch.Tensor]
    fixed: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    turned: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """Under which modules its tensors are registered."""
        component = (self.target.component,) if self.target.component else ()
        return (*component, *filter(None, self.target.module.split(".")))

    def name(self, slot: str) -> str:
        """What a tensor of its is called there."""
        return f"{self.target.parameter}_{slot}".replace(".", "_")

    def group(self) -> Group:
        """The seat as a file's header would show it."""
        slots = {
            slot: TensorRef(key=f"{self.target.name}:{slot}", shape=self._shape(tensor), dtype=from_torch(tensor.dtype))
            for slot, tensor in {**self.trained, **self.fixed}.items()
        }
        return Group(
            component=self.target.component,
            module=self.target.module,
            parameter=self.target.parameter,
            kind=self.kind.name,
            role=self.role,
            slots=slots,
            options=self.options,
        )

    def _shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """As a file has it."""
        shape = tuple(tensor.shape)
        return (shape[1], shape[0], *shape[2:]) if self.turned and len(shape) > 1 else shape


@final
@dataclass(frozen=True, slots=True)
class Heading:
    """What planning takes of an adapter."""

    reading: Reading
    findings: tuple[Finding, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seats:
    """All seats of an adapter.

    Attributes:
        seats: in order.
        shared: kind -> slot -> tensor that all its seats have together; not trained.
    """

    seats: tuple[Seat, ...]
    shared: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=lambda: MappingProxyType({}))

    def heading(self) -> Heading:
        """What its files would say."""
        shared = {
            (kind, slot): TensorRef(key=f"{kind}:{slot}", shape=tuple(each.shape), dtype=from_torch(each.dtype))
            for kind, slots in self.shared.items()
            for slot, each in slots.items()
        }
        return Heading(Reading(format="peft", file="", groups=[seat.group() for seat in self.seats], shared=shared))

    def deltas(self, tensor: Callable[[Seat, str], torch.Tensor]) -> dict[Target, Delta]:
        """The changes, of the tensors that ``tensor`` gives for each seat's slots."""
        found: dict[Target, Delta] = {}
        for seat in self.seats:
            tensors = dict(self.shared.get(seat.kind.name, {}))
            tensors |= {slot: tensor(seat, slot) for slot in (*seat.trained, *seat.fixed)}
            for parameter, delta in seat.kind.build(seat.group(), tensors).items():
                found[replace(seat.target, parameter=parameter)] = delta
        return found


def replacing(target: Target, value: torch.Tensor, *, turned: bool) -> Seat:
    """A seat that trains a parameter in full, from ``value`` [out, in, *k] on."""
    return Seat(kind=REPLACE, target=target, trained={"value": value}, turned=turned)


def seats_of(
    deltas: Mapping[Target, Delta],
    kinds: Mapping[str, Kind],
    *,
    roles: Mapping[str, str],
    turned: Collection[str],
    dtype: torch.dtype,
) -> Seats:
    """The seats that changes came from, as after ``lorahub.load``; what all modules share stays as it is.

    Args:
        deltas: the changes.
        kinds: by name.
        roles: name of a target -> what its module is, where that matters.
        turned: names of targets that are trained in full, and that the base keeps [in, out].
        dtype: of what is trained.

    Raises:
        CannotCarry: a change that its kind cannot take apart.
    """
    modules: dict[tuple[str, str], dict[str, Delta]] = {}
    for target, delta in deltas.items():
        modules.setdefault((target.component, target.module), {})[target.parameter] = delta
    seats: list[Seat] = []
    shared: dict[str, dict[str, torch.Tensor]] = {}
    for (component, module), parameters in modules.items():
        for names in _together(parameters, kinds):
            own = {name: parameters[name] for name in names}
            kind = kinds[next(iter(own.values())).kind]
            taken = kind.dissolve(own)
            if taken is None:
                raise CannotCarry(f"{module}: {kind.title} cannot be taken apart into what is trained")
            target = Target(component, module, "weight" if "weight" in own else next(iter(own)))
            trained = {}
            for slot, tensor in taken[0].items():
                about = kind.slot(slot)
                if about.shared:
                    shared.setdefault(kind.name, {})[slot] = tensor
                elif about.holds != "integers" and tensor.is_floating_point():
                    trained[slot] = tensor.detach().to(dtype).clone()
            fixed = {
                slot: tensor.detach().clone()
                for slot, tensor in taken[0].items()
                if slot not in trained and not kind.slot(slot).shared
            }
            seats.append(
                Seat(
                    kind=kind,
                    target=target,
                    role=roles.get(target.name, ""),
                    options=taken[1],
                    trained=trained,
                    fixed=fixed,
                    turned=target.name in turned,
                )
            )
    return Seats(seats=tuple(seats), shared=shared)


def _together(parameters: Mapping[str, Delta], kinds: Mapping[str, Kind]) -> Sequence[Sequence[str]]:
    """Which parameters of a module one group changes: all of them where a kind takes them so, else each by itself."""
    if len(parameters) > 1:
        for kind in {delta.kind: kinds[delta.kind] for delta in parameters.values()}.values():
            if kind.name != REPLACE.name and kind.dissolve(parameters) is not None:
                return [[*parameters]]
    return [[name] for name in parameters]
