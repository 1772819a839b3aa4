"""Headers as trainers write them, for folders in which no two files have the same tensors.

Names and shapes of real bases in the spellings of sd-scripts (SDXL, SD 1.5 with its text encoder, Flux), diffusers
(Flux) and PEFT (a decoder of 8 billion parameters).  Each call takes another random part of the modules.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

__all__ = ["LAYOUTS", "Written", "header", "sdxl"]

Modules = list[tuple[str, int, int]]
"""Name as spelled, inputs, outputs."""

RANKS = (4, 8, 12, 16, 24, 32, 64, 128)
_STAGES = (
    ("input_blocks_4_1", 2, 640),
    ("input_blocks_5_1", 2, 640),
    ("input_blocks_7_1", 10, 1280),
    ("input_blocks_8_1", 10, 1280),
    ("middle_block_1", 10, 1280),
    ("output_blocks_0_1", 10, 1280),
    ("output_blocks_1_1", 10, 1280),
    ("output_blocks_2_1", 10, 1280),
    ("output_blocks_3_1", 2, 640),
    ("output_blocks_4_1", 2, 640),
    ("output_blocks_5_1", 2, 640),
)
"""SDXL's stages with attention: name, transformer blocks, channels."""

_STAGES_15 = (
    *((f"down_blocks_{at}_attentions_{each}", 320 << at) for at in range(3) for each in range(2)),
    ("mid_block_attentions_0", 1280),
    *((f"up_blocks_{at}_attentions_{each}", 1280 >> (at - 1)) for at in range(1, 4) for each in range(3)),
)
"""SD 1.5's: name, channels."""


class Written(NamedTuple):
    """What one adapter's files hold: tensors (dtype, shape), metadata, and a config beside them or None."""

    tensors: Mapping[str, tuple[str, list[int]]]
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None


def _transformer(block: str, width: int, context: int) -> Iterator[tuple[str, int, int]]:
    for attention, inputs in (("attn1", width), ("attn2", context)):
        yield f"{block}_{attention}_to_q", width, width
        yield f"{block}_{attention}_to_k", inputs, width
        yield f"{block}_{attention}_to_v", inputs, width
        yield f"{block}_{attention}_to_out_0", width, width
    yield f"{block}_ff_net_0_proj", width, 8 * width
    yield f"{block}_ff_net_2", 4 * width, width


def sdxl() -> Modules:
    """SDXL's attention and feed-forward layers, 722 of them."""
    found: Modules = []
    for stage, depth, width in _STAGES:
        found += [(f"lora_unet_{stage}_{end}", width, width) for end in ("proj_in", "proj_out")]
        for block in range(depth):
            found += _transformer(f"lora_unet_{stage}_transformer_blocks_{block}", width, 2048)
    return found


def _sd15() -> Modules:
    found: Modules = []
    for stage, width in _STAGES_15:
        found += _transformer(f"lora_unet_{stage}_transformer_blocks_0", width, 768)
    for layer in range(12):
        start = f"lora_te_text_model_encoder_layers_{layer}"
        found += [(f"{start}_self_attn_{each}_proj", 768, 768) for each in ("q", "k", "v", "out")]
        found += [(f"{start}_mlp_fc1", 768, 3072), (f"{start}_mlp_fc2", 3072, 768)]
    return found


def _flux() -> Modules:
    found: Modules = []
    for block in range(19):
        for part in ("img", "txt"):
            start = f"lora_unet_double_blocks_{block}_{part}"
            found += [(f"{start}_attn_qkv", 3072, 9216), (f"{start}_attn_proj", 3072, 3072)]
            found += [
                (f"{start}_mlp_0", 3072, 12288),
                (f"{start}_mlp_2", 12288, 3072),
                (f"{start}_mod_lin", 3072, 18432),
            ]
    for block in range(38):
        start = f"lora_unet_single_blocks_{block}"
        found += [(f"{start}_linear1", 3072, 21504), (f"{start}_linear2", 15360, 3072)]
        found.append((f"{start}_modulation_lin", 3072, 9216))
    return found


def _flux_diffusers() -> Modules:
    found: Modules = []
    for block in range(19):
        start = f"transformer.transformer_blocks.{block}"
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        found += [(f"{start}.attn.{each}", 3072, 3072) for each in names]
        for part in ("ff", "ff_context"):
            found += [(f"{start}.{part}.net.0.proj", 3072, 12288), (f"{start}.{part}.net.2", 12288, 3072)]
    for block in range(38):
        start = f"transformer.single_transformer_blocks.{block}"
        found += [(f"{start}.attn.{each}", 3072, 3072) for each in ("to_q", "to_k", "to_v")]
        found += [(f"{start}.proj_mlp", 3072, 12288), (f"{start}.proj_out", 15360, 3072)]
    return found


def _decoder() -> Modules:
    found: Modules = []
    for layer in range(32):
        start = f"base_model.model.model.layers.{layer}"
        found += [(f"{start}.self_attn.{each}", 4096, 4096) for each in ("q_proj", "o_proj")]
        found += [(f"{start}.self_attn.{each}", 4096, 1024) for each in ("k_proj", "v_proj")]
        found += [(f"{start}.mlp.{each}", 4096, 14336) for each in ("gate_proj", "up_proj")]
        found.append((f"{start}.mlp.down_proj", 14336, 4096))
    return found


def _kohya(modules: Modules, rank: int, code: str) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}
    for name, inputs, outputs in modules:
        found[f"{name}.alpha"] = (code, [])
        found[f"{name}.lora_down.weight"] = (code, [rank, inputs])
        found[f"{name}.lora_up.weight"] = (code, [outputs, rank])
    return found


def _dotted(modules: Modules, rank: int, code: str) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}
    for name, inputs, outputs in modules:
        found[f"{name}.lora_A.weight"] = (code, [rank, inputs])
        found[f"{name}.lora_B.weight"] = (code, [outputs, rank])
    return found


def _trained(chance: random.Random, rank: int, base: str) -> dict[str, str]:
    """What sd-scripts puts into a header: some eighty strings, and how often each caption's tags occur."""
    tags = {f"{chance.choice(_WORDS)} {chance.choice(_WORDS)}": chance.randrange(1, 60) for _ in range(180)}
    stated = {f"ss_setting_{number:02}": str(chance.random()) for number in range(70)}
    return stated | {
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": "1.0",
        "ss_output_name": f"style {chance.randrange(10**6)}",
        "ss_tag_frequency": json.dumps({"10_style": tags}),
        "sshs_model_hash": f"{chance.getrandbits(256):064x}",
    }


_WORDS = (
    "red",
    "blue",
    "hair",
    "dress",
    "smile",
    "open",
    "mouth",
    "long",
    "short",
    "sky",
    "looking",
    "at",
    "viewer",
    "1girl",
)


def _saved(chance: random.Random, _rank: int, _base: str) -> dict[str, str]:
    return {"format": "pt", "seed": str(chance.randrange(10**6))}


class _Layout(NamedTuple):
    modules: Modules
    tensors: Callable[[Modules, int, str], dict[str, tuple[str, list[int]]]]
    metadata: Callable[[random.Random, int, str], dict[str, str]]
    base: str
    share: int


LAYOUTS: Mapping[str, _Layout] = {
    "sd-scripts, SDXL": _Layout(sdxl(), _kohya, _trained, "sdxl_base_v1-0", 8),
    "sd-scripts, SD 1.5": _Layout(_sd15(), _kohya, _trained, "sd_v1", 4),
    "sd-scripts, Flux": _Layout(_flux(), _kohya, _trained, "flux1", 3),
    "diffusers, Flux": _Layout(_flux_diffusers(), _dotted, _saved, "", 3),
    "PEFT, decoder": _Layout(_decoder(), _dotted, _saved, "", 2),
}
"""Layout -> how it is made; ``share`` is out of all shares together."""


def header(layout: str, seed: int) -> Written:
    """One adapter of its own: other modules, rank and metadata for every seed."""
    chance = random.Random(f"{layout} {seed}")
    modules, tensors, metadata, base, _ = LAYOUTS[layout]
    part = [each for each in modules if chance.random() < 0.9] if chance.random() < 0.5 else _half(modules, chance)
    rank = chance.choice(RANKS)
    config = None
    if layout.startswith("PEFT"):
        ends = sorted({name.rpartition(".")[2] for name, _, _ in part})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/decoder-8b",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ends,
            "bias": "none",
            "lora_dropout": 0.05,
            "inference_mode": True,
        }
    code = chance.choice(("F16", "BF16"))
    return Written(dict(sorted(tensors(part, rank, code).items())), metadata(chance, rank, base), config)


def _half(modules: Modules, chance: random.Random) -> Modules:
    """About half of them."""
    return [each for each in modules if chance.random() < 0.5]
