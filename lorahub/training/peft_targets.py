"""What PEFT trains where a config names no modules: its own choice, by the type of the model.

The tables are those of PEFT 0.21 (``TRANSFORMERS_MODELS_TO_..._MODULES_MAPPING``), and a test holds them against the
installed one.  Where PEFT has no choice it asks for modules, and so does this: another choice would train another
adapter under the same config.  Knows words of configs; no models and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lorahub.errors import UsageError

__all__ = ["FEEDFORWARD", "TARGETS", "Chosen", "completed"]

Chosen = tuple[str, ...] | str
"""Ends of modules' paths, or a regular expression for whole ones."""

_QV = ("q_proj", "v_proj")
_BERT = ("query", "value")
_FUSED = ("query_key_value",)

_LORA: Mapping[str, Chosen] = MappingProxyType(
    {
        **dict.fromkeys(("t5", "mt5"), ("q", "v")),
        **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "stablelm"), _QV),
        **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3"), _QV),
        **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _QV),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
        **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
        "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
        "blip-2": ("q", "v", *_QV),
        "deberta-v2": ("query_proj", "value_proj"),
        "deberta": ("in_proj",),
        "mpt": ("Wqkv",),
        "btlm": ("c_proj", "c_attn"),
        "codegen": ("qkv_proj",),
        "phi": (*_QV, "fc1", "fc2"),
        "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "rwkv": ("key", "value", "receptance", "output"),
        "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    }
)

_IA3: Mapping[str, Chosen] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
        **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), (*_FUSED, "dense_4h_to_h")),
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (*_QV, "down_proj")),
        **dict.fromkeys(("bart", "phi"), (*_QV, "fc2")),
        "t5": ("k", "v", "wo"),
        "mt5": ("k", "v", "wi_1"),
        "bloom": (*_FUSED, "mlp.dense_4h_to_h"),
        "opt": ("q_proj", "k_proj", "fc2"),
        "gptj": (*_QV, "fc_out"),
        "gpt_neo": (*_QV, "c_proj"),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
        "deberta": ("in_proj", "output.dense"),
    }
)

TARGETS: Mapping[str, Mapping[str, Chosen]] = MappingProxyType(
    {
        **dict.fromkeys(("lora", "dora", "loha", "lokr", "oft"), _LORA),
        "vera": MappingProxyType({**_LORA, "phi": _QV}),
        "ia3": _IA3,
    }
)
"""Kind -> ``model_type`` of the model's configuration -> what is trained."""

_GAINED_OUTPUTS = frozenset({"q", "k", "v", "key", "value", "key_proj", "value_proj", "k_proj", *_QV, *_FUSED})
_FUSED_OUTPUTS = frozenset({"c_attn", "in_proj", "wi_1"})

FEEDFORWARD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(each for each in chosen if each not in _GAINED_OUTPUTS | _FUSED_OUTPUTS)
        for name, chosen in _IA3.items()
    }
)
"""``model_type`` -> which of the targets of (IA)³ have their gain on the inputs: all that are no projection of
attention, and none of mT5's."""


def completed(said: Mapping[str, Any], model_type: object, meant: Callable[[str], bool]) -> dict[str, Any]:
    """Arguments of ``create`` that come from a config, with what PEFT chooses where they name no modules.

    Args:
        said: arguments by name; ``kind`` is there.
        model_type: what the model's own configuration says, as "llama"; anything else where it says nothing.
        meant: whether a name is the end of a layer's path in the model.  As in PEFT some of what is chosen may be
            missing in it, and not all.

    Raises:
        UsageError: PEFT has no choice for such a model, or the model has nothing of it.
    """
    kind, found = str(said["kind"]), dict(said)
    type_ = model_type if isinstance(model_type, str) else ""
    if said.get("target_modules") is None:
        chosen = TARGETS.get(kind, {}).get(type_)
        if chosen is None and not said.get("target_parameters"):
            raise _unnamed("target_modules", type_, "lorahub.create(model, config=config, target_modules=[...])")
        found["target_modules"] = [] if chosen is None else _there(chosen, meant, type_)
    if kind == "ia3" and said.get("feedforward_modules") is None:
        named = FEEDFORWARD.get(type_)
        if named is None:
            raise _unnamed("feedforward_modules", type_, "those of the targets whose gain is on the inputs, or []")
        found["feedforward_modules"] = [*named]
    return found


def _there(chosen: Chosen, meant: Callable[[str], bool], model_type: str) -> re.Pattern[str] | list[str]:
    if isinstance(chosen, str):
        return re.compile(chosen)
    left = [each for each in chosen if meant(each)]
    if not left:
        raise UsageError(
            f"the config names no target_modules, and this {model_type} has none of those that PEFT takes then: "
            f"{', '.join(chosen)}",
            'name them: target_modules="all-linear"',
        )
    return left


def _unnamed(field: str, model_type: str, hint: str) -> UsageError:
    whose = f"models of type {model_type!r}" if model_type else "such a model"
    return UsageError(
        f"the config names no {field}, and PEFT has no choice of its own for {whose}", f"name them: {hint}"
    )
