"""Pipelines on disk: a ``model_index.json``, and a folder for each component.

What is needed of the index is which folders are components with weights; what their models are is theirs to say.
Names and headers alone; knows no framework.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from lorahub.bases.framework import BaseFiles
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat
from lorahub.files.header import prefixed

__all__ = ["PIPELINE", "components_of", "joined"]

PIPELINE = "model_index.json"
"""The file that makes a folder a pipeline."""

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_MODELS = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor", "Scheduler")
"""How classes end that have no weights, whatever lies in their folders."""


def components_of(index: Mapping[str, JSON], names: Collection[str], place: object) -> dict[str, tuple[str, ...]]:
    """Component -> its files, by their paths within its folder, for those that are models.

    Args:
        index: what ``model_index.json`` says: component -> [library, class], among other things.
        names: of the pipeline's files, by their paths.
        place: what to call it in messages.

    Raises:
        UnsupportedFormat: a model has no safetensors there.
    """
    found = {}
    for component, said in index.items():
        if not (isinstance(said, list) and len(said) == 2 and all(isinstance(each, str) for each in said)):
            continue
        own = sorted(name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/"))
        model = "config.json" in own or any(name.endswith((*_WEIGHTS, *_PICKLES)) for name in own)
        if model and not str(said[1]).endswith(_NO_MODELS):
            found[component] = tuple(own)
    if bad := [component for component, own in found.items() if not any(name.endswith(_WEIGHTS) for name in own)]:
        raise UnsupportedFormat(
            f"{place} has no safetensors for {', '.join(bad)}, and pickles are never opened: they can run any code",
            'convert it once, where you trust it: python -c "from diffusers import DiffusionPipeline; '
            "DiffusionPipeline.from_pretrained('PIPELINE').save_pretrained('OUT')\"",
        )
    return found


def joined(
    folder: Path, parts: Mapping[str, BaseFiles], configs: Mapping[str, Mapping[str, JSON]], names: Collection[str]
) -> BaseFiles:
    """A pipeline's files: those of its components under their paths, tensors behind the component's name.

    Args:
        folder: the pipeline's.
        parts: component -> what lies in its folder.
        configs: of the pipeline itself.
        names: every file, by its path.
    """
    headers = {
        f"{component}/{name}": prefixed(header, f"{component}.")
        for component, part in parts.items()
        for name, header in part.headers.items()
    }
    return BaseFiles(
        folder=folder,
        headers=MappingProxyType(headers),
        configs=configs,
        others=tuple(sorted(name for name in names if name not in headers and name not in configs)),
        parts=MappingProxyType(dict(parts)),
    )
