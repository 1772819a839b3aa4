"""A plan as a table for people.  Knows words and columns; decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorahub.bases.layers import shown
from lorahub.deltas.kind import JSON
from lorahub.engine.undoing.choice import held_bytes
from lorahub.findings import Verdict

if TYPE_CHECKING:
    from lorahub.engine.planning.plan import Plan

__all__ = ["explain"]

_SHOWN = 5  # names, before "and n more"


def explain(plan: Plan) -> str:
    """The plan, one fact a line, the names of the facts in a column; findings come last."""
    rows = list(_rows(plan))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    repeated = plan.repeated
    layers = {step.out for step in plan.steps if repeated and repeated.layers.number(step.out) is not None}
    copied = [step for step in plan.steps if step.out in layers and not step.terms]
    steps = [step for step in plan.steps if step.out not in layers or step.terms]
    changed = [step for step in plan.steps if not step.made_whole]
    created = [step for step in plan.steps if step.made_whole]
    yield "base", f"{plan.base} ({plan.framework})"
    yield "adapters", ", ".join(f"{name} at {weight:g}" for name, weight in plan.adapters)
    targets = {(term.adapter, term.target) for step in plan.steps for term in step.terms}
    yield "changes", f"{_count(len(targets), 'target')} in {_count(len(steps), 'parameter')}"
    if targets:
        yield "kinds", _kinds(plan)
    if repeated:
        count, ranges = len(repeated.sources), shown(repeated.ranges)
        yield "layers", f"{count} in {repeated.layers.path}, made of the base's {repeated.depth}: {ranges}"
    if steps:
        largest = max(steps, key=lambda step: step.after.nbytes)
        yield "largest", f"{largest.out} {largest.after}"
    changing, moving = (sum(step.after.nbytes for step in each) for each in (steps, copied))
    yield "writes", f"{_size(changing + moving + plan.untouched_bytes)}, of which {_size(changing)} change"
    streamed, live = (_size(plan.peak_bytes(streamed=each)) for each in (True, False))
    yield "memory", f"about {streamed} a thread from disk to disk, {live} in a live model, where undo keeps copies"
    copies, journal = (held_bytes(plan.steps, policy) for policy in ("copy", "journal"))
    if journal < copies:
        yield "undo", f"copies take {_size(copies)}; a journal about {_size(journal)}, where changes are small"
    yield "untouched", f"{_count(len(plan.untouched), 'parameter')}, copied as bytes"
    if copied:
        yield "copied", f"{_count(len(copied), 'parameter')} of repeated layers, as bytes ({_size(moving)})"
    if created:
        yield "created", _some([f"{step.out} {step.after}" for step in created])
    if widened := [step for step in changed if step.widened]:
        yield "widened", _some([f"{step.out} {step.before} -> {step.after}" for step in widened])
    if untied := [step.out for step in changed if step.out != step.source and step.out not in layers]:
        yield "untied", _some(untied)
    if plan.removed:
        yield "removed", _some(plan.removed)
    for key, value in plan.config_edits.items():
        yield "config.json", f"{key}: {_show(plan.config_before.get(key))} -> {_show(value)}"
    for finding in (each for each in plan.findings if each.level > Verdict.EXACT):  # notes are for --json
        allowed = " (allowed)" if finding.allowable and finding.code in plan.allowed else ""
        yield str(finding.level), f"{finding.show()}{allowed}"


def _kinds(plan: Plan) -> str:
    """``lora r=16 (64), lora r=8 (2), replace (1)``: the most frequent first."""
    unique = {(term.adapter, term.target): term for step in plan.steps for term in step.terms}.values()
    counts = Counter(f"{term.kind} r={term.rank}" if term.rank is not None else term.kind for term in unique)
    return ", ".join(
        f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _show(value: JSON) -> str:
    return "absent" if value is None else str(value)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
