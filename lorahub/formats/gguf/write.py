"""Deltas spelled as llama.cpp's ``convert_lora_to_gguf.py`` spells a PEFT adapter: names, rows, sizes and alpha.

Which names and rows those are depends on the base's architecture, so its config has to be known; an adapter that was
read from GGUF without a base has llama.cpp's names already and is written back as it is.  Tensors keep their dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta, take
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.peft_config import alpha_for
from lorahub.errors import CannotCarry, UnsupportedFormat
from lorahub.formats.format import Written
from lorahub.formats.gguf.names import architecture_of, name_table, spell
from lorahub.formats.gguf.tables import (
    ALPHA,
    ARCHITECTURE,
    EMBEDDING,
    EXACT_ALPHA,
    FILE,
    LINEAR,
    PAIRED,
    ROTATED,
    TOKENS,
    TYPE,
)
from lorahub.formats.rope import heads_of, to_pairs
from lorahub.lazy import torch

__all__ = ["write"]


def write(deltas: Mapping[Target, Delta], kinds: Mapping[str, Kind], hints: Mapping[str, JSON]) -> Written:
    """Spell ``deltas`` for llama.cpp.

    Args:
        deltas: LoRA on matrices; rows as the base has them, or as in GGUF where the names are GGUF's.
        kinds: every registered kind, by name.
        hints: ``base_config`` (the base's ``config.json``), or ``gguf_architecture`` for names that are GGUF's;
            ``base_repo``.

    Raises:
        CannotCarry: the base is not known or not in the table; other kinds than LoRA; scales that no one alpha gives.
        MissingDependency: the gguf package, which knows the names, is not installed.
    """
    given = hints.get("base_config")
    config = given if isinstance(given, dict) else {}
    architecture = architecture_of(config) or str(hints.get("gguf_architecture", ""))
    if architecture not in PAIRED:
        named = f"{architecture!r} is none that lorahub knows" if architecture else "none is known here"
        raise CannotCarry(
            f"GGUF names and orders tensors by the base's architecture, and {named}",
            "give the base: --base BASE",
        )
    modules = {target.module for target in deltas}
    try:
        table = name_table(architecture, modules)
    except UnsupportedFormat as error:
        raise CannotCarry(error.message, error.hint) from None
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, tuple[float, int, JSON]] = {}
    entries: dict[str, ParameterInfo] = {}
    for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
        slots, options = _taken(target, delta, kinds)
        name = spell(table, target.module)
        if name is None or f"{name}.weight.lora_a" in tensors:
            raise CannotCarry(
                f"llama.cpp has no name for {target.name} in the architecture {architecture!r}"
                if name is None
                else f"llama.cpp calls {target.name} and another module both {name}"
            )
        if name != target.module and PAIRED[architecture] and (last := name.rpartition(".")[2]) in ROTATED:
            heads = heads_of(config)
            rows = to_pairs(slots["up"].shape[0], heads[ROTATED[last]]) if heads else None
            if rows is None:
                raise CannotCarry(
                    f"llama.cpp pairs the rows of {target.name} by attention head, and the base's config does not say "
                    "how many heads fit them",
                    "give the base: --base BASE",
                )
            slots["up"] = take(slots["up"], rows, 0)
        ((row,),) = (EMBEDDING if name == TOKENS else LINEAR,)
        for leaf in sorted(row.leaves, key=lambda each: each.suffix):
            tensor = slots[leaf.slot]
            tensors[f"{name}.{leaf.suffix}"] = tensor.transpose(0, 1) if leaf.transposed else tensor
        scale = options["scale"]
        assert isinstance(scale, int | float)  # LoRA's only number
        scales[target.name] = (float(scale), slots["down"].shape[0], options.get("alpha"))
        if name != target.module:
            shape = delta.shape()
            assert shape is not None  # LoRA's factors tell it
            entries[target.name] = ParameterInfo(shape=shape, dtype="F32", stored_as=target.name)
    metadata = {ARCHITECTURE: architecture, TYPE: "adapter", "adapter.type": "lora", **_alpha(scales)}
    index = BaseIndex(ref=BaseRef(), framework="", parameters=entries, config=config) if entries else None
    return Written(file=FILE, tensors=tensors, metadata={**metadata, **_base(hints)}, configs={}, index=index)


def _taken(target: Target, delta: Delta, kinds: Mapping[str, Kind]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]]:
    apart = kinds["lora"].dissolve({target.parameter: delta}) if "lora" in kinds else None
    if apart is None or target.component or target.parameter != "weight":
        raise CannotCarry(f"llama.cpp's adapters are LoRA on weights, and {target.name} is {delta.kind}")
    if any(tensor.dim() != 2 for tensor in apart[0].values()):
        raise CannotCarry(f"llama.cpp's adapters change matrices, and {target.name} is none")
    return apart


def _alpha(scales: Mapping[str, tuple[float, int, JSON]]) -> dict[str, str]:
    """The one alpha that gives every scale over its own rank; rounded for llama.cpp, exact beside it."""
    found: set[int | float] = set()
    for scale, rank, stated in scales.values():
        alpha = alpha_for(scale, stated, rank, whole=False)
        if alpha is None or not alpha:
            raise CannotCarry(f"a scale of {scale!r} at rank {rank} follows from no alpha")
        found.add(float(alpha))
    if len(found) != 1:
        told = ", ".join(f"{name} {scale!r} at rank {rank}" for name, (scale, rank, _) in list(scales.items())[:3])
        raise CannotCarry(
            f"a GGUF adapter has one alpha, and these scales need {len(found)}: {told}",
            "fold the scales into the factors first: lorahub convert",
        )
    (exact,) = found
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", exact))
    except OverflowError:
        raise CannotCarry(f"alpha {exact!r} is too large for GGUF") from None
    if not rounded:
        raise CannotCarry(f"alpha {exact!r} is too small for GGUF")
    return {ALPHA: repr(rounded), **({} if rounded == exact else {EXACT_ALPHA: repr(exact)})}


def _base(hints: Mapping[str, JSON]) -> dict[str, str]:
    repo = hints.get("base_repo")
    if not isinstance(repo, str) or repo.count("/") != 1:
        return {}
    organisation, name = repo.split("/")
    return {
        "general.base_model.count": "1",
        "general.base_model.0.name": name,
        "general.base_model.0.organization": organisation,
        "general.base_model.0.repo_url": f"https://huggingface.co/{repo}",
    }
