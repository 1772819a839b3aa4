"""A folder as a trainer leaves it: an adapter, a tokenizer, a card, and a lot that is nobody's business."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["CARD", "LAYER", "trained_folder", "weights"]

CARD = """---
base_model: acme/base
library_name: peft
model_name: ink
tags:
- sft
- trl
licence: license
license: apache-2.0
---

# Model Card for ink

Trained with TRL.
"""
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def weights(seed: int = 0, *, spoilt: bytes = b"") -> bytes:
    """A LoRA of rank 2 for one projection, in bfloat16; ``spoilt`` are its first bytes."""
    down = spoilt + b"".join(struct.pack("<H", 0x3C00 + seed + at) for at in range(16))[len(spoilt) :]
    up = b"".join(struct.pack("<H", 0x3D00 + seed + at) for at in range(16))
    return _safetensors(
        {f"{LAYER}.lora_A.weight": ("BF16", [2, 8], down), f"{LAYER}.lora_B.weight": ("BF16", [8, 2], up)}
    )


def trained_folder(
    folder: Path, *, seed: int = 0, files: Mapping[str, bytes | None] | None = None, **config: object
) -> Path:
    """The folder, filled: ``files`` replace its own (None: there is none), ``config`` fields of its PEFT config."""
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "acme/base",
        "revision": None,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    } | config
    content: dict[str, bytes | None] = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": weights(seed),
        "README.md": CARD.encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "training_args.bin": b"pickle",
        "checkpoint-10/optimizer.pt": b"pickle",
        "checkpoint-10/adapter_model.safetensors": b"older",
        "runs/today/events.out.tfevents.1": b"log",
    } | dict(files or {})
    for path, data in content.items():
        if data is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    return folder


def _safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A file of tensors, each as (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())
