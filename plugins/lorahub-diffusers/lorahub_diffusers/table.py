"""The table of the README, from the code's own: ``python -m lorahub_diffusers.table``.

Every class of diffusers is taken; the table names those that people have adapters for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.conversion.vocabulary import family_of

__all__ = ["FAMILIES", "table"]

FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "Stable Diffusion 1 and 2": ("UNet2DConditionModel", ("unet", "text_encoder")),
        "Stable Diffusion XL": ("UNet2DConditionModel", ("unet", "text_encoder", "text_encoder_2")),
        "Stable Diffusion 3": ("SD3Transformer2DModel", ("transformer", "text_encoder", "text_encoder_2")),
        "Flux": ("FluxTransformer2DModel", ("transformer", "text_encoder")),
        "Flux2": ("Flux2Transformer2DModel", ("transformer",)),
        "Flux3": ("Flux3Transformer2DModel", ("transformer",)),
        "Chroma": ("ChromaTransformer2DModel", ("transformer",)),
        "Qwen-Image": ("QwenImageTransformer2DModel", ("transformer",)),
        "Z-Image": ("ZImageTransformer2DModel", ("transformer",)),
        "Wan, SkyReels": ("WanTransformer3DModel", ("transformer", "transformer_2")),
        "LTX": ("LTXVideoTransformer3DModel", ("transformer",)),
        "LTX-2": ("LTX2VideoTransformer3DModel", ("transformer", "connectors")),
        "HunyuanVideo": ("HunyuanVideoTransformer3DModel", ("transformer",)),
        "Mochi": ("MochiTransformer3DModel", ("transformer",)),
        "CogVideoX": ("CogVideoXTransformer3DModel", ("transformer",)),
        "CogView4": ("CogView4Transformer2DModel", ("transformer",)),
        "Sana": ("SanaTransformer2DModel", ("transformer",)),
        "AuraFlow": ("AuraFlowTransformer2DModel", ("transformer",)),
        "Lumina2": ("Lumina2Transformer2DModel", ("transformer",)),
        "PixArt": ("PixArtTransformer2DModel", ("transformer",)),
        "HiDream": ("HiDreamImageTransformer2DModel", ("transformer",)),
        "Kandinsky 5": ("Kandinsky5Transformer3DModel", ("transformer",)),
        "Cosmos": ("CosmosTransformer3DModel", ("transformer",)),
        "Anima": ("CosmosTransformer3DModel", ("transformer", "text_conditioner")),
        "Krea 2": ("Krea2Transformer2DModel", ("transformer",)),
        "Bria FIBO 2": ("BriaFibo2Transformer2DModel", ("transformer",)),
        "Ideogram 4": ("Ideogram4Transformer2DModel", ("transformer",)),
        "ERNIE-Image": ("ErnieImageTransformer2DModel", ("transformer",)),
        "Helios": ("HeliosTransformer3DModel", ("transformer",)),
        "MiniMax-H3": ("MiniMaxH3Transformer3DModel", ("transformer", "transformer_ref")),
        "ACE-Step": ("AceStepTransformer1DModel", ("transformer",)),
        "Proteina": ("RFD4ProteinaTransformer", ("transformer",)),
    }
)
"""What people call a family -> (class of its denoiser, components that adapters change)."""

_HEAD = ("| pipelines | denoiser | components | words of its makers, written too |", "|---|---|---|---|")


def table() -> str:
    """Markdown, a line for each family."""
    return "\n".join([*_HEAD, *(_line(name, *about) for name, about in FAMILIES.items())]) + "\n"


def _line(name: str, kind: str, components: tuple[str, ...]) -> str:
    words = "yes" if family_of((), kind) else "-"
    return f"| {name} | `{kind}` | {', '.join(f'`{each}`' for each in components)} | {words} |"


if __name__ == "__main__":
    sys.stdout.write(table())
