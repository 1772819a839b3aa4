"""Files that lie beside PEFT's config and are not PEFT's: told apart by the names of their tensors.

Some trainers write that config for tensors that PEFT does not name so, and some people keep other files beside it.
Beginnings and ends of keys and numbers of dimensions only; reading such a file is for the format it is named after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorahub.deltas.kind import JSON
from lorahub.files.header import Header
from lorahub.formats.marks import Mark
from lorahub.formats.peft.keys import MODEL, PREFIX
from lorahub.formats.peft.types import type_of

__all__ = ["TINKER", "TORCHTUNE", "lookalike", "named_by_peft"]

TINKER, TORCHTUNE = "tinker", "torchtune"

_TORCHTUNE = (".lora_a.weight", ".lora_b.weight")
_UNEMBED = ".unembed_tokens.lora_A.weight"
_EXPERTS = tuple(f".experts.{name}.lora_A.weight" for name in ("w1", "w2", "w3"))
_PROMPTS = ("prompt_embeddings", "prefix_task_")
"""How the names begin that PEFT gives to what lies outside the model."""


def named_by_peft(headers: Mapping[str, Header], config: Mapping[str, JSON], usual: str) -> bool:
    """Whether PEFT would name tensors so that it saves beside this config.

    Args:
        headers: weights file name -> header; where one is called as PEFT calls it, that alone counts.
        config: what lies beside them; empty where nothing does.
        usual: what PEFT calls its file.
    """
    counted = [headers[usual]] if usual in headers else [*headers.values()]
    if _IN_MODEL.on(counted):
        return True
    tag = config.get("peft_type")
    about = type_of(tag, config) if isinstance(tag, str) else None
    return bool(about and about.part) and (usual in headers or _IS_PROMPT.on(counted))


_IN_MODEL = Mark(begins=(MODEL,))
_IS_PREFIXED = Mark(begins=(PREFIX,))
_IS_PROMPT = Mark(begins=_PROMPTS)
_OF_TORCHTUNE = Mark(ends=_TORCHTUNE)
_OF_EXPERTS = Mark(begins=(PREFIX,), ends=_EXPERTS)
_UNEMBEDS = Mark(begins=(PREFIX,), ends=(_UNEMBED,))


def lookalike(headers: Collection[Header]) -> str:
    """The format that these files are of, or "" where nothing speaks against PEFT."""
    if _OF_TORCHTUNE.on(headers) and not _IS_PREFIXED.on(headers):
        return TORCHTUNE
    if _UNEMBEDS.on(headers) or any(_stacks(header) for header in headers if _OF_EXPERTS.on([header])):
        return TINKER
    return ""


def _stacks(header: Header) -> bool:
    """Whether some tensors of experts hold a matrix for each."""
    return any(
        key.startswith(PREFIX) and key.endswith(_EXPERTS) and len(info.shape) == 3
        for key, info in header.tensors.items()
    )
