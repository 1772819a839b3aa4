"""Methods of a pipeline that see it as it is: while they run, what was put on it is out of their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

__all__ = ["put_aside", "put_back"]


def put_aside(pipe: Any, names: Iterable[str], away: Callable[[], AbstractContextManager[None]]) -> None:
    """Run these of the pipeline's own methods, where it has them, within what ``away`` gives."""
    for name in names:
        if hasattr(pipe, name):
            vars(pipe)[name] = _within(away, getattr(pipe, name))


def put_back(pipe: Any, names: Iterable[str]) -> None:
    """Give the pipeline its own methods back."""
    for name in names:
        vars(pipe).pop(name, None)


def _within(away: Callable[[], AbstractContextManager[None]], method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with away():
            return method(*args, **kwargs)

    return call
