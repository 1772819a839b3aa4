"""What the laws hold changes and outputs to: a sentence that is true, and float64 but for the order of operations."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub.lazy import torch

__all__ = ["close", "close_outputs", "hold"]


def hold(condition: bool, sentence: str) -> None:
    """Raise ``AssertionError`` with the sentence where the condition does not hold."""
    if not condition:
        raise AssertionError(sentence)


def close(found: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, sentence: str) -> None:
    """Equal but for the order of float64 operations.

    An element comes from at most one sum over the weight's elements and a few further operations, none of whose partial
    results is larger than n times the largest value in sight; each rounds by half an eps of that.
    """
    n = weight.numel()
    largest = max(1.0, *(float(tensor.abs().max()) for tensor in (found, expected, weight) if tensor.numel()))
    error = float((found - expected).abs().max()) if found.shape == expected.shape and found.numel() else 0.0
    bound = n * torch.finfo(torch.float64).eps * largest
    hold(found.shape == expected.shape and error <= bound, f"{sentence} (off by {error:.1e}, allowed {bound:.1e})")


def close_outputs(found: torch.Tensor, expected: torch.Tensor, used: Sequence[torch.Tensor], sentence: str) -> None:
    """Equal but for the order of float64 operations.

    An output is a sum of at most as many products as the weight has elements, added up over a rank before or after;
    no partial sum is larger than that many products of the largest input and the largest weight, and each rounds by
    half an eps of that.
    """
    x, *weights = used
    n = max(weight.numel() for weight in weights)
    largest = max(1.0, *(float(weight.abs().max()) for weight in weights))
    largest *= 1.0 if not x.is_floating_point() else max(1.0, float(x.abs().max()))
    error = float((found - expected).abs().max())
    bound = n * torch.finfo(torch.float64).eps * largest * n
    hold(error <= bound, f"{sentence} (off by {error:.1e}, allowed {bound:.1e})")
