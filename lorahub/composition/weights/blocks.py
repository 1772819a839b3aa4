"""The blocks of UNets and of Flux under the names that people weigh them by.

Three vocabularies for one thing: diffusers' dictionary (``down``, ``mid``, ``up``; block and attention by number), the
names of LoRA Block Weight (``IN04``, ``MID``, ``OUT11``, ``D03``, ``S20``), and B-LoRA's two presets.  A module may be
spelled as diffusers does or as the model's makers do, with dots or, where no base is known, with underscores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.weights.asking import Ask, by_default
from lorahub.errors import RecipeError
from lorahub.recipe_fields import PRESETS, Blocks, Preset, UNet

__all__ = ["block_names", "by_block", "by_preset", "by_unet_block"]

_PART = re.compile(
    r"(?:^|[._])(?:(down|up)_blocks[._](\d{1,2})[._]([a-z]+)|(mid)_block()[._](attentions))[._](\d{1,2})(?=[._]|$)"
)
"""A part of a UNet's block: side, block, what it is, and its number."""

_PRESETS = {
    "b-lora-content": re.compile(r"(?:^|[._])(?:up_blocks[._]0[._]attentions[._]0|output_blocks[._]0[._]1)(?=[._]|$)"),
    "b-lora-style": re.compile(r"(?:^|[._])(?:up_blocks[._]0[._]attentions[._]1|output_blocks[._]1[._]1)(?=[._]|$)"),
}
"""The attention of the first and of the second block behind the middle of SDXL's UNet, in both spellings."""

_BLOCKS: tuple[tuple[re.Pattern[str], str, tuple[int, ...]], ...] = tuple(
    (re.compile(rf"(?:^|[._]){pattern}(?=[._]|$)"), block, tuple(steps))
    for pattern, block, *steps in (
        (r"down_blocks[._](\d)[._](?:resnets|attentions)[._](\d)", "IN", 1, 3, 1),
        (r"down_blocks[._](\d)[._]downsamplers", "IN", 3, 3),
        (r"mid_block", "MID"),
        (r"up_blocks[._](\d)[._](?:resnets|attentions)[._](\d)", "OUT", 0, 3, 1),
        (r"up_blocks[._](\d)[._]upsamplers", "OUT", 2, 3),
        (r"conv_in", "IN", 0),
        (r"input_blocks[._](\d{1,2})", "IN", 0, 1),
        (r"middle_block", "MID"),
        (r"output_blocks[._](\d{1,2})", "OUT", 0, 1),
        (r"single_(?:transformer_)?blocks[._](\d{1,2})", "S", 0, 1),
        (r"(?:transformer|double)_blocks[._](\d{1,2})", "D", 0, 1),
        (r"(?:(?:img|txt|time|vector|guidance)_in|(?:x|context)_embedder|time_text_embed)", "IN"),
        (r"(?:final_layer|norm_out|proj_out)", "OUT"),
    )
)
"""How a module's path reads -> its block: a word, and a number where there are more, the first plus each of the path's
numbers times its step.  The first that fits counts.  A level of a UNet has two blocks and a step down on the way in,
three blocks on the way out."""

_ENCODERS = {"text_encoder": ("BASE", "CLIP"), "text_encoder_2": ("BASE", "T5"), "text_encoder_3": ("BASE",)}
"""Component -> its block in UNet pipelines, and in Flux's."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where in a UNet a target is: side, block, and the number of the attention, or of what goes with it."""

    side: str
    block: int
    number: int


def _parts(targets: Sequence[Target]) -> dict[Target, _Part]:
    """Where each target is; none for those in no block with attentions.

    What else is in such a block goes with the attention of its number, as diffusers has it.
    """
    found, attentive = {}, set()
    for target in targets:
        if match := _PART.search(target.module):
            part = _Part(match[1] or match[4], int(match[2] or 0), int(match[7]))
            found[target] = part
            if "attentions" in (match[3], match[6]):
                attentive.add((part.side, part.block))
    return {target: part for target, part in found.items() if (part.side, part.block) in attentive}


def block_names(target: Target) -> tuple[str, ...]:
    """What LoRA Block Weight may call the block of a target; none where it has no name."""
    if target.component in _ENCODERS:
        return _ENCODERS[target.component]
    for pattern, block, steps in _BLOCKS:
        if match := pattern.search(target.module):
            numbers = [step * int(number) for step, number in zip(steps[1:], match.groups(), strict=True)]
            return (f"{block}{steps[0] + sum(numbers):02}" if steps else block,)
    return ()


def by_block(rule: Blocks, ask: Ask) -> dict[Target, float]:
    """Each target's number, by the name of its block.

    Raises:
        RecipeError: a block is named in which nothing changes, or a target is in none that is.
    """
    found, used = {}, set()
    for target in ask.targets:
        name = next((name for name in block_names(target) if name in rule.named), None)
        if name is not None:
            found[target] = rule.named[name]
            used.add(name)
    unused = [name for name in rule.named if name not in used]
    if unused and not (used and isinstance(rule.blocks, tuple)):  # a list has a place also for blocks without change
        there = sorted({name for target in ask.targets for name in block_names(target)}, key=natural)
        ask.complain(
            RecipeError(
                f"{ask.where}.blocks: no target is in block {unused[0]}", f"there are: {', '.join(there) or 'none'}"
            )
        )
    return found | by_default(rule.default, [target for target in ask.targets if target not in found], ask)


def by_unet_block(rule: UNet, ask: Ask) -> dict[Target, float]:
    """Each target's number, by side, block and attention; as diffusers counts them.

    Raises:
        RecipeError: blocks are named in which nothing changes, or numbers are missing.
    """
    said = {side: _side(value) for side in _SIDES if (value := getattr(rule, side)) is not None}
    parts = _parts(ask.targets)
    found, used = dict.fromkeys(ask.targets, rule.default), set()
    most: dict[tuple[str, str], int] = defaultdict(int)  # how many attentions numbers went to
    for target, part in parts.items():
        key = next((key for key in (f"block_{part.block}", "") if key in said.get(part.side, {})), None)
        if key is None:
            continue
        used.add((part.side, key))
        values = said[part.side][key]
        if len(values) > 1 and part.number >= len(values):
            ask.complain(
                RecipeError(
                    f"{_path(ask, part.side, key)}: {len(values)} numbers, and {target.name} is in attention "
                    f"{part.number}, counted from 0",
                    "give one number for all, or one for each",
                )
            )
            continue
        found[target] = values[part.number] if len(values) > 1 else values[0]
        most[part.side, key] = max(most[part.side, key], part.number + 1)
    for (side, key), count in most.items():
        if count < len(said[side][key]) > 1:
            ask.complain(
                RecipeError(
                    f"{_path(ask, side, key)}: {len(said[side][key])} numbers, and changes are in {count} attentions",
                    "give one number for all, or one for each",
                )
            )
    for side, key in ((side, key) for side, blocks in said.items() for key in blocks):
        if (side, key) not in used:
            there = sorted({f"{part.side} block_{part.block}" for part in parts.values()}, key=natural)
            ask.complain(
                RecipeError(
                    f"{_path(ask, side, key)}: no target is in attentions there",
                    f"there are: {', '.join(there) or 'none, as only UNets have them'}",
                )
            )
    return found


_SIDES = ("down", "mid", "up")


def _path(ask: Ask, side: str, key: str) -> str:
    return ".".join(filter(None, (ask.where, side, key)))


def _side(value: Any) -> dict[str, tuple[float, ...]]:
    """What is said of one side of a UNet: block -> numbers; "" is every block that is not named."""
    if isinstance(value, Mapping):
        return {block: _side(inner)[""] for block, inner in value.items()}
    return {"": value if isinstance(value, tuple) else (value,)}


def by_preset(rule: Preset, ask: Ask) -> dict[Target, float]:
    """The number of the blocks that a preset keeps, and 0.

    Raises:
        RecipeError: nothing changes there.
    """
    kept = {
        target
        for target in ask.targets
        if target.component in ("", "unet") and _PRESETS[rule.preset].search(target.module)
    }
    if not kept:
        ask.complain(
            RecipeError(
                f"{ask.where}: {rule.preset} keeps {PRESETS[rule.preset]} of a UNet, and nothing changes there",
                "B-LoRA's presets are for adapters of SDXL's UNet",
            )
        )
    return {target: rule.value if target in kept else 0.0 for target in ask.targets}
