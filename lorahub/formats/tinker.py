"""Tinker's adapters: PEFT's folder with names of its own for experts and for the output layer.

``...experts.w1.lora_A.weight`` [E, r, in] and ``.lora_B.weight`` [E, out, r] are the factors of all experts' gate
projections, ``w3`` of the up and ``w2`` of the down projections; where one expert's stands for all, E is 1.
``unembed_tokens`` is the base's ``lm_head``, ``attn`` may be its ``self_attn``.  Everything else, and the scale, are
PEFT's.  Where the base has a module for each expert, each becomes a LoRA of its own; where it keeps all experts in one
parameter, gate and up are the parts of it that its architecture says, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import final

from lorahub.bases.fused_experts import FUSED, PROJECTIONS, part_pieces
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.deltas.peft_lora import FIELDS
from lorahub.deltas.stacks import SHARED
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.experts import in_base
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.peft.config import COMMON, CONFIG, base_claim
from lorahub.formats.peft.keys import PREFIX, Stems
from lorahub.formats.peft.lookalikes import TINKER, lookalike
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["TinkerFormat", "lorahub_formats"]

_FACTORS = (Leaf(slot="down", suffix="lora_A.weight"), Leaf(slot="up", suffix="lora_B.weight"))
_LINEAR = (Row(kind="lora", leaves=_FACTORS),)
_EXPERTS = (Row(kind="expert-lora", leaves=_FACTORS, options={"transposed": None}),)

_PROJECTIONS: Mapping[str, str] = MappingProxyType({"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"})
"""What Tinker calls the projections of an expert -> what bases do."""

_WITHIN = "experts"
_UNEMBED = "model.unembed_tokens"
_HEADS = ("lm_head", "model.lm_head")


@final
class _Names(Stems):
    """Tinker's names -> the modules of a base."""

    __slots__ = ()

    def find(self, spelled: str) -> str | None:
        """The base's name for a module of the file; without a base, that of the output layer."""
        for name in _candidates(spelled):
            if found := super().find(name):
                return found
        return None


def _candidates(spelled: str) -> tuple[str, ...]:
    """What a base may call a module, in the order in which it is asked."""
    names = _HEADS if spelled == _UNEMBED else (spelled, spelled.replace(".attn.", ".self_attn."))
    inner = tuple(f"model.language_model.{name.removeprefix('model.')}" for name in names if name.startswith("model."))
    return (*names, *inner)


@final
class TinkerFormat:
    """Reads Tinker's adapters."""

    name = "tinker"
    rows = (*_LINEAR, *_EXPERTS)

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By the names that only Tinker writes."""
        if lookalike(files.headers.values()) != TINKER:
            return None
        return Claim(1.0, "tensor names hold stacks of experts.w1, or unembed_tokens")

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: there is no config with a lora_alpha, or several files could hold the weights.
            IntegrityError: alpha or rank in the config are no numbers.
        """
        if len(files.headers) > 1:
            raise UnsupportedFormat(
                f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
                one_of(files, files.headers),
            )
        ((file, header),) = files.headers.items()
        config = files.configs.get(CONFIG, {})
        if "lora_alpha" not in config:
            raise UnsupportedFormat(
                f"{files.folder / file} holds Tinker's tensors, but no {CONFIG} with a lora_alpha lies beside it; "
                "without it the adapter's strength cannot be known",
                f"put the {CONFIG} that was saved with it into the same folder",
            )
        alpha, rank = _number(config, "lora_alpha"), _number(config, "r") if config.get("r") is not None else None

        def options(_kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            found = slots["down"].shape[-2]
            if not found or (rank is not None and rank != found):
                raise IntegrityError(f"{CONFIG} says r = {rank}, and the factors of {module} have {found}")
            return {"scale": alpha / found, "scale_rule": "alpha/r", "alpha": alpha, "rank": found}

        logical, shared, empty = _spread(header)
        paths = {key: key.removeprefix(PREFIX) for key in header.tensors if key.startswith(PREFIX) and key not in empty}
        grouped = group_suffixes(
            logical, paths, lambda module: _EXPERTS if _projection(module) else _LINEAR, kinds, _Names(index), options
        )
        placed = [_placed(group, shared, index) for group in grouped.groups]
        groups = tuple(
            each for group in placed for each in (in_base(group, index) if group.kind == _EXPERTS[0].kind else [group])
        )
        foreign = [key for key in header.tensors if not key.startswith(PREFIX)]
        repo, revision, notes = base_claim(config)
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(
                *grouped.findings,
                *unknown_keys([*grouped.unknown, *foreign], "are no factors of LoRA"),
                *_about_empty(empty),
                *_about_fused(groups, index),
                *_about_config(config),
                *notes,
            ),
            base_repo=repo,
            base_revision=revision,
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refuse.

        Raises:
            CannotCarry: always; Tinker takes no adapters from elsewhere.
        """
        raise CannotCarry("Tinker's layout is read, not written: Tinker takes no adapters from elsewhere", "--to peft")


def _projection(module: str) -> str:
    """The name of the base's projection that a stack of factors is for, or ""."""
    around, _, last = module.rpartition(".")
    return _PROJECTIONS.get(last, "") if around.rpartition(".")[2] == _WITHIN else ""


def _number(config: Mapping[str, JSON], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise IntegrityError(f"{CONFIG}: {name} is {value!r}, not a number", "fetch it again, or ask its author")
    return value


def _spread(header: Header) -> tuple[Header, frozenset[str], tuple[str, ...]]:
    """The header as it reads, each factor for as many experts as the other; which stand for all; pairs without any."""
    tensors, shared, empty = dict(header.tensors), set(), []
    for key, down in header.tensors.items():
        other = key.removesuffix("lora_A.weight") + "lora_B.weight"
        up = header.tensors.get(other)
        if not key.endswith(".lora_A.weight") or up is None or not len(down.shape) == len(up.shape) == 3:
            continue
        if not down.nbytes and not up.nbytes:
            empty += [key, other]
            continue
        experts = max(down.shape[0], up.shape[0])
        for name, info in ((key, down), (other, up)):
            if info.shape[0] == 1 < experts:
                tensors[name] = replace(info, shape=(experts, *info.shape[1:]))
                shared.add(name)
    return replace(header, tensors=MappingProxyType(tensors)), frozenset(shared), tuple(empty)


def _placed(group: Group, shared: frozenset[str], index: BaseIndex | None) -> Group:
    """The group under the names that bases use: experts as one module with a parameter for each projection."""
    slots = {slot: replace(ref, stacked=SHARED) if ref.key in shared else ref for slot, ref in group.slots.items()}
    spelled = group.slots["down"].key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
    if projection := _projection(spelled):
        module = spelled.rpartition(".")[0]
        names = (_Names(index).find(module) or module) if index else module
        return replace(group, module=names, parameter=projection, slots=slots)
    return replace(group, module=_HEADS[0] if group.module == _UNEMBED else group.module, slots=slots)


def _about_fused(groups: Sequence[Group], index: BaseIndex | None) -> list[Finding]:
    """Gate and up projections that the base keeps in one parameter."""
    parts = [group for group in groups if group.kind == _EXPERTS[0].kind and group.parameter in PROJECTIONS]
    fused = [group for group in parts if index and f"{group.module}.{FUSED}" in index.parameters]
    lost = [group for group in fused if index and not part_pieces(index, group.module, group.parameter)]
    if not lost:
        return []
    return [
        Finding(
            code="kind-unsupported",
            axis="format",
            level=Verdict.INCOMPATIBLE,
            message=f"the base keeps gate and up projections of its experts in one parameter, {FUSED}, and nobody "
            f"here knows which part of it {len(lost)} stacks of factors are for",
            where=tuple(sorted(ref.key for group in lost for ref in group.slots.values())),
            remedy="merge it with Tinker's own tools, or use a checkpoint that has a module for each expert",
        )
    ]


def _about_empty(keys: Sequence[str]) -> list[Finding]:
    if not keys:
        return []
    return [
        Finding(
            code="tensor-empty",
            axis="format",
            level=Verdict.EXACT,
            message=f"{len(keys)} tensors are empty: Tinker leaves them for projections that the model does not have",
            where=tuple(keys),
        )
    ]


def _about_config(config: Mapping[str, JSON]) -> list[Finding]:
    """Fields that are not PEFT's, and those of PEFT's that would mean other arithmetic than Tinker's."""
    telling = []
    for name, value in sorted(config.items()):
        about = FIELDS.get(name) or COMMON.get(name)
        blank = value in (None, False, "", [], {}) or (
            about is not None and any(value == each for each in about.harmless)
        )
        plain = about is not None and (about.inert or name in _READ)
        if not blank and not plain:
            telling.append(name)
    if not telling:
        return []
    return [
        Finding(
            code="config-unknown",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{CONFIG} has fields that Tinker does not write, or nobody here knows",
            where=tuple(telling),
            remedy="if you know that they do not change the arithmetic: --allow config-unknown",
            allowable=True,
        )
    ]


_READ = frozenset({"base_model_name_or_path", "bias", "lora_alpha", "peft_type", "r", "revision", "target_modules"})


@hookimpl
def lorahub_formats() -> list[Format]:
    """The format of Tinker."""
    return [TinkerFormat()]
