"""Fixed random projections that all modules of an adapter share: what VeRA and PVeRA have in common.

``down`` ``[r, >= in]`` and ``up`` ``[>= out, r]`` are as large as the largest adapted layer, and every layer uses their
first columns and rows.  Knows tensors, sizes and the config fields that both kinds have; no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas.cut import counts_from_the_end
from lorahub.deltas.delta import Index, take
from lorahub.deltas.kind import JSON, Field, Group
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal
from lorahub.lazy import torch

__all__ = ["FIELDS", "LACKING", "columns_of", "config", "example_projections", "expect_sizes", "projected"]

LACKING = (
    "PEFT leaves the projections out where save_projection is false and draws them again from a seed, as large as the "
    "largest layers of the base; the file does not say how many inputs those have. Save the adapter again, in PEFT, "
    "with save_projection=True"
)

FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "d_initial": INERT,
        # the projections themselves are read; without them the missing slots are what is to be said
        "projection_prng_key": INERT,
        "save_projection": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def projected(
    kind: str, gain: torch.Tensor, mix: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``(gain * up[:out]) @ (mix * down[:, :in])`` for a weight ``[out, in]``, in its dtype; as PEFT orders it.

    Raises:
        BaseMismatch: the weight has another number of rows, more columns than ``down``, or is no matrix.
    """
    if weight.dim() != 2 or weight.shape[0] != gain.shape[0] or weight.shape[1] > down.shape[1]:
        raise BaseMismatch(
            f"a {kind} delta for {gain.shape[0]} outputs and up to {down.shape[1]} inputs was given a weight "
            f"{list(weight.shape)}"
        )
    out, inputs = weight.shape
    left = gain.to(weight)[:, None] * up[:out].to(weight)
    return left @ (mix.to(weight)[:, None] * down[:, :inputs].to(weight))


def columns_of(kind: str, down: torch.Tensor, cols: Index) -> torch.Tensor:
    """The columns of ``down`` that a region of the weight has, and perhaps more behind them.

    Raises:
        NotLocal: the region counts from the end of the weight, which ``down`` does not tell.
    """
    if counts_from_the_end(cols):
        raise NotLocal(f"a {kind} delta does not know how many inputs its weight has, to count from the end of them")
    return take(down, cols, 1)


def expect_sizes(group: Group, gain: torch.Tensor, rank: int, up: torch.Tensor, down: torch.Tensor) -> None:
    """Refuse projections that the module's own vectors do not fit.

    Raises:
        IntegrityError: naming the shapes.
    """
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != rank or up.shape[0] < gain.shape[0]:
        raise IntegrityError(
            f"{group.module}: {group.slots['gain'].key} {list(gain.shape)} of rank {rank} does not fit the shared "
            f"projections {list(down.shape)} and {list(up.shape)}"
        )


def example_projections(
    kind: str, shape: tuple[int, ...], r: int, rows: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal ``up`` and ``down`` (of ``rows`` rows) that are larger than a matrix of ``shape``.

    Raises:
        BaseMismatch: ``shape`` is no matrix.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a {kind} delta changes matrices [out, in], not {list(shape)}")
    out, inputs = shape
    up = torch.randn(out + 3, r, generator=generator, device=generator.device) / math.sqrt(r)
    return up, torch.randn(rows, inputs + 2, generator=generator, device=generator.device)


def config(groups: Mapping[str, Group], dropout: str) -> dict[str, JSON]:
    """The fields under which PEFT makes room for the tensors of ``groups`` and reads all of them.

    Raises:
        CannotCarry: ranks differ.
    """
    return {
        "r": one_for_all(groups, "r", lambda group: group.options["rank"]),
        "save_projection": True,
        "projection_prng_key": 0,  # of no effect: the projections are stored
        "d_initial": 0.1,
        "init_weights": True,
        dropout: 0.0,
    }
