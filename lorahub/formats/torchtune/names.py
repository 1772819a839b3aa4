"""What torchtune calls the modules of Llama-like models and its own tensors, and which rows it keeps in pairs.

Facts of torchtune's ``convert_weights``.  Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON, Leaf
from lorahub.formats.peft.keys import Stems
from lorahub.formats.rope import Heads, heads_of
from lorahub.formats.suffixes import Row

__all__ = ["FILE", "INSIDE", "OUTSIDE", "ROWS", "TorchtuneStems", "rotation", "torchtune_name"]

FILE = "adapter_model.safetensors"

_FACTORS = (Leaf(slot="down", suffix="lora_a.weight"), Leaf(slot="up", suffix="lora_b.weight"))
ROWS = (
    Row(kind="dora", leaves=(*_FACTORS, Leaf(slot="magnitude", suffix="magnitude")), options={"axis": 0}),
    Row(kind="lora", leaves=_FACTORS),
)
INSIDE: Mapping[str, str] = MappingProxyType(
    {
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.output_proj",
        "mlp.gate_proj": "mlp.w1",
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
    }
)
"""Module of a block as Hugging Face calls it -> as torchtune does."""

OUTSIDE: Mapping[str, str] = MappingProxyType({"lm_head": "output", "model.embed_tokens": "tok_embeddings"})
"""The same outside the blocks."""

_BLOCKS = "model.layers."

_PAIRED: Mapping[str, bool] = MappingProxyType(
    {"gemma": True, "gemma2": True, "llama": True, "mistral": True, "qwen2": False, "qwen3": False}
)
"""``model_type`` -> whether torchtune keeps the rows of queries and keys in pairs, as Meta does."""

_ROTATED: Mapping[str, int] = MappingProxyType({"attn.q_proj": 0, "attn.k_proj": 1})
"""The end of a module's name -> which count of heads it has."""


def torchtune_name(module: str) -> str | None:
    """What torchtune calls a module of a Llama-like model of Hugging Face's, or None where it has no name for it."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    number, _, inside = module.removeprefix(_BLOCKS).partition(".")
    if not module.startswith(_BLOCKS) or not number.isdigit() or inside not in INSIDE:
        return None
    return f"layers.{number}.{INSIDE[inside]}"


@final
class TorchtuneStems(Stems):
    """torchtune's names -> the modules of a base; the base's own names stand for themselves."""

    __slots__ = ("_named",)

    def __init__(self, index: BaseIndex | None) -> None:
        super().__init__(index)
        self._named: dict[str, str] = {}
        for module in index.modules() if index else ():
            for other in index.spellings(module) if index else ():
                if name := torchtune_name(other):
                    self._named.setdefault(name, module)

    def find(self, spelled: str) -> str | None:
        """The base's name for a module of the file, or None."""
        return self._named.get(spelled) or super().find(spelled)


def rotation(name: str, config: Mapping[str, JSON]) -> tuple[bool | None, Heads | None, int]:
    """Whether a module's rows are in pairs (None: nobody knows), the base's heads, and which of them it has."""
    which = next((at for end, at in _ROTATED.items() if name.endswith(f".{end}")), None)
    if which is None:
        return False, None, 0
    kind = config.get("model_type")
    return _PAIRED.get(kind) if isinstance(kind, str) else None, heads_of(config), which
