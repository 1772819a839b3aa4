"""Black Forest Labs' Flux control adapters: factors and whole norms under the original model's names, without a prefix.

Every layer has ``lora_A.weight``, ``lora_B.weight`` and a bias ``lora_B.bias``; the scales of the query and key norms
are stored whole and replace the base's.  No alpha is stored: the scale is 1.  ``img_in`` is trained for a wider input
than the published base has, which the check against a base says.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry
from lorahub.findings import Claim
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["BflFormat", "lorahub_formats"]

_NORMS = (".query_norm.scale", ".key_norm.scale")
_INPUT = "img_in.lora_A.weight"


@final
class BflFormat:
    """Reads Flux control adapters as their makers publish them."""

    name = "bfl"
    rows = (
        Row(
            kind="lora",
            leaves=(
                Leaf(slot="down", suffix="lora_A.weight"),
                Leaf(slot="up", suffix="lora_B.weight"),
                Leaf(slot="bias", suffix="lora_B.bias"),
            ),
        ),
        Row(kind="replace", leaves=(Leaf(slot="value", suffix="scale"),), parameter="scale", scaled=False),
    )
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where factors of the image input stand beside norms."""
        names = [header.tensors for header in files.headers.values()]
        if any(_INPUT in each and any(key.endswith(_NORMS) for key in each) for each in names):
            return Claim(0.9, f"{_INPUT} stands beside whole norms")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
        """
        file = only_file(files)
        header = files.headers[file]
        paths = {key: key for key in header.tensors if not key.endswith(".scale") or key.endswith(_NORMS)}
        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, Stems(index), _options)
        left = [*grouped.unknown, *(key for key in header.tensors if key not in paths)]
        return Reading(
            format=self.name,
            file=file,
            groups=grouped.groups,
            findings=(*grouped.findings, *unknown_keys(left, "are neither factors nor norms of queries and keys")),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'bfl' is read only", "write another: peft")


def _options(_kind: str, _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {"scale": 1.0, "scale_rule": "1, no alpha", "rank": slots["down"].shape[0]}


@hookimpl
def lorahub_formats() -> list[Format]:
    """Black Forest Labs'."""
    return [BflFormat()]
