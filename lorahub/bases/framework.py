"""What a framework tells lorahub about its bases: names, layouts, heads, files.

Frameworks live in plugins; the built-in one (``torch_module``) takes any ``nn.Module`` as it is.  ``claims``,
``index`` and ``layouts`` work from files and configs alone, without importing the framework or torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lorahub.bases.experts import matrix_pieces, stack_pieces
from lorahub.bases.fused_experts import part_pieces
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.bases.site import Site
from lorahub.deltas.kind import JSON
from lorahub.files.header import Header, TensorInfo
from lorahub.findings import Claim

if TYPE_CHECKING:
    from torch import nn

    from lorahub.lazy import torch

__all__ = ["BaseFiles", "Created", "Edits", "Framework", "TakesPipelines", "Widens", "whole_layouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFiles:
    """What lies in a base folder, headers and configs only.

    Attributes:
        folder: where it lies.
        headers: name of a weights file -> header; each tensor is in one of them only.
        configs: JSON file name -> parsed object (``config.json`` ...).
        others: every other file, by its path within the folder.
        parts: of a pipeline, component -> its own files.  ``headers`` then has the files of all, by their paths, and
            says the component and a dot before each tensor's name, which the file itself does not.
    """

    folder: Path
    headers: Mapping[str, Header]
    configs: Mapping[str, Mapping[str, JSON]]
    others: tuple[str, ...] = ()
    parts: Mapping[str, BaseFiles] = field(default_factory=lambda: MappingProxyType({}))

    def prefix(self, file: str) -> str:
        """What ``headers`` says before each tensor's name of a file, and the file does not."""
        component, slash, _ = file.partition("/")
        return f"{component}." if slash and component in self.parts else ""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by its stored name, whichever file it is in."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @property
    def config(self) -> Mapping[str, JSON]:
        """What ``config.json`` says; empty where there is none."""
        return self.configs.get("config.json", {})


Created = Mapping[str, tuple[tuple[int, ...], str]]
"""Parameters that adapters bring and the base lacks: canonical name -> (shape, dtype code)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What a created head or an untied parameter changes elsewhere.

    Attributes:
        config: key -> new value for the saved ``config.json``.
        removed: parameters of the base that the edited architecture no longer has.
        renamed: canonical name -> name in the saved checkpoint, where it is not the stored one.
        copied: canonical name -> the parameter it was tied to: now saved on its own, made from that value.
        missing: what the edited architecture needs and neither base nor adapters have, as parameters or modules; such
            a checkpoint would load with random numbers there.
    """

    config: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    removed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    copied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    missing: tuple[str, ...] = ()


class Framework(Protocol):
    """One way in which models are built, named and stored."""

    @property
    def name(self) -> str:
        """Unique: "transformers"."""

    @property
    def requires(self) -> str:
        """The requirement that using it needs, as "transformers>=5,<6"; "" for none."""

    def claims(self, files: BaseFiles) -> Claim | None:
        """How sure the framework is that the folder holds one of its bases; imports nothing of the framework."""

    def claims_model(self, model: nn.Module) -> Claim | None:
        """How sure the framework is that a live model is one of its own."""

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The base's index from headers and config; no weights, no torch.

        Raises:
            UnsupportedFormat: the framework claims the base but cannot name its parameters; the message says why.
        """

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """The same index from a live or meta-device model."""

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Where each target lands; targets the base lacks are left out.

        A target that shares a stored parameter with others (``index.tied``) lands in that one, whose name differs.
        """

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The targets a preset names ("attention", "all-linear"), in canonical order.

        Raises:
            UsageError: no such preset, or none for this base.
        """

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """What must change elsewhere when ``created`` parameters are added, or None where this base cannot take them.

        Args:
            index: the base.
            created: what adapters bring: parameters the base lacks, or has in another shape.
            hints: what the adapters say of their task ("task_type", "auto_mapping", "id2label").
        """

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """What must change so that ``names`` are saved apart from what they are tied to.

        None where that cannot be said in the base's configuration: loading would tie them again.
        """

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """The files that go along with the weights into a merged folder (config, tokenizer, processor), sorted."""

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name; tied names give the same tensor."""

    def site(self, model: nn.Module, name: str) -> Site | None:
        """How a module's output comes from the parameter of that dotted name in ``model``.

        None where that is not known: whoever wants to change the parameter puts another in its place.
        """

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The model in ``folder``, on the CPU, in ``dtype`` (safetensors code) or as stored.

        Raises:
            MissingDependency: the framework is not installed.
        """


@runtime_checkable
class TakesPipelines(Protocol):
    """What a framework has besides where its live bases are no modules themselves but hold some."""

    def as_module(self, given: object) -> nn.Module | None:
        """A module whose children are the very models that ``given`` holds; None where it is none of the framework's.

        ``claims_model``, ``index_model`` and the rest then take that module.
        """


@runtime_checkable
class Widens(Protocol):
    """What a framework has besides where layers of its models may take more inputs than they do."""

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """What changes elsewhere when a weight gets more columns, which are zero; None where it cannot.

        Args:
            index: the base.
            name: the parameter.
            shape: that it gets: its own, but for more on axis 1.
        """


def whole_layouts(index: BaseIndex, targets: Collection[Target]) -> dict[Target, Layout]:
    """One whole-parameter layout for each target the base has, transposed where the index declares it.

    A stack of experts that the base keeps one by one has a piece for each, and so has a projection of theirs that it
    keeps together with another; one expert of a stack lies in a part of it.
    """
    names = {target: index.stored(target.name) for target in targets}
    found = {
        target: Layout(
            target=target,
            pieces=(Piece(parameter=name, of_parameter=Region(transposed=index.parameters[name].transposed)),),
        )
        for target, name in names.items()
        if name in index.parameters
    }
    apart = (target for target in names if target not in found and not target.component)
    return found | {
        target: Layout(target=target, pieces=pieces)
        for target in apart
        if (
            pieces := index.elsewhere.get(target.name, ())
            or stack_pieces(index, target.module, target.parameter)
            or part_pieces(index, target.module, target.parameter)
            or matrix_pieces(index, target.module, target.parameter)
        )
    }
