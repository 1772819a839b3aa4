"""Attaching adapters to a live model, for scripts: planned and judged as a merge, and no weight is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from lorahub import checks
from lorahub.adapter import Adapter, AdapterHeader
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.errors import BaseMismatch, UsageError
from lorahub.fetching import quiet
from lorahub.live.alike import Alike
from lorahub.live.attached import Live, Planned
from lorahub.live.copies import owner_of
from lorahub.live.parts import Parts, parts_in
from lorahub.merging.preparing import Several, named_weights, prepare
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.sources import Given, header_of
from lorahub.weights import Numbers

if TYPE_CHECKING:
    from torch import nn

    from lorahub.training.trainee import Trainee

__all__ = ["Policy", "attach", "handle", "plan_beside", "plan_one"]


def attach(
    model: nn.Module,
    adapters: Several,
    *,
    weights: Numbers | None = None,
    active: Collection[str] | None = None,
    capacity: int = 0,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
) -> Live:
    """Let adapters act on a live model without changing its weights; they are checked and placed as for a merge.

    Prompts and prefixes, which no merge can hold, stand before the model's input while they are chosen, one at a time.

    Args:
        model: any ``nn.Module``, or a pipeline whose plugin is installed; attach first and compile then, for attaching
            compiles everything again.  PyTorch 2.8 breaks the graph wherever an adapter is looked up; newer ones make
            one of all.
        adapters: name -> adapter, one, a list of them, or a sum of open adapters: ``0.7 * a - b``.
        weights: one number for all, or one per adapter, in order or by name; 1 by default, or the weight in the
            reference.
        active: which act from the start; all of them by default, as after a merge.
        capacity: rank that every module keeps room for, so that a compiled graph takes any choice up to it; 0: none.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.

    Returns:
        ``Live``: choose, weight, exchange and detach.  As a context manager it detaches at the end of the block.

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``; nothing was attached.
        UsageError: adapters are attached already: add to those.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile returns holds the model itself
    base = open_base(inner)
    if base.model is None:
        raise UsageError(
            f"{base.index.ref} is no live model, so nothing can be attached to it", "load it, and give the model"
        )
    given = named_weights(adapters, weights)
    live = _ready(base, Policy(allow=allow, compat=compat, hub=hub), capacity)
    try:
        for name, (source, weight) in given.items():
            live.add(name, source, weight=weight)
        try:
            live.set_adapters(_names(given if active is None else active))
        except BaseMismatch as error:
            if active is not None:
                raise
            apart = (
                f"attach them with active=[{next(iter(given))!r}], and choose: live.set_adapters, live.adapter_names"
            )
            raise BaseMismatch(error.message, error.hint or apart, error.findings) from None
    except BaseException:
        live.detach()
        raise
    return live


def _ready(base: Base, policy: Policy, capacity: int, known: Mapping[str, Given] | None = None) -> Live:
    """A live model with nothing attached yet; ``known``: where adapters are from that are attached otherwise."""
    assert base.model is not None
    sources: dict[str, Given] = dict(known or {})
    alike = Alike()
    parts = Parts(base.model, base.framework)

    def one(name: str, given: object) -> Planned:
        source = _opened(cast("Given", given), policy)
        if isinstance(source, AdapterHeader) and (values := parts_in(source)):
            planned = plan_beside(base, name, source, policy)
            parts.demand(live.active, live.adapter_names, coming=name)
            parts.put(name, values, lambda: live.active.get(name, 0.0) != 0)
        else:
            planned = by_weights(name, source)
            parts.drop(name)
        sources[name] = source
        return planned

    def by_weights(name: str, source: Given) -> Planned:
        own = source if isinstance(source, Adapter) and policy.compat is None else None
        plan = alike.plan(own) if own else None
        if plan is not None and own:
            return plan, own
        planned = plan_one(base, name, source, policy)
        if own and planned[1] is own:
            alike.keep(own, planned[0])
        return planned

    def together(names: Sequence[str]) -> None:
        chosen = {name: sources[name] for name in names}
        prepare(
            base, chosen, weights=[1.0] * len(chosen), allow=policy.allow, compat=policy.compat, hub=policy.hub
        ).refuse()

    def again(model: nn.Module) -> Live:
        return _ready(replace(base, model=model), policy, capacity, sources)

    how: dict[str, Any] = {"compat": policy.compat, "capacity": capacity, "parts": parts, "again": again}
    live = Live(base.model, base.index, base.framework, plan=one, judge=together, **how)
    return live


def handle(model: nn.Module) -> Live | Trainee:
    """What adapters on a model are handled by: what ``attach`` or ``create`` returned for it, also of a copy.

    ``copy.deepcopy`` of a model with adapters has adapters of its own, and this is the way to them.

    Raises:
        UsageError: the model has no adapters on it.
    """
    found = owner_of(getattr(model, "_orig_mod", model))
    if found is None:
        raise UsageError(
            f"this {type(model).__name__} has no adapters attached, and none is trained on it",
            "lorahub.attach(model, [...]) or lorahub.create(model); of a model that wraps another, give the one inside",
        )
    return cast("Live | Trainee", found)


def _trains(delta: Delta) -> bool:
    return any(tensor.requires_grad for tensor in delta.tensors().values())


def _names(active: Collection[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is allowed and chosen, as in ``attach``."""

    allow: Collection[str]
    compat: str | None
    hub: str | None


_BESIDE = frozenset({"kind-unsupported", "nothing-lands"})
"""Codes of findings that say of an adapter which is parts alone that no merge can hold it."""


def _opened(source: Given, policy: Policy) -> Given:
    """The adapter with its header, read without a base, where that is not open yet."""
    if isinstance(source, Adapter | AdapterHeader):
        return source
    return header_of(source, load_registry(), hub=policy.hub, progress=quiet, compat=policy.compat, allow=policy.allow)


def plan_beside(base: Base, name: str, header: AdapterHeader, policy: Policy) -> Planned:
    """The plan of an adapter that changes no weight, judged by all that does not concern merging it."""
    job = prepare(base, {name: header}, weights=[1.0], allow=policy.allow, compat=policy.compat, hub=policy.hub)
    checks.refuse(
        [each for each in job.findings if each.code not in _BESIDE],
        allowed=job.allowed,
        subject=f"{name} beside {base.index.ref}",
    )
    left = tuple(each for each in job.plan.findings if each.code not in _BESIDE)
    return replace(job.plan, findings=left), _Unchanging()


@dataclass(frozen=True, slots=True)
class _Unchanging:
    """No change of any weight."""

    deltas: Mapping[Target, Delta] = field(default_factory=dict)


def plan_one(base: Base, name: str, source: Given, policy: Policy) -> Planned:
    """The plan of one adapter at weight 1, and the adapter: the very object that was given, where that is possible."""
    job = prepare(base, {name: source}, weights=[1.0], allow=policy.allow, compat=policy.compat, hub=policy.hub)
    job.refuse()
    if isinstance(source, Adapter) and policy.compat is None:
        targets = (term.target for step in job.plan.steps for term in step.terms)
        if all(target in source.deltas for target in targets):
            return job.plan, source
    if isinstance(source, Adapter) and any(_trains(delta) for delta in source.deltas.values()):
        raise UsageError(
            f"'{name}' wants gradients for its tensors, and its file names modules otherwise than this base does, so "
            "it would have to be read again, without them",
            "convert it to this base first: lorahub convert ... --base BASE",
        )
    return job.plan, job.adapters(load_registry())[name]
