"""Factors as PEFT has them in memory, saved as they are: ``<module>.lora_A.default.weight`` and no config.

DiffSynth-Studio saves such files, and so does whoever saves a PEFT model's state dict by hand.  The adapter's name
stands inside each key, nothing stands before it, and alpha is in no file: it is taken for the rank, so the scale for
1, and a finding says so.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import PREFIX as COMFY
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import MODEL, Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["StateDictFormat", "lorahub_formats"]

_LINEAR = (
    Leaf(slot="down", suffix="lora_A.default.weight"),
    Leaf(slot="up", suffix="lora_B.default.weight"),
)
_EMBEDDING = (
    Leaf(slot="down", suffix="lora_embedding_B.default", transposed=True, role="embedding"),
    Leaf(slot="up", suffix="lora_embedding_A.default", transposed=True, role="embedding"),
)
_LENGTHS = Leaf(slot="magnitude", suffix="lora_magnitude_vector.default.weight")


@final
class StateDictFormat:
    """Reads raw state dicts of PEFT factors."""

    name = "state-dict"
    rows = (
        Row(kind="dora", leaves=(*_LINEAR, _LENGTHS)),
        Row(kind="lora", leaves=(*_LINEAR, Leaf(slot="bias", suffix="lora_B.default.bias"))),
        Row(kind="dora", leaves=(*_EMBEDDING, _LENGTHS)),
        Row(kind="lora", leaves=_EMBEDDING),
    )
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By the adapter's name inside the keys, where no prefix and no config says more."""
        if isinstance(files.configs.get(CONFIG, {}).get("peft_type"), str):
            return None
        ends = (_LINEAR[0].suffix, _EMBEDDING[0].suffix)
        keys = [key for header in files.headers.values() for key in header.tensors if key.endswith(ends)]
        if keys and not any(key.startswith((MODEL, COMFY)) for key in keys):
            return Claim(0.7, "tensor names have an adapter's name inside and no prefix")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
        """
        file = only_file(files)
        header = files.headers[file]
        paths = {key: key for key in header.tensors}
        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, Stems(index), _options)
        roles: dict[str, JSON] = {
            Target("", group.module, group.parameter).name: group.role for group in grouped.groups if group.role
        }
        return Reading(
            format=self.name,
            file=file,
            groups=grouped.groups,
            findings=(*grouped.findings, *unknown_keys(grouped.unknown, "are no slot of any kind"), _unscaled(file)),
            hints={"roles": roles} if roles else {},
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always; it would lose the scale.
        """
        raise CannotCarry("the format 'state-dict' is read only: it has no place for a scale", "write another: peft")


def _options(_kind: str, _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {"scale": 1.0, "scale_rule": "1, alpha is unknown", "rank": slots["down"].shape[0]}


def _unscaled(file: str) -> Finding:
    return Finding(
        code="alpha-unknown",
        axis="format",
        level=Verdict.UNVERIFIED,
        message=f"{file} holds no alpha and no config lies beside it: alpha is taken for the rank, so the scale for 1",
        where=(file,),
        remedy=f"if it was trained with another alpha, put PEFT's {CONFIG} beside it, or merge it with a weight",
    )


@hookimpl
def lorahub_formats() -> list[Format]:
    """Raw state dicts."""
    return [StateDictFormat()]
