"""Prompts and prefixes on a live Transformers model: trained vectors before its input, or keys and values in its cache.

They come in by hooks before the model's call, as PEFT's own models pass them on, so that ``forward`` and ``generate``
give what PEFT gives.  The papers: prompt tuning (arXiv 2104.08691), multitask prompt tuning (2303.02861), P-tuning
(2103.10385), prefix tuning (2101.00190).
A head that was trained beside them takes the place of the model's own while they act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.errors import BaseMismatch, IntegrityError, UnsupportedKind
from lorahub.lazy import torch
from lorahub_transformers.inputs import Prefix, Prompt, TaskPrompt
from lorahub_transformers.part_hooks import BeforeEncoder, BeforeModel, Head, InsideEncoder

if TYPE_CHECKING:
    from torch import nn

    from lorahub.live.parts import OpenPart, PartHandle

__all__ = ["HEAD", "VECTORS", "apply_part"]

VECTORS = "prompt_embeddings"
"""Under which name PEFT keeps a prompt or a prefix."""

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"
"""Where it keeps the factors of what a task makes of a prompt: [tasks, tokens, rank] and [tasks, rank, width]."""

HEAD = "base_model."
"""How the names of a head begin that it keeps beside."""

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "cpt": "its loss weighs the examples that its prompt was made from",
        "cartridge": "its prefix is kept in two pieces, of which one may be frozen",
        "adaption-prompt": "its gates lie inside the attention, whose classes it replaces",
    }
)
"""Kinds of parts that are not applied -> why."""


@dataclass(frozen=True, slots=True)
class _Handles:
    handles: tuple[Any, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def apply_part(model: nn.Module, part: OpenPart, acts: Callable[[], bool]) -> PartHandle:
    """Put a prompt or a prefix into a model's calls; see ``AppliesParts``.

    Raises:
        UnsupportedKind: parts of this kind are not applied, with the reason.
        BaseMismatch: it was made for a model of another width, or with a head that this one lacks.
        IntegrityError: the configuration contradicts the tensors.
    """
    if part.kind not in _WAYS:
        why = _REFUSED.get(part.kind, "how it acts is known to its own library alone")
        raise UnsupportedKind(f"'{part.name}' cannot be attached: {why}", "load it with the library that made it")
    if VECTORS not in part.tensors:
        raise IntegrityError(f"'{part.name}' holds no {VECTORS}", "fetch it again, or ask its author")
    heads = {name: value for name, value in part.tensors.items() if name not in (VECTORS, _COLUMNS, _ROWS)}
    found = [*_heads(model, part.name, heads, acts)]  # all are known to fit before one is put in
    found += _WAYS[part.kind](model, part, acts)
    return _Handles(
        tuple(
            module.register_forward_hook(hook, prepend=True)
            if isinstance(hook, Head)
            else module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            for module, hook in found
        )
    )


_Found = list[tuple[Any, Any]]


def _prompt(model: Any, part: OpenPart, acts: Callable[[], bool]) -> _Found:
    embedding = model.get_input_embeddings()
    return _put(model, Prompt(vectors=_vectors(model, part), embedding=embedding, labels=_labelled(part)), acts)


def _multitask(model: Any, part: OpenPart, acts: Callable[[], bool]) -> _Found:
    """What a task makes of the vectors is a product of two factors, by which each of their numbers is multiplied."""
    shared, count, ranks = _vectors(model, part), _number(part, "num_tasks"), _number(part, "num_ranks")
    columns, rows = part.tensors.get(_COLUMNS), part.tensors.get(_ROWS)
    if columns is None or rows is None:
        raise IntegrityError(f"'{part.name}' holds no {_COLUMNS} or no {_ROWS}", "fetch it again, or ask its author")
    whole = len(part.tensors[VECTORS])
    if columns.shape != (count, whole, ranks) or rows.shape != (count, ranks, shared.shape[1]):
        raise IntegrityError(
            f"'{part.name}' says it has {count} tasks of rank {ranks} and holds {tuple(columns.shape)} and "
            f"{tuple(rows.shape)}",
            "ask its author for the whole folder",
        )
    inner = model.config.is_encoder_decoder and whole > len(shared)
    prompt = TaskPrompt(
        name=part.name,
        vectors=(part.tensors[VECTORS] * (columns @ rows)) if inner else shared * (columns[:, : len(shared)] @ rows),
        embedding=model.get_input_embeddings(),
        labels=_labelled(part),
        shifted=model.prepare_decoder_input_ids_from_labels if inner else None,
    )
    return _put(model, prompt, acts)


def _vectors(model: Any, part: OpenPart) -> torch.Tensor:
    """Those that stand before the input: [tokens, width]."""
    vectors, count = part.tensors[VECTORS], _number(part, "num_virtual_tokens")
    embedding = model.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None) or embedding.weight.shape[1]
    if vectors.dim() != 2 or vectors.shape[0] not in (count, 2 * count):
        raise IntegrityError(f"'{part.name}' says it has {count} virtual tokens and holds {tuple(vectors.shape)}", "")
    if vectors.shape[1] != width:
        raise BaseMismatch(
            f"'{part.name}' is for embeddings of {vectors.shape[1]}, and this {type(model).__name__} has {width}",
            "use the base that it was trained on",
        )
    return vectors[:count]


def _labelled(part: OpenPart) -> bool:
    """Whether there is a label for every token."""
    return part.options.get("task_type") == "CAUSAL_LM"


def _put(model: Any, prompt: Prompt, acts: Callable[[], bool]) -> _Found:
    if not model.config.is_encoder_decoder:
        return [(model, BeforeModel(prompt, acts))]
    inside = BeforeEncoder(prompt, acts)
    return [(model, inside), (model.get_encoder(), InsideEncoder(prompt, acts, inside))]


def _prefix(model: Any, part: OpenPart, acts: Callable[[], bool]) -> _Found:
    count, layers = _number(part, "num_virtual_tokens"), _number(part, "num_layers")
    heads, width = _number(part, "num_attention_heads"), _number(part, "token_dim")
    vectors = part.tensors[VECTORS]
    if vectors.shape != (count, 2 * layers * width) or width % heads:
        raise IntegrityError(
            f"'{part.name}' says it has {count} x 2 x {layers} x {width} numbers and holds {tuple(vectors.shape)}", ""
        )
    text = model.config.get_text_config(decoder=True)
    own = getattr(text, "num_hidden_layers", layers)
    wide = getattr(text, "head_dim", None) or (
        text.d_kv if hasattr(text, "d_kv") else text.hidden_size // text.num_attention_heads
    )
    many = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if text.model_type in _UNEVEN:
        raise UnsupportedKind(
            f"'{part.name}' cannot be attached: layers of {text.model_type} differ in their keys and values",
            "load it with PEFT",
        )
    if (layers, heads, width // heads) != (own, many, wide):
        raise BaseMismatch(
            f"'{part.name}' is for {layers} layers with {heads} x {width // heads} keys, and this "
            f"{type(model).__name__} has {own} with {many} x {wide}",
            "use the base that it was trained on",
        )
    rows = vectors.view(count, 2 * layers, heads, width // heads).permute(1, 2, 0, 3)  # 2 layers, heads, tokens, width
    both = _number(part, "num_transformer_submodules") == 2
    at = [(4 * i) % (2 * layers) if both else 2 * i for i in range(layers)]  # as PEFT takes them for two halves
    pairs = tuple((rows[i], rows[i + 1]) for i in at)
    prefix = Prefix(pairs=pairs, both=both, config=text if text.model_type in _SLIDING else None)
    return [(_backbone(model), BeforeModel(prefix, acts))]


_UNEVEN = frozenset({"gemma4", "gemma4_text"})
"""Types of models whose layers differ in their keys and values, or share them."""

_SLIDING = frozenset({"gemma2", "gemma3_text"})
"""Types of models for which PEFT makes the cache that their configuration asks for; others get a plain one."""

_WAYS: Mapping[str, Callable[[Any, OpenPart, Callable[[], bool]], _Found]] = MappingProxyType(
    {
        "prompt-tuning": _prompt,
        "multitask-prompt-tuning": _multitask,
        "p-tuning": _prompt,
        "prefix-tuning": _prefix,
    }
)
"""Kind -> the modules that are hooked for it, and with what."""


def _backbone(model: Any) -> Any:
    """What takes keys and values: the model, or where it passes none on, the model inside it."""
    import inspect  # noqa: PLC0415 - slow for what is rarely needed

    from transformers import PreTrainedModel  # noqa: PLC0415 - slow to import

    inner = (each for each in model.children() if isinstance(each, PreTrainedModel))
    for each in (model, *inner):
        if "past_key_values" in inspect.signature(type(each).forward).parameters:
            return each
    raise UnsupportedKind(
        f"a prefix cannot be attached to {type(model).__name__}: it takes no keys and values from outside"
    )


def _heads(model: Any, name: str, tensors: Mapping[str, torch.Tensor], acts: Callable[[], bool]) -> _Found:
    """The modules of a head that was trained beside, each with the values that it takes."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        path, _, leaf = key.removeprefix(HEAD).rpartition(".")
        modules.setdefault(path, {})[leaf] = value
    found: _Found = []
    for path, values in modules.items():
        module = dict(model.named_modules()).get(path)
        if type(module) is not torch.nn.Linear or not values.keys() <= {"weight", "bias"} or "weight" not in values:
            raise BaseMismatch(
                f"'{name}' brings {path}, which is no linear layer of this {type(model).__name__}",
                "load the base in the class that it was trained in",
            )
        if values["weight"].shape != module.weight.shape or ("bias" in values) != (module.bias is not None):
            raise BaseMismatch(
                f"'{name}' brings {path} of {tuple(values['weight'].shape)}, and this {type(model).__name__} has one "
                f"of {tuple(module.weight.shape)}",
                f"load the base with num_labels={values['weight'].shape[0]}",
            )
        found.append((module, Head(values["weight"], values.get("bias"), acts)))
    return found


def _number(part: OpenPart, key: str) -> int:
    value = part.options.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IntegrityError(f"'{part.name}' does not say how many {key} it has", "ask its author for the whole folder")
    return value
