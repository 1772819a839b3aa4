"""A tensor that stands in for a changed weight, which is made only when somebody computes with it.

Models look at the dtype of a weight (``self.wo.weight.dtype``) far more often than they use it apart from its module;
a look is answered by the parameter itself, and costs no copy of it.  Knows no adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["OF", "standing"]

OF = "_lorahub_of"
"""On what stands in for a parameter: that parameter."""

_MAKE = "_lorahub_make"

_PROPERTIES = (
    *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda", "is_cpu"),
    *("is_quantized", "is_sparse", "nbytes", "itemsize"),
)
_METHODS = (
    *("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "stride", "is_contiguous"),
    "__len__",
)


def standing(own: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Something that looks like ``own`` and computes as ``make()``.

    Of a sharded parameter it can only be looked at, as those do who shard, load and save it.

    Raises:
        UsageError: somebody computes with a sharded one.
    """
    sharded = hasattr(own, "device_mesh")
    raw = own.to_local() if sharded else own  # type: ignore[attr-defined]  # no subclass of a DTensor
    found: torch.Tensor = torch.Tensor._make_subclass(_class(), raw.detach())  # noqa: SLF001 - the documented way
    setattr(found, OF, own)
    setattr(found, _MAKE, _refused if sharded else make)
    return found


def _refused() -> torch.Tensor:
    raise UsageError(
        "a sharded weight that adapters change is used apart from its module, where the weight is not gathered",
        "shard the module that uses it and the module that has it as one",
    )


@functools.cache
def _class() -> type[torch.Tensor]:
    """The class, made when torch is there."""
    looks = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES}
    looks |= {getattr(torch.Tensor, name) for name in _METHODS}

    def made(value: Any) -> Any:
        return getattr(value, _MAKE)() if isinstance(value, Standing) else value

    class Standing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in looks:
                return func(getattr(args[0], OF), *args[1:], **(kwargs or {}))
            args, kwargs = torch.utils._pytree.tree_map(made, (args, kwargs or {}))  # noqa: SLF001 - as torch does
            return func(*args, **kwargs)

    return Standing
