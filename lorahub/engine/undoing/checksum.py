"""Whether bits are the ones that were there before, by the fastest twin that a device has; see ``checksum_torch``."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub.engine.kernels.choice import native, summer
from lorahub.lazy import torch

__all__ = ["checksum", "checksums"]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit checksum of a tensor's bits, as a scalar tensor on its device; its shape and strides do not count."""
    kernel = native().kernel if tensor.device.type == "cpu" else None
    return checksums((tensor,))[0] if kernel is None else torch.tensor(kernel.checksum(tensor))


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksums of tensors of one device, int64 ``[n]``, there; nothing is waited for."""
    device = tensors[0].device if tensors else torch.device("cpu")
    kernel = native().kernel if device.type == "cpu" else None
    if kernel is None:
        return summer(device).run(tensors)
    return torch.tensor([kernel.checksum(tensor) for tensor in tensors], dtype=torch.int64)
