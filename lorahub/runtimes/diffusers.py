"""diffusers: what ``pipe.load_lora_weights`` refuses, and what it leaves out in silence.

Read from its ``loaders/lora_pipeline.py``, ``lora_conversion_utils.py`` and ``lora_base.py``, and held against it by
the plugin's tests.  It goes by keys alone: what no converter of the pipeline's class knows is either a ``ValueError``
or is left out, mostly without a word.  The table does not know which pipeline is meant; where one reads what others do
not, the rule says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.findings import Verdict
from lorahub.hookspecs import hookimpl
from lorahub.runtimes.diffusers_kohya import DROPPED, alphas_lost, blocks_only
from lorahub.runtimes.keys import HEADER, all_of, keys, keys_of, unread_format
from lorahub.runtimes.runtime import Case, Look, Rule, Runtime, Subject

__all__ = ["DIFFUSERS", "UNREAD", "lorahub_runtimes"]

READ = frozenset({"diffusers", "kohya", "comfy", "xlabs", "bfl", "textual-inversion"})
"""Formats of which it reads some files at least."""

CONVERT = "lorahub convert {adapter} --to diffusers --base PIPELINE_FOLDER -o FOLDER"
MERGE = "lorahub merge {adapter} --base PIPELINE_FOLDER -o merged"

UNREAD: Mapping[str, str] = MappingProxyType(
    {
        r"^lora_unet_joint_blocks_": "kohya's of Stable Diffusion 3",
        r"^diffusion_model\.joint_blocks\.": "the makers' of Stable Diffusion 3",
        r"^diffusion_model\.(input_blocks|middle_block|output_blocks)\.": "the makers' of Stable Diffusion",
        r"^lora_unet_transformer_blocks_\d+_attn[12]_": "kohya's of LTX-Video, Sana and PixArt",
        r"^diffusion_model\.(double|single)_layers\.": "the makers' of AuraFlow",
        r"^diffusion_model\.blocks\.\d+\.(attn\.qkv|cross_attn\.(q|kv)_linear)\.": "the makers' of Sana and PixArt",
    }
)
"""Keys that no pipeline of diffusers reads -> whose names they are."""

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        r"^lora_te3_|^text_encoder_3\.": "a third text encoder",
        r"^lora_unet_final_layer_": "the last layer of Flux in kohya's names",
        r"^diffusion_model\..*\.diff$": "whole differences of weights",
    }
)
"""Keys that are left out of what is loaded -> what they are."""

_FLUX = r"^diffusion_model\.(double|single)_blocks\."
_KINDS = frozenset({"lora", "dora", "locon", "dora-locon", "full", "replace"})
"""Kinds that it reads, or that rules about keys judge."""


def _any_of(table: Mapping[str, str]) -> Look:
    """A look for keys of a table; the value is what they are."""
    patterns = {re.compile(pattern): what for pattern, what in table.items()}

    def look(subject: Subject) -> Case | None:
        found = {key: what for key in keys_of(subject) for each, what in patterns.items() if each.search(key)}
        return Case(value=" and ".join(dict.fromkeys(found.values())), where=tuple(found)) if found else None

    return look


def _kinds(*, lokr: bool) -> Look:
    """A look for other kinds than LoRA; LoKr behind ``diffusion_model.`` has a rule of its own."""
    apart = keys(r"^diffusion_model\..*\.lokr_")

    def look(subject: Subject) -> Case | None:
        read = {"lokr"} if apart(subject) else set()
        others = [each for each in subject.reading.groups if each.kind not in _KINDS]
        found = [each for each in others if (each.kind in read) == lokr]
        return (
            Case(value=", ".join(sorted({e.kind for e in found})), where=tuple(e.module for e in found))
            if found
            else None
        )

    return look


def _stated_twice(subject: Subject) -> Case | None:
    metadata = subject.files.headers[subject.reading.file].metadata
    where = tuple(key for key in keys_of(subject) if key.endswith(".alpha"))
    return Case(where=where) if where and HEADER in metadata else None


def _alpha_not_rank(subject: Subject) -> Case | None:
    """Alphas in tensors that are not the rank."""
    where = tuple(
        group.slots["alpha"].key
        for group in subject.reading.groups
        if {"alpha", "down"} <= group.slots.keys() and group.options.get("alpha") != group.slots["down"].shape[0]
    )
    return Case(where=where) if where else None


RULES = (
    Rule(
        code="diffusers-format",
        level=Verdict.INCOMPATIBLE,
        message="diffusers reads one safetensors file under its own names, kohya's or a model's makers', and this is "
        "{value}",
        remedy=CONVERT,
        look=unread_format(READ),
    ),
    Rule(
        code="diffusers-names",
        level=Verdict.INCOMPATIBLE,
        message="no pipeline of diffusers reads such names ({value}): it would load nothing of them, with a warning at "
        "most",
        remedy=CONVERT,
        look=_any_of(UNREAD),
    ),
    Rule(
        code="diffusers-kind",
        level=Verdict.INCOMPATIBLE,
        message="diffusers loads LoRA only, and the adapter also has {value}",
        remedy=MERGE,
        look=_kinds(lokr=False),
    ),
    Rule(
        code="diffusers-lokr",
        level=Verdict.DEGRADED,
        message="diffusers reads LoKr for FLUX.2 and Z-Image alone, and for other models nothing of it",
        remedy=MERGE,
        look=_kinds(lokr=True),
    ),
    Rule(
        code="diffusers-dora-scale",
        level=Verdict.INCOMPATIBLE,
        message="diffusers drops dora_scale with a warning and applies the factors as if they were LoRA; it reads the "
        "magnitudes under its own name for them (lora_magnitude_vector)",
        remedy=CONVERT,
        look=keys(r"\.dora_scale$"),
    ),
    Rule(
        code="diffusers-tucker",
        level=Verdict.INCOMPATIBLE,
        message="diffusers refuses the files of convolutions in Tucker form (lora_mid)",
        remedy=CONVERT,
        look=keys(r"\.lora_mid\.weight$"),
    ),
    Rule(
        code="diffusers-difference",
        level=Verdict.INCOMPATIBLE,
        message="diffusers refuses files with whole differences (diff) in kohya's names",
        remedy=MERGE,
        look=keys(r"^lora_(unet|te\d?)_.*\.diff(_b)?$"),
    ),
    Rule(
        code="diffusers-alpha-twice",
        level=Verdict.INCOMPATIBLE,
        message=f"diffusers refuses files that have alphas both as tensors and in the header ({HEADER})",
        remedy=CONVERT,
        look=_stated_twice,
    ),
    Rule(
        code="diffusers-alpha-unread",
        level=Verdict.INCOMPATIBLE,
        message="diffusers reads no alpha beside lora_A and lora_B under these names: LTXPipeline applies the factors "
        "unscaled, and Flux2Pipeline refuses the file",
        remedy=CONVERT,
        look=all_of(
            _alpha_not_rank,
            keys(r"^diffusion_model\.(transformer_blocks\.\d+\.attn[12]|(double|single)_blocks\.\d+)\..*\.lora_A\."),
        ),
    ),
    Rule(
        code="diffusers-alpha-lost",
        level=Verdict.DEGRADED,
        message="a pipeline with a UNet scales these modules by the alpha that occurs most in their part of the file, "
        "which is not theirs",
        remedy=CONVERT,
        look=alphas_lost,
    ),
    Rule(
        code="diffusers-module-dropped",
        level=Verdict.DEGRADED,
        message="diffusers loads the rest and drops these modules: it turns kohya's names of them into ones that the "
        "UNet does not have",
        remedy=CONVERT,
        look=keys(DROPPED),
    ),
    Rule(
        code="diffusers-blocks",
        level=Verdict.INCOMPATIBLE,
        message="FluxPipeline fails on these keys: behind lora_transformer_ it knows of a block's modules the "
        "attention alone, wants an alpha for each, and beside it the first text encoder alone (lora_te1_)",
        remedy=CONVERT,
        look=blocks_only,
    ),
    Rule(
        code="diffusers-flux",
        level=Verdict.DEGRADED,
        message="FluxPipeline and HunyuanVideoPipeline read nothing of these names with lora_A and lora_B; "
        "Flux2Pipeline does",
        remedy=CONVERT,
        look=keys(_FLUX + r".*\.lora_A\.weight$"),
    ),
    Rule(
        code="diffusers-left-out",
        level=Verdict.DEGRADED,
        message="diffusers loads the rest and leaves out {value}, without a word",
        remedy=MERGE,
        look=_any_of(LEFT_OUT),
    ),
)

DIFFUSERS = Runtime(name="diffusers", title="diffusers", versions="0.42", rules=RULES)


@hookimpl
def lorahub_runtimes() -> list[Runtime]:
    """The table of diffusers."""
    return [DIFFUSERS]
