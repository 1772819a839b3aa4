"""Files under dotted names, whatever comes before and after them: split, placed in the base, brought together.

What diffusers, ComfyUI, ai-toolkit, SimpleTuner, DiffSynth and OneTrainer write differs in what stands before a
module's path and in where alpha is; what stands behind it is one table.  Formats give the first, the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.kind import JSON, Group
from lorahub.files.header import Header
from lorahub.findings import Finding
from lorahub.formats.dotted_metadata import Statements
from lorahub.formats.fitting import fit_factors
from lorahub.formats.flat_spellings import NUMBERS, REFUSED, UNSCALED
from lorahub.formats.format import AdapterFiles, Part
from lorahub.formats.gather import Trouble, Ways, gather
from lorahub.formats.modules import Modules
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
        self._known = {*suffixes_of(ways), *NUMBERS, *REFUSED} - {_BARE}
        self._header = header

    def split(self, path: str) -> tuple[str, str]:
        """Take a path apart; an adapter's name inside, as in ``lora_A.default.weight``, is left out."""
        parts = path.split(".")
        for count in range(min(_LONGEST, len(parts) - 1), 0, -1):
            suffix = ".".join(parts[-count:])
            if suffix in self._known:
                return ".".join(parts[:-count]), suffix
            if count > 1 and parts[-count] in _NAMED and len(parts) > count:
                short = ".".join([parts[-count], *parts[len(parts) - count + 2 :]])
                for each in (short, short.removesuffix(".weight")):
                    if each in self._known:
                        return ".".join(parts[:-count]), each
        return "", ""

    def grown(self, key: str) -> bool:
        """Whether a key that ends in ``.weight`` is IA3's."""
        return key.endswith(f".{_BARE}") and f"{key.removesuffix(_BARE)}on_input" in self._header.tensors


_NAMED = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
"""Modules of PEFT that hold one tensor for each adapter, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dotted:
    """What became of a file's keys.

    Attributes:
        groups: modules under the base's names where they were found there.
        parts: token vectors that travel with the file.
        findings: what there is to say.
    """

    groups: tuple[Group, ...]
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
    taken = {ref.key for part in parts.values() for ref in part.tensors.values()}
    endings, stems = Endings(ways, header), Stems(files, file, ways, trouble)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in header.tensors:
        if key in taken:
            continue
        component, path = apart(key)
        module, suffix = endings.split(path) if path else ("", "")
        if path and not suffix and endings.grown(key):
            module, suffix = path.removesuffix(f".{_BARE}"), _BARE
        if not suffix:
            stems.unknown.append(key)
        elif suffix in (keys := found.setdefault((component, module), {})):
            trouble.add("key-twice", [key], f"{key} and {keys[suffix]}")
        else:
            keys[suffix] = key
    stems.read(found.values())
    place = _places(found, index)
    made = []
    for (component, module), keys in found.items():
        stated = statements.of(component, module, [*keys.values()], trouble)
        if (stem := stems.make(*place(component, module), keys, stated)) is not None:
            made.append(stem)
    groups = tuple(fit_factors(_landed(group, index), index) for group in gather(made, ways, header, trouble))
    note_unused(groups, trouble, {*UNSCALED, "replace"})
    if stems.unknown:
        trouble.add("key-unknown", stems.unknown, stems.unknown[0])
    return Dotted(groups=groups, parts=parts, findings=(*trouble.findings(), *left_out(parts, others=bool(groups))))


def _places(modules: Iterable[tuple[str, str]], index: BaseIndex | None) -> Callable[[str, str], tuple[str, str]]:
    """(component, module) as spelled -> the base's where it has them."""
    known = Modules(index, synonyms=SYNONYMS)
    named: dict[str, list[str]] = {}
    for component, module in modules:
        named.setdefault(component, []).append(module)
    parts = known.parts(named)

    def place(component: str, module: str) -> tuple[str, str]:
        found = known.find(parts[component], module)
        return (parts[component], found[0]) if len(found) == 1 else (component, module)

    return place


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
    roles: dict[str, JSON] = {
        Target(group.component, group.module, group.parameter).name: group.role for group in groups if group.role
    }
    return {"roles": roles} if roles else {}
