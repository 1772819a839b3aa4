"""Ties that nobody declared: an embedding that may also be the output layer, in a checkpoint no plugin knows.

A checkpoint stores a tied parameter once, and only the model's class says what else it is.  Where that class is not
known, its configuration and the shapes tell whether a change could reach further than it was trained to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.notes import note
from lorahub.findings import Finding, Verdict

__all__ = ["undeclared_ties"]

_TIE = "tie_word_embeddings"


def undeclared_ties(index: BaseIndex, changed: Collection[str]) -> list[Finding]:
    """What is to be said of changed parameters with a row for each word, where the architecture is not known.

    Args:
        index: the base.
        changed: canonical names of parameters that a plan changes or replaces.
    """
    if index.declared:
        return []
    configs = list(_configs(index.config))
    sizes = {config["vocab_size"] for config in configs if isinstance(config.get("vocab_size"), int)}
    words = [name for name, info in index.parameters.items() if len(info.shape) == 2 and info.shape[0] in sizes]
    said = {config[_TIE] for config in configs if isinstance(config.get(_TIE), bool)}
    apart = False in said or (True not in said and len(words) > 1)
    found = sorted(set(words) & set(changed))
    if apart or not found:
        return []
    why = f"config.json says {_TIE}" if True in said else f"config.json does not deny {_TIE}, and none is stored apart"
    return [
        note(
            "tie-undeclared",
            Verdict.DEGRADED,
            f"{found[0]} has a row for each word and may be the output layer too ({why}), and no plugin knows this "
            "architecture; whoever loads the result would see both change, and the adapter may have changed one",
            found,
            "to change whatever it stands for: --allow tie-undeclared",
        )
    ]


def _configs(config: Mapping[str, JSON]) -> Iterator[Mapping[str, JSON]]:
    """The configuration and those of its parts (``text_config`` ...)."""
    yield config
    yield from (value for value in config.values() if isinstance(value, Mapping))
