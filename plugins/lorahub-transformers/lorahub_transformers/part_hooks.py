"""The hooks by which a prompt or prefix reaches a model's calls; each asks first whether it acts now.

A copy or a pickle of the model does not take them along; see ``lorahub.live.copies``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from lorahub.lazy import torch
from lorahub.live.copies import Bound
from lorahub_transformers.inputs import Before, Prompt

__all__ = ["BeforeEncoder", "BeforeModel", "Head", "InsideEncoder"]


class _Hook(Bound):
    """Bound to one model and no copy of it."""

    def __init__(self, acts: Callable[[], bool]) -> None:
        self.acts = acts


class BeforeModel(_Hook):
    """Before a model, or the one inside it that has the cache, is called."""

    def __init__(self, what: Before, acts: Callable[[], bool]) -> None:
        super().__init__(acts)
        self.what = what

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call's arguments, all by name."""
        if not self.acts():
            return None
        inputs = _named(module, args, kwargs)
        cache = inputs.get("past_key_values")
        held = int(cache.get_seq_length()) if cache is not None else 0
        if held and not _begins_again(inputs):
            self.what.later(inputs, held)
        else:
            if not isinstance(self.what, Prompt):
                inputs["_dtype"] = module.dtype
            self.what.first(inputs)
        return (), inputs


class BeforeEncoder(_Hook):
    """Before a model with an encoder is called, which is done once in training and for every token in generation."""

    def __init__(self, what: Prompt, acts: Callable[[], bool]) -> None:
        super().__init__(acts)
        self.what = what
        self.done: ContextVar[bool] = ContextVar("lorahub_prompt_done", default=False)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """With the encoder's output, all that is left is the mask by which the decoder looks at it."""
        if not self.acts():
            return None
        inputs = _named(module, args, kwargs)
        encoded = inputs.get("encoder_outputs")
        if encoded is None:
            self.what.first(inputs)
            self.done.set(True)
        elif (mask := inputs.get("attention_mask")) is not None and mask.shape[1] != encoded[0].shape[1]:
            self.what.masked(inputs)
        return (), inputs


class InsideEncoder(_Hook):
    """Before the encoder alone is called, as generation does; within a call of the model, the prompt is there."""

    def __init__(self, what: Prompt, acts: Callable[[], bool], outer: BeforeEncoder) -> None:
        super().__init__(acts)
        self.what, self.outer = what, outer

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See the class."""
        if not self.acts():
            return None
        if self.outer.done.get():
            self.outer.done.set(False)
            return None
        inputs = _named(module, args, kwargs)
        self.what.first(inputs)
        return (), inputs


class Head(_Hook):
    """After a linear layer was called: what another head gives for the same input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, acts: Callable[[], bool]) -> None:
        super().__init__(acts)
        self.weight, self.bias = weight, bias

    def __call__(self, _module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor | None:
        """``y`` is what the model's own gave."""
        if not self.acts():
            return None
        if self.weight.device != y.device or self.weight.dtype != y.dtype:
            self.weight = self.weight.to(y.device, y.dtype)
            self.bias = None if self.bias is None else self.bias.to(y.device, y.dtype)
        return torch.nn.functional.linear(args[0], self.weight, self.bias)


def _begins_again(inputs: Mapping[str, Any]) -> bool:
    """Whether the call brings every token anew, as generation without a cache does with what it got back of one."""
    given = inputs.get("input_ids")
    if inputs.get("use_cache") is not False or given is None:
        return False
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, torch.Tensor):
        return bool(mask.shape == given.shape)
    return positions is not None and int(positions.min()) == 0


def _named(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
