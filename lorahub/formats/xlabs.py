"""XLabs' Flux adapters: low-rank processors beside the blocks, ``double_blocks.0.processor.qkv_lora1.down.weight``.

A processor is no module of the original model: ``qkv_lora1`` changes the image stream's fused query, key and value,
``qkv_lora2`` the text stream's, and a single block's ``qkv_lora`` the first rows of its ``linear1``.  Where those lie
is for a framework to declare; modules keep the processors' names here.  No alpha is stored: the scale is 1.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.marks import Mark
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["XlabsFormat", "lorahub_formats"]

_BLOCKS = ("double_blocks.", "single_blocks.")

LANDS: Mapping[str, str] = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.qkv_lora": "the query, key and value rows of linear1",
    "processor.proj_lora": "linear2",
}
"""Processor -> what it changes in the original model's block."""


_OWN = Mark(begins=_BLOCKS, ends=tuple(f".{name}.down.weight" for name in LANDS))


@final
class XlabsFormat:
    """Reads XLabs' Flux processors."""

    name = "xlabs"
    rows = (Row(kind="lora", leaves=(Leaf(slot="down", suffix="down.weight"), Leaf(slot="up", suffix="up.weight"))),)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where a block has one of the processors."""
        if _OWN.on(files.headers.values()):
            return Claim(0.9, "tensors are named after XLabs' processors of Flux")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
        """
        file = only_file(files)
        header = files.headers[file]
        ends = tuple(f".{name}" for name in LANDS)
        paths = {
            key: key
            for key in header.tensors
            if key.startswith(_BLOCKS) and key.removesuffix(".down.weight").removesuffix(".up.weight").endswith(ends)
        }
        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, Stems(index), _options)
        left = [*grouped.unknown, *(key for key in header.tensors if key not in paths)]
        return Reading(
            format=self.name,
            file=file,
            groups=grouped.groups,
            findings=(
                *grouped.findings,
                *unknown_keys(left, "are of none of XLabs' processors"),
                *_unplaced(grouped.groups, index),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'xlabs' is read only", "write another: peft")


def _options(_kind: str, _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {"scale": 1.0, "scale_rule": "1, no alpha", "rank": slots["down"].shape[0]}


def _unplaced(groups: Sequence[Group], index: BaseIndex | None) -> list[Finding]:
    """Why processors find no place in a base; nothing for those that do."""
    known = index.modules() if index else {}
    apart = sorted((group.module for group in groups if group.module not in known), key=natural)
    if not apart:
        return []
    names = sorted({".".join(module.split(".")[2:]) for module in apart})
    means = "; ".join(f"{name} changes {LANDS[name]}" for name in names)
    return [
        Finding(
            code="layout-undeclared",
            axis="placement",
            level=Verdict.UNVERIFIED if index is None else Verdict.INCOMPATIBLE,
            message=f"XLabs' processors are no modules of a base, and no framework here says where they land: {means}",
            where=tuple(apart),
            remedy="convert it to the layout of kohya or diffusers with a tool that knows Flux",
        )
    ]


@hookimpl
def lorahub_formats() -> list[Format]:
    """XLabs'."""
    return [XlabsFormat()]
