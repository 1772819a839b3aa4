"""``ensure_weight_tying``: LoRA on an embedding that PEFT puts on the output layer too, as they are one weight.

Both layers then compute with the change once, and PEFT's merge adds it to the weight at each of them.  Which names are
one weight, the base knows.  No number is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.deltas.patterns import full_match
from lorahub.errors import UnsupportedKind
from lorahub.formats.peft.config import names
from lorahub.formats.peft.keys import Names, Stems

__all__ = ["shared_weights", "ties_saved", "without_copies"]

_FIELD = "ensure_weight_tying"

_EMBEDDINGS: Final = ("embed_tokens", "lm_head")
"""The names by which PEFT 0.21.2 sees that an embedding is adapted; under others it ties nothing."""

_HEAD = "lm_head"


def shared_weights(
    config: Mapping[str, JSON], found: Names, stems: Stems, index: BaseIndex | None
) -> Mapping[str, int]:
    """Stem -> at how many of the file's modules PEFT's merge adds its change, where that is more than one.

    DoRA is left out: what PEFT does with two magnitudes on one weight is no multiple of a change.
    """
    if index is None or not index.tied or config.get("use_dora") or not _asked(config):
        return {}
    known = {f"{module}.weight": stem for stem in found.factors if (module := stems.find(stem))}
    result: dict[str, int] = {}
    for group in index.tied:
        together = [known[name] for name in group if name in known]
        if len(together) > 1:
            result |= dict.fromkeys(together, len(together))
    return result


def ties_saved(config: Mapping[str, JSON]) -> bool:
    """Whether PEFT kept a module that it trained whole and those that share its weight one, and saved each."""
    return config.get(_FIELD) is True and bool(names(config, "modules_to_save"))


def without_copies(modules: Collection[str], config: Mapping[str, JSON]) -> list[str]:
    """``modules`` less the output layer that PEFT adapts along with the embedding, which no field lists."""
    asked = _asked(config)
    return [module for module in modules if not (asked and module.rpartition(".")[2] == _HEAD)]


def _asked(config: Mapping[str, JSON]) -> bool:
    """Whether PEFT ties factors to those of an embedding, if the base ties the weight."""
    if config.get(_FIELD) is not True:
        return False
    if any(_is_embedding(name) for name in names(config, "modules_to_save")):
        return False
    given = config.get("target_modules")
    if not isinstance(given, str):
        return any(_is_embedding(name) for name in names(config, "target_modules"))
    try:
        return any(full_match(given, name, field="target_modules") for name in _EMBEDDINGS)
    except UnsupportedKind:  # a pattern beyond what is matched here; that both are in the file says enough
        return True


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in _EMBEDDINGS
