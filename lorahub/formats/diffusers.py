"""Files of diffusers: ``pytorch_lora_weights.safetensors``, with one PEFT config for each component in its header.

A key is a component of the pipeline, a module's dotted path and a suffix: ``unet.mid_block.to_q.lora_A.weight``.
Releases before 0.22 spelled the suffixes in other ways, and those before 0.18 wrote no component.  Alpha comes from a
tensor or from ``lora_adapter_metadata`` in the header; where both speak they must agree, and without either the scale
is 1, as diffusers has it.  Flux's control adapters have whole norms beside the factors.  ai-toolkit, SimpleTuner and
OneTrainer write further kinds behind the same names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Spelling, TensorRef
from lorahub.errors import CannotCarry, UnsupportedFormat
from lorahub.files.dtypes import from_torch
from lorahub.files.header import Header
from lorahub.findings import Claim
from lorahub.formats.dotted import Endings, hints_of, read_dotted
from lorahub.formats.dotted_metadata import METADATA, Statements, field_notes
from lorahub.formats.dotted_spellings import EVERY, FORMAT, PAIRS, SPELLINGS
from lorahub.formats.families import representatives
from lorahub.formats.flat_names import take_apart
from lorahub.formats.flat_spellings import WHOLE
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.gather import Ways, ways_of
from lorahub.formats.marks import Mark
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.suffixes import Row
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["DiffusersFormat", "lorahub_formats"]

FILE = "pytorch_lora_weights.safetensors"
_VALUE = "set_weight"
"""Suffix of a whole new weight, for whoever reads keys by their suffixes."""

COMPONENTS = frozenset(
    {
        "clip_g",
        "clip_l",
        "connectors",
        "controlnet",
        "prior",
        "t5",
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
        "self_attn.to_q_lora": "self_attn.q_proj",
        "self_attn.to_k_lora": "self_attn.k_proj",
        "self_attn.to_v_lora": "self_attn.v_proj",
        "self_attn.to_out_lora": "self_attn.out_proj",
        "to_q_lora": "to_q",
        "to_k_lora": "to_k",
        "to_v_lora": "to_v",
        "to_out_lora": "to_out.0",
    }
)
"""What attention processors called their own layers, and text encoders theirs -> the module that they change.

The first that fits.
"""

_ORIGINAL: Mapping[str, str] = MappingProxyType(
    {"clip_g": "text_encoder_2", "clip_l": "text_encoder", "t5": "text_encoder_3"}
)
"""Components under the original models' names, as OneTrainer writes them -> what a pipeline calls them."""

_FOREIGN = ("base_model.model.", "diffusion_model.")
"""How keys of other formats begin."""

_NORMS = frozenset({"norm_added_k", "norm_added_q", "norm_k", "norm_q"})
"""Norms of a transformer that a control adapter brings whole: their new weight stands in the file by its own name."""

_ENDS = tuple(
    f".{leaf.suffix}"
    for kind, spelling in EVERY.items()
    for leaf in spelling.leaves
    if kind not in ("full", "lycoris-ia3", "replace") and not leaf.role
) + tuple(f".{processor}.down.weight" for processor in _PROCESSORS)
"""Ends of keys that are factors, and so tell the format."""

_WHOLE = tuple(f".{suffix}" for suffix in WHOLE)
_EMPTY = Header(tensors=MappingProxyType({}), metadata=MappingProxyType({}), data_start=0, size=0)

_CONTROL = (".key_norm.scale", ".query_norm.scale")
"""Ends of keys that only control adapters in Black Forest Labs' own spelling have."""


@final
class DiffusersFormat:
    """Reads every spelling that diffusers has had, and LyCORIS's behind such names; writes the present one."""

    name = FORMAT
    rows = tuple(Row(kind=name, leaves=spelling.leaves) for name, spelling in EVERY.items())
    writes = frozenset(SPELLINGS)

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Where keys end as diffusers ends them: surely behind a component's name, less so without one."""
        best = max((_claim(header) for header in files.headers.values()), default=0.0)
        if best < _BY_COMPONENT and isinstance(files.configs.get(CONFIG, {}).get("peft_type"), str):
            return None
        return Claim(best, "tensor names are modules of a pipeline with LoRA factors") if best else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key of the weights file.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number, or the header's JSON is none.
        """
        file = _weights_file(files)
        statements = Statements(files.headers[file])
        found = read_dotted(
            files,
            file,
            index,
            ways=ways_of(self.name, EVERY, kinds),
            apart=_apart(frozenset(statements.configs)),
            statements=statements,
        )
        present = {group.kind for group in representatives(found.groups)}
        return Reading(
            format=self.name,
            file=file,
            groups=found.groups,
            parts=found.parts,
            findings=(*found.findings, *field_notes(statements.configs, present)),
            hints=hints_of(found.groups),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell ``deltas`` as diffusers saves them, with a PEFT config for each component in the header.

        Raises:
            CannotCarry: listing every target that there is no word for, by reason.
        """
        ways = ways_of(self.name, SPELLINGS, kinds)
        endings, apart = Endings(ways, _EMPTY), _Apart({})
        lost: dict[str, list[str]] = defaultdict(list)
        modules: dict[tuple[str, str], dict[str, Delta]] = {}
        for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
            modules.setdefault((target.component, target.module), {})[target.parameter] = delta
        tensors: dict[str, torch.Tensor] = {}
        groups: dict[str, dict[str, Group]] = {}
        spellings: dict[str, Spelling] = {}
        for (component, module), parameters in modules.items():
            stem = f"{component}.{module}" if component else module
            if _is_norm(component, module) and (value := _whole(parameters)) is not None:
                tensors[f"{stem}.weight"] = value
                continue
            first = PAIRS[0].suffix
            part, path = apart(f"{stem}.{first}")
            if not module or (part, *endings.split(path)) != (component, module, first):
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


_BY_COMPONENT = 0.8
"""How sure a component in front of a name makes it, also beside somebody else's config."""


_IN_COMPONENT = Mark(lambda key: key.partition(".")[0] in COMPONENTS, ends=(*_ENDS, *_WHOLE))
_BARE = Mark(lambda key: not key.startswith(_FOREIGN) and not take_apart(key)[0], ends=_ENDS)
_OF_CONTROL = Mark(ends=_CONTROL)


def _claim(header: Header) -> float:
    if _IN_COMPONENT.on([header]):
        return _BY_COMPONENT
    return 0.5 if _BARE.on([header]) and not _OF_CONTROL.on([header]) else 0.0


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
        one_of(files, claimed or files.headers),
    )


@final
class _Apart:
    """Keys -> (component, path); both empty for a key of another format."""

    def __init__(self, configs: Iterable[str]) -> None:
        self._components = {**dict.fromkeys(COMPONENTS), **{name: None for name in configs if name}}

    def __call__(self, key: str) -> tuple[str, str]:
        if key.startswith(_FOREIGN):
            return "", ""
        first, _, rest = key.partition(".")
        if first in self._components:
            module, _, parameter = rest.rpartition(".")
            if parameter == "weight" and _is_norm(first, module):
                return first, f"{module}.{_VALUE}"
            return _ORIGINAL.get(first, first), _unprocessed(rest)
        return "", _unprocessed(key)


@lru_cache(maxsize=1 << 4)
def _apart(configs: frozenset[str]) -> _Apart:
    """The same for the same components: keys are remembered by it."""
    return _Apart(configs)


def _is_norm(component: str, module: str) -> bool:
    """Whether a file has a whole new weight of this module, which diffusers puts in the place of the model's."""
    return component == "transformer" and module.rpartition(".")[2] in _NORMS


def _unprocessed(path: str) -> str:
    """A processor's own layer as the attention's module that it changes."""
    for processor, module in _PROCESSORS.items():
        before, found, after = path.partition(f".{processor}.")
        if found and after in ("down.weight", "up.weight", "alpha"):
            return f"{before}.{module}.{after if after == 'alpha' else f'lora.{after}'}"
    return path


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


def _whole(parameters: Mapping[str, Delta]) -> torch.Tensor | None:
    """The new weight of a module, where that is all that changes."""
    return parameters["weight"].replacement() if parameters.keys() == {"weight"} else None


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
