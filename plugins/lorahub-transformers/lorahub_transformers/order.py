"""The order in which a class builds its modules, from the table: no file says it, and some adapters draw along it.

Files of a checkpoint list tensors by name.  Adapters that keep only a seed gave their random numbers out along the
modules of the live model, so the table's patterns stand in that order too, and
``tests/test_families.py`` holds them to it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from lorahub_transformers.families import Family, Head

__all__ = ["registered"]

_Tree: TypeAlias = "dict[str, _Tree]"


def registered(family: Family, head: Head, modules: Collection[str]) -> tuple[str, ...]:
    """``modules`` in the order in which the class builds them; none where the table lacks one of them.

    Args:
        family: the architecture.
        head: the class.
        modules: canonical names.
    """
    tree: _Tree = {}
    backbone = (family.prefix + each for each in (*family.embedding, *family.conv, *family.linear))
    top = (name.rpartition(".")[0] for name in head.parameters)
    for pattern in (*family.built, *backbone, *top):
        node = tree
        for part in pattern.split("."):
            node = node.setdefault("*" if part.isdigit() else part, {})
    places = {module: _place(tree, module) for module in modules}
    if not all(places.values()):
        return ()
    return tuple(sorted(places, key=lambda module: places[module]))


def _place(tree: _Tree, module: str) -> tuple[int, ...]:
    """Where a module stands at every branch of the tree, from the top; nothing where it is not in it."""
    place: list[int] = []
    for part in module.split("."):
        name = "*" if part.isdigit() else part
        if name not in tree:
            return ()
        place.append(int(part) if name == "*" else list(tree).index(name))
        tree = tree[name]
    return tuple(place)
