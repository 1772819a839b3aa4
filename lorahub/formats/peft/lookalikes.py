"""Files of trainers that write PEFT's config beside tensors that PEFT does not name so: told apart by those names.

Endings and numbers of dimensions only; reading such a file is for the format it is named after.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorahub.files.header import Header
from lorahub.formats.peft.keys import PREFIX

__all__ = ["TINKER", "TORCHTUNE", "lookalike"]

TINKER, TORCHTUNE = "tinker", "torchtune"

_TORCHTUNE = (".lora_a.weight", ".lora_b.weight")
_UNEMBED = ".unembed_tokens.lora_A.weight"
_EXPERTS = tuple(f".experts.{name}.lora_A.weight" for name in ("w1", "w2", "w3"))


def lookalike(headers: Iterable[Header]) -> str:
    """The format that these files are of, or "" where nothing speaks against PEFT."""
    shapes = {key: info.shape for header in headers for key, info in header.tensors.items()}
    if any(key.endswith(_TORCHTUNE) for key in shapes) and not any(key.startswith(PREFIX) for key in shapes):
        return TORCHTUNE
    stacks = (key.endswith(_EXPERTS) and len(shape) == 3 for key, shape in shapes.items() if key.startswith(PREFIX))
    if any(stacks) or any(key.startswith(PREFIX) and key.endswith(_UNEMBED) for key in shapes):
        return TINKER
    return ""
