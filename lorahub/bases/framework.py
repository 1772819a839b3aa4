"""What a framework tells lorahub about its bases: names, layouts, heads, files.

Frameworks live in plugins; the built-in one (``torch_module``) takes any ``nn.Module`` as it is.  ``claims``,
``index`` and ``layouts`` work from files and configs alone, without importing the framework or torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.kind import JSON
from lorahub.files.header import Header
from lorahub.findings import Claim

if TYPE_CHECKING:
    from torch import nn

    from lorahub.lazy import torch

__all__ = ["BaseFiles", "Created", "Edits", "Framework", "whole_layouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFiles:
    """What lies in a base folder, headers and configs only.

    Attributes:
        folder: where it lies.
        headers: safetensors file name -> header.
        configs: JSON file name -> parsed object (``config.json`` ...).
        others: every other file name.
    """

    folder: Path
    headers: Mapping[str, Header]
    configs: Mapping[str, Mapping[str, JSON]]
    others: tuple[str, ...] = ()


Created = Mapping[str, tuple[tuple[int, ...], str]]
"""Parameters that adapters bring and the base lacks: canonical name -> (shape, dtype code)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What a created head changes elsewhere.

    Attributes:
        config: key -> new value for the saved ``config.json``.
        removed: parameters of the base that the edited architecture no longer has.
        renamed: canonical name -> name in the saved checkpoint, where it is not the stored one.
    """

    config: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    removed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


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
        """Where each target lands; targets the base lacks are left out."""

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The targets a preset names ("attention", "all-linear"), in canonical order."""

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """What must change elsewhere when ``created`` parameters are added, or None where this base cannot take them."""

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name; tied names give the same tensor."""

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The model in ``folder``, on the CPU, in ``dtype`` (safetensors code) or as stored.

        Raises:
            MissingDependency: the framework is not installed.
        """


def whole_layouts(index: BaseIndex, targets: Collection[Target]) -> dict[Target, Layout]:
    """One whole-parameter layout for each target the base has, transposed where the index declares it."""
    names = {target: target.name for target in targets}
    return {
        target: Layout(
            target=target,
            pieces=(Piece(parameter=name, of_parameter=Region(transposed=index.parameters[name].transposed)),),
        )
        for target, name in names.items()
        if name in index.parameters
    }
