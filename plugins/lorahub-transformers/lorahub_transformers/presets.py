"""What the presets mean in a model whose classes are at hand: which of its modules are attention, experts, a head.

Read off classes: transformers calls a class that holds the projections of an attention ``...Attention``, and one with a
feed-forward ``...MLP``, or puts the two matrices of it into a layer as ``fc1`` and ``fc2``; ``tests/test_walk.py``
holds that against every architecture of the library, and against ``families.py``.  Knows no configuration; imports
neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from lorahub.bases.index import ParameterInfo, natural

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PRESETS", "on_top", "presets_of"]

PRESETS = ("attention", "feed-forward", "all-linear", "all-conv", "all-embedding", "experts")
"""What ``targets`` takes; "experts" are the parameters in which a mixture stacks the matrices of its experts."""

_ATTENTION = re.compile(
    r"(Attention|AttentionSubsample|FlashAttention2|MLA)$"
)  # never ...AttentionLayer: that has more
_FEED_FORWARD = re.compile(r"(MLP|Mlp|FeedForward|FFN|Ffn|FeedForwardNetwork|DenseActDense|Intermediate|Output)$")
_PAIR = frozenset({"fc1", "fc2", "linear1", "linear2"})
"""What a layer calls the matrices of its feed-forward, where these have no module around them."""

_LAYER = re.compile(r"(Layer|Block)$")
_EXPERTS = re.compile(r"Experts?$")
_ROLES = MappingProxyType({"all-linear": "linear", "all-conv": "conv", "all-embedding": "embedding"})
_MATRICES_AXES = 3

_HEADS = frozenset({"classification_head", "classifier", "lm_head", "qa_outputs", "score"})
"""What classes that keep no backbone of its own call the modules on top."""


def presets_of(model: nn.Module, entries: Mapping[str, ParameterInfo]) -> Mapping[str, tuple[str, ...]]:
    """Preset -> names of parameters, in natural order; presets that mean nothing here are left out.

    Heads are never among them.  "feed-forward" is there only where every linear module of a repeated layer is known to
    be either that or attention, so that none is left out in silence.

    Args:
        model: live or on the meta device.
        entries: its parameters by their live names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    top = on_top(model)
    found: dict[str, list[str]] = {preset: [] for preset in PRESETS}
    unclear = False
    for name in sorted(entries, key=natural):
        info = entries[name]
        path, _, leaf = name.rpartition(".")
        if any(f"{path}.".startswith(f"{each}.") for each in top):
            continue
        classes = [type(modules[each]).__name__ for each in _around(path) if each in modules]
        if len(info.shape) == _MATRICES_AXES and not info.role and classes and _EXPERTS.search(classes[-1]):
            found["experts"].append(name)
        if leaf != "weight" or not info.role:
            continue
        for preset, role in _ROLES.items():
            if info.role == role:
                found[preset].append(name)
        if info.role != "linear":
            continue
        if any(map(_ATTENTION.search, classes)):
            found["attention"].append(name)
        elif any(_FEED_FORWARD.search(each) or _EXPERTS.search(each) for each in classes) or _pair(path, classes):
            found["feed-forward"].append(name)
        elif any(part.isdigit() for part in path.split(".")):
            unclear = True
    if unclear:
        found["feed-forward"] = []
    return MappingProxyType({preset: tuple(names) for preset, names in found.items() if names})


def on_top(model: nn.Module) -> frozenset[str]:
    """Paths of the modules outside the backbone: heads, and what shares the vocabulary with the embeddings."""
    own = cast("Any", model)
    found: set[str] = set()
    prefix = str(getattr(own, "base_model_prefix", "") or "")
    backbone = getattr(own, prefix, None) if prefix else None
    if hasattr(backbone, "named_modules") and backbone is not model:
        found |= {name for name, _ in own.named_children() if name != prefix}
    else:
        found |= {name for name, _ in own.named_children() if name in _HEADS}
    outputs = [id(each) for each in _outputs(own)]
    found |= {name for name, module in own.named_modules(remove_duplicate=False) if name and id(module) in outputs}
    return frozenset(found)


def _pair(path: str, classes: list[str]) -> bool:
    """Whether a linear module is one of the two of a layer's feed-forward; ``classes``: those around it and its own."""
    above = classes[-2:-1]
    return path.rpartition(".")[2] in _PAIR and bool(above and _LAYER.search(above[0]))


def _outputs(model: Any) -> Iterator[Any]:
    """The output embeddings of a model and of every model within it."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        if ask is None:
            continue
        try:
            found = ask()
        except (AttributeError, NotImplementedError):  # how classes without any say so
            continue
        if found is not None:
            yield found


def _around(path: str) -> Iterator[str]:
    """The paths of the modules around a parameter, from the outside."""
    parts = path.split(".") if path else []
    yield ""
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))
