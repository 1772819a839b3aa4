"""microsoft/LoRA's state dicts: ``<module>.lora_A`` and ``<module>.lora_B``, parameters without ``.weight``.

https://github.com/microsoft/LoRA.  The files hold neither alpha nor what a module is.  Shapes tell fused layers
(``MergedLinear``: more rows of ``lora_A`` than columns of ``lora_B``), a base tells convolutions and embeddings, whose
own names tell them where there is none.  Which bands of a fused layer are adapted follows only where all of them are;
otherwise, like alpha, people have to state it.  Other keys are parameters saved whole, such as a head.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Claim
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.marks import Mark
from lorahub.formats.mlx.tables import EMBEDDINGS
from lorahub.formats.peft.config import base_claim
from lorahub.formats.peft.keys import MODEL, Stems
from lorahub.formats.plain import (
    about_config,
    alpha_unknown,
    is_plain,
    own_config,
    say,
    stated_flags,
    stated_number,
    whole_parameters,
)
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["LoralibFormat", "lorahub_formats"]

_A, _B, _PRUNED = "lora_A", "lora_B", "lora_E"
_FACTORS = (Leaf(slot="down", suffix=_A), Leaf(slot="up", suffix=_B))

_FORMS: Mapping[str, Row] = {
    "linear": Row(kind="lora", leaves=_FACTORS),
    "merged": Row(kind="merged-lora", leaves=_FACTORS),
    "conv": Row(kind="conv-view", leaves=_FACTORS),
    "embedding": Row(
        kind="lora",
        leaves=(
            Leaf(slot="up", suffix=_A, transposed=True, role="embedding"),
            Leaf(slot="down", suffix=_B, transposed=True, role="embedding"),
        ),
    ),
}
"""What a module is -> how its factors are stored."""

_STATED = ("base_model_name_or_path", "enable_lora", "lora_alpha", "r", "revision")


_OWN = Mark(lambda key: not key.startswith(MODEL), ends=(f".{_A}",))


@final
class LoralibFormat:
    """Reads microsoft/LoRA's state dicts."""

    name = "loralib"
    rows = tuple(_FORMS.values())
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By pairs of names that end in lora_A and lora_B, where no config says what they are."""
        if not is_plain(files):
            return None
        for header in filter(lambda each: _OWN.on([each]), files.headers.values()):
            own = [key for key in header.tensors if key.endswith(f".{_A}") and not key.startswith(MODEL)]
            if any(f"{key[: -len(_A)]}{_B}" in header.tensors for key in own):
                return Claim(0.6, f"tensor names end in .{_A} and .{_B}")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: what is stated is no alpha or no list of bands.
        """
        file = only_file(files)
        header = files.headers[file]
        stems = Stems(index)
        alpha, stated = stated_number(files, file, "lora_alpha"), stated_flags(files, file, "enable_lora")

        stated_rank = stated_number(files, file, "r")

        def weight(module: str) -> ParameterInfo | None:
            found = stems.find(module)
            return index.parameters.get(f"{found}.weight") if index and found else None

        def rows(module: str) -> list[Row]:
            return [_FORMS[_form(header, module, weight(module))]]

        def options(kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            if f"{module}.{_PRUNED}" in header.tensors:
                raise UnsupportedKind(f"{module} has a {_PRUNED}, as AdaLoRA's own code saves it, without a config")
            said: dict[str, JSON] = {}
            rank = slots["up" if kind == "merged-lora" else "down"].shape[1 if kind == "merged-lora" else 0]
            if kind == "merged-lora":
                said["enabled"] = [*_enabled(module, slots, weight(module), stated)]
            if kind == "conv-view" and (known := weight(module)):
                rank //= known.shape[2]
            if rank < 1:
                raise IntegrityError(f"{module}: {slots['down'].key} {list(slots['down'].shape)} has no rank")
            if stated_rank not in (None, rank):
                raise IntegrityError(f"{module}: r is stated as {stated_rank:g}, and its factors have rank {rank}")
            if alpha is None:
                return {**said, "scale": 1.0, "scale_rule": "1, alpha is unknown", "rank": rank}
            return {**said, "scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha, "rank": rank}

        ends = (f".{_A}", f".{_B}", f".{_PRUNED}")
        factors = {key: key for key in header.tensors if key.endswith(ends[:2])}
        grouped = group_suffixes(header, factors, rows, kinds, stems, options)
        others = [key for key in header.tensors if not key.endswith(ends)]
        whole, left = whole_parameters(header, others, stems, grouped.groups)
        left += [*grouped.unknown, *(key for key in header.tensors if key.endswith(ends[2]))]
        groups = (*grouped.groups, *whole)
        roles: dict[str, JSON] = {
            Target("", group.module, group.parameter).name: group.role for group in groups if group.role
        }
        repo, revision, notes = base_claim(own_config(files))
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(
                *grouped.findings,
                *unknown_keys(left, "are no factor and no parameter of a module"),
                *about_config(files, _STATED),
                *notes,
                *(
                    []
                    if alpha is not None
                    else [alpha_unknown(file, f"{file} holds no alpha, as microsoft/LoRA saves")]
                ),
            ),
            base_repo=repo,
            base_revision=revision,
            hints={"roles": roles} if roles else {},
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always; it would lose the scale.
        """
        raise CannotCarry("the format 'loralib' is read only: it has no place for a scale", "write another: peft")


def _form(header: Header, module: str, weight: ParameterInfo | None) -> str:
    """What a module is, by the base where it has it, else by shapes and its name."""
    down, up = header.tensors.get(f"{module}.{_A}"), header.tensors.get(f"{module}.{_B}")
    if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or not up.shape[1]:
        return "linear"
    if weight is not None and len(weight.shape) == 4:
        return "conv"
    named = weight.role if weight is not None and weight.role else ""
    if named == "embedding" or (not named and module.rpartition(".")[2] in EMBEDDINGS):
        return "embedding"
    out = _rows_of(weight)
    fewer = out is not None and up.shape[0] < out and out % up.shape[0] == 0
    several = down.shape[0] > up.shape[1] and down.shape[0] % up.shape[1] == 0
    return "merged" if fewer or several else "linear"


def _rows_of(weight: ParameterInfo | None) -> int | None:
    """The outputs of a matrix in the base."""
    return weight.shape[1 if weight.transposed else 0] if weight is not None and len(weight.shape) == 2 else None


def _enabled(
    module: str, slots: Mapping[str, TensorRef], weight: ParameterInfo | None, stated: Sequence[bool] | None
) -> list[bool]:
    """Which bands of a fused layer are adapted.

    Raises:
        UnsupportedKind: neither people nor the sizes tell.
    """
    groups = slots["down"].shape[0] // slots["up"].shape[1]
    if stated is not None:
        if sum(stated) != groups:
            raise UnsupportedKind(f"{module} has factors for {groups} bands, and enable_lora {sum(stated)}")
        return [*stated]
    out, rows = _rows_of(weight), slots["up"].shape[0]
    if out is not None and out == rows:
        return [True] * groups
    why = "which a base would tell" if out is None else f"which of {out * groups // rows or 1} is in no file"
    raise UnsupportedKind(
        f"{module} adapts {groups} bands of a fused layer (MergedLinear), {why}; {say('enable_lora')}"
    )


@hookimpl
def lorahub_formats() -> list[Format]:
    """Microsoft's."""
    return [LoralibFormat()]
