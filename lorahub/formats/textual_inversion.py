"""Textual inversion: vectors for new words, in one small safetensors file and nothing else.

diffusers stores one tensor under the word itself (``<ink>``), AUTOMATIC1111 ``emb_params``, and pipelines with several
text encoders one tensor for each (``clip_l``, ``clip_g``, ``t5`` ...).  No weight is changed, so the whole file is a
part: it is recognised, inspected, recorded and pushed, and merging it is refused.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import CannotCarry
from lorahub.files.header import Header
from lorahub.findings import Claim
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.marks import Mark
from lorahub.formats.suffixes import Row, unknown_keys
from lorahub.formats.token_vectors import part_of
from lorahub.hookspecs import hookimpl

__all__ = ["TextualInversionFormat", "lorahub_formats"]

_ENCODERS = frozenset(
    {
        *("clip_g", "clip_h", "clip_l", "gemma", "gemma2_2b", "llama", "qwen", "t5", "t5xxl", "umt5xxl"),
        *("clip_g_out", "clip_l_out", "gemma_out", "llama_out", "qwen_out", "t5_out"),
        *("emb_params", "string_to_param.*", "text_encoder", "text_encoder_2", "text_encoders_0", "text_encoders_1"),
    }
)
"""Names under which trainers keep a word's vectors, for one text encoder each."""

_PLACEHOLDER = "string_to_token.*"
"""The token that stood for the word in training, a number; the original implementation keeps it beside the vectors."""

_WIDEST = 1 << 14
"""Elements of one vector; text encoders are far narrower."""

_MOST = 1 << 10
"""Vectors of one word; a prompt has no room for more."""


@final
class TextualInversionFormat:
    """Reads files of token vectors."""

    name = "textual-inversion"
    rows: tuple[Row, ...] = ()
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure of a text encoder's name or a word in angle brackets, where every tensor is a few vectors."""
        if len(files.headers) != 1:
            return None
        (header,) = files.headers.values()
        if not _TELLING.on([header]):
            return None
        vectors = [key for key in header.tensors if _is_vectors(header, key)]
        if not vectors or len(vectors) < len(header.tensors) - 1:
            return None
        if any(key in _ENCODERS or _is_word(key) for key in vectors):
            return Claim(0.6, "tensors are vectors of a text encoder, by their names and shapes")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key: vectors are parts, by word or by text encoder.

        Raises:
            UnsupportedFormat: several files could hold the vectors.
        """
        file = only_file(files)
        header = files.headers[file]
        words = [key for key in header.tensors if _is_word(key) and _is_vectors(header, key)]
        encoders = [key for key in header.tensors if key in _ENCODERS and _is_vectors(header, key)]
        parts = {word: part_of(header, [word]) for word in words}
        if encoders:
            encoders += [key for key in header.tensors if key == _PLACEHOLDER and prod(header.tensors[key].shape) == 1]
            parts[file.rpartition(".")[0] or file] = part_of(header, encoders)
        left = [key for key in header.tensors if key not in {*words, *encoders}]
        return Reading(
            format=self.name, file=file, groups=(), parts=parts, findings=unknown_keys(left, "are no vectors of a word")
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always; no weight change is a word.
        """
        raise CannotCarry("the format 'textual-inversion' holds vectors of words and no weight change", "peft does")


def _is_word(key: str) -> bool:
    """Whether a key is a word for a tokenizer, by the brackets that trainers put around one."""
    return len(key) > 2 and key.startswith("<") and key.endswith(">")


_TELLING = Mark(lambda key: key in _ENCODERS or _is_word(key))


def _is_vectors(header: Header, key: str) -> bool:
    info = header.tensors[key]
    rows, width = (1, *info.shape)[-2:] if info.shape else (0, 0)
    return (
        len(info.shape) in (1, 2) and 0 < rows <= _MOST and 1 < width <= _WIDEST and info.dtype.startswith(("F", "BF"))
    )


@hookimpl
def lorahub_formats() -> list[Format]:
    """Textual inversion."""
    return [TextualInversionFormat()]
