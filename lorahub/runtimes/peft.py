"""PEFT: which adapters ``PeftModel.from_pretrained`` refuses, and which it takes but applies in part or otherwise.

Read from the 0.21.2 of its ``tuners`` and held against it by a test.  It takes modules by their paths and puts a layer
of its own around each, which it has for some classes of layers and not for others; so most of this shows with the base
alone: ``lorahub check ADAPTER --base BASE --for peft``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from lorahub.bases.index import ParameterInfo
from lorahub.deltas.kind import Group
from lorahub.findings import Verdict
from lorahub.hookspecs import hookimpl
from lorahub.runtimes.keys import unread_format
from lorahub.runtimes.runtime import Case, Look, Rule, Runtime, Subject

__all__ = ["LAYERS", "PEFT", "lorahub_runtimes"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

CONVERT = "lorahub convert {adapter} --to peft --base BASE -o FOLDER"
AS_LORA = "lorahub convert {adapter} --to peft --kind lora --base BASE -o FOLDER"
MERGE = "lorahub merge {adapter} --base BASE -o merged"

TURNED, EMBEDDING = "Conv1D of transformers", "Embedding"
_BY_AXES: Mapping[int, str] = MappingProxyType({2: "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"})
_KERNELS = ("Conv1d", "Conv2d", "Conv3d")

LAYERS: Mapping[str, Collection[str]] = MappingProxyType(
    {
        **dict.fromkeys(("lora", "dora"), ("Linear", TURNED, EMBEDDING, *_KERNELS)),
        **dict.fromkeys(("loha", "lokr"), ("Linear", "Conv1d", "Conv2d")),
        "ia3": ("Linear", TURNED, "Conv2d", "Conv3d"),
        "vera": ("Linear", TURNED),
        "oft": ("Linear", EMBEDDING, "Conv2d"),
    }
)
"""Kind -> the classes of layers for which PEFT has one of its own."""

MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""``model_type`` of architectures in which PEFT refuses LoRA and its like on some layers, for fused kernels pass by."""

_PASSED_BY = frozenset({"out_proj", "conv1d"})
_PRODUCTS = frozenset({"loha", "lokr"})
_LORA_LIKE = frozenset({"lora", "dora", "adalora", "randlora"})


def _in_other_files(subject: Subject) -> Case | None:
    found = subject.reading
    if found.format != "peft" or (found.file == WEIGHTS and CONFIG in subject.files.configs):
        return None
    return Case(value=found.file, where=(found.file,))


def _found(subject: Subject) -> Iterator[tuple[Group, ParameterInfo]]:
    """Every change of a layer's weight, with that weight in the base; nothing where no base is known."""
    index = subject.index
    if index is None:
        return
    for group in subject.reading.groups:
        name = f"{group.module}.weight"
        info = index.parameters.get(index.stored(name))
        if info is not None and group.parameter == "weight":
            yield group, replace(info, role=index.role(name))


def _layer(group: Group, info: ParameterInfo) -> str:
    if EMBEDDING.lower() in (group.role, info.role):
        return EMBEDDING
    return TURNED if info.transposed else _BY_AXES.get(len(info.shape), "layer of another class")


def _absent(subject: Subject) -> Case | None:
    """Modules that the base does not have as such, as a part of a fused projection; none where no base is known."""
    index = subject.index
    if index is None or subject.reading.format != "peft":
        return None
    there = index.modules()
    absent = [
        group.module
        for group in subject.reading.groups
        if group.module not in there and f"{group.module}.{group.parameter}" not in index.elsewhere
    ]
    names = dict.fromkeys(module.rpartition(".")[2] for module in absent)
    return Case(value=", ".join(names), where=tuple(absent)) if absent else None


def _other_layers(*, products: bool) -> Look:
    """A look for layers that PEFT lacks for a kind: of those that are LoRA in another dress, or of the others."""

    def look(subject: Subject) -> Case | None:
        found = [(group, _layer(group, info)) for group, info in _found(subject)]
        wrong = [
            (group, layer)
            for group, layer in found
            if layer not in LAYERS.get(group.kind, (layer,)) and (group.kind in _PRODUCTS) == products
        ]
        said = dict.fromkeys(f"{group.kind} on a {layer}" for group, layer in wrong)
        return Case(value=", ".join(said), where=tuple(group.module for group, _ in wrong)) if wrong else None

    return look


def _passed_by(subject: Subject) -> Case | None:
    index = subject.index
    kind = index.config.get("model_type") if index is not None else None
    if kind not in MAMBAS:
        return None
    where = [
        group.module
        for group in subject.reading.groups
        if group.kind in _LORA_LIKE and group.module.rpartition(".")[2] in _PASSED_BY
    ]
    return Case(value=str(kind), where=tuple(where)) if where else None


def _one_group(subject: Subject) -> Case | None:
    """Convolutions of one input for each output: depthwise ones, or the rare ones that have one input in all."""
    where = [
        group.module
        for group, info in _found(subject)
        if group.kind in ("lora", "dora", "oft") and _layer(group, info) in _KERNELS
        if info.shape[0] > 1 == info.shape[1]
    ]
    return Case(where=tuple(where)) if where else None


def _oblong(subject: Subject) -> Case | None:
    where = [
        group.module
        for group, info in _found(subject)
        if group.kind == "oft" and _layer(group, info) == "Conv2d" and info.shape[2] != info.shape[3]
    ]
    return Case(where=tuple(where)) if where else None


def _windows(subject: Subject) -> Case | None:
    where = [
        group.module
        for group, info in _found(subject)
        if group.kind == "oft" and _layer(group, info) == "Conv2d" and max(info.shape[2:]) > 1
    ]
    return Case(where=tuple(where)) if where else None


RULES = (
    Rule(
        code="peft-format",
        level=Verdict.INCOMPATIBLE,
        message=f"PEFT reads {WEIGHTS} with {CONFIG}, and this is {{value}}",
        remedy=CONVERT,
        look=unread_format(("peft",)),
    ),
    Rule(
        code="peft-files",
        level=Verdict.INCOMPATIBLE,
        message=f"PEFT reads {WEIGHTS} with {CONFIG}, and this is {{value}}, or has no such config",
        remedy=CONVERT,
        look=_in_other_files,
    ),
    Rule(
        code="peft-module",
        level=Verdict.INCOMPATIBLE,
        message="PEFT finds modules by their paths, and this base has none for {value}, which may be parts of a fused "
        "projection: it refuses the adapter, or leaves them out",
        remedy=CONVERT,
        look=_absent,
    ),
    Rule(
        code="peft-layer",
        level=Verdict.INCOMPATIBLE,
        message="PEFT refuses {value}",
        remedy=MERGE,
        look=_other_layers(products=False),
    ),
    Rule(
        code="peft-product",
        level=Verdict.INCOMPATIBLE,
        message="PEFT refuses {value}, where it takes LoRA",
        remedy=AS_LORA,
        look=_other_layers(products=True),
    ),
    Rule(
        code="peft-mamba",
        level=Verdict.INCOMPATIBLE,
        message="in models of type {value} PEFT refuses LoRA on out_proj and conv1d, which fused kernels pass by",
        remedy=MERGE,
        look=_passed_by,
    ),
    Rule(
        code="peft-oblong-kernel",
        level=Verdict.INCOMPATIBLE,
        message="PEFT takes every kernel under OFT for a square, and refuses the angles of any other",
        remedy=MERGE,
        look=_oblong,
    ),
    Rule(
        code="peft-grouped",
        level=Verdict.DEGRADED,
        message="PEFT's factors on a grouped convolution are for all of its inputs, and these are for one group: PEFT "
        "refuses them, unless the convolution has a single input",
        remedy=MERGE,
        look=_one_group,
    ),
    Rule(
        code="peft-oft-unmerged",
        level=Verdict.DEGRADED,
        message="until it merges OFT on a kernel, PEFT turns overlapping windows of the input, which is another "
        "function than what it merges and what lorahub trains",
        remedy="in PEFT: model = PeftModel.from_pretrained(BASE, '{adapter}').merge_and_unload()",
        look=_windows,
    ),
)

PEFT = Runtime(name="peft", title="PEFT", versions="0.21", rules=RULES)


@hookimpl
def lorahub_runtimes() -> list[Runtime]:
    """The table of PEFT."""
    return [PEFT]
