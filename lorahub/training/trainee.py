"""An adapter while it is trained: its parameters in the model, and the way out of it, into files.

It acts through the same engine as adapters that are attached, so what is trained is what is merged later.  Knows no
optimizer and no loop.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast, final

from lorahub.adapter import Adapter, save
from lorahub.bases.index import structure_digest
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.departed import Departed
from lorahub.deltas.kind import JSON
from lorahub.deltas.lora import LoRA
from lorahub.engine.planning.plan import Plan
from lorahub.errors import NotFinite, UsageError
from lorahub.files.atomic import write_failed
from lorahub.findings import Finding
from lorahub.lazy import torch
from lorahub.live.attached import Live
from lorahub.live.copies import Bound
from lorahub.merging import merge
from lorahub.opening import open_base
from lorahub.plugins import load_registry
from lorahub.records import AdapterRecord
from lorahub.registry import Registry
from lorahub.sources import load
from lorahub.training.counts import Counts, count
from lorahub.training.inputs import Wanting, switches
from lorahub.training.made import Made, planned, too_wide
from lorahub.training.passing import Passing
from lorahub.training.rooted import CHILD, BaseSaving, Root, frozen, unmoved
from lorahub.training.seating import Seating, plain, seating_of
from lorahub.training.seats import Seat

if TYPE_CHECKING:
    from torch import nn

    from lorahub.engine.changing.merge import Merged

__all__ = ["Trainee"]


@dataclass(frozen=True, slots=True)
class _Deltas:
    deltas: Mapping[Target, Delta]


@final
class Trainee:
    """An adapter that is being trained on a model; as a context manager it detaches at the end of the block.

        trainee = lorahub.create(model, r=16, target_modules="all-linear")
        print(trainee.trainable_parameters())
        optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-4)
        ...  # any loop: model(...).loss.backward(), optimizer.step()
        trainee.save("out")

    Its parameters are those of one child module of the model, ``_lorahub``.  They are part of ``model.parameters()``
    and of ``model.state_dict()``, so that optimizers, data parallelism, sharding, accelerate and Lightning train, save
    and load them.  ``model.save_pretrained`` saves the base alone, and ``lorahub`` never takes them for a part of the
    base.  The base's parameters want no gradients meanwhile and keep every bit, and so do the running statistics of
    its normalisations, which are used as they are.  ``copy.deepcopy`` and pickles of the model are trained like it, on
    tensors of their own, as moving averages need it; ``lorahub.handle`` gives their ``Trainee``.

    Attributes:
        model: the model.
        name: of the adapter.
    """

    def __init__(self, made: Made, registry: Registry, found: nn.Module | None = None) -> None:
        """Put the adapter into its model; nothing changes where that fails.

        ``found``: a child module that holds its tensors already, apart from the model.
        """
        assert made.base.model is not None
        self.model: nn.Module = made.base.model
        self.name = made.name
        self._made = made
        self._registry = registry
        self._plan = planned(made, registry)
        self._root = Root(self.model, made.seats, made.name, found)
        self._marks = self._root.marks()
        self._undo: list[Callable[[], None]] = []
        self._wanting: Wanting | None = None
        try:
            self._begin()
        except BaseException:
            self.detach()
            raise

    def _begin(self) -> None:
        base = self._made.base
        live = Live(self.model, base.index, base.framework, plan=lambda *_: self._now(), judge=lambda _names: None)
        self._live = live
        self._undo.append(live.detach)
        live.add(self.name, None, dropout=self._made.dropout)
        live.set_adapters([self.name])
        self._wanted = tuple(name for name, own in self.model.named_parameters() if own.requires_grad)
        self._undo += [frozen(self.model), Passing(self.model).remove]
        self._still, self._checkpoints = unmoved(self.model), switches(self.model)
        self._modes = tuple(module.training for module in self._still)
        self._undo.append(lambda: _put_back(self._still, self._modes))
        handle = self.model.register_forward_pre_hook(_Follow(self), prepend=True)  # before what the engine does there
        self._undo.append(handle.remove)
        self._root.register()
        self._undo.append(self._root.remove)
        if callable(own := getattr(self.model, "save_pretrained", None)):
            vars(self.model)["save_pretrained"] = BaseSaving(self.model, own)
            self._undo.append(lambda: vars(self.model).pop("save_pretrained", None))
        live.carried(self, lambda model, _memo: self._again().on(model), self._again)

    # ---- what optimizers and people ask

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, for an optimizer."""
        return (own for _, own in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the model: "_lorahub.default.layers.0.q_proj.weight_down"."""
        return ((f"{CHILD}.{name}", own) for name, own in self._root.module.named_parameters() if own.requires_grad)

    def trainable_parameters(self) -> Counts:
        """How many parameters are trained, of how many; prints as a sentence."""
        self._demand_open()
        return count(self.model)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The parameters of the base that are changed, in order."""
        return tuple(dict.fromkeys(term.target for step in self._plan.steps for term in step.terms))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What there is to say of the adapter on this base, none of which forbids it."""
        return (*self._plan.findings, *too_wide(self._plan))

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, a copy; of a sharded model each process has all of it, and all must ask."""
        return self._adapter(lambda seat, slot: _whole(self._root.tensor(seat, slot)))

    def _adapter(self, tensor: Callable[[Seat, str], torch.Tensor]) -> Adapter:
        deltas = self._made.seats.deltas(lambda seat, slot: tensor(seat, slot).detach().clone())
        plain = {
            target: LoRA(*delta.stacked(), delta.scale) if isinstance(delta, Departed) else delta
            for target, delta in deltas.items()
        }
        kinds = tuple(sorted({delta.kind for delta in plain.values()}))
        return Adapter(deltas=plain, record=self._made.record.changed(kinds=kinds), hints=self._made.hints)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors, for a checkpoint of a training; ``save`` writes what others read."""
        return dict(self._root.module.state_dict())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from ``state_dict`` of an adapter that was made alike.

        Raises:
            UsageError: it is of another adapter; nothing was loaded.
        """
        own = self._root.module.state_dict()
        absent, more = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if wrong := [*absent, *more, *sorted(shapes)]:
            raise UsageError(
                f"this is the state of another adapter: {len(wrong)} tensors differ, first {wrong[0]}",
                "create it with the same arguments, or go on from its files: lorahub.create(model, resume=FOLDER)",
            )
        self._root.module.load_state_dict(dict(state))

    # ---- files

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        format: str = "peft",  # noqa: A002 - what people call it
        component: str = "",
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        """Write the adapter with its record: files in the layout of PEFT, and ``lorahub.json``.

        What PEFT or vLLM do not take of them says ``lorahub check --for peft`` or ``vllm``.

        In one process of several, unless the model is sharded: then in all, and the first one writes.

        Args:
            folder: where to; a folder that exists gets new files, each whole, and folders above it are made.
            format: which layout; see ``lorahub.convert``.
            component: which part of a pipeline the model is ("unet"), for layouts that say so.
            state: the model's state dict, where somebody has gathered it from all processes; then one process saves.

        Raises:
            UsageError: the state is another model's.
            CannotCarry: the layout has no word for part of it; nothing was written.
            NotFinite: the training diverged; nothing was written.
            WriteFailed: no space or no permission.
        """
        adapter = self.adapter if state is None else self._adapter(lambda seat, slot: self._gathered(state, seat, slot))
        _demand_finite(adapter)
        if component:
            deltas = {replace(target, component=component): delta for target, delta in adapter.deltas.items()}
            adapter = replace(adapter, deltas=deltas, record=self._of_component(adapter.record, component))
        if state is None and self._sharded() and torch.distributed.get_rank() != 0:
            return Path(folder)
        try:
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failed(folder, error) from error
        return save(adapter, folder, format=format)

    def _of_component(self, record: AdapterRecord | None, component: str) -> AdapterRecord | None:
        """The record as a pipeline is held against it: what was said of one model's skeleton and weights is left."""
        if record is None or record.base is None:
            return record
        said = record.base.model_dump(exclude_defaults=True, exclude={"structure", "weights_digest", "targets"})
        touched = ((f"{component}:{step.out}", step.before.shape) for step in self._plan.steps if step.before)
        return record.changed(base={**said, "targets": structure_digest(touched)})

    def _gathered(self, state: Mapping[str, torch.Tensor], seat: Seat, slot: str) -> torch.Tensor:
        name = self._root.name(seat, slot)
        found = state.get(name)
        if found is None:
            raise UsageError(f"the state lacks {name}", "give the state dict of the model that is trained")
        return found

    # ---- while it trains

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base's own outputs for a block, as for a reference in preference training."""
        self._demand_open()
        with self._live.using([]):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A model whose state dict is the base's for a block, for whoever saves that."""
        with self._root.aside():
            yield

    def require_input_grads(self) -> None:
        """Let what comes out of the model's first layers want gradients, as reentrant checkpointing needs it.

        For models of transformers, diffusers and timm this happens by itself when their checkpointing is on.
        """
        self._demand_open()
        if self._wanting is None:
            self._wanting = Wanting(self.model)
            self._undo.append(self._wanting.remove)

    def merge(self) -> Merged:
        """Detach, and change the base's weights by what was trained; ``undo`` of the result takes that back exactly.

        Raises:
            LorahubError: what ``lorahub.merge`` raises; the adapter is detached then, and the weights are unchanged.
        """
        with tempfile.TemporaryDirectory(prefix="lorahub-") as place:  # through files, as everybody else merges it
            adapter = load(self.save(Path(place) / self.name))
            self.detach()
            return merge(self.model, {self.name: adapter}, allow=self._made.allow)

    def detach(self) -> None:
        """Take the adapter off; the model is what it was.  Doing it twice is no fault."""
        undo, self._undo = self._undo, []
        for each in reversed(undo):
            each()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def on_detach(self, do: Callable[[], None]) -> None:
        """Have ``do`` called when the adapter is taken off, before anything else."""
        self._undo.append(do)

    # ---- how

    def _now(self) -> tuple[Plan, _Deltas]:
        """The plan, and deltas of the tensors that the child module has now."""
        shared = self._root.shared()
        with torch.enable_grad():  # views made here carry gradients to the parameters
            seats = replace(self._made.seats, shared=shared)
            return self._plan, _Deltas(seats.deltas(self._root.tensor))

    def _follow(self) -> None:
        """Before each call of the model: take the tensors that are there now, and let the base's statistics be."""
        for module in self._still:
            module.training = False
        if self._wanting is None and self.model.training and self._checkpoints():
            self.require_input_grads()
        marks = self._root.marks()
        if marks != self._marks:
            if self._sharded():
                raise UsageError(
                    "the adapter's parameters are sharded, and the model is called without gathering them",
                    "shard the model that was given to lorahub.create, and call it: fully_shard(model); model(...)",
                )
            self._live.swap(self.name, None)
            self._marks = marks

    def _again(self) -> _Again:
        made = self._made
        return _Again(
            seating=seating_of(made.seats),
            name=made.name,
            dropout=made.dropout,
            hints=cast("dict[str, JSON]", plain(made.hints)),
            record=made.record,
            allow=tuple(made.allow),
            wanted=self._wanted,
            modes=self._modes,
            inputs=self._wanting is not None,
        )

    def _sharded(self) -> bool:
        return any(hasattr(own, "device_mesh") for own in self._root.module.parameters())

    def _demand_open(self) -> None:
        if not self._undo:
            raise UsageError("this adapter was detached", "create or attach it again")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """What it takes to train the adapter on a copy of the model, besides that and the tensors in its child module.

    Attributes:
        seating: what these are; the others as in ``Made``.
        wanted: the base's parameters that want gradients when nothing is trained on it.
        modes: the modes that the normalisations had whose statistics stay what they are.
        inputs: what comes out of the model's first layers wants gradients.
    """

    seating: Seating
    name: str
    dropout: float
    hints: dict[str, JSON]
    record: AdapterRecord
    allow: tuple[str, ...]
    wanted: tuple[str, ...]
    modes: tuple[bool, ...]
    inputs: bool

    def on(self, model: nn.Module) -> Trainee | None:
        """The adapter on a copy of the model; None where that was copied without its child, to be the base."""
        found = model._modules.pop(CHILD, None)  # noqa: SLF001 - so that nothing takes it for a part of the base
        if found is None:
            return None
        _want(model, self.wanted)
        _put_back(unmoved(model), self.modes)
        registry = load_registry()
        seats = self.seating.seats(cast("nn.Module", found._modules[self.name]), registry.kinds)  # noqa: SLF001
        made = Made(
            base=open_base(model),
            seats=seats,
            name=self.name,
            dropout=self.dropout,
            hints=self.hints,
            record=self.record,
            allow=self.allow,
        )
        trainee = Trainee(made, registry, found)
        if self.inputs:
            trainee.require_input_grads()
        return trainee


def _want(model: nn.Module, names: Collection[str]) -> None:
    """Let parameters want gradients that are in the model still."""
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)


class _Follow(Bound):
    """What the model calls before it is called itself."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def __call__(self, _module: nn.Module, _args: object) -> None:
        if not torch.compiler.is_compiling():
            self._trainee._follow()  # noqa: SLF001 - the other half of one thing


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _put_back(modules: tuple[nn.Module, ...], modes: tuple[bool, ...]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode


def _demand_finite(adapter: Adapter) -> None:
    bad = [
        target.name
        for target, delta in adapter.deltas.items()
        if not all(bool(torch.isfinite(each).all()) for each in delta.tensors().values() if each.is_floating_point())
    ]
    if bad:
        raise NotFinite(
            f"NaN or infinity in what was trained on {', '.join(bad[:3])}", "the training diverged: try a smaller lr"
        )
