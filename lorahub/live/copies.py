"""What becomes of a model with adapters when it is copied or pickled: the copy has them too, and they are its own.

Hooks and lookups belong to one model and are left out of every copy.  Once the whole of it is copied, whoever attached
the adapters attaches them to the copy anew.  A copy of a part of the model could not have them, and is refused rather
than made without.  Knows modules; no adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, final

from lorahub.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Bound",
    "Copies",
    "Recipe",
    "demand_whole",
    "owner_of",
    "pickled_hook",
    "pickled_lookup",
    "unattached",
    "uninstall",
]


class Recipe(Protocol):
    """What a pickle of a model holds, besides the model, to have its adapters again."""

    def on(self, model: nn.Module) -> object:
        """Attach them to what was unpickled."""


def unattached(*_: object) -> None:
    """What stands in a copy where a hook was, until the copy is whole: nothing happens."""


def _unattached() -> Callable[..., None]:
    return unattached


def _apart(*_: object) -> None:
    """What stands in a pickle where a hook was, and stays there where only a part of the model was pickled."""
    raise UsageError(
        "this is a part of a model with adapters, which was pickled without the rest and without them",
        "pickle the whole model, or take the adapters off before: detach()",
    )


def _stands_apart() -> Callable[..., None]:
    return _apart


class Bound:
    """Something that is called by one model, and by no copy of it."""

    __slots__ = ()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return unattached

    def __reduce__(self) -> tuple[Any, ...]:
        return _unattached, ()


def demand_whole(desk: object, memo: dict[int, Any]) -> None:
    """Refuse to copy a part of a model.

    Args:
        desk: of the adapters on the model.
        memo: as ``copy.deepcopy`` passes it on.

    Raises:
        UsageError: the whole of the model is not being copied.
    """
    if id(desk) not in memo:
        raise UsageError(
            "this copies a part of a model with adapters, which would be without them",
            "copy the whole model, or take the adapters off before: detach()",
        )


def pickled_hook(desk: Any) -> tuple[Any, ...]:
    """What a pickle holds where a hook was, as ``__reduce__`` has it.

    Raises:
        UsageError: the adapters cannot be pickled with their model.
    """
    _demand_pickling(desk.pickles)
    return _stands_apart, ()


def pickled_lookup(desk: Any, plain: dict[str, Any]) -> tuple[Any, ...]:
    """The same for a dictionary of parameters."""
    _demand_pickling(desk.pickles)
    return dict, (), None, None, iter(plain.items())


def _demand_pickling(able: bool) -> None:
    if not able:
        raise UsageError(
            "this pickles a model with adapters attached, which would be without them",
            "take them off before (live.detach()) and attach them to what is loaded; copy.deepcopy takes them along",
        )


@final
class Copies:
    """How copies of one model are made; it lies on the model, where ``copy`` and ``pickle`` look for such a thing."""

    def __init__(
        self,
        model: nn.Module,
        desk: object,
        owner: object,
        again: Callable[[nn.Module, dict[int, Any]], object],
        recipe: Callable[[], Recipe] | None = None,
    ) -> None:
        """Nothing is put on the model yet.

        Args:
            model: the model.
            desk: of the adapters on it.
            owner: what people choose, weigh, train and detach them by.
            again: attaches them to a copy, given the memo that it was made with.
            recipe: what a pickle takes along; None: the model is not pickled.
        """
        self.owner = owner
        self._model, self._desk, self._again, self._recipe = model, desk, again, recipe

    def install(self) -> None:
        """Let copies be made so from now on."""
        vars(self._model)[_COPY] = self
        if self._recipe is not None:
            vars(self._model)[_PICKLE] = _Pickling(self._model, self._recipe)

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the model, as ``copy.deepcopy`` asks for it."""
        memo[id(self._desk)] = None  # tells hooks and lookups that the whole is copied
        own = getattr(type(self._model), _COPY, None)
        made: nn.Module = _copied(self._model, memo) if own is None else own(self._model, memo)
        _cleared(made)
        self._again(made, memo)
        return made

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return unattached

    def __reduce__(self) -> tuple[Any, ...]:
        return _unattached, ()


_COPY, _PICKLE = "__deepcopy__", "__reduce_ex__"


class _Pickling(Bound):
    """How pickles of one model are made."""

    def __init__(self, model: nn.Module, recipe: Callable[[], Recipe]) -> None:
        self._model, self._recipe = model, recipe

    def __call__(self, protocol: int) -> tuple[Any, ...]:
        """As ``__reduce_ex__``: the model's own, and what is done once its state is there."""
        reduced = type(self._model).__reduce_ex__(self._model, protocol)
        assert isinstance(reduced, tuple)  # modules are no singletons
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        return make, args, (state, self._recipe()), items, pairs, _unpickled


def _unpickled(model: Any, given: tuple[Any, Recipe]) -> None:
    """Give an unpickled model its state, and its adapters."""
    state, recipe = given
    if state is not None:
        model.__setstate__(state)
    _cleared(model)
    recipe.on(model)


def _copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy`` makes of a module whose class leaves it to that."""
    reduced = type(model).__reduce_ex__(model, 4)
    assert isinstance(reduced, tuple)  # as above
    make, args, state = (*reduced, None)[:3]
    made: Any = make(*copy.deepcopy(args, memo))
    memo[id(model)] = made  # before the state, in which the model may be met again
    made.__setstate__(copy.deepcopy(state, memo))
    return made


def owner_of(model: nn.Module) -> object:
    """What the adapters on a model are chosen, weighed, trained and detached by, or None."""
    found = vars(model).get(_COPY)
    return found.owner if isinstance(found, Copies) else None


def uninstall(model: nn.Module) -> None:
    """Let the model be copied and pickled as ever."""
    if isinstance(vars(model).get(_COPY), Copies):
        del vars(model)[_COPY]
        vars(model).pop(_PICKLE, None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ABOUT_HOOKS = (
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks_with_kwargs",
)


def _cleared(model: nn.Module) -> None:
    """Take out of a copy what stands where its original had hooks, and methods of its own."""
    for name in [name for name, value in vars(model).items() if _stands_in(value)]:
        del vars(model)[name]
    for module in model.modules():
        gone = [number for store in _HOOKS for number, hook in vars(module)[store].items() if _stands_in(hook)]
        for store in (*_HOOKS, *_ABOUT_HOOKS) if gone else ():
            for number in gone:
                vars(module)[store].pop(number, None)


def _stands_in(value: object) -> bool:
    return value is unattached or value is _apart
