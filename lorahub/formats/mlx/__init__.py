"""MLX's adapters: ``adapters.safetensors`` beside an ``adapter_config.json``, or the ``adapters.npz`` that came before.

Factors are stored for ``x @ lora_a @ lora_b``, so a linear layer's are the transposes of everybody else's, and those of
an embedding are not.  ``lora_parameters.scale`` multiplies the product as it is: it is no alpha and knows no rank.
Which modules are embeddings, only their names or the base tell.  The first trainer kept no config and always multiplied
by 20; a later file without its config is read with that number too, and it is said.  Convolutions have shapes of their
own here, and are refused by name.  No number is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.deltas.stacks import ROWS, stacked_shape
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.experts import in_base
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.marks import Mark
from lorahub.formats.mlx.tables import CONFIG, DEFAULT_SCALE, EMBEDDING, EMBEDDINGS, EXPERTS, FILES, LINEAR, MIXTRAL
from lorahub.formats.mlx.write import write
from lorahub.formats.peft.config import base_claim
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_fields, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["MlxFormat", "lorahub_formats"]

_TRAINING = frozenset(
    (  # noqa: SIM905 - words, not data
        "adapter_path batch_size beta cache_dataset config data data_path dataset delta dpo_cpo_loss_type epochs "
        "epsilon grad_accumulation_steps grad_checkpoint hf_dataset iters judge learning_rate lora_layers loss_type "
        "lr_schedule mask_prompt max_seq_length model model_type num_layers optimizer optimizer_config project_name "
        "reference_model report_to resume_adapter_file revision save_every seed steps_per_eval steps_per_report "
        "temperature test test_batches train train_mode train_type val_batches wandb warmup_steps weight_decay"
    ).split()
)
"""Fields that steer training and change nothing in what was stored; ``num_layers`` and ``keys`` choose modules."""

_USED = frozenset({"fine_tune_type", "lora_parameters", "use_dora"})
_INNER_TRAINING = frozenset({"dropout", "keys"})
_INNER_USED = frozenset({"rank", "scale"})


_FACTORS = Mark(ends=(".lora_a", ".lora_b"))


@final
class MlxFormat:
    """Reads and writes mlx-lm's adapters."""

    name = "mlx"
    rows = (*LINEAR, *EMBEDDING, *EXPERTS)
    writes = frozenset({"lora", "dora", "expert-lora", "replace"})

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by its config beside names, or a file, that are its own; little by one of the two."""
        config = files.configs.get(CONFIG, {})
        if not files.headers or isinstance(config.get("peft_type"), str):
            return None
        factors = _FACTORS.on(files.headers.values())
        if isinstance(config.get("lora_parameters"), dict) or isinstance(config.get("fine_tune_type"), str):
            if factors or any(name in files.headers for name in FILES):
                return Claim(1.0, f"{CONFIG} has lora_parameters or a fine_tune_type")
            return Claim(0.3, f"{CONFIG} has lora_parameters or a fine_tune_type, though the names are not MLX's")
        return Claim(0.4, "tensor names end in .lora_a and .lora_b") if factors else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights, or it is tuned in a way that is not known.
            IntegrityError: a field of the config has a type that mlx-lm never writes.
        """
        file = _weights_file(files)
        header = files.headers[file]
        config = files.configs.get(CONFIG, {})
        tuned = config.get("fine_tune_type") or "lora"
        stems = Stems(index)
        if tuned == "full":
            groups, findings = _whole(header, stems)
        elif tuned in ("lora", "dora"):
            groups, findings = _factors(header, config, kinds, stems, index)
        else:
            raise UnsupportedFormat(
                f"{files.folder / CONFIG} says fine_tune_type = {tuned!r}, and lora, dora and full are known",
                "lorahub plugins   (formats that are installed)",
            )
        repo, revision, notes = base_claim({"base_model_name_or_path": config.get("model")})
        roles: dict[str, JSON] = {
            Target(group.component, group.module, group.parameter).name: group.role for group in groups if group.role
        }
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(*findings, *_about_config(config), *_about_scale(config, file, groups), *notes),
            base_repo=repo,
            base_revision=revision,
            hints={"roles": roles} if roles else {},
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell the deltas as mlx-lm would.

        Raises:
            CannotCarry: kinds that MLX lacks or mixed kinds, several scales or ranks, convolutions, components.
        """
        return write(deltas, {kind.name: kind for kind in kinds}, hints)


def _weights_file(files: AdapterFiles) -> str:
    if named := next((name for name in FILES if name in files.headers), ""):
        return named
    if len(files.headers) == 1:
        return next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        one_of(files, files.headers),
    )


def _is_embedding(module: str, index: BaseIndex | None, stems: Stems) -> bool:
    """By what the base says of the module, else by the end of its name."""
    found = stems.find(module)
    info = index.parameters.get(f"{found}.weight") if index and found else None
    return info.role == "embedding" if info and info.role else module.rpartition(".")[2] in EMBEDDINGS


def _factors(
    header: Header, config: Mapping[str, JSON], kinds: Sequence[Kind], stems: Stems, index: BaseIndex | None
) -> tuple[tuple[Group, ...], list[Finding]]:
    given = _parameters(config)
    scale, rank = _number(given, "scale"), _number(given, "rank")

    def options(_kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
        found = slots["down"].shape[-2]
        if rank is not None and rank != found:
            raise IntegrityError(f"{CONFIG} says rank = {rank:g}, and the factors of {module} have {found}")
        rule = "absolute" if scale is not None else f"absolute, mlx-lm's default {DEFAULT_SCALE:g}"
        return {"scale": DEFAULT_SCALE if scale is None else scale, "scale_rule": rule, "rank": found}

    logical, woven = _unwoven(header)
    said = "dora" if config.get("use_dora") is True else config.get("fine_tune_type")

    def rows(module: str) -> list[Row]:
        up = logical.tensors.get(f"{module}.lora_b")
        if up and len(up.shape) > 2 and said != "dora":
            return [*EXPERTS]
        table = EMBEDDING if _is_embedding(module, index, stems) else LINEAR
        return [row for row in table if said in (None, row.kind)]

    grouped = group_suffixes(logical, {key: key for key in header.tensors}, rows, kinds, stems, options)
    findings = [*grouped.findings, *unknown_keys(grouped.unknown, f"are no factors, and {CONFIG} explains none")]
    stored = (_as_stored(group, woven) for group in grouped.groups)
    return tuple(each for group in stored for each in _in_base(group, index)), findings


def _unwoven(header: Header) -> tuple[Header, frozenset[str]]:
    """The header as it reads, and which down factors of experts are stored as one matrix, [E * r, in], as at first."""
    shapes = {}
    for key, info in header.tensors.items():
        up = header.tensors.get(f"{key.removesuffix('.lora_a')}.lora_b")
        if key.endswith(".lora_a") and len(info.shape) == 2 and up and len(up.shape) == 3:
            shapes[key] = stacked_shape(info.shape, ROWS, up.shape[0])
    tensors = {
        key: replace(info, shape=shape) if (shape := shapes.get(key)) else info for key, info in header.tensors.items()
    }
    return replace(header, tensors=MappingProxyType(tensors)), frozenset(key for key, shape in shapes.items() if shape)


def _in_base(group: Group, index: BaseIndex | None) -> list[Group]:
    """A stack of experts as the base has them: one module for each, or one parameter for all; else as it is."""
    around, _, projection = group.module.rpartition(".")
    if group.kind != EXPERTS[0].kind or index is None or around.rpartition(".")[2] != "switch_mlp":
        return [group]
    module = around.removesuffix("switch_mlp") + "experts"
    for name in (projection, MIXTRAL.get(projection, "")):
        renamed = replace(group, module=module, parameter=name)
        found = in_base(renamed, index)
        if found != [renamed] or f"{module}.{name}" in index.parameters:
            return found
    return [group]


def _as_stored(group: Group, woven: frozenset[str]) -> Group:
    slots = {slot: replace(ref, stacked=ROWS) if ref.key in woven else ref for slot, ref in group.slots.items()}
    return replace(group, slots=slots)


def _whole(header: Header, stems: Stems) -> tuple[tuple[Group, ...], list[Finding]]:
    """Every tensor a parameter's new value; kernels are stored channels last, which no kind turns."""
    groups, kernels = [], []
    for key, info in header.tensors.items():
        module, _, parameter = key.rpartition(".")
        if len(info.shape) > 2:
            kernels.append(key)
            continue
        slots = {"value": TensorRef(key=key, shape=info.shape, dtype=info.dtype)}
        groups.append(Group(module=stems.find(module) or module, parameter=parameter, kind="replace", slots=slots))
    why = "are kernels or stacks, whose axes MLX stores in an order of its own"
    return tuple(groups), list(unknown_keys(kernels, why))


def _parameters(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    given = config.get("lora_parameters")
    if given is not None and not isinstance(given, dict):
        raise IntegrityError(f"{CONFIG}: lora_parameters is no object", "fetch it again, or ask its author")
    return given or {}


def _number(given: Mapping[str, JSON], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise IntegrityError(f"{CONFIG}: {name} is {value!r}, not a number", "fetch it again, or ask its author")
    return float(value)


def _about_scale(config: Mapping[str, JSON], file: str, groups: Sequence[Group]) -> list[Finding]:
    """What is to be said where no config tells the scale."""
    if config or not groups:
        return []
    first = file.lower().endswith(".npz")
    why = "as the trainer that wrote .npz files always did" if first else "mlx-lm's default"
    return [
        Finding(
            code="scale-assumed",
            axis="format",
            level=Verdict.UNVERIFIED if first else Verdict.DEGRADED,
            message=f"no {CONFIG} lies beside {file}, so the scale, and with it the adapter's strength, is taken to be "
            f"{DEFAULT_SCALE:g}, {why}",
            where=(file,),
            remedy=f"put the {CONFIG} that was saved with it into the same folder",
            allowable=not first,
        )
    ]


def _about_config(config: Mapping[str, JSON]) -> list[Finding]:
    """Fields nobody here knows; ``alpha`` multiplied the scale in early releases and was dropped without a trace."""
    inner = _parameters(config)
    unknown = [name for name in config if name not in _TRAINING | _USED]
    unknown += [f"lora_parameters.{name}" for name in inner if name not in _INNER_TRAINING | _INNER_USED]
    values = {**config, **{f"lora_parameters.{name}": value for name, value in inner.items()}}
    return unknown_fields({name: values[name] for name in unknown})


@hookimpl
def lorahub_formats() -> list[Format]:
    """MLX."""
    return [MlxFormat()]
