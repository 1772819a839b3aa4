"""PEFT's tensors without ``adapter_config.json``: which modules and kinds they are, and nothing of how strong.

The names tell the type where one type has all of them; alpha, and with it the scale, nobody can tell, and none is made
up: the groups have no scale, so that they can be looked at and not be built, and a finding says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from lorahub.bases.index import BaseIndex
from lorahub.deltas.disputes import Choice
from lorahub.deltas.kind import JSON, Group, Kind, Spelling, TensorRef
from lorahub.errors import IntegrityError, LorahubError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.peft.bare import group_bare
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.fits import suffixes
from lorahub.formats.peft.groups import Grouped, group_factors
from lorahub.formats.peft.keys import Names, Stems, take_apart
from lorahub.formats.peft.parameters import attention_outputs, owners

__all__ = ["CONFIG_MISSING", "looked_at"]

CONFIG_MISSING = "config-missing"
"""The finding's code."""

_FORMAT = "peft"
_SCALES = ("alpha", "lora_alpha", "scaling")
"""Config fields that a scale is made of."""

_UNREADABLE = "config-unreadable"
"""The code under which modules are left over whose kind needs the config."""

_SPARSE: tuple[Mapping[str, JSON], ...] = ({}, {"use_dora": True})
"""Configs that say nothing but what names can tell."""

_UNTOLD = ("alpha", "scale", "scale_rule")
"""Options that follow from these."""


def looked_at(file: str, header: Header, kinds: Sequence[Kind], index: BaseIndex | None) -> Grouped:
    """Groups that can be told by names and shapes alone, without a scale, and findings for every other key.

    Args:
        file: the weights file's name.
        header: of it.
        kinds: all that are registered.
        index: the base, or None.
    """
    stems = Stems(index)
    ways = _likeliest(header, kinds, stems)
    found = take_apart(header.tensors, suffixes(ways, shared=False), suffixes(ways, shared=True), stems)
    owned = owners(found, header, {}, stems, index, attention_outputs(found))
    factors = group_factors(found, ways, header, {}, stems, owned, Choice(None))
    whole = group_bare(found, header, {}, stems, index)
    told = [each for each in factors.findings if each.code != _UNREADABLE]
    untold = [key for each in factors.findings if each.code == _UNREADABLE for key in each.where]
    left = (*untold, *whole.unknown, *found.foreign)
    findings = [*told, *whole.findings, _missing(file, ways)]
    if left:
        findings.append(_unexplained(left))
    return Grouped((*factors.groups, *whole.groups), factors.shared, tuple(findings))


def _likeliest(header: Header, kinds: Sequence[Kind], stems: Stems) -> list[tuple[Kind, Spelling]]:
    """The kinds of the type whose spellings have most of the names; of several, LoRA's, which most files are."""
    by_tag: dict[str, list[tuple[Kind, Spelling]]] = {}
    for kind in kinds:
        for spelling in kind.spellings:
            if spelling.format == _FORMAT and spelling.when({}):
                by_tag.setdefault(spelling.tag, []).append((kind, _unscaled(kind, spelling)))

    def named(tag: str) -> tuple[int, bool]:
        own, shared = (suffixes(by_tag[tag], shared=each) for each in (False, True))
        return _count(take_apart(header.tensors, own, shared, stems)), tag == "LORA"

    return by_tag[max(by_tag, key=named)] if by_tag else []


def _count(found: Names) -> int:
    return sum(map(len, found.factors.values())) + len(found.shared)


def _unscaled(kind: Kind, spelling: Spelling) -> Spelling:
    """The same names; of what an empty config gives, all that is no scale, as kinds need it to tell what they touch."""
    said: dict[str, JSON] = {"scale_rule": "unknown"} if any(each in spelling.fields for each in _SCALES) else {}

    def options(_config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
        plain: dict[str, JSON] = {}
        for config in _SPARSE:
            with suppress(LorahubError):  # a field that it cannot do without
                plain = spelling.options(config, module, slots)
                break
        made = {name: value for name, value in plain.items() if name not in _UNTOLD} | said
        try:
            with suppress(LorahubError):  # it is judged again with the module's role
                kind.touches(Group(module=module, kind=kind.name, slots=slots, options=made))
        except KeyError as option:  # what it changes follows from the config, not from its tensors
            raise UnsupportedKind(f"{module}: without {CONFIG} nobody knows its {option.args[0]}") from None
        except IndexError:  # with a config, its own reader of options would have judged the shapes first
            raise IntegrityError(f"{module}: its tensors have too few dimensions for {kind.title}") from None
        return made

    return replace(spelling, options=options, disputed=_undisputed, complete=None)


def _undisputed(
    _config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef], _options: Mapping[str, JSON]
) -> None:
    return None


def _missing(file: str, ways: Sequence[tuple[Kind, Spelling]]) -> Finding:
    scaled = any(field in spelling.fields for _, spelling in ways for field in _SCALES)
    lost = "alpha, and so the adapter's scale and strength," if scaled else "how its tensors are meant"
    return Finding(
        code=CONFIG_MISSING,
        axis="format",
        level=Verdict.INCOMPATIBLE,
        message=f"{file} holds PEFT tensors, but no {CONFIG} with a peft_type lies beside it; without it {lost} cannot "
        "be known",
        where=(file,),
        remedy=f"put the {CONFIG} that was saved with it into the same folder"
        + (", or write one with peft_type, r and lora_alpha, if you know them" if scaled else ""),
    )


def _unexplained(keys: Sequence[str]) -> Finding:
    return Finding(
        code="key-unknown",
        axis="format",
        level=Verdict.DEGRADED,
        message=f"{len(keys)} tensors are no slot of any kind, and no {CONFIG} says what they are",
        where=tuple(keys),
        remedy=f"put the {CONFIG} that was saved with it into the same folder",
        allowable=True,
    )
