"""The UNet of Stable Diffusion 1, 2 and XL, whose blocks Stability counts through and diffusers groups: by rule.

So with the ControlNets that are made of its encoder.

A block of diffusers with ``depth`` layers is ``depth`` numbers of the original's, and one more for what changes the
resolution; up-blocks have a layer more.  Names alone, from the one count into the other and back.

Facts: Stability's ``generative-models`` (openaimodel.py), and diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

__all__ = ["counted", "grouped", "is_counted", "is_grouped"]

_RESNET: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
_OUTER: Mapping[str, str] = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
)
"""Module of diffusers -> of the original, inside a residual block and outside of all."""

_OWN = {original: module for module, original in _RESNET.items()}
_OUTER_OWN = {original: module for module, original in _OUTER.items()}

_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,2})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,2})\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,2})\.(.+)")
_COUNT = re.compile(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)")
_MIDDLE_COUNT = re.compile(r"middle_block\.(\d{1,2})\.(.+)")
_DOWN = re.compile(r"input_blocks\.(\d{1,3})\.0\.op")

_HINTS = "controlnet_cond_embedding.blocks."
_HINT, _ZERO = re.compile(re.escape(_HINTS) + r"(\d{1,2})"), re.compile(r"controlnet_down_blocks\.(\d{1,2})")
_CONTROL: Mapping[str, str] = MappingProxyType(
    {"controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0"}
)
_LAST = "controlnet_cond_embedding.conv_out"
"""Module of diffusers' ControlNet -> of the original: what it has besides the encoder of the UNet."""

_GROUPED, _COUNTED = "down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"


def is_grouped(modules: Collection[str]) -> bool:
    """Whether these are the modules of such a UNet in diffusers' names."""
    return _GROUPED in modules


def is_counted(modules: Collection[str]) -> bool:
    """Whether these are the modules of such a UNet in the original's names."""
    return _COUNTED in modules


def counted(modules: Collection[str]) -> dict[str, str]:
    """Module of diffusers -> what the original calls it; what has no other name there is left out.

    Args:
        modules: all of a UNet, in diffusers' names.
    """
    depth = len({module.split(".")[3] for module in modules if module.startswith("down_blocks.0.resnets.")})
    above = [module.split(".") for module in modules if module.startswith("up_blocks.")]
    attending = {path[1] for path in above if "attentions" in path}
    hints = sum(module.startswith(_HINTS) for module in modules)
    found = {
        module: _OUTER.get(module) or _middle(module) or _count(module, depth, attending) or _control(module, hints)
        for module in modules
    }
    return {module: name for module, name in found.items() if name}


def _control(module: str, hints: int) -> str:
    """What only a ControlNet has; ``hints`` layers between the first and the last that read its picture."""
    if found := _ZERO.fullmatch(module):
        return f"zero_convs.{found[1]}.0"
    if found := _HINT.fullmatch(module):
        return f"input_hint_block.{2 * (int(found[1]) + 1)}"
    last = {_LAST: f"input_hint_block.{2 * (hints + 1)}"}
    return {**_CONTROL, **last}.get(module, "")


def grouped(modules: Collection[str]) -> dict[str, str]:
    """Module of the original -> what diffusers calls it; nothing where going back would not give the same.

    Args:
        modules: all of a UNet, in the original's names.
    """
    downs = sorted(int(found[1]) for module in modules if (found := _DOWN.fullmatch(module)))
    depth = (downs[0] if downs else max(_numbers(modules), default=1) + 1) - 1
    every = {module: _OUTER_OWN.get(module) or _middle_group(module) or _group(module, depth) for module in modules}
    names = {module: name for module, name in every.items() if name}
    back = counted(names.values())
    return names if all(back.get(name) == module for module, name in names.items()) else {}


def _numbers(modules: Collection[str]) -> list[int]:
    """Of the original's input blocks."""
    return [int(found[2]) for module in modules if (found := _COUNT.fullmatch(module)) and found[1] == "input"]


def _middle(module: str) -> str:
    found = _MIDDLE.fullmatch(module)
    if not found:
        return ""
    sort, number, rest = found[1], int(found[2]), found[3]
    if sort == "attentions":
        return f"middle_block.{2 * number + 1}.{rest}"
    return f"middle_block.{2 * number}.{_RESNET[rest]}" if rest in _RESNET else ""


def _middle_group(module: str) -> str:
    found = _MIDDLE_COUNT.fullmatch(module)
    if not found:
        return ""
    number, rest = int(found[1]), found[2]
    if number % 2:
        return f"mid_block.attentions.{number // 2}.{rest}"
    return f"mid_block.resnets.{number // 2}.{_OWN[rest]}" if rest in _OWN else ""


def _count(module: str, depth: int, attending: Collection[str]) -> str:
    found = _BLOCK.fullmatch(module)
    if not found:
        return ""
    way, block, sort, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = (depth + 1) * block + (1 if way == "down" else 0)
    side = "input_blocks" if way == "down" else "output_blocks"
    match sort:
        case "resnets":
            return f"{side}.{first + at}.0.{_RESNET[rest]}" if rest in _RESNET else ""
        case "attentions":
            return f"{side}.{first + at}.1.{rest}"
        case "downsamplers":
            return f"{side}.{first + depth}.0.op" if rest == "conv" else ""
        case _:
            return f"{side}.{first + depth}.{2 if str(block) in attending else 1}.{rest}"


def _group(module: str, depth: int) -> str:
    found = _COUNT.fullmatch(module)
    if not found:
        return ""
    side, number, place, rest = found[1], int(found[2]), int(found[3]), found[4]
    block, at = divmod(number - (1 if side == "input" else 0), depth + 1)
    above = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if side == "input" and place == 0 and rest == "op":
        return f"{above}.downsamplers.0.conv"
    if place == 0:
        return f"{above}.resnets.{at}.{_OWN[rest]}" if rest in _OWN else ""
    if side == "output" and rest == "conv":
        return f"{above}.upsamplers.0.conv"
    return f"{above}.attentions.{at}.{rest}" if place == 1 else ""
