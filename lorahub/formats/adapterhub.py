"""AdapterHub's folder: ``adapter_config.json`` of the library adapters beside ``adapter.safetensors``.

https://github.com/adapter-hub/adapters.  LoRA is ``<module>.loras.<name>.lora_A``, on fused layers in the grouped
layout of microsoft/LoRA; (IA)³ is the same with ``lora_B`` alone and ``composition_mode`` "scale".  Whatever adapters
before 1.1.0 saved was trained with a scale of 1, and the library itself reads it so.  Everything else it
has is no weight change: bottleneck layers, prefixes, prompts and edits of representations become parts.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

from packaging.version import InvalidVersion, Version

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Field, Kind, Leaf, Spelling, TensorRef
from lorahub.deltas.peft_config import INERT, USED, chosen, flag
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.format import AdapterFiles, Format, Part, Reading, Written, one_of
from lorahub.formats.peft.config import CONFIG, base_claim, field_findings
from lorahub.formats.peft.keys import Stems
from lorahub.formats.suffixes import Row, group_suffixes, unknown_fields, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["AdapterHubFormat", "lorahub_formats"]

_LORAS = "loras"
_FACTORS = (Leaf(slot="down", suffix="lora_A"), Leaf(slot="up", suffix="lora_B"))
_LINEAR = Row(kind="lora", leaves=_FACTORS)
_MERGED = Row(kind="merged-lora", leaves=_FACTORS)
_SCALED = Row(kind="ia3", leaves=(Leaf(slot="gain", suffix="lora_B"),))
_MATRICES = ("q", "k", "v")

_FILES = ("adapter.safetensors", "pytorch_adapter.safetensors")
"""What the weights are called: by the library, and unpacked from its older pytorch_adapter.bin."""

_LAYERS = "they are new layers with a non-linearity and no change of weights"
_PREFIX = "they are trained keys and values before every attention layer's own and change no weight"
_PROMPT = "they are trained vectors before the input and change no weight"

_PARTS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "adapters": ("bottleneck", "bottleneck layers", _LAYERS),
        "attention_text_task_adapters": ("bottleneck", "bottleneck layers", _LAYERS),
        "layer_text_task_adapters": ("bottleneck", "bottleneck layers", _LAYERS),
        "attention_text_lang_adapters": ("bottleneck", "bottleneck layers", _LAYERS),
        "layer_text_lang_adapters": ("bottleneck", "bottleneck layers", _LAYERS),
        "adapter_fusion_layer": ("adapter-fusion", "AdapterFusion layers", _LAYERS),
        "invertible_adapters": ("invertible", "invertible adapters", _LAYERS),
        "invertible_lang_adapters": ("invertible", "invertible adapters", _LAYERS),
        "shared_parameters": ("shared", "parameters shared by layers", _LAYERS),
        "prefix_tunings": ("prefix-tuning", "prefixes", _PREFIX),
        "prefix_tuning": ("prefix-tuning", "prefixes", _PREFIX),
        "prefix_gates": ("prefix-tuning", "prefixes", _PREFIX),
        "prompt_tunings": ("prompt-tuning", "prompts", _PROMPT),
        "prompt_tuning": ("prompt-tuning", "prompts", _PROMPT),
        "refts": ("reft", "ReFT", "it edits what layers put out, at positions that depend on the input"),
        "heads": ("head", "a head of the library's own", "its layers are no parameters of the base"),
    }
)
"""A segment of a key -> the part it belongs to, in words, and why that cannot be merged."""

_LIBRARYS = frozenset({_LORAS, *_PARTS})
"""Segments that a key of the library's has."""

_ABOUT = frozenset(
    {
        "config",
        "config_id",
        "hidden_size",
        "id2label",
        "label2id",
        "model_class",
        "model_name",
        "model_type",
        "name",
        "num_labels",
        "type",
        "version",
    }
)
"""Fields beside the adapter's own config: what it was made with and for."""

_FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **dict.fromkeys(("alpha", "architecture", "attn_matrices", "composition_mode", "r"), USED),
        **dict.fromkeys(("dropout", "dtype", "init_weights", "intermediate_lora", "leave_out", "output_lora"), INERT),
        **dict.fromkeys(("selfattn_lora", "attn_lora", "cross_attn_lora"), INERT),
        "use_gating": Field(refuse="a gate scales the factors by the input, which no change of weights can do"),
        "vera_d": Field(refuse="its factors are random matrices that the file does not hold"),
        "vera_b": Field(refuse="its factors are random matrices that the file does not hold"),
    }
)
"""Fields of a LoRA config: which layers were adapted, the tensors say."""

_FAULTY = Version("1.1.0")
"""The first release of adapters that trains LoRA with the scale of its config."""


@final
class AdapterHubFormat:
    """Reads adapters of AdapterHub's library."""

    name = "adapterhub"
    rows = (_LINEAR, _SCALED)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by its config beside names, or a file, of the library's own; little by the config alone."""
        config = files.configs.get(CONFIG, {})
        about = {"model_name", "model_type", "model_class", "hidden_size"} & config.keys()
        if not files.headers or "config" not in config or not about or "peft_type" in config:
            return None
        keys = (key for header in files.headers.values() for key in header.tensors)
        if any(name in files.headers for name in _FILES) or any(_LIBRARYS & {*key.split(".")} for key in keys):
            return Claim(1.0, f"{CONFIG} is one of AdapterHub's library")
        return Claim(0.3, f"{CONFIG} is one of AdapterHub's library, though no tensor is named as it names them")

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: a field of the config has a type that the library never writes.
        """
        file = _weights_file(files)
        header, about = files.headers[file], files.configs[CONFIG]
        config = _lora_config(about.get("config"))
        factors, parts, left = _sorted(header)
        stems = Stems(index)

        def rows(module: str) -> list[Row]:
            if config.get("composition_mode") == "scale":
                return [_SCALED]
            down, up = (_shape(header, factors, f"{module}.{leaf.suffix}") for leaf in _FACTORS)
            several = len(down) == 2 and len(up) == 2 and down[0] != up[1]
            return [_MERGED if several or _third(module, up, stems, index) else _LINEAR]

        def options(kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            return _options(config, about.get("version"), kind, module, slots)

        grouped = group_suffixes(header, factors, rows, kinds, stems, options)
        spelling = Spelling(
            format=self.name, tag="", leaves=_FACTORS, fields=_FIELDS, options=lambda *_: {}, config=lambda _: {}
        )
        repo, _, notes = base_claim({"base_model_name_or_path": about.get("model_name")})
        return Reading(
            format=self.name,
            file=file,
            groups=grouped.groups,
            parts={name: part for name, (part, _) in parts.items()},
            findings=(
                *grouped.findings,
                *_unmerged(parts, others=bool(grouped.groups)),
                *(field_findings(config, [spelling], [spelling]) if factors else ()),
                *_scaled_as_trained(config, about.get("version"), grouped.groups != ()),
                *unknown_keys([*grouped.unknown, *left], "are nothing that AdapterHub's library is known to save"),
                *unknown_fields({name: value for name, value in about.items() if name not in _ABOUT}),
                *notes,
            ),
            base_repo=repo,
            hints={"adapter_name": about["name"]} if isinstance(about.get("name"), str) else {},
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'adapterhub' is read only", "write another: peft")


def _weights_file(files: AdapterFiles) -> str:
    named = [name for name in _FILES if name in files.headers]
    if len(named) == 1 or len(files.headers) == 1:
        return named[0] if named else next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        one_of(files, files.headers),
    )


def _lora_config(config: JSON) -> Mapping[str, JSON]:
    """The part of a config that speaks of LoRA: itself, or one of a union's.

    Raises:
        IntegrityError: it is neither an object nor the name of one.
    """
    if isinstance(config, str):
        return {}
    if not isinstance(config, dict):
        raise IntegrityError(f"{CONFIG}: config is {config!r}, no object", "fetch it again, or ask its author")
    inner = config.get("configs") if config.get("architecture") == "union" else None
    listed = [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else [config]
    return next((each for each in listed if each.get("architecture") in ("lora", "mtl_lora")), {})


def _sorted(header: Header) -> tuple[dict[str, str], dict[str, tuple[Part, str]], list[str]]:
    """Factors as key -> path without the adapter's name, parts with their names in words, and the rest."""
    factors: dict[str, str] = {}
    parts: dict[str, tuple[str, str, dict[str, TensorRef]]] = {}
    left = []
    for key in header.tensors:
        segments = key.split(".")
        known = next((each for each in segments if each in _PARTS or each == _LORAS), None)
        at = segments.index(known) if known else -1
        if known == _LORAS and len(segments) == at + 3:
            factors[key] = ".".join([*segments[:at], segments[-1]])
        elif known and known != _LORAS:
            kind, words, reason = _PARTS[known]
            info = header.tensors[key]
            ref = TensorRef(key=key, shape=info.shape, dtype=info.dtype)
            parts.setdefault(kind, (words, reason, {}))[2][key] = ref
        else:
            left.append(key)
    made = {
        kind: (Part(kind=kind, reason=reason, tensors=tensors), words)
        for kind, (words, reason, tensors) in parts.items()
    }
    return factors, made, left


def _shape(header: Header, factors: Mapping[str, str], path: str) -> tuple[int, ...]:
    return next((header.tensors[key].shape for key, each in factors.items() if each == path), ())


def _third(module: str, up: tuple[int, ...], stems: Stems, index: BaseIndex | None) -> bool:
    """Whether ``up`` has a third of the base's rows: one adapted band of a fused layer."""
    found = stems.find(module)
    info = index.parameters.get(f"{found}.weight") if index and found else None
    out = info.shape[1 if info.transposed else 0] if info and len(info.shape) == 2 else 0
    return bool(up) and 3 * up[0] == out


def _faulty(config: Mapping[str, JSON], version: JSON) -> bool:
    """Whether the config's alpha is not what the adapter was trained with."""
    if not isinstance(version, str) or not version.startswith("adapters."):
        return False
    try:
        saved = Version(version.removeprefix("adapters."))
    except InvalidVersion:
        return False
    return saved < _FAULTY and config.get("architecture") == "lora" and config.get("r") != config.get("alpha")


def _options(
    config: Mapping[str, JSON], version: JSON, kind: str, module: str, slots: Mapping[str, TensorRef]
) -> dict[str, JSON]:
    """What scales one module.

    Raises:
        IntegrityError: the config states another rank than the tensors have.
        UnsupportedKind: a gate, a scaled gain, or an architecture that only looks alike.
    """
    if config.get("architecture") not in ("lora", None):
        raise UnsupportedKind(f"{module}: the architecture {config.get('architecture')!r} shares factors between tasks")
    if not config:
        raise UnsupportedKind(f"{module} has factors of LoRA, and {CONFIG} holds no settings of it")
    alpha, _ = chosen(config, "", "alpha", module)
    if flag(config, "use_gating"):
        raise UnsupportedKind(f"{module}: a gate scales its factors by the input")
    if kind == "ia3":
        if alpha not in (None, 1):
            raise UnsupportedKind(f"{module}: its gains are multiplied by alpha = {alpha}, which no kind here does")
        if len(slots["gain"].shape) != 2 or slots["gain"].shape[1] != 1:
            raise IntegrityError(f"{slots['gain'].key} {list(slots['gain'].shape)} is no gain on outputs")
        return {"feedforward": False}
    rank = slots["up"].shape[1]
    stated, _ = chosen(config, "", "r", module)
    if rank < 1 or (stated is not None and stated != rank):
        raise IntegrityError(f"{module}: r is {stated}, and {slots['up'].key} has rank {rank}")
    said: dict[str, JSON] = {"rank": rank}
    if kind == "merged-lora":
        listed = config.get("attn_matrices")
        said["enabled"] = [isinstance(listed, list) and name in listed for name in _MATRICES]
    if _faulty(config, version) or alpha is None:
        return {**said, "scale": 1.0, "scale_rule": "1, as adapters before 1.1.0 trained it"}
    return {**said, "scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha}


def _scaled_as_trained(config: Mapping[str, JSON], version: JSON, any_: bool) -> list[Finding]:
    if not any_ or not _faulty(config, version):
        return []
    return [
        Finding(
            code="alpha-void",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"{CONFIG} says alpha = {config.get('alpha')}, and {version}, which saved it, trained with a scale "
            "of 1 whatever it says; so it is read, as adapters itself does since 1.1.0",
            where=("alpha",),
        )
    ]


def _unmerged(parts: Mapping[str, tuple[Part, str]], *, others: bool) -> list[Finding]:
    """What to say of parts; they stop a merge by name."""
    if not parts:
        return []
    what = "; ".join(f"{words}, which cannot be merged: {part.reason}" for part, words in parts.values())
    return [
        Finding(
            code="kind-unsupported",
            axis="format",
            level=Verdict.DEGRADED if others else Verdict.INCOMPATIBLE,
            message=f"this adapter of AdapterHub's library has {what}",
            where=tuple(sorted((key for part, _ in parts.values() for key in part.tensors), key=natural)),
            remedy="to merge the rest: --allow kind-unsupported" if others else "use it with AdapterHub's library",
            allowable=others,
        )
    ]


@hookimpl
def lorahub_formats() -> list[Format]:
    """AdapterHub's."""
    return [AdapterHubFormat()]
