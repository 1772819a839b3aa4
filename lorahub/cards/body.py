"""Our part of a card, as Markdown: what the adapter is, how to use it, where it comes from, what was measured.

A function of the record and the headers alone, so the same ones give the same bytes.  Whatever came from files goes
through ``markdown.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorahub.adapter import AdapterHeader
from lorahub.cards.layers import by_order
from lorahub.cards.markdown import code, fenced, link, table, text
from lorahub.cards.usage import Usage
from lorahub.cards.wanted import hub_license
from lorahub.inspection import Inspection
from lorahub.names import COMMIT
from lorahub.pictures.scale import number
from lorahub.record_fields import Parent, Training
from lorahub.records import AdapterRecord
from lorahub.registry import Registry

__all__ = ["Facts", "render", "title_of"]

HUB = "https://huggingface.co"

_MOST = 40
"""Rows of a table; the rest is counted."""

_UNITS = ("B", "kB", "MB", "GB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the text is made from.

    Attributes:
        picture: the file name of the picture beside the card, or "".
        picture_says: what it shows, in a sentence.
    """

    header: AdapterHeader
    record: AdapterRecord
    found: Inspection
    usage: Usage
    registry: Registry
    repo: str
    picture: str = ""
    picture_says: str = ""


def title_of(facts: Facts) -> str:
    """The adapter's name for people, as Markdown."""
    name = facts.record.title or facts.record.name or facts.repo.rpartition("/")[2] or facts.header.label
    return text(name.rpartition("/")[2] if name == facts.record.name else name, 120)


def render(facts: Facts) -> str:
    """The Markdown of our part, without the comments that enclose it."""
    parts = [section for make in _SECTIONS for section in make(facts) if section]
    return "\n\n".join(parts) + "\n"


def _head(facts: Facts) -> list[str]:
    return ["## About this adapter", text(facts.record.description, 2000), _facts(facts), _picture(facts)]


def _facts(facts: Facts) -> str:
    record, found = facts.record, facts.found
    size = f"{found.parameters:,} parameters, {_bytes(found.nbytes)}"
    dtypes = sorted({dtype for row in found.rows for dtype in row.dtypes})
    rows = [
        ("Name", title_of(facts)),
        ("Version", record.version or ""),
        ("Kind", _kinds(facts)),
        ("Changes", _changes(found)),
        ("Carries", ", ".join(code(part, 60) for part in found.parts[:12])),
        ("Size", f"{size}, {', '.join(dtypes)}" if dtypes else size),
        *_base(record),
        ("Layout", f"{code(found.format)}, {code(found.file)}"),
        ("Trigger words", ", ".join(code(word) for word in found.triggers[:_MOST])),
        ("Weight", _strength(record)),
        ("Licence", _licence(record)),
        ("Authors", text(", ".join(record.authors), 300)),
        ("Made", text(record.created or "", 40)),
        ("Tensors", code(record.digest.tensors) if record.digest and record.digest.tensors else ""),
    ]
    return table(("", ""), [row for row in rows if row[1]])


def _kinds(facts: Facts) -> str:
    kinds = facts.registry.kinds
    titles = [text(kinds[kind].title if kind in kinds else kind, 60) for kind in facts.found.kinds]
    ranks = facts.header.ranks
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    return f"{', '.join(titles)}{rank}" if titles else ""


def _changes(found: Inspection) -> str:
    names = sorted({row.targets for row in found.rows}, key=by_order)
    shown = ", ".join(code(name, 60) for name in names[:12])
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    count = sum(row.modules for row in found.rows)
    return f"{shown}{more} ({count:,} module{'s' * (count != 1)})" if names else ""


def _base(record: AdapterRecord) -> list[tuple[str, str]]:
    base = record.base
    if base is None:
        return []
    name = base.repo_id or ""
    where = f"{HUB}/{name}/tree/{base.revision}" if base.revision else f"{HUB}/{name}"
    named = link(text(name), where) if name else "a base that is on no hub"
    commit = f" at commit {code(base.revision[:12])}" if base.revision and COMMIT.fullmatch(base.revision) else ""
    folder = f", folder {code(base.subfolder)}" if base.subfolder else ""
    kind = f" ({text(base.architecture, 80)})" if base.architecture else ""
    return [
        ("Made for", f"{named}{commit}{folder}{kind}"),
        ("Weights of the base", code(base.weights_digest) if base.weights_digest else ""),
    ]


def _strength(record: AdapterRecord) -> str:
    strength = record.strength
    if strength is None:
        return ""
    said = f"{strength.recommended:g} recommended" if strength.recommended is not None else ""
    span = [f"{word} {value:g}" for word, value in (("from", strength.min), ("to", strength.max)) if value is not None]
    return ", ".join(filter(None, [said, " ".join(span)]))


def _licence(record: AdapterRecord) -> str:
    if not record.license:
        return ""
    return link(text(record.license, 120), record.license_link) if record.license_link else text(record.license, 120)


def _picture(facts: Facts) -> str:
    return f"![{text(facts.picture_says, 200)}]({facts.picture})" if facts.picture else ""


def _use(facts: Facts) -> list[str]:
    parts = ["### How to use it"]
    for snippet in facts.usage.snippets:
        parts += [f"{snippet.title}:", fenced(snippet.text, snippet.language)]
    return [*parts, text(facts.record.usage_hint, 1000)]


def _targets(facts: Facts) -> list[str]:
    rows = facts.found.rows
    if not rows:
        return []
    cells = [
        (
            code(row.targets, 80),
            text(row.kind, 40),
            f"{row.modules:,}",
            "" if row.rank is None else str(row.rank),
            _scale(row.scale, row.scale_rule),
            text("+".join(row.dtypes), 40),
        )
        for row in sorted(rows, key=lambda row: (row.kind, by_order(row.targets)))[:_MOST]
    ]
    return ["### What changes", table(("Target", "Kind", "Modules", "Rank", "Scale", "Stored as"), cells), _more(rows)]


def _scale(scale: float | None, rule: str) -> str:
    if scale is None:
        return text(rule, 60)
    return f"{scale:g} ({text(rule, 60)})" if rule else f"{scale:g}"


def _more(items: Sequence[object]) -> str:
    return f"And {len(items) - _MOST:,} more." if len(items) > _MOST else ""


def _composition(facts: Facts) -> list[str]:
    record = facts.record
    if not record.parents:
        return []
    recipe = record.recipe
    method = f" by {code(recipe.method)}" if recipe else ""
    seed = f", seed {recipe.seed}" if recipe and recipe.seed is not None else ""
    said = f"Composed of {len(record.parents)} adapters{method}{seed}."
    options = (
        ", ".join(f"{code(key, 40)} {code(str(value), 60)}" for key, value in _few(recipe.params)) if recipe else ""
    )
    rows = [_parent(each) for each in record.parents[:_MOST]]
    heads = ("Adapter", "Weight", "Commit", "Tensors", "Role")
    return [
        "### Composition",
        f"{said} Options: {options}." if options else said,
        table(heads, rows),
        _more(record.parents),
    ]


def _few(params: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    return list(params.items())[:12]


def _parent(parent: Parent) -> tuple[str, ...]:
    return (
        code(parent.ref, 120),
        "" if parent.weight is None else f"{parent.weight:g}",
        code(parent.revision[:12]) if parent.revision else "",
        code(f"{parent.digest[:19]}...") if parent.digest else "",
        text(parent.role, 80),
    )


def _training(facts: Facts) -> list[str]:
    training = facts.record.training
    rows = [(name, told) for name, say in _TRAINING if training and (told := say(training))]
    return ["### Training", table(("", ""), rows)] if rows else []


def _datasets(training: Training) -> str:
    told = [
        link(text(each.id), f"{HUB}/datasets/{each.id}") + (f" at {code(each.revision[:12])}" if each.revision else "")
        for each in training.datasets[:12]
    ]
    return ", ".join(told)


def _trainer(training: Training) -> str:
    return text(f"{training.trainer.name} {training.trainer.version}".strip(), 120) if training.trainer else ""


_TRAINING: tuple[tuple[str, Callable[[Training], str]], ...] = (
    ("Datasets", _datasets),
    ("Steps", lambda training: "" if training.steps is None else f"{training.steps:,}"),
    ("Epochs", lambda training: "" if training.epochs is None else f"{training.epochs:g}"),
    ("Learning rate", lambda training: "" if training.lr is None else f"{training.lr:g}"),
    ("Optimizer", lambda training: text(training.optimizer, 80)),
    ("Seed", lambda training: "" if training.seed is None else str(training.seed)),
    ("Trainer", _trainer),
)


def _evaluation(facts: Facts) -> list[str]:
    evals = facts.record.evals
    if not evals:
        return []
    rows = [
        (
            text(each.task, 80),
            text(each.dataset, 120),
            text(each.metric, 80),
            f"{each.value:g}",
            "" if each.delta_vs_base is None else f"{each.delta_vs_base:+g}",
        )
        for each in evals[:_MOST]
    ]
    return ["### Evaluation", table(("Task", "Dataset", "Metric", "Value", "Against the base"), rows), _more(evals)]


def _bound(facts: Facts) -> list[str]:
    record = facts.record
    if not record.license and not record.inherits_from:
        return []
    also = ", ".join(code(each, 120) for each in record.inherits_from[:12])
    name = text(record.license, 120)
    known = hub_license(record.license) not in ("", "other", "unknown")
    own = (
        f"The adapter itself is under {name}."
        if known
        else f"The adapter's own licence: {_licence(record)}."
        if name
        else ""
    )
    base = f"Its use is bound by the licences of {also} as well." if also else "The licence of its base binds as well."
    return ["### Licence", " ".join(filter(None, [own, base]))]


def _foot(_facts: Facts) -> list[str]:
    return ["<sub>This part is written from <code>lorahub.json</code>; what stands outside of it is left alone.</sub>"]


_SECTIONS: tuple[Callable[[Facts], list[str]], ...] = (
    _head,
    _use,
    _targets,
    _composition,
    _training,
    _evaluation,
    _bound,
    _foot,
)


def _bytes(count: float) -> str:
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{number(count, 3)} {unit}"
