"""One file under the names of the original models, as ComfyUI loads it: ``diffusion_model.`` + module + ending.

ai-toolkit, SimpleTuner, OneTrainer, musubi-tuner and the makers of Wan, LTX and others save such files: factors in
either of two spellings, an ``alpha`` a module or in the header or none (then it is the rank), every kind of LyCORIS,
and whole differences as ``diff`` and ``diff_b``.  Names of modules are the original model's, which a base may or may
not use.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import CannotCarry, UnsupportedFormat
from lorahub.findings import Claim
from lorahub.formats.dotted import hints_of, read_dotted
from lorahub.formats.dotted_metadata import Statements, field_notes
from lorahub.formats.dotted_spellings import EVERY
from lorahub.formats.families import representatives
from lorahub.formats.flat_spellings import REFUSED
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.gather import ways_of
from lorahub.formats.marks import Mark
from lorahub.formats.suffixes import Row
from lorahub.hookspecs import hookimpl

__all__ = ["PREFIX", "ComfyFormat", "lorahub_formats", "only_file"]

PREFIX = "diffusion_model."

_BEGINNINGS: Mapping[str, str] = MappingProxyType(
    {
        PREFIX: "",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
    }
)
"""How a key begins -> the part of a pipeline; the diffusion model may be any."""

_NAMED = ("", "diffusion_model", "transformer", "unet")
"""What a header may call the diffusion model."""


@final
class ComfyFormat:
    """Reads files under the original models' names."""

    name = "comfy"
    rows = tuple(Row(kind=name, leaves=spelling.leaves) for name, spelling in EVERY.items())
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where a name begins with the prefix and ends as a slot does."""
        if _OWN.on(files.headers.values()):
            return Claim(0.9, f"tensor names begin with {PREFIX}")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is no single number, or the header's JSON is none.
        """
        file = only_file(files)
        statements = Statements(files.headers[file], {"": _NAMED})
        found = read_dotted(
            files, file, index, ways=ways_of(self.name, EVERY, kinds), apart=_apart, statements=statements
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
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'comfy' is read only", "write another: peft")


_ENDS = (*(f".{leaf.suffix}" for spelling in EVERY.values() for leaf in spelling.leaves), *(f".{x}" for x in REFUSED))

_OWN = Mark(begins=(PREFIX,), ends=_ENDS)


def _apart(key: str) -> tuple[str, str]:
    """(component, path), or empty for a key of another form."""
    for beginning, component in _BEGINNINGS.items():
        if key.startswith(beginning):
            return component, key.removeprefix(beginning)
    return "", ""


def only_file(files: AdapterFiles) -> str:
    """The weights file of a format that calls it anything.

    Raises:
        UnsupportedFormat: there are several.
    """
    if len(files.headers) == 1:
        return next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        one_of(files, files.headers),
    )


@hookimpl
def lorahub_formats() -> list[Format]:
    """ComfyUI's."""
    return [ComfyFormat()]
