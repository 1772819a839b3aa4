"""mergekit's parameters as rules of a recipe: precedence, then filters, then numbers over depth.

A filter of mergekit's is part of a tensor's name, and where none fits the next scope counts; here it is a pattern, and
the scopes become one list.  Knows no methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorahub.composition.mergekit.methods import WHOLE_NUMBERS
from lorahub.errors import RecipeError
from lorahub.names import printable

__all__ = ["Settings"]


class Settings:
    """Parameters as mergekit resolves them: by precedence, then filters, then depth."""

    def __init__(self, refuse: Callable[..., RecipeError], layers: int | None) -> None:
        self._refuse = refuse
        self._layers = layers

    def one(self, name: str, scopes: Sequence[Mapping[str, Any] | None], default: float | bool | None) -> Any:
        """What a parameter is, as a recipe says it.

        Args:
            name: the parameter.
            scopes: from the highest precedence to the lowest.
            default: mergekit's own; None where it has none.
        """
        found: list[dict[str, Any]] = []
        for scope in scopes:
            if scope is not None and name in scope:
                for pattern, value in self._cases(name, scope[name]):
                    said = self._switch(name, value) if isinstance(default, bool) else self._value(name, value)
                    if pattern is None:
                        return self._chain(name, found, said)
                    found.append({"filter": pattern, "value": said, "optional": True})
        if default is not None:
            return self._chain(name, found, default)
        if not found:
            raise self._refuse(f"the parameter {name} is missing", f"add {name} to the models or to parameters")
        return found

    def _chain(self, name: str, found: list[dict[str, Any]], last: Any) -> Any:
        if not found:
            return last
        if isinstance(last, bool) or name in WHOLE_NUMBERS:
            raise self._refuse(f"{name} differs by filter, and here it is one for all", "make two recipes of it")
        return [*found, {"value": last}]

    def _cases(self, name: str, setting: Any) -> Iterator[tuple[str | None, Any]]:
        """(pattern, value), in order; None fits everything."""
        conditions = [setting] if isinstance(setting, dict) else setting
        if not (isinstance(conditions, list) and conditions and all(isinstance(each, dict) for each in conditions)):
            if conditions != []:  # an empty list says nothing, and the next scope counts
                yield None, setting
            return
        for each in conditions:
            if "value" not in each:
                raise self._refuse(f"{name}: a filter without value")
            said = each.get("filter")
            if said is None or said in ("*", ""):
                yield None, each["value"]
                return
            if not isinstance(said, str) or "*" in said:
                raise self._refuse(
                    f"{name}: the filter {printable(str(said))} is part of a name in mergekit, and '*' is in no name",
                    "write the part without it",
                )
            yield f"*{said}*", each["value"]

    def _switch(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool) and value not in (0, 1):
            raise self._refuse(f"{name} is {printable(repr(value))}", "write true or false")
        return bool(value)

    def _value(self, name: str, value: Any) -> Any:
        """A number, or numbers over depth; layers outside get the first, as mergekit has it."""
        if not isinstance(value, list):
            number = self._number(name, value)
            return int(number) if name in WHOLE_NUMBERS and number.is_integer() else number
        if not value:
            raise self._refuse(f"{name}: an empty list")
        numbers = [self._number(name, each) for each in value]
        if name in WHOLE_NUMBERS:
            raise self._refuse(f"{name} differs by depth, and here it is one for all", "write one number")
        layers = {} if self._layers is None else {"layers": self._layers}
        return {"gradient": numbers, **layers, "elsewhere": numbers[0]}

    def _number(self, name: str, value: Any) -> float:
        """A number; text such as 1e-3, which YAML does not take for one, is read as mergekit reads it."""
        try:
            if isinstance(value, int | float | str):
                return float(value)
        except (ValueError, OverflowError):
            pass
        raise self._refuse(f"{name} is {printable(repr(value)[:80])}, and must be a number")
