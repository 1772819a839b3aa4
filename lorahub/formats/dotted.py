"""Files under dotted names, whatever comes before and after them: split, placed in the base, brought together.

What diffusers, ComfyUI, ai-toolkit, SimpleTuner, DiffSynth and OneTrainer write differs in what stands before a
module's path and in where alpha is; what stands behind it is one table.  Formats give the first, the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.kind import JSON, Group
from lorahub.files.header import Header
from lorahub.findings import Finding
from lorahub.formats.dotted_metadata import Statements
from lorahub.formats.families import representatives
from lorahub.formats.fitting import fit_factors
from lorahub.formats.flat_spellings import NUMBERS, REFUSED, UNSCALED
from lorahub.formats.format import AdapterFiles, Part
from lorahub.formats.gather import Trouble, Ways
from lorahub.formats.modules import Modules
from lorahub.formats.runs import Splits, Stem
from lorahub.formats.sorts import read_modules
from lorahub.formats.stems import Stems, note_unused, suffixes_of
from lorahub.formats.token_vectors import bundled, left_out

__all__ = ["SYNONYMS", "Dotted", "Endings", "hints_of", "read_dotted"]

SYNONYMS: Mapping[str, str] = MappingProxyType({"text_encoder_3": "text_encoder_2"})
"""Component of a file -> another that a pipeline may have instead: a T5 is its third text encoder, or its second."""

_BARE = "weight"
"""A suffix that says nothing by itself; IA3's is one, and is known by the flag beside it."""

_LONGEST = 3
"""Parts of a suffix, as in ``lora_linear_layer.down.weight``."""


class Endings:
    """Paths -> (module, suffix), by the longest suffix that is known; both empty where none is.

    Args:
        ways: how kinds are spelled.
        header: of the file, for what stands beside a key.
    """

    def __init__(self, ways: Ways, header: Header) -> None:
        self._known = _one(frozenset({*suffixes_of(ways), *NUMBERS, *REFUSED} - {_BARE}))
        self._header = header

    def split(self, path: str) -> tuple[str, str]:
        """Take a path apart; an adapter's name inside, as in ``lora_A.default.weight``, is left out."""
        return _split(path, self._known)

    def splits(self, apart: Callable[[str], tuple[str, str]]) -> Splits:
        """Keys taken apart, first by ``apart``; where nothing is known of a suffix, the path is whole."""
        return _splits(apart, self._known)

    def grown(self, key: str) -> bool:
        """Whether a key that ends in ``.weight`` is IA3's."""
        return key.endswith(f".{_BARE}") and f"{key.removesuffix(_BARE)}on_input" in self._header.tensors


_NAMED = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
"""Modules of PEFT that hold one tensor for each adapter, by its name."""


@lru_cache(maxsize=1 << 8)
def _one(suffixes: frozenset[str]) -> frozenset[str]:
    """The same object for the same suffixes: paths are remembered by it."""
    return suffixes


@lru_cache(maxsize=1 << 5)  # the formats, and some components that headers name
def _splits(apart: Callable[[str], tuple[str, str]], known: frozenset[str]) -> Splits:
    def split(key: str) -> tuple[Stem, str]:
        component, path = apart(key)
        module, suffix = _split(path, known) if path else ("", "")
        return (component, module if suffix else path), suffix

    return Splits(split)


def _split(path: str, known: frozenset[str]) -> tuple[str, str]:
    parts = path.split(".")
    for count in range(min(_LONGEST, len(parts) - 1), 0, -1):
        suffix = ".".join(parts[-count:])
        if suffix in known:
            return ".".join(parts[:-count]), suffix
        if count > 1 and parts[-count] in _NAMED and len(parts) > count:
            short = ".".join([parts[-count], *parts[len(parts) - count + 2 :]])
            for each in (short, short.removesuffix(".weight")):
                if each in known:
                    return ".".join(parts[:-count]), each
    return "", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dotted:
    """What became of a file's keys.

    Attributes:
        groups: modules under the base's names where they were found there.
        parts: token vectors that travel with the file.
        findings: what there is to say.
    """

    groups: Sequence[Group]
    parts: Mapping[str, Part]
    findings: tuple[Finding, ...]


def read_dotted(
    files: AdapterFiles,
    file: str,
    index: BaseIndex | None,
    *,
    ways: Ways,
    apart: Callable[[str], tuple[str, str]],
    statements: Statements,
) -> Dotted:
    """Account for every key.

    Args:
        files: headers, and where the numbers lie.
        file: the weights file.
        index: the base, or None.
        ways: how kinds are spelled.
        apart: key -> (component, path), or ("", "") for a key of another form.
        statements: what the header says of alphas.

    Raises:
        IntegrityError: a number is no single number.
    """
    header, trouble = files.headers[file], Trouble()
    parts = bundled(header)
    endings, stems = Endings(ways, header), Stems(files, file, ways, trouble)
    splits = endings.splits(apart)
    split, suffixes = splits.of(header.tensors)
    if "" in suffixes:
        split, suffixes = _grown([*header.tensors], split, suffixes, endings)
    runs = stems.bring_together(split, suffixes, parts, clash=splits.clash)
    placed = _placed(runs.stems, index)
    groups: Sequence[Group] = read_modules(runs, placed, runs.stems, stems, statements, ways, header, trouble)
    if index is not None:
        groups = tuple(fit_factors(_landed(group, index), index) for group in groups)
    note_unused(groups, trouble, {*UNSCALED, "replace"})
    if stems.unknown:
        trouble.add("key-unknown", stems.unknown, stems.unknown[0])
    return Dotted(groups=groups, parts=parts, findings=(*trouble.findings(), *left_out(parts, others=bool(groups))))


def _grown(
    keys: Sequence[str], split: Sequence[Stem], suffixes: Sequence[str], endings: Endings
) -> tuple[list[Stem], list[str]]:
    """The same columns with IA3's keys taken apart, which other keys tell."""
    split, suffixes = list(split), list(suffixes)
    for at, (key, (component, path), suffix) in enumerate(zip(keys, split, suffixes, strict=True)):
        if not suffix and path and endings.grown(key):
            split[at], suffixes[at] = (component, path.removesuffix(f".{_BARE}")), _BARE
    return split, suffixes


def _placed(modules: Sequence[Stem], index: BaseIndex | None) -> Sequence[Stem]:
    """Components and modules as spelled -> the base's where it has them."""
    if index is None:
        return modules
    known = Modules(index, synonyms=SYNONYMS)
    named: dict[str, list[str]] = {}
    for component, module in modules:
        named.setdefault(component, []).append(module)
    parts = known.parts(named)

    def place(component: str, module: str) -> Stem:
        found = known.find(parts[component], module)
        return parts[component], found[0] if len(found) == 1 else module

    return [place(*each) for each in modules]


def _landed(group: Group, index: BaseIndex | None) -> Group:
    """A difference lands on ``module.weight``, or, where the base has that parameter, on ``module`` itself."""
    if index is None or group.kind != "full" or group.parameter != "weight":
        return group
    name = Target(group.component, group.module, "weight").name
    bare = name.removesuffix(".weight")
    if name in index.parameters or bare not in index.parameters:
        return group
    module, _, parameter = group.module.rpartition(".")
    return replace(group, module=module, parameter=parameter)


def hints_of(groups: Sequence[Group]) -> dict[str, JSON]:
    """What writing wants back: the role of each target whose spelling says one."""
    if not any(each.role for each in representatives(groups)):
        return {}
    roles: dict[str, JSON] = {
        Target(group.component, group.module, group.parameter).name: group.role for group in groups if group.role
    }
    return {"roles": roles} if roles else {}
