"""The demo's table: one line a step, printed when the step is done, and the failure that ends it.

Knows nothing of what the steps do.
"""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["StepFailed", "Table", "expect"]

TITLE = 36
"""Width of the column of titles."""


class StepFailed(Exception):
    """Something came out other than it must."""


def expect(what: str, came: Any, wanted: Any) -> None:
    """Raise ``StepFailed`` unless ``came == wanted``."""
    if came != wanted:
        raise StepFailed(f"{what}\n  expected: {wanted}\n  came:     {came}")


@dataclass(slots=True)
class Table:
    """Lines of number, seconds, step, what was found."""

    done: int = 0
    found: str = ""
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Run one step; the block sets ``found``, a line for each thing.  A failure names the step."""
        begun, self.found = time.perf_counter(), ""
        try:
            yield
        except StepFailed as failure:
            raise StepFailed(f"step {self.done + 1}, {title}: {failure}") from None
        except Exception as error:  # whatever it is, the reader must learn in which step
            raise StepFailed(f"step {self.done + 1}, {title}: {type(error).__name__}: {error}") from error
        self.done += 1
        head = f"{self.done:2} {time.perf_counter() - begun:6.1f} s  {title:<{TITLE}}"
        room = max(50, min(140, shutil.get_terminal_size((140, 24)).columns) - len(head) - 1)
        lines = [part for line in self.found.splitlines() for part in textwrap.wrap(line, room)]
        print(f"\n{'':{len(head) + 1}}".join([f"{head} {lines[0]}", *lines[1:]]), flush=True)

    def end(self) -> None:
        """The closing line."""
        print(f"\nall {self.done} steps as expected, in {time.perf_counter() - self.started:.0f} s", flush=True)
