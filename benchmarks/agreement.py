"""How far the results of two sides are from each other: composed adapters, and merged checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

__all__ = ["adapters_apart", "checkpoints_apart", "weights"]


def weights(folder: Path) -> list[Path]:
    """The files of weights that a side left, in whatever folder below."""
    return list(folder.rglob("*.safetensors"))


def adapters_apart(name: str, theirs: Path, ours: Path) -> str:
    """How far two composed adapters are from each other over all targets, in words.

    Raises:
        RuntimeError: they have different targets.
    """
    one, other = _products(theirs), _products(ours)
    if one.keys() != other.keys() or not one:
        raise RuntimeError(f"{name}: the sides have different targets: {sorted(one.keys() ^ other.keys())[:5]}")
    difference = math.hypot(*(float((one[key] - other[key]).norm()) for key in one))
    size = math.hypot(*(float(each.norm()) for each in one.values()))
    return f"{name}: lorahub's change differs from PEFT's by {difference / size:.1e} of its norm."


def checkpoints_apart(base: Path, theirs: Path, ours: Path) -> float:
    """The difference of two merged checkpoints, as a share of the change from the base to the first."""
    before, one, other = (load_file(folder / "model.safetensors") for folder in (base, theirs, ours))
    difference = math.hypot(*(float((one[name].float() - other[name].float()).norm()) for name in before))
    return difference / math.hypot(*(float((one[name].float() - before[name].float()).norm()) for name in before))


def _products(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> change of a saved adapter at its scale, float32."""
    (file,) = weights(folder)
    config = json.loads(file.with_name("adapter_config.json").read_text())
    tensors = load_file(file)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name: (tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float())
        * (config["lora_alpha"] / tensors[f"{name}.lora_A.weight"].shape[0])
        for name in names
    }
