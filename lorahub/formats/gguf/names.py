"""Modules under Hugging Face's names and under llama.cpp's, by the tables of the ``gguf`` package.

A name is looked up, never taken apart: from the base's modules to llama.cpp's names, and back along the same pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from lorahub.bases.fused_experts import FUSED, PROJECTIONS
from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat
from lorahub.files.gguf import package
from lorahub.formats.gguf.tables import MODELS
from lorahub.formats.peft.keys import Stems

__all__ = ["GgufStems", "architecture_of", "name_table", "spell"]

_INNER = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
"""How the language model inside a larger one begins -> how it would by itself; the converter knows only the latter."""


def architecture_of(config: Mapping[str, JSON]) -> str:
    """llama.cpp's name for a base's architecture, or "" where the config does not tell or it is not in the table."""
    inner = config.get("text_config")
    kinds = [inner.get("model_type") if isinstance(inner, dict) else None, config.get("model_type")]
    return next((MODELS[kind] for kind in kinds if isinstance(kind, str) and kind in MODELS), "")


def name_table(architecture: str, modules: Collection[str]) -> Any:
    """The package's table for an architecture with as many blocks as the highest number in ``modules`` asks for.

    Raises:
        UnsupportedFormat: the package does not know the architecture.
        MissingDependency: it is not installed.
    """
    gguf = package("tell llama.cpp's names of tensors")
    kind = next((each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise UnsupportedFormat(
            f"the installed gguf package does not know the architecture {architecture!r}",
            "pip install --upgrade gguf",
        )
    numbers = [int(part) for module in modules for part in module.split(".") if part.isdigit() and len(part) < 5]
    return gguf.get_tensor_name_map(kind, max(numbers, default=0) + 1)


def spell(table: Any, module: str) -> str | None:
    """llama.cpp's name for a module, or None; names that are llama.cpp's already stay."""
    found: str | None = table.get_name(module)
    if found is None:
        inner = next((short + module.removeprefix(long) for long, short in _INNER if module.startswith(long)), None)
        found = table.get_name(inner) if inner else None
    return found


def _projections(module: str, parameters: Collection[str]) -> list[tuple[str, str]]:
    """(module of all experts, projection) pairs that a module stands for: one expert's own, or its parameters."""
    around, _, projection = module.rpartition(".")
    within, _, number = around.rpartition(".")
    if number.isdigit() and within.endswith("experts"):
        return [(within, projection)]
    if not module.endswith("experts"):
        return []
    return [(module, part) for name in parameters for part in (PROJECTIONS if name == FUSED else (name,))]


@final
class GgufStems(Stems):
    """llama.cpp's names -> the modules of a base."""

    __slots__ = ("_named", "experts")

    def __init__(self, index: BaseIndex | None, architecture: str) -> None:
        super().__init__(index)
        self._named: dict[str, str] = {}
        self.experts: dict[str, tuple[str, str]] = {}
        """llama.cpp's name of a stack of experts -> the module that holds them and which of its projections it is."""
        if index is None:
            return
        modules = index.modules()
        table = name_table(architecture, modules)
        for module, parameters in modules.items():
            for other in index.spellings(module):
                if name := spell(table, other):
                    self._named.setdefault(name, module)
                for within, projection in _projections(module, parameters):
                    around = other if within == module else other.removesuffix(module.removeprefix(within))
                    if name := spell(table, f"{around}.{projection}"):
                        self.experts.setdefault(name, (within, projection))

    def find(self, spelled: str) -> str | None:
        """The base's name for a module of the file, or None where no base is known or it has no such module."""
        return self._named.get(spelled)
