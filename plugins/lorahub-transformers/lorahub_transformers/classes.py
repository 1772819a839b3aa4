"""Which class of Transformers a base is loaded in, and with which configuration.

A head that an adapter brings decides; then the class or the task that the adapter names; then the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat

__all__ = ["TASKS", "choose_class", "class_named", "config_of"]

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }
)
"""PEFT's name for a task -> what finds the class for it."""


def config_of(values: Mapping[str, JSON], edits: Mapping[str, JSON] = MappingProxyType({})) -> Any:
    """The configuration that ``config.json`` describes, changed by ``edits``, without quantisation.

    Raises:
        UnsupportedFormat: Transformers knows no such model.
    """
    transformers: Any = import_module("transformers")
    kind = values.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedFormat(
            f"transformers {transformers.__version__} knows no models of type {kind!r}",
            "remote code is never run: load the model yourself, and lorahub.attach(model, ...)",
        )
    said = {key: value for key, value in {**values, **edits}.items() if key != "quantization_config"}
    return transformers.CONFIG_MAPPING[kind].from_dict(said)


def choose_class(config: Any, edits: Mapping[str, JSON], hints: Mapping[str, JSON]) -> Any:
    """The class for a base and its adapters.

    Args:
        config: of the base, with the edits.
        edits: what the adapters' heads change in it.
        hints: what the first adapter says of its task.

    Raises:
        UnsupportedFormat: there is none.
    """
    if "architectures" in edits:
        return class_named(config)
    mapping, task = hints.get("auto_mapping"), hints.get("task_type")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(named, str) and (found := _by_name(named)):
        return found
    if isinstance(task, str) and task in TASKS:
        auto = getattr(import_module("transformers"), TASKS[task])
        own = _by_name((config.architectures or [""])[0])
        classes = auto._model_mapping.get(type(config), None)  # noqa: SLF001 - what from_config looks up
        classes = classes if isinstance(classes, tuple) else (classes,)
        if own not in classes and classes[0] is not None:
            return classes[0]
    return class_named(config)


def class_named(config: Any) -> Any:
    """The class that a configuration names; the bare model where it names none.

    Raises:
        UnsupportedFormat: Transformers has no such class.
    """
    transformers: Any = import_module("transformers")
    name = (config.architectures or [""])[0]
    if not name:
        return transformers.AutoModel._model_mapping[type(config)]  # noqa: SLF001 - what from_config looks up
    found = _by_name(name)
    if found is None:
        raise UnsupportedFormat(
            f"the base is of the class {name!r}, which transformers {transformers.__version__} does not have",
            "remote code is never run: load the model yourself, and lorahub.attach(model, ...)",
        )
    return found


def _by_name(name: str) -> Any:
    transformers: Any = import_module("transformers")
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
