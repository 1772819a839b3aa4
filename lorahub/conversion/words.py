"""The words of each family of diffusion models: a module by its makers' name, and what diffusers calls it.

A word says that one module of the first vocabulary is one or several of the second, and how many shares of its rows
each of those has: ``qkv`` is ``to_q``, ``to_k`` and ``to_v``.  ``{n}`` stands for a number, the same in both.  Data
alone.

Facts: Black Forest Labs' ``flux`` and ``flux2``, Stability's ``sd3``, Wan-Video's ``Wan2.1``, Tencent's
``HunyuanVideo``, Z-Image as ComfyUI has it, and diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["TABLES", "Word", "fused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One module in one vocabulary, and what it is in the other.

    Attributes:
        name: of the one module.
        parts: of the other ones, in the order of their rows.
        shares: of the rows, one for each part.
        halves_swapped: its second half of rows comes first in the other vocabulary.
    """

    name: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    halves_swapped: bool = False


def fused(name: str, *parts: str, shares: tuple[int, ...] = ()) -> Word:
    """A word for one module that is all of ``parts``, in equal shares by default."""
    return Word(name=name, parts=parts, shares=shares or (1,) * len(parts))


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


def _z_image() -> tuple[Word, ...]:
    """Z-Image where its attention is fused; what both call the same has no word."""
    blocks = [f"{stack}.{{n}}.attention" for stack in ("layers", "noise_refiner", "context_refiner")]
    return (
        *(fused(f"{block}.qkv", *(f"{block}.to_{each}" for each in "qkv")) for block in blocks),
        *(fused(f"{block}.out", f"{block}.to_out.0") for block in blocks),
    )


TABLES: Mapping[str, tuple[Word, ...]] = MappingProxyType(
    {
        "flux2": _flux2(),
        "hunyuan": _hunyuan(),
        "z-image": _z_image(),
        "flux": _flux(),
        "sd3": _sd3(),
        "wan": _wan(),
    }
)
"""Family -> its words."""
