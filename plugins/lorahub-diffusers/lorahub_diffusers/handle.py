"""What ``load_lora_weights`` gives: the adapters on a pipeline, weighed by component and block, exchanged, merged.

An adapter whose targets have several weights is attached in parts, one for each weight, so that a choice is a list of
names and numbers; other weights for the same parts are set without anything being attached anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, final
from weakref import WeakKeyDictionary, ref

from lorahub.attaching import Policy, plan_one
from lorahub.bases.layout import Target
from lorahub.bases.torch_module import held_parameters
from lorahub.converting import convert
from lorahub.deltas.delta import Delta
from lorahub.engine.changing.merge import Merged, merge_into
from lorahub.engine.changing.sharding import local_parts
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.undoing.keeper import Policy as Undo
from lorahub.errors import UsageError
from lorahub.live.attached import Live, Planned
from lorahub.merging.preparing import prepare
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.sources import Given
from lorahub_diffusers.unwrapped import unwrapped
from lorahub_diffusers.view import as_view
from lorahub_diffusers.weights import factors, placed_in, targets_of, weighted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LOADED", "Loras"]

LOADED: WeakKeyDictionary[Any, Loras] = WeakKeyDictionary()
"""Pipeline -> its handle, while adapters are on it."""

_WRITING = ("fuse_lora", "unfuse_lora")
"""Methods of pipelines that change weights in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Some:
    """Some of an adapter's changes, under the name by which they are attached."""

    deltas: Mapping[Target, Delta]


@dataclass(frozen=True, slots=True, kw_only=True)
class _One:
    """An adapter on the pipeline.

    Attributes:
        source: where it is from.
        component: the one that it was put on, whatever it is called in its file; or "".
        planned: what merging it at weight 1 would do, and it.
        policy: what was allowed.
        rule: its weight, as people wrote it.
        groups: name of an attached part -> its weight; the targets of each have that one in common.
        parts: weight -> targets, as they are attached.
    """

    source: Given
    component: str
    planned: Planned
    policy: Policy
    rule: Any
    groups: Mapping[str, float]
    parts: frozenset[frozenset[Target]]


@final
class Loras:
    """The adapters on a pipeline; as a context manager it takes them off at the end of the block."""

    def __init__(self, pipe: Any, *, compat: str | None = None) -> None:
        """Look at the pipeline's models; ``load_lora_weights`` does this.

        Raises:
            UsageError: adapters are attached to one of them already, by ``lorahub.attach``.
            UnsupportedFormat: its projections are fused, or it is quantised in a way that is not known.
        """
        self._view: nn.Module = as_view(pipe)
        self._base: Base = open_base(self._view)
        self._compat = compat
        self._loaded: dict[str, _One] = {}
        self._targets: dict[str, frozenset[Target]] = {}
        self._count = 0
        self._stale: set[str] = set()
        self._live: Live | None = self._attach()
        self._pipe = ref(pipe)
        for name in _WRITING:
            if hasattr(pipe, name):
                vars(pipe)[name] = _aside(self.live, getattr(pipe, name))

    def _attach(self) -> Live:
        return Live(
            self._view,
            self._base.index,
            self._base.framework,
            plan=lambda _name, planned: cast("Planned", planned),
            judge=self._judge,
            compat=self._compat,
        )

    # ---- what is there

    @property
    def live(self) -> Live:
        """What ``lorahub.attach`` gives.  An adapter whose targets have several weights is several there.

        Raises:
            UsageError: everything was taken off.
        """
        if self._live is None:
            raise UsageError(
                "these adapters were taken off", "load them again: lorahub_diffusers.load_lora_weights(pipe, ...)"
            )
        return self._live

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters."""
        return tuple(self._loaded)

    @property
    def active(self) -> Mapping[str, Any]:
        """The adapters that act -> their weights, as they were written."""
        acting = self.live.active
        return {name: one.rule for name, one in self._loaded.items() if any(group in acting for group in one.groups)}

    @property
    def components(self) -> Mapping[str, tuple[str, ...]]:
        """Adapter -> the components of the pipeline that it changes."""
        return {
            name: tuple(sorted({target.component for targets in one.parts for target in targets}))
            for name, one in self._loaded.items()
        }

    # ---- choosing

    def set_adapters(self, names: str | Sequence[str], weights: Any = None) -> None:
        """Let these adapters act together, and no others.

        Args:
            names: which.
            weights: one for all, or a list with one for each; as they were by default.  As for ``load_lora_weights``.

        Raises:
            UsageError: there is no such adapter, or a weight is none.
            RecipeError: a weight speaks of components or blocks that are not there.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            self._demand(name)
        if weights is None:
            rules = {name: self._loaded[name].rule for name in chosen}
        elif isinstance(weights, list):
            if len(weights) != len(chosen):
                raise UsageError(f"{len(weights)} weights for {len(chosen)} adapters", "give one for each, or one")
            rules = dict(zip(chosen, weights, strict=True))
        else:
            rules = dict.fromkeys(chosen, weights)
        changed = {name: self._weighed(name, self._loaded[name], rule) for name, rule in rules.items()}
        self._settle(changed, chosen)

    # ---- exchanging

    def add(self, given: Mapping[str, Given], rules: Mapping[str, Any], *, policy: Policy, component: str = "") -> None:
        """Put more adapters on, which act from now on; see ``load_lora_weights``.

        Raises:
            UsageError: a name is taken.
            LorahubError: what attaching them would raise; nothing changes then.
        """
        for name in given:
            if name in self._loaded:
                raise UsageError(
                    f"there is an adapter '{name}' already", f"take another adapter_name, or swap({name!r}, ...)"
                )
        acting = [name for name, one in self._loaded.items() if any(each in self.live.active for each in one.groups)]
        try:
            made = {name: self._opened(name, source, rules[name], policy, component) for name, source in given.items()}
            self._settle(made, [*acting, *given])
        except BaseException:
            if not self._loaded:
                self.unload()
            raise

    def swap(self, name: str, adapter: Given) -> None:
        """Put another adapter in the place of one, with its weight: at once, or not at all.

        Raises:
            UsageError: there is none of that name.
            LorahubError: what attaching it would raise; nothing changes then.
        """
        self._demand(name)
        before = self._loaded[name]
        acting = [each for each, one in self._loaded.items() if any(group in self.live.active for group in one.groups)]
        self._settle({name: self._opened(name, adapter, before.rule, before.policy, before.component)}, acting)

    def remove(self, name: str) -> None:
        """Take one adapter off; the others act as before.

        Raises:
            UsageError: there is none of that name.
        """
        self._demand(name)
        acting = [
            each
            for each, one in self._loaded.items()
            if each != name and any(group in self.live.active for group in one.groups)
        ]
        self._stale |= set(self._loaded.pop(name).groups)
        self._settle({}, acting)

    def unload(self) -> None:
        """Take everything off; the pipeline is what it was, bit for bit.  Doing it twice is no fault."""
        if self._live is not None:
            self._live.detach()
            self._live = None
            self._loaded.clear()
            if (pipe := self._pipe()) is not None:
                LOADED.pop(pipe, None)
                for name in _WRITING:
                    vars(pipe).pop(name, None)

    # ---- keeping

    def merge_into(self, pipe: Any = None, *, undo: Undo = "auto") -> Merged:
        """Change the pipeline's weights by what acts now, rounded once, and take the adapters off.

        Args:
            pipe: another pipeline of the same structure to merge into, which leaves the adapters on this one.
            undo: what is kept for ``Merged.undo``; see ``lorahub.merge``.

        Returns:
            What ``lorahub.merge`` gives: ``report``, and a bit-exact ``undo()``.

        Raises:
            UsageError: nothing acts, or weights are by component or block under ``compat="peft"``, which puts them
                into the factors.
            LorahubError: what merging would raise; nothing was changed then.
        """
        acting = {name: self._loaded[name] for name in self.active}
        if not acting:
            raise UsageError("no adapter acts, so there is nothing to merge", "choose some: set_adapters([...])")
        if elsewhere := [name for name, one in acting.items() if one.component]:
            raise UsageError(
                f"{', '.join(elsewhere)} was put on another component than its file names",
                "merge it into that model: lorahub.merge(pipe.COMPONENT, {...})",
            )
        base = self._base if pipe is None else open_base(pipe)
        plain = {name: one.rule for name, one in acting.items() if isinstance(one.rule, int | float)}
        if len(plain) < len(acting) and self._compat == "peft":
            raise UsageError(
                'under compat="peft" weights go into the factors, one for each adapter', "give each adapter one number"
            )
        policies = [one.policy for one in acting.values()]
        job = prepare(
            base,
            {name: one.source for name, one in acting.items()},
            weights={name: plain.get(name, 1.0) for name in acting},
            allow={code for policy in policies for code in policy.allow},
            compat=self._compat,
            hub=policies[0].hub,
        )
        job.refuse()
        numbers = {
            name: dict.fromkeys(targets, 1.0) if name in plain else factors(acting[name].rule, targets, name=name)
            for name, targets in targets_of(job.plan).items()
        }
        model = base.model
        assert model is not None  # pipelines are live
        brought = job.adapters(load_registry())
        local, parameters = local_parts(
            weighted(job.plan, numbers), base.framework.parameters(model, base.index), brought
        )
        if pipe is None:
            self.unload()
        held = held_parameters(model, base.index)
        return merge_into(parameters, local, brought, held=held, keeping=Keeping(policy=undo))

    def save(self, name: str, folder: str | os.PathLike[str]) -> Path:
        """Write one adapter as diffusers' ``load_lora_weights`` takes it; its weight here is not part of it.

        Raises:
            UsageError: there is none of that name.
            CannotCarry: diffusers has no word for part of it; nothing was written.
            WriteFailed: ``folder`` is there already, or there is no space or no permission.
        """
        self._demand(name)
        one = self._loaded[name]
        convert(one.source, "diffusers", folder, base=self._base, compat=one.policy.compat, allow=one.policy.allow)
        return Path(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    # ---- how it is done

    def _opened(self, name: str, source: Given, rule: Any, policy: Policy, component: str) -> _One:
        """An adapter that is planned, weighed and not attached yet."""
        one = _One(
            source=source,
            component=component,
            planned=self._planned(name, source, policy, component),
            policy=policy,
            rule=rule,
            groups=MappingProxyType({}),
            parts=frozenset(),
        )
        return self._weighed(name, one, rule)

    def _planned(self, name: str, source: Given, policy: Policy, component: str) -> Planned:
        if not component:
            return plan_one(self._base, name, source, policy)
        models = dict(self._view.named_children())
        if component not in models:
            raise UsageError(f"the pipeline has no component {component!r}", f"components: {', '.join(models)}")
        plan, adapter = plan_one(open_base(unwrapped(models[component])), name, source, policy)
        return placed_in(plan, component), adapter

    def _weighed(self, name: str, one: _One, rule: Any) -> _One:
        """The adapter with another weight: the parts that are attached where they do for it, else new ones."""
        targets = next(iter(targets_of(one.planned[0]).values()), set())
        numbers = factors(rule, targets, name=name)
        wanted: dict[float, set[Target]] = {}
        for target, number in numbers.items():
            wanted.setdefault(number, set()).add(target)
        parts = {frozenset(each): number for number, each in wanted.items()}
        if one.parts == parts.keys():
            known = {self._targets[group]: group for group in one.groups}
            groups = {known[part]: number for part, number in parts.items()}
            return replace(one, rule=rule, groups=MappingProxyType(groups))
        fresh: dict[str, float] = {}
        for part, number in parts.items():
            self._count += 1
            group = name if len(parts) == 1 and name not in self._targets else f"{name}#{self._count}"
            self._targets[group] = part
            fresh[group] = number
        return replace(one, rule=rule, groups=MappingProxyType(fresh), parts=frozenset(parts))

    def _settle(self, changed: Mapping[str, _One], acting: Sequence[str]) -> None:
        """Attach what is new, let ``acting`` act, and take off what is no longer needed."""
        live = self.live
        after = {**self._loaded, **changed}
        new = {group: one for one in changed.values() for group in one.groups if group not in live.adapters}
        try:
            for group, one in new.items():
                live.add(group, _within(one.planned, self._targets[group]))
            chosen = {group: weight for name in acting for group, weight in after[name].groups.items() if weight}
            live.set_adapters(list(chosen), weights=list(chosen.values()))
        except BaseException:
            for group in new:
                if group in live.adapters:
                    live.remove(group)
                self._targets.pop(group, None)
            raise
        for name, one in changed.items():
            if name in self._loaded:
                self._stale |= set(self._loaded[name].groups) - set(one.groups)
        self._loaded = after
        for group in list(self._stale):
            live.remove(group)
            self._stale.discard(group)
            self._targets.pop(group, None)

    def _judge(self, groups: Sequence[str]) -> None:
        """Refuse what a merge of these adapters would refuse."""
        names = [name for name, one in self._loaded.items() if any(group in groups for group in one.groups)]
        chosen = {name: self._loaded[name].source for name in names}
        if len(chosen) > 1:
            prepare(self._base, chosen, weights=[1.0] * len(chosen), compat=self._compat).refuse()

    def _demand(self, name: str) -> None:
        self.live  # noqa: B018 - raises where everything was taken off
        if name not in self._loaded:
            raise UsageError(
                f"no adapter '{name}' is on the pipeline", f"there are: {', '.join(self._loaded) or 'none'}"
            )


def _aside(live: Live, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the pipeline that writes into weights, which it is to see as they are."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with live.using([]):
            result = method(*args, **kwargs)
        live.refresh()
        return result

    return call


def _within(planned: Planned, targets: Collection[Target]) -> Planned:
    """What merging some of an adapter's changes would do."""
    plan, adapter = planned
    steps = tuple(
        replace(step, terms=terms)
        for step in plan.steps
        if (terms := tuple(term for term in step.terms if term.target in targets))
    )
    deltas = {target: adapter.deltas[target] for target in targets}
    return replace(plan, steps=steps), _Some(deltas=MappingProxyType(deltas))
