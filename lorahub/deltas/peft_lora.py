"""What PEFT's ``LORA`` config says, for the kinds that share that tag: LoRA and DoRA.

Every field PEFT has written is listed with what it means for stored tensors; one that is not listed may change
the arithmetic for all we know.  Ranks come from the tensors, so the config only decides the scale; where it states a
rank it must agree.  Knows configs and headers, no tensors; fields common to all of PEFT belong to the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from lorahub.deltas.disputes import Dispute
from lorahub.deltas.kind import JSON, Field, Group, Leaf, TensorRef
from lorahub.deltas.peft_config import alpha_for, chosen, flag, patterned, stated_alpha
from lorahub.errors import CannotCarry, IntegrityError

__all__ = [
    "FIELDS",
    "LEAVES",
    "config",
    "disputed",
    "dora_options",
    "expert_options",
    "from_the_weight",
    "in_blocks",
    "lora_options",
    "plain",
    "start",
    "whole",
]

_RULES: Mapping[bool, tuple[str, Callable[[int], float]]] = MappingProxyType(
    {False: ("alpha/r", float), True: ("alpha/sqrt(r)", math.sqrt)}
)
"""``use_rslora`` -> how the scale follows from alpha: name and divisor."""

_MOVED = (
    "training started from changed base weights, and the files do not say how: pissa_niter_N draws at random, corda "
    "and lora_ga look at data, loftq quantises the base, and DoRA has lengths of its own; make it plain LoRA where it "
    "was trained, in PEFT by save_pretrained with path_initial_model_for_weight_conversion"
)

_OF_THE_SAME_SHAPE = ("init_lora_weights", "kasa_config")
"""Refused fields under which factors have the shapes that they always have."""

_FROM_THE_WEIGHT = ("pissa", "olora")
"""Starts that follow from the weight alone; see ``pissa``."""

LEAVES = (
    Leaf(slot="down", suffix="lora_A.weight"),
    Leaf(slot="up", suffix="lora_B.weight"),
    Leaf(slot="up", suffix="lora_embedding_A", transposed=True, role="embedding"),
    Leaf(slot="down", suffix="lora_embedding_B", transposed=True, role="embedding"),
)
"""PEFT multiplies an embedding's output, so there its A is [r, V] and its B [d, r]."""

FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        # what decides the scale, and which tensors belong together
        "r": Field(used=True),
        "lora_alpha": Field(used=True),
        "rank_pattern": Field(used=True),
        "alpha_pattern": Field(used=True),
        "use_rslora": Field(used=True),
        "use_dora": Field(used=True),
        "lora_bias": Field(used=True),
        # how the tensors came about: nothing is left of it in them
        "lora_dropout": Field(inert=True),
        "inference_mode": Field(inert=True),
        "peft_version": Field(inert=True),
        "task_type": Field(inert=True),
        "runtime_config": Field(inert=True),
        "megatron_config": Field(inert=True),
        "megatron_core": Field(inert=True),
        "merge_weights": Field(inert=True),  # PEFT < 0.3: merge when switched to eval
        # which modules were adapted: the keys say it
        "target_modules": Field(inert=True),
        "exclude_modules": Field(inert=True),
        "layers_to_transform": Field(inert=True),
        "layers_pattern": Field(inert=True),
        "ensure_weight_tying": Field(used=True),
        # how the base stores its weights: the base says it, and PEFT itself overrides the flag by layer type
        "fan_in_fan_out": Field(inert=True),
        # settings of an initialisation or variant, without effect unless that one is chosen
        "loftq_config": Field(inert=True),
        "eva_config": Field(inert=True),
        "corda_config": Field(inert=True),
        "lora_ga_config": Field(inert=True),
        "qalora_group_size": Field(inert=True),
        # initialisations that leave the base alone; the others do not, and of them ``pissa`` reads two
        "init_lora_weights": Field(harmless=(True, "gaussian", "eva", "orthogonal", "mica"), refuse=_MOVED),
        # other arithmetic
        "layer_replication": Field(used=True),
        "alora_invocation_tokens": Field(
            refuse="it acts only on tokens after an invocation string, which no change of weights can do"
        ),
        "arrow_config": Field(
            refuse="it routes each token between several adapters, which no change of weights can do"
        ),
        "use_qalora": Field(refuse="its down factors act on inputs averaged in groups"),
        "use_bdlora": Field(refuse="its factors are stored as the blocks of block-diagonal matrices"),
        "kasa_config": Field(
            refuse="it removes the smallest singular values from the base and scales between the factors"
        ),
        "velora_config": Field(refuse="its files hold projections beside the factors, which are not read"),
        "monteclora_config": Field(
            refuse="its files hold the state of a sampler beside the factors, which is not read"
        ),
        "trainable_token_indices": Field(used=True),
        "target_parameters": Field(used=True),
        "enable_lora": Field(refuse="it adapts parts of a fused layer in the grouped layout of PEFT before 0.3"),
    }
)


def in_blocks(config: Mapping[str, JSON]) -> bool:
    """Whether ``use_bdlora`` is set, and factors are stored as blocks."""
    return bool(config.get("use_bdlora"))


def whole(config: Mapping[str, JSON]) -> bool:
    """Whether factors are stored as they are."""
    return not in_blocks(config)


def start(config: Mapping[str, JSON]) -> str:
    """``init_lora_weights`` where it is a name; PEFT takes OLoRA's in any case of letters."""
    given = config.get("init_lora_weights")
    lower = given.lower() if isinstance(given, str) else ""
    return lower if lower in ("olora", given) else ""


def from_the_weight(config: Mapping[str, JSON]) -> bool:
    """Whether factors began as part of the weight, in a way that the weight tells again."""
    return whole(config) and not config.get("use_dora") and start(config) in _FROM_THE_WEIGHT


def plain(config: Mapping[str, JSON]) -> bool:
    """Whether factors are stored as they are, and did not begin as part of the weight."""
    return whole(config) and not from_the_weight(config)


def alike(config: Mapping[str, JSON]) -> bool:
    """Whether no module is spoken of by its name: by a pattern, or as an expert's whose rsLoRA PEFT scales anew."""
    return not any(config.get(name) for name in ("alpha_pattern", "rank_pattern", "use_rslora"))


def lora_options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank of a LoRA module.

    Raises:
        IntegrityError: the config states another rank, DoRA without a magnitude, or a bias where there is none (or the
            other way round).
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    if flag(config, "use_dora"):
        raise IntegrityError(f"{module}: use_dora is true, and the file has no lora_magnitude_vector for it")
    if flag(config, "lora_bias") != ("bias" in slots):
        has = "has a lora_B.bias" if "bias" in slots else "has no lora_B.bias"
        raise IntegrityError(f"{module}: lora_bias is {str(flag(config, 'lora_bias')).lower()}, and the file {has}")
    return _scale(config, module, slots)


def disputed(
    config: Mapping[str, JSON], module: str, _slots: Mapping[str, TensorRef], options: Mapping[str, JSON]
) -> Dispute | None:
    """PEFT on transformers 5 fuses two projections of each expert, which doubles rank and alpha: no matter but here."""
    if not flag(config, "use_rslora"):
        return None
    *_, around, number, leaf = ("", "", *module.split("."))
    if around != "experts" or not number.isdigit() or leaf not in _FUSED:
        return None
    alpha, rank = options["alpha"], options["rank"]
    assert isinstance(alpha, int | float)
    assert isinstance(rank, int)
    return replace(_TWICE_THE_RANK, followed={"scale": 2 * alpha / math.sqrt(2 * rank), "scale_rule": _FUSED_RULE})


_FUSED = ("gate_proj", "up_proj", "w1", "w3")
"""Projections of an expert that transformers 5 keeps in one ``gate_up_proj``."""

_FUSED_RULE = "2 * alpha/sqrt(2 * r)"

_TWICE_THE_RANK = Dispute(
    topic="rslora-of-fused-experts",
    says="PEFT fuses the factors of an expert's gate and up projections for transformers 5, doubles rank and alpha, "
    "and so makes rsLoRA's scale larger by sqrt(2)",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py",
    holds="PEFT 0.21.2 with transformers 5, for adapters of transformers 4; it leaves out those of Qwen2-MoE's experts",
    peft="larger by sqrt(2)",
    strict="as it was trained",
    followed={},
    declared={},
)


def dora_options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank of a DoRA module.

    Raises:
        IntegrityError: the config states another rank, or denies that this is DoRA.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    if not flag(config, "use_dora"):
        raise IntegrityError(f"{module}: use_dora is false, and the file has {slots['magnitude'].key}")
    if flag(config, "lora_bias"):
        raise IntegrityError(f"{module}: lora_bias and use_dora are both true, which PEFT does not allow")
    return _scale(config, module, slots)


def expert_options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank of the factors of a stack of experts, each of which has that rank.

    Args:
        config: the parsed file.
        module: the parameter's name, which is what PEFT holds against patterns.
        slots: the factors.

    Raises:
        IntegrityError: the config states another rank, or DoRA or a bias, which PEFT has on no parameter.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    for name in ("use_dora", "lora_bias"):
        if flag(config, name):
            raise IntegrityError(f"{module}: {name} is true beside target_parameters, which PEFT does not allow")
    return _scale(config, module, slots, axis=1)


def _scale(
    config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef], *, axis: int = 0
) -> dict[str, JSON]:
    down = slots["down"]
    rank = down.shape[axis] if len(down.shape) > axis else 0
    if rank < 1:
        raise IntegrityError(f"{down.key} {list(down.shape)} has no rank")
    stated, where = chosen(config, "rank_pattern", "r", module)
    if stated is not None and stated != rank and not _refused(config):
        raise IntegrityError(f"{module}: {where} says rank {stated}, and {down.key} has rank {rank}")
    alpha = stated_alpha(config, "alpha_pattern", "lora_alpha", module)
    rule, divisor = _RULES[flag(config, "use_rslora")]
    return {"scale": alpha / divisor(rank), "scale_rule": rule, "alpha": alpha, "rank": rank}


def _refused(config: Mapping[str, JSON]) -> bool:
    """Whether a refused field is set: then shapes follow other rules, and that field is the one to hear about."""
    return any(
        field.refuse and config.get(name) and config[name] not in field.harmless
        for name, field in FIELDS.items()
        if name not in _OF_THE_SAME_SHAPE
    )


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again gives bit-equal scales.

    Args:
        groups: module name, as it will be spelled, to its LoRA or DoRA group.

    Raises:
        CannotCarry: LoRA and DoRA, or modules with and without a bias, in one adapter; a bias on an embedding; a DoRA
            along the axis that PEFT does not use for that role; or a scale that no alpha gives.
    """
    if not groups:
        return {}
    bias = _all_or_none(groups, "lora_bias", {name for name, group in groups.items() if "bias" in group.slots})
    dora = _all_or_none(groups, "use_dora", {name for name, group in groups.items() if "magnitude" in group.slots})
    if bias and (embeddings := sorted(name for name, group in groups.items() if group.role == "embedding")):
        raise CannotCarry(f"PEFT has no lora_bias for embeddings: {', '.join(embeddings)}")
    turned = [name for name, group in groups.items() if _axis(group) != _axis_by_role(group)]
    if turned:
        raise CannotCarry(
            "PEFT's DoRA has lengths for columns on embeddings and for rows on everything else; otherwise on "
            + ", ".join(sorted(turned)),
            "If these are embeddings, say so: PEFT spells them apart.",
        )
    ranks = {name: _rank(group) for name, group in groups.items()}
    rslora, alphas = _alphas(groups, ranks)
    r, rank_pattern = patterned(ranks)
    alpha, alpha_pattern = patterned(alphas)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_bias": bias,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _rank(group: Group) -> int:
    stated = group.options.get("rank")
    return stated if isinstance(stated, int) else group.slots["down"].shape[0]


def _axis_by_role(group: Group) -> int:
    return 1 if group.role == "embedding" else 0


def _axis(group: Group) -> JSON:
    return group.options.get("axis", _axis_by_role(group))


def _all_or_none(groups: Mapping[str, Group], field: str, having: set[str]) -> bool:
    """Whether a field that holds for the whole adapter is true; raises ``CannotCarry`` where modules differ."""
    if having and (without := sorted(groups.keys() - having)):
        raise CannotCarry(
            f"PEFT's {field} holds for all modules of an adapter: it would be true for {', '.join(sorted(having))} "
            f"and false for {', '.join(without)}"
        )
    return bool(having)


def _alphas(groups: Mapping[str, Group], ranks: Mapping[str, int]) -> tuple[bool, dict[str, int | float]]:
    """``use_rslora`` and every module's alpha: the stated ones if they hold, else whole numbers, else exact ones."""
    scales = {name: group.options["scale"] for name, group in groups.items()}
    stated = {group.options.get("scale_rule") for group in groups.values()}
    rules = sorted(_RULES, key=lambda rslora: _RULES[rslora][0] not in stated)
    for whole in (True, False):
        for rslora in rules:
            found: dict[str, int | float] = {}
            for name, scale in scales.items():
                alpha = alpha_for(scale, groups[name].options.get("alpha"), _RULES[rslora][1](ranks[name]), whole=whole)
                if alpha is None:
                    break
                found[name] = alpha
            else:
                return rslora, found
    raise CannotCarry(
        "PEFT derives each scale from an alpha by one rule for the whole adapter, and none gives these scales exactly: "
        + ", ".join(f"{name} {scale!r}" for name, scale in sorted(scales.items()))
    )
