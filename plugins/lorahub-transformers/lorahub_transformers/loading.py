"""A base with its adapters in one call: the recorded base at its commit, in the class that the adapters are for.

Everything is held against headers first; only then are weights fetched and loaded, by Transformers itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorahub.adapter import Adapter, AdapterHeader, open_header
from lorahub.attaching import Policy, attach, plan_beside
from lorahub.bases.index import BaseRef
from lorahub.deltas.disputes import as_compat
from lorahub.engine.planning.steps import Step
from lorahub.errors import BaseMismatch, Incompatible, UsageError
from lorahub.fetching import Progress, Source, locate, quiet
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch
from lorahub.live.parts import parts_in
from lorahub.merging import merge as merge_into
from lorahub.merging.job import Job
from lorahub.merging.preparing import Several, named_weights, prepare
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.sources import Given
from lorahub_transformers.brought import labels_for, names_in, take
from lorahub_transformers.classes import choose_class, config_of
from lorahub_transformers.families import FAMILIES
from lorahub_transformers.finding_base import find_base
from lorahub_transformers.framework import Transformers
from lorahub_transformers.made import Made, handle, remember
from lorahub_transformers.origin import Origin
from lorahub_transformers.tokenizing import tokenizer_of

if TYPE_CHECKING:
    from torch import nn

    from lorahub.opening import Base

__all__ = ["from_pretrained", "handle", "tokenizer_of"]

Adapters: TypeAlias = "Source | Adapter | Several"
"""One adapter, or several as ``lorahub.attach`` takes them."""

_OURS = {
    "revision": "give it in the reference: ns/adapter@REVISION; that of the base is recorded, or base='ns/base@COMMIT'",
    "config": "the base's configuration is taken, with what the adapters' heads change in it",
    "trust_remote_code": "remote code is never run: load the model yourself, and lorahub.attach(model, ...)",
    "subfolder": "give it in the reference: ns/adapter@1.2/FOLDER",
    "state_dict": "load the model yourself, and lorahub.attach(model, ...)",
    "output_loading_info": "what would be missing or misfit is refused before",
}
"""Arguments of Transformers' that have no place here -> what to do instead."""


def from_pretrained(
    adapters: Adapters,
    *,
    base: Source | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    active: Collection[str] | None = None,
    merge: bool = False,
    model_class: type[Any] | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
    **kwargs: Any,
) -> Any:
    """A Transformers model with adapters: attached, so that they can be weighed, exchanged and taken off, or merged.

        model = from_pretrained("acme/ink@1.2", dtype="bfloat16", device_map="auto")
        handle(model).set_adapters(["ink"], weights=[0.6])

    Args:
        adapters: a folder, a file, ``ns/name[@SELECTOR]``, or several as for ``lorahub.attach``.
        base: a folder or ``ns/name[@COMMIT]``; None: the base that the first adapter records, at its commit.
        weights: one per adapter; 1 by default, or the weight in the reference.  A head that the base lacks, or has for
            other classes, is the adapter's in full, and stays when the adapter is taken off: there is no other.
        active: which act from the start; all of them by default.
        merge: change the weights instead.
        model_class: of Transformers; None: that of the adapters' head, or for their task, else the base's own.
        allow: finding codes to accept; see ``lorahub.check``.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: where adapters come from, as a path of a folder hub or an address; bases come from an address alone.
        token: for the Hub; None takes the one that is logged in.
        local_files_only: ask nobody, and take what was fetched before.
        progress: called with (bytes done, bytes in all) while the base is fetched.
        kwargs: of the class's ``from_pretrained``, as ``dtype``, ``device_map`` or ``quantization_config``.

    Returns:
        The model, as Transformers returns it; ``handle`` gives what it was attached or merged with, and
        ``tokenizer_of`` the tokenizer that belongs to it.

    Raises:
        UsageError: no base is given and none is recorded.
        NotFound, AccessDenied, Offline, Unavailable: an adapter or the base cannot be had from here.
        BaseMismatch, Degraded, Incompatible, IntegrityError: see ``lorahub.check``; no weights were loaded.
    """
    for name, instead in _OURS.items():
        if name in kwargs:
            raise UsageError(f"from_pretrained takes no {name!r}", instead)
    named = named_weights(_several(adapters), weights)
    given = {
        name: _opened(source, compat, hub, token, local_files_only, progress) for name, (source, _) in named.items()
    }
    chosen = [weight for _, weight in named.values()]
    first = next(iter(given.values()), None)
    if first is None:
        raise UsageError("no adapter was given", "from_pretrained('ns/adapter@1.2')")
    found = find_base(first, base, hub=_server(hub), token=token, local_files_only=local_files_only, progress=progress)
    parts = {} if merge else {name: opened for name, header in given.items() if (opened := parts_in(header))}
    for name in parts:
        plan_beside(found, name, given[name], Policy(allow=allow, compat=compat, hub=hub))
    changing = {name: header for name, header in given.items() if name not in parts}
    job = _judged(found, changing, {name: named[name][1] for name in changing}, allow, compat)
    brought = names_in(part for each in parts.values() for part in each)
    edits = dict(job.plan.config_edits) if job else {}
    config = config_of(found.index.config, {**labels_for(brought, found.index.config), **edits})
    kind = model_class or choose_class(config, edits, first.reading.hints)
    _demand_complete(kind, config, found, {*brought, *(step.out for step in (job.plan.steps if job else ()))})
    model = _loaded(kind, config, found.pulled(progress), job, brought, kwargs)
    origin = Origin(repo=found.index.ref.repo, commit=found.index.ref.commit, files=found.pulled(progress).files)
    if origin.repo:
        model.config._name_or_path = model.name_or_path = origin.repo  # noqa: SLF001 - as Transformers sets it
    how: dict[str, Any] = {"weights": chosen, "allow": allow, "compat": compat}
    if not merge:
        how["active"] = active
    folders = {name: header.folder for name, header in given.items()}
    remember(model, Made((merge_into if merge else attach)(model, given, **how), origin, folders))
    return model


def _opened(
    source: Given, compat: str | None, hub: str | None, token: str | None, local_files_only: bool, progress: Progress
) -> AdapterHeader:
    """The adapter's header, fetched first where it is on a hub.

    Raises:
        UsageError: it lies in no folder yet.
    """
    if isinstance(source, Adapter):
        if source.header is None:
            raise UsageError(
                "this adapter lies in no folder yet", "save it first: lorahub.adapter.save(adapter, FOLDER)"
            )
        return source.header
    if isinstance(source, AdapterHeader):
        return source
    place = locate(source, hub, local_files_only, progress, token=token)
    return open_header(
        place.folder, load_registry(), weight_name=place.weight_name, label=place.label, compat=as_compat(compat)
    )


def _judged(
    found: Base, headers: Mapping[str, AdapterHeader], weights: Mapping[str, float], allow: Collection[str], compat: Any
) -> Job | None:
    """The changes of weights, planned and judged by headers; None where there are none."""
    if not headers:
        return None
    job = prepare(found, dict(headers), weights=weights, allow=allow, compat=compat)
    job.refuse()
    return job


def _several(adapters: Adapters) -> Several:
    if isinstance(adapters, Adapter):
        return {Path(adapters.header.label).name if adapters.header else "adapter": adapters}
    if isinstance(adapters, str | os.PathLike | Ref):
        return [adapters]
    return adapters


def _server(hub: str | None) -> str | None:
    """The hub, where it has bases."""
    return hub if hub is not None and "://" in hub else None


def _demand_complete(kind: Any, config: Any, found: Base, brought: Collection[str]) -> None:
    """Refuse a class with parameters that neither the base nor an adapter has: they would be random numbers.

    Here for architectures whose names are in the table; of others, Transformers tells once they are loaded.

    Raises:
        BaseMismatch: naming them.
    """
    if found.index.config.get("model_type") not in FAMILIES:
        return
    with torch.device("meta"):
        whole = Transformers().index_model(kind(config), BaseRef())
    there = {*found.index.parameters, *brought, *(other for group in found.index.tied for other in group)}
    if missing := [name for name in whole.parameters if name not in there]:
        raise _incomplete(kind, found, missing)


def _incomplete(kind: Any, found: Base, missing: Sequence[str]) -> BaseMismatch:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    finding = Finding(
        code="head-incomplete",
        axis="placement",
        level=Verdict.INCOMPATIBLE,
        message=f"{len(missing)} parameters of a {kind.__name__} would be random numbers",
        where=tuple(missing),
    )
    return BaseMismatch(
        f"a {kind.__name__} has {', '.join(missing[:3])}{more}, and neither {found.index.ref} nor the adapters do: "
        "there would be random numbers",
        "name the class that is meant: model_class=...",
        (finding,),
    )


def _is_one(name: str, names: Collection[str]) -> bool:
    """Whether a name is among others, which may have a prefix more or less."""
    return any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in names)


def _loaded(
    kind: Any, config: Any, base: Base, job: Job | None, brought: Mapping[str, torch.Tensor], kwargs: dict[str, Any]
) -> Any:
    """The model with the base's weights, and with the values of heads that the base lacks."""
    assert base.files is not None  # it was pulled
    steps = job.plan.steps if job else ()
    new = [step for step in steps if step.before is None or step.before.shape != step.after.shape]
    stored = base.files.config.get("quantization_config")
    if stored is not None:
        config.quantization_config = stored
    options = {"config": config, "local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    options |= kwargs
    if new or brought:
        options["ignore_mismatched_sizes"] = True
    with _without_report() if new or brought else nullcontext():
        model, told = kind.from_pretrained(base.files.folder, **options)
    brings = {*brought, *(step.out for step in new)}
    unread = {*told["missing_keys"], *(each[0] for each in told["mismatched_keys"])}
    if missing := sorted(name for name in unread if not _is_one(name, brings)):
        raise _incomplete(kind, base, missing)
    if job and new:
        _take(model, job, new)
    take(model, brought, base.index.parameters)
    return model


def _take(model: nn.Module, job: Job, new: Sequence[Step]) -> None:
    """Put the new parameters' values into the model, so that no weight mixes them with those it was built with.

    Raises:
        Incompatible: one of them is stored in another way than as plain numbers.
    """
    own = Transformers().parameters(model, Transformers().index_model(model, BaseRef()))
    brought = job.adapters(load_registry())
    with torch.no_grad():
        for step in new:
            for term in step.terms:
                value = brought[term.adapter].deltas[term.target].replacement()
                place = own.get(step.out)
                if value is None or place is None or place.shape != value.shape or not place.is_floating_point():
                    raise Incompatible(
                        f"the value that the adapter brings for {step.out} cannot be put into this model",
                        "merge to disk (lorahub merge ... -o FOLDER) and load the result",
                    )
                place.copy_(value)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without Transformers' report that a head is new and should be trained: its values come right after."""
    log = logging.getLogger("transformers.modeling_utils")

    def passes(said: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in said.getMessage()

    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)
