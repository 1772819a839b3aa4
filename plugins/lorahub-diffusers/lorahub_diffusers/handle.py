"""What ``load_lora_weights`` gives: the adapters on a pipeline, to be weighed, exchanged, merged and saved.

How they are attached in parts is ``parts``' to know, and how they become weights ``landing``'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, final
from weakref import WeakKeyDictionary, ref

from lorahub.adapter import Adapter
from lorahub.attaching import Policy, plan_one
from lorahub.converting import convert
from lorahub.engine.changing.merge import Merged
from lorahub.engine.undoing.keeper import Policy as Undo
from lorahub.errors import UsageError
from lorahub.fetching import quiet
from lorahub.live.attached import Live, Planned
from lorahub.merging.preparing import prepare
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.sources import Given, header_of
from lorahub_diffusers.aside import put_aside, put_back
from lorahub_diffusers.held import Held
from lorahub_diffusers.landing import prepared
from lorahub_diffusers.parts import Parts
from lorahub_diffusers.unwrapped import unwrapped
from lorahub_diffusers.vectors import refuse_words
from lorahub_diffusers.view import as_view
from lorahub_diffusers.weights import placed_in

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LOADED", "Loras"]

LOADED: WeakKeyDictionary[Any, Loras] = WeakKeyDictionary()
"""Pipeline -> its handle, while adapters are on it."""

_WRITING = ("fuse_lora", "unfuse_lora")
"""Methods of pipelines that change weights in place, which they are to see as they are."""


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
        self._parts = Parts()
        self._live: Live | None = Live(
            self._view,
            self._base.index,
            self._base.framework,
            plan=lambda _name, planned: cast("Planned", planned),
            judge=self._judge,
            compat=compat,
        )
        self._pipe = ref(pipe)
        put_aside(pipe, _WRITING, self._away)

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
        return tuple(self._parts.held)

    @property
    def active(self) -> Mapping[str, Any]:
        """The adapters that act -> their weights, as they were written."""
        return {name: self._parts.held[name].rule for name in self._parts.acting(self.live)}

    @property
    def components(self) -> Mapping[str, tuple[str, ...]]:
        """Adapter -> the components of the pipeline that it changes."""
        return {name: one.components for name, one in self._parts.held.items()}

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
        there = {name: self._demand(name) for name in chosen}
        if weights is None:
            rules = {name: one.rule for name, one in there.items()}
        elif isinstance(weights, list):
            if len(weights) != len(chosen):
                raise UsageError(f"{len(weights)} weights for {len(chosen)} adapters", "give one for each, or one")
            rules = dict(zip(chosen, weights, strict=True))
        else:
            rules = dict.fromkeys(chosen, weights)
        changed = {name: self._parts.weighed(name, there[name], rule) for name, rule in rules.items()}
        self._parts.settle(self.live, changed, chosen)

    # ---- exchanging

    def add(self, given: Mapping[str, Given], rules: Mapping[str, Any], *, policy: Policy, component: str = "") -> None:
        """Put more adapters on, which act from now on; see ``load_lora_weights``.

        Raises:
            UsageError: a name is taken.
            LorahubError: what attaching them would raise; nothing changes then.
        """
        for name in given:
            if name in self._parts.held:
                raise UsageError(
                    f"there is an adapter '{name}' already", f"take another adapter_name, or swap({name!r}, ...)"
                )
        acting = self._parts.acting(self.live)
        try:
            made = {name: self._opened(name, source, rules[name], policy, component) for name, source in given.items()}
            self._parts.settle(self.live, made, [*acting, *given])
        except BaseException:
            if not self._parts.held:
                self.unload()
            raise

    def swap(self, name: str, adapter: Given) -> None:
        """Put another adapter in the place of one, with its weight: at once, or not at all.

        Raises:
            UsageError: there is none of that name.
            LorahubError: what attaching it would raise; nothing changes then.
        """
        before = self._demand(name)
        acting = self._parts.acting(self.live)
        other = self._opened(name, adapter, before.rule, before.policy, before.component)
        self._parts.settle(self.live, {name: other}, acting)

    def remove(self, name: str) -> None:
        """Take one adapter off; the others act as before.

        Raises:
            UsageError: there is none of that name.
        """
        self._demand(name)
        self._parts.drop(self.live, name)

    def unload(self) -> None:
        """Take everything off; the pipeline is what it was, bit for bit.  Doing it twice is no fault."""
        if self._live is not None:
            self._live.detach()
            self._live = None
            self._parts.clear()
            if (pipe := self._pipe()) is not None:
                LOADED.pop(pipe, None)
                put_back(pipe, _WRITING)

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
        base = self._base if pipe is None else open_base(pipe)
        acting = {name: self._parts.held[name] for name in self._parts.acting(self.live)}
        landing = prepared(base, acting, self._compat)
        if pipe is None:
            self.unload()
        return landing.run(undo)

    def save(self, name: str, folder: str | os.PathLike[str]) -> Path:
        """Write one adapter as diffusers' ``load_lora_weights`` takes it; its weight here is not part of it.

        Raises:
            UsageError: there is none of that name.
            CannotCarry: diffusers has no word for part of it; nothing was written.
            WriteFailed: ``folder`` is there already, or there is no space or no permission.
        """
        one = self._demand(name)
        convert(one.source, "diffusers", folder, base=self._base, compat=one.policy.compat, allow=one.policy.allow)
        return Path(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    # ---- how it is done

    @contextmanager
    def _away(self) -> Iterator[None]:
        with self.live.using([]):
            yield
        self.live.refresh()

    def _opened(self, name: str, source: Given, rule: Any, policy: Policy, component: str) -> Held:
        """An adapter that is planned, weighed and not attached yet."""
        planned = self._planned(name, source, policy, component)
        one = Held(source=source, component=component, planned=planned, policy=policy, rule=rule)
        return self._parts.weighed(name, one, rule)

    def _planned(self, name: str, source: Given, policy: Policy, component: str) -> Planned:
        if not isinstance(source, Adapter):
            refuse_words(header_of(source, load_registry(), hub=policy.hub, progress=quiet))
        if not component:
            return plan_one(self._base, name, source, policy)
        models = dict(self._view.named_children())
        if component not in models:
            raise UsageError(f"the pipeline has no component {component!r}", f"components: {', '.join(models)}")
        plan, adapter = plan_one(open_base(unwrapped(models[component])), name, source, policy)
        return placed_in(plan, component), adapter

    def _judge(self, groups: Sequence[str]) -> None:
        """Refuse what a merge of these adapters would refuse."""
        chosen = {name: one.source for name, one in self._parts.held.items() if one.acts(groups)}
        if len(chosen) > 1:
            prepare(self._base, chosen, weights=[1.0] * len(chosen), compat=self._compat).refuse()

    def _demand(self, name: str) -> Held:
        self.live  # noqa: B018 - raises where everything was taken off
        return self._parts.demand(name)
