"""What a header's metadata say of the model that was trained on: its architecture, or its family.  Tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["family_in", "stated_in"]

_FAMILIES: tuple[tuple[str, str], ...] = (
    ("pony", "Pony Diffusion"),
    ("illustrious", "Illustrious"),
    ("noobai", "NoobAI"),
    ("animagine", "Animagine"),
    ("juggernaut", "Juggernaut"),
    ("realvis", "RealVisXL"),
    ("dreamshaper", "DreamShaper"),
    ("anything-v", "Anything"),
)
"""Words in the name of the model that was trained on -> the family of fine-tunes."""

_HASHES: Mapping[str, str] = MappingProxyType(
    {"67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3": "Pony Diffusion"}
)
"""sha256 of a well-known checkpoint -> its family."""

_NAMED = ("ss_sd_model_name", "modelspec.merged_from", "base_model", "ss_base_model_version", "modelspec.architecture")
"""Metadata that may name a family."""

_STATED = ("ss_base_model_version", "modelspec.architecture", "base_model", "ss_sd_model_name")
"""Metadata that state an architecture."""

_ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("stable-diffusion-xl", "SDXL"),
    ("sdxl", "SDXL"),
    ("stable-diffusion-v1", "SD1"),
    ("sd_v1", "SD1"),
    ("sd1", "SD1"),
    ("sd_1", "SD1"),
    ("stable-diffusion-v2", "SD2"),
    ("sd_v2", "SD2"),
    ("sd2", "SD2"),
    ("stable-diffusion-3", "SD3"),
    ("sd3", "SD3"),
    ("flux-2", "Flux.2"),
    ("flux2", "Flux.2"),
    ("flux.2", "Flux.2"),
    ("flux", "Flux"),
    ("chroma", "Chroma"),
    ("hunyuan-video", "HunyuanVideo"),
    ("hunyuan_video", "HunyuanVideo"),
    ("hunyuanvideo", "HunyuanVideo"),
    ("wan", "Wan"),
    ("qwen-image", "Qwen-Image"),
    ("qwen_image", "Qwen-Image"),
    ("zimage", "Z-Image"),
    ("z-image", "Z-Image"),
    ("lumina", "Lumina 2"),
    ("hidream", "HiDream"),
    ("ltx", "LTX-Video"),
    ("anima", "Anima"),
)
"""How a stated architecture begins -> its name here; the first fits."""


def stated_in(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(architecture, key that states it)."""
    for key in _STATED:
        text = metadata.get(key, "").lower()
        last = text.rpartition("/")[2]
        for begin, name in _ARCHITECTURES if text else ():
            if text.startswith(begin) or last.startswith(begin):
                return name, key
    return None


def family_in(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(family, key that names it)."""
    key = "ss_new_sd_model_hash"
    if (known := _HASHES.get(metadata.get(key, "").lower())) is not None:
        return known, key
    for key in _NAMED:
        text = metadata.get(key, "").lower()
        for word, name in _FAMILIES:
            if word in text:
                return name, key
    return None
