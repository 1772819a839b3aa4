"""MLX's folder: ``adapters.safetensors`` beside an ``adapter_config.json`` with ``lora_parameters``.

Factors are stored for ``x @ lora_a @ lora_b``, so a linear layer's are the transposes of everybody else's, and those of
an embedding are not.  ``lora_parameters.scale`` multiplies the product as it is: it is no alpha and knows no rank.
Which modules are embeddings, only their names or the base tell.  Convolutions and stacks of experts have shapes of
their own here, and are refused by name.  No number is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.mlx.tables import CONFIG, DEFAULT_SCALE, EMBEDDING, EMBEDDINGS, FILE, LINEAR
from lorahub.formats.mlx.write import write
from lorahub.formats.peft.config import base_claim
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
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


@final
class MlxFormat:
    """Reads and writes mlx-lm's adapters."""

    name = "mlx"
    rows = (*LINEAR, *EMBEDDING)
    writes = frozenset({"lora", "dora", "replace"})

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by its config; by the endings of names where there is none."""
        config = files.configs.get(CONFIG, {})
        if not files.headers or isinstance(config.get("peft_type"), str):
            return None
        if isinstance(config.get("lora_parameters"), dict) or isinstance(config.get("fine_tune_type"), str):
            return Claim(1.0, f"{CONFIG} has lora_parameters or a fine_tune_type")
        if any(key.endswith((".lora_a", ".lora_b")) for header in files.headers.values() for key in header.tensors):
            return Claim(0.4, "tensor names end in .lora_a and .lora_b")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: there is no config, or several files could hold the weights.
            IntegrityError: a field of the config has a type that mlx-lm never writes.
        """
        file = _weights_file(files)
        header = files.headers[file]
        config = files.configs.get(CONFIG)
        if config is None:
            raise UnsupportedFormat(
                f"{files.folder / file} holds MLX tensors, but no {CONFIG} lies beside it; without it the scale, "
                "and so the adapter's strength, cannot be known",
                f"put the {CONFIG} that was saved with it into the same folder",
            )
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
            findings=(*findings, *_about_config(config), *notes),
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
    if FILE in files.headers:
        return FILE
    if len(files.headers) == 1:
        return next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        "name the one that is meant: weight_name=...",
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
        found = slots["down"].shape[0]
        if rank is not None and rank != found:
            raise IntegrityError(f"{CONFIG} says rank = {rank:g}, and the factors of {module} have {found}")
        rule = "absolute" if scale is not None else f"absolute, mlx-lm's default {DEFAULT_SCALE:g}"
        return {"scale": DEFAULT_SCALE if scale is None else scale, "scale_rule": rule, "rank": found}

    stacked = {key for key, info in header.tensors.items() if key.endswith(_ENDS) and len(info.shape) > 2}
    keys = {key: key for key in header.tensors if key not in stacked}
    said = "dora" if config.get("use_dora") is True else config.get("fine_tune_type")

    def rows(module: str) -> list[Row]:
        table = EMBEDDING if _is_embedding(module, index, stems) else LINEAR
        return [row for row in table if said in (None, row.kind)]

    grouped = group_suffixes(header, keys, rows, kinds, stems, options)
    findings = [*grouped.findings, *unknown_keys(grouped.unknown, f"are no factors, and {CONFIG} explains none")]
    if stacked:
        findings.append(
            Finding(
                code="kind-unsupported",
                axis="format",
                level=Verdict.INCOMPATIBLE,
                message=f"{len(stacked)} factors are stacks of an expert each (LoRASwitchLinear), which no kind reads",
                where=tuple(sorted(stacked, key=natural)),
                remedy="fuse them with mlx-lm, where the model's experts are known",
            )
        )
    return grouped.groups, findings


_ENDS = (".lora_a", ".lora_b")


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


def _about_config(config: Mapping[str, JSON]) -> list[Finding]:
    """Fields nobody here knows; ``alpha`` multiplied the scale in early releases and was dropped without a trace."""
    inner = _parameters(config)
    unknown = [name for name in config if name not in _TRAINING | _USED]
    unknown += [f"lora_parameters.{name}" for name in inner if name not in _INNER_TRAINING | _INNER_USED]
    values = {**config, **{f"lora_parameters.{name}": value for name, value in inner.items()}}
    telling = tuple(sorted(name for name in unknown if values[name] not in (None, False, "", [], {})))
    if not telling:
        return []
    return [
        Finding(
            code="config-unknown",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{CONFIG} has fields of which nobody here knows whether they change the arithmetic",
            where=telling,
            remedy="if you know that they do not: --allow config-unknown",
            allowable=True,
        )
    ]


@hookimpl
def lorahub_formats() -> list[Format]:
    """MLX."""
    return [MlxFormat()]
