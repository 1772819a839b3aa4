"""Stability AI's Control-LoRA: a ControlNet as what distinguishes it from a UNet's encoder, under its makers' names.

The mark ``lora_controlnet`` is a tensor without numbers.  Weights that the UNet has too are factors ``up`` and ``down``
(convolutions: ``up`` of one place, ``down`` of all), with a scale of 1; norms, every bias, and the layers that only a
ControlNet has are stored whole.  So it is for a ControlNet that was made of the UNet, and not for the UNet itself, to
which its names would fit as well.  Read only.

Facts: Stability AI's ``control-lora``, diffusers 0.42.1 (``convert_sai_sd_control_lora_state_dict_to_peft``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["MARK", "ControlLoraFormat", "lorahub_formats"]

MARK = "lora_controlnet"
COMPONENT = "controlnet"

_OWN = ("controlnet_mid_block", "middle_block_out.0")
"""A module that every ControlNet has, and no UNet: as diffusers and as its makers call it."""


@final
class ControlLoraFormat:
    """Reads Control-LoRAs of Stable Diffusion 1 and XL."""

    name = "control-lora"
    rows = (
        Row(kind="lora", leaves=(Leaf(slot="down", suffix="down"), Leaf(slot="up", suffix="up"))),
        Row(kind="replace", leaves=(Leaf(slot="value", suffix="weight"),), scaled=False),
        Row(kind="replace", leaves=(Leaf(slot="value", suffix="bias"),), parameter="bias", scaled=False),
    )
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by its mark."""
        if any(MARK in header.tensors for header in files.headers.values()):
            return Claim(1.0, f"it has the mark of a Control-LoRA, {MARK}")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
        """
        file = only_file(files)
        header = files.headers[file]
        paths = {key: key for key in header.tensors if key != MARK}
        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, Stems(index), _options)
        return Reading(
            format=self.name,
            file=file,
            groups=tuple(replace(group, component=COMPONENT) for group in grouped.groups),
            findings=(
                *_about(index),
                *grouped.findings,
                *unknown_keys(grouped.unknown, "are neither factors nor parameters of a ControlNet"),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry(f"the format '{self.name}' is read only", "write another: peft")


def _about(index: BaseIndex | None) -> Iterator[Finding]:
    """What it is for, and that a base is something else."""
    yield Finding(
        code="controlnet-apart",
        axis="format",
        level=Verdict.EXACT,
        message="this is a Control-LoRA: it makes a ControlNet of the encoder of a UNet, and leaves the UNet as it is",
        where=(MARK,),
    )
    if index is not None and not any(name.rpartition(":")[2] in _OWN for name in index.modules()):
        yield Finding(
            code="controlnet-needed",
            axis="placement",
            level=Verdict.INCOMPATIBLE,
            message=f"a Control-LoRA is for a ControlNet, and {index.ref} is none: added to the UNet it would change "
            "the model that is to be controlled",
            where=(MARK,),
            remedy="make one, and take it as the base: "
            "diffusers.ControlNetModel.from_unet(pipe.unet).save_pretrained(FOLDER)",
        )


def _options(_kind: str, _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {"scale": 1.0, "scale_rule": "1, no alpha", "rank": slots["down"].shape[0]}


@hookimpl
def lorahub_formats() -> list[Format]:
    """Stability AI's."""
    return [ControlLoraFormat()]
