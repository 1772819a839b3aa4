"""The framework "diffusers": single models of diffusers, from their configuration and headers.

A UNet, a transformer, an autoencoder, a controlnet: a folder with a ``config.json`` that names a class of diffusers,
or such a model itself.  Stored names are the live ones, but for attention blocks of old autoencoders.  Only
``open_base`` imports diffusers; whole pipelines are ``pipelines.py``'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from lorahub.bases.calls import site_of
from lorahub.bases.framework import BaseFiles, Created, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Target
from lorahub.bases.open import survey_base
from lorahub.bases.site import Site
from lorahub.bases.torch_module import in_order, live_entries, live_tensors
from lorahub.deltas.kind import JSON
from lorahub.errors import MissingDependency, UnsupportedFormat, UsageError
from lorahub.files.dtypes import to_torch
from lorahub.findings import Claim
from lorahub_diffusers import control
from lorahub_diffusers.fused import fused_layout
from lorahub_diffusers.roles import in_attention, role_of
from lorahub_diffusers.stored_names import canonical, is_copy
from lorahub_diffusers.unwrapped import demand_apart, fused_attentions, unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["PRESETS", "REQUIRES", "Diffusers", "class_of", "import_diffusers", "usual_dtype"]

REQUIRES = "diffusers>=0.42,<1"

PRESETS: Mapping[str, str] = MappingProxyType({"all-linear": "linear", "all-conv": "conv"})
"""Preset -> what the modules are; ``attention`` goes by names."""

_CLASS = "_class_name"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIndex(BaseIndex):
    """The index of one model.

    Attributes:
        fused: attentions of a live model that compute queries, keys and values by a projection of their own.
    """

    fused: tuple[str, ...] = field(default=(), compare=False)


class Diffusers:
    """Models of diffusers."""

    name = "diffusers"
    requires = REQUIRES

    def claims(self, files: BaseFiles) -> Claim | None:
        """By ``_class_name`` in ``config.json``, as diffusers writes it."""
        kind = class_of(files.config)
        return Claim(0.9, f"config.json says _class_name {kind!r}") if kind and files.headers else None

    def claims_model(self, model: nn.Module) -> Claim | None:
        """By the classes a model derives from."""
        if not _live_class(model):
            return None
        return Claim(0.9, f"{type(model).__name__} is a model of diffusers")

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The base's index from ``config.json`` and headers.

        Raises:
            UnsupportedFormat: it is no configuration of diffusers, or its weights are quantised.
        """
        kind = class_of(files.config)
        if not kind:
            raise UnsupportedFormat(
                f"{files.folder} has no config.json of diffusers", "give the folder that save_pretrained wrote"
            )
        _refuse_quantised(files.config, str(files.folder))
        stored = files.tensors
        named = {name: canonical(kind, name) for name in stored}
        extras = {name for name in stored if is_copy(name, stored)}
        return self._assemble(
            ref,
            kind,
            files.config,
            {
                named[name]: ParameterInfo(shape=info.shape, dtype=info.dtype, stored_as=name)
                for name, info in stored.items()
                if name not in extras
            },
            extras={
                name: ParameterInfo(shape=stored[name].shape, dtype=stored[name].dtype, stored_as=name)
                for name in extras
            },
        )

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """The index of a live or meta-device model; layers that others put around its own are looked through.

        Raises:
            UnsupportedFormat: its weights are quantised in a way that no storage knows.
        """
        found, tied = live_entries(unwrapped(model))
        entries = {name: info for name, info in found.items() if not is_copy(name, found)}
        fused = fused_attentions(model)
        return self._assemble(ref, _live_class(model), _live_config(model), entries, tied=tied, fused=fused)

    def _assemble(
        self,
        ref: BaseRef,
        kind: str,
        config: Mapping[str, JSON],
        named: Mapping[str, ParameterInfo],
        *,
        tied: tuple[tuple[str, ...], ...] = (),
        extras: Mapping[str, ParameterInfo] = MappingProxyType({}),
        fused: tuple[str, ...] = (),
    ) -> BaseIndex:
        parameters = in_order(
            (
                name,
                ParameterInfo(
                    shape=info.shape,
                    dtype=info.dtype,
                    stored_as=info.stored_as,
                    role=role_of(kind, config, name, info.shape),
                    turned=info.turned,
                    storage=info.storage,
                ),
            )
            for name, info in named.items()
        )
        return ModelIndex(
            ref=ref,
            framework=self.name,
            parameters=parameters,
            tied=tuple(sorted(tied)),
            extras=in_order(extras.items()),
            config=config,
            fused=fused,
        )

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Whole parameters, and rows of fused ones where the table declares how they lie; see ``fused``.

        Raises:
            UnsupportedFormat: a live model has fused the projections that targets name, so that they are out of use.
        """
        found, kind = whole_layouts(index, targets), class_of(index.config)
        if isinstance(index, ModelIndex) and index.fused:
            demand_apart(kind, index.fused, targets)
        for target in targets:
            if target not in found and (layout := fused_layout(kind, index, target)):
                found[target] = layout
        return found

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The weights a preset names: "attention", "all-linear" or "all-conv".

        Raises:
            UsageError: no such preset, or the model has none of these.
        """
        if preset not in ("attention", *PRESETS):
            raise UsageError(f"there is no preset '{preset}'", f"presets: attention, {', '.join(PRESETS)}")
        if found := _meant(index, preset):
            return found
        others = [each for each in ("attention", *PRESETS) if _meant(index, each)]
        raise UsageError(
            f"{class_of(index.config) or 'this model'} has no modules that '{preset}' means",
            f"take another preset: {', '.join(others)}" if others else "name the modules",
        )

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """None, but for nothing: the classes of diffusers have no heads."""
        return None if created else Edits()

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """What changes elsewhere when a first layer takes more inputs; see ``control``."""
        return control.widening(class_of(index.config), index, name, shape)

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """None: what is tied in a class is so in every model of it."""
        return None

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """``config.json``; diffusers reads nothing else."""
        return ("config.json",) if "config.json" in files.configs else ()

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name."""
        return live_tensors(unwrapped(model))

    def site(self, model: nn.Module, name: str) -> Site | None:
        """By the exact class of the module; see ``lorahub.bases.calls``."""
        return site_of(model, name)

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The model in ``folder``, in evaluation mode; nothing is fetched and no remote code runs.

        Raises:
            MissingDependency: diffusers is not installed.
            UnsupportedFormat: this diffusers does not have the class.
        """
        diffusers = import_diffusers(self.requires)
        files = survey_base(folder)
        kind = class_of(files.config)
        chosen = getattr(diffusers, kind, None) if kind else None
        if not (isinstance(chosen, type) and issubclass(chosen, diffusers.ModelMixin)):
            raise UnsupportedFormat(
                f"{folder} is of the class {kind!r}, which diffusers {diffusers.__version__} does not have",
                "pip install -U diffusers, or open the model yourself and give the live model",
            )
        stored = to_torch(dtype or usual_dtype(files))
        model: nn.Module = cast("Any", chosen).from_pretrained(folder, dtype=stored, local_files_only=True)
        return model.eval()


def import_diffusers(requires: str = REQUIRES) -> Any:
    """The package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingDependency("diffusers is needed for this", f"pip install '{requires}'") from None


def class_of(config: Mapping[str, JSON]) -> str:
    """The class that a configuration of a model names; "" where diffusers did not write it."""
    found = config.get(_CLASS)
    return found if isinstance(found, str) else ""


def _live_class(model: nn.Module) -> str:
    """The first class of diffusers that a model derives from, or "" where it is no model of diffusers."""
    classes = type(model).__mro__
    if not any((each.__module__, each.__qualname__) == _MIXIN for each in classes):
        return ""
    own = (each.__name__ for each in classes if each.__module__.startswith("diffusers."))
    found = next(own)
    return found if found != "ModelMixin" else type(model).__name__


_MIXIN = ("diffusers.models.modeling_utils", "ModelMixin")


def _live_config(model: Any) -> dict[str, JSON]:
    """The configuration that a live model would be saved with, as far as JSON can say it."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if key != "_name_or_path"}
    said: dict[str, JSON] = json.loads(json.dumps({**config, _CLASS: _live_class(model)}, default=str))
    return said


def usual_dtype(files: BaseFiles) -> str:
    """The dtype that most numbers of the files have."""
    sizes: Counter[str] = Counter()
    for info in files.tensors.values():
        if info.dtype in ("F32", "F16", "BF16", "F64"):
            sizes[info.dtype] += prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _refuse_quantised(config: Mapping[str, JSON], what: str) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else "unnamed"
        raise UnsupportedFormat(
            f"{what} is quantised (method {method}): its stored tensors are not its weights",
            "merge into the model in 16 bits that it was made from, and quantise the result",
        )


def _meant(index: BaseIndex, preset: str) -> list[Target]:
    """The weights a preset names."""
    found = []
    for name, info in index.parameters.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight":
            continue
        if info.role == "linear" and in_attention(module) if preset == "attention" else info.role == PRESETS[preset]:
            found.append(Target("", module, parameter))
    return found
