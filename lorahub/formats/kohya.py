"""Files of kohya's sd-scripts, LyCORIS and the trainers that follow them: one safetensors file, no config.

A key is a prefix that names a part of a pipeline, a module's path with underscores for dots, and a suffix:
``lora_unet_down_blocks_0_..._to_q.lora_down.weight``.  The way back to dots goes through the base's own names, or
through the list that files written here carry in their header; without either, modules stay as spelled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import final

from lorahub import strict_json
from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind
from lorahub.errors import IntegrityError, UnsupportedFormat
from lorahub.files.header import Header
from lorahub.findings import Claim
from lorahub.formats.dotted_metadata import Statements
from lorahub.formats.families import representatives
from lorahub.formats.fitting import fit_factors
from lorahub.formats.flat_names import PREFIXES, take_apart, usual_prefixes
from lorahub.formats.flat_spellings import FORMAT, NUMBERS, READ, REFUSED, SPELLINGS
from lorahub.formats.flat_writing import Draft
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.gather import Trouble, ways_of
from lorahub.formats.marks import Mark
from lorahub.formats.modules import Modules, flat
from lorahub.formats.runs import Splits
from lorahub.formats.sorts import read_modules
from lorahub.formats.stems import TOLERANCE, Stems, note_unused
from lorahub.formats.suffixes import Row
from lorahub.formats.token_vectors import bundled, left_out
from lorahub.hookspecs import hookimpl

__all__ = ["KohyaFormat", "lorahub_formats"]

FILE = "lora.safetensors"

_NAMES = "lorahub.modules"
"""Header key: JSON object, name after the prefix -> the module's dotted path."""

_KEPT = (
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_new_sd_model_hash",
    "ss_sd_model_hash",
    "ss_sd_model_name",
)
"""Header keys that say what the base is."""

_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {"text_encoder_3": "text_encoder_2", "transformer": "unet", "unet": "transformer"}
)
"""Component of a prefix -> another that a pipeline may have instead; Flux files call its second text encoder te3."""

_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"": ("transformer", "unet"), "transformer": ("unet", ""), "unet": ("transformer", "")}
)
"""Component of a prefix -> others under which a header may state its alpha."""

_LARGEST = 1 << 20
"""Bytes of that object; a header holds no more."""

_ALPHA = "alpha"


@final
class KohyaFormat:
    """Reads and writes every algorithm of LyCORIS, and OneTrainer's OFT, in kohya's spelling."""

    name = FORMAT
    rows = tuple(Row(kind=name, leaves=spelling.leaves) for name, spelling in READ.items())
    writes = frozenset(SPELLINGS) - {"full", "oft"}  # those where they have no scale, and are OneTrainer's

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Where a key has one of the prefixes, and a suffix that is known or known to be refused."""
        return Claim(0.8, "tensor names begin with lora_unet_, lora_te_ or lycoris_") if _claimed(files) else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key of the weights file.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number.
        """
        file = _weights_file(files)
        header = files.headers[file]
        ways = ways_of(self.name, READ, kinds)
        trouble = Trouble()
        parts = bundled(header)
        stems = Stems(files, file, ways, trouble)
        split, suffixes = _SPLITS.of(header.tensors)
        runs = stems.bring_together(split, suffixes, parts, clash=_SPLITS.clash)
        placed = _place(runs.stems, header, index, trouble)
        statements = Statements(header, _ALIASES)
        spelled = (
            [(PREFIXES[prefix], module) for (prefix, _), (_, module) in zip(runs.stems, placed, strict=True)]
            if statements
            else ()
        )
        groups: Sequence[Group] = read_modules(runs, placed, spelled, stems, statements, ways, header, trouble)
        if index is not None:
            groups = tuple(fit_factors(group, index) for group in groups)
        note_unused(groups, trouble)
        _compare(groups, header, trouble)
        if stems.unknown:
            trouble.add("key-unknown", stems.unknown, stems.unknown[0])
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            parts=parts,
            findings=(*trouble.findings(), *left_out(parts, others=bool(groups))),
            hints=_hints(header, runs.stems, placed),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell ``deltas``; the dotted names of modules go into the header.

        Args:
            deltas: what the adapter does.
            kinds: every registered kind.
            hints: ``kohya_prefixes`` (component -> prefix) and ``kohya_metadata`` (header keys about the base).

        Raises:
            CannotCarry: listing every target that there is no word for, by reason.
        """
        draft = Draft(ways_of(self.name, SPELLINGS, kinds))
        modules: dict[tuple[str, str], dict[str, Delta]] = {}
        for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
            modules.setdefault((target.component, target.module), {})[target.parameter] = delta
        prefixes = usual_prefixes({component for component, _ in modules}, hints.get("kohya_prefixes"))
        for (component, module), parameters in modules.items():
            draft.spell(component, module, prefixes.get(component, ""), parameters)
        if draft.lost:
            raise draft.refusal()
        kept = hints.get("kohya_metadata")
        metadata = {name: str(kept[name]) for name in _KEPT if name in kept} if isinstance(kept, dict) else {}
        metadata[_NAMES] = json.dumps(draft.names, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return Written(
            file=FILE,
            tensors={key: draft.tensors[key] for key in sorted(draft.tensors)},
            metadata=metadata,
            configs={},
        )


def _suffixes() -> frozenset[str]:
    own = (leaf.suffix for spelling in READ.values() for leaf in spelling.leaves)
    return frozenset([*own, *REFUSED, *NUMBERS])


_SUFFIXES = _suffixes()


_SPLITS = Splits(lambda key: ((apart := take_apart(key))[:2], apart[2]))


def _is_own(key: str) -> bool:
    prefix, _, suffix = take_apart(key)
    return bool(prefix) and suffix in _SUFFIXES


_OWN = Mark(_is_own)


def _claimed(files: AdapterFiles) -> list[str]:
    """The files with a key of this format."""
    return [file for file, header in files.headers.items() if _OWN.on([header])]


def _weights_file(files: AdapterFiles) -> str:
    claimed = sorted(_claimed(files))
    if len(claimed) == 1:
        return claimed[0]
    raise UnsupportedFormat(
        f"{files.folder} holds several adapters: {', '.join(claimed)}" if claimed else f"{files.folder} holds none",
        one_of(files, claimed or files.headers),
    )


def _place(
    modules: Sequence[tuple[str, str]], header: Header, index: BaseIndex | None, trouble: Trouble
) -> list[tuple[str, str]]:
    """For each prefix and name the component and the module: the base's, or what the file lists, or as spelled."""
    declared = _declared(header)
    if index is None and not declared:
        return [(PREFIXES[prefix], spelled) for prefix, spelled in modules]
    if index is None:
        return [(PREFIXES[prefix], declared.get(f"{prefix}_{spelled}", spelled)) for prefix, spelled in modules]
    known = Modules(index, flat, synonyms=_SYNONYMS)
    named: dict[str, list[str]] = {}
    for prefix, spelled in modules:
        named.setdefault(PREFIXES[prefix], []).append(spelled)
    parts = known.parts(named)
    result: list[tuple[str, str]] = []
    for prefix, spelled in modules:
        component = PREFIXES[prefix]
        listed = declared.get(f"{prefix}_{spelled}", spelled)
        found = known.find(parts[component], spelled)
        if listed in found:
            found = (listed,)
        if len(found) > 1:
            trouble.add("module-ambiguous", [], f"{prefix}_{spelled} is {' and '.join(found)}")
        result.append((parts[component], found[0] if len(found) == 1 else listed))
    return result


def _declared(header: Header) -> dict[str, str]:
    """The dotted names in the header of a file written here.

    Raises:
        IntegrityError: it lists what its own keys do not spell.
    """
    text = header.metadata.get(_NAMES)
    if text is None:
        return {}
    try:
        names = strict_json.read(text, limit=_LARGEST)
    except strict_json.NotStrict as error:
        raise IntegrityError(f"the header's {_NAMES} cannot be read: {error}", "fetch the file again") from None
    result = {}
    for spelled, module in names.items() if isinstance(names, dict) else ():
        if not isinstance(module, str) or not any(spelled == f"{prefix}_{flat(module)}" for prefix in PREFIXES):
            raise IntegrityError(f"the header's {_NAMES} says {spelled} for {module!r}", "fetch the file again")
        result[spelled] = module
    return result


def _compare(groups: Sequence[Group], header: Header, trouble: Trouble) -> None:
    """Linear LoRA layers against ``ss_network_alpha``, where training had one alpha for all of them."""
    if header.metadata.get("ss_network_module", "networks.lora") != "networks.lora" or header.metadata.get(
        "ss_network_args", "{}"
    ) not in ("", "{}", "None"):
        return
    try:
        stated = float(header.metadata.get("ss_network_alpha", ""))
    except ValueError:
        return  # absent, "None" or "Dynamic": nothing is stated
    if not stated or not math.isfinite(stated):
        return
    if not any(_differs(each, stated) for each in representatives(groups)):
        return
    for group in groups:
        alpha, down = group.options.get(_ALPHA), group.slots.get("down")
        if _differs(group, stated) and down is not None:
            where = group.slots.get(_ALPHA, down)
            said = "has no alpha, which means" if group.options.get("scale_rule") == "default" else "says"
            trouble.add(
                "alpha-conflict",
                [where.key],
                f"ss_network_alpha in the header says {stated:g}, and {group.module} {said} {alpha:g}",
            )


def _differs(group: Group, stated: float) -> bool:
    """Whether a linear LoRA layer has another alpha than what is stated."""
    alpha, down = group.options.get(_ALPHA), group.slots.get("down")
    if not isinstance(alpha, int | float) or down is None or len(down.shape) != 2:
        return False
    return abs(alpha - stated) > TOLERANCE * abs(stated)


def _hints(header: Header, spelled: Sequence[tuple[str, str]], placed: Sequence[tuple[str, str]]) -> dict[str, JSON]:
    hints: dict[str, JSON] = {}
    if kept := {name: header.metadata[name] for name in _KEPT if name in header.metadata}:
        hints["kohya_metadata"] = dict(kept)
    first = itemgetter(0)
    if found := dict(zip(map(first, placed), map(first, spelled), strict=True)):
        hints["kohya_prefixes"] = dict(found)
    return hints


@hookimpl
def lorahub_formats() -> list[Format]:
    """Kohya's and LyCORIS's."""
    return [KohyaFormat()]
