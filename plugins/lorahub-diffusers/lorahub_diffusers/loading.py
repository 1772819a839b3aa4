"""``load_lora_weights``: adapters on a pipeline, by one name or several.

The pipeline's own methods for LoRA go on working: what they bring lies in layers around the pipeline's modules, and
what is attached here acts at those modules themselves, so that both add up whichever came first.  While they fuse
theirs into the weights, what is attached here is out of the way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorahub.attaching import Policy
from lorahub.errors import UsageError
from lorahub.fetching import Source, as_ref
from lorahub.sources import Given
from lorahub_diffusers.handle import LOADED, Loras
from lorahub_diffusers.view import is_pipeline

__all__ = ["Loras", "load_lora_weights", "loras"]


def load_lora_weights(
    pipe: Any,
    adapter: Given | Mapping[str, Given] | Sequence[Source],
    *,
    adapter_name: str | None = None,
    weights: Any = None,
    component: str = "",
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
) -> Loras:
    """Put adapters on a pipeline; those that are there stay and act too.  No weight is changed.

        loras = load_lora_weights(pipe, "acme/ink@1.2", weights={"unet": {"down": 0.4, "mid": 1}, "text_encoder": 0.5})
        loras.set_adapters(["ink"], 0.8)
        loras.unload()

    Args:
        pipe: a pipeline of diffusers.
        adapter: a folder, a file, ``ns/name[@SELECTOR]`` or an open adapter; several as a list or by name.
        adapter_name: what to call it; the last part of its name by default.
        weights: of one adapter a number, a dictionary over components and blocks as diffusers' ``set_adapters`` takes
            it, or any rule of a recipe; of several, a list or a dictionary by adapter name.
        component: put it on this component, whatever its file calls its own: "transformer_2" for the second of a
            pipeline with two.
        allow: finding codes to accept; see ``lorahub.check``.
        compat: "peft" or "strict"; see ``lorahub.load``.  The choice that the first call made is kept.
        hub: path of a folder hub.

    Returns:
        The handle of the pipeline, the same for every call.

    Raises:
        BaseMismatch, Degraded, Incompatible, IntegrityError: see ``lorahub.check``; nothing was put on.
        UsageError: it is no pipeline, a name is taken, or a weight speaks of what is not there.
    """
    if not is_pipeline(pipe):
        raise UsageError(
            f"this is a {type(pipe).__name__} and no pipeline of diffusers", "for a model: lorahub.attach(model, ...)"
        )
    given = _named(adapter, adapter_name)
    rules = _by_name(list(given), weights, several=not _is_one(adapter))
    found = LOADED.get(pipe)
    if found is None:
        found = Loras(pipe, compat=compat)
    found.add(given, rules, policy=Policy(allow=allow, compat=compat, hub=hub), component=component)
    LOADED[pipe] = found
    return found


def loras(pipe: Any) -> Loras:
    """The handle of a pipeline that ``load_lora_weights`` gave.

    Raises:
        UsageError: nothing is on it.
    """
    found = LOADED.get(pipe)
    if found is None:
        raise UsageError("nothing was loaded into this pipeline here", "lorahub_diffusers.load_lora_weights(pipe, ...)")
    return found


def _is_one(adapter: object) -> bool:
    return not isinstance(adapter, Mapping | list | tuple)


def _named(adapter: Any, name: str | None) -> dict[str, Given]:
    """Adapters by name."""
    if isinstance(adapter, Mapping):
        return dict(adapter)
    if name is not None and not _is_one(adapter):
        raise UsageError("adapter_name is for one adapter", "give several by name: {name: adapter}")
    found: dict[str, Given] = {}
    for each in [adapter] if _is_one(adapter) else adapter:
        stem = name or _stem(each)
        found[next(word for word in (stem, *(f"{stem}-{n}" for n in range(2, 99))) if word not in found)] = each
    return found


def _stem(adapter: Any) -> str:
    if hasattr(adapter, "header") or hasattr(adapter, "label"):
        header = getattr(adapter, "header", adapter)
        return Path(header.label).stem if header is not None else "adapter"
    ref = as_ref(adapter)
    return ref.name or Path((ref.repo or ref.path or "adapter").rstrip("/")).stem


def _by_name(names: Sequence[str], weights: Any, *, several: bool) -> dict[str, Any]:
    """The weight of each adapter."""
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if not several:
        return {names[0]: weights}
    if isinstance(weights, Mapping):
        if unknown := sorted(set(weights) - set(names)):
            raise UsageError(f"weights name adapters that were not given: {', '.join(unknown)}", ", ".join(names))
        return {name: weights.get(name, 1.0) for name in names}
    if not isinstance(weights, Sequence):
        return dict.fromkeys(names, weights)
    if len(weights) != len(names):
        raise UsageError(f"{len(weights)} weights for {len(names)} adapters", "give one weight for each adapter")
    return dict(zip(names, weights, strict=True))
