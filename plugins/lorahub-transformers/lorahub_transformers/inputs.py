"""What a model's inputs become with a prompt or a prefix before them: embeddings, masks, labels, positions, cache.

Calls as PEFT 0.21 makes them.  For ``generate`` the cache tells whether this is the first call, where the prompt goes
in, or a later one, where it is in the cache already and masks and positions are all that has to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Before", "Prefix", "Prompt"]

_IGNORED = -100
"""The label of tokens that no loss counts."""


class Before(ABC):
    """Something that stands before a model's input."""

    count: int

    @abstractmethod
    def first(self, inputs: dict[str, Any]) -> None:
        """Put it in, before the input of a first call."""

    @abstractmethod
    def positions(self, inputs: dict[str, Any]) -> None:
        """What becomes of positions that the caller counts from its own first token."""

    def later(self, inputs: dict[str, Any], held: int) -> None:
        """Let a call know of it that goes on from ``held`` tokens in a cache."""
        new = _tokens(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise _refused("a mask for every layer, as of a static cache, has no room for it")
            if mask.shape[1] + self.count == held + new:
                inputs["attention_mask"] = _ones_before(mask, self.count)
            elif mask.shape[1] != held + new:
                raise _refused(
                    f"the cache holds {held} tokens and the mask is for {mask.shape[1]} with the {new} that come, so "
                    "somebody shortened the cache, as assisted generation does"
                )
        self.positions(inputs)

    def masked(self, inputs: dict[str, Any]) -> None:
        """Let the mask of a first call see it."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise _refused("a mask for every layer, as of a static cache, has no room for it")
        inputs["attention_mask"] = _ones_before(mask, self.count)


@final
class Prompt(Before):
    """Vectors before the embedded input."""

    def __init__(self, *, vectors: torch.Tensor, embedding: Any, labels: bool) -> None:
        """Keep them.

        Args:
            vectors: [tokens, width].
            embedding: what embeds the words.
            labels: there is a label for every token, so the prompt's tokens need some too.
        """
        self.count, self._vectors, self._embedding, self._labels = vectors.shape[0], vectors, embedding, labels

    def first(self, inputs: dict[str, Any]) -> None:
        """Embedded input with the vectors before it; token types of zeros, labels that count for nothing."""
        embedded = inputs.get("inputs_embeds")
        if embedded is None:
            embedded = self._embedding(inputs["input_ids"])
        inputs["inputs_embeds"] = self.before(embedded)
        inputs["input_ids"] = None
        self.masked(inputs)
        self.positions(inputs)
        if self._labels:
            inputs.pop("token_type_ids", None)
            if (labels := inputs.get("labels")) is not None:
                new = labels.new_full((labels.shape[0], self.count), _IGNORED)
                inputs["labels"] = torch.cat((new, labels), dim=1)
        elif (types := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = torch.cat((types.new_zeros(types.shape[0], self.count), types), dim=1)

    def before(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embeddings with the vectors before them, one copy for each row."""
        if self._vectors.device != embedded.device or self._vectors.dtype != embedded.dtype:
            self._vectors = self._vectors.to(embedded.device, embedded.dtype)
        return torch.cat((self._vectors.expand(embedded.shape[0], -1, -1), embedded), dim=1)

    def positions(self, inputs: dict[str, Any]) -> None:
        """The model counts them itself."""
        inputs.pop("position_ids", None)
        inputs.pop("cache_position", None)


@final
class Prefix(Before):
    """Keys and values in a model's cache, before those of the first token."""

    def __init__(self, *, pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...], both: bool, config: Any = None) -> None:
        """Keep them.

        Args:
            pairs: keys and values of each layer, [heads, tokens, width].
            both: for a decoder with an encoder, whose own cache is the prefix's.
            config: what says how each layer's cache slides; None: none does.
        """
        self.count, self._pairs, self._both, self._config = pairs[0][0].shape[1], pairs, both, config

    def first(self, inputs: dict[str, Any]) -> None:
        """A cache that holds them, in the place of the empty one."""
        names = ("inputs_embeds", "decoder_input_ids", "input_ids", "labels")
        shown: torch.Tensor = next(inputs[name] for name in names if inputs.get(name) is not None)
        inputs["past_key_values"] = self._cache(shown.shape[0], shown.device, inputs.pop("_dtype"))
        if not self._both:
            self.masked(inputs)
        elif (mask := inputs.get("decoder_attention_mask")) is not None:
            inputs["decoder_attention_mask"] = _ones_before(mask, self.count)
        self.positions(inputs)

    def later(self, inputs: dict[str, Any], held: int) -> None:
        """As for any; where an encoder has the mask, the decoder's is another."""
        if not self._both:
            super().later(inputs, held)
            return
        mask = inputs.get("decoder_attention_mask")
        if mask is not None and mask.shape[1] + self.count == held + _tokens(inputs, "decoder_"):
            inputs["decoder_attention_mask"] = _ones_before(mask, self.count)
        self.positions(inputs)

    def positions(self, inputs: dict[str, Any]) -> None:
        """They begin behind it."""
        if (given := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = given + self.count
        inputs.pop("cache_position", None)

    def _cache(self, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache  # noqa: PLC0415 - slow to import

        cache = DynamicCache(config=self._config)
        for layer, pair in enumerate(self._pairs):
            key, value = (each.to(device, dtype).expand(rows, -1, -1, -1).contiguous() for each in pair)
            cache.update(key, value, layer)
        return EncoderDecoderCache(cache, DynamicCache()) if self._both else cache


def _tokens(inputs: dict[str, Any], which: str = "") -> int:
    names = (f"{which}inputs_embeds", f"{which}input_ids")
    given: torch.Tensor = next(inputs[name] for name in names if inputs.get(name) is not None)
    return given.shape[1]


def _ones_before(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((mask.new_ones(mask.shape[0], count), mask), dim=1)


def _refused(why: str) -> UsageError:
    return UsageError(
        f"a prompt or prefix stands before the input, and {why}",
        "generate with the default cache, by sampling or beams; or take it off: live.set_adapters([])",
    )
