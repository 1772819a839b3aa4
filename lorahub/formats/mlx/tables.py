"""How MLX spells the kinds it has, and what it calls its files.

Factors are stored for ``x @ lora_a @ lora_b``: transposed for a linear layer, as they are for an embedding.  Those of
a stack of experts (``LoRASwitchLinear``) are stored as everybody else has them, [E, r, in] and [E, out, r].
"""

from __future__ import annotations

from lorahub.deltas.kind import Leaf
from lorahub.formats.suffixes import Row

__all__ = ["CONFIG", "DEFAULT_SCALE", "EMBEDDING", "EMBEDDINGS", "EXPERTS", "FILE", "FILES", "LINEAR", "MIXTRAL"]

CONFIG, FILE = "adapter_config.json", "adapters.safetensors"

FILES = (FILE, "adapters.npz")
"""What the weights file is called, today and before there were configs."""

DEFAULT_SCALE = 20.0
"""What mlx-lm multiplies by where nothing is said, and what the first trainer always did."""

EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embedding", "embeddings", "embed_in")
"""What the models of mlx-lm call their token embeddings."""


def _rows(*, role: str, transposed: bool, a: str, b: str) -> tuple[Row, ...]:
    factors = (
        Leaf(slot=a, suffix="lora_a", transposed=transposed, role=role),
        Leaf(slot=b, suffix="lora_b", transposed=transposed, role=role),
    )
    lengths = Leaf(slot="magnitude", suffix="m", role=role)
    # MLX keeps the lengths of rows, an embedding's too; without the option, those of its columns would be meant.
    return Row(kind="dora", leaves=(*factors, lengths), options={"axis": 0}), Row(kind="lora", leaves=factors)


LINEAR = _rows(role="", transposed=True, a="down", b="up")
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What MLX calls the projections of an expert -> what Mixtral's checkpoints do."""

EXPERTS = (
    Row(
        kind="expert-lora",
        leaves=(Leaf(slot="down", suffix="lora_a"), Leaf(slot="up", suffix="lora_b")),
        options={"transposed": None},  # which way round the base has them, only the base knows
    ),
)
EMBEDDING = _rows(role="embedding", transposed=False, a="up", b="down")
