"""``create_model`` as timm has it, with an adapter: one that is there already, or one that is to be trained.

An adapter is held against the architecture on the meta device first; only then are pretrained weights loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import finalize

from lorahub.adapter import Adapter, save
from lorahub.attaching import attach
from lorahub.attaching import handle as lorahub_handle
from lorahub.bases.index import BaseRef
from lorahub.creating import create
from lorahub.errors import UsageError
from lorahub.fetching import Source
from lorahub.lazy import torch
from lorahub.merging import merge as merge_into
from lorahub.merging.job import Job
from lorahub.merging.preparing import prepare
from lorahub.opening import recorded_base
from lorahub.plugins import load_registry
from lorahub.sources import load
from lorahub_timm.configs import described, live_config
from lorahub_timm.framework import Timm
from lorahub_timm.heads import head_parameters

if TYPE_CHECKING:
    from torch import nn

    from lorahub.engine.changing.merge import Merged
    from lorahub.live.attached import Live
    from lorahub.training.trainee import Trainee

__all__ = ["create_model", "handle"]

Handle: TypeAlias = "Live | Merged | Trainee"

_MADE = "_lorahub_timm_made"


@dataclass(slots=True, eq=False)
class _Made:
    """What a model was made with: it lies on the model and goes with it; a copy's adapters know their own handle."""

    handle: Handle | None

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Made:
        return _Made(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Made, (None,)


_NOT_OF_THE_WHOLE = frozenset({"features_only", "out_indices", "feature_cls", "checkpoint_path", "device"})
"""Arguments that do not belong to the model that an adapter was trained on, or that load weights."""


def create_model(
    name: str | None = None,
    pretrained: bool | None = None,
    *,
    adapter: Source | Adapter | None = None,
    lora: Mapping[str, Any] | None = None,
    weight: float = 1.0,
    merge: bool = False,
    num_classes: int | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model with an adapter: attached, so that it can be weighed, exchanged and taken off, or merged; or begun.

        model = lorahub_timm.create_model("vit_base_patch16_224", lora={"r": 8}, num_classes=10)
        optimizer = torch.optim.AdamW(lorahub_timm.handle(model).parameters())

    Args:
        name: what timm calls it, with or without a tag ("vit_base_patch16_224.augreg_in21k", "hf-hub:NS/NAME",
            "local-dir:FOLDER"); None: the base that the adapter records.
        pretrained: load the weights that the name stands for; None: unless ``checkpoint_path`` gives others.
        adapter: a folder, a file, ``ns/name[@SELECTOR]``, or one that is open.
        lora: instead of an adapter, what ``lorahub.create`` makes one of that is to be trained (``{"r": 8}``); with
            ``num_classes`` the new head is trained in full, and saved with it.
        weight: what the change is multiplied with.  A head that the base lacks, or has for other classes, is the
            adapter's in full, and stays when the adapter is taken off: there is no other.
        merge: change the weights instead.
        num_classes: None: as many as the adapter's head has, if it brings one.  0: the model without a head; then, and
            with ``features_only``, changes of modules that such a model leaves out are left out.
        allow: finding codes to accept; see ``lorahub.check``.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        kwargs: of ``timm.create_model``.

    Returns:
        The model, as timm returns it; ``handle`` gives what it was attached or merged with.

    Raises:
        BaseMismatch, Degraded, Incompatible, IntegrityError: see ``lorahub.check``; no weights were loaded.
        UsageError: no name is given and none is recorded, or the head has another number of classes; or see
            ``lorahub.create``.
    """
    timm: Any = import_module("timm")
    if (adapter is None) == (lora is None):
        raise UsageError(
            "a model is made with an adapter that is there, or with one that is to be trained",
            'give adapter="NS/NAME" or lora={"r": 8}',
        )
    if adapter is None:
        assert lora is not None
        if name is None or merge or weight != 1:
            raise UsageError("lora= makes a new adapter: it takes a name, and neither weight nor merge")
        return _to_train(
            timm, name, pretrained, lora, {} if num_classes is None else {"num_classes": num_classes}, kwargs
        )
    given = adapter if isinstance(adapter, Adapter) else load(adapter, hub=hub, compat=compat)
    if given.header is None:
        raise UsageError("this adapter lies in no folder yet", "save it first: lorahub.adapter.save(adapter, FOLDER)")
    label = given.header.label
    full_name = f"hf-hub:{recorded_base(given.header)}" if name is None else name
    with torch.device("meta"):
        whole = timm.create_model(full_name, **{key: kwargs[key] for key in kwargs.keys() - _NOT_OF_THE_WHOLE})
    job = prepare(whole, {label: given}, weights=[weight], allow=allow, compat=compat, hub=hub)
    job.refuse()
    count = _classes(whole, job)
    headless = num_classes == 0 or bool(kwargs.get("features_only"))
    if count is not None and num_classes not in (None, 0, count):
        raise UsageError(
            f"'{label}' brings a head of {count} classes, and the model is to have {num_classes}",
            f"leave num_classes out, or give num_classes={count}; 0 for the model without a head",
        )
    classes = num_classes if num_classes is not None or headless else count
    if classes is not None:
        kwargs["num_classes"] = classes
    loads = not kwargs.get("checkpoint_path") if pretrained is None else pretrained
    model: nn.Module = timm.create_model(full_name, pretrained=loads, **kwargs)
    if not headless:
        _take_head(model, job)
    place = _what_is_there(model, job) if headless else None
    source = given if place is None else load(Path(place.name) / "adapter")
    how: dict[str, Any] = {"weights": [weight], "allow": allow, "compat": compat, "hub": hub}
    vars(model)[_MADE] = _Made((merge_into if merge else attach)(model, {label: source}, **how))
    if place is not None:
        finalize(model, place.cleanup)
    return model


def _to_train(
    timm: Any,
    name: str,
    pretrained: bool | None,
    lora: Mapping[str, Any],
    classes: Mapping[str, int],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """A model with an adapter that begins, and with its head trained where that is new."""
    loads = not kwargs.get("checkpoint_path") if pretrained is None else pretrained
    model: nn.Module = timm.create_model(name, pretrained=loads, **classes, **kwargs)
    settings = dict(lora)
    about = described(live_config(model))
    if classes.get("num_classes") and about is not None and "modules_to_save" not in settings:
        settings["modules_to_save"] = list(about.classifier)
    vars(model)[_MADE] = _Made(create(model, settings.pop("kind", "lora"), **settings))
    return model


def handle(model: nn.Module) -> Handle:
    """What ``create_model`` attached (choose, weigh, exchange, detach), merged (undo) or began (train, save).

    Raises:
        UsageError: the model is not from there, or it is a copy without adapters, as of one whose were merged.
    """
    found = vars(model).get(_MADE)
    if not isinstance(found, _Made):
        raise UsageError("this model was not made by lorahub_timm.create_model", "lorahub.attach gives its own")
    return lorahub_handle(model) if found.handle is None else found.handle


def _classes(whole: nn.Module, job: Job) -> int | None:
    """How many classes the adapter's head has, or None where it brings none."""
    about = described(live_config(whole))
    heads = head_parameters(about) if about else ()
    brought = (step for step in job.plan.steps if step.out in heads and any(term.replaces for term in step.terms))
    return next((step.after.shape[0] for step in brought), None)


def _take_head(model: nn.Module, job: Job) -> None:
    """Put the new head's values into the model, so that no weight mixes them with those that it was built with."""
    new = [step for step in job.plan.steps if step.before is None or step.before.shape != step.after.shape]
    if not new:
        return
    adapter = next(iter(job.adapters(load_registry()).values()))
    own = Timm().parameters(model, Timm().index_model(model, BaseRef()))
    with torch.no_grad():
        for step in new:
            for term in step.terms:
                value = adapter.deltas[term.target].replacement()
                if value is not None and step.out in own:
                    own[step.out].copy_(value)


def _what_is_there(model: nn.Module, job: Job) -> tempfile.TemporaryDirectory[str] | None:
    """A folder with the adapter's changes to what this part of the whole model has; None where it has all of it."""
    index = Timm().index_model(model, BaseRef())
    gone = {
        term.target for step in job.plan.steps if index.stored(step.out) not in index.parameters for term in step.terms
    }
    if not gone:
        return None
    adapter = next(iter(job.adapters(load_registry()).values()))
    kept = {target: delta for target, delta in adapter.deltas.items() if target not in gone}
    place = tempfile.TemporaryDirectory(prefix="lorahub-timm-")
    save(replace(adapter, deltas=MappingProxyType(kept), record=None, header=None), Path(place.name) / "adapter")
    return place
