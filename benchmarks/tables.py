"""The tables of ``benchmarks/README.md``, written from results between two markers; the text around them is by hand."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "accuracy_table", "rewrite"]

RATIOS = {"ratios": "wall time", "work_ratios": "time after imports", "memory_ratios": "peak memory"}
"""Key in a result -> what the ratios are of."""

_HEAD = "### "
_COMMAND = re.compile(r"run\.py --only ([a-z0-9-]+)")

BEGIN, END = "<!-- results: written by run.py -->", "<!-- end of results -->"


def rewrite(page: Path, results: dict[str, dict[str, Any]], order: Sequence[str]) -> None:
    """Put results between the markers, each in the place of what has its title; whatever else is there stays.

    Args:
        page: has the markers.
        results: by the names of their cases.
        order: of the cases on the page.

    Raises:
        ValueError: the page lacks a marker.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    body, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r}")
    there = [f"{_HEAD}{section.strip()}" for section in f"\n{body}".split(f"\n{_HEAD}")[1:]]
    sections = {_title(section): section for section in (*there, *map(_case, results.values()))}
    ordered = sorted(sections.values(), key=lambda section: _place(section, order))
    page.write_text("\n\n".join([before + BEGIN, *ordered, END + after]))


def _title(section: str) -> str:
    return section.partition("\n")[0].removeprefix(_HEAD)


def _place(section: str, order: Sequence[str]) -> tuple[int, str]:
    """By the command that a section ends with, then by title."""
    command = _COMMAND.search(section)
    return order.index(command[1]) if command and command[1] in order else len(order), _title(section)


def _case(result: dict[str, Any]) -> str:
    lines = [f"{_HEAD}{result['title']}", ""]
    if "skipped" in result:
        return "\n".join([*lines, f"Skipped: {result['skipped']}. `{result['command']}`"])
    if "accuracy" in result:
        return "\n".join([*lines, *accuracy_table(result), "", _conditions(result)])
    lines += _sides(result["sides"])
    if "memory" in result:
        lines += ["", *_memory(result["memory"], result["threads"])]
    for key, what in RATIOS.items():
        if key in result:
            lines += ["", f"| {what} | ratio | least to greatest |", "| --- | ---: | ---: |"]
            lines += [
                f"| {pair} | **{spread['median']:.2f}** | {spread['min']:.2f} to {spread['max']:.2f} |"
                for pair, spread in result[key].items()
            ]
    return "\n".join([*lines, "", _conditions(result)])


def _conditions(result: dict[str, Any]) -> str:
    machine, agreement = result["machine"], result.get("agreement")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    sentences = [
        *([] if "accuracy" in result else [f"{result['repeats']} repeats, interleaved."]),
        *_agreement(agreement),
        *result.get("says", []),
        f"{machine['cpu']}, {machine['instructions']}, {machine['cores']} cores,",
        f"{machine['memory_bytes'] / 2**30:.0f} GiB,",
        f"load {machine['load']} before and {machine['load_after']} after;",
        f"{versions}; {result['when'][:10]}; `{result['command']}`",
    ]
    return " ".join(sentences)


def _agreement(agreement: dict[str, float] | None) -> list[str]:
    """What the sides' results have in common; nothing where they make none."""
    if agreement is None:
        return []
    return [
        f"The merge changed {agreement['changed']:.1%} of the weights in question;",
        f"lorahub's result differs from PEFT's (both with fp32 factors) in a share of {agreement['different']:.2g}.",
    ]


def accuracy_table(result: dict[str, Any]) -> list[str]:
    """A row for each model: the mean over the seeds on each task and on all, and what a cut to a rank kept."""
    columns = result["columns"]
    head = ["", *columns, "mean of both", "least to greatest", "energy kept"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, row in result["accuracy"].items():
        means = [statistics.mean(values) for values in zip(*(row[column] for column in columns), strict=True)]
        cells = [f"{statistics.mean(row[column]):.1%}" for column in columns]
        cells += [f"**{statistics.mean(means):.1%}**", f"{min(means):.1%} to {max(means):.1%}"]
        cells.append(f"{statistics.mean(row['energy']):.1%}" if "energy" in row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _memory(found: dict[str, Any], threads: int) -> list[str]:
    """Measured against estimated; bytes as megabytes."""
    head = ["composed", "peak above nothing composed", f"--explain, {threads} threads", "of it the result"]
    head += ["the largest target, float32"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    keys = ("peak_bytes", "estimate_bytes", "result_bytes", "largest_bytes")
    return lines + [
        f"| {name} | " + " | ".join(f"{row[key] / 1e6:.0f} MB" for key in keys) + " |" for name, row in found.items()
    ]


def _sides(sides: dict[str, Any]) -> list[str]:
    processes = all("peak_anon_bytes" in side for side in sides.values())
    head = ["side", "wall, median", "least to greatest", "CPU"]
    head += ["after imports", "peak anonymous memory"] if processes else []
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, side in sides.items():
        wall = side["wall_s"]
        cells = [name, _seconds(wall["median"]), f"{_seconds(wall['min'])} to {_seconds(wall['max'])}"]
        cells.append(_seconds(side["cpu_s"]["median"]))
        if processes:
            cells.append(_seconds(side["work_s"]["median"]))
            cells.append(f"{side['peak_anon_bytes']['median'] / 1e9:.2f} GB")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
