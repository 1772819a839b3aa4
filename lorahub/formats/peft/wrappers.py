"""PEFT's wrappers around one module, each of which adapts one of its parameters: which factors are whose.

Several wrappers of a module lie one around the other, in the order in which it registers its parameters, which no file
says.  Factors that fit one parameter only tell it; else the order that is known of experts does, or nobody can.  Works
on names and sizes, against the base where there is one; computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import final

from packaging.version import InvalidVersion, Version

from lorahub.bases.experts import stack_shape
from lorahub.bases.index import BaseIndex
from lorahub.deltas.disputes import Dispute
from lorahub.deltas.kind import JSON
from lorahub.deltas.peft_config import chosen
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.formats.peft.keys import WRAPPED, Names, Stems
from lorahub.formats.peft.owner import SQUARE, Owner
from lorahub.formats.peft.rules import untargeted
from lorahub.formats.peft.written import written_down

__all__ = ["Wrappers", "in_registration_order"]

_ORDER = (
    "w1",
    "v1",
    "w2",
    "gate_proj",
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)
"""Parameters of experts in the order in which transformers 5 registers them, whatever the architecture."""

_PAIRS = (("gate_up_proj", "down_proj", 2), ("up_proj", "down_proj", 1))
"""Parameters of one feed-forward network: what the first puts out is so many times what the second takes in."""

_MOST = 5  # parameters of one module; beyond that their order is not searched for


@dataclass(frozen=True, slots=True)
class _Level:
    """One wrapper: the stem its factors lie behind, and the sizes of these."""

    stem: str
    rows: int
    inputs: int
    outputs: int
    cols: int


def in_registration_order(parameters: Iterable[str]) -> tuple[str, ...] | None:
    """Several parameters of one module in the order in which it registers them, or None where that is not known."""
    listed = list(parameters)
    if len(listed) > 1 and not all(name in _ORDER for name in listed):
        return None
    return tuple(sorted(listed, key=_ORDER.index)) if len(listed) > 1 else tuple(listed)


@final
class Wrappers:
    """Reads one file: names and sizes against what the config targets, and the base where there is one."""

    def __init__(
        self,
        found: Names,
        header: Header,
        config: Mapping[str, JSON],
        stems: Stems,
        index: BaseIndex | None,
        wanted: Sequence[str],
    ) -> None:
        self._found, self._header, self._config, self._stems, self._index = found, header, config, stems, index
        self._wanted, self._written = wanted, written_down(header)
        self._parameters = index.modules() if index else {}
        self._loose = frozenset(untargeted(found.factors, config)) if config.get("target_modules") else found.factors

    def candidates(self, module: str) -> tuple[str, ...]:
        """The parameters of a module that ``target_parameters`` names, by PEFT's rules."""
        known = self._stems.find(module)
        if known is not None:
            spelled = {module, known}
            return tuple(
                name
                for name in self._parameters.get(known, ())
                if any(f".{each}.{name}".endswith(f".{target}") for each in spelled for target in self._wanted)
            )
        dotted = (target.rpartition(".") for target in self._wanted)
        found = (
            name
            for around, _, name in dotted
            if name and (f".{module}".endswith(f".{around}") if around else module in self._loose)
        )
        return tuple(dict.fromkeys(found))

    def read(self, module: str, by_depth: Mapping[int, str]) -> dict[str, Owner]:
        """Stem -> parameter, for all wrappers of one module."""
        stems = [by_depth[depth] for depth in sorted(by_depth, reverse=True)]  # the innermost first
        levels = [self._level(stem) for stem in stems]
        parameters = self.candidates(module)
        if any(level is None for level in levels):
            return _all(module, stems, "has other tensors than a pair of matrices, which PEFT has on no parameter")
        if sorted(by_depth) != list(range(len(stems))):
            return _all(module, stems, f"has {WRAPPED} in a name more often than there are factors")
        sized = [level for level in levels if level is not None]
        if all(stem in self._written for stem in stems):
            entries = [self._written[stem] for stem in stems]
            way = next((entry["transposed"] for entry in entries if entry.get("transposed") is not None), None)
            parameters = tuple(str(entry["parameter"]) for entry in entries)
            if way is not None or self._shape(module, parameters[0]) is None:
                return self._placed(module, zip(sized, parameters, strict=True), None if way is None else way is True)
            return self._by_shape(module, sized, parameters, fixed=True)
        if len(parameters) != len(stems):
            named = ", ".join(parameters) or "none"
            says = f"has factors for {len(stems)} of its parameters, and target_parameters names {named}"
            return _all(module, stems, says)
        if self._shape(module, parameters[0]) is not None:
            return self._by_shape(module, sized, parameters)
        order = in_registration_order(parameters)
        if order is None:
            says = f"has factors for {' and '.join(parameters)}, and which are whose only the base can tell"
            return _all(module, stems, says)
        return self._placed(module, zip(sized, order, strict=True), True if self._old else None)

    def _level(self, stem: str) -> _Level | None:
        keys = self._found.factors[stem]
        if keys.keys() != {"lora_A.weight", "lora_B.weight"}:
            return None
        down, up = (self._header.tensors[keys[suffix]].shape for suffix in ("lora_A.weight", "lora_B.weight"))
        return _Level(stem, *down, *up) if len(down) == len(up) == 2 else None

    def _shape(self, module: str, parameter: str) -> tuple[int, ...] | None:
        if self._index is None:
            return None
        known = self._stems.find(module)
        if known is None:
            return stack_shape(self._index, module, parameter)
        info = self._index.parameters.get(self._index.stored(f"{known}.{parameter}"))
        return info.shape if info else None

    @property
    def _old(self) -> bool:
        """Whether a PEFT before 0.19 trained it: it took every stack for [E, in, out]."""
        stated = self._config.get("peft_version")
        if stated is None:
            return True  # written since 0.18
        try:
            return Version(str(stated).partition("@")[0]).release < (0, 19)
        except InvalidVersion:
            return False

    def _by_shape(
        self, module: str, levels: Sequence[_Level], parameters: tuple[str, ...], *, fixed: bool = False
    ) -> dict[str, Owner]:
        """As the factors fit the base, in any order of the parameters or in the one that is fixed."""
        stems = [level.stem for level in levels]
        if len(parameters) > _MOST:
            return _all(module, stems, f"has factors for {len(parameters)} parameters, more than is understood")
        shapes = {name: self._shape(module, name) or () for name in parameters}
        fitting = [
            (order, way)
            for order in ([parameters] if fixed else permutations(parameters))
            for way in ((False, True) if any(len(shape) == 3 for shape in shapes.values()) else (None,))
            if all(_fits(level, shapes[name], way) for level, name in zip(levels, order, strict=True))
        ]
        usual = parameters if fixed else in_registration_order(parameters)
        now = self._way(module)
        if not fitting:  # said where the factors are held against the base
            if usual is None:
                return _all(module, stems, f"has factors that fit no order of {', '.join(parameters)}")
            return self._placed(module, zip(levels, usual, strict=True), True if self._old else now)
        dispute = None
        ways = {way for _, way in fitting}
        if len(ways) > 1:
            if now is None:
                says = f"is square, and whether {parameters[0]} is stored [in, out] or [out, in] cannot be told"
                return _all(module, stems, says)
            dispute = SQUARE if self._old and not now else None
            fitting = [each for each in fitting if each[1] == now]
        orders = [order for order, _ in fitting]
        if len(orders) > 1 and usual not in orders:
            says = f"has factors that fit {' and '.join(parameters)} in several orders"
            return _all(module, stems, says)
        order = orders[0] if len(orders) == 1 or usual is None else usual
        return self._placed(module, zip(levels, order, strict=True), fitting[0][1], dispute)

    def _way(self, module: str) -> bool | None:
        """Whether the base stores a module's stacks [E, in, out]: as declared, or as its shapes have it."""
        known = self._stems.find(module)
        if self._index is None:
            return None
        if known is None:
            return False  # experts that a base keeps one by one are linear layers
        infos = {name: self._index.parameters.get(f"{known}.{name}") for name in self._parameters.get(known, ())}
        declared = {info.turned for info in infos.values() if info and info.turned is not None}
        if len(declared) == 1:
            return declared.pop()
        for first, second, times in _PAIRS:
            one, other = infos.get(first), infos.get(second)
            if one and other and len(one.shape) == len(other.shape) == 3:
                (_, a, b), (_, c, d) = one.shape, other.shape
                straight, turned = (a, b) == (times * d, c), (a, b) == (d, times * c)
                return None if straight == turned else turned
        return None

    def _placed(
        self,
        module: str,
        pairs: Iterable[tuple[_Level, str]],
        way: bool | None,
        dispute: Dispute | None = None,
    ) -> dict[str, Owner]:
        result = {}
        for level, parameter in pairs:
            shape, name = self._shape(module, parameter), f"{module}.{parameter}"
            experts = self._by_rank(level, name) if shape is None else shape[0] if len(shape) == 3 else 0
            result[level.stem] = Owner(
                module=module,
                parameter=parameter,
                experts=experts,
                transposed=way if experts else None,
                named=name,
                way=dispute if experts else None,
            )
        return result

    def _by_rank(self, level: _Level, name: str) -> int:
        """How many experts there are by the rank that the config states; 0 where that is one or none."""
        try:
            stated, _ = chosen(self._config, "rank_pattern", "r", name)
        except (IntegrityError, UnsupportedKind):  # said where the kind reads the same field for its scale
            return 0
        whole = isinstance(stated, int) and stated > 0 and not level.rows % stated
        experts = level.rows // int(stated) if whole and stated else 0
        return experts if experts > 1 else 0


def _all(module: str, stems: Iterable[str], problem: str) -> dict[str, Owner]:
    return {stem: Owner(module=module, problem=problem) for stem in stems}


def _fits(level: _Level, shape: tuple[int, ...], way: bool | None) -> bool:
    """Whether a pair of stored factors can be those of a parameter of ``shape``."""
    if level.rows != level.cols:
        return False
    if len(shape) == 2:
        return (level.outputs, level.inputs) == shape
    if len(shape) != 3 or not shape[0] or level.rows % shape[0]:
        return False
    return (level.inputs, level.outputs) == (shape[1:] if way else shape[:0:-1])
