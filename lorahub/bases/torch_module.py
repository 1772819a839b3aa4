"""The built-in framework: any ``nn.Module``, names and shapes as they are.

It claims everything, and less surely than any plugin.  From a live module it knows module types, so storage is
declared; from files alone it knows names and shapes only.  Imports no model library: types are compared by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub.bases.calls import site_of
from lorahub.bases.framework import BaseFiles, Created, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Layout, Target
from lorahub.bases.placements import is_sharded
from lorahub.bases.site import Site
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.files.dtypes import from_torch, stored_shape
from lorahub.findings import Claim
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.storage import Held, held_in

if TYPE_CHECKING:
    from torch import nn

    from lorahub.bases.framework import Framework

__all__ = [
    "CHILD",
    "ROLES",
    "TRANSPOSED",
    "TorchModule",
    "held_parameters",
    "in_order",
    "live_entries",
    "live_tensors",
    "lorahub_frameworks",
]

CHILD = "_lorahub"
"""The child module that a model has while an adapter is trained on it; what is in there is no part of the base."""

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "torch.nn.modules.linear.Linear": "linear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "linear",
        "transformers.pytorch_utils.Conv1D": "linear",
        "torch.nn.modules.sparse.Embedding": "embedding",
        "torch.nn.modules.conv.Conv1d": "conv",
        "torch.nn.modules.conv.Conv2d": "conv",
        "torch.nn.modules.conv.Conv3d": "conv",
    }
)
"""Qualified class name -> what such a module is; subclasses count."""

TRANSPOSED = frozenset({"transformers.pytorch_utils.Conv1D"})
"""Linear modules that store their weight [in, out]."""

_PRESETS = {"all-linear": "linear", "all-embedding": "embedding", "all-conv": "conv"}


class TorchModule:
    """Any ``nn.Module``, and any safetensors file that no plugin knows."""

    name = "torch"
    requires = ""

    def claims(self, files: BaseFiles) -> Claim | None:
        """Anything with weights, as the last resort; no pipeline, whose components may be of any framework."""
        if files.parts or not files.headers:
            return None
        return Claim(0.01, "safetensors files, names and shapes as they are")

    def claims_model(self, model: nn.Module) -> Claim | None:
        """Any ``nn.Module``, as the last resort."""
        return Claim(0.01, "a torch module")

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """Stored names and shapes; ``declared`` is False, since files do not say what a module is."""
        return BaseIndex(
            ref=ref,
            framework=self.name,
            parameters=in_order(
                (name, ParameterInfo(shape=info.shape, dtype=info.dtype, stored_as=name))
                for name, info in files.tensors.items()
            ),
            config=files.config,
            declared=False,
        )

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """Parameters and persistent buffers; of tied names the first, in natural order, stands for all.

        Raises:
            UnsupportedFormat: a parameter of a dtype that no safetensors file can hold.
        """
        entries, tied = live_entries(model)
        return BaseIndex(
            ref=ref,
            framework=self.name,
            parameters=in_order(entries.items()),
            tied=tied,
            registered=tuple(name for name, _ in model.named_modules() if name and CHILD not in name.split(".")),
        )

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Whole parameters."""
        return whole_layouts(index, targets)

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The weights of modules of one type: "all-linear", "all-embedding", "all-conv".

        Raises:
            UsageError: no such preset, or the index is from files and does not know types.
        """
        if preset not in _PRESETS:
            raise UsageError(f"there is no preset '{preset}'", f"presets: {', '.join(_PRESETS)}")
        if not index.declared:
            raise UsageError(
                f"'{preset}' needs module types, and {index.ref} is known by its files alone",
                "name the modules, or give the live model",
            )
        return [Target("", *_split(name)) for name, info in index.parameters.items() if info.role == _PRESETS[preset]]

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """None: a plain module has no configuration in which a new head could be written down."""
        return None

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """None: a plain module has no configuration in which untying could be written down."""
        return None

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """``config.json``, if there is one."""
        return ("config.json",) if "config.json" in files.configs else ()

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The module's own tensors by name."""
        return live_tensors(model)

    def site(self, model: nn.Module, name: str) -> Site | None:
        """By the exact class of the module; see ``lorahub.bases.calls``."""
        return site_of(model, name)

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """Refuse: weights alone do not say which class to build.

        Raises:
            UnsupportedFormat: always.
        """
        raise UnsupportedFormat(
            f"{folder} holds weights but nothing that says which model class they belong to",
            "build the model and load the weights yourself, then give the live model; see also: lorahub plugins",
        )


def in_order(entries: Iterable[tuple[str, ParameterInfo]]) -> Mapping[str, ParameterInfo]:
    """The entries in natural order of their names, read-only."""
    return MappingProxyType(dict(sorted(entries, key=lambda entry: natural(entry[0]))))


def live_tensors(model: nn.Module, held: Mapping[str, Held] | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the state dict (parameters and persistent buffers) by name: the module's own, not copies.

    Of a quantised weight that is the tensor with its codes; what else belongs to its stored form is left out.

    Args:
        model: the module.
        held: what is held in quantised form, where that is known already.
    """
    held = held_in(model) if held is None else held
    state: dict[str, object] = {}
    if held:
        inside = {_split(name)[0] for name in held}
        for name, module in model.named_modules(remove_duplicate=False):
            if name in inside:  # asking such a module for its state can change it
                state |= {f"{name}.{own}" if name else own: value for own, value in _own(module)}
            else:
                module._save_to_state_dict(state, f"{name}." if name else "", True)  # noqa: SLF001 - one module's share
        hidden = {".".join(filter(None, (_split(name)[0], own))) for name, one in held.items() for own in one.hidden}
        state = {name: value for name, value in state.items() if name not in hidden}
    else:
        state = model.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and CHILD not in name.split(".")  # not extra state
    }


def held_parameters(model: nn.Module, index: BaseIndex) -> dict[str, Held]:
    """Canonical name -> what is held in quantised form, of the live model that ``index`` was made of."""
    named = {info.stored_as: name for name, info in index.parameters.items() if info.storage}
    return {named[live]: held for live, held in held_in(model).items() if live in named} if named else {}


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and persistent buffers."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    passing = module._non_persistent_buffers_set  # noqa: SLF001 - said nowhere else
    yield from ((name, value) for name, value in module.named_buffers(recurse=False) if name not in passing)


def live_entries(
    model: nn.Module, leaders: Collection[str] = ()
) -> tuple[dict[str, ParameterInfo], tuple[tuple[str, ...], ...]]:
    """(name -> parameter, groups of tied names) of a live or meta-device module; one of each group is an entry.

    Args:
        model: the module.
        leaders: names that stand for their groups; without one, the first in natural order does.

    Raises:
        UnsupportedFormat: a tensor of a dtype that no safetensors file can hold.
    """
    groups: dict[object, list[str]] = {}
    held = held_in(model)
    tensors = live_tensors(model, held)
    for name in sorted({*tensors, *held}, key=natural):
        groups.setdefault(_storage(tensors[name]) if name in tensors else held[name].identity, []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    roles = {name: _role(module) for name, module in modules.items()}
    entries, tied = {}, []
    for names in groups.values():
        ordered = sorted(names, key=lambda name: name not in leaders)  # stable: leaders first, then natural order
        name = ordered[0]
        one = held[name] if name in held else tensors[name]
        module, parameter = _split(name)
        role, transposed = roles.get(module, ("", False))
        is_weight = parameter == "weight"
        code = from_torch(one.dtype)
        entries[name] = ParameterInfo(
            shape=stored_shape(code, tuple(one.shape)),
            dtype=code,
            stored_as=name,
            transposed=transposed and is_weight,
            role=role if is_weight else "",
            turned=_turned(modules.get(module)) if len(one.shape) == 3 else None,
            storage=held[name].storage if name in held else "",
        )
        if len(ordered) > 1:
            tied.append(tuple(ordered))
    return entries, tuple(tied)


def _split(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _role(module: nn.Module) -> tuple[str, bool]:
    """(role, whether the weight is stored [in, out]), from the class and the classes it derives from."""
    names = [f"{each.__module__}.{each.__qualname__}" for each in type(module).__mro__]
    role = next((ROLES[name] for name in names if name in ROLES), "")
    return role, not TRANSPOSED.isdisjoint(names)


def _turned(module: nn.Module | None) -> bool:
    """Whether a module stores the matrices of its stacks [in, out], by the word that transformers has for it."""
    return getattr(module, "is_transposed", False) is True


def _storage(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory, looked at in the same way."""
    here = tensor.to_local() if is_sharded(tensor) else tensor  # a sharded one has no memory and gives any address
    address = here.data_ptr() if here.layout == torch.strided else 0
    if not address:  # meta, empty or sparse: sharing can be seen only where the very object is shared
        return id(tensor)
    return (tensor.device, address, tensor.dtype, tuple(tensor.shape), here.stride())


@hookimpl
def lorahub_frameworks() -> list[Framework]:
    """The framework of this file."""
    return [TorchModule()]
