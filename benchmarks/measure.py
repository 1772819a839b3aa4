"""Running one command in a process of its own and saying what it took; and folding repeats into medians.

Wall time from start to exit.  CPU seconds are user + system of the process and everything it waited for (``wait4``).
A command that prints a line ``work_s=1.23`` says how long it took once its libraries were imported.
Peak memory is the highest ``RssAnon`` seen in ``/proc/PID/status``, looked at every few milliseconds: memory of the
process itself, without file pages that the system may drop.  Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["PERIOD", "CommandFailed", "Sample", "evict", "fold", "ratios", "run_measured"]

PERIOD = 0.005
"""Seconds between two looks at a process's memory."""

Sample = dict[str, float]


def _usual_environment() -> dict[str, str]:
    """Ours, with bytecode kept: an installed package has its own, and the sides are to be alike in that."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class CommandFailed(RuntimeError):
    """A measured command ended with another code than 0."""


def run_measured(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Sample:
    """Wall, CPU and work seconds and peak anonymous bytes of one command; work is all of the wall where it says none.

    Raises:
        CommandFailed: it ended with another code than 0; the message carries the end of its output.
    """
    with tempfile.TemporaryFile() as talk:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=talk, stderr=subprocess.STDOUT, env={**_usual_environment(), **(environment or {})}
        )
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _anonymous(process.pid))
            time.sleep(PERIOD)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        talk.seek(0)
        said = talk.read().decode(errors="replace")
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    return {
        "wall_s": wall,
        "work_s": next((float(line[7:]) for line in said.splitlines() if line.startswith("work_s=")), wall),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_anon_bytes": float(peak),
    }


def evict(paths: Sequence[Path]) -> None:
    """Ask the system to drop these files from its page cache, so that the next reader reads the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fold(samples: Sequence[Sample]) -> dict[str, dict[str, float | list[float]]]:
    """Per quantity: median, least, greatest and every value, in the order measured."""
    return {key: _spread([sample[key] for sample in samples]) for key in samples[0]}


def ratios(samples: Mapping[str, Sequence[Sample]], pairs: Sequence[tuple[str, str]], key: str) -> dict[str, object]:
    """``a / b`` for each pair of sides, taken within each repeat, then folded: what drifts hits both alike."""
    return {
        f"{a} / {b}": _spread([one[key] / other[key] for one, other in zip(samples[a], samples[b], strict=True)])
        for a, b in pairs
    }


def _spread(values: list[float]) -> dict[str, float | list[float]]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def _anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process, or 0 where it has just ended or the system has no /proc."""
    if sys.platform != "linux":
        return 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024
