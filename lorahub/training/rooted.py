"""The one child module that a model has while an adapter is trained on it, and what the base is spared meanwhile.

The child holds the adapter's tensors, so that optimizers, data parallelism, sharding and checkpoints of training meet
them like any others.  The base's own parameters want no gradients meanwhile, statistics of its normalisations stay what
they are, and ``save_pretrained`` saves it as if nothing were there.  Knows tensors and modules; no kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lorahub.bases.torch_module import CHILD
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.live.copies import Bound
from lorahub.training.seats import Seat, Seats

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CHILD", "BaseSaving", "Root", "demand_free", "frozen", "of_child", "shared_name", "unmoved"]


def demand_free(model: nn.Module) -> None:
    """Refuse a model that is trained already, or that is to be trained where nothing can be.

    Raises:
        UsageError: saying what to do instead.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "tensors made in inference mode can never be trained", "leave torch.inference_mode() for lorahub.create"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
        raise UsageError(
            f"the model is wrapped in {type(model).__name__} already, which would not see the adapter's parameters",
            f"create first, and wrap then: lorahub.create(model), {type(model).__name__}(model)",
        )
    for name, module in model.named_modules():
        if CHILD in module._modules:  # noqa: SLF001 - the question is whether this very module has it
            where = f"its part {name}" if name else "this model"
            raise UsageError(
                f"an adapter is trained on {where} already", "detach it first: trainee.detach(), or train that one on"
            )
    if sharded := [name for name, own in model.named_parameters() if hasattr(own, "device_mesh")]:
        raise UsageError(
            f"{sharded[0]} is sharded already, and so would the adapter's parameters have to be",
            "create first, and shard then: lorahub.create(model), fully_shard(model)",
        )


@final
class Root:
    """The child module of one model."""

    def __init__(self, model: nn.Module, seats: Seats, name: str, found: nn.Module | None = None) -> None:
        """Make it, apart from the model still.

        Args:
            model: the model.
            seats: the tensors.
            name: of the adapter.
            found: a child that holds the tensors of the seats already, as a copy of a model has one; None: a new one.
        """
        self._model = model
        self.module: nn.Module = torch.nn.Identity() if found is None else found  # a Sequential calls its last child
        own: nn.Module = torch.nn.Module()
        self._names: dict[tuple[int, str], str] = {}
        own = self.module._modules.setdefault(name, own)  # type: ignore[assignment]  # noqa: SLF001 - add_module refuses names that paths may have
        self._slots: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        self._shared: dict[tuple[str, str], tuple[nn.Module, str]] = {}
        for seat in seats.seats:
            holder = own
            for part in seat.path:
                holder = holder._modules.setdefault(part, torch.nn.Module())  # type: ignore[assignment]  # noqa: SLF001
            for slot in (*seat.trained, *seat.fixed):
                self._names[id(seat), slot] = ".".join((CHILD, name, *seat.path, seat.name(slot)))
            for slot, tensor in seat.trained.items() if found is None else ():
                holder.register_parameter(seat.name(slot), torch.nn.Parameter(tensor))
            for slot, tensor in seat.fixed.items() if found is None else ():
                holder.register_buffer(seat.name(slot), tensor)
            for slot in (*seat.trained, *seat.fixed):
                self._slots[id(seat), slot] = holder, seat.name(slot)
        for kind, slots in seats.shared.items():
            for slot, tensor in slots.items():
                key = shared_name(kind, slot)
                if found is None:
                    own.register_buffer(key, tensor)
                self._shared[kind, slot] = own, key

    def tensor(self, seat: Seat, slot: str) -> torch.Tensor:
        """The tensor that a slot has now."""
        holder, name = self._slots[id(seat), slot]
        return _tensor_of(holder, name)

    def name(self, seat: Seat, slot: str) -> str:
        """What a slot's tensor is called in the model's state dict."""
        return self._names[id(seat), slot]

    def shared(self) -> dict[str, dict[str, torch.Tensor]]:
        """What all seats of a kind have together, now."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for (kind, slot), (holder, name) in self._shared.items():
            found.setdefault(kind, {})[slot] = _tensor_of(holder, name)
        return found

    def marks(self) -> tuple[tuple[int, int], ...]:
        """Something that is another after any tensor was put in another's place, or into other memory."""
        places = (*self._slots.values(), *self._shared.values())
        return tuple(_mark(_tensor_of(holder, name)) for holder, name in places)

    def register(self) -> None:
        """Let the model have it."""
        self._model._modules[CHILD] = self.module  # noqa: SLF001 - last of all children, whatever attributes there are

    def remove(self) -> None:
        """Let the model be without it."""
        self._model._modules.pop(CHILD, None)  # noqa: SLF001

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The model without the child, for a block."""
        there = CHILD in self._model._modules  # noqa: SLF001
        self.remove()
        try:
            yield
        finally:
            if there:
                self.register()


def shared_name(kind: str, slot: str) -> str:
    """What a tensor is called in the child that all seats of a kind have together."""
    return f"{kind}_{slot}".replace("-", "_")


def _tensor_of(holder: nn.Module, name: str) -> torch.Tensor:
    own = holder._parameters.get(name)  # noqa: SLF001 - attribute access would take as long again
    found = holder._buffers[name] if own is None else own  # noqa: SLF001
    assert found is not None
    return found


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    if hasattr(tensor, "device_mesh"):
        return id(tensor), 0
    return id(tensor), tensor.untyped_storage()._cdata  # noqa: SLF001 - stays when memory is only freed and taken again


def frozen(model: nn.Module) -> Callable[[], None]:
    """Let no parameter of the model want gradients; what is returned lets those want them again that did."""
    wanting = [own for own in model.parameters() if own.requires_grad]
    for own in wanting:
        own.requires_grad_(False)

    def thaw() -> None:
        for own in wanting:
            own.requires_grad_(True)

    return thaw


def unmoved(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose statistics would follow the batches of a training."""
    kind = torch.nn.modules.batchnorm._NormBase  # noqa: SLF001 - what all of them derive from
    return tuple(module for module in model.modules() if isinstance(module, kind) and module.running_mean is not None)


@dataclass(slots=True, eq=False)
class BaseSaving(Bound):
    """Stands for a model's ``save_pretrained`` meanwhile: saves the base, without what is trained.

    Copies and pickles of the model have their own.
    """

    model: nn.Module
    save: Callable[..., Any]

    def __call__(self, *args: Any, state_dict: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """As the model's own."""
        if state_dict is not None:
            kwargs["state_dict"] = {name: value for name, value in state_dict.items() if not of_child(name)}
        child = self.model._modules.pop(CHILD, None)  # noqa: SLF001
        try:
            return self.save(*args, **kwargs)
        finally:
            if child is not None:
                self.model._modules[CHILD] = child  # noqa: SLF001


def of_child(name: str) -> bool:
    """Whether a tensor's name is that of one in the child."""
    return CHILD in name.split(".")
