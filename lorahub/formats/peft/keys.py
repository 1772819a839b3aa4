"""PEFT's tensor names taken apart: ``base_model.model.`` + module + ``.`` + what the kinds call their slots.

Suffixes are looked up among those the kinds declare, and modules among the base's names where a base is known; nothing
is guessed from the shape of a name.  Knows neither configs nor tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lorahub.bases.index import BaseIndex

__all__ = ["MODEL", "ORIGINAL", "PREFIX", "SAVED", "WRAPPED", "Bare", "Names", "Stems", "take_apart"]

MODEL = "base_model."
PREFIX = "base_model.model."

ORIGINAL, SAVED, WRAPPED = "original_module", "modules_to_save", "base_layer"
"""Names that PEFT's wrappers have inside a model, and that raw state dicts keep."""


class Stems:
    """Module paths as files spell them -> the base's own module paths."""

    __slots__ = ("_index", "_modules")

    def __init__(self, index: BaseIndex | None) -> None:
        self._index = index
        self._modules: dict[str, str] = {}
        if index is None:
            return
        modules = index.modules()
        also: dict[str, set[str]] = {}
        for module in modules:
            for other in index.spellings(module):
                also.setdefault(other, set()).add(module)
        # Canonical names win; a spelling that two modules share names neither.
        self._modules = {other: next(iter(found)) for other, found in also.items() if len(found) == 1}
        self._modules |= {module: module for module in modules}

    @property
    def bare(self) -> bool:
        """Whether no base is known."""
        return self._index is None

    def find(self, spelled: str) -> str | None:
        """The base's name for a module, or None where no base is known or it has no such module."""
        return self._modules.get(spelled)

    def has(self, module: str, parameter: str) -> bool:
        """Whether the base has that parameter, the module as a file spells it."""
        found = self.find(module)
        name = f"{found}.{parameter}" if found else parameter
        return self._index is not None and found is not None and name in self._index.parameters

    def shape(self, module: str, parameter: str) -> tuple[int, ...] | None:
        """Of a parameter of the base's module, [out, in, *k] but for stored turns; None where it is not known."""
        info = self._index.parameters.get(self._index.stored(f"{module}.{parameter}")) if self._index else None
        return info.shape if info else None


@dataclass(frozen=True, slots=True)
class Bare:
    """A tensor that is no slot: ``module.parameter``, and the wrapper it was found under, if any."""

    module: str
    parameter: str
    wrapper: str = ""


@dataclass(slots=True)
class Names:
    """The keys of one file, sorted by what they are.

    Attributes:
        factors: module as spelled -> suffix -> key.
        shared: suffix -> key, for tensors that exist once per adapter.
        bare: key -> what it names.
        foreign: keys outside PEFT's name space.
        adapters: adapter names found inside keys, with those keys.
        again: keys that say what another key has said.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    bare: dict[str, Bare] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    adapters: dict[str, list[str]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)


def take_apart(keys: Iterable[str], suffixes: Collection[str], shared: Collection[str], stems: Stems) -> Names:
    """Sort ``keys``.

    Args:
        keys: all names in the file.
        suffixes: of the slots that modules have.
        shared: of the slots that exist once per adapter.
        stems: the base's modules.
    """
    result = Names()
    own = suffixes if isinstance(suffixes, frozenset) else frozenset(suffixes)
    heads = {suffix.partition(".")[0] for suffix in suffixes}
    rests: dict[str, str] = {}
    for key in keys:
        if key.startswith(PREFIX):
            rests[key] = key.removeprefix(PREFIX)
        elif key.removeprefix(MODEL) in shared and key.startswith(MODEL):
            result.shared[key.removeprefix(MODEL)] = key
        else:
            result.foreign.append(key)
    left: dict[str, str] = {}
    for key, rest in rests.items():
        if found := _slot(rest, own, stems):
            _place(result, key, *found)
        elif named := _named_slot(rest, suffixes, heads):
            stem, suffix, adapter = named
            result.adapters.setdefault(adapter, []).append(key)
            _place(result, key, stem, suffix)
        else:
            left[key] = rest
    result.bare = {key: _bare(rest, {"default", *result.adapters}) for key, rest in left.items()}
    return result


def _place(names: Names, key: str, stem: str, suffix: str) -> None:
    module = names.factors.setdefault(stem, {})
    if suffix in module:
        names.again.append(key)
    else:
        module[suffix] = key


def _splits(rest: str) -> Iterator[tuple[str, str]]:
    """(before, after) every dot, the longest second part first."""
    at = rest.find(".")
    while at >= 0:
        yield rest[:at], rest[at + 1 :]
        at = rest.find(".", at + 1)


@lru_cache(maxsize=1 << 15)  # the keys of some twenty bases
def _spelled(rest: str, suffixes: frozenset[str]) -> Sequence[tuple[str, str]]:
    """Every way to take a key apart into a module and a suffix, the longest suffix first."""
    return [(stem, suffix) for stem, suffix in _splits(rest) if suffix in suffixes]


def _slot(rest: str, suffixes: frozenset[str], stems: Stems) -> tuple[str, str] | None:
    """Module and suffix; a module of the base wins over a longer suffix, and a parameter of the base over both."""
    found = _spelled(rest, suffixes)
    if not found:
        return None
    if stems.bare:
        return found[0]
    of_base = next((each for each in found if stems.find(each[0])), None)
    if of_base is None and stems.has(*rest.rpartition(".")[::2]):
        return None
    return of_base or found[0]


def _named_slot(rest: str, suffixes: Collection[str], heads: Collection[str]) -> tuple[str, str, str] | None:
    """Module, suffix and adapter name in a raw state dict: ``q.lora_A.default.weight``, ``q.ia3_l.default``."""
    parts = rest.split(".")
    for at in range(1, len(parts) - 1):
        if parts[at] in heads:
            suffix = ".".join([parts[at], *parts[at + 2 :]])
            # DoRA's magnitude is a module of its own in memory, and loses its ".weight" when PEFT saves it.
            for spelled in (suffix, suffix.removesuffix(".weight")):
                if spelled in suffixes:
                    return ".".join(parts[:at]), spelled, parts[at + 1]
    return None


def _bare(rest: str, adapters: Collection[str]) -> Bare:
    parts = rest.split(".")
    *path, parameter = parts
    for wrapper in (ORIGINAL, SAVED):
        if wrapper in path:
            at = path.index(wrapper)
            inside = path[at + 1 :]
            if wrapper == SAVED and inside and inside[0] in adapters:
                inside = inside[1:]
            return Bare(".".join([*path[:at], *inside]), parameter, wrapper)
    if path and path[-1] == WRAPPED:
        return Bare(".".join(path[:-1]), parameter, WRAPPED)
    return Bare(".".join(path), parameter)
