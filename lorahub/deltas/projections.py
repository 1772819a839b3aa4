"""Fixed random projections that all modules of an adapter share: what VeRA and PVeRA have in common.

``down`` ``[r, >= in]`` and ``up`` ``[>= out, r]`` are as large as the largest adapted layer, and every layer uses
their first columns and rows.  Files may lack them (PEFT's ``save_projection`` false); then they are drawn again from
the seed, by torch's CPU generator as in PEFT, once the base says how large its layers are.  Knows tensors, sizes and
the config fields that both kinds have; no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub.deltas.cut import counts_from_the_end
from lorahub.deltas.delta import Index, LowRank, take
from lorahub.deltas.kind import JSON, Completed, Field, Group, Surroundings, TensorRef
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, seed, switch
from lorahub.errors import BaseMismatch, BaseNeeded, IntegrityError, NotLocal
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch

if TYPE_CHECKING:
    from lorahub.bases.site import Site

__all__ = [
    "FIELDS",
    "columns_of",
    "complete",
    "config",
    "drawn",
    "example_projections",
    "expect_reason",
    "expect_sizes",
    "factors",
    "facts",
    "projected",
    "through",
]

_DRAWN = (
    "save_projection is false, so the projections are not in the file: they are drawn again from a seed, as large as "
    "the largest layers of the base"
)
_MOST = 16

_SAVE = "give the base (--base), or save the adapter again, in PEFT, with save_projection=True"

FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "d_initial": INERT,
        "projection_prng_key": USED,
        "save_projection": USED,
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


def factors(
    kind: str, gain: torch.Tensor, mix: torch.Tensor, up: torch.Tensor, down: torch.Tensor, inputs: int
) -> LowRank:
    """``projected`` as factors for so many inputs, in float64, in which products of two stored numbers are exact.

    Raises:
        BaseMismatch: ``down`` has fewer columns.
    """
    if inputs > down.shape[1]:
        raise BaseMismatch(f"a {kind} delta for up to {down.shape[1]} inputs was given a weight with {inputs}")
    left = gain.double()[:, None] * up[: gain.shape[0]].double()
    return LowRank(left, mix.double()[:, None] * down[:, :inputs].double(), 1.0)


def through(
    gain: torch.Tensor,
    mix: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    site: Site,
) -> torch.Tensor | None:
    """What ``projected`` adds to a linear layer's output: the vectors multiply what lies between the projections."""
    if site.op != "linear":
        return None
    linear = torch.nn.functional.linear
    inner = linear(x.to(y.dtype), down[:, : x.shape[-1]].to(y)) * mix.to(y)
    return linear(inner, up[: gain.shape[0]].to(y)) * gain.to(y)


def complete(
    config: Mapping[str, JSON],
    groups: Sequence[Group],
    shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """The groups as they are where the projections were saved; else with the facts from which they are drawn.

    Raises:
        BaseNeeded: they were not saved, and there is no base, or it lacks one of the modules.
        IntegrityError: one was saved and the other was not, the config says that they are there, or a rank is beyond
            reason.
    """
    if {"up", "down"} <= shared.keys():
        return Completed(groups=tuple(groups))
    if shared or switch(config, "save_projection", True):
        has = "one of two" if shared else "none"
        raise IntegrityError(f"the modules share two projections, and the file has {has}")
    if base is None:
        raise BaseNeeded(_DRAWN, _SAVE)
    if absent := sorted(group.module for group in groups if group.module not in base.matrices):
        raise BaseNeeded(f"{_DRAWN}, and this base has no matrix called {absent[0]}", _SAVE)
    sizes = [base.matrices[group.module] for group in groups]
    out, inputs = max(each.out for each in sizes), max(each.inputs for each in sizes)
    expect_reason(max(_rank(group) for group in groups), out, inputs)
    about: dict[str, JSON] = {"out": out, "inputs": inputs, "seed": seed(config, "projection_prng_key", 0)}
    note = Finding(
        code="drawn-again",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"{_DRAWN}; torch does not promise the same numbers in every release",
        where=tuple(group.module for group in groups),
        remedy="save the adapter again, which keeps them",
    )
    completed = (replace(group, options={**group.options, **about}) for group in groups)
    return Completed(groups=tuple(completed), findings=(note,))


def _rank(group: Group) -> int:
    rank = group.options["rank"]
    assert isinstance(rank, int)
    return rank


def expect_reason(rank: int, out: int, inputs: int) -> None:
    """Refuse to draw more numbers than a rank within reason takes, whatever a small file says.

    Raises:
        IntegrityError: the rank is far beyond any layer's size.
    """
    if rank > _MOST * max(out, inputs):
        raise IntegrityError(f"a rank of {rank} is more than {_MOST} times the size of the largest layer")


def facts(group: Group) -> tuple[int, int, int]:
    """How large the largest layers are (outputs, inputs), and the seed, as ``complete`` has found them."""
    out, inputs, start = (group.options[name] for name in ("out", "inputs", "seed"))
    assert isinstance(out, int)
    assert isinstance(inputs, int)
    assert isinstance(start, int)
    return out, inputs, start


@lru_cache(maxsize=2)  # the same for all modules of an adapter
def drawn(out: int, inputs: int, start: int, r: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` ``[out, r]`` and ``down`` ``[rows, inputs]`` as PEFT 0.21.2 draws them: down first, Kaiming uniform."""
    generator = torch.Generator().manual_seed(start)
    down, up = (
        torch.empty(size).uniform_(-_bound(size[1]), _bound(size[1]), generator=generator)
        for size in ((rows, inputs), (out, r))
    )
    return up, down


def _bound(fan_in: int) -> float:
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))


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
