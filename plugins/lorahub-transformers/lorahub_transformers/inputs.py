"""What a model's inputs become with a prompt or a prefix before them: embeddings, masks, labels, positions, cache.

Calls as PEFT 0.21 makes them.  For ``generate`` the cache tells whether this is the first call, where the prompt goes
in, or a later one, where it is in the cache already and masks and positions are all that has to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Before", "Prefix", "Prompt", "TaskPrompt", "tasks"]

_IGNORED = -100
"""The label of tokens that no loss counts."""

_TASKS: ContextVar[tuple[int, ...]] = ContextVar("lorahub_tasks", default=())


@contextmanager
def tasks(*numbers: int) -> Iterator[None]:
    """Say which tasks the rows are for, of prompts that were trained for several (multitask prompt tuning).

    For ``generate``, which passes nothing on that a model's ``forward`` does not name; a call of the model itself takes
    ``task_ids=`` as PEFT's does.  One number is for every row; of several, each is for one row of the input, also where
    beams or ``num_return_sequences`` make more of it.
    """
    before = _TASKS.set(numbers)
    try:
        yield
    finally:
        _TASKS.reset(before)


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
class TaskPrompt(Prompt):
    """Vectors before the embedded input, others for each task."""

    def __init__(
        self, *, name: str, vectors: torch.Tensor, embedding: Any, labels: bool, shifted: Callable[..., Any] | None
    ) -> None:
        """Keep them.

        Args:
            name: of the part.
            vectors: [tasks, tokens, width]; where a decoder has some of its own, those come second, as many.
            embedding: what embeds the words.
            labels: there is a label for every token.
            shifted: what makes a decoder's input of labels, where the decoder has vectors of its own.
        """
        self._name, self._shifted = name, shifted
        self._each, *second = vectors.chunk(2, dim=1) if shifted else (vectors,)
        self._decoder = second[0] if second else None
        super().__init__(vectors=self._each[0], embedding=embedding, labels=labels)
        self._given: ContextVar[torch.Tensor | None] = ContextVar("lorahub_task_ids", default=None)

    def first(self, inputs: dict[str, Any]) -> None:
        """As for any, for the tasks of ``task_ids``.

        Raises:
            UsageError: nobody says which task a row is for, or it is none of those that there are.
        """
        before = self._given.set(inputs.pop("task_ids", None))
        try:
            super().first(inputs)
            if self._decoder is not None and self._shifted is not None:
                self._decoded(inputs, self._decoder, self._shifted)
        finally:
            self._given.reset(before)

    def _decoded(self, inputs: dict[str, Any], vectors: torch.Tensor, shifted: Callable[..., Any]) -> None:
        """The decoder's own before its input, in a call of the whole model; PEFT's ``generate`` has none of them."""
        labels, embedded = inputs.get("labels"), inputs.get("decoder_inputs_embeds")
        if embedded is None:
            words = inputs.pop("decoder_input_ids", None)
            if words is None and labels is None:  # the encoder alone
                return
            embedded = self._embedding(shifted(labels) if words is None else words)
        chosen = vectors.to(embedded.device, embedded.dtype)[self._chosen(embedded.shape[0]).to(embedded.device)]
        inputs["decoder_inputs_embeds"] = torch.cat((chosen, embedded), dim=1)
        if (mask := inputs.get("decoder_attention_mask")) is not None:
            inputs["decoder_attention_mask"] = _ones_before(mask, self.count)
        if labels is not None:
            new = labels.new_full((labels.shape[0], self.count), _IGNORED)
            inputs["labels"] = torch.cat((new, labels), dim=1)

    def later(self, inputs: dict[str, Any], held: int) -> None:
        """The cache has it by then, whichever it was."""
        inputs.pop("task_ids", None)
        super().later(inputs, held)

    def before(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embeddings with the vectors of each row's task before them."""
        if self._each.device != embedded.device or self._each.dtype != embedded.dtype:
            self._each = self._each.to(embedded.device, embedded.dtype)
        return torch.cat((self._each[self._chosen(embedded.shape[0]).to(embedded.device)], embedded), dim=1)

    def _chosen(self, rows: int) -> torch.Tensor:
        """The task of each row."""
        count, given, said = len(self._each), self._given.get(), _TASKS.get()
        if given is not None:
            chosen = given.reshape(-1).cpu()
        elif said:
            chosen = torch.tensor(said)
            if rows % len(said) == 0:  # generate makes more of each row, one beside the other
                chosen = chosen.repeat_interleave(rows // len(said))
        elif count == 1:
            chosen = torch.zeros(1, dtype=torch.long)
        else:
            raise UsageError(
                f"'{self._name}' was trained for {count} tasks, and nobody says which one the rows are for",
                "model(..., task_ids=torch.tensor([0, 1])); around generate, with lorahub_transformers.tasks(0, 1)",
            )
        if len(chosen) not in (1, rows):
            raise UsageError(
                f"'{self._name}' is told {len(chosen)} tasks for {rows} rows",
                "say one for each row, or one for all of them",
            )
        if bool((chosen < 0).any()) or bool((chosen >= count).any()):
            raise UsageError(
                f"'{self._name}' was trained for {count} tasks, and is asked for {sorted(set(chosen.tolist()))}",
                f"tasks are numbered from 0 to {count - 1}",
            )
        return chosen.expand(rows)


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
