"""What a card's metadata say already against what they should: the author's values stay, and differences are told.

A value that an earlier card wrote, and nobody changed since, is brought up to date.  What the Hub would refuse, above
all the path of a base on one machine, is replaced.  Knows no YAML text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lorahub.cards.block import Written, digest
from lorahub.cards.front import FILE
from lorahub.cards.wanted import MERGED, ORDER, hub_license, is_repo, slug
from lorahub.findings import Finding, Verdict
from lorahub.names import printable

__all__ = ["Reconciled", "reconcile"]

_DERIVED = "base_model:"
"""How a tag begins that says again which base it is, as PEFT writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """The metadata as they should be, what of them is ours, and what there is to say.

    Attributes:
        values: every key, the author's order first.
        written: for the next card.
        findings: differences; a degraded one is for whoever publishes to refuse.
        replaced: texts of the author's that were replaced because no one else could follow them.
    """

    values: Mapping[str, Any]
    written: Written
    findings: tuple[Finding, ...]
    replaced: tuple[str, ...] = ()


_Values: TypeAlias = "Mapping[str, Any]"
_Judged: TypeAlias = "tuple[Any, list[Finding]]"
"""A value to write, and what is to be said."""


def reconcile(
    have: Mapping[str, Any], want: Mapping[str, Any], before: Written, *, trained_from: str = ""
) -> Reconciled:
    """The metadata of a card.

    Args:
        have: what stands there.
        want: what should, by the record.
        before: what an earlier card wrote.
        trained_from: the base as the trainer was given it, which it also wrote into the card.
    """
    values = dict(have := _renamed(written := have, want, trained_from))
    findings: list[Finding] = []
    if have is not written:
        message = (
            f"{FILE} gave the base as {_shown(trained_from)}, as the trainer had it: it says {have['base_model']} now"
        )
        findings.append(_finding("card-base-replaced", Verdict.UNVERIFIED, message, ""))
    keys: dict[str, str] = {}
    items: dict[str, tuple[str, ...]] = {}
    for key in ORDER:
        old, new = have.get(key), want.get(key)
        if key in MERGED:
            merged, said, added = _merge(key, old, new or [], before.items.get(key, ()), want.get("base_model"))
            findings += said
            items |= {key: added} if added else {}
            _put(values, key, merged, kept=key in have and old == merged)
        elif _empty(old) or before.keys.get(key) == digest(old):
            _put(values, key, new, kept=key in have and repr(old) == repr(new))
            keys |= {key: digest(new)} if new is not None else {}
        else:
            judged, said = _JUDGES.get(key, _keep)(key, old, want)
            findings += said
            _put(values, key, judged, kept=repr(judged) == repr(old))
            keys |= {key: digest(new)} if new is not None and repr(judged) == repr(new) != repr(old) else {}
    _drop_orphans(values, have, want, keys)
    lost = [text for text in _texts(have.get("base_model")) if not is_repo(text)]
    return Reconciled(
        values=values,
        written=Written(keys=keys, items=items),
        findings=tuple(findings),
        replaced=tuple(dict.fromkeys(text for text in lost if text)),
    )


def _renamed(have: Mapping[str, Any], want: Mapping[str, Any], trained_from: str) -> Mapping[str, Any]:
    """Without the one word for a base that may be a repository's old name, and is a folder's of the trainer's."""
    if "/" in trained_from or have.get("base_model") != trained_from or not want.get("base_model"):
        return have
    tags, derived = have.get("tags"), f"{_DERIVED}adapter:{trained_from}"
    instead = f"{_DERIVED}adapter:{want['base_model']}"
    changed = [instead if each == derived else each for each in tags] if isinstance(tags, list) else tags
    return {**have, "base_model": want["base_model"], **({"tags": changed} if changed != tags else {})}


def _empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _put(values: dict[str, Any], key: str, value: Any, *, kept: bool) -> None:
    """Write a value, or take the key out; ``kept``: it stands there already."""
    if kept:
        return
    if _empty(value):
        if key in values and not _empty(values[key]):
            del values[key]
    else:
        values[key] = value


def _drop_orphans(
    values: dict[str, Any], have: Mapping[str, Any], want: Mapping[str, Any], keys: dict[str, str]
) -> None:
    """Without the record's licence by name and place, where the card gives another licence."""
    for key in ("license_name", "license_link"):
        if key in keys and key not in have and values.get("license") != want.get("license"):
            del values[key], keys[key]


def _finding(code: str, level: Verdict, message: str, remedy: str) -> Finding:
    return Finding(
        code=code,
        axis="policy",
        level=level,
        message=message,
        where=(FILE,),
        remedy=remedy,
        allowable=level is Verdict.DEGRADED,
    )


def _shown(value: Any) -> str:
    text = printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 120 else f"{text[:120]}..."


def _texts(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else [] if _empty(value) else [value]
    return [each if isinstance(each, str) else str(each) for each in listed]


def _keep(_key: str, old: Any, _want: _Values) -> _Judged:
    return old, []


def _told(key: str, old: Any, want: _Values) -> _Judged:
    """The author's, with a line where the record differs."""
    new = want.get(key)
    if new is None or repr(old) == repr(new):
        return old, []
    message = f"{FILE} says {key}: {_shown(old)}; by the record and the files it is {_shown(new)}"
    return old, [
        _finding("card-differs", Verdict.UNVERIFIED, message, f"take {key} out of {FILE}, and it is written anew")
    ]


_LIKE_PEFT = frozenset({"peft", "transformers", "sentence-transformers", "unsloth", "mlx"})
"""Libraries that load what PEFT wrote, or whose name its trainers leave in a card."""


def _library(key: str, old: Any, want: _Values) -> _Judged:
    if want.get(key) == "peft" and isinstance(old, str) and old in _LIKE_PEFT:
        return old, []
    return _told(key, old, want)


def _base(key: str, old: Any, want: _Values) -> _Judged:
    """The author's bases as far as they can be on the Hub; the record's where none is."""
    new = want.get(key)
    named = _texts(old)
    good = [text for text in named if is_repo(text)]
    lost = [text for text in named if not is_repo(text)]
    if lost:
        instead = list(dict.fromkeys([*good, *([new] if new and new not in good else [])]))
        value = (instead if isinstance(old, list) else instead[0]) if instead else None
        shown = _shown(instead) if instead else "nothing, as the record names no repository"
        message = f"{FILE} gave the base as {_shown(lost)}, which is no repository on the Hub: it says {shown} now"
        return value, [_finding("card-base-replaced", Verdict.UNVERIFIED, message, "")]
    if new and new.lower() not in (text.lower() for text in good):
        message = f"{FILE} names {_shown(good)} as the base, the record {new}"
        remedy = f"if the record is right, take base_model out of {FILE}, and it is written anew"
        return old, [_finding("card-base-differs", Verdict.UNVERIFIED, message, remedy)]
    return old, []


def _licence(key: str, old: Any, want: _Values) -> _Judged:
    """The author's, spelled as the Hub takes it; another one than the record's is for the publisher to refuse."""
    if not isinstance(old, str):
        return old, []
    new = want.get(key)
    spelled = hub_license(old) or hub_license(old.replace(" ", "-")) or old
    same = new == "other" and (spelled == "other" or slug(old) == want.get("license_name", slug(old)))
    if new is None or spelled == new or same:
        return spelled, []
    message = f"{FILE} gives the licence as {_shown(old)}, the record as {want.get('license_name', new)}: it has one"
    remedy = f"correct the wrong one: lorahub record FOLDER --license SPDX, or license in {FILE}"
    return old, [_finding("card-license-differs", Verdict.DEGRADED, message, remedy)]


def _successor(_key: str, old: Any, _want: _Values) -> _Judged:
    if is_repo(old) and "/" in old:
        return old, []
    message = f"{FILE} names {_shown(old)} as its newer version, which is no repository"
    return old, [_finding("card-differs", Verdict.UNVERIFIED, message, "write new_version: NS/NAME")]


_JUDGES: Mapping[str, Callable[[str, Any, _Values], _Judged]] = {
    "base_model": _base,
    "base_model_relation": _told,
    "library_name": _library,
    "license": _licence,
    "new_version": _successor,
    "pipeline_tag": _told,
}
"""Key -> what becomes of the author's value; others stay as they are."""


def _merge(
    key: str, old: Any, new: list[str], before: tuple[str, ...], base: str | None
) -> tuple[list[Any], list[Finding], tuple[str, ...]]:
    """(the list, what is to be said, which of its items are ours)."""
    listed = old if isinstance(old, list) else [] if _empty(old) else [old]
    theirs, said = _CLEAN[key]([each for each in listed if not (each in before and each not in new)], base)
    added = [each for each in new if each not in theirs]
    ours = tuple(each for each in new if each in before or each in added)
    return [*theirs, *added], said, ours


def _clean_tags(tags: list[Any], base: str | None) -> tuple[list[Any], list[Finding]]:
    """Tags without bases that are paths: the Hub makes these tags itself, of base_model."""
    kept: list[Any] = []
    for tag in tags:
        if isinstance(tag, str) and tag.startswith(_DERIVED):
            relation, _, repo = tag.removeprefix(_DERIVED).partition(":")
            if not is_repo(repo or relation):
                kept += [f"{_DERIVED}{relation}:{base}"] if base and repo else []
                continue
        kept.append(tag)
    return kept, []


def _clean_datasets(names: list[Any], _base: str | None) -> tuple[list[Any], list[Finding]]:
    """Datasets that are on the Hub: it refuses a card that names any other."""
    lost = [each for each in names if not is_repo(each)]
    if not lost:
        return names, []
    message = f"{FILE} named datasets that are no repositories on the Hub, and no longer does: {_shown(lost)}"
    return [each for each in names if is_repo(each)], [
        _finding("card-dataset-removed", Verdict.UNVERIFIED, message, "")
    ]


_CLEAN: Mapping[str, Callable[[list[Any], str | None], tuple[list[Any], list[Finding]]]] = {
    "datasets": _clean_datasets,
    "tags": _clean_tags,
}
