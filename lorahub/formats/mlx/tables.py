"""How MLX spells the kinds it has, and what it calls its files.

Factors are stored for ``x @ lora_a @ lora_b``: transposed for a linear layer, as they are for an embedding.
"""

from __future__ import annotations

from lorahub.deltas.kind import Leaf
from lorahub.formats.suffixes import Row

__all__ = ["CONFIG", "DEFAULT_SCALE", "EMBEDDING", "EMBEDDINGS", "FILE", "LINEAR"]

CONFIG, FILE = "adapter_config.json", "adapters.safetensors"

DEFAULT_SCALE = 20.0
"""What mlx-lm multiplies by where nothing is said."""

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
EMBEDDING = _rows(role="embedding", transposed=False, a="up", b="down")
