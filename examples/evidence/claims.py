"""What every script of this folder shares: a claim beside what came out here, printed and written into the page.

The tables of ``docs/evidence.md`` stand between two comments that name the script; ``--write`` puts new ones there.
Knows nothing of what is claimed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["PAGE", "Row", "WrongClaim", "demand", "main", "table", "take_turns"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
HEAD = ("claim", "formula", "paper", "here")
VERSIONS = ("torch", "transformers", "lorahub-core")


class WrongClaim(Exception):
    """Something came out other than its formula says."""


@dataclass(frozen=True, slots=True)
class Row:
    """One claim: what is said, what it follows from, the literature's figure, and what came here."""

    claim: str
    formula: str
    paper: str
    here: str


def demand(what: str, came: object, wanted: object) -> None:
    """Raise ``WrongClaim`` unless ``came == wanted``."""
    if came != wanted:
        raise WrongClaim(f"{what}: expected {wanted}, came {came}")


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    cells = [HEAD, *((row.claim, row.formula, row.paper, row.here) for row in rows)]
    lines = [f"| {' | '.join(each)} |" for each in cells]
    return [lines[0], "|" + " --- |" * len(HEAD), *lines[1:]]


def main(script: str, rows: Callable[[], Sequence[Row]]) -> int:
    """Print a script's rows with the machine they came from; with ``--write``, put them into the page too."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.parent.name}/{PAGE.name}")
    options = parser.parse_args()
    name = Path(script).name
    text = "\n".join([*table(rows()), "", f"`python examples/evidence/{name}`; {conditions()}."])
    print(text)
    if options.write:
        PAGE.write_text(replaced(PAGE.read_text(), name, text))
    return 0


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between a script's comments.

    Raises:
        ValueError: the page lacks one of them.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE.name} needs the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def conditions() -> str:
    """CPU, cores, Python and the libraries' versions."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    return f"{_cpu()}, {cores} cores; Python {platform.python_version()}, {versions}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def take_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each side; they take turns, so that whatever else the machine does falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, act in sides.items():
            began = time.perf_counter()
            act()
            if repeat:
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in taken.items()}
