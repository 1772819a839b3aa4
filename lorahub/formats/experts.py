"""Factors for all experts of a layer in one tensor, and how a base keeps those experts.

Sizes and names only: a group for the whole stack becomes one LoRA an expert where the base has a module for each, and
is turned as the base's parameter is where it has one for all.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from lorahub.bases.fused_experts import part_pieces
from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import Group

__all__ = ["apart", "in_base"]


def in_base(group: Group, index: BaseIndex | None) -> list[Group]:
    """A group of the kind "expert-lora" as the base has it; as it is where no base is known, or it has no such thing.

    Its module is that of all experts, its parameter the projection ("gate_proj").
    """
    if index is None:
        return [group]
    one_by_one = apart(group, index.modules())
    if one_by_one != [group]:
        return one_by_one
    up, down = group.slots["up"].shape, group.slots["down"].shape
    straight = (*up[:2], down[2])
    info = index.parameters.get(f"{group.module}.{group.parameter}")
    if info is not None and up[1] != down[2]:  # a square one does not tell
        ways = {straight: False, (up[0], down[2], up[1]): True}
        way = ways.get(info.shape)
    else:
        way = False if part_pieces(index, group.module, group.parameter) else None
    return [group if way is None else replace(group, options={**group.options, "transposed": way})]


def apart(group: Group, modules: Container[str]) -> list[Group]:
    """One LoRA for each expert where ``modules`` has a module for each (``experts.0.up_proj``); else the group itself.

    Args:
        group: of the kind "expert-lora"; its module is that of all experts, its parameter the projection.
        modules: of the base.
    """
    names = [f"{group.module}.{at}.{group.parameter}" for at in range(group.slots["down"].shape[0])]
    if not all(name in modules for name in names):
        return [group]
    options = {name: value for name, value in group.options.items() if name != "transposed"}
    return [
        Group(
            component=group.component,
            module=name,
            kind="lora",
            slots={slot: replace(ref, shape=ref.shape[1:], stacked="", expert=at) for slot, ref in group.slots.items()},
            options=options,
        )
        for at, name in enumerate(names)
    ]
