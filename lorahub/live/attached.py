"""A model with adapters attached: chosen, weighted, exchanged and taken off again, while its weights stay as they are.

Built from the plan of a merge, so that what is refused, found and placed there is so here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, final

from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.engine.folding.bind import HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.errors import UsageError
from lorahub.live.copies import Copies, Recipe, uninstall
from lorahub.live.desk import Desk
from lorahub.live.loading import Loader
from lorahub.live.parts import OpenPart, Parts
from lorahub.weights import Numbers, finite, for_each

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Live", "Planned"]

Planned = tuple[Plan, HasDeltas]
"""What merging one adapter at weight 1 would do, it or one of the same structure, and the adapter."""


@final
class Live:
    """A model with adapters attached; as a context manager it detaches at the end of the block.

        with lorahub.attach(model, {"ink": ink, "sql": sql}) as live:
            live.set_adapters(["ink"], weights=[0.6])
            live.adapter_names = ["ink", None, "sql"]  # one per row of the batch

    Choices belong to a context: threads and tasks that choose do not meet, and those that never chose follow the
    thread that attached.  No choice costs more for adapters that are not in it.

    While adapters are chosen, reading a parameter that no output tells apart (``model.encoder.norm.weight``) gives the
    changed one; ``parameters()`` and ``state_dict()`` always give the model's own.  Writing through ``parameter.data``
    goes unnoticed: call ``refresh`` then.  ``copy.deepcopy`` of the model takes copies of the adapters along, chosen as
    they are here, and ``lorahub.handle`` gives their ``Live``; pickles of the model and copies of a part are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        index: BaseIndex,
        framework: Framework,
        *,
        plan: Callable[[str, object], Planned],
        judge: Callable[[Sequence[str]], None],
        compat: str | None = None,
        capacity: int = 0,
        parts: Parts | None = None,
        again: Callable[[nn.Module], Live] | None = None,
    ) -> None:
        """Attach nothing yet.

        Args:
            model: the model.
            index: its index.
            framework: the one that made it.
            plan: (name, adapter) -> what merging it alone would do; raises what a merge would.
            judge: raises what merging these together would.
            compat: under "peft", a weight goes into the factors of changes that PEFT scales there.
            capacity: rank that every module keeps room for, so that a compiled graph takes any choice up to it.
            parts: what acts beside the weights; ``plan`` puts it there.
            again: the same for a copy of the model, with nothing attached; None: with the same ``plan`` and ``judge``.

        Raises:
            UsageError: adapters are attached to the model, or to a part of it, already.
        """
        self._plan, self._judge = plan, judge
        self._desk = Desk(capacity)
        self._loader = Loader(model, index, framework, self._desk, inside=compat == "peft")
        self._parts = Parts(model, framework) if parts is None else parts
        self._given: dict[str, float] = {}
        self._planned: dict[str, Planned] = {}
        self._open = True
        self._model = model

        def alike(other: nn.Module) -> Live:
            return Live(other, index, framework, plan=plan, judge=judge, compat=compat, capacity=capacity)

        self._again = alike if again is None else again
        Copies(model, self._desk, self, self._copied).install()

    # ---- choosing

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters that are attached."""
        return tuple(self._desk.book)

    @property
    def active(self) -> Mapping[str, float]:
        """The adapters that this context chose, or follows, with their weights; of rows, those that occur."""
        choice = self._desk.choice()
        return dict(zip(choice.names, choice.weights, strict=True))

    @property
    def adapter_names(self) -> tuple[str | None, ...] | None:
        """Which adapter each row of the batch takes; None where all rows take the same.

        Set to None it gives all rows what they had together before names were given.
        """
        return self._desk.choice().by_row

    @adapter_names.setter
    def adapter_names(self, names: Sequence[str | None] | None) -> None:
        before = self._desk.choice().before
        if names is not None:
            self.set_rows(names)
        elif before is not None:  # all rows take again what all of them took before
            kept = {name: weight for name, weight in before.items() if name in self._desk.book}
            self.set_adapters([*kept], weights=[*kept.values()])

    def set_adapters(self, names: str | Sequence[str], *, weights: Numbers | None = None) -> None:
        """Let these adapters act on all rows, together, from the next call on; none for the model as it is.

        Args:
            names: which; one, or several.
            weights: one number for all, one for each, or by name; those they were attached with by default.

        Raises:
            UsageError: no such adapter, one named twice, or another number of weights.
            BaseMismatch: they replace the same parameter.
        """
        chosen = self._chosen(names, weights)
        self._parts.demand(chosen)
        if len(chosen) > 1:
            self._demand_together(tuple(chosen))
        self._desk.choose(tuple(chosen), tuple(chosen.values()))

    def set_rows(self, names: Sequence[str | None], *, weights: Mapping[str, float] | None = None) -> None:
        """Let each row of the batch take its own adapter, or none (None), from the next call on.

        Args:
            names: one for each row.
            weights: by name; those they were attached with by default.

        Raises:
            UsageError: no such adapter, or one that changes a parameter whose use for single rows is not known.
        """
        self._demand_open()
        if isinstance(names, str):
            raise UsageError(f"rows={names!r} is one name and not one for each row", f"live.set_adapters({names!r})")
        once = tuple(dict.fromkeys(name for name in names if name is not None))
        given = {**{name: self._given[name] for name in once if name in self._given}, **(weights or {})}
        chosen = self._chosen(once, [given.get(name, 1.0) for name in once])
        self._parts.demand(chosen, names)
        for name in once:
            if (where := self._desk.book[name].not_by_row) and any(other != name for other in names):
                more = f" and {len(where) - 3} more" if len(where) > 3 else ""
                raise UsageError(
                    f"'{name}' changes {', '.join(where[:3])}{more}, which is not done for some rows of a batch only",
                    f"run these rows apart: live.set_adapters([{name!r}])",
                )
        now = self._desk.choice()
        before = self.active if now.before is None else now.before
        alike = once and all(name == once[0] for name in names)
        self._desk.choose(tuple(chosen), tuple(chosen.values()), None if alike else names, before)

    @contextmanager
    def using(self, names: str | Sequence[str], *, weights: Numbers | None = None) -> Iterator[Self]:
        """``set_adapters`` for a block; afterwards this context has chosen what it had before."""
        before, default = self._desk.choice(), self._desk.default
        self.set_adapters(names, weights=weights)
        try:
            yield self
        finally:
            if self._open:
                self._desk.put_back(before, default)

    def coverage(self) -> dict[str, tuple[str, ...]]:
        """For each adapter the targets that were never used since it came, as when the model never calls a module.

        In a compiled model a target counts once it is in a graph.
        """
        result = {}
        for name, adapter in self._desk.book.items():
            silent = (part for key, parts in adapter.parts.items() if key not in adapter.fired for part in parts)
            result[name] = tuple(dict.fromkeys(part.target.name for part in silent))
        return result

    # ---- exchanging

    def add(self, name: str, adapter: object, *, weight: float = 1.0, dropout: float = 0.0) -> None:
        """Attach one more adapter; nobody has chosen it yet.

        Args:
            name: what to call it.
            adapter: the adapter.
            weight: by which it is multiplied where nobody says otherwise.
            dropout: while the module that it changes is in training mode and its tensors want gradients, inputs of its
                own path are dropped with this chance, as by PEFT's ``lora_dropout``.

        Raises:
            UsageError: the name is taken, or a kind of the adapter has no such dropout.
            LorahubError: what merging it would raise; nothing changes then.
        """
        self._demand_open()
        if name in self._desk.book:
            raise UsageError(
                f"there is an adapter '{name}' already", f"live.swap({name!r}, ...) puts another in its place"
            )
        self._put(name, self._plan(name, adapter), dropout)
        self._given[name] = weight

    def swap(self, name: str, adapter: object) -> None:
        """Put another adapter in the place of ``name``, for everybody who chose it: at once, or not at all.

        A call of the model that is under way in another thread goes on with the former one.

        Raises:
            UsageError: there is none of that name.
            LorahubError: what merging it would raise; nothing changes then.
        """
        self._demand(name)
        self._put(name, self._plan(name, adapter), self._desk.book[name].dropout)

    def remove(self, name: str) -> None:
        """Take one adapter off.

        Raises:
            UsageError: there is none of that name, or somebody has chosen it.
        """
        self._demand(name)
        if name in self._desk.in_use():
            raise UsageError(f"'{name}' is chosen", "choose others first: live.set_adapters([...])")
        self._desk.exchange([name], {other: each for other, each in self._desk.book.items() if other != name})
        self._given.pop(name, None)
        self._planned.pop(name, None)
        self._parts.drop(name)

    def refresh(self) -> None:
        """Take notice of weights or factors that were changed in a way that leaves no trace."""
        self._demand_open()
        self._desk.refresh()

    def detach(self) -> None:
        """Take everything off; the model is what it was.  Doing it twice is no fault."""
        if not self._open:
            return
        self._open = False
        uninstall(self._model)
        self._parts.close()
        self._loader.remove()
        self._desk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- copying

    def carried(
        self, owner: object, again: Callable[[nn.Module, dict[int, Any]], object], recipe: Callable[[], Recipe]
    ) -> None:
        """Let ``owner`` have copies and pickles of the model; see ``Copies``."""
        self._desk.pickles = True
        Copies(self._model, self._desk, owner, again, recipe).install()

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> Live:
        """The same on a copy of the model, with copies of the adapters, chosen as by the context that copies it."""
        live = self._again(model)
        try:
            for name, (plan, adapter) in self._planned.items():
                deltas = {target: _twin(name, delta, memo) for target, delta in adapter.deltas.items()}
                live._put(name, (plan, _Twins(deltas)), self._desk.book[name].dropout)  # noqa: SLF001 - of its own class
                live._given[name] = self._given[name]  # noqa: SLF001
                live._let_act(name, self._parts.of(name))  # noqa: SLF001
            choice = self._desk.choice()
            live._desk.choose(choice.names, choice.weights, choice.by_row, choice.before)  # noqa: SLF001
        except BaseException:
            live.detach()
            raise
        return live

    def _put(self, name: str, planned: Planned, dropout: float) -> None:
        loaded = self._loader.load(name, *planned, dropout)
        self._desk.exchange([name], {**self._desk.book, name: loaded})
        self._planned[name] = planned

    def _let_act(self, name: str, parts: Sequence[OpenPart]) -> None:
        if parts:
            self._parts.put(name, parts, lambda: self.active.get(name, 0.0) != 0)

    # ---- demands

    def _demand_open(self) -> None:
        if not self._open:
            raise UsageError("these adapters were detached", "attach them again: lorahub.attach(model, {...})")

    def _demand(self, name: str) -> None:
        self._demand_open()
        if name not in self._desk.book:
            known = ", ".join(self._desk.book) or "none"
            raise UsageError(f"no adapter '{name}' is attached", f"attached: {known}")

    def _chosen(self, names: str | Sequence[str], weights: Numbers | None) -> dict[str, float]:
        self._demand_open()
        several = [names] if isinstance(names, str) else list(names)
        for name in several:
            self._demand(name)
        if len(set(several)) < len(several):
            raise UsageError("an adapter was named twice", "name each once, with the sum of its weights")
        given = {} if weights is None else for_each(weights, len(several))
        if not isinstance(given, Mapping):
            given = dict(zip(several, given, strict=True))
        elif unknown := sorted(given.keys() - set(several)):
            raise UsageError(f"weights name {', '.join(unknown)} and the names do not", "name those that are to act")
        return {name: finite(given.get(name, self._given[name]), whose=name) for name in several}

    def _demand_together(self, names: tuple[str, ...]) -> None:
        """Refuse what a merge of several would refuse; asked only where two of them replace the same parameter."""
        seen: set[int] = set()
        for name in names:
            replaced = {
                key for key, parts in self._desk.book[name].parts.items() if any(part.replaces for part in parts)
            }
            if replaced & seen:
                self._judge(names)
                return
            seen |= replaced


@dataclass(frozen=True, slots=True)
class _Twins:
    """Copies of an adapter's changes."""

    deltas: Mapping[Target, Delta]


def _twin(name: str, delta: Delta, memo: dict[int, Any]) -> Delta:
    """A copy of a change.

    Raises:
        UsageError: its tensors come out of a graph, of which there is no copy.
    """
    if any(not tensor.is_leaf for tensor in delta.tensors().values()):
        raise UsageError(
            f"'{name}' has tensors that are computed with gradients, and such tensors cannot be copied",
            "take it off before the model is copied: live.remove, or detach()",
        )
    return copy.deepcopy(delta, memo)
