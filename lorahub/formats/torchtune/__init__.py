"""torchtune's adapters: Meta's module names, ``lora_a``/``lora_b`` as linear layers, alpha in ``adapter_config.json``.

``layers.0.attn.q_proj.lora_a.weight`` [r, in], ``.lora_b.weight`` [out, r], and DoRA's ``.magnitude`` [out].  The rows
of queries and keys are in Meta's order, so with a base the up factors *and the magnitudes* are put into the base's
order (torchtune's own export forgets the latter).  Without a base, names and rows stay as in the file.  No number is
computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.peft.config import CONFIG, base_claim
from lorahub.formats.peft.lookalikes import TORCHTUNE, lookalike
from lorahub.formats.rope import to_halves
from lorahub.formats.suffixes import group_suffixes, unknown_fields, unknown_keys
from lorahub.formats.torchtune.names import FILE, INSIDE, OUTSIDE, ROWS, TorchtuneStems, rotation, torchtune_name
from lorahub.formats.torchtune.write import write
from lorahub.hookspecs import hookimpl

__all__ = ["TorchtuneFormat", "lorahub_formats", "torchtune_name"]

_USED = frozenset({"base_model_name_or_path", "lora_alpha", "peft_type", "r", "revision", "target_modules"})
_INERT = frozenset({"bias", "inference_mode", "lora_dropout", "task_type"})


@final
class TorchtuneFormat:
    """Reads and writes torchtune's adapters."""

    name = "torchtune"
    rows = ROWS
    writes = frozenset({"lora", "dora"})

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By the ends of names, which no other trainer has; sure where a config with a rank lies beside them."""
        if lookalike(files.headers.values()) != TORCHTUNE:
            return None
        config = files.configs.get(CONFIG, {})
        return Claim(1.0 if "r" in config else 0.6, "tensor names end in .lora_a.weight and .lora_b.weight")

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: there is no config, or several files could hold the weights.
            IntegrityError: alpha or rank in the config are no numbers.
        """
        file = FILE if FILE in files.headers else next(iter(files.headers))
        if file != FILE and len(files.headers) > 1:
            raise UnsupportedFormat(
                f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
                one_of(files, files.headers),
            )
        header, config = files.headers[file], files.configs.get(CONFIG)
        if config is None or "lora_alpha" not in config:
            raise UnsupportedFormat(
                f"{files.folder / file} holds torchtune tensors, but no {CONFIG} with a lora_alpha lies beside it; "
                "without it the adapter's strength cannot be known",
                f"put the {CONFIG} that was saved with it into the same folder",
            )
        alpha, rank = _number(config, "lora_alpha"), _number(config, "r") if "r" in config else None

        def options(_kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            found = slots["down"].shape[0]
            if not found or (rank is not None and rank != found):
                raise IntegrityError(f"{CONFIG} says r = {rank}, and the factors of {module} have {found}")
            return {"scale": alpha / found, "scale_rule": "alpha/r", "alpha": alpha, "rank": found}

        grouped = group_suffixes(
            header, {key: key for key in header.tensors}, lambda _module: ROWS, kinds, TorchtuneStems(index), options
        )
        groups, moved = _in_base_order(grouped.groups, index)
        repo, revision, notes = base_claim(config)
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(
                *grouped.findings,
                *unknown_keys(grouped.unknown, "are no factors of LoRA or DoRA"),
                *moved,
                *_about_config(config),
                *notes,
            ),
            base_repo=repo,
            base_revision=revision,
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell the deltas as torchtune would; see ``lorahub.formats.torchtune.write``."""
        return write(deltas, {kind.name: kind for kind in kinds}, hints)


def _number(config: Mapping[str, JSON], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise IntegrityError(f"{CONFIG}: {name} is {value!r}, not a number", "fetch it again, or ask its author")
    return value


def _in_base_order(groups: Sequence[Group], index: BaseIndex | None) -> tuple[tuple[Group, ...], list[Finding]]:
    """Groups whose up factors and magnitudes have their rows as the base has them, where a base is known."""
    if index is None:
        return tuple(groups), _about_names(groups)
    result, lost = [], []
    for group in groups:
        name = group.slots["up"].key.removesuffix(".lora_b.weight")
        paired, heads, which = rotation(name, index.config)
        if paired is False:
            result.append(group)
            continue
        rows = to_halves(group.slots["up"].shape[0], heads[which]) if paired and heads else None
        if rows is None:
            lost.append(group.slots["up"].key)
            rows = ()
        slots = {slot: replace(ref, rows=rows) if slot != "down" else ref for slot, ref in group.slots.items()}
        result.append(replace(group, slots=slots))
    if not lost:
        return tuple(result), []
    finding = Finding(
        code="row-order-unknown",
        axis="format",
        level=Verdict.INCOMPATIBLE,
        message="torchtune keeps the rows of queries and keys in Meta's order for some models, and the base's config "
        f"(model_type {index.config.get('model_type')!r}) does not say which heads they belong to",
        where=tuple(lost),
        remedy="export it from torchtune in PEFT's layout",
    )
    return tuple(result), [finding]


def _about_names(groups: Sequence[Group]) -> list[Finding]:
    """Names and rows that stayed as in the file, for want of a base."""
    ends = tuple(f".{name}" for name in INSIDE.values())
    if not any(group.module.endswith(ends) or group.module in OUTSIDE.values() for group in groups):
        return []
    return [
        Finding(
            code="names-of-torchtune",
            axis="format",
            level=Verdict.EXACT,
            message="modules have torchtune's names, and rows its order; with a base both become the base's",
            remedy="give the base: --base BASE",
        )
    ]


def _about_config(config: Mapping[str, JSON]) -> list[Finding]:
    return unknown_fields({name: value for name, value in config.items() if name not in _USED | _INERT})


@hookimpl
def lorahub_formats() -> list[Format]:
    """The format of torchtune."""
    return [TorchtuneFormat()]
