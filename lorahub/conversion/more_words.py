"""Words of further families, which are read and placed under either vocabulary; see ``words``.  Data alone.

Facts: Lightricks' ``LTX-Video``, PixArt-alpha's ``PixArt-sigma``, NVIDIA's ``Sana``, Alpha-VLLM's ``Lumina-Image-2.0``,
fal's ``AuraFlow``, Genmo's ``mochi``, Z-Image as ComfyUI has it, and diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lorahub.conversion.word import Word, fused

__all__ = ["MORE"]


def _steps(original: str, own: str) -> Iterator[Word]:
    """An embedding of the time step, by two layers."""
    yield fused(f"{original}.mlp.0", f"{own}.linear_1")
    yield fused(f"{original}.mlp.2", f"{own}.linear_2")


def _ltx() -> tuple[Word, ...]:
    block = "transformer_blocks.{n}"
    attentions = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    modulations = {
        "adaln_single": "time_embed",
        "audio_adaln_single": "audio_time_embed",
        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    }
    return (
        fused("patchify_proj", "proj_in"),
        fused("audio_patchify_proj", "audio_proj_in"),
        *(fused(f"{block}.{each}.{side}_norm", f"{block}.{each}.norm_{side}") for each in attentions for side in "qk"),
        *(
            fused(f"{one}.{layer}", f"{other}.{layer}")
            for one, other in modulations.items()
            for layer in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
        ),
    )


def _crossed() -> Iterator[Word]:
    """Blocks as PixArt has them: all of self-attention in one, and keys and values of cross-attention."""
    block, own = "blocks.{n}", "transformer_blocks.{n}"
    yield fused(f"{block}.attn.qkv", *(f"{own}.attn1.to_{each}" for each in "qkv"))
    yield fused(f"{block}.attn.proj", f"{own}.attn1.to_out.0")
    yield fused(f"{block}.cross_attn.q_linear", f"{own}.attn2.to_q")
    yield fused(f"{block}.cross_attn.kv_linear", f"{own}.attn2.to_k", f"{own}.attn2.to_v")
    yield fused(f"{block}.cross_attn.proj", f"{own}.attn2.to_out.0")
    yield fused("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    yield fused("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    yield fused("final_layer.linear", "proj_out")


def _pixart() -> tuple[Word, ...]:
    return (
        *_crossed(),
        fused("blocks.{n}.mlp.fc1", "transformer_blocks.{n}.ff.net.0.proj"),
        fused("blocks.{n}.mlp.fc2", "transformer_blocks.{n}.ff.net.2"),
        *_steps("t_embedder", "adaln_single.emb.timestep_embedder"),
        fused("t_block.1", "adaln_single.linear"),
        fused("x_embedder.proj", "pos_embed.proj"),
    )


def _sana() -> tuple[Word, ...]:
    convolutions = {"inverted_conv": "conv_inverted", "depth_conv": "conv_depth", "point_conv": "conv_point"}
    return (
        *_crossed(),
        *(fused(f"blocks.{{n}}.mlp.{a}.conv", f"transformer_blocks.{{n}}.ff.{b}") for a, b in convolutions.items()),
        *_steps("t_embedder", "time_embed.emb.timestep_embedder"),
        fused("t_block.1", "time_embed.linear"),
        fused("x_embedder.proj", "patch_embed.proj"),
        fused("attention_y_norm", "caption_norm"),
    )


def _lumina2() -> tuple[Word, ...]:
    """Three queries share a key and a value."""
    return (
        *(
            word
            for stack in ("layers.{n}", "noise_refiner.{n}", "context_refiner.{n}")
            for word in (
                fused(f"{stack}.attention.qkv", *(f"{stack}.attn.to_{each}" for each in "qkv"), shares=(3, 1, 1)),
                fused(f"{stack}.attention.out", f"{stack}.attn.to_out.0"),
                fused(f"{stack}.attention.q_norm", f"{stack}.attn.norm_q"),
                fused(f"{stack}.attention.k_norm", f"{stack}.attn.norm_k"),
                *(fused(f"{stack}.feed_forward.w{n}", f"{stack}.feed_forward.linear_{n}") for n in (1, 2, 3)),
            )
        ),
        *(
            fused(f"{stack}.{{n}}.adaLN_modulation.1", f"{stack}.{{n}}.norm1.linear")
            for stack in ("layers", "noise_refiner")
        ),
        *_steps("t_embedder", "time_caption_embed.timestep_embedder"),
        *(fused(f"cap_embedder.{n}", f"time_caption_embed.caption_embedder.{n}") for n in (0, 1)),
        fused("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        fused("final_layer.linear", "norm_out.linear_2"),
    )


def _auraflow() -> tuple[Word, ...]:
    double, own = "double_layers.{n}", "joint_transformer_blocks.{n}"
    single, lone = "single_layers.{n}", "single_transformer_blocks.{n}"
    layers = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    return (
        *(fused(f"{double}.attn.w2{each}", f"{own}.attn.to_{each}") for each in "qkv"),
        *(fused(f"{double}.attn.w1{each}", f"{own}.attn.add_{each}_proj") for each in "qkv"),
        fused(f"{double}.attn.w2o", f"{own}.attn.to_out.0"),
        fused(f"{double}.attn.w1o", f"{own}.attn.to_add_out"),
        *(fused(f"{double}.mlpX.{a}", f"{own}.ff.{b}") for a, b in layers.items()),
        *(fused(f"{double}.mlpC.{a}", f"{own}.ff_context.{b}") for a, b in layers.items()),
        fused(f"{double}.modX.1", f"{own}.norm1.linear"),
        fused(f"{double}.modC.1", f"{own}.norm1_context.linear"),
        *(fused(f"{single}.attn.w1{each}", f"{lone}.attn.to_{each}") for each in "qkv"),
        fused(f"{single}.attn.w1o", f"{lone}.attn.to_out.0"),
        *(fused(f"{single}.mlp.{a}", f"{lone}.ff.{b}") for a, b in layers.items()),
        fused(f"{single}.modCX.1", f"{lone}.norm1.linear"),
        *_steps("t_embedder", "time_step_proj"),
        fused("cond_seq_linear", "context_embedder"),
        fused("init_x_linear", "pos_embed.proj"),
        Word(name="modF.1", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_linear", "proj_out"),
    )


def _mochi() -> tuple[Word, ...]:
    block, own = "blocks.{n}", "transformer_blocks.{n}"
    return (
        fused(f"{block}.attn.qkv_x", *(f"{own}.attn1.to_{each}" for each in "qkv")),
        fused(f"{block}.attn.qkv_y", *(f"{own}.attn1.add_{each}_proj" for each in "qkv")),
        *(fused(f"{block}.attn.{each}_norm_x", f"{own}.attn1.norm_{each}") for each in "qk"),
        *(fused(f"{block}.attn.{each}_norm_y", f"{own}.attn1.norm_added_{each}") for each in "qk"),
        fused(f"{block}.attn.proj_x", f"{own}.attn1.to_out.0"),
        fused(f"{block}.attn.proj_y", f"{own}.attn1.to_add_out"),
        # gate and value, which diffusers keeps the other way round
        Word(name=f"{block}.mlp_x.w1", parts=(f"{own}.ff.net.0.proj",), halves_swapped=True),
        Word(name=f"{block}.mlp_y.w1", parts=(f"{own}.ff_context.net.0.proj",), halves_swapped=True),
        fused(f"{block}.mlp_x.w2", f"{own}.ff.net.2"),
        fused(f"{block}.mlp_y.w2", f"{own}.ff_context.net.2"),
        fused(f"{block}.mod_x", f"{own}.norm1.linear"),
        fused(f"{block}.mod_y", f"{own}.norm1_context.linear"),
        fused(f"{block}.mod_y", f"{own}.norm1_context.linear_1"),  # of the last block
        *_steps("t_embedder", "time_embed.timestep_embedder"),
        *(fused(f"t5_y_embedder.{each}", f"time_embed.pooler.{each}") for each in ("to_kv", "to_q", "to_out")),
        fused("t5_yproj", "time_embed.caption_proj"),
        fused("x_embedder.proj", "patch_embed.proj"),
        Word(name="final_layer.mod", parts=("norm_out.linear",), halves_swapped=True),
        fused("final_layer.linear", "proj_out"),
    )


def _z_image() -> tuple[Word, ...]:
    """Where its attention is fused, and its one size of patches; what both call the same has no word."""
    blocks = [f"{stack}.{{n}}.attention" for stack in ("layers", "noise_refiner", "context_refiner")]
    return (
        *(fused(f"{block}.qkv", *(f"{block}.to_{each}" for each in "qkv")) for block in blocks),
        *(fused(f"{block}.out", f"{block}.to_out.0") for block in blocks),
        *(fused(f"{block}.{side}_norm", f"{block}.norm_{side}") for block in blocks for side in "qk"),
        fused("x_embedder", "all_x_embedder.2-1"),
        fused("final_layer.linear", "all_final_layer.2-1.linear"),
        fused("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    )


MORE: Mapping[str, tuple[Word, ...]] = MappingProxyType(
    {
        "auraflow": _auraflow(),
        "ltx": _ltx(),
        "lumina2": _lumina2(),
        "mochi": _mochi(),
        "pixart": _pixart(),
        "sana": _sana(),
        "z-image": _z_image(),
    }
)
"""Family -> its words."""
