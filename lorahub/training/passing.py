"""Whether gradients pass through a base's quantised modules, found out while it is trained: once for each of them.

Some kernels round what goes into them, or have no way back, and autograd says nothing of it: what lies before such a
module is then trained by nothing, or by a part of its gradient.  Where a library keeps weights in another order for
kernels like that, it gets them back in the first before a step.  Knows modules; no adapters, and no storage by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from lorahub.errors import Incompatible
from lorahub.lazy import torch
from lorahub.live.copies import Bound
from lorahub.storages.storage import Rearranged, held_in

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Passing"]


@final
class Passing:
    """Hooks on the quantised modules; each is gone once its module was seen to pass gradients on."""

    def __init__(self, model: nn.Module) -> None:
        """Hook them, before whatever else is done with their outputs."""
        self._handles: dict[str, Any] = {}
        self._arranging: list[Any] = []
        for name, held in held_in(model).items():
            module = name.rpartition(".")[0]
            if isinstance(held, Rearranged):
                hook = _Arrange(held)
                self._arranging.append(model.get_submodule(module).register_forward_pre_hook(hook, prepend=True))
            if module not in self._handles:
                watch = _Watch(module, held.storage, self._seen)
                self._handles[module] = model.get_submodule(module).register_forward_hook(watch, prepend=True)

    def remove(self) -> None:
        """Take the hooks off that are there still."""
        for module in list(self._handles):
            self._seen(module)
        for handle in self._arranging:
            handle.remove()

    def _seen(self, module: str) -> None:
        if (handle := self._handles.pop(module, None)) is not None:
            handle.remove()


class _Arrange(Bound):
    """Before a module is called whose gradients may be wanted."""

    def __init__(self, held: Rearranged) -> None:
        self._held = held

    def __call__(self, _module: nn.Module, _args: object) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._held.arrange()


class _Watch(Bound):
    """What looks at the calls of one module."""

    def __init__(self, module: str, storage: str, seen: Callable[[str], None]) -> None:
        self._module, self._storage, self._seen = module, storage, seen

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Look at one call.

        Raises:
            Incompatible: its input wants gradients, and its output does not.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not (args and isinstance(args[0], torch.Tensor) and args[0].requires_grad):
            return
        if isinstance(output, torch.Tensor) and not output.requires_grad:
            raise Incompatible(
                f"no gradient passes through {self._module}, which is stored as {self._storage}: what lies before it "
                "would not be trained by what comes of it",
                "quantise the weights alone and not the inputs (torchao's Int8WeightOnlyConfig, bitsandbytes' 4 bits), "
                "or train on the base as it was before",
            )
        self._seen(self._module)
