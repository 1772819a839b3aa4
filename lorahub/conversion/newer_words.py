"""Words of families newer than those of ``more_words``, which are read and placed alike; see ``words``.  Data alone.

Facts: Black Forest Labs' ``flux3``, Krea's ``krea-2``, Ideogram 4, ACE-Step 1.5, NVIDIA's ``cosmos-predict2``, which
Anima's are too, and diffusers 0.42.1, which converts adapters of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lorahub.conversion.word import Word, fused

__all__ = ["NEWER"]

_QKV = ("q", "k", "v")


def _flux3() -> Iterator[Word]:
    stacks = {
        "content_mode_blocks.image.{n}": "mode_blocks.image.{n}",
        "content_mode_blocks.image_cond.{n}": "mode_blocks.image_cond.{n}",
        "txt_mode_blocks.{n}": "txt_mode_blocks.{n}",
        "single_blocks.{n}": "single_transformer_blocks.{n}",
    }
    layers = {"attn_out": "attn.to_out.0", "mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out"}
    for theirs, own in stacks.items():
        yield from (fused(f"{theirs}.{each}_proj", f"{own}.attn.to_{each}") for each in _QKV)
        yield from (fused(f"{theirs}.{one}", f"{own}.{other}") for one, other in layers.items())


def _krea2() -> Iterator[Word]:
    stacks = {"blocks.{n}": "transformer_blocks.{n}"} | {
        f"txtfusion.{each}_blocks.{{n}}": f"text_fusion.{each}_blocks.{{n}}" for each in ("layerwise", "refiner")
    }
    attention = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
    for theirs, own in stacks.items():
        yield from (fused(f"{theirs}.attn.{one}", f"{own}.attn.{other}") for one, other in attention.items())
        yield from (fused(f"{theirs}.mlp.{each}", f"{own}.ff.{each}") for each in ("gate", "up", "down"))
    around = {
        "first": "img_in",
        "last.linear": "final_layer.linear",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
    }
    yield from (fused(one, other) for one, other in around.items())


def _ideogram4() -> Iterator[Word]:
    """What both call the same has no word."""
    block = "layers.{n}.attention"
    yield fused(f"{block}.qkv", *(f"{block}.to_{each}" for each in _QKV))
    yield fused(f"{block}.o", f"{block}.to_out.0")


def _ace_step() -> Iterator[Word]:
    for block in ("layers.{n}.self_attn", "layers.{n}.cross_attn"):
        yield from (fused(f"{block}.{each}_proj", f"{block}.to_{each}") for each in _QKV)
        yield fused(f"{block}.o_proj", f"{block}.to_out.0")


def _cosmos() -> Iterator[Word]:
    block, own = "blocks.{n}", "transformer_blocks.{n}"
    for number, part in enumerate(("self_attn", "cross_attn"), start=1):
        yield from (fused(f"{block}.{part}.{each}_proj", f"{own}.attn{number}.to_{each}") for each in _QKV)
        yield fused(f"{block}.{part}.output_proj", f"{own}.attn{number}.to_out.0")
    for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1):
        for layer in (1, 2):
            yield fused(f"{block}.adaln_modulation_{part}.{layer}", f"{own}.norm{number}.linear_{layer}")
    yield fused(f"{block}.mlp.layer1", f"{own}.ff.net.0.proj")
    yield fused(f"{block}.mlp.layer2", f"{own}.ff.net.2")
    for layer in (1, 2):
        yield fused(f"final_layer.adaln_modulation.{layer}", f"norm_out.linear_{layer}")
        yield fused(f"t_embedder.1.linear_{layer}", f"time_embed.t_embedder.linear_{layer}")
    yield fused("final_layer.linear", "proj_out")
    yield fused("t_embedding_norm", "time_embed.norm")
    yield fused("x_embedder.proj.1", "patch_embed.proj")


NEWER: Mapping[str, tuple[Word, ...]] = MappingProxyType(
    {
        "ace-step": tuple(_ace_step()),
        "cosmos": tuple(_cosmos()),
        "flux3": tuple(_flux3()),
        "ideogram4": tuple(_ideogram4()),
        "krea2": tuple(_krea2()),
    }
)
"""Family -> its words."""
