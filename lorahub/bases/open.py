"""Open a base: survey its files, let a framework claim it, get its index.

Headers and configs only; weights are neither read nor hashed here (``weights.py`` does that).  Knows no framework.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from lorahub.bases.framework import BaseFiles, Framework, TakesPipelines
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.pipelines import PIPELINE, components_of, joined
from lorahub.bases.weights import weights_digest
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, NotFound, UnsupportedFormat, UsageError
from lorahub.files.header import Header, read_header
from lorahub.files.journal import demand_settled
from lorahub.files.raw import open_regular, read_into
from lorahub.files.shards import read_shards
from lorahub.files.tensors import WEIGHT_FILES
from lorahub.findings import Claim
from lorahub.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CONFIGS",
    "CONFIG_BYTES",
    "INDEX",
    "as_module",
    "choose_weights",
    "index_base",
    "index_live",
    "parse_config",
    "survey_base",
    "weights_digest",
]

CONFIGS = ("config.json", "generation_config.json", PIPELINE)
"""The JSON files that are parsed; a tokenizer's may be large and says nothing about weights."""

CONFIG_BYTES = 4 << 20
"""The largest config that is parsed."""

INDEX = ".safetensors.index.json"
"""How the index of a checkpoint in several files ends."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MOST_FILES = 10_000

_CONVERT = (
    'convert it once, where you trust it: python -c "from transformers import AutoModel; '
    "AutoModel.from_pretrained('FOLDER').save_pretrained('OUT')\"   (with the class of your model)"
)


def survey_base(place: str | os.PathLike[str]) -> BaseFiles:
    """What lies in a base folder, a pipeline's, or of a single weights file or index: headers and parsed configs.

    Raises:
        NotFound: nothing is there, or shards are missing.
        UnsupportedFormat: there are no safetensors weights, or too many to choose from; the hint says what to do.
        HeaderError, IntegrityError: weights files are malformed, or index and shards disagree.
    """
    place = Path(place)
    folder = place if place.is_dir() else place.parent
    if place.is_dir():
        names = sorted(_names(folder))
        if (pipeline := _pipeline(folder, names)) is not None:
            return pipeline
        weights = folder / choose_weights(names, folder)
    elif place.is_file():
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        weights = place
    else:
        raise NotFound(f"there is no base at {place}", "give a folder with config.json and safetensors files")
    demand_settled(folder)
    if weights.name.endswith(INDEX):
        headers: Mapping[Path, Header] = read_shards(weights)
    elif weights.suffix == ".safetensors":
        headers = {weights: read_header(weights)}
    else:
        raise UnsupportedFormat(f"{weights} is no safetensors file", _CONVERT if weights.suffix in _PICKLES else "")
    by_name = {path.name: header for path, header in headers.items()}
    configs = {name: _read_object(folder / name) for name in CONFIGS if name in names}
    return BaseFiles(
        folder=folder,
        headers=MappingProxyType(by_name),
        configs=MappingProxyType(configs),
        others=tuple(name for name in names if name not in by_name and name not in configs),
    )


def _pipeline(folder: Path, names: Collection[str]) -> BaseFiles | None:
    """A pipeline by its components, or None where the folder is none."""
    if PIPELINE not in names:
        return None
    said = _read_object(folder / PIPELINE)
    components = components_of(said, names, folder)
    if not components:
        return None
    demand_settled(folder)
    parts = {component: survey_base(folder / component) for component in components}
    return joined(folder, parts, MappingProxyType({PIPELINE: said}), names)


def index_base(
    files: BaseFiles, ref: BaseRef, frameworks: Mapping[str, Framework], *, weights: str = ""
) -> tuple[Framework, BaseIndex]:
    """The framework that claims the base most surely, and its index.

    Args:
        files: what was found.
        ref: which base it is.
        frameworks: by registered name.
        weights: the digest of the weight files, for the index; "" where nobody hashed them.

    Raises:
        UnsupportedFormat: no framework claims the files, two claim them alike, or the one that does cannot name them.
    """
    claims = {name: framework.claims(files) for name, framework in frameworks.items()}
    if files.parts and not any(claims.values()):
        raise UnsupportedFormat(
            f"{files.folder} is a pipeline, and no plugin that is installed takes pipelines",
            f"pip install lorahub-diffusers, or name one component: {files.folder}/{next(iter(files.parts))}",
        )
    framework = _winner(claims, frameworks, str(files.folder))
    return framework, replace(framework.index(ref, files), weights=weights)


def as_module(given: object, frameworks: Mapping[str, Framework]) -> nn.Module:
    """A live base as a module: itself, or of a pipeline the view that a framework has of it.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(given, torch.nn.Module):
        return given
    views = (each.as_module(given) for each in frameworks.values() if isinstance(each, TakesPipelines))
    found = next((view for view in views if view is not None), None)
    if found is None:
        raise UsageError(
            f"a base is a folder, a reference, an nn.Module or a pipeline; this is a {type(given).__name__}",
            "pipelines need their plugin: lorahub plugins",
        )
    return found


def index_live(model: nn.Module, frameworks: Mapping[str, Framework]) -> tuple[Framework, BaseIndex]:
    """The framework that claims a live (or meta-device) model most surely, and its index.

    Raises:
        UsageError: it is no ``nn.Module``.
        UnsupportedFormat: as ``index_base``.
    """
    model = as_module(model, frameworks)
    claims = {name: framework.claims_model(model) for name, framework in frameworks.items()}
    framework = _winner(claims, frameworks, f"the live {type(model).__name__}")
    return framework, framework.index_model(model, BaseRef())


def _winner(claims: Mapping[str, Claim | None], frameworks: Mapping[str, Framework], what: str) -> Framework:
    made = {name: claim for name, claim in claims.items() if claim}
    if not made:
        raise UnsupportedFormat(f"no framework knows {what}", "lorahub plugins")
    best = max(claim.score for claim in made.values())
    winners = sorted(name for name, claim in made.items() if claim.score == best)
    if len(winners) > 1:
        reasons = "; ".join(f"{name}: {made[name].reason}" for name in winners)
        raise UnsupportedFormat(
            f"{' and '.join(winners)} claim {what} with equal right ({reasons})",
            f"leave one out: LORAHUB_DISABLE_PLUGINS={winners[-1]}",
        )
    return frameworks[winners[0]]


def _names(folder: Path) -> Iterator[str]:
    """Files of the folder and of its subfolders, one level deep, by their paths; hidden ones left out."""
    count = 0
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        inner = sorted(entry.iterdir()) if entry.is_dir() else [entry]
        for path in inner:
            count += 1
            if count > _MOST_FILES:
                raise UnsupportedFormat(f"{folder} holds more than {_MOST_FILES} files", "name the folder of the model")
            if path.is_file() and not path.name.startswith("."):
                yield path.relative_to(folder).as_posix()


def choose_weights(names: Collection[str], folder: PurePath) -> str:
    """The weights file or index among the files of a folder, which may lie on a hub.

    Args:
        names: paths within the folder.
        folder: what to call it in messages.

    Raises:
        UnsupportedFormat: there is none, or there are too many to choose from; the hint says what to do.
    """
    for name in WEIGHT_FILES:
        if name in names:
            return name
    here = [name for name in names if "/" not in name]
    if "adapter_config.json" in here:
        raise UnsupportedFormat(f"{folder} holds an adapter, not a base", "name the base that the adapter is for")
    for suffix, what in ((INDEX, "indices"), (".safetensors", "safetensors files")):
        found = [name for name in here if name.endswith(suffix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnsupportedFormat(
                f"{folder} holds {len(found)} {what} and none is called {WEIGHT_FILES[0]}: {', '.join(found[:3])}",
                f"name the one that is meant: {folder / found[0]}",
            )
    if below := sorted({name.partition("/")[0] for name in names if "/" in name and name.endswith(".safetensors")}):
        raise UnsupportedFormat(
            f"{folder} has no weights itself; there are some in {', '.join(below[:5])}",
            f"name one: {folder / below[0]}",
        )
    if pickles := [name for name in here if name.endswith(_PICKLES)]:
        raise UnsupportedFormat(
            f"{folder} has only pickles ({', '.join(pickles[:3])}), which are never opened: they can run any code",
            _CONVERT,
        )
    raise UnsupportedFormat(
        f"{folder} holds no safetensors weights; looked for {', '.join(WEIGHT_FILES[:2])}", "is it the right folder?"
    )


def _read_object(path: Path) -> Mapping[str, JSON]:
    """A JSON object, read under a limit.

    Raises:
        IntegrityError: it is too large, no JSON, nested too deeply, or no object.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > CONFIG_BYTES:
            raise IntegrityError(f"{path} takes {size} bytes, over the limit of {CONFIG_BYTES} for a config")
        raw = bytearray(size)
        read_into(file, 0, raw)
    return parse_config(raw, where=str(path))


def parse_config(raw: bytes | bytearray, *, where: str) -> Mapping[str, JSON]:
    """The JSON object in ``raw``, called ``where`` in messages.

    Raises:
        IntegrityError: it is no JSON, nested too deeply, or no object.
    """
    try:
        value: object = json.loads(raw)  # not strictly: configurations in the wild hold Infinity
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise IntegrityError(f"{where} is not JSON: {reason}", "fetch it again, or ask its author") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{where} holds no JSON object", "fetch it again, or ask its author")
    return MappingProxyType(cast("dict[str, JSON]", value))
