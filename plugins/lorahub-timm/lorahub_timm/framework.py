"""The framework "timm": bases from their configuration and headers, without importing torch or timm.

Stored names are the live ones, and a weight's axes tell what its module is; both hold for every architecture of timm,
and ``tests/test_index.py`` walks them.  Only ``open_base`` and feature extractors import timm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from lorahub.bases.framework import BaseFiles, Created, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Layout, Target
from lorahub.bases.site import Site
from lorahub.bases.torch_module import in_order, live_entries, live_tensors
from lorahub.deltas.kind import JSON
from lorahub.errors import MissingDependency, UnsupportedFormat, UsageError
from lorahub.files.dtypes import to_torch
from lorahub.findings import Claim
from lorahub_timm import heads, sites
from lorahub_timm.configs import Described, described, live_config, pretrained_ref
from lorahub_timm.families import NO_ROLE, Family
from lorahub_timm.features import beginnings, is_extractor
from lorahub_timm.fused import fused_layout
from lorahub_timm.paths import ends_with, matched

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["PRESETS", "Timm"]

_NAME = "timm"

PRESETS: Mapping[str, str] = MappingProxyType({"all-linear": "linear", "all-conv": "conv"})
"""Preset -> what the modules are; heads are left out.  ``attention`` is the table's."""

_ROLES = {2: "linear", 3: "conv", 4: "conv", 5: "conv"}
"""Axes of a parameter called "weight" -> what its module is."""

_ALIASES = (("", "timm_model."),)  # the same model inside a TimmWrapper of transformers


class Timm:
    """timm models."""

    name = _NAME
    requires = "timm>=1.0.31,<2"

    def claims(self, files: BaseFiles) -> Claim | None:
        """By ``architecture`` and ``pretrained_cfg`` in ``config.json``, as timm writes them."""
        about = described(files.config)
        if about is None:
            return None
        known = "" if about.family else ", not in the table"
        return Claim(0.9 if about.family else 0.6, f"config.json says architecture {about.architecture!r}{known}")

    def claims_model(self, model: nn.Module) -> Claim | None:
        """By the classes a model derives from, and what timm writes into it."""
        ours = any(each.__module__.startswith("timm.models.") for each in type(model).__mro__)
        if not ours or not isinstance(getattr(model, "pretrained_cfg", None), dict):
            return None
        if type(model).__module__ == "timm.models._features" and not is_extractor(model):
            return None
        return Claim(0.9, f"{type(model).__name__} is a timm model")

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The base's index from ``config.json`` and headers.

        Raises:
            UnsupportedFormat: it is no configuration of timm.
        """
        about = described(files.config)
        if about is None:
            raise UnsupportedFormat(f"{files.folder} has no config.json of timm", "give the folder that timm saved")
        infos = {
            name: ParameterInfo(
                shape=info.shape,
                dtype=info.dtype,
                stored_as=name,
                role=_role(about.architecture, name, info.shape),
            )
            for name, info in files.tensors.items()
        }
        family = about.family
        extras = {name: infos.pop(name) for name in list(infos) if family and ends_with(name, family.leftovers)}
        tied, second = _tied(family, infos) if family else ((), {})
        return BaseIndex(
            ref=ref,
            framework=self.name,
            parameters=in_order(infos.items()),
            aliases=_ALIASES,
            tied=tied,
            extras=in_order((extras | second).items()),
            config=files.config,
        )

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """The index of a live or meta-device model; its reference is the repository that its weights are taken from.

        That is what its configuration names; whether they were in fact loaded, a model does not say.

        Raises:
            UnsupportedFormat: its weights are quantised in a way that no storage knows, or of a dtype that no
                safetensors file can hold.
        """
        config = live_config(model)
        spelled = _Spelled(model)
        entries, groups = live_entries(model)
        named = {spelled.canonical(name): info for name, info in entries.items()}
        return BaseIndex(
            ref=ref if ref != BaseRef() else pretrained_ref(config),
            framework=self.name,
            parameters=in_order(named.items()),
            aliases=_ALIASES,
            tied=tuple(sorted(tuple(spelled.canonical(name) for name in group) for group in groups)),
            config=config,
            registered=tuple(spelled.module(name) for name, _ in model.named_modules() if name),
        )

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Whole parameters; rows of fused ones and fused ones of several, where the table declares how they lie."""
        found = whole_layouts(index, targets)
        about = described(index.config)
        if about is None or about.family is None:
            return found
        for target in targets:
            if target not in found and not target.component:
                layout = fused_layout(about.family, index, target)
                if layout is not None:
                    found[target] = layout
        return found

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The weights a preset names: "attention", "all-linear" or "all-conv", without the heads.

        Raises:
            UsageError: no such preset, or the architecture has none of these, or is not in the table.
        """
        about = described(index.config)
        family = about.family if about else None
        name = about.architecture if about else "this model"
        if preset not in ("attention", *PRESETS):
            raise UsageError(f"there is no preset '{preset}'", f"presets: attention, {', '.join(PRESETS)}")
        if preset == "attention" and (family is None or not family.attention):
            others = [each for each in PRESETS if _meant(index, about, each)]
            raise UsageError(
                f"'attention' is not known for {name}",
                f"name the modules{', or take another preset: ' if others else ''}{', '.join(others)}",
            )
        if found := _meant(index, about, preset):
            return found
        others = [each for each in ("attention", *PRESETS) if _meant(index, about, each)]
        raise UsageError(
            f"{name} has no modules that '{preset}' means",
            f"take another preset: {', '.join(others)}" if others else "name the modules",
        )

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """The number of classes and their names."""
        about = described(index.config)
        return heads.edits(about, index, created, hints) if about else None

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """None: modules that are one in the class are so in every model of it."""
        return None

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """``config.json``; timm reads nothing else."""
        return ("config.json",) if "config.json" in files.configs else ()

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name."""
        spelled = _Spelled(model)
        return {spelled.canonical(name): tensor for name, tensor in live_tensors(model).items()}

    def site(self, model: nn.Module, name: str) -> Site | None:
        """By the exact class of the module, and those above it; see ``sites``."""
        return sites.site(model, name)

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The model in ``folder``, in evaluation mode; nothing is fetched.

        Raises:
            MissingDependency: timm is not installed.
            UnsupportedFormat: this timm does not have the architecture.
        """
        try:
            timm: Any = import_module("timm")
        except ModuleNotFoundError as error:
            if error.name != "timm":
                raise
            raise MissingDependency("timm is needed to open this base", f"pip install '{self.requires}'") from None
        files: Any = import_module("timm.models._hub")
        _, architecture, _ = files.load_model_config_from_path(folder)
        if not timm.is_model(architecture):
            raise UnsupportedFormat(
                f"{folder} is of the architecture {architecture!r}, which timm {timm.__version__} does not have",
                "pip install -U timm, or import what registers it",
            )
        model = cast("nn.Module", timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
        return model.to(to_torch(dtype)) if dtype else model


def _role(architecture: str, name: str, shape: tuple[int, ...]) -> str:
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        return ""
    axes = len(shape)
    if any(axes == n and fnmatchcase(architecture, which) and ends_with(module, ends) for which, ends, n in NO_ROLE):
        return ""
    return _ROLES.get(axes, "")


def _tied(
    family: Family, infos: dict[str, ParameterInfo]
) -> tuple[tuple[tuple[str, ...], ...], dict[str, ParameterInfo]]:
    """Groups of tied names, and second copies that the files hold; ``infos`` is left with one name of each group."""
    groups: dict[str, list[str]] = {}
    extras: dict[str, ParameterInfo] = {}
    for name in sorted(infos, key=natural):
        leader = _leader(family, name)
        if leader != name:
            groups.setdefault(leader, [leader]).append(name)
    for leader, (_, *others) in groups.items():
        first = infos.get(leader) or infos[others[0]]
        extras |= {name: infos[name] for name in others if name in infos and infos[name] is not first}
        for name in others:
            infos.pop(name, None)
        infos[leader] = first
    return tuple(sorted(tuple(group) for group in groups.values())), extras


def _leader(family: Family, name: str) -> str:
    for tied in family.tied:
        numbers = matched(tied.others, name)
        if numbers is not None:
            rest = name.split(".")[len(tied.others.split(".")) :]
            return ".".join([tied.leader.format(*numbers), *rest])
    return name


class _Spelled:
    """The canonical names of a live model."""

    def __init__(self, model: nn.Module) -> None:
        self._beginnings: Iterable[tuple[str, str]] = beginnings(model)

    def canonical(self, name: str) -> str:
        """That of a parameter."""
        for new, old in self._beginnings:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def module(self, name: str) -> str:
        """That of a module."""
        return self.canonical(f"{name}.").removesuffix(".")


def _meant(index: BaseIndex, about: Described | None, preset: str) -> list[Target]:
    """The weights a preset names, without the heads."""
    taken = about.classifier if about else ()
    attention = about.family.attention if about and about.family else ()
    found = []
    for each, info in index.parameters.items():
        module, _, parameter = each.rpartition(".")
        if parameter != "weight" or not info.role or module in taken:
            continue
        if info.role == PRESETS[preset] if preset != "attention" else ends_with(module, attention):
            found.append(Target("", module, parameter))
    return found
