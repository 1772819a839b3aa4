"""What a conversion is asked for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorahub.composition.algebra.truncate import Budget
from lorahub.errors import UsageError

__all__ = ["DTYPES", "Request", "budget_of", "dtype_of", "plain_of"]

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "float64": "float64",
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
        "fp32": "float32",
        "fp16": "float16",
        "bf16": "bfloat16",
    }
)
"""What ``dtype`` may be -> name in torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        to: the format.
        out: where to; a file where its name ends as one.
        component: the part of a pipeline, or "".
        plain: everything that can be LoRA shall be.
        budget: for approximations; None forbids them.
        verify: compare every target, none of the rewritten, or what is cheap.
        dtype: what to store as, as torch calls it; "" for as it is.
        allow: finding codes to accept.
    """

    to: str
    out: Path
    component: str
    plain: bool
    budget: Budget | None
    verify: bool | None
    dtype: str
    allow: tuple[str, ...]


def plain_of(kind: str) -> bool:
    """Whether everything that can be LoRA shall be.

    Raises:
        UsageError: another kind was asked for.
    """
    if kind not in ("", "lora"):
        raise UsageError(f"nothing is rewritten as {kind!r}", "--kind lora, or leave it out")
    return bool(kind)


def budget_of(approximate: bool, rank: int | None, energy: float | None, error: float | None) -> Budget | None:
    """How much of a change an approximation keeps, or None where none was asked for.

    Raises:
        UsageError: a budget without an approximation, an approximation without a budget, or numbers out of range.
    """
    given = rank is not None or energy is not None or error is not None
    if given and not approximate:
        raise UsageError(
            "a rank, an energy or an error is for approximations, which are only made when asked for",
            "add --approximate",
        )
    if approximate and not given:
        raise UsageError("an approximation needs a budget", "--approximate --rank 32")
    return Budget(rank=rank, energy=energy, error=error) if approximate else None


def dtype_of(name: str) -> str:
    """What torch calls a dtype.

    Raises:
        UsageError: there is no such dtype to store in.
    """
    if name and name.lower() not in DTYPES:
        raise UsageError(f"{name!r} is no dtype to store in", f"there are {', '.join(DTYPES)}")
    return DTYPES[name.lower()] if name else ""
