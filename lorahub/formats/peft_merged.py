"""PEFT before 0.3 on fused layers: a PEFT folder whose config has ``enable_lora`` (its ``MergedLinear``).

``lora_A.weight`` is ``[r * n, in]`` for n adapted parts, ``lora_B.weight`` the kernel ``[n * out / parts, .., 1]`` of a
convolution with groups.  Later PEFT neither writes nor reads that; everything else is as in any PEFT folder.  Read
only: as plain LoRA, which it equals, every PEFT reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas import peft_lora
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Spelling, TensorRef
from lorahub.deltas.peft_config import USED, chosen
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.findings import Claim
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.bare import group_bare
from lorahub.formats.peft.config import CONFIG, base_claim, field_findings
from lorahub.formats.peft.keys import Stems, take_apart
from lorahub.formats.peft.lookalikes import named_by_peft
from lorahub.formats.peft.write import FILE
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["PeftMergedFormat", "lorahub_formats"]

_LEAVES = (Leaf(slot="down", suffix="lora_A.weight"), Leaf(slot="up", suffix="lora_B.weight"))
_FIELDS: Mapping[str, Field] = MappingProxyType({**peft_lora.FIELDS, "enable_lora": USED})


@final
class PeftMergedFormat:
    """Reads PEFT's early adapters of fused layers."""

    name = "peft-merged"
    rows = (Row(kind="merged-lora", leaves=_LEAVES),)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by two fields of the config, beside tensors that PEFT named."""
        config = files.configs.get(CONFIG, {})
        early = config.get("peft_type") == "LORA" and config.get("enable_lora")
        if early and named_by_peft(files.headers, config, FILE):
            return Claim(1.0, f"{CONFIG} has enable_lora, which PEFT wrote before 0.3")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: a field of the config has a type that PEFT never writes.
        """
        file = only_file(files)
        header, config = files.headers[file], files.configs[CONFIG]
        enabled = _enabled(config)
        stems = Stems(index)
        found = take_apart(header.tensors, [leaf.suffix for leaf in _LEAVES], (), stems)
        keys = [key for module in found.factors.values() for key in module.values()]

        def options(_kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            return _options(config, enabled, module, slots)

        paths = {key: f"{module}.{end}" for module, each in found.factors.items() for end, key in each.items()}
        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, stems, options)
        whole = group_bare(found, header, config, stems, index)
        spelling = Spelling(
            format=self.name, tag="LORA", leaves=_LEAVES, fields=_FIELDS, options=lambda *_: {}, config=_refused
        )
        repo, revision, notes = base_claim(config)
        left = [*grouped.unknown, *whole.unknown, *found.foreign, *found.again]
        why = f"are no slot of any kind and are not explained by {CONFIG}"
        return Reading(
            format=self.name,
            file=file,
            groups=(*grouped.groups, *whole.groups),
            findings=(
                *grouped.findings,
                *whole.findings,
                *field_findings(config, [spelling], [spelling] if keys else []),
                *unknown_keys(left, why),
                *notes,
            ),
            base_repo=repo,
            base_revision=revision,
            hints={name: config[name] for name in ("modules_to_save", "task_type") if config.get(name)},
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry(
            "the format 'peft-merged' is read only: no PEFT since 0.3 reads it", "write plain LoRA: lorahub convert"
        )


def _enabled(config: Mapping[str, JSON]) -> list[bool]:
    listed = config["enable_lora"]
    flags = listed if isinstance(listed, list) else []
    if not any(flags) or not all(isinstance(each, bool) for each in flags):
        raise IntegrityError(f"{CONFIG}: enable_lora is {listed!r}, not a list of true and false")
    return [each is True for each in flags]


def _options(
    config: Mapping[str, JSON], enabled: Sequence[bool], module: str, slots: Mapping[str, TensorRef]
) -> dict[str, JSON]:
    """Scale, rank and parts; PEFT had no patterns of ranks or alphas then.

    Raises:
        IntegrityError: the config states another rank than the tensors have.
    """
    down = slots["down"]
    rank, _ = chosen(config, "", "r", module)
    if rank is None and down.shape[0] % sum(enabled) == 0:
        rank = down.shape[0] // sum(enabled)
    if rank is None or rank < 1 or rank * sum(enabled) != down.shape[0]:
        raise IntegrityError(
            f"{module}: r is {rank} and enable_lora adapts {sum(enabled)} parts, and {down.key} is {list(down.shape)}"
        )
    alpha, _ = chosen(config, "", "lora_alpha", module)
    alpha = 1 if alpha is None else alpha
    parts: list[JSON] = [*enabled]
    return {"scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha, "rank": int(rank), "enabled": parts}


def _refused(_groups: Mapping[str, Group]) -> dict[str, JSON]:
    raise CannotCarry("the format 'peft-merged' is read only")


@hookimpl
def lorahub_formats() -> list[Format]:
    """PEFT's early layout of fused layers."""
    return [PeftMergedFormat()]
