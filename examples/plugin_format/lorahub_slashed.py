"""A plugin for lorahub: one more format, LoRA under paths with slashes (``layers/0/q/A``) beside ``slashes.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lorahub
from lorahub.deltas.kind import JSON, Leaf, TensorRef
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.findings import Claim
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_fields, unknown_keys

CONFIG, FILE = "slashes.json", "slashes.safetensors"
LORA = Row(kind="lora", leaves=(Leaf(slot="down", suffix="A"), Leaf(slot="up", suffix="B")))


@final
class Slashed:
    name = "slashed"

    def claims(self, files: AdapterFiles) -> Claim | None:
        return Claim(1.0, f"there is a {CONFIG}") if CONFIG in files.configs and FILE in files.headers else None

    def read(self, files: AdapterFiles, kinds: Any, index: Any) -> Reading:
        header, config = files.headers[FILE], files.configs[CONFIG]
        scale = config.get("scale", 1.0)
        if not isinstance(scale, int | float):
            raise IntegrityError(f"{CONFIG}: the scale is {scale!r}, which is no number")

        def options(_kind: str, _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            return {"scale": float(scale), "scale_rule": "scale", "rank": slots["down"].shape[0]}

        paths = {key: key.replace("/", ".") for key in header.tensors if "." not in key}
        found = group_suffixes(header, paths, lambda _: (LORA,), kinds, Stems(index), options)
        keys = [*found.unknown, *(key for key in header.tensors if key not in paths)]
        fields = {name: value for name, value in config.items() if name != "scale"}
        findings = (*found.findings, *unknown_keys(keys, "are no factors"), *unknown_fields(fields))
        return Reading(format=self.name, file=FILE, groups=found.groups, findings=findings)

    def write(self, deltas: Any, kinds: Any, hints: Any) -> Written:
        (lora,) = (kind for kind in kinds if kind.name == "lora")
        tensors: dict[str, Any] = {}
        scales, lost = {}, []
        for target, delta in deltas.items():
            taken = None if target.component else lora.dissolve({target.parameter: delta})
            if taken is None or target.parameter != "weight" or taken[0].keys() != {"down", "up"}:
                lost.append(target.name)
                continue
            stem = target.module.replace(".", "/")
            tensors |= {f"{stem}/{leaf.suffix}": taken[0][leaf.slot] for leaf in LORA.leaves}
            scales[taken[1]["scale"]] = target.name
        if lost or len(scales) > 1:
            what = ", ".join(lost) or f"{len(scales)} different scales"
            raise CannotCarry(f"the format 'slashed' is for LoRA on weights, and has no word for {what}")
        return Written(file=FILE, tensors=tensors, metadata={}, configs={CONFIG: {"scale": next(iter(scales), 1.0)}})


@lorahub.hookimpl
def lorahub_formats() -> list[Format]:
    return [Slashed()]
