"""Small bases as repositories hold them, and what a test asks of a report or of the double's log about them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from typing import Any

from hub.double import Double
from hub.double.cards import card

from lorahub.files.shards import encode_index
from lorahub.files.writer import encode_header
from lorahub.report import CheckReport

__all__ = [
    "WIDTH",
    "Files",
    "base",
    "codes",
    "headers_of",
    "query_lora",
    "split",
    "tensors",
    "weight_bytes",
    "weights",
    "whole_less",
]

WIDTH = 32
Files = dict[str, bytes]


def tensors(*, layers: int = 2, width: int = WIDTH, **extra: list[int]) -> dict[str, list[int]]:
    """The parameters of a small BERT, by name."""
    shapes = {
        "embeddings.word_embeddings.weight": [50, width],
        "embeddings.position_embeddings.weight": [16, width],
        "embeddings.token_type_embeddings.weight": [2, width],
        "embeddings.LayerNorm.weight": [width],
        "embeddings.LayerNorm.bias": [width],
        "pooler.dense.weight": [width, width],
        "pooler.dense.bias": [width],
    }
    for layer in range(layers):
        for name, (rows, columns) in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (2 * width, width),
            "output.dense": (width, 2 * width),
        }.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = [rows, columns]
            shapes[f"encoder.layer.{layer}.{name}.bias"] = [rows]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = [width]
            shapes[f"encoder.layer.{layer}.{name}.bias"] = [width]
    return shapes | {name.replace("__", "."): shape for name, shape in extra.items()}


def weights(shapes: Mapping[str, list[int]], seed: int = 0) -> bytes:
    """A safetensors file of small numbers, others for every seed."""
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    data = bytearray(random.Random(seed).randbytes(size))
    data[3::4] = b"\x3c" * (size // 4)  # so that each is a float32 of about 0.01
    return bytes(encode_header({name: ("F32", shape) for name, shape in shapes.items()}, {"format": "pt"})) + data


def base(shapes: Mapping[str, list[int]] | None = None, *, seed: int = 0, shards: int = 1, **config: Any) -> Files:
    """A base's repository, in one file or several."""
    shapes = tensors() if shapes is None else shapes
    said = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": WIDTH, "num_hidden_layers": 2} | config
    files = {"config.json": json.dumps(said).encode(), "tokenizer.json": b"{}", "README.md": card("# A base\n")}
    if shards == 1:
        return files | {"model.safetensors": weights(shapes, seed)}
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    homes = {tensor: names[at % shards] for at, tensor in enumerate(sorted(shapes))}
    for number, name in enumerate(names):
        part = {tensor: shapes[tensor] for tensor, home in homes.items() if home == name}
        files[name] = weights(part, seed * 100 + number)
    return files | {"model.safetensors.index.json": encode_index(homes, 1)}


def query_lora() -> Files:
    """The folder of a LoRA on the queries of both layers, without a record."""
    shapes: dict[str, list[int]] = {}
    for layer in range(2):
        stem = f"base_model.model.encoder.layer.{layer}.attention.self.query"
        shapes |= {f"{stem}.lora_A.weight": [4, WIDTH], f"{stem}.lora_B.weight": [WIDTH, 4]}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}
    said = json.dumps(config | {"base_model_name_or_path": "acme/base"})
    return {"adapter_model.safetensors": weights(shapes), "adapter_config.json": said.encode()}


def split(seed: int = 0, **further: int) -> Files:
    """A base in two files: the encoder, and the rest."""
    parts = {
        name: {tensor: shape for tensor, shape in tensors().items() if tensor.startswith("encoder.") is inside}
        for name, inside in (("model-00001-of-00002.safetensors", True), ("model-00002-of-00002.safetensors", False))
    }
    seeds = dict(zip(parts, (further.get("encoder", seed), further.get("rest", seed)), strict=True))
    homes = {tensor: name for name, part in parts.items() for tensor in part}
    files = {name: weights(part, seeds[name]) for name, part in parts.items()}
    return base() | files | {"model.safetensors.index.json": encode_index(homes, 1)}


def whole_less(files: Files) -> Files:
    """Without the one file that stands before its shards."""
    return {name: data for name, data in files.items() if name != "model.safetensors"}


def codes(report: CheckReport, axis: str = "base") -> set[str]:
    return {each.code for each in report.findings if each.axis == axis}


def headers_of(files: Files) -> dict[str, int]:
    return {
        name: 8 + int.from_bytes(data[:8], "little") for name, data in files.items() if name.endswith(".safetensors")
    }


def weight_bytes(double: Double) -> int:
    """Bytes that were served out of weights files, headers included."""
    return sum(each.served for each in double.seen(where="cdn") if each.path.endswith(".safetensors"))
