"""Modules that transformers renames when it loads a checkpoint, of architectures that ``families.py`` does not list.

Where the classes are at hand, ``converting`` reads all renamings off the library.  Without it such a base is known by
the names it is stored under, and adapters trained in transformers 5 say the live ones.  Data and a look-up over text;
``tests/test_moved.py`` holds the table against the renamings of the real classes.  Where the experts themselves lie is
the core's business (``lorahub.bases.experts``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lorahub.deltas.kind import JSON

__all__ = ["MOVED", "moved"]

_ROUTER = ("block_sparse_moe.gate", "mlp.gate")

MOVED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "kimi_linear": _ROUTER,
        "minimax": _ROUTER,
        "minimax_m2": _ROUTER,
        "mixtral": _ROUTER,
        "phimoe": ("block_sparse_moe.gate", "mlp.router"),
    }
)
"""``model_type`` -> (stored, live) end of the router's path, in every layer."""


def moved(config: Mapping[str, JSON], parameters: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Aliases for the renamed modules, whichever of the two names they have in the index.

    Args:
        config: of the base.
        parameters: dotted names, as the index has them.
    """
    kind = config.get("model_type")
    names = MOVED.get(kind) if isinstance(kind, str) else None
    if names is None:
        return ()
    found: list[tuple[str, str]] = []
    for module in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
        for here, there in (names, names[::-1]):
            if module.endswith(f".{here}"):
                found.append((f"{module}.", f"{module.removesuffix(here)}{there}."))
    return tuple(found)
