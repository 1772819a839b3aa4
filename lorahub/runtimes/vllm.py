"""vLLM: which adapters ``vllm serve --enable-lora`` refuses, and which it takes but does not apply.

Read from its ``lora/peft_helper.py``, ``lora/lora_model.py`` and ``lora/utils.py``.  It checks the config fields it
knows, drops the others unread, and matches tensors to modules by the last part of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from lorahub.deltas.kind import JSON, Group
from lorahub.findings import Verdict
from lorahub.hookspecs import hookimpl
from lorahub.runtimes.runtime import Case, Look, Rule, Runtime, Subject, config_of

__all__ = ["VLLM", "lorahub_runtimes"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
HEADS = frozenset({"classifier", "score"})

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` from 8 up."""

DEFAULT_RANK = 16

MERGE = "lorahub merge {adapter} --base BASE -o merged && vllm serve merged"

CHANGED_BASE = MappingProxyType({"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ"})
"""Initialisations that also changed the base; a number of iterations may follow the name."""


def _set(field: str, *harmless: JSON) -> Look:
    """A look at a config field: it applies unless the field is missing, null, false, empty or harmless."""

    def look(subject: Subject) -> Case | None:
        value = config_of(subject, CONFIG).get(field)
        return Case(value=str(value), where=(field,)) if value and value not in harmless else None

    return look


def _not_peft(subject: Subject) -> Case | None:
    if subject.reading.file == WEIGHTS and CONFIG in subject.files.configs:
        return None
    return Case(value=subject.reading.format, where=(subject.reading.file,))


def _changed_base(subject: Subject) -> Case | None:
    value = config_of(subject, CONFIG).get("init_lora_weights")
    title = next((title for name, title in CHANGED_BASE.items() if str(value).lower().startswith(name)), None)
    return Case(value=title, where=("init_lora_weights",)) if title else None


_OF_THEIR_OWN = frozenset({"alora", "lora", "dora", "bdlora", "pissa", "replace"})


def _other_kinds(subject: Subject) -> Case | None:
    """Kinds beside LoRA; those of ``_OF_THEIR_OWN`` have rules of their own, as trained biases have."""
    others = [group for group in subject.reading.groups if group.kind not in _OF_THEIR_OWN]
    parts = {part.kind for part in subject.reading.parts.values()} - _OF_THEIR_OWN
    kinds = sorted({group.kind for group in others} | parts)
    return Case(value=", ".join(kinds), where=tuple(group.module for group in others)) if kinds else None


def _replaced(subject: Subject) -> Case | None:
    """Modules trained as a whole; a classifier's head is the one that is taken, a bias belongs to another rule."""
    modules = {
        group.module
        for group in subject.reading.groups
        if group.kind == "replace"
        and group.module.rpartition(".")[2] not in HEADS
        and not (group.parameter == "bias" and config_of(subject, CONFIG).get("bias") not in {None, "none"})
    }
    return Case(value=", ".join(sorted(modules)[:3]), where=tuple(sorted(modules))) if modules else None


def _dora(subject: Subject) -> Case | None:
    modules = tuple(group.module for group in subject.reading.groups if group.kind == "dora")
    return Case(where=modules) if modules or config_of(subject, CONFIG).get("use_dora") else None


def _factors(subject: Subject) -> Iterator[tuple[Group, int]]:
    """Every group of PEFT's factors with its rank, as the tensors have it."""
    for group in subject.reading.groups:
        if group.kind in {"lora", "dora", "pissa"} and subject.reading.format == "peft":
            yield group, group.slots["down"].shape[0]


def _rank_over(low: int, high: float) -> Look:
    """A look for ranks in (low, high]; the value is the smallest setting that takes them all."""

    def look(subject: Subject) -> Case | None:
        ranks = {group.module: rank for group, rank in _factors(subject)}
        configured = config_of(subject, CONFIG).get("r")
        largest = max([*ranks.values(), configured if isinstance(configured, int) else 0])
        if not low < largest <= high:
            return None
        setting = next((rank for rank in RANKS if rank >= largest), largest)
        return Case(value=str(setting), where=tuple(module for module, rank in ranks.items() if rank > low))

    return look


def _convolutions(subject: Subject) -> Case | None:
    modules = tuple(group.module for group, _ in _factors(subject) if len(group.slots["down"].shape) > 2)
    return Case(where=modules) if modules else None


def _suffixes(subject: Subject) -> Case | None:
    """Factors under a name that vLLM does not know; other tensors have rules of their own."""
    keys = tuple(
        ref.key
        for group, _ in _factors(subject)
        for slot, ref in group.slots.items()
        if slot in {"down", "up"} and not ref.key.endswith(SUFFIXES)
    )
    return Case(where=keys) if keys else None


def _prefix(subject: Subject) -> Case | None:
    """Tensors whose key does not spell the module as the base does, or repeats PEFT's prefix."""
    keys = tuple(
        group.slots["down"].key
        for group, _ in _factors(subject)
        if not group.slots["down"].key.removeprefix(PREFIX).startswith(f"{group.module}.")
        or group.slots["down"].key.count(PREFIX) > 1
    )
    return Case(where=keys) if keys else None


RULES = (
    Rule(
        code="vllm-format",
        level=Verdict.INCOMPATIBLE,
        message=f"vLLM reads {WEIGHTS} with {CONFIG}, and this is {{value}}",
        remedy=MERGE,
        look=_not_peft,
    ),
    Rule(
        code="vllm-kind",
        level=Verdict.INCOMPATIBLE,
        message="vLLM applies LoRA only, and the adapter also has {value}",
        remedy=MERGE,
        look=_other_kinds,
    ),
    Rule(
        code="vllm-dora",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses DoRA",
        remedy=MERGE,
        look=_dora,
    ),
    Rule(
        code="vllm-changed-base",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses {value}: its initialisation changed the base, and the served base is the original one",
        remedy="in PEFT: model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
        look=_changed_base,
    ),
    Rule(
        code="vllm-modules-to-save",
        level=Verdict.INCOMPATIBLE,
        message=f"vLLM takes no replaced modules but {' and '.join(sorted(HEADS))}, and the adapter replaces {{value}}",
        remedy=MERGE,
        look=_replaced,
    ),
    Rule(
        code="vllm-bias",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses trained biases, and the config says bias = {value}",
        remedy=MERGE,
        look=_set("bias", "none"),
    ),
    Rule(
        code="vllm-lora-bias",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses biases on the factors (lora_bias)",
        remedy=MERGE,
        look=_set("lora_bias"),
    ),
    Rule(
        code="vllm-activated",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses activated LoRA (alora_invocation_tokens), which acts on a part of the prompt only",
        remedy="serve it with PEFT, which honours the invocation tokens",
        look=_set("alora_invocation_tokens"),
    ),
    Rule(
        code="vllm-layer-replication",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses layer_replication, which makes the model deeper than its base",
        remedy="serve it with PEFT, which repeats the layers",
        look=_set("layer_replication"),
    ),
    Rule(
        code="vllm-block-diagonal",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses block-diagonal LoRA (use_bdlora)",
        remedy=MERGE,
        look=_set("use_bdlora"),
    ),
    Rule(
        code="vllm-qalora",
        level=Verdict.INCOMPATIBLE,
        message="vLLM refuses QALoRA (use_qalora)",
        remedy=MERGE,
        look=_set("use_qalora"),
    ),
    Rule(
        code="vllm-convolution",
        level=Verdict.INCOMPATIBLE,
        message="vLLM has no LoRA on convolutions",
        remedy=MERGE,
        look=_convolutions,
    ),
    Rule(
        code="vllm-suffix",
        level=Verdict.INCOMPATIBLE,
        message=f"vLLM knows tensors that end in {', '.join(SUFFIXES)}, and refuses the adapter for the others",
        remedy=MERGE,
        look=_suffixes,
    ),
    Rule(
        code="vllm-prefix",
        level=Verdict.INCOMPATIBLE,
        message="vLLM would load the adapter and apply nothing where tensors do not spell a module as the base does",
        remedy=MERGE,
        look=_prefix,
    ),
    Rule(
        code="vllm-rank",
        level=Verdict.DEGRADED,
        message=f"vLLM refuses ranks over {DEFAULT_RANK} unless it is started with --max-lora-rank {{value}}",
        remedy="vllm serve BASE --enable-lora --max-lora-rank {value} --lora-modules NAME={adapter}",
        look=_rank_over(DEFAULT_RANK, RANKS[-1]),
    ),
    Rule(
        code="vllm-rank-limit",
        level=Verdict.INCOMPATIBLE,
        message=f"vLLM has no setting for ranks over {RANKS[-1]}, and the adapter has rank {{value}}",
        remedy=MERGE,
        look=_rank_over(RANKS[-1], float("inf")),
    ),
)

VLLM = Runtime(name="vllm", title="vLLM", versions="0.33", rules=RULES)


@hookimpl
def lorahub_runtimes() -> list[Runtime]:
    """The table of vLLM."""
    return [VLLM]
