"""What is asked for, opened, placed, planned and judged: the way to a ``Job``, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from lorahub import checks
from lorahub.adapter import Adapter, AdapterHeader
from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layers import ranges_of
from lorahub.bases.layout import Layout, Target
from lorahub.bases.repeated import repeated, why_not
from lorahub.combination import Combination
from lorahub.conversion.translate import Translating, translated
from lorahub.deltas.disputes import Compat, as_compat
from lorahub.engine.planning.casting import cast as cast_plan
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.plan import plan as plan_merge
from lorahub.errors import Unavailable, UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.findings import Finding, Verdict
from lorahub.merging.apart import Weight, Weights, factors, is_number, targets_of, weighted
from lorahub.merging.job import Job
from lorahub.names import Ref
from lorahub.opening import Base, open_base, recorded_base
from lorahub.plugins import load_registry
from lorahub.sources import Given, header_of
from lorahub.weights import Numbers, finite, for_each

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Several", "named_weights", "open_recorded", "prepare"]

Several: TypeAlias = "Mapping[str, Given] | Sequence[Given] | Given | Combination"
"""Adapters by name, as one or a list of them whose names are taken from them, or as a sum (``0.7 * a - b``)."""


def prepare(
    base: Source | nn.Module | Base | None,
    adapters: Several,
    *,
    weights: Weights | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    mode: str = "fast",
    dtype: str | None = None,
    hub: str | None = None,
    whole: bool = True,
    progress: Progress = quiet,
) -> Job:
    """Plan and judge a merge; headers only, nothing is refused yet.

    Args:
        base: a folder, a file, ``ns/name[@COMMIT]`` or a live model; None takes the one that the first adapter records.
        adapters: by name, a list of references whose names are taken from them, or a sum (``0.7 * a - b``).
        weights: one number for all, or one per adapter, in order or by name; they replace weights in references.  Each
            is a number, or apart for components, blocks, layers: see ``apart.Weight``.
        allow: finding codes to accept.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one.  None takes what each
            adapter's record or file says; where that is nothing, a finding asks.
        mode: how sums are made and rounded; see ``merge``.
        dtype: what the result is stored in; see ``merge``.
        hub: path of a folder hub.
        whole: the adapters' tensors will be wanted too, so those on a hub are pulled; else parts of files are read.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    choice = as_compat(compat)
    named = _named(adapters)
    if not named:
        raise UsageError("no adapter was given", "lorahub merge REF --base BASE -o FOLDER")
    own = {name: weight for name, (_, weight) in named.items()}
    plain, rules = _rules(list(named), None if weights is None else for_each(weights, len(named)))
    chosen = _weights(list(named), plain, own)
    if base is None:
        source = next(iter(named.values()))[0]
        first = header_of(source, registry, hub=hub, progress=progress, whole=whole, allow=allow)
        opened = open_recorded(first, progress, hub=hub)
    else:
        opened = open_base(base, digest=True, hub=hub, progress=progress)

    def read(index: BaseIndex) -> dict[str, AdapterHeader]:
        return {
            name: header_of(
                source, registry, hub=hub, progress=progress, index=index, compat=choice, whole=whole, allow=allow
            )
            for name, (source, _) in named.items()
        }

    headers = read(opened.index)
    index = _deepened(opened.index, headers.values())
    if index is not opened.index:
        headers = read(index)
    words: dict[Target, Layout] = {}  # of modules that the base has under other names
    for name, header in headers.items():
        headers[name], found_there = translated(header, index, registry.kinds)
        words |= found_there
    planned = plan_merge(
        index,
        cast("Framework", Translating(opened.framework, words)) if words else opened.framework,
        {name: (header, chosen[name]) for name, header in headers.items()},
        registry.kinds,
        allow=tuple(allow),
        compat=choice,
        mode=mode,
    )
    planned = _weighed(planned, rules, choice) if rules else planned
    planned = planned if dtype is None else cast_plan(planned, index, dtype)
    found = tuple(
        dict.fromkeys(
            finding
            for header in headers.values()
            for finding in (
                *opened.findings,
                *checks.findings(header, opened.index, opened.framework, planned, kin=opened),
            )
        )
    )
    return Job(
        base=opened,
        headers=headers,
        weights=chosen,
        plan=planned,
        findings=found,
        allowed=tuple(allow),
        compat=choice,
        rules=rules,
    )


def _rules(
    names: Sequence[str], given: Sequence[Weight] | Mapping[str, Weight] | None
) -> tuple[Sequence[float] | Mapping[str, float] | None, dict[str, Weight]]:
    """Weights as one number an adapter, and the rules of those that have more than one, which are at 1 there."""
    if given is None:
        return None, {}
    if isinstance(given, Mapping):
        rules = {name: weight for name, weight in given.items() if not is_number(weight)}
        return {name: 1.0 if name in rules else cast("float", weight) for name, weight in given.items()}, rules
    rules = {name: weight for name, weight in zip(names, given, strict=False) if not is_number(weight)}
    return [cast("float", weight) if is_number(weight) else 1.0 for weight in given], rules


def _weighed(planned: Plan, rules: Mapping[str, Weight], compat: Compat | None) -> Plan:
    """The plan with weights by component, block or layer.

    Raises:
        UsageError: under ``compat="peft"``, where an adapter's weight goes into its factors.
        RecipeError: a rule speaks of what the adapter does not change.
    """
    if compat == "peft":
        raise UsageError(
            'under compat="peft" weights go into the factors, one for each adapter', "give each adapter one number"
        )
    return weighted(
        planned,
        {
            name: factors(rules[name], targets, name=name) if name in rules else dict.fromkeys(targets, 1.0)
            for name, targets in targets_of(planned).items()
        },
    )


def _deepened(index: BaseIndex, headers: Collection[AdapterHeader]) -> BaseIndex:
    """The index of the deeper model that all adapters are for; the base's own where they agree on none."""
    asked = {ranges_of(header.reading.hints) for header in headers}
    ranges = asked.pop() if len(asked) == 1 else ()
    return repeated(index, ranges) if ranges and why_not(index, ranges) is None else index


def open_recorded(header: AdapterHeader, progress: Progress, *, hub: str | None = None) -> Base:
    """The base that an adapter records, by its name in a hub: at the recorded commit, where there is one.

    Raises:
        UsageError: it records none.
        Unavailable: it is not at hand.
    """
    named = recorded_base(header)
    try:  # never a path that lies here
        base = open_base(Ref.parse(named, bare=True), digest=True, hub=hub, progress=progress)
    except Unavailable as error:
        raise type(error)(
            f"{header.label} records {named} as its base, which cannot be had: {error.message}",
            "name one that is at hand: --base FOLDER",
        ) from None
    if header.record is None or header.record.base is None or header.record.base.revision:
        return base
    return replace(base, findings=(*base.findings, _taken(named, base.index.ref)))


def _taken(named: str, ref: BaseRef) -> Finding:
    """Which commit a base is at whose record names none."""
    return Finding(
        code="base-commit-chosen",
        axis="base",
        level=Verdict.EXACT,
        message=f"the record names {named} and no commit of it, so it was taken as it is now: {ref}",
        remedy=f"lorahub record FOLDER --base {ref.repo}@{ref.commit}   (if that is the one it was trained on)",
    )


def named_weights(adapters: Several, weights: Numbers | None = None) -> dict[str, tuple[Given, float]]:
    """Adapters by name with the weight that is asked for, or that their reference carries.

    Raises:
        UsageError: a weight too many or too few, for an unknown name, or no finite number.
    """
    named = _named(adapters)
    given = None if weights is None else for_each(weights, len(named))
    chosen = _weights(list(named), given, {name: weight for name, (_, weight) in named.items()})
    return {name: (source, chosen[name]) for name, (source, _) in named.items()}


def _named(adapters: Several) -> dict[str, tuple[Given, float]]:
    """Adapters by name, with the weight that their reference carries (1 where it carries none).

    Raises:
        UsageError: something is no adapter and no reference to one.
    """
    if isinstance(adapters, Combination):
        return _of_sum(adapters)
    if isinstance(adapters, Mapping):
        return {name: (source, _weight(source)) for name, source in adapters.items()}
    several: object = adapters  # whatever its type says: it is what people wrote
    if isinstance(several, _ONE):
        several = [several]
    if not isinstance(several, Iterable):
        raise _no_adapter(several)
    result: dict[str, tuple[Given, float]] = {}
    for source in several:
        weight = _weight(source)
        found: Given = source if isinstance(source, Adapter | AdapterHeader) else as_ref(source)
        result[_free(_stem(found), result)] = (found, weight)
    return result


_WRITTEN = (str, os.PathLike, Ref)
"""What one adapter is written as."""

_ONE = (*_WRITTEN, Adapter, AdapterHeader)
"""The same, or what it is."""


def _no_adapter(given: object) -> UsageError:
    return UsageError(
        f"a {type(given).__name__} is no adapter, and no reference to one",
        "give a folder, a file, NS/NAME[@SELECTOR], what lorahub.load gave, a list of these, or a mapping: "
        '{"style": "NS/NAME"}',
    )


def _stem(source: Given) -> str:
    """What an adapter is called where nobody says so."""
    if isinstance(source, Adapter):
        return _stem(source.header) if source.header else "adapter"
    if isinstance(source, AdapterHeader):
        return Path(source.label).name
    ref = as_ref(source)
    return ref.name or (ref.repo or ref.path or "adapter").rstrip("/").rpartition("/")[2]


def _free(stem: str, taken: Collection[str]) -> str:
    return next(each for each in (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))) if each not in taken)


def _of_sum(adapters: Combination) -> dict[str, tuple[Given, float]]:
    """The adapters of a sum, called by their labels; each at its own weight."""
    result: dict[str, tuple[Given, float]] = {}
    for number, (each, weight) in enumerate(adapters.terms, start=1):
        if not isinstance(each, Adapter):
            raise UsageError(f"term {number} of the sum is no adapter, but a {type(each).__name__}")
        stem = _stem(each)
        result[stem if stem not in result else f"{stem}-{number}"] = (each, weight)
    return result


def _weight(source: Given) -> float:
    if isinstance(source, Adapter | AdapterHeader):
        return 1.0
    if not isinstance(source, _WRITTEN):
        raise _no_adapter(source)
    weight = as_ref(source).weight
    return 1.0 if weight is None else weight


def _weights(
    names: Sequence[str], given: Sequence[float] | Mapping[str, float] | None, own: Mapping[str, float]
) -> dict[str, float]:
    if given is None:
        result = dict(own)
    elif isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise UsageError(
                f"weights name adapters that were not given: {', '.join(unknown)}",
                f"the adapters are {', '.join(names)}",
            )
        result = {name: given.get(name, own[name]) for name in names}
    else:
        result = dict(zip(names, given, strict=True))
    if not all(map(is_number, result.values())):
        raise UsageError(
            "here an adapter has one weight", "by component or block: lorahub.merge, and load_lora_weights of a plugin"
        )
    return {name: finite(weight, whose=name) for name, weight in result.items()}
