"""One file under the names of the original models, as ComfyUI loads it: ``diffusion_model.`` + module + ending.

ai-toolkit, musubi-tuner and the makers of Wan, LTX and others save such files: factors in either of two spellings, an
``alpha`` a module or none (then it is the rank), DoRA's ``dora_scale``, LoHa and LoKr as LyCORIS has them, and whole
differences as ``diff`` and ``diff_b``.  Names of modules are the original model's, which a base may or may not use.
Read only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry, UnsupportedFormat
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.flat_spellings import REFUSED, SPELLINGS, WHOLE
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.numbers import read_numbers
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["ComfyFormat", "lorahub_formats", "only_file"]

PREFIX = "diffusion_model."
_ALPHA = ".alpha"

_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)


def _rows() -> tuple[Row, ...]:
    rows = []
    for down, up in _PAIRS:
        factors = (Leaf(slot="down", suffix=down), Leaf(slot="up", suffix=up))
        rows.append(Row(kind="dora", leaves=(*factors, Leaf(slot="magnitude", suffix="dora_scale"))))
        rows.append(Row(kind="lora", leaves=(*factors, Leaf(slot="bias", suffix=up.replace(".weight", ".bias")))))
    return (
        *rows,
        *(Row(kind=kind, leaves=SPELLINGS[kind].leaves) for kind in ("loha", "lokr")),
        *(
            Row(kind="full", leaves=(Leaf(slot="diff", suffix=suffix),), scaled=False, parameter=parameter)
            for suffix, parameter in WHOLE.items()
        ),
        Row(kind="replace", leaves=(Leaf(slot="value", suffix="set_weight"),), scaled=False),
    )


_ELSEWHERE = (".reshape_weight", *(f".{suffix}" for suffix in REFUSED if suffix != "weight"))
"""Endings of changes that ComfyUI knows and that are not read under these names."""


@final
class ComfyFormat:
    """Reads files under the original models' names."""

    name = "comfy"
    rows = _rows()
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where a name begins with the prefix and ends as a slot does."""
        ends = tuple(f".{leaf.suffix}" for row in self.rows for leaf in row.leaves)
        keys = (key for header in files.headers.values() for key in header.tensors)
        if any(key.startswith(PREFIX) and key.endswith(ends) for key in keys):
            return Claim(0.9, f"tensor names begin with {PREFIX}")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number.
        """
        file = only_file(files)
        header = files.headers[file]
        paths = {key: key.removeprefix(PREFIX) for key in header.tensors if key.startswith(PREFIX)}
        foreign = [key for key in header.tensors if key not in paths]
        elsewhere = [key for key in paths if key.endswith(_ELSEWHERE)]
        alphas = {path.removesuffix(_ALPHA): key for key, path in paths.items() if path.endswith(_ALPHA)}
        spoiled = {path.removesuffix(end) for path in map(paths.__getitem__, elsewhere) for end in _ELSEWHERE}
        lost = [key for path, key in alphas.items() if path in spoiled]
        alphas = {path: key for path, key in alphas.items() if path not in spoiled}
        values = read_numbers(files, file, alphas.values())
        void = [key for key, value in values.items() if not value or not math.isfinite(value)]
        known = {path: values[key] for path, key in alphas.items() if key not in void}
        used = {*elsewhere, *lost, *alphas.values()}

        def options(kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            numbers: dict[str, JSON] = {"alpha": known[module]} if module in known else {}
            return SPELLINGS[kind].options(numbers, module, slots)

        grouped = group_suffixes(
            header,
            {key: path for key, path in paths.items() if key not in used},
            lambda _: self.rows,
            kinds,
            Stems(index),
            options,
            alphas,
        )
        why = f"are no slot of any kind, or are not below {PREFIX}"
        return Reading(
            format=self.name,
            file=file,
            groups=tuple(_landed(group, index) for group in grouped.groups),
            findings=(
                *grouped.findings,
                *unknown_keys([*grouped.unknown, *foreign], why),
                *_unread([*elsewhere, *lost]),
                *_void(void),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'comfy' is read only", "write another: peft")


def only_file(files: AdapterFiles) -> str:
    """The weights file of a format that calls it anything.

    Raises:
        UnsupportedFormat: there are several.
    """
    if len(files.headers) == 1:
        return next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        "name the one that is meant: weight_name=...",
    )


def _landed(group: Group, index: BaseIndex | None) -> Group:
    """A difference lands on ``module.weight``, or, where the base has that parameter, on ``module`` itself."""
    if index is None or group.kind != "full" or group.parameter != "weight":
        return group
    if f"{group.module}.weight" in index.parameters or group.module not in index.parameters:
        return group
    module, _, parameter = group.module.rpartition(".")
    return replace(group, module=module, parameter=parameter)


def _unread(keys: Sequence[str]) -> list[Finding]:
    if not keys:
        return []
    return [
        Finding(
            code="kind-unsupported",
            axis="format",
            level=Verdict.INCOMPATIBLE,
            message=f"{len(keys)} tensors are of a weight change that is not read under names of ComfyUI",
            where=tuple(sorted(keys, key=natural)),
            remedy="save it as plain LoRA, or in the layout of LyCORIS",
        )
    ]


def _void(keys: Sequence[str]) -> list[Finding]:
    if not keys:
        return []
    return [
        Finding(
            code="alpha-void",
            axis="format",
            level=Verdict.UNVERIFIED,
            message="an alpha of 0 or NaN is taken for a missing one, as trainers do",
            where=tuple(sorted(keys, key=natural)),
        )
    ]


@hookimpl
def lorahub_formats() -> list[Format]:
    """ComfyUI's."""
    return [ComfyFormat()]
