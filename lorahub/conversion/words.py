"""The words of each family of diffusion models: a module by its makers' name, and what diffusers calls it.

A word says that one module of the first vocabulary is one or several of the second, and how many shares of its rows
each of those has: ``qkv`` is ``to_q``, ``to_k`` and ``to_v``.  ``{n}`` stands for a number, the same in both.  Data
alone.

Families whose makers' words are written too; ``more_words`` and ``newer_words`` have others.

Facts: Black Forest Labs' ``flux`` and ``flux2``, Stability's ``sd3``, Wan-Video's ``Wan2.1``, Tencent's
``HunyuanVideo``, lodestones' ``Chroma``, and diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.conversion.more_words import MORE
from lorahub.conversion.newer_words import NEWER
from lorahub.conversion.word import Word, fused

__all__ = ["TABLES"]


def _flux() -> tuple[Word, ...]:
    double, single, block = "double_blocks.{n}", "single_blocks.{n}", "transformer_blocks.{n}"
    lone = "single_transformer_blocks.{n}"
    return (
        fused(f"{double}.img_attn.qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        fused(f"{double}.txt_attn.qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        fused(f"{double}.img_attn.proj", f"{block}.attn.to_out.0"),
        fused(f"{double}.txt_attn.proj", f"{block}.attn.to_add_out"),
        fused(f"{double}.img_mlp.0", f"{block}.ff.net.0.proj"),
        fused(f"{double}.img_mlp.2", f"{block}.ff.net.2"),
        fused(f"{double}.txt_mlp.0", f"{block}.ff_context.net.0.proj"),
        fused(f"{double}.txt_mlp.2", f"{block}.ff_context.net.2"),
        fused(f"{double}.img_mod.lin", f"{block}.norm1.linear"),
        fused(f"{double}.txt_mod.lin", f"{block}.norm1_context.linear"),
        fused(
            f"{single}.linear1",
            *(f"{lone}.attn.to_{each}" for each in "qkv"),
            f"{lone}.proj_mlp",
            shares=(1, 1, 1, 4),
        ),
        fused(f"{single}.linear2", f"{lone}.proj_out"),
        fused(f"{single}.modulation.lin", f"{lone}.norm.linear"),
        *(
            Word(name=f"{double}.{side}_attn.norm.{one}_norm", parts=(f"{block}.attn.{other}",), parameter="scale")
            for side, query, key in (("img", "norm_q", "norm_k"), ("txt", "norm_added_q", "norm_added_k"))
            for one, other in (("query", query), ("key", key))
        ),
        *(
            Word(name=f"{single}.norm.{one}_norm", parts=(f"{lone}.attn.norm_{side}",), parameter="scale")
            for one, side in (("query", "q"), ("key", "k"))
        ),
        # XLabs' processors, which are no modules of either
        fused(f"{double}.processor.qkv_lora1", *(f"{block}.attn.to_{each}" for each in "qkv")),
        fused(f"{double}.processor.qkv_lora2", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        fused(f"{double}.processor.proj_lora1", f"{block}.attn.to_out.0"),
        fused(f"{double}.processor.proj_lora2", f"{block}.attn.to_add_out"),
        fused(f"{single}.processor.qkv_lora", *(f"{lone}.attn.to_{each}" for each in "qkv")),
        fused(f"{single}.processor.proj_lora", f"{lone}.proj_out"),
        fused("img_in", "x_embedder"),
        fused("txt_in", "context_embedder"),
        *(
            fused(f"{name}.{layer}_layer", f"time_text_embed.{other}.linear_{number}")
            for name, other in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for layer, number in (("in", 1), ("out", 2))
        ),
        # Chroma's, in the place of modulation
        *(
            fused(
                f"distilled_guidance_layer.layers.{{n}}.{one}_layer", f"distilled_guidance_layer.layers.{{n}}.{other}"
            )
            for one, other in (("in", "linear_1"), ("out", "linear_2"))
        ),
        # shift and scale, which diffusers keeps the other way round
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_layer.linear", "proj_out"),
    )


def _wan() -> tuple[Word, ...]:
    block = "blocks.{n}"
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    image = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
    embedders = (("text_embedding", "text_embedder"), ("time_embedding", "time_embedder"))
    return (
        *(fused(f"{block}.self_attn.{one}", f"{block}.attn1.{other}") for one, other in attention.items()),
        *(fused(f"{block}.cross_attn.{one}", f"{block}.attn2.{other}") for one, other in (attention | image).items()),
        fused(f"{block}.ffn.0", f"{block}.ffn.net.0.proj"),
        fused(f"{block}.ffn.2", f"{block}.ffn.net.2"),
        fused(f"{block}.norm3", f"{block}.norm2"),
        *(
            fused(f"{one}.{at}", f"condition_embedder.{other}.linear_{number}")
            for one, other in embedders
            for at, number in ((0, 1), (2, 2))
        ),
        fused("time_projection.1", "condition_embedder.time_proj"),
        *(
            fused(f"img_emb.proj.{at}", f"condition_embedder.image_embedder.{other}")
            for at, other in ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"))
        ),
        fused("head.head", "proj_out"),
        fused("patch_embedding", "patch_embedding"),
    )


def _sd3() -> tuple[Word, ...]:
    joint, block = "joint_blocks.{n}", "transformer_blocks.{n}"
    return (
        fused(f"{joint}.x_block.attn.qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        fused(f"{joint}.context_block.attn.qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        fused(f"{joint}.x_block.attn.proj", f"{block}.attn.to_out.0"),
        fused(f"{joint}.context_block.attn.proj", f"{block}.attn.to_add_out"),
        fused(f"{joint}.x_block.mlp.fc1", f"{block}.ff.net.0.proj"),
        fused(f"{joint}.x_block.mlp.fc2", f"{block}.ff.net.2"),
        fused(f"{joint}.context_block.mlp.fc1", f"{block}.ff_context.net.0.proj"),
        fused(f"{joint}.context_block.mlp.fc2", f"{block}.ff_context.net.2"),
        fused(f"{joint}.x_block.adaLN_modulation.1", f"{block}.norm1.linear"),
        fused(f"{joint}.x_block.attn2.qkv", *(f"{block}.attn2.to_{each}" for each in "qkv")),
        fused(f"{joint}.x_block.attn2.proj", f"{block}.attn2.to_out.0"),
        fused("x_embedder.proj", "pos_embed.proj"),
        fused("context_embedder", "context_embedder"),
        *(
            fused(f"{one}.mlp.{at}", f"time_text_embed.{other}.linear_{number}")
            for one, other in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for at, number in ((0, 1), (2, 2))
        ),
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_layer.linear", "proj_out"),
    )


def _flux2() -> tuple[Word, ...]:
    """Black Forest Labs' second; diffusers keeps ``linear1`` whole, and modulation is shared by all blocks."""
    double, single, block = "double_blocks.{n}", "single_blocks.{n}", "transformer_blocks.{n}"
    lone = "single_transformer_blocks.{n}.attn"
    return (
        fused(f"{double}.img_attn.qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        fused(f"{double}.txt_attn.qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        fused(f"{double}.img_attn.proj", f"{block}.attn.to_out.0"),
        fused(f"{double}.txt_attn.proj", f"{block}.attn.to_add_out"),
        fused(f"{double}.img_mlp.0", f"{block}.ff.linear_in"),
        fused(f"{double}.img_mlp.2", f"{block}.ff.linear_out"),
        fused(f"{double}.txt_mlp.0", f"{block}.ff_context.linear_in"),
        fused(f"{double}.txt_mlp.2", f"{block}.ff_context.linear_out"),
        fused(f"{single}.linear1", f"{lone}.to_qkv_mlp_proj"),
        fused(f"{single}.linear2", f"{lone}.to_out"),
        *(
            fused(f"{name}.lin", f"{name}.linear")
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        ),
        fused("img_in", "x_embedder"),
        fused("txt_in", "context_embedder"),
        *(
            fused(f"{name}_in.{layer}_layer", f"time_guidance_embed.{other}_embedder.linear_{number}")
            for name, other in (("time", "timestep"), ("guidance", "guidance"))
            for layer, number in (("in", 1), ("out", 2))
        ),
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_layer.linear", "proj_out"),
    )


def _hunyuan() -> tuple[Word, ...]:
    """Tencent's HunyuanVideo, whose blocks are those of Flux under flatter names."""
    double, single, block = "double_blocks.{n}", "single_blocks.{n}", "transformer_blocks.{n}"
    lone = "single_transformer_blocks.{n}"
    refiner, refined = "txt_in.individual_token_refiner.blocks.{n}", "context_embedder.token_refiner.refiner_blocks.{n}"
    return (
        fused(f"{double}.img_attn_qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        fused(f"{double}.txt_attn_qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        fused(f"{double}.img_attn_proj", f"{block}.attn.to_out.0"),
        fused(f"{double}.txt_attn_proj", f"{block}.attn.to_add_out"),
        fused(f"{double}.img_mlp.fc1", f"{block}.ff.net.0.proj"),
        fused(f"{double}.img_mlp.fc2", f"{block}.ff.net.2"),
        fused(f"{double}.txt_mlp.fc1", f"{block}.ff_context.net.0.proj"),
        fused(f"{double}.txt_mlp.fc2", f"{block}.ff_context.net.2"),
        fused(f"{double}.img_mod.linear", f"{block}.norm1.linear"),
        fused(f"{double}.txt_mod.linear", f"{block}.norm1_context.linear"),
        fused(
            f"{single}.linear1",
            *(f"{lone}.attn.to_{each}" for each in "qkv"),
            f"{lone}.proj_mlp",
            shares=(1, 1, 1, 4),
        ),
        fused(f"{single}.linear2", f"{lone}.proj_out"),
        fused(f"{single}.modulation.linear", f"{lone}.norm.linear"),
        fused(f"{refiner}.self_attn_qkv", *(f"{refined}.attn.to_{each}" for each in "qkv")),
        fused(f"{refiner}.self_attn_proj", f"{refined}.attn.to_out.0"),
        fused(f"{refiner}.mlp.fc1", f"{refined}.ff.net.0.proj"),
        fused(f"{refiner}.mlp.fc2", f"{refined}.ff.net.2"),
        fused(f"{refiner}.adaLN_modulation.1", f"{refined}.norm_out.linear"),
        fused("txt_in.input_embedder", "context_embedder.proj_in"),
        *(
            fused(f"{name}.mlp.{at}", f"{other}.timestep_embedder.linear_{number}")
            for name, other in (
                ("txt_in.t_embedder", "context_embedder.time_text_embed"),
                ("time_in", "time_text_embed"),
            )
            for at, number in ((0, 1), (2, 2))
        ),
        *(
            fused(f"guidance_in.mlp.{at}", f"time_text_embed.guidance_embedder.linear_{number}")
            for at, number in ((0, 1), (2, 2))
        ),
        *(
            fused(f"{name}_layer", f"time_text_embed.text_embedder.linear_{number}")
            for name, number in (("vector_in.in", 1), ("vector_in.out", 2))
        ),
        *(
            fused(
                f"txt_in.c_embedder.linear_{number}", f"context_embedder.time_text_embed.text_embedder.linear_{number}"
            )
            for number in (1, 2)
        ),
        fused("img_in.proj", "x_embedder.proj"),
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_layer.linear", "proj_out"),
    )


TABLES: Mapping[str, tuple[Word, ...]] = MappingProxyType(
    {
        "flux2": _flux2(),
        "hunyuan": _hunyuan(),
        "flux": _flux(),
        "sd3": _sd3(),
        "wan": _wan(),
        **MORE,
        **NEWER,
    }
)
"""Family -> its words."""
