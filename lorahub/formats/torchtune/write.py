"""Deltas spelled as torchtune spells them: LoRA or DoRA with one rank and one alpha, rows in Meta's order."""

from __future__ import annotations

from collections.abc import Mapping

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta, take
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.peft_config import alpha_for
from lorahub.errors import CannotCarry
from lorahub.formats.format import Written
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.rope import to_pairs
from lorahub.formats.suffixes import Row
from lorahub.formats.torchtune.names import FILE, ROWS, rotation, torchtune_name
from lorahub.lazy import torch

__all__ = ["write"]


def write(deltas: Mapping[Target, Delta], kinds: Mapping[str, Kind], hints: Mapping[str, JSON]) -> Written:
    """Spell the deltas for torchtune; ``base_config`` in the hints gives names and rows.

    Without it, names are torchtune's already, and rows as it has them.

    Raises:
        CannotCarry: other kinds than LoRA and DoRA, several scales or ranks, modules without a name, or rows whose
            order is not known.
    """
    given = hints.get("base_config")
    config = given if isinstance(given, dict) else {}
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, set[float]] = {"rank": set(), "alpha": set()}
    entries: dict[str, ParameterInfo] = {}
    targets: set[str] = set()
    for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
        row, slots, options = _taken(target, delta, kinds)
        name = torchtune_name(target.module) or ("" if config else target.module)
        if not name or f"{name}.lora_a.weight" in tensors:
            raise CannotCarry(f"torchtune has no name of its own for {target.name}")
        if name == "tok_embeddings" or _role(hints, target) == "embedding":
            raise CannotCarry(f"torchtune has no LoRA for embeddings: {target.name}")
        if name != target.module:
            slots = _paired(slots, name, config)
            shape = delta.shape()
            assert shape is not None  # factors tell it
            entries[target.name] = ParameterInfo(shape=shape, dtype="F32", stored_as=target.name)
        tensors |= {f"{name}.{leaf.suffix}": slots[leaf.slot] for leaf in row.leaves}
        rank = slots["down"].shape[0]
        alpha = alpha_for(options["scale"], options.get("alpha"), rank, whole=False)
        if alpha is None:
            raise CannotCarry(f"a scale of {options['scale']!r} at rank {rank} follows from no alpha")
        said["rank"].add(rank)
        said["alpha"].add(alpha)
        targets.add(name.rpartition(".")[2])
    for what, values in said.items():
        if len(values) != 1:
            several = ", ".join(map(str, sorted(values))) or "none"
            raise CannotCarry(f"a torchtune adapter has one {what} for all its modules, and here are {several}")
    listed: list[JSON] = [*sorted(targets)]
    written: dict[str, JSON] = {
        "r": int(said["rank"].pop()),
        "lora_alpha": said["alpha"].pop(),
        "target_modules": listed,
        "peft_type": "LORA",
    }
    if base := hints.get("base_repo"):
        written["base_model_name_or_path"] = base
    index = BaseIndex(ref=BaseRef(), framework="", parameters=entries, config=config) if entries else None
    return Written(file=FILE, tensors=tensors, metadata={"format": "pt"}, configs={CONFIG: written}, index=index)


def _taken(
    target: Target, delta: Delta, kinds: Mapping[str, Kind]
) -> tuple[Row, dict[str, torch.Tensor], dict[str, JSON]]:
    if target.component:
        raise CannotCarry(f"torchtune has no components: {target.name}")
    for row in ROWS:
        apart = kinds[row.kind].dissolve({target.parameter: delta}) if row.kind in kinds else None
        if apart is None:
            continue
        slots, options = apart
        fits = target.parameter == "weight" and slots.keys() == {leaf.slot for leaf in row.leaves}
        if not fits or slots["down"].dim() != 2 or options.get("axis", 0) != 0:
            break
        return row, slots, options
    raise CannotCarry(f"torchtune has no word for {delta.kind} on {target.name}")


def _role(hints: Mapping[str, JSON], target: Target) -> JSON:
    roles = hints.get("roles")
    return roles.get(target.name) if isinstance(roles, dict) else None


def _paired(slots: Mapping[str, torch.Tensor], name: str, config: Mapping[str, JSON]) -> dict[str, torch.Tensor]:
    """Slots with their output rows in torchtune's order."""
    paired, heads, which = rotation(name, config)
    if paired is False:
        return dict(slots)
    rows = to_pairs(slots["up"].shape[0], heads[which]) if paired and heads else None
    if rows is None:
        raise CannotCarry(
            f"torchtune orders the rows of {name} by attention head, and the base's config does not say how",
            "give the base: --base BASE",
        )
    return {slot: take(tensor, rows, 0) if slot != "down" else tensor for slot, tensor in slots.items()}
