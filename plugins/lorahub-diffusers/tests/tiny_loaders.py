"""A small pipeline for every way in which diffusers puts LoRA on pipelines: each ``...LoraLoaderMixin`` of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from tiny_classes import CONFIGS
from tiny_diffusers import clip, diffusers, unet
from tiny_models import FAMILIES

__all__ = ["LOADERS", "Loader"]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


COSMOS = {**HEADS, "num_layers": 1, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8)}
MINIMAX = {
    **HEADS,
    "hidden_size": 32,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "time_embed_hidden_dim": 16,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}


def _of(kind: str, config: Mapping[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        found = getattr(diffusers, kind, None)
        if found is None:  # one that is not among the names of the package
            from diffusers.pipelines.ltx2 import connectors

            found = getattr(connectors, kind)
        model = found(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        return model

    return build


def _family(name: str) -> Callable[[], Any]:
    return _of(FAMILIES[name].kind, FAMILIES[name].config)


def _config(name: str) -> Callable[[], Any]:
    return _of(*CONFIGS[name])


class Nothing:
    """In the place of a part that no adapter is on."""

    config = SimpleNamespace(latent_dim=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """One of diffusers' loaders.

    Attributes:
        pipeline: a class that has it.
        models: component -> builds it; all that the loader puts LoRA on.
        alone: the one component of a file, where the loader puts each file on one; else all may be in one.
        others: builds what the pipeline cannot do without.
    """

    pipeline: str
    models: Mapping[str, Callable[[], Any]]
    alone: str = ""
    others: Mapping[str, Callable[[], Any]] = field(default_factory=lambda: MappingProxyType({}))

    def build(self) -> Any:
        """The pipeline, with these models and nothing else."""
        kind = getattr(diffusers, self.pipeline)
        models = {name: build() for name, build in [*self.models.items(), *self.others.items()]}
        if issubclass(kind, diffusers.ModularPipeline):
            pipe = kind()
            pipe.update_components(**models)
            return pipe
        wanted = inspect.signature(kind.__init__).parameters.values()
        others = {each.name: None for each in wanted if each.default is each.empty and each.name != "self"}
        return kind(**{**others, **models})


def _wan_coder() -> Any:
    means = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **means)


def _one(pipeline: str, build: Callable[[], Any]) -> Loader:
    return Loader(pipeline=pipeline, models=MappingProxyType({"transformer": build}))


def _sd3() -> Any:
    from tiny_diffusers import sd3

    return sd3().transformer


def _flux() -> Any:
    from tiny_diffusers import flux

    return flux().transformer


def _sdxl() -> Any:
    from tiny_diffusers import sdxl

    return sdxl().unet


LOADERS: Mapping[str, Loader] = MappingProxyType(
    {
        "StableDiffusionLoraLoaderMixin": Loader(
            pipeline="StableDiffusionPipeline", models={"unet": unet, "text_encoder": clip}
        ),
        "StableDiffusionXLLoraLoaderMixin": Loader(
            pipeline="StableDiffusionXLPipeline",
            models={"unet": _sdxl, "text_encoder": clip, "text_encoder_2": lambda: clip(projected=True, seed=1)},
        ),
        "SD3LoraLoaderMixin": Loader(
            pipeline="StableDiffusion3Pipeline",
            models={
                "transformer": _sd3,
                "text_encoder": lambda: clip(projected=True),
                "text_encoder_2": lambda: clip(projected=True, seed=1),
            },
        ),
        "AuraFlowLoraLoaderMixin": _one("AuraFlowPipeline", _family("AuraFlow")),
        "FluxLoraLoaderMixin": Loader(pipeline="FluxPipeline", models={"transformer": _flux, "text_encoder": clip}),
        "CogVideoXLoraLoaderMixin": _one("CogVideoXPipeline", _family("CogVideoX")),
        "Mochi1LoraLoaderMixin": _one("MochiPipeline", _config("mochi")),
        "LTXVideoLoraLoaderMixin": _one("LTXPipeline", _family("LTX")),
        "LTX2LoraLoaderMixin": Loader(
            pipeline="LTX2Pipeline",
            models={
                "transformer": _of(
                    "LTX2VideoTransformer3DModel",
                    {
                        **HEADS,
                        "in_channels": 4,
                        "out_channels": 4,
                        "cross_attention_dim": 32,
                        "audio_in_channels": 4,
                        "audio_out_channels": 4,
                        "audio_num_attention_heads": 2,
                        "audio_attention_head_dim": 8,
                        "audio_cross_attention_dim": 16,
                        "num_layers": 1,
                        "caption_channels": 16,
                    },
                ),
                "connectors": _of(
                    "LTX2TextConnectors",
                    {
                        "caption_channels": 16,
                        "text_proj_in_factor": 2,
                        **{
                            f"{each}_connector_{name}": value
                            for each in ("video", "audio")
                            for name, value in {**HEADS, "num_layers": 1, "num_learnable_registers": 4}.items()
                        },
                    },
                ),
            },
        ),
        "SanaLoraLoaderMixin": _one("SanaPipeline", _family("Sana")),
        "HeliosLoraLoaderMixin": _one(
            "HeliosPipeline",
            _of(
                "HeliosTransformer3DModel",
                {
                    **HEADS,
                    "in_channels": 4,
                    "out_channels": 4,
                    "text_dim": 16,
                    "freq_dim": 16,
                    "ffn_dim": 32,
                    "num_layers": 1,
                    "rope_dim": (4, 6, 6),
                },
            ),
        ),
        "HunyuanVideoLoraLoaderMixin": _one("HunyuanVideoPipeline", _family("HunyuanVideo")),
        "Lumina2LoraLoaderMixin": _one("Lumina2Pipeline", _family("Lumina2")),
        "KandinskyLoraLoaderMixin": _one(
            "Kandinsky5T2VPipeline",
            _of(
                "Kandinsky5Transformer3DModel",
                {
                    "in_text_dim": 16,
                    "in_text_dim2": 16,
                    "time_dim": 16,
                    "model_dim": 32,
                    "ff_dim": 32,
                    "num_text_blocks": 1,
                    "num_visual_blocks": 1,
                    "axes_dims": (4, 6, 6),
                },
            ),
        ),
        "WanLoraLoaderMixin": Loader(
            pipeline="WanPipeline",
            models={"transformer": _family("Wan"), "transformer_2": _family("Wan")},
            alone="transformer",
        ),
        "SkyReelsV2LoraLoaderMixin": _one(
            "SkyReelsV2Pipeline",
            _of("SkyReelsV2Transformer3DModel", {**FAMILIES["Wan"].config}),
        ),
        "CogView4LoraLoaderMixin": _one(
            "CogView4Pipeline",
            _of(
                "CogView4Transformer2DModel",
                {
                    **HEADS,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "text_embed_dim": 16,
                    "time_embed_dim": 16,
                    "condition_dim": 8,
                    "sample_size": 8,
                    "rope_axes_dim": (8, 8),
                },
            ),
        ),
        "HiDreamImageLoraLoaderMixin": _one(
            "HiDreamImagePipeline",
            _of(
                "HiDreamImageTransformer2DModel",
                {
                    **HEADS,
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "caption_channels": [16, 16],
                    "text_emb_dim": 16,
                    "axes_dims_rope": (4, 12),
                    "max_resolution": (8, 8),
                    "llama_layers": [0, 1],
                },
            ),
        ),
        "QwenImageLoraLoaderMixin": _one("QwenImagePipeline", _family("Qwen-Image")),
        "Krea2LoraLoaderMixin": _one(
            "Krea2Pipeline",
            _of(
                "Krea2Transformer2DModel",
                {
                    **HEADS,
                    "in_channels": 4,
                    "num_layers": 1,
                    "num_key_value_heads": 1,
                    "intermediate_size": 32,
                    "timestep_embed_dim": 16,
                    "text_hidden_dim": 16,
                    "num_text_layers": 2,
                    "text_num_attention_heads": 2,
                    "text_num_key_value_heads": 2,
                    "text_intermediate_size": 16,
                    "num_layerwise_text_blocks": 1,
                    "num_refiner_text_blocks": 1,
                    "axes_dims_rope": (4, 6, 6),
                },
            ),
        ),
        "ZImageLoraLoaderMixin": _one("ZImagePipeline", _family("Z-Image")),
        "AnimaLoraLoaderMixin": Loader(
            pipeline="AnimaModularPipeline",
            models={
                "transformer": _of("CosmosTransformer3DModel", COSMOS),
                "text_conditioner": _of(
                    "AnimaTextConditioner",
                    {
                        "source_dim": 16,
                        "target_dim": 16,
                        "model_dim": 32,
                        "num_layers": 1,
                        "num_attention_heads": 2,
                        "target_vocab_size": 16,
                    },
                ),
            },
        ),
        "Flux2LoraLoaderMixin": _one("Flux2Pipeline", _family("Flux2")),
        "Flux3LoraLoaderMixin": _one("Flux3ModularPipeline", _config("flux3")),
        "BriaFibo2LoraLoaderMixin": _one(
            "BriaFibo2Pipeline",
            _of(
                "BriaFibo2Transformer2DModel",
                {
                    "in_channels": 4,
                    "dim": 32,
                    "n_layers": 2,
                    "n_refiner_layers": 1,
                    "n_heads": 2,
                    "cap_feat_dim": 16,
                    "injection_layer_ids": (1,),
                    "perceiver_num_layers": 1,
                    "max_num_gist_tokens": 4,
                    "min_num_gist_tokens": 2,
                    "axes_dims": (4, 6, 6),
                    "axes_lens": (8, 8, 8),
                },
            ),
        ),
        "Ideogram4LoraLoaderMixin": _one(
            "Ideogram4Pipeline",
            _of(
                "Ideogram4Transformer2DModel",
                {
                    **HEADS,
                    "in_channels": 4,
                    "num_layers": 1,
                    "intermediate_size": 32,
                    "adaln_dim": 16,
                    "llm_features_dim": 16,
                    "mrope_section": (2, 3, 3),
                },
            ),
        ),
        "ErnieImageLoraLoaderMixin": _one(
            "ErnieImagePipeline",
            _of(
                "ErnieImageTransformer2DModel",
                {
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "num_layers": 1,
                    "ffn_hidden_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "text_in_dim": 16,
                    "rope_axes_dim": (4, 6, 6),
                },
            ),
        ),
        "CosmosLoraLoaderMixin": Loader(
            pipeline="Cosmos2_5_PredictBasePipeline",
            models={"transformer": _of("CosmosTransformer3DModel", COSMOS)},
            others={"safety_checker": Nothing, "vae": _wan_coder},
        ),
        "AceStepLoraLoaderMixin": _one(
            "AceStepPipeline",
            _of(
                "AceStepTransformer1DModel",
                {
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 16,
                    "in_channels": 12,
                    "audio_acoustic_hidden_dim": 4,
                },
            ),
        ),
        "MiniMaxH3LoraLoaderMixin": Loader(
            pipeline="MiniMaxH3ModularPipeline",
            models=dict.fromkeys(("transformer", "transformer_ref"), _of("MiniMaxH3Transformer3DModel", MINIMAX)),
        ),
        "RFD4ProteinaLoraLoaderMixin": Loader(
            pipeline="RFD4ProteinaPipeline",
            models={
                "transformer": _of(
                    "RFD4ProteinaTransformer", {"nlayers": 1, "token_dim": 24, "nheads": 2, "pair_repr_dim": 16}
                )
            },
            others={"vae": Nothing},
        ),
    }
)
"""Loader -> a pipeline that has it."""
