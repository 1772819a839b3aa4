"""The parameters of a base on which an adapter begins, and the seats that its kind makes there.

What a kind looks at (weights, inputs) is read when it asks.  Knows bases and kinds; no training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lorahub.bases.index import natural
from lorahub.bases.layout import Layout, Target
from lorahub.bases.torch_module import ROLES, held_parameters
from lorahub.conversion.weights import BaseWeights, Read
from lorahub.deltas.starting import Ground
from lorahub.engine.planning.place import FLOATS
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.opening import Base
from lorahub.registry import Registry
from lorahub.training.asked import Asked
from lorahub.training.seats import Seat, Seats, replacing

__all__ = ["Terrain", "begin", "roles_of", "whole_seats"]

Inputs = Callable[[Target], "Callable[[], torch.Tensor] | None"]
"""Target -> what gives its module's inputs, or None."""

_STACK = 3


def roles_of(base: Base) -> dict[str, str]:
    """Module -> "linear", "conv" or "embedding", in natural order; tied modules under each of their names."""
    index, model = base.index, base.model
    assert model is not None
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for name, info in index.parameters.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and info.role:
            found[module] = info.role
    for group in index.tied:
        for name in group:
            module, _, parameter = name.rpartition(".")
            if parameter == "weight" and module not in found and module in modules:
                own = [f"{each.__module__}.{each.__qualname__}" for each in type(modules[module]).__mro__]
                role = next((ROLES[each] for each in own if each in ROLES), "")
                if role:
                    found[module] = role
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


@final
class Terrain:
    """A live base with the layouts of what is to be trained in it."""

    def __init__(self, base: Base, targets: Collection[Target], read: Read) -> None:
        """Look up where targets lie; no weight is read."""
        assert base.model is not None
        self.base, self.model = base, base.model
        self._read = read
        wanted = {*targets, *(replace(target, parameter="bias") for target in targets)}
        self.layouts: Mapping[Target, Layout] = base.framework.layouts(base.index, wanted)
        self.weights = BaseWeights(base.index, self.layouts, read)
        self._live = base.framework.parameters(self.model, base.index)
        self._held = held_parameters(self.model, base.index)

    def shape(self, target: Target) -> tuple[int, ...]:
        """The shape of a target, [out, in, *k].

        Raises:
            UsageError: the base has no such parameter.
        """
        found = self.weights.shape(target)
        if found is None:
            raise UsageError(f"the base has no parameter {target.name}")
        return found

    def device(self, target: Target) -> torch.device:
        """Where the parameter lies."""
        name = self.layouts[target].pieces[0].parameter
        if name in self._held:
            return self._held[name].device
        own = self._live.get(name)
        return torch.device("cpu") if own is None else own.device

    def value(self, target: Target) -> torch.Tensor:
        """The untouched numbers, [out, in, *k], float64, on the parameter's device; of none where there are none."""
        device = self.device(target)
        if device.type == "meta":
            return torch.empty(self.shape(target), dtype=torch.float64, device=device)
        found = self.weights.weight(target)
        assert found is not None
        return found.to(device)

    def groups(self, target: Target) -> int:
        """Of a convolution."""
        info = self.base.index.parameters[self.layouts[target].pieces[0].parameter]
        site = self.base.framework.site(self.model, info.stored_as)
        if site is not None:
            return site.groups
        module: Any = self.model.get_submodule(info.stored_as.rpartition(".")[0])
        groups = getattr(module, "groups", 1)
        return groups if isinstance(groups, int) else 1

    def stacked(self, target: Target) -> bool | None:
        """Of a stack of matrices, whether it is kept [experts, in, out]."""
        return self.base.index.parameters[self.layouts[target].pieces[0].parameter].turned

    def turned(self, target: Target) -> bool:
        """Whether the base keeps the parameter [in, out]."""
        return any(piece.of_parameter.transposed for piece in self.layouts[target].pieces)

    def is_number(self, target: Target) -> bool:
        """Whether the parameter holds real numbers."""
        return all(self.base.index.parameters[piece.parameter].dtype in FLOATS for piece in self.layouts[target].pieces)


def begin(
    terrain: Terrain,
    targets: Sequence[Target],
    asked: Asked,
    *,
    roles: Mapping[str, str],
    registry: Registry,
    seed: int,
    dtype: torch.dtype,
    inputs: Inputs,
) -> Seats:
    """The seats of an adapter that begins, one for each target.

    Args:
        terrain: the base.
        targets: what is trained, in order.
        asked: the kind and its settings.
        roles: module -> what it is.
        registry: for the kind that LoRA is on a stack of experts.
        seed: of what is drawn at random.
        dtype: of what is trained.
        inputs: of modules, where batches ran.

    Raises:
        UsageError: the kind cannot stand on a target, or a pattern means none.
    """
    generator = torch.Generator().manual_seed(seed)
    seats, grounds = [], []
    asked.demand_used([target.module for target in targets])
    for target in targets:
        shape = terrain.shape(target)
        role = roles.get(target.module, "linear") if target.parameter == "weight" else "linear"
        kind, starting = asked.kind, asked.starting
        extra: dict[str, Any] = {}
        if len(shape) == _STACK and target.parameter != "weight":
            role, shape, kind = _stack(terrain, target, shape, asked, registry)
            assert kind.starting is not None
            starting = kind.starting
            extra = {"transposed": bool(terrain.stacked(target))}
        settings = asked.of(target.module)
        ground = Ground(
            component=target.component,
            module=target.module,
            parameter=target.parameter,
            shape=shape,
            role=role,
            groups=terrain.groups(target) if role == "conv" else 1,
            device=terrain.device(target),
            weight=lambda target=target: terrain.value(target),  # type: ignore[misc]  # a default is how a loop binds
            settings={name: settings.get(name, setting.default) for name, setting in starting.settings.items()},
            generator=generator,
            inputs=inputs(target),
        )
        started = starting.start(ground)
        grounds.append(ground)
        seats.append(
            Seat(
                kind=kind,
                target=target,
                role=role if role == "embedding" else "",
                options={**started.options, **extra},
                trained={slot: tensor.detach().to(dtype) for slot, tensor in started.trained.items()},
                fixed={slot: _as(tensor.detach(), dtype) for slot, tensor in started.fixed.items()},
            )
        )
    shared = {slot: _as(tensor, dtype) for slot, tensor in asked.starting.shared(grounds).items()}
    return Seats(seats=tuple(seats), shared={asked.kind.name: shared} if shared else {})


def whole_seats(terrain: Terrain, targets: Sequence[Target], dtype: torch.dtype) -> list[Seat]:
    """Seats that train parameters in full, from what they are now."""
    return [replacing(target, terrain.value(target).to(dtype), turned=terrain.turned(target)) for target in targets]


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _stack(
    terrain: Terrain, target: Target, shape: tuple[int, ...], asked: Asked, registry: Registry
) -> tuple[str, tuple[int, ...], Any]:
    """(role, [experts, out, in], the kind for a stack)."""
    if asked.kind.name not in ("lora", "expert-lora"):
        raise UsageError(
            f"{asked.kind.title} cannot stand on {target.name}, which stacks the matrices of experts",
            'only kind="lora" is for those',
        )
    turned = terrain.stacked(target)
    if turned is None:
        raise UsageError(
            f"{target.name} has three axes, and nobody says which way round its matrices are",
            "install the plugin of the model's framework: lorahub plugins",
        )
    if turned:
        shape = (shape[0], shape[2], shape[1])
    return "experts", shape, registry.kinds["expert-lora"]
