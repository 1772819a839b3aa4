"""Deltas spelled as mlx-lm spells them: one kind, one rank and one scale for all modules."""

from __future__ import annotations

from collections.abc import Mapping

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import CannotCarry
from lorahub.formats.format import Written
from lorahub.formats.mlx.tables import CONFIG, EMBEDDING, EMBEDDINGS, EXPERTS, FILE, LINEAR
from lorahub.lazy import torch

__all__ = ["write"]


def write(deltas: Mapping[Target, Delta], kinds: Mapping[str, Kind], hints: Mapping[str, JSON]) -> Written:
    """Spell ``deltas`` for mlx-lm; see ``MlxFormat.write``."""
    modules: dict[str, dict[str, Delta]] = {}
    for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
        if target.component:
            raise CannotCarry(f"MLX has no components: {target.name}")
        modules.setdefault(target.module, {})[target.parameter] = delta
    model: dict[str, JSON] = {"model": hints["base_repo"]} if hints.get("base_repo") else {}
    if all(delta.kind == "replace" for delta in deltas.values()):
        values = {target.name: value for target, each in deltas.items() if (value := each.replacement()) is not None}
        if large := [name for name, value in values.items() if value.dim() > 2]:
            raise CannotCarry(f"MLX stores kernels in another order of axes: {', '.join(large[:3])}")
        return _written(values, {"fine_tune_type": "full", **model})
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, set[str | int | float]] = {"kind": set(), "scale": set(), "rank": set()}
    roles = hints.get("roles")
    for module, parameters in modules.items():
        names = [Target("", module, parameter).name for parameter in parameters]
        embedding = module.rpartition(".")[2] in EMBEDDINGS
        if isinstance(roles, dict) and any(roles.get(name) == "embedding" for name in names) and not embedding:
            raise CannotCarry(f"MLX tells embeddings by their names, and {module} would be taken for a linear layer")
        rows = EMBEDDING if embedding else (*LINEAR, *(EXPERTS if parameters.keys() == {"weight"} else ()))
        fits = ((row, kinds[row.kind].dissolve(parameters)) for row in rows if row.kind in kinds)
        found = next(((row, *apart) for row, apart in fits if apart is not None), None)
        if found is None:
            what = " and ".join(sorted({delta.kind for delta in parameters.values()}))
            raise CannotCarry(f"MLX has no word for {what} on {', '.join(names)}")
        row, slots, options = found
        leaves = {leaf.slot: leaf for leaf in row.leaves}
        if (
            not slots.keys() <= leaves.keys()
            or slots["down"].dim() > (3 if row in EXPERTS else 2)
            or any(options.get(name, value) != value for name, value in row.options.items())
        ):
            raise CannotCarry(f"MLX has linear layers and embeddings with lengths of rows only, and no bias: {module}")
        for slot, tensor in slots.items():
            key = f"{module}.{leaves[slot].suffix}"
            tensors[key] = tensor.transpose(0, 1) if leaves[slot].transposed else tensor
        for name, said_here in (
            ("kind", _TUNED.get(row.kind, row.kind)),
            ("scale", options["scale"]),
            ("rank", options["rank"]),
        ):
            assert isinstance(said_here, str | int | float)  # the kinds of LoRA's family say no other
            said[name].add(said_here)
    for name, values_said in said.items():
        if len(values_said) != 1:
            several = ", ".join(sorted(map(str, values_said))) or "none"
            raise CannotCarry(f"an MLX adapter has one {name} for all its modules, and here are {several}")
    (kind,), (scale,), (rank,) = said["kind"], said["scale"], said["rank"]
    keys: list[JSON] = [*sorted({_key(module) for module in modules}, key=natural)]
    given: dict[str, JSON] = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return _written(tensors, {"fine_tune_type": kind, "lora_parameters": given, **model, "num_layers": -1})


_TUNED = {"expert-lora": "lora"}
"""Kind -> its ``fine_tune_type``, where that is not its name."""


def _key(module: str) -> str:
    """A module as mlx-lm selects it: below its block, or whole where it is in none."""
    parts = module.split(".")
    at = next((at for at, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return module if at is None else ".".join(parts[at + 1 :])


def _written(tensors: Mapping[str, torch.Tensor], config: dict[str, JSON]) -> Written:
    ordered = {key: tensors[key] for key in sorted(tensors, key=natural)}
    return Written(file=FILE, tensors=ordered, metadata={"format": "mlx"}, configs={CONFIG: config})
