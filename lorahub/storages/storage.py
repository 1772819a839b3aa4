"""What a storage tells lorahub about quantised modules: which parameters it holds, and how numbers get out and in.

A storage claims a module by the names of classes, so recognising one imports nothing; the library is imported when a
weight is first read or written.  Knows tensors and modules; no plans, no adapters, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from lorahub.errors import MissingDependency
from lorahub.files.header import TensorInfo
from lorahub.plugins import load_registry
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

    from lorahub.lazy import torch

__all__ = [
    "Coded",
    "Held",
    "Rearranged",
    "Storage",
    "class_names",
    "device_of",
    "held_by",
    "held_in",
    "library",
    "own_parameters",
    "own_tensors",
]


class Coded(Protocol):
    """The stored form of one weight: codes, scales and what else they take.  Nothing writes to it."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""

    def values(self) -> torch.Tensor:
        """The weight as a new float32 tensor in its logical shape."""

    def requantised(self, values: torch.Tensor) -> Coded:
        """Other numbers in the same form: the same grid, block sizes and dtypes.

        Args:
            values: float32, in the logical shape, finite.
        """

    def mark(self) -> int:
        """A fingerprint of the codes: another after nearly any change of them."""


class Held(Protocol):
    """One parameter of a live module that is stored in quantised form."""

    @property
    def storage(self) -> str:
        """What it is stored as, for people: "bitsandbytes nf4"."""

    @property
    def bits(self) -> int:
        """Bits of one code."""

    @property
    def identity(self) -> int:
        """Equal for the same weight under two names."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype its module says that the weight has, and computes with by default."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def module(self) -> nn.Module:
        """The module that holds it."""

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        """What calling the module does with it ("linear": ``x @ W.T`` plus its bias); "": what its class says."""

    @property
    def hidden(self) -> tuple[str, ...]:
        """Other parameters and buffers of the module that are part of the stored form."""

    @property
    def scales(self) -> str:
        """What becomes of the scales where other numbers are put: "kept" where they reach, or made "fresh"."""

    @property
    def refusal(self) -> str:
        """Why no other numbers can be put here, as what follows "because"; "" where they can."""

    def read(self) -> Coded:
        """What is stored now, apart from the module: it stays what it is whatever happens to that.

        Raises:
            MissingDependency: the library is not installed.
            Incompatible: it cannot be read, for the reason that ``refusal`` gives.
        """

    def write(self, coded: Coded) -> None:
        """Store ``coded``, which was read here or made from what was; the module then computes with it."""


@runtime_checkable
class Rearranged(Protocol):
    """What is held by a library that, to be fast, keeps weights in an order which inputs get no gradients through."""

    def arrange(self) -> None:
        """Put the weight into the order that inputs get gradients through, where it is in another; same numbers."""


class Storage(Protocol):
    """One library's way of storing quantised weights."""

    @property
    def name(self) -> str:
        """Unique: "bitsandbytes-4bit"."""

    @property
    def library(self) -> str:
        """The requirement that reading takes: "bitsandbytes"."""

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """Parameter name -> what is held there; empty for a module that is not this library's.

        Called for every module of a model, so it looks at classes and imports nothing.
        """

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """The quantised weights of a checkpoint; None where it is not this library's.

        Args:
            settings: what its configuration says of its quantisation.
            tensors: all stored tensors.
            read: reads one; only small ones that say how others are stored are asked for here.

        Raises:
            Incompatible: it is this library's, and is not read here; the message says why.
            IntegrityError: what a weight is made of is not all there.
        """


def held_by(module: nn.Module, storages: Iterable[Storage] | None = None) -> Mapping[str, Held]:
    """Name -> what the module itself holds in quantised form.

    Args:
        module: any.
        storages: who is asked, in that order; all that are registered by default.
    """
    asked = load_registry().storages.values() if storages is None else storages
    return next((held for storage in asked if (held := storage.holds(module))), {})


def held_in(model: nn.Module) -> dict[str, Held]:
    """Live name -> what is held in quantised form there, for the whole model; shared modules under each of their names.

    Nothing is read, so the model may be on the meta device.
    """
    asked = tuple(load_registry().storages.values())
    found: dict[str, Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, one in held_by(module, asked).items():
            found[f"{prefix}.{name}" if prefix else name] = one
    return found


def class_names(thing: object) -> tuple[str, ...]:
    """The qualified names of an object's class and of the classes it derives from."""
    kind = type(thing)
    names = _NAMES.get(kind)
    if names is None:
        names = _NAMES[kind] = tuple(f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__)
    return names


_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # asked for every parameter, of few classes


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """Name -> parameter, of the module itself; as of any class, since the libraries add attributes to theirs."""
    own = vars(module).get("_parameters")  # as `named_parameters` finds them, and faster; compiled modules have none
    found = module.named_parameters(recurse=False, remove_duplicate=False) if own is None else own.items()
    return {name: value for name, value in found if value is not None}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's own tensors lie."""
    found: torch.device = next(each for each in [*module.parameters(False), *module.buffers(False)]).device
    return found


def own_tensors(module: nn.Module) -> frozenset[str]:
    """The names of the module's own parameters and buffers."""
    return frozenset(own_parameters(module)) | {name for name, _ in module.named_buffers(recurse=False)}


def library(name: str) -> Any:
    """The library, imported.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{name} is needed to read this quantised weight and is not installed", f"pip install {name}"
        ) from error
