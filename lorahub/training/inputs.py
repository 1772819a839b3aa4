"""Gradients for what a frozen base computes first, so that checkpointing finds inputs which want them.

Reentrant checkpointing gives gradients to a block's parameters only where one of its inputs wants some, and nothing
before the first adapter does.  Knows modules; no adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from lorahub.bases.torch_module import CHILD
from lorahub.lazy import torch
from lorahub.live.copies import Bound

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Wanting", "switches"]

_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")
"""What modules of the model libraries call the switch for it."""


def switches(model: nn.Module) -> Callable[[], bool]:
    """What tells whether a module of the model says that it checkpoints: those that can are looked up once."""
    able = [(module, switch) for module in model.modules() for switch in _SWITCHES if hasattr(module, switch)]
    return lambda: any(getattr(module, switch) is True for module, switch in able)


@final
class Wanting:
    """Hooks on the modules that compute something themselves; the first in a call lets its output want gradients."""

    def __init__(self, model: nn.Module) -> None:
        """Hook every module with parameters of its own."""
        self._handles = [
            module.register_forward_hook(_Want())
            for name, module in model.named_modules()
            if CHILD not in name.split(".") and next(module.parameters(recurse=False), None) is not None
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class _Want(Bound):
    """Of a leaf, which nothing that wants gradients went into; a view of one is left as it is."""

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if (
            isinstance(output, torch.Tensor)
            and output.is_floating_point()
            and not output.requires_grad
            and module.training
            and torch.is_grad_enabled()
        ):
            output.requires_grad_(True)
