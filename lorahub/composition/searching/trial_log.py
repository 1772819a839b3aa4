"""A log of trials: lines of JSON, each on the disk before the next is evaluated, from which a search goes on.

Knows numbers and one file; nothing of what is searched for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, final

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.atomic import write_failed
from lorahub.files.locks import Lock

__all__ = ["Journal", "Point", "as_loss", "finite_or_none"]

Point: TypeAlias = tuple[float, ...]
"""One number for each weight that is looked for."""

_BINARY: int = getattr(os, "O_BINARY", 0)  # Windows would write other ends of lines

_LINE = 1 << 22
"""Bytes of the longest line that is read: a trial of some ten thousand weights."""


@final
class Journal:
    """Trials as lines of JSON, each on the disk before the next is evaluated.

    The first line says what is searched for; a log of another search is refused.  A line that a killed process left
    without its end is taken off.  One process at a time writes it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, JSON]) -> None:
        """Open a log, or begin it.

        Args:
            path: where it lies; None keeps nothing.
            identity: what else decides the course of the search, in JSON-ready values.

        Raises:
            UsageError: the file is no log, or of another search.
            IntegrityError: a line in it is malformed.
            WriteFailed: it cannot be written, or another process writes it.
        """
        self._known: dict[tuple[str, int], tuple[Point, float]] = {}
        self._told: dict[str, JSON] = {key: identity[key] for key in ("optimiser", "seed") if key in identity}
        self._handle: int | None = None
        self._lock: Lock | None = None
        if path is None:
            return
        self._path = Path(path)
        first = f"{strict_json.compact({'search': dict(identity)})}\n".encode()
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
            self._lock = Lock(self._path)
            self._take_up(first)
        except OSError as error:
            self.close()
            raise write_failed(self._path, error) from None
        except BaseException:
            self.close()
            raise

    def _take_up(self, first: bytes) -> None:
        assert self._handle is not None
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines and not first.startswith(raw):
            raise self._foreign()
        if lines and f"{lines[0].decode(errors='replace')}\n".encode() != first:
            raise self._foreign(lines[0], first)
        for number, line in enumerate(lines[1:], start=2):
            self._read(number, line)
        if len(whole) < len(raw):
            os.ftruncate(self._handle, len(whole))
        if not lines:
            self._append(first)

    def _foreign(self, found: bytes = b"", wanted: bytes = b"") -> UsageError:
        hint = "name another log, or remove this one"
        try:
            one, other = (strict_json.read(each, limit=_LINE)["search"] for each in (found, wanted))
            differ = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        except (strict_json.NotStrict, KeyError, TypeError, AttributeError):
            return UsageError(f"{self._path} is no log of a search", hint)
        return UsageError(f"{self._path} is the log of a search with other {', '.join(differ)}", hint)

    def _read(self, number: int, line: bytes) -> None:
        try:
            said = strict_json.read(line, limit=_LINE)
            weights = tuple(float(each) for each in said["weights"])
            loss = math.nan if said["loss"] is None else float(said["loss"])
            key = str(said["of"]), int(said["trial"])
        except (strict_json.NotStrict, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{self._path}, line {number}: no trial ({error})", "remove that line and all after it"
            ) from None
        self._known.setdefault(key, (weights, loss))

    def loss(self, of: str, number: int, weights: Point, evaluate: Callable[[], float]) -> float:
        """What a trial came to, as recorded, or evaluated now and recorded; NaN where that is no finite number.

        Raises:
            UsageError: other weights are recorded: the optimiser is another release, or the log was changed.
            WriteFailed: it cannot be recorded.
        """
        found = self._known.get((of, number))
        if found is not None:
            if found[0] != weights:
                raise UsageError(
                    f"{self._path} has other weights for trial {number} of the {of} than are proposed now",
                    "another release of the optimiser proposes otherwise: go on with that one, or name another log",
                )
            return found[1]
        loss = as_loss(evaluate())
        self._known[of, number] = weights, loss
        said = {"of": of, "trial": number, "weights": [*weights], "loss": finite_or_none(loss), **self._told}
        self._append(f"{strict_json.compact(said)}\n".encode())
        return loss

    def _append(self, line: bytes) -> None:
        if self._handle is None:
            return
        try:
            written = os.write(self._handle, line)  # in one piece, so that others see all of it or none
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError as error:
            raise write_failed(self._path, error) from None

    def close(self) -> None:
        """Let go of the file; twice does no harm."""
        if self._lock is not None:
            self._lock.release()
        if self._handle is not None:
            with suppress(OSError):  # every line is on the disk already
                os.close(self._handle)
        self._lock = self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_loss(value: object) -> float:
    """A number as an objective gives it; NaN where it is not finite.

    Raises:
        UsageError: it is no number.
    """
    detach = getattr(value, "detach", None)
    try:
        number = float(value if detach is None else detach())  # type: ignore[arg-type]  # whatever is a number says so
    except (TypeError, ValueError, RuntimeError):  # the last from tensors of several elements
        raise UsageError(
            f"the objective gave a {type(value).__name__} and no number", "return one float, to be minimised"
        ) from None
    return number if math.isfinite(number) else math.nan


def finite_or_none(number: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return number if math.isfinite(number) else None
