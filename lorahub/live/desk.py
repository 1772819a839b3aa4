"""Which adapters act, in this context and at this moment: what hooks and lookups ask each time they are reached.

A choice belongs to a context (a thread, an asyncio task).  Contexts that never chose follow the thread that attached
the adapters.  What a choice makes of every spot is a view, filled as the model runs and shared by contexts that chose
alike.  A view is read and never changed once it is filled, so that adapters can be exchanged while others compute.

Under ``torch.compile`` views are filled before the graph reads them: weights and factors are inputs of the graph, and
other numbers in them do not compile it again.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias, final

from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.live.effective import Addend, changed, state_of
from lorahub.live.entries import ByRow, Entry, Stack, entry_of, in_graph, row_entry, stack_of
from lorahub.live.grouped import Rows
from lorahub.live.lookup import stand_for
from lorahub.live.short import Short, short_at
from lorahub.live.spots import Loaded, Part, Spot, Way
from lorahub.live.tensor_parallel import is_part, refused

__all__ = ["Choice", "Desk", "View"]

STACKS = 64
"""How many choices keep their factors stacked and converted for the next time they are made."""

WEIGHTS = 2
"""How many choices keep changed weights, each as large as the parameters it changes, besides those that are in use."""


@final
@dataclass(slots=True, eq=False)
class Kept:
    """A changed weight, and what it was made from."""

    value: torch.Tensor
    state: tuple[object, ...]
    parts: tuple[tuple[Part, float], ...]

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted for what is added."""
        return any(part.trains for part, _ in self.parts)

    def addends(self) -> list[Addend]:
        """What is added."""
        return [part.addend(strength) for part, strength in self.parts]

    def now(self, own: torch.Tensor) -> tuple[object, ...]:
        """The state of everything that it would be made from now."""
        used = (tensor for part, _ in self.parts for tensor in (*part.delta.tensors().values(), *part.reads()))
        return state_of(own, *used)


Act: TypeAlias = "Entry | ByRow"

_UNSEEN = Kept.__new__(Kept)


@final
@dataclass(slots=True, eq=False)
class View:
    """What one choice does.

    Attributes:
        adapters: the adapters in it.
        strengths: a weight for each.
        rows: which adapter each row of a batch takes, or None: all rows take all.
        acts: spot -> what is added to the output there, or None.
        kept: spot -> what stands in the parameter's place, or None.
        shorts: spot -> the way around its weight that training takes, or None.
        parted: the same with the adapters of each dropout apart, once somebody asked.
    """

    adapters: tuple[Loaded, ...]
    strengths: tuple[float, ...]
    rows: Rows | None
    acts: dict[int, Act | None] = field(default_factory=dict)
    kept: dict[int, Kept | None] = field(default_factory=dict)
    shorts: dict[int, Short | None] = field(default_factory=dict)
    parted: tuple[tuple[float, View], ...] = ()
    trains: bool = field(init=False)
    dropout: float | None = field(init=False)

    def __post_init__(self) -> None:
        """``trains``: gradients are wanted for an adapter's tensors; ``dropout``: the most of all, or None."""
        self.trains = any(adapter.trains for adapter in self.adapters)
        self.dropout = max((adapter.dropout for adapter in self.adapters), default=0.0) or None


@final
@dataclass(slots=True, eq=False, weakref_slot=True)
class Choice:
    """What a context chose: names, weights and rows, and the view of that, exchanged when adapters are.

    ``before``: of a choice by row, what all rows took together before, with weights.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    by_row: tuple[str | None, ...] | None
    view: View | None
    before: Mapping[str, float] | None = None


@final
@dataclass(frozen=True, slots=True)
class _Pin:
    view: View | None


_DESKS: weakref.WeakValueDictionary[int, Desk] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@final
class Desk:
    """The spots of one model, and the choices that contexts made.

    Attributes:
        spots: by key.
        book: the adapters by name.
        compiled: a graph was made that reads views, so they are filled as soon as they are made.
        read: the complements of keys, of parameters that such graphs read apart from their modules.
        pickles: whether pickles of the model take the adapters along.
    """

    def __init__(self, capacity: int) -> None:
        self.spots: dict[int, Spot] = {}
        self.book: dict[str, Loaded] = {}
        self.compiled = False
        self.read: set[int] = set()
        self.pickles = False
        self._capacity = capacity
        self._chosen: ContextVar[Choice | None] = ContextVar("lorahub_choice", default=None)
        self._pinned: ContextVar[_Pin | None] = ContextVar("lorahub_pin", default=None)
        self._default = Choice((), (), None, None)
        self._owner = threading.get_ident()
        self._choices: weakref.WeakSet[Choice] = weakref.WeakSet([self._default])
        self._views: OrderedDict[object, View] = OrderedDict()
        self._stacks: OrderedDict[tuple[Loaded, ...], dict[int, Stack | None]] = OrderedDict()
        self._lock = threading.RLock()
        self.number = next(_NUMBERS)
        mark: Callable[[object], object] = torch.compiler.assume_constant_result
        mark(_fill_read_before_tracing)
        mark(_fill_before_tracing)  # not at import, which needs no torch
        _DESKS[self.number] = self

    # ---- what hooks and lookups ask

    def view(self) -> View | None:
        """What acts now; None: nothing."""
        view = self.now()
        if view is not None and torch.compiler.is_compiling():
            _fill_before_tracing(self.number)
        return view

    def now(self) -> View | None:
        """The same, filled or not."""
        pin = self._pinned.get()
        return (self._chosen.get() or self._default).view if pin is None else pin.view

    def weight(self, view: View, key: int, own: torch.Tensor) -> torch.Tensor:
        """What stands in the place of a parameter now.

        Args:
            view: what acts.
            key: of the spot, where the module reads it whose output the hook adds to; else its complement.
            own: the parameter.

        Raises:
            UsageError: rows of the batch take adapters of their own, and someone reads what is all rows' alike.
        """
        if torch.compiler.is_compiling():
            if key >= 0 and view.trains and self.short(view, key) is not None:
                return own  # the hook does what the change would
            if key < 0:
                _fill_read_before_tracing(self.number, key)
            kept = view.kept[key]
            if kept is None:
                return own
            return changed(own, kept.addends(), training=kept.trains) if self._grows(kept.parts, own) else kept.value
        return self._weight(view, key, own)

    def act(self, view: View, key: int, y: torch.Tensor) -> Act | None:
        """What is added at a spot, made at its first use."""
        try:
            return view.acts[key]
        except KeyError:
            return self._act(view, key, y.dtype, y.device)

    def refit(self, view: View, key: int, y: torch.Tensor) -> Act | None:
        """What is added at a spot, for outputs of another dtype or on another device than before.

        In a graph that is being made this is part of it, and nothing is kept.
        """
        act = view.acts.get(key)
        if torch.compiler.is_compiling() and isinstance(act, Entry):
            return in_graph(act, view.adapters, y)
        return self._act(view, key, y.dtype, y.device)

    def short(self, view: View, key: int) -> Short | None:
        """The way around the weight of a spot, where there is one and it is of use now."""
        try:
            found = view.shorts[key]
        except KeyError:
            found = self._short(view, key)
        return found if found is not None and found.trains() else None

    def parted(self, view: View) -> tuple[tuple[float, View], ...]:
        """The view as several, for inputs of which different shares are dropped: (how many, view).

        Raises:
            UsageError: rows of the batch take adapters of their own, which differ in that.
        """
        if not view.parted:
            view.parted = self._parted(view)
        return view.parted

    def pin(self) -> None:
        """Let the model go on to the end of this call with what acts now, whatever is exchanged meanwhile."""
        self._pinned.set(_Pin((self._chosen.get() or self._default).view))

    def unpin(self) -> None:
        """The call is over."""
        self._pinned.set(None)

    # ---- choosing

    def choice(self) -> Choice:
        """What this context chose, or what it follows."""
        return self._chosen.get() or self._default

    def choose(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        by_row: Sequence[str | None] | None = None,
        before: Mapping[str, float] | None = None,
    ) -> None:
        """Choose for this context; and for those that never chose, in the thread that attached."""
        rows = None if by_row is None else tuple(by_row)
        choice = Choice(tuple(names), tuple(weights), rows, None, before)
        with self._lock:
            choice.view = self._look(choice)
            self._choices.add(choice)
            self._chosen.set(choice)
            self._pinned.set(None)
            if threading.get_ident() == self._owner:
                self._default = choice

    def put_back(self, choice: Choice, default: Choice) -> None:
        """Choose what was chosen before."""
        with self._lock:
            self._chosen.set(choice)
            if threading.get_ident() == self._owner:
                self._default = default

    @property
    def default(self) -> Choice:
        """What contexts follow that never chose."""
        return self._default

    def exchange(self, names: Sequence[str], book: dict[str, Loaded]) -> None:
        """Let ``book`` be the adapters; every choice with one of ``names`` in it gets a new view, all at once."""
        with self._lock:
            again = [choice for choice in self._choices if not set(names).isdisjoint(choice.names)]
            gone = {self.book[name] for name in names if name in self.book}
            before, self.book = self.book, book
            try:
                views = [self._look(choice) for choice in again]  # all of them are ready before the first is seen
            except BaseException:
                self.book = before
                raise
            for choice, view in zip(again, views, strict=True):
                choice.view = view
            for kept in [each for each in self._stacks if not gone.isdisjoint(each)]:
                del self._stacks[kept]
            for identity in [each for each, view in self._views.items() if not gone.isdisjoint(view.adapters)]:
                del self._views[identity]

    def refresh(self) -> None:
        """Make everything anew at its next use."""
        with self._lock:
            self._stacks.clear()
            self._views.clear()
            for choice in self._choices:
                choice.view = self._look(choice)

    def in_use(self) -> set[str]:
        """The adapters that some context has chosen."""
        with self._lock:
            return {name for choice in self._choices for name in choice.names}

    def close(self) -> None:
        """Nothing acts any more, in any context, and nothing is kept."""
        with self._lock:
            self.book = {}
            for choice in self._choices:
                choice.view, choice.names = None, ()
            self._views.clear()
            self._stacks.clear()
            self._chosen.set(None)
            self._pinned.set(None)

    def fill(self, view: View) -> None:
        """Make everything that a view holds, as for the parameters' own dtypes and devices."""
        if view.dropout is not None:
            for _, part in self.parted(view):
                if part is not view:
                    self._fill_acts(part)
        self._fill_acts(view)
        for key, spot in self.spots.items():
            if view.trains and key not in view.shorts:
                self._short(view, key)
            for each in (key, ~key) if spot.quantised is None else ():
                if each not in view.kept and (each >= 0 or each in self.read):
                    self._weight(view, each, spot.place.raw())

    def _fill_acts(self, view: View) -> None:
        for key, spot in self.spots.items():
            if spot.site is not None and key not in view.acts:
                self._act(view, key, *spot.form)

    # ---- making

    def _look(self, choice: Choice) -> View | None:
        if not choice.names:
            return None
        rows = None if choice.by_row is None else Rows(choice.by_row)
        names = choice.names if rows is None else rows.adapters
        strengths = dict(zip(choice.names, choice.weights, strict=True))
        adapters = tuple(self.book[name] for name in names)
        identity = (adapters, tuple(strengths[name] for name in names), choice.by_row)
        view = self._views.pop(identity, None) or View(adapters, identity[1], rows)
        if self.compiled or self._capacity:  # what does not fit is refused at once
            self.fill(view)
        self._views[identity] = view
        self._thin()
        return view

    def _thin(self) -> None:
        """Let go of what was chosen long ago, and sooner of what is large."""
        while len(self._views) > STACKS:
            self._views.popitem(last=False)
        chosen = {id(choice.view) for choice in self._choices}
        for identity, view in list(self._views.items())[:-WEIGHTS]:
            if view.rows is not None:
                del self._views[identity]
            elif id(view) not in chosen:
                view.kept.clear()

    def _act(self, view: View, key: int, dtype: torch.dtype, device: torch.device) -> Act | None:
        spot = self.spots[key]
        ways = (Way.LOW_RANK, Way.OWN, Way.CHANGE) if view.rows is None else tuple(Way)
        for adapter in view.adapters:
            if adapter.takes(key, *ways):
                adapter.fired.add(key)
        act: Act | None
        if view.rows is not None:
            act = row_entry(spot, view.adapters, view.strengths, view.rows, device)
        else:
            stack = self._stack(spot, view.adapters, dtype, device)
            act = entry_of(spot, view.adapters, view.strengths, stack, device)
        view.acts[key] = act
        return act

    def _short(self, view: View, key: int) -> Short | None:
        short = None
        if view.trains and view.rows is None:
            short = short_at(self.spots[key], self.spots.values(), view.adapters, view.strengths)
        if short is not None:
            for adapter in view.adapters:
                if adapter.takes(key, Way.WEIGHT, Way.CHANGE):
                    adapter.fired.add(key)
        view.shorts[key] = short
        return short

    def _parted(self, view: View) -> tuple[tuple[float, View], ...]:
        chances = {adapter.dropout for adapter in view.adapters}
        if len(chances) == 1 and (len(view.adapters) == 1 or view.rows is not None):
            return ((chances.pop(), view),)
        if view.rows is not None:
            raise UsageError(
                "rows of this batch take adapters that differ in their dropout",
                "give them the same dropout, or run their rows apart",
            )
        given = list(zip(view.adapters, view.strengths, strict=True))
        split = []
        for chance in sorted(chances):
            of = [pair for pair in given if pair[0].dropout == chance]
            split += [(chance, [pair]) for pair in of] if chance else [(chance, of)]  # each has a mask of its own
        return tuple(
            (chance, View(tuple(one for one, _ in some), tuple(by for _, by in some), None)) for chance, some in split
        )

    def _stack(
        self, spot: Spot, adapters: tuple[Loaded, ...], dtype: torch.dtype, device: torch.device
    ) -> Stack | None:
        with self._lock:
            stacks = self._stacks.pop(adapters, None)
            stacks = {} if stacks is None else stacks
            self._stacks[adapters] = stacks
            while len(self._stacks) > STACKS:
                self._stacks.popitem(last=False)
        stack = stacks.get(spot.key)
        if stack is None or stack.anew or not stack.fits(dtype, device):
            stack = stacks[spot.key] = stack_of(spot, adapters, dtype, device, self._capacity)
        return stack

    def _weight(self, view: View, key: int, own: torch.Tensor) -> torch.Tensor:
        if key >= 0 and view.trains and self.short(view, key) is not None:
            return own
        kept = view.kept.get(key, _UNSEEN)
        if kept is _UNSEEN:
            kept = view.kept[key] = self._keep(view, key, own)
        if kept is None:
            return own
        if self._grows(kept.parts, own):  # made anew each time, since a graph can be gone through once
            return stand_for(changed(own, kept.addends(), training=kept.trains), own)
        if kept.state != kept.now(own):
            kept = view.kept[key] = self._keep(view, key, own)
            assert kept is not None
        return kept.value

    def _keep(self, view: View, key: int, own: torch.Tensor) -> Kept | None:
        spot = self.spots[key if key >= 0 else ~key]
        ways = (Way.WEIGHT,) if key >= 0 else tuple(Way)  # the hook adds the others
        parts = tuple(
            (part, strength)
            for adapter, strength in zip(view.adapters, view.strengths, strict=True)
            for part in adapter.takes(spot.key, *ways)
        )
        if not parts or (view.rows is not None and key >= 0):
            return None
        if view.rows is not None:
            raise UsageError(
                f"{spot.place.name} is used apart from its module, for all rows of the batch alike, so that rows "
                "cannot take adapters of their own there",
                "run rows of different adapters apart: live.set_adapters([...])",
            )
        if is_part(own, spot.shape):
            raise refused(spot.place.name, "only changes of low rank can be added in parts")
        for adapter in view.adapters:
            if adapter.takes(spot.key, *ways):
                adapter.fired.add(spot.key)
        kept = Kept(own, (), parts)
        with torch.inference_mode(False), torch.no_grad():
            kept.value = stand_for(changed(own, kept.addends()), own)
        kept.state = kept.now(own)
        return kept

    @staticmethod
    def _grows(parts: Sequence[tuple[Part, float]], own: torch.Tensor) -> bool:
        """Whether gradients are wanted through a changed weight."""
        return torch.is_grad_enabled() and (own.requires_grad or any(part.trains for part, _ in parts))


def _fill_read_before_tracing(number: int, key: int) -> bool:
    """The same for a parameter that is read apart from its module, so that every later view holds it too."""
    desk = _DESKS[number]
    desk.read.add(key)
    view = desk.now()
    if view is not None:
        desk.fill(view)
    return True


def _fill_before_tracing(number: int) -> bool:
    """Fill what acts in this context, while a graph is made and before it reads it."""
    desk = _DESKS[number]
    desk.compiled = True
    view = desk.now()
    if view is not None:
        desk.fill(view)
    return True
