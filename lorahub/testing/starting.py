"""The law of what a kind begins its training with: nothing changes yet, and everything can be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.deltas.starting import Ground, Started, Starting
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.testing.judging import hold

__all__ = ["starts_change_nothing_and_train"]

_PLACES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("linear", (8, 6), 1),
    ("embedding", (9, 6), 1),
    ("conv", (8, 4, 3), 1),
    ("conv", (8, 6, 3, 2), 1),
    ("conv", (8, 3, 1, 1), 2),
    ("experts", (3, 6, 4), 1),
)
"""Role, logical shape, groups."""

_SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class _Begun:
    """A start and what it was made of."""

    ground: Ground
    started: Started
    slots: Mapping[str, torch.Tensor]
    group: Group


def starts_change_nothing_and_train(kind: Kind) -> None:
    """Law 16: what a kind starts with changes nothing (1e-6 of the weight), is learnt from, and is written and read.

    On linear layers, embeddings, convolutions and stacks of experts; where it cannot stand it says so with
    ``UsageError``, and one at least it can.  A seed gives the same start again, in memory of its own.  A kind that
    does not say how its training begins keeps the law.
    """
    if kind.starting is None:
        return
    refused = []
    for role, shape, groups in _PLACES:
        says = f"{kind.name}: its start on a {role} layer of {list(shape)}"
        try:
            one, again = (_begin(kind, kind.starting, _ground(role, shape, groups, kind.starting)) for _ in range(2))
        except UsageError as error:
            hold(len(error.message) > len(role), f"{says} is refused without a reason")
            refused.append(role)
            continue
        _holds_together(one, again, says)
        for parameter, weight in _parameters(one.ground):
            delta = kind.build(one.group, one.slots).get(parameter)
            if delta is None:
                continue
            size = float((delta.delta(weight).norm() / weight.norm()).item())
            hold(size <= _SMALL, f"{says} changes the {parameter} by {size:.1e} of its norm")
            hold(_learns(kind, one, parameter, weight), f"{says} has no gradient for the {parameter}")
        _reads_back(kind, one, says)
    hold(len(refused) < len(_PLACES), f"{kind.name}: it can start nowhere")


def _ground(role: str, shape: tuple[int, ...], groups: int, starting: Starting) -> Ground:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    settings = {name: setting.default for name, setting in starting.settings.items()}
    if settings.get("r"):
        settings["r"] = 2
    return Ground(
        module="layers.0.proj",
        shape=shape,
        role=role,
        groups=groups,
        device=torch.device("cpu"),
        weight=lambda: weight,
        settings=settings,
        generator=torch.Generator().manual_seed(3),
    )


def _begin(kind: Kind, starting: Starting, ground: Ground) -> _Begun:
    started = starting.start(ground)
    slots = {**started.trained, **started.fixed, **starting.shared([ground])}
    refs = {
        name: TensorRef(key=f"{ground.module}.{name}", shape=tuple(tensor.shape), dtype="F32")
        for name, tensor in slots.items()
    }
    role = ground.role if ground.role == "embedding" else ""
    options = dict(started.options)
    return _Begun(
        ground, started, slots, Group(module=ground.module, kind=kind.name, role=role, slots=refs, options=options)
    )


def _parameters(ground: Ground) -> Iterator[tuple[str, torch.Tensor]]:
    weight = ground.weight()
    yield "weight", weight
    yield "bias", weight.flatten(1)[:, 0].clone()


def _holds_together(one: _Begun, again: _Begun, says: str) -> None:
    hold(bool(one.started.trained), f"{says} has nothing to train")
    storages = set()
    for name, tensor in one.slots.items():
        hold(bool(tensor.isfinite().all()), f"{says}: {name} is not finite")
        hold(torch.equal(tensor, again.slots[name]), f"{says}: {name} is another for the same seed")
    for name, tensor in one.started.trained.items():
        hold(tensor.dtype == torch.float32, f"{says}: {name} is {tensor.dtype}")
        view = bool(tensor._is_view())  # noqa: SLF001 - said nowhere else
        hold(not view, f"{says}: {name} is a view, which no optimizer may write to")
        storages.add(tensor.untyped_storage().data_ptr())
    hold(len(storages) == len(one.started.trained), f"{says}: two of its tensors share memory")


def _learns(kind: Kind, begun: _Begun, parameter: str, weight: torch.Tensor) -> bool:
    """Whether some tensor's gradient is not zero."""
    trained = {name: tensor.clone().requires_grad_() for name, tensor in begun.started.trained.items()}
    change = kind.build(begun.group, {**begun.slots, **trained})[parameter].delta(weight)
    aim = torch.randn(change.shape, generator=torch.Generator().manual_seed(7), dtype=change.dtype)
    torch.autograd.backward([(change * aim).sum()])
    return any(each.grad is not None and bool(each.grad.any()) for each in trained.values())


def _reads_back(kind: Kind, begun: _Begun, says: str) -> None:
    """What is taken apart is what it was made of, and makes the same change."""
    generator = torch.Generator().manual_seed(9)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in begun.started.trained.items()
    }
    slots = {**begun.slots, **moved}
    deltas = kind.build(begun.group, slots)
    dissolved = kind.dissolve(deltas)
    hold(dissolved is not None, f"{says} is built into changes that the kind does not take apart")
    assert dissolved is not None
    tensors, options = dissolved
    refs = {name: TensorRef(key=name, shape=tuple(value.shape), dtype="F32") for name, value in tensors.items()}
    group = Group(
        module=begun.group.module,
        kind=kind.name,
        role=begun.group.role,
        slots=refs,
        options={**begun.group.options, **options},
    )
    again = kind.build(group, tensors)
    for parameter, weight in _parameters(begun.ground):
        if parameter in deltas:
            before, after = deltas[parameter].delta(weight), again[parameter].delta(weight)
            hold(torch.equal(before, after), f"{says}, moved and taken apart, makes another change of the {parameter}")
            hold(bool(before.norm() > 1e-3 * weight.norm()), f"{says}, moved, changes the {parameter} too little")
