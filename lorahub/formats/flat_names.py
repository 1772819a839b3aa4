"""Names in kohya's and LyCORIS's files: a prefix for a part of a pipeline, and a path with underscores for dots.

Tables and look-ups over text; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from lorahub.deltas.kind import JSON

__all__ = ["PREFIXES", "take_apart", "usual_prefixes"]

PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "lora_unet": "unet",
        "lora_te": "text_encoder",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
        "lora_te3": "text_encoder_3",
        "lora_te4": "text_encoder_4",
        "lora_prior_te": "text_encoder",
        "lora_prior_unet": "prior",
        "lora_transformer": "transformer",
        "lycoris": "",
    }
)
"""How a key begins -> the part of a pipeline."""


_BEGINNINGS = tuple(f"{prefix}_" for prefix in PREFIXES)


_SHORT = ".lora_magnitude_vector"
"""A suffix without a dot: diffusers' converter keeps a key's last two dots, and one of them is then in the path."""


@lru_cache(maxsize=1 << 16)  # the names of some thirty bases
def take_apart(key: str) -> tuple[str, str, str]:
    """(prefix, module as spelled, suffix); empty strings for a key of another form."""
    if key.endswith(_SHORT) and key.count(".") == 2:
        key = f"{key.removesuffix(_SHORT).replace('.', '_')}{_SHORT}"
    stem, _, suffix = key.partition(".")
    if not suffix or not stem.startswith(_BEGINNINGS):
        return "", "", ""
    prefix = next((each for each in PREFIXES if stem.startswith(f"{each}_") and len(stem) > len(each) + 1), "")
    return (prefix, stem.removeprefix(f"{prefix}_"), suffix) if prefix else ("", "", "")


def usual_prefixes(components: set[str], hinted: JSON) -> dict[str, str]:
    """Component -> prefix, as the file had it that the adapter came from, else as trainers write it."""
    several = any(component.startswith("text_encoder_") for component in components)
    usual = {component: prefix for prefix, component in PREFIXES.items() if prefix not in ("lora_te", "lora_te1")}
    usual["text_encoder"] = "lora_te1" if several else "lora_te"
    given = hinted if isinstance(hinted, dict) else {}
    chosen = {name: str(given[name]) for name in components if PREFIXES.get(str(given.get(name))) == name}
    result = usual | chosen
    # Two parts under one prefix could not be told apart again.
    taken = [result[name] for name in components if name in result]
    return usual if len(set(taken)) < len(taken) else result
