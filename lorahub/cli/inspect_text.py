"""What ``lorahub inspect`` says of one adapter, as text.  Whatever a file's author wrote is shortened and made safe."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub.bases.layers import shown
from lorahub.cli.output import aligned, brief, size
from lorahub.inspection import Inspection, tag_frequency
from lorahub.pictures.scale import number
from lorahub.weighing import Weighing, summaries

__all__ = ["inspection_text", "weights_text"]

_KEY = 34
"""Characters of a metadata key."""

_MOST = 120
"""Metadata that are shown; a trainer writes about sixty."""

_NEAR = 4
"""Other adapters of the folder that are named."""

_TAGS = "ss_tag_frequency"


def inspection_text(found: Inspection, hashes: dict[str, str], width: int, *, beside: Sequence[str] = ()) -> str:
    """Facts, a table of targets, and the metadata; ``beside``: what else lies in its folder and may be an adapter."""
    room = max(width - 14, 40)
    facts = _facts(found, room)
    if beside:
        more = f" and {len(beside) - _NEAR} more" if len(beside) > _NEAR else ""
        each = "lorahub inspect PATH shows each"
        facts.append(("beside it", f"{brief(', '.join(beside[:_NEAR]), room)}{more}: {each}"))
    facts += list(hashes.items())
    parts = [f"{brief(found.adapter, width)}\n{aligned(facts)}"]
    if found.rows:
        parts.append(aligned(_rows(found)))
    if found.metadata:
        parts.append(_metadata(found, width))
    return "\n\n".join(parts)


def _facts(found: Inspection, room: int) -> list[tuple[str, str]]:
    score, reason = found.confidence
    kinds = ", ".join(found.kinds) or "nothing that changes weights"
    facts = [("format", f"{found.format} ({found.file})")]
    if reason:
        facts.append(("because", f"{reason} (confidence {score:g})"))
    facts += [
        ("kinds", kinds),
        ("size", f"{found.parameters:,} parameters, {size(found.nbytes)}"),
        ("base", brief(found.base, room) if found.base else "not recorded"),
    ]
    if found.guess:
        facts.append(("looks like", brief(f"{found.guess.label} ({found.guess.evidence})", room)))
    if found.layers:
        count = sum(stop - start for start, stop in found.layers)
        facts.append(("layers", brief(f"{count}, made of its base's {shown(found.layers)}", room)))
    if found.triggers:
        facts.append(("triggers", brief(", ".join(found.triggers), room)))
    if found.parts:
        facts.append(("parts", brief(", ".join(found.parts), room)))
    if found.unclaimed:
        facts.append(("unclaimed", brief(f"{len(found.unclaimed)} tensors: {', '.join(found.unclaimed[:3])}", room)))
    known = found.record or {}
    facts += [(key, brief(str(known[key]), room)) for key in ("name", "version", "license") if known.get(key)]
    if far := found.distance:
        read = f"{size(far.bytes_read)} in {far.requests} requests" if far.requests else "nothing new"
        facts.append(("read", f"{read}, of {size(sum(far.files.values()))} at {far.pin} ({far.commit[:12]})"))
    return facts


def _rows(found: Inspection) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("kind", "target", "modules", "rank", "scale", "dtype")]
    table += [
        (
            row.kind,
            row.targets,
            str(row.modules),
            "" if row.rank is None else str(row.rank),
            row.scale_rule if row.scale is None else _with_rule(row.scale, row.scale_rule),
            "+".join(row.dtypes),
        )
        for row in found.rows
    ]
    return table


def _with_rule(scale: float, rule: str) -> str:
    return f"{scale:g} ({rule})" if rule else f"{scale:g}"


def _metadata(found: Inspection, width: int) -> str:
    """Every entry on a line of its own, as much of it as fits."""
    shown = sorted(found.metadata.items())[:_MOST]
    keys = [brief(key, _KEY) for key, _ in shown]
    room = max(width - max(map(len, keys)) - 4, 20)
    rows = [
        (spelled, brief(_summary(found) or text, room) if key == _TAGS else brief(text, room))
        for spelled, (key, text) in zip(keys, shown, strict=True)
    ]
    more = len(found.metadata) - len(shown)
    rest = f"\n  and {more} more: --json has all of them" if more else ""
    return f"metadata\n{aligned(rows)}{rest}"


def _summary(found: Inspection) -> str:
    """The most frequent tags with their numbers."""
    tags = tag_frequency(found.metadata)
    return f"{len(tags):,} tags: {', '.join(f'{tag} {count}' for tag, count in tags[:12])}" if tags else ""


def weights_text(weighed: Weighing) -> str:
    """Norms and spectra, folded over layers."""
    if not weighed.targets:
        told = [f"{name}: {why}" for name, why in list(weighed.left_out.items())[:3]]
        return "\n".join(["no change could be weighed", *(f"  {each}" for each in told)])
    relative = any(each.relative is not None for each in weighed.targets)
    head = ("target", "modules", "norm", "energy", "stable rank", "effective rank", "rank", "top singular value")
    table: list[tuple[str, ...]] = [(*head[:3], "relative", *head[3:]) if relative else head]
    for each in summaries(weighed):
        row = (
            each.name,
            str(each.count),
            number(each.norm),
            f"{each.energy:.1%}",
            _number(each.stable_rank),
            _number(each.effective_rank),
            "" if each.rank is None else str(each.rank),
            _number(each.top),
        )
        table.append((*row[:3], _number(each.relative), *row[3:]) if relative else row)
    text = (
        f"weights: norm {number(weighed.norm)} over {len(weighed.targets)} parameters (Frobenius; ranks and relative "
        f"norms are medians; effective rank by entropy)\n{aligned(table)}"
    )
    if weighed.left_out:
        why = next(iter(weighed.left_out.items()))
        text += f"\n  not weighed: {len(weighed.left_out)} parameters, as {why[0]}: {why[1]}"
    return text


def _number(value: float | None) -> str:
    return "" if value is None else number(value)
