"""What ``lorahub diff`` says, as text: of two adapters by target, of several as tables of pairs and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lorahub.cli.output import aligned
from lorahub.comparing import Beside
from lorahub.composition.analysis.advice import Pair, advise
from lorahub.composition.analysis.comparing import Comparison, Row
from lorahub.composition.analysis.interference_report import InterferenceReport, balanced_weights, even_weights
from lorahub.composition.analysis.measuring import LeftOut
from lorahub.composition.analysis.similarity import Similarity
from lorahub.composition.analysis.subspaces import Subspaces
from lorahub.deltas.kind import JSON
from lorahub.pictures.scale import number, shortened
from lorahub.pictures.terminal import keys

__all__ = ["adapters_document", "comparison_text", "interference_text", "similarity_text", "subspaces_text"]

SHOWN = 40
"""Targets listed for people."""

PAIRS = 60
"""Pairs listed for people."""

SINGLY = 6
"""Pairs that are advised on one by one; of more than these, each sort of pair once."""

_NAME = 64
"""Characters of an adapter's name in a table."""

_APART = "some share no target: where that is only because modules are named differently, name the base: --base BASE"

_SHORT = 20
"""Characters of a name up to which pairs are called by their names, where there are several."""


def comparison_text(a: str, b: str, found: Comparison) -> str:
    """Two adapters: facts, then the targets that differ most."""
    whole, document = found.whole, found.document()
    counts = document["targets"]
    assert isinstance(counts, dict)
    facts = [
        ("A", a),
        ("B", b),
        ("targets", ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"),
        ("norms", f"{whole.norms[0]:.4g}, {whole.norms[1]:.4g}"),
        ("relative difference", f"{whole.relative:.3g}"),
        ("cosine", _number(whole.cosine)),
    ]
    if any(row.relation and row.relation.angles_out for row in found.rows if row.state != "equal"):
        facts.append(("angles", "smallest / mean, in degrees, of the spaces written to (out) and read from (in)"))
    said = "equal" if found.equal else "different"
    rows = sorted((row for row in found.rows if row.state != "equal"), key=lambda row: -_size(row))
    shown = [row for row in found.rows if row in rows[:SHOWN]]
    table = f"\n\n{aligned(_table(shown))}" if shown else ""
    if len(rows) > SHOWN:
        table += f"\n  and {len(rows) - SHOWN} more, which differ less: --json has all"
    return f"{said}\n{aligned(facts)}{table}"


def _size(row: Row) -> float:
    """How far apart the two are; what was not compared comes first."""
    return math.inf if row.relation is None else row.relation.relative


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    head = ("target", "state", "norm A", "norm B", "difference", "cosine", "angles out", "angles in", "why")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        found = row.relation
        kinds = "" if row.kinds[0] == row.kinds[1] or not all(row.kinds) else f"{row.kinds[0]}, {row.kinds[1]}"
        if found is None:
            lines.append((row.target, row.state, "", "", "", "", "", "", row.reason))
            continue
        both = row.state in ("close", "different")
        lines.append(
            (
                row.target,
                row.state,
                f"{found.norms[0]:.3g}" if row.kinds[0] else "",
                f"{found.norms[1]:.3g}" if row.kinds[1] else "",
                f"{found.relative:.3g}" if both else "",
                _number(found.cosine) if both else "",
                _angles(found.angles_out),
                _angles(found.angles_in),
                row.reason or kinds,
            )
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _angles(angles: Sequence[float]) -> str:
    """The smallest and the mean, in degrees."""
    if not angles:
        return ""
    degrees = [math.degrees(angle) for angle in angles]
    return f"{min(degrees):.1f} / {sum(degrees) / len(degrees):.1f}"


def adapters_document(opened: Beside, found: Similarity) -> list[JSON]:
    """Which adapters these are, as JSON-ready values."""
    return [
        {
            "name": name,
            "source": label,
            "weight": factor,
            "format": header.format if header else None,
            "kinds": list(header.kinds) if header else sorted({delta.kind for delta in deltas.values()}),
            "targets": len(deltas),
            "norm": norm,
        }
        for name, label, factor, header, deltas, norm in zip(
            opened.names, opened.labels, opened.factors, opened.headers, opened.deltas, found.norms, strict=True
        )
    ]


def similarity_text(opened: Beside, found: Similarity, *, pairs: bool) -> str:
    """Several adapters: what they are, and with ``pairs`` how every two lie to each other."""
    weighted = any(factor != 1 for factor in opened.factors)
    called = _called(found.names)
    named = called == found.names
    head = ("adapter", "norm", "targets", "kinds", "format", "weight" if weighted else "")
    table: list[tuple[str, ...]] = [head if named else ("", *head)]
    for letter, name, factor, header, deltas, norm in zip(
        called, found.names, opened.factors, opened.headers, opened.deltas, found.norms, strict=True
    ):
        kinds = header.kinds if header else tuple(sorted({delta.kind for delta in deltas.values()}))
        table.append(
            (
                *(() if named else (letter,)),
                shortened(name, _NAME),
                _norm(norm),
                str(len(deltas)),
                "+".join(kinds) or "-",
                header.format if header else "-",
                f"{factor:g}" if weighted else "",
            )
        )
    shared = sum(row.shared == len(found.names) for row in found.rows)
    some = sum(1 < row.shared < len(found.names) for row in found.rows)
    said = "equal" if found.equal else "different"
    text = (
        f"{said}: {len(found.names)} adapters, {len(found.rows)} targets; {shared} changed by all, {some} by some, "
        f"{len(found.rows) - shared - some} by one alone\n{aligned(table)}"
    )
    if pairs:
        text += f"\n\n{aligned(_alike(found))}"
    if opened.base is None and not all(found.shared(*pair) for pair in found.pairs):
        text += f"\n  {_APART}"
    return text + _left_out(found.left_out, len(found.rows))


def _called(names: Sequence[str]) -> tuple[str, ...]:
    """What adapters are called in pairs: by their names, or by the letters of the picture where these are long."""
    if len(names) > 2 and max(map(len, names)) > _SHORT:
        return tuple(keys(len(names)))
    return tuple(shortened(name, _NAME) for name in names)


def _alike(found: Similarity) -> list[tuple[str, ...]]:
    """A line for each pair, the most alike first."""
    cosines = {pair: found.cosine(*pair) for pair in found.pairs}
    called = _called(found.names)
    pairs = sorted(cosines, key=lambda pair: -(-2.0 if (value := cosines[pair]) is None else value))
    table: list[tuple[str, ...]] = [("pair", "cosine", "difference", "overlap out", "overlap in", "shared targets")]
    for one, other in pairs[:PAIRS]:
        table.append(
            (
                f"{called[one]}, {called[other]}",
                _number(cosines[one, other]),
                _difference(found, one, other),
                _number(found.overlap(one, other, "out")),
                _number(found.overlap(one, other, "in")),
                str(found.shared(one, other)),
            )
        )
    if len(pairs) > PAIRS:
        table.append((f"and {len(pairs) - PAIRS} more, which are less alike: --json has all",))
    return table


def _left_out(left_out: Sequence[LeftOut], targets: int) -> str:
    """What was not compared, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in left_out:
        reasons.setdefault((" and ".join(each.adapters), each.reason), []).append(each.target)
    told = [
        (f"{shortened(who, _NAME)}: {len(where)} of {targets} targets, as {where[0]}", why)
        for (who, why), where in list(reasons.items())[:8]
    ]
    more = f"\n  and {len(reasons) - 8} more reasons: --json has all" if len(reasons) > 8 else ""
    return f"\n\nnot compared\n{aligned(told)}{more}" if told else ""


def interference_text(report: InterferenceReport) -> str:
    """What gets in the way, pair by pair; what suits, and at which weights."""
    signs, found = report.signs, report.pairs
    if not signs.rows:
        facts = "interference: no target is changed by two of them, as far as that could be computed"
    else:
        facts = (
            f"interference: every one of {signs.elements:,} elements of {len(signs.rows)} shared targets\n"
            f"  a sum loses {_percent(signs.cancelled)} of all magnitude; changes that have nothing to do with each "
            f"other would lose {_percent(signs.expected)}"
        )
    head = ("pair", "cosine", "overlap out", "overlap in", "by chance", "opposite signs", "by count", "norms", "shared")
    called = dict(zip(report.similarity.names, _called(report.similarity.names), strict=True))
    ordered = sorted(found, key=lambda pair: -(-1.0 if pair.conflict is None else pair.conflict))
    table: list[tuple[str, ...]] = [head]
    table += [
        (
            ", ".join(called[name] for name in pair.names),
            _number(pair.cosine),
            _number(pair.overlap_out),
            _number(pair.overlap_in),
            "-" if pair.chance_out is None else f"{pair.chance_out:.2f}, {pair.chance_in or 0:.2f}",
            _percent(pair.conflict),
            _percent(pair.count),
            f"{_norm(pair.norms[0])} : {_norm(pair.norms[1])}",
            str(pair.shared),
        )
        for pair in ordered[:PAIRS]
    ]
    if len(ordered) > PAIRS:
        table.append((f"and {len(ordered) - PAIRS} more, with fewer opposite signs: --json has all",))
    return f"{facts}\n{aligned(table)}\n\nwhat suits\n{aligned(_advised(report, ordered, called))}{_weights(report)}"


def _advised(report: InterferenceReport, ordered: Sequence[Pair], called: Mapping[str, str]) -> list[tuple[str, str]]:
    """Advice for each pair, or for each sort of pair where there are many; then for all."""
    sorts: dict[str, list[tuple[Pair, str]]] = {}
    for pair in ordered:
        for advice in advise(pair):
            key = advice.code if len(ordered) > SINGLY else f"{advice.code} {pair.names}"
            sorts.setdefault(key, []).append((pair, advice.words))
    rows = [
        (
            ", ".join(called[name] for name in some[0][0].names)
            + (f" and {len(some) - 1} other pairs" if len(some) > 1 else ""),
            some[0][1],
        )
        for some in sorts.values()
    ]
    if len(ordered) > 1 and (over := report.advice):
        rows.append(("all", over.words))
    return rows


def _weights(report: InterferenceReport) -> str:
    """Weights worth a try, where there is a reason for them."""
    called = _called(report.similarity.names)
    codes = {advice.code for pair in report.pairs for advice in advise(pair)}
    rows = []
    for title, reasons, weights in (
        ("each at its own strength", {"same-direction", "partly-alike"}, balanced_weights(report.similarity)),
        ("norms made even", {"norms-apart"}, even_weights(report.similarity)),
    ):
        if weights is not None and codes & reasons:
            told = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(called, weights, strict=True))
            rows.append((title, told))
    return f"\n\nweights for linear\n{aligned(rows)}" if rows else ""


def subspaces_text(found: Subspaces) -> str:
    """What was held against each other, and the corners of both grids."""
    if not found.targets:
        return (
            f"subspaces: no target that both change has factors in both{_left_out(found.left_out, len(found.left_out))}"
        )
    where = found.targets[0] if len(found.targets) == 1 else f"{len(found.targets)} targets, their mean"
    table: list[tuple[str, ...]] = [("", "first of both", "all of both", "chance")]
    for space, title in (("out", "written to"), ("in", "read from")):
        grid = found.grids["out" if space == "out" else "in"]
        if not grid.phi:
            continue
        last = f"{grid.phi[-1][-1]:.3f} ({len(grid.phi)} and {len(grid.phi[0])})"
        table.append((title, f"{grid.phi[0][0]:.3f}", last, f"{grid.chance[0][0]:.3f}, {grid.chance[-1][-1]:.3f}"))
    text = f"overlap of subspaces (phi), {where}\n{aligned(table)}"
    return text + _left_out(found.left_out, len(found.targets) + len(found.left_out))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _norm(value: float | None) -> str:
    return "-" if value is None else number(value, 3)


def _difference(found: Similarity, one: int, other: int) -> str:
    value = found.difference(one, other)
    return "same" if found.same(one, other) else "-" if value is None else f"{value:.3g}"
