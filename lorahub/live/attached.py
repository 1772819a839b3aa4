"""A model with adapters attached: chosen, weighted, exchanged and taken off again, while its weights stay as they are.

Built from the plan of a merge, so that what is refused, found and placed there is so here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex
from lorahub.engine.folding.bind import HasDeltas
from lorahub.engine.planning.plan import Plan
from lorahub.errors import UsageError
from lorahub.live.desk import Desk
from lorahub.live.loading import Loader
from lorahub.live.parts import Parts

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
    changed one; ``parameters()`` and ``state_dict()`` always give the model's own, and copies and pickles of the model
    are without adapters.  Writing through ``parameter.data`` goes unnoticed: call ``refresh`` then.
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

        Raises:
            UsageError: adapters are attached to the model, or to a part of it, already.
        """
        self._plan, self._judge = plan, judge
        self._desk = Desk(capacity)
        self._loader = Loader(model, index, framework, self._desk, inside=compat == "peft")
        self._parts = Parts(model, framework) if parts is None else parts
        self._given: dict[str, float] = {}
        self._open = True

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
        """Which adapter each row of the batch takes; None where all rows take the same."""
        return self._desk.choice().by_row

    @adapter_names.setter
    def adapter_names(self, names: Sequence[str | None] | None) -> None:
        if names is None:
            raise UsageError(
                "adapter_names takes one name for each row", "for all rows alike: live.set_adapters([...])"
            )
        self.set_rows(names)

    def set_adapters(self, names: Sequence[str], *, weights: Sequence[float] | None = None) -> None:
        """Let these adapters act on all rows, together, from the next call on; none for the model as it is.

        Args:
            names: which.
            weights: one for each; those they were attached with by default.

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
        if once and all(name == once[0] for name in names):
            self._desk.choose(tuple(chosen), tuple(chosen.values()))
        else:
            self._desk.choose(tuple(chosen), tuple(chosen.values()), names)

    @contextmanager
    def using(self, names: Sequence[str], *, weights: Sequence[float] | None = None) -> Iterator[Self]:
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
        loaded = self._loader.load(name, *self._plan(name, adapter), dropout)
        self._given[name] = weight
        self._desk.exchange([name], {**self._desk.book, name: loaded})

    def swap(self, name: str, adapter: object) -> None:
        """Put another adapter in the place of ``name``, for everybody who chose it: at once, or not at all.

        A call of the model that is under way in another thread goes on with the former one.

        Raises:
            UsageError: there is none of that name.
            LorahubError: what merging it would raise; nothing changes then.
        """
        self._demand(name)
        loaded = self._loader.load(name, *self._plan(name, adapter), self._desk.book[name].dropout)
        self._desk.exchange([name], {**self._desk.book, name: loaded})

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
        self._parts.close()
        self._loader.remove()
        self._desk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- demands

    def _demand_open(self) -> None:
        if not self._open:
            raise UsageError("these adapters were detached", "attach them again: lorahub.attach(model, {...})")

    def _demand(self, name: str) -> None:
        self._demand_open()
        if name not in self._desk.book:
            known = ", ".join(self._desk.book) or "none"
            raise UsageError(f"no adapter '{name}' is attached", f"attached: {known}")

    def _chosen(self, names: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
        self._demand_open()
        if isinstance(names, str):
            raise UsageError(f"{names!r} is one name and not a list of names", f"write [{names!r}]")
        for name in names:
            self._demand(name)
        if len(set(names)) < len(names):
            raise UsageError("an adapter was named twice", "name each once, with the sum of its weights")
        given = [self._given[name] for name in names] if weights is None else list(weights)
        if len(given) != len(names):
            raise UsageError(f"{len(given)} weights for {len(names)} adapters", "give one weight per adapter")
        return dict(zip(names, map(_number, given), strict=True))

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


def _number(weight: float) -> float:
    number = float(weight)
    if number - number != 0:
        raise UsageError(f"a weight is {weight}", "give a finite number")
    return number
