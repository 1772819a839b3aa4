"""Textual inversion files, read: the words that they bring, and their vectors by the text encoder these are for.

A file of one word and one encoder need not say which (``<ink>``, ``emb_params``); others name encoders as their
trainers do (``clip_l``, ``clip_g``).  OneTrainer bundles words with an adapter (``bundle_emb.<word>.<encoder>``).
Knows no pipelines.

Facts: diffusers' ``learned_embeds``, AUTOMATIC1111's ``emb_params``, kohya's and OneTrainer's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorahub.adapter import AdapterHeader
from lorahub.errors import NotFinite, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.files.tensors import FileSource
from lorahub.formats.token_vectors import KIND, REASON

if TYPE_CHECKING:
    import torch

__all__ = ["ANY", "LOADER", "Word", "refuse_words", "words_in"]

ANY = ""
"""The encoder of vectors whose file does not say which."""

_ALONE = frozenset({"emb_params", "string_to_param.*"})
_NUMBER = "string_to_token.*"
"""The number that the word had in training, which says nothing to another tokenizer."""

_BUNDLE = "bundle_emb."

LOADER = "lorahub_diffusers.load_textual_inversion(pipe, ...)"
"""What takes such a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A word that a tokenizer is to gain.

    Attributes:
        name: as prompts have it.
        vectors: text encoder, as the file calls it or ``ANY`` -> [vectors, width], on the CPU, as stored.
    """

    name: str
    vectors: Mapping[str, torch.Tensor]


def words_in(header: AdapterHeader, token: str | None) -> tuple[Word, ...]:
    """The words of a file, read.

    Args:
        header: of the file.
        token: what to call the word, where there is one; as the file says by default, else as the file is called.

    Raises:
        UnsupportedFormat: it holds no vectors of a word.
        UsageError: ``token`` was given and there are several words.
        NotFinite: a vector holds NaN or infinity.
    """
    parts = {name: part for name, part in header.reading.parts.items() if part.kind == KIND}
    if not parts:
        raise UnsupportedFormat(
            f"{header.label} holds no vectors of a word, so it is no textual inversion",
            "put an adapter on the pipeline: lorahub_diffusers.load_lora_weights(pipe, ...)",
        )
    if token is not None and len(parts) > 1:
        raise UsageError(f"{header.label} holds {len(parts)} words: {', '.join(parts)}", "leave out token=")
    found = []
    with FileSource(header.folder / header.reading.file) as source:
        for name, part in parts.items():
            vectors: dict[str, torch.Tensor] = {}
            for key in part.tensors:
                if key == _NUMBER:
                    continue
                value = source.read(key)
                if not bool(value.isfinite().all()):
                    raise NotFinite(f"{header.label} holds NaN or infinity in {key}", "ask its author for a sound one")
                vectors[_encoder(name, key)] = value.reshape(-1, value.shape[-1])
            found.append(Word(name=name if token is None else token, vectors=vectors))
    return tuple(found)


def refuse_words(header: AdapterHeader) -> None:
    """Return where a file changes weights.

    Raises:
        UnsupportedKind: it is a textual inversion and nothing else, with what to call for it.
    """
    reading = header.reading
    if reading.parts and not reading.groups and {part.kind for part in reading.parts.values()} == {KIND}:
        raise UnsupportedKind(f"{header.label} is a textual inversion ({', '.join(reading.parts)}): {REASON}", LOADER)


def _encoder(name: str, key: str) -> str:
    """The text encoder that a key names."""
    if key == name or key in _ALONE or key.endswith(".*"):
        return ANY
    return key.removeprefix(f"{_BUNDLE}{name}.")
