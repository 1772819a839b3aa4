"""Factors as PEFT has them in memory, saved as they are and without a config: ``<module>.lora_A.default.weight``.

DiffSynth-Studio saves such files, and so does whoever saves a PEFT model's state dict by hand.  The adapter's name
stands inside each key.  Others (fal's Kontext, Krea) keep PEFT's ``base_model.model.`` before modules of a diffusion
model, and are told from PEFT's own by those modules.  No config lies beside them: alpha is in the header or in a
tensor, or else taken for the rank, so the scale for 1, and a finding says so.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind
from lorahub.errors import CannotCarry
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import PREFIX as COMFY
from lorahub.formats.comfy import only_file
from lorahub.formats.diffusers import COMPONENTS
from lorahub.formats.dotted import hints_of, read_dotted
from lorahub.formats.dotted_metadata import Statements, field_notes
from lorahub.formats.dotted_spellings import EVERY, PAIRS
from lorahub.formats.families import representatives
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.gather import ways_of
from lorahub.formats.marks import Mark
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import MODEL, PREFIX
from lorahub.formats.suffixes import Row
from lorahub.hookspecs import hookimpl

__all__ = ["StateDictFormat", "lorahub_formats"]

_DUMPED = (".lora_A.default.weight", ".lora_embedding_B.default")
"""Ends of keys with an adapter's name inside."""

_FACTORS = tuple(f".{leaf.suffix}" for leaf in PAIRS)

_DIFFUSION = frozenset(
    {
        *("double_blocks", "joint_blocks", "single_blocks", "single_transformer_blocks", "transformer_blocks"),
        *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"),
        *("img_in", "txt_in", "x_embedder", "context_embedder", "context_refiner", "noise_refiner", "patch_embedding"),
        *("time_text_embed", "vector_in", "guidance_in", "final_layer", "diffusion_model"),
        *("blocks.*.cross_attn", "blocks.*.self_attn", "blocks.*.attn1", "blocks.*.attn2"),
        *("layers.*.attention.qkv", "layers.*.attention.to_q", "layers.*.attention.to_out"),
    }
)
"""How modules of diffusion models begin, and of no language model; a star is a number."""


_PIPES = ("pipe.dit.", "pipe.dit2.", "pipe.vace.")
"""How keys begin that DiffSynth's trainer saved with the pipeline's own attributes."""

_SURE = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3", "transformer_2", "unet"})
"""Components whose names no model has for a module of its own."""


@final
class StateDictFormat:
    """Reads raw state dicts of PEFT factors."""

    name = "state-dict"
    rows = tuple(Row(kind=name, leaves=spelling.leaves) for name, spelling in EVERY.items())
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By the adapter's name inside the keys, or by modules of a diffusion model behind PEFT's prefix."""
        if isinstance(files.configs.get(CONFIG, {}).get("peft_type"), str):
            return None
        headers = files.headers.values()
        if _IS_DUMPED.on(headers) and not _IS_PREFIXED.on(headers):
            return Claim(0.7, "tensor names have an adapter's name inside and no prefix")
        if _DRAWS.on(headers):
            return Claim(
                0.7, f"tensor names begin with {PREFIX} and go on as a diffusion model's, and no config is there"
            )
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number, or the header's JSON is none.
        """
        file = only_file(files)
        statements = Statements(files.headers[file], {"": ("", "transformer", "unet")})
        found = read_dotted(
            files, file, index, ways=ways_of(self.name, EVERY, kinds), apart=_apart, statements=statements
        )
        present = {group.kind for group in representatives(found.groups)}
        return Reading(
            format=self.name,
            file=file,
            groups=found.groups,
            parts=found.parts,
            findings=(
                *found.findings,
                *field_notes(statements.configs, present),
                *_unscaled(file, found.groups),
            ),
            hints=hints_of(found.groups),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always; it would lose the scale.
        """
        raise CannotCarry("the format 'state-dict' is read only: it has no place for a scale", "write another: peft")


def _apart(key: str) -> tuple[str, str]:
    """(component, path): a component only where what follows is no model's own ``transformer``."""
    path = key
    for beginning in (PREFIX, COMFY, *_PIPES):
        path = path.removeprefix(beginning)
    first, _, rest = path.partition(".")
    if first in _SURE or (first in COMPONENTS and _draws(rest)):
        return first, rest
    return "", path


def _draws(path: str) -> bool:
    """Whether a path is in a diffusion model."""
    parts = ["*" if part.isdigit() else part for part in path.split(".")]
    return any(".".join(parts[:length]) in _DIFFUSION for length in (1, 3, 4))


_IS_DUMPED = Mark(ends=_DUMPED)
_IS_PREFIXED = Mark(begins=(MODEL, COMFY), ends=_DUMPED)
_DRAWS = Mark(lambda key: _draws(key.removeprefix(PREFIX)), begins=(PREFIX,), ends=_FACTORS)


def _unscaled(file: str, groups: Sequence[Group]) -> list[Finding]:
    if not any(str(group.options.get("scale_rule", "")).startswith("default") for group in representatives(groups)):
        return []
    return [
        Finding(
            code="alpha-unknown",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"{file} holds no alpha and no config lies beside it: it is taken for the rank, so the scale for 1",
            where=(file,),
            remedy=f"if it was trained with another alpha, put PEFT's {CONFIG} beside it, or merge it with a weight",
        )
    ]


@hookimpl
def lorahub_formats() -> list[Format]:
    """Raw state dicts."""
    return [StateDictFormat()]
