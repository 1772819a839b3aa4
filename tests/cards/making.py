"""Adapter folders of a few tensors, written without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import save_file

from lorahub.adapter import AdapterHeader, open_header
from lorahub.cards import Card
from lorahub.plugins import load_registry

BASE = {
    "repo_id": "acme/base",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "library": "transformers",
    "architecture": "LlamaForCausalLM",
    "weights_digest": f"sha256:{'b' * 64}",
}
RECORD: dict[str, Any] = {
    "schema_version": "1.0",
    "kinds": ["lora"],
    "name": "ink",
    "version": "1.2.0",
    "license": "apache-2.0",
    "base": BASE,
}
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def peft_tensors(layers: int = 3) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a LoRA on two projections of every layer."""
    stem = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    return {
        stem.format(layer, name, side): (2, 8) if side == "A" else (8, 2)
        for layer in range(layers)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    }


def write(folder: Path, file: str, shapes: Mapping[str, tuple[int, ...]], **configs: Any) -> AdapterHeader:
    """A folder with one weights file and JSON files, read."""
    folder.mkdir(exist_ok=True)
    save_file({name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()}, folder / file)
    for name, value in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return open_header(folder, load_registry())


Made: TypeAlias = "Callable[..., Card]"
"""README and fields of the record -> card."""
