"""``load_textual_inversion``: words for a pipeline's tokenizers, and their vectors for its text encoders.

A tokenizer with words is a copy of the pipeline's, and vectors are put in where the encoder looks its own up: no weight
is changed, and taking the words off leaves the very objects that were there.  Words of several vectors are as many
tokens, ``<ink> <ink>_1 ...``, which diffusers' pipelines make of the word in a prompt (``maybe_convert_prompt``).

Facts: diffusers 0.42.1, ``TextualInversionLoaderMixin``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, final
from weakref import WeakKeyDictionary, ref

from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.fetching import quiet
from lorahub.files.pickles import PICKLES
from lorahub.plugins import load_registry
from lorahub.sources import Given, header_of
from lorahub_diffusers.aside import put_aside, put_back
from lorahub_diffusers.encoders import Encoder, encoder_for
from lorahub_diffusers.lookup import Lookup
from lorahub_diffusers.vectors import Word, words_in
from lorahub_diffusers.view import is_pipeline

if TYPE_CHECKING:
    import torch

__all__ = ["Words", "load_textual_inversion"]

LOADED: WeakKeyDictionary[Any, Words] = WeakKeyDictionary()
"""Pipeline -> its words, while it has any."""

_OWN = ("load_textual_inversion", "save_pretrained", "unload_textual_inversion")
"""Methods of pipelines that count their tokens or write them, which are to see them without these words."""


def load_textual_inversion(
    pipe: Any, embedding: Given, *, token: str | None = None, component: str = "", hub: str | None = None
) -> Words:
    """Give a pipeline the words of a textual inversion; those that it has stay.

        words = load_textual_inversion(pipe, "EasyNegative.safetensors")
        pipe("a cat", negative_prompt="EasyNegative")
        words.unload()

    Args:
        pipe: a pipeline of diffusers, with its tokenizers.
        embedding: a file, a folder, ``ns/name[@SELECTOR]`` or an open header; also an adapter that bundles words.
        token: what to call the word; by default as the file says, else as the file is called.
        component: the text encoder, of vectors whose file does not say which: "text_encoder" by default.
        hub: path of a folder hub.

    Returns:
        The words of the pipeline, the same handle for every call.

    Raises:
        UsageError: it is no pipeline, the word is one already, the text encoder is not there, or the pipeline makes
            no tokens of a word of several vectors.
        UnsupportedFormat: the file holds no vectors of a word, or is a pickle.
        BaseMismatch: the vectors have another width than the text encoder's.
        NotFinite: they hold NaN or infinity.
    """
    if not is_pipeline(pipe):
        raise UsageError(
            f"this is a {type(pipe).__name__} and no pipeline of diffusers", "give the pipeline, which has tokenizers"
        )
    if isinstance(embedding, str | os.PathLike) and os.fspath(embedding).endswith(PICKLES):
        raise UnsupportedFormat(
            f"{os.fspath(embedding)} is a Python pickle, which is not opened here: it can run any code",
            "diffusers' own loader reads it: pipe.load_textual_inversion(FILE, token=WORD)",
        )
    header = header_of(embedding, load_registry(), hub=hub, progress=quiet)
    found = LOADED.get(pipe) or Words(pipe)
    found.add({word.name: word for word in words_in(header, token)}, component)
    return found


@final
class Words:
    """The words of a pipeline; as a context manager it takes them off at the end of the block."""

    def __init__(self, pipe: Any) -> None:
        """None yet; ``load_textual_inversion`` does this."""
        self._pipe = ref(pipe)
        self._words: Mapping[str, tuple[Word, str]] = {}
        self._before: dict[str, Any] = {}
        self._now: dict[str, tuple[Any, int]] = {}
        self._lookups: list[Lookup] = []

    @property
    def tokens(self) -> Mapping[str, tuple[str, ...]]:
        """Word -> the tokens that stand for it, one for each vector."""
        most = {name: max(len(vectors) for vectors in word.vectors.values()) for name, (word, _) in self._words.items()}
        return {name: _tokens(name, count) for name, count in most.items()}

    def add(self, words: Mapping[str, Word], component: str = "") -> None:
        """Give the pipeline more words; see ``load_textual_inversion``.

        Raises:
            UsageError, BaseMismatch: as there; nothing changes then.
        """
        for name in words:
            if name in self._words:
                raise UsageError(f"the pipeline has the word {name!r} already", "take another: token=...")
        self._settle({**self._words, **{name: (word, component) for name, word in words.items()}})

    def remove(self, word: str) -> None:
        """Take one word off.

        Raises:
            UsageError: there is none, or the tokenizers were changed by others.
        """
        if word not in self._words:
            raise UsageError(f"the pipeline has no word {word!r}", f"there are: {', '.join(self._words) or 'none'}")
        self._settle({name: each for name, each in self._words.items() if name != word})

    def unload(self) -> None:
        """Take all words off; tokenizers and text encoders are what they were.  Doing it twice is no fault.

        Raises:
            UsageError: the tokenizers were changed by others.
        """
        self._settle({})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    # ---- how it is done

    def _settle(self, words: Mapping[str, tuple[Word, str]]) -> None:
        """Let the pipeline have these words and no others: at once, or not at all.

        What others did to the pipeline meanwhile is kept: all of it is worked out anew from what is there without them.
        """
        pipe = self._pipe()
        if pipe is None:
            return
        self._demand_own(pipe)
        before = {**{name: getattr(pipe, name) for name in _tokenizers(pipe)}, **self._before}
        tokenizers: dict[str, Any] = {}
        rows: dict[str, tuple[Encoder, dict[int, torch.Tensor]]] = {}
        for word, component in words.values():
            for called, vectors in word.vectors.items():
                encoder = encoder_for(pipe, called, component, vectors.shape[1])
                _demand_several(pipe, word.name, len(vectors))
                if encoder.tokenizer not in tokenizers:
                    tokenizers[encoder.tokenizer] = deepcopy(before[encoder.tokenizer])
                numbers = _learned(tokenizers[encoder.tokenizer], word.name, len(vectors))
                _, found = rows.setdefault(encoder.component, (encoder, {}))
                found |= dict(zip(numbers, vectors, strict=True))
        self._take_off(pipe)
        for name, tokenizer in tokenizers.items():
            self._before[name] = before[name]
            self._now[name] = (tokenizer, len(tokenizer))
            setattr(pipe, name, tokenizer)
        self._lookups = [Lookup(encoder.tables, found) for encoder, found in rows.values()]
        self._words = words
        LOADED.pop(pipe, None)
        if words:
            put_aside(pipe, _OWN, self._away)
            LOADED[pipe] = self

    def _take_off(self, pipe: Any) -> None:
        for lookup in self._lookups:
            lookup.remove()
        for name, tokenizer in self._before.items():
            setattr(pipe, name, tokenizer)
        put_back(pipe, _OWN)
        self._lookups = []
        self._before.clear()
        self._now.clear()

    def _demand_own(self, pipe: Any) -> None:
        """Return where the tokenizers are as they were left here.

        Raises:
            UsageError: others put words in besides, or another in the place of one.
        """
        for name, (tokenizer, size) in self._now.items():
            changed = getattr(pipe, name, None) is not tokenizer
            if changed or len(tokenizer) != size:
                raise UsageError(f"{name} was changed since words were loaded here", "put back the one that was there")

    @contextmanager
    def _away(self) -> Iterator[None]:
        words = self._words
        self._settle({})
        try:
            yield
        finally:
            self._settle(words)


def _tokenizers(pipe: Any) -> list[str]:
    return [name for name in pipe.components if name.startswith("tokenizer")]


def _tokens(word: str, count: int) -> tuple[str, ...]:
    """The tokens of a word of so many vectors, as diffusers calls them."""
    return (word, *(f"{word}_{number}" for number in range(1, count)))


def _learned(tokenizer: Any, word: str, count: int) -> list[int]:
    """The numbers of a word's tokens, which the tokenizer now has."""
    tokens = _tokens(word, count)
    known = tokenizer.get_vocab()
    if there := [token for token in (*tokens, f"{word}_1") if token in known]:
        raise UsageError(f"the tokenizer has the word {there[0]!r} already", "take another: token=...")
    for token in tokens:
        tokenizer.add_tokens(token)
    numbers: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return numbers


def _demand_several(pipe: Any, word: str, count: int) -> None:
    if count > 1 and not hasattr(pipe, "maybe_convert_prompt"):
        raise UsageError(
            f"{word!r} has {count} vectors, and a {type(pipe).__name__} makes no tokens of a word in a prompt",
            "pipelines of diffusers with load_textual_inversion do",
        )
