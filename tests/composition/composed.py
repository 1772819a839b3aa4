"""Small adapters and the base they are for, as files, for tests of composition; what one of them comes to, apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.deltas.lora import LoRA
from lorahub.files.writer import save_file

__all__ = ["IN", "OUT", "Layer", "Model", "dense", "same", "save_base", "write"]

OUT, IN = 24, 16


def write(
    folder: Path,
    seed: int,
    *,
    r: int = 4,
    names: Sequence[str] = ("q", "v"),
    shape: tuple[int, int] = (OUT, IN),
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    head: torch.Tensor | None = None,
    root: str = "",
    **config: object,
) -> Path:
    """A LoRA as PEFT writes it, for the attention of two layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name in names:
            stem = f"base_model.model.{root}layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(r, shape[1], generator=generator).to(dtype)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], r, generator=generator).to(dtype)
            if dora:
                tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(shape[0], generator=generator) + 0.5
    extra: dict[str, object] = {"use_dora": dora}
    if head is not None:
        tensors["base_model.model.head.weight"] = head
        extra["modules_to_save"] = ["head"]
    folder.mkdir(parents=True)
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    said = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": list(names), **extra, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, OUT, bias=False) for _ in range(3))


class Model(nn.Module):
    """What the adapters are for."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(OUT, 3, bias=False)


def dense(adapter: Adapter, target: Target) -> torch.Tensor:
    """A float64 product of the factors as the file has them, and nothing else of lorahub's."""
    delta = adapter.deltas.get(target)
    if delta is None:
        return torch.zeros(OUT, IN, dtype=torch.float64)
    assert isinstance(delta, LoRA)
    return delta.scale * (delta.up.double() @ delta.down.double())


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def save_base(folder: Path, seed: int = 1, *, dtype: torch.dtype = torch.float32) -> Path:
    """The base as files."""
    folder.mkdir()
    save_file(
        folder / "model.safetensors", {name: value.detach().to(dtype) for name, value in Model(seed).named_parameters()}
    )
    (folder / "config.json").write_text("{}")
    return folder
