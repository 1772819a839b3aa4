"""Files of diffusers: ``pytorch_lora_weights.safetensors``, with one PEFT config for each component in its header.

A key is a component of the pipeline, a module's dotted path and a suffix: ``unet.mid_block.to_q.lora_A.weight``.
Releases before 0.22 spelled the suffixes in other ways, and those before 0.18 wrote no component.  Alpha comes from a
tensor or from ``lora_adapter_metadata`` in the header; where both speak they must agree, and without either the scale
is 1, as diffusers has it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Spelling, TensorRef
from lorahub.deltas.peft_config import chosen
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat, UnsupportedKind
from lorahub.files.dtypes import from_torch
from lorahub.files.header import Header
from lorahub.findings import Claim
from lorahub.formats.dotted_metadata import METADATA, configs_of, field_notes
from lorahub.formats.dotted_spellings import FORMAT, PAIRS, SPELLINGS
from lorahub.formats.flat_spellings import WHOLE
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.gather import Stem, Trouble, Ways, gather, ways_of
from lorahub.formats.modules import Modules
from lorahub.formats.numbers import read_numbers
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.suffixes import Row
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["DiffusersFormat", "lorahub_formats"]

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = frozenset(
    {
        "connectors",
        "controlnet",
        "prior",
        "text_conditioner",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformer",
        "transformer_2",
        "transformer_ref",
        "unet",
    }
)
"""How keys begin that name a component."""

_PROCESSORS: Mapping[str, str] = MappingProxyType(
    {
        "processor.to_q_lora": "to_q",
        "processor.to_k_lora": "to_k",
        "processor.to_v_lora": "to_v",
        "processor.to_out_lora": "to_out.0",
        "processor.add_k_proj_lora": "add_k_proj",
        "processor.add_v_proj_lora": "add_v_proj",
    }
)
"""What attention processors called their own layers -> the attention's module that they change."""

_ALPHA = "alpha"
_FOREIGN = ("base_model.model.", "diffusion_model.")
"""How keys of other formats begin."""

_CONTROL = (".key_norm.scale", ".query_norm.scale")
"""Ends of keys that only control adapters in Black Forest Labs' own spelling have."""

_TOLERANCE = 1e-3
"""Relative; alphas are stored in half precision."""


@final
class DiffusersFormat:
    """Reads every spelling that diffusers has had for LoRA and DoRA, and writes the present one."""

    name = FORMAT
    rows = tuple(Row(kind=name, leaves=spelling.leaves) for name, spelling in SPELLINGS.items())
    writes = frozenset(SPELLINGS)

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Where keys end as diffusers ends them: surely behind a component's name, less so without one."""
        if isinstance(files.configs.get(CONFIG, {}).get("peft_type"), str):
            return None
        best = max((_claim(header) for header in files.headers.values()), default=0.0)
        return Claim(best, "tensor names are modules of a pipeline with LoRA factors") if best else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key of the weights file.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number, or the header's JSON is none.
        """
        file = _weights_file(files)
        header = files.headers[file]
        ways = ways_of(self.name, SPELLINGS, kinds)
        configs = configs_of(header)
        trouble = Trouble()
        split = _Splitter(ways, configs)
        modules: dict[tuple[str, str], dict[str, str]] = {}
        unknown: list[str] = []
        for key in header.tensors:
            component, module, suffix = split(key)
            if not suffix:
                unknown.append(key)
            elif suffix in (found := modules.setdefault((component, module), {})):
                trouble.add("key-twice", [key], f"{key} and {found[suffix]}")
            else:
                found[suffix] = key
        alphas = read_numbers(files, file, [keys[_ALPHA] for keys in modules.values() if _ALPHA in keys])
        place = _places(modules, index)
        stems = [
            _stem(which, place(*which), keys, configs.get(which[0], {}), alphas, trouble)
            for which, keys in modules.items()
        ]
        groups = gather(stems, ways, header, trouble)
        if unknown:
            trouble.add("key-unknown", unknown, unknown[0])
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(*trouble.findings(), *field_notes(configs, {group.kind for group in groups})),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell ``deltas`` as diffusers saves them, with a PEFT config for each component in the header.

        Raises:
            CannotCarry: listing every target that there is no word for, by reason.
        """
        ways = ways_of(self.name, SPELLINGS, kinds)
        split = _Splitter(ways, {})
        lost: dict[str, list[str]] = defaultdict(list)
        modules: dict[tuple[str, str], dict[str, Delta]] = {}
        for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
            modules.setdefault((target.component, target.module), {})[target.parameter] = delta
        tensors: dict[str, torch.Tensor] = {}
        groups: dict[str, dict[str, Group]] = {}
        spellings: dict[str, Spelling] = {}
        for (component, module), parameters in modules.items():
            stem = f"{component}.{module}" if component else module
            first = PAIRS[0].suffix
            if not module or split(f"{stem}.{first}") != (component, module, first):
                reason = f"the component {component!r} and such a module cannot be told apart again"
                lost[reason] += [Target(component, module, name).name for name in parameters]
                continue
            try:
                spelling, group, written = _spell(ways, parameters)
            except CannotCarry as error:
                lost[error.message] += [Target(component, module, name).name for name in parameters]
                continue
            tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in written.items()}
            groups.setdefault(component, {})[module] = group
            spellings[component] = spelling
        metadata: dict[str, JSON] = {}
        for component, spelled in groups.items():
            try:
                names: list[JSON] = [*sorted(spelled, key=natural)]
                fields = {**spellings[component].config(spelled), "target_modules": names}
                metadata |= {f"{component}.{name}" if component else name: value for name, value in fields.items()}
            except CannotCarry as error:
                lost[error.message] += [f"{component}:{module}" if component else module for module in spelled]
        if lost:
            raise _refusal(lost)
        return Written(
            file=FILE,
            tensors={key: tensors[key] for key in sorted(tensors)},
            metadata={"format": "pt", METADATA: json.dumps(metadata, sort_keys=True, allow_nan=False)},
            configs={},
        )


def _claim(header: Header) -> float:
    ends = tuple(f".{leaf.suffix}" for leaf in PAIRS)
    ends += tuple(f".{processor}.down.weight" for processor in _PROCESSORS)
    keys = [key for key in header.tensors if key.endswith(ends) and not key.startswith(_FOREIGN)]
    if any(key.partition(".")[0] in COMPONENTS for key in keys):
        return 0.8
    return 0.5 if keys and not any(key.endswith(_CONTROL) for key in header.tensors) else 0.0


def _weights_file(files: AdapterFiles) -> str:
    if FILE in files.headers:
        return FILE
    claims = {file: _claim(header) for file, header in files.headers.items()}
    best = max(claims.values(), default=0.0)
    claimed = sorted(file for file, claim in claims.items() if claim == best and best)
    if len(claimed) == 1:
        return claimed[0]
    raise UnsupportedFormat(
        f"{files.folder} holds several adapters: {', '.join(claimed)}" if claimed else f"{files.folder} holds none",
        "name the file that is meant: weight_name=...",
    )


@final
class _Splitter:
    """Keys -> (component, module, suffix); the suffix is empty for a key of another form."""

    def __init__(self, ways: Ways, configs: Iterable[str]) -> None:
        suffixes = {leaf.suffix for _, spelling in ways for leaf in spelling.leaves}
        self._suffixes = sorted({*suffixes, *WHOLE, _ALPHA}, key=lambda each: (-len(each), each))
        self._components = COMPONENTS | {name for name in configs if name}

    def __call__(self, key: str) -> tuple[str, str, str]:
        if key.startswith(_FOREIGN):
            return "", "", ""
        first, _, rest = key.partition(".")
        component, path = (first, rest) if first in self._components else ("", key)
        return component, *self._module(path)

    def _module(self, path: str) -> tuple[str, str]:
        for processor, module in _PROCESSORS.items():
            before, found, after = path.partition(f".{processor}.")
            if found and after in ("down.weight", "up.weight", _ALPHA):
                return f"{before}.{module}", after if after == _ALPHA else f"lora.{after}"
        suffix = next((each for each in self._suffixes if path.endswith(f".{each}")), "")
        return (path.removesuffix(f".{suffix}"), suffix) if suffix else ("", "")


def _places(
    modules: Mapping[tuple[str, str], object], index: BaseIndex | None
) -> Callable[[str, str], tuple[str, str]]:
    """(component, module) as spelled -> the base's where it has them."""
    known = Modules(index)
    named: dict[str, list[str]] = {}
    for component, module in modules:
        named.setdefault(component, []).append(module)
    parts = known.parts(named)

    def place(component: str, module: str) -> tuple[str, str]:
        found = known.find(parts[component], module)
        return (parts[component], found[0]) if len(found) == 1 else (component, module)

    return place


def _stem(
    spelled: tuple[str, str],
    placed: tuple[str, str],
    keys: Mapping[str, str],
    config: Mapping[str, JSON],
    alphas: Mapping[str, float],
    trouble: Trouble,
) -> Stem:
    """What a module's keys are, and the numbers that hold for it: a tensor's alpha before the header's."""
    whole = [(WHOLE[suffix], "full", "diff", key) for suffix, key in keys.items() if suffix in WHOLE]
    factors = {suffix: key for suffix, key in keys.items() if suffix != _ALPHA and suffix not in WHOLE}
    numbers: dict[str, JSON] = dict(config)
    number_keys = {}
    try:
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")) if factors else ():
            numbers[field] = chosen(config, pattern, field, spelled[1])[0]
            numbers.pop(pattern, None)
    except (IntegrityError, UnsupportedKind) as error:
        trouble.add("slot-misfit", keys.values(), f"{METADATA} in the header: {error.message}")
        factors = {}
    stated = numbers.get("lora_alpha")
    if stated == 0:
        trouble.add("alpha-void", [], f"lora_alpha of {spelled[1]} in the header is 0")
        stated = numbers["lora_alpha"] = None
    key = keys.get(_ALPHA)
    value = alphas[key] if key else 0.0
    if key and math.isinf(value):
        trouble.add("slot-misfit", [key], f"{key} is {value}")
    elif key and (math.isnan(value) or not value):
        trouble.add("alpha-void", [key], f"{key} is {value}")
    elif key:
        if isinstance(stated, int | float) and abs(stated - value) > _TOLERANCE * abs(value):
            trouble.add("alpha-conflict", [key], f"{METADATA} in the header says {stated:g}, and {key} says {value:g}")
        numbers["lora_alpha"], number_keys = value, {_ALPHA: key}
    return Stem(
        component=placed[0], module=placed[1], keys=factors, whole=whole, numbers=numbers, number_keys=number_keys
    )


def _spell(ways: Ways, parameters: Mapping[str, Delta]) -> tuple[Spelling, Group, dict[str, torch.Tensor]]:
    """How one module is spelled: suffix -> tensor.

    Raises:
        CannotCarry: there is no word for it.
    """
    taken = next(
        ((kind, spelling, *apart) for kind, spelling in ways if (apart := kind.dissolve(parameters)) is not None), None
    )
    if taken is None:
        raise CannotCarry(f"there is no word for {' and '.join(sorted({each.kind for each in parameters.values()}))}")
    kind, spelling, tensors, options = taken
    suffixes = {leaf.slot: leaf.suffix for leaf in reversed(spelling.leaves)}
    slots = {
        slot: TensorRef(key=slot, shape=tuple(tensor.shape), dtype=from_torch(tensor.dtype))
        for slot, tensor in tensors.items()
    }
    group = Group(module="", kind=kind.name, slots=slots, options=options)
    if not options.get("scale"):
        raise CannotCarry("a scale of 0 has no alpha here: 0 means that there is none")
    return spelling, group, {suffixes[slot]: tensor for slot, tensor in tensors.items()}


def _refusal(lost: Mapping[str, Sequence[str]]) -> CannotCarry:
    lines = [
        f"{reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for reason, names in sorted(lost.items())
    ]
    return CannotCarry("this adapter cannot be written as diffusers spells it\n  " + "\n  ".join(lines))


@hookimpl
def lorahub_formats() -> list[Format]:
    """Diffusers'."""
    return [DiffusersFormat()]
