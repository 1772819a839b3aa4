"""One parameter of a live model and what adapters do to it: which of four ways each change takes.

- low rank: two factors, added to the module's output in one product with those of other adapters;
- own: what ``Delta.contribution`` gives is added to the output;
- weight: the changed weight stands in the parameter's place whenever the module reads it;
- change: of a quantised weight, what is added to the numbers that it stands for acts beside the module.

All but the third need a site, at which the module's output is known to come linearly from its weight; so does the
third where rows of a batch take adapters of their own.  Knows no selections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import final

from lorahub.bases.layout import Piece, Region, Target
from lorahub.bases.site import Site
from lorahub.deltas.delta import ALL, Delta, Index, LowRank, Route
from lorahub.errors import NotLocal
from lorahub.lazy import torch
from lorahub.live.effective import Addend, cut
from lorahub.live.places import Place
from lorahub.storages.storage import Held

__all__ = ["Loaded", "Part", "Spot", "Way"]


class Way(Enum):
    """How a change reaches the module's output."""

    LOW_RANK = "low rank"
    OWN = "own"
    WEIGHT = "weight"
    CHANGE = "change"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One piece of one adapter's change, at one spot.

    Attributes:
        target: under which name the adapter has it.
        delta: the change, of one expert where it is one of a stack.
        piece: which part of the delta, and where in the parameter.
        siblings: parameters that the delta reads: name -> where it lies, and what of it.
        whole: taken as it is whatever the weight, as in a parameter that holds no real numbers.
        inside: the weight goes into the factors and not onto the change.
        replaces: it is a new value.
        way: how it reaches the output.
        route: how training avoids the changed weight, where that is its way and can be avoided.
    """

    target: Target
    delta: Delta
    piece: Piece
    siblings: Mapping[str, tuple[Place, Region]]
    whole: bool
    inside: bool
    replaces: bool
    way: Way = Way.WEIGHT
    route: Route | None = None

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted for its tensors, so that nothing made of them can be kept."""
        return any(tensor.requires_grad for tensor in self.delta.tensors().values())

    def addend(self, weight: float) -> Addend:
        """The part at a weight."""
        return Addend(
            weight=1.0 if self.whole or self.inside else weight,
            delta=self.delta.strengthened(weight) if self.inside and weight != 1 else self.delta,
            piece=self.piece,
            siblings={name: region.of(place.raw()) for name, (place, region) in self.siblings.items()},
        )

    def reads(self) -> tuple[torch.Tensor, ...]:
        """The siblings as they are stored."""
        return tuple(place.raw() for place, _ in self.siblings.values())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """One adapter, spread over spots; another value under the same name is another object.

    Attributes:
        name: what it is called.
        parts: spot -> its parts there.
        factors: spot -> the low-rank ones among them as one pair of factors of the whole parameter.
        not_by_row: parameters that it changes where rows of a batch cannot be told apart.
        dropout: the chance of an input of its paths to be dropped while the module that has them trains.
        fired: spots at which it was used.
    """

    name: str
    parts: Mapping[int, tuple[Part, ...]]
    factors: Mapping[int, LowRank]
    not_by_row: tuple[str, ...]
    dropout: float = 0.0
    fired: set[int] = field(default_factory=set)
    trains: bool = field(init=False)

    def __post_init__(self) -> None:
        """``trains``: gradients were wanted for one of its tensors when it came."""
        trains = any(part.trains for parts in self.parts.values() for part in parts)
        object.__setattr__(self, "trains", trains)

    def takes(self, key: int, *ways: Way) -> tuple[Part, ...]:
        """Its parts at a spot that take one of ``ways``."""
        return tuple(part for part in self.parts.get(key, ()) if part.way in ways)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """A parameter in one module.

    Attributes:
        key: its number among the spots of an attached model.
        place: where it is.
        site: how the module's output comes from it, or None.
        shape: of its numbers, which is not that of the tensor where these are quantised.
        quantised: how the numbers are stored, where these are not the tensor; then there is a site.
    """

    key: int
    place: Place
    site: Site | None
    shape: tuple[int, ...]
    quantised: Held | None = None

    def numbers(self) -> torch.Tensor:
        """The untouched weight as numbers."""
        return self.place.raw() if self.quantised is None else self.quantised.read().values()

    @property
    def form(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device of what the module computes, as far as its weight tells."""
        if self.quantised is not None:
            return self.quantised.dtype, self.quantised.device
        raw = self.place.raw()
        return raw.dtype, raw.device

    def way(self, part: Part) -> Way:
        """The shortest way for a part; the same whatever module and selection do."""
        way = self._way(part)
        return Way.CHANGE if way is Way.WEIGHT and self.quantised is not None else way

    def route(self, part: Part) -> Route | None:
        """How training avoids the changed weight for a part whose way it is.

        A part of a fused weight has one where rows of it are what the module puts out: some of its outputs.
        """
        to = part.piece.of_parameter
        if self.site is None or self.place.leaf not in ("weight", "bias") or to.cols != ALL or to.expert is not None:
            return None
        rows = self.site.op == "linear" or (self.site.op == "conv" and self.site.groups == 1)
        if to.rows != ALL and not (rows and self.place.leaf == "weight"):
            return None
        if part.whole or part.replaces or part.siblings or to.transposed != self.site.transposed:
            return None
        try:
            return cut(part.delta, part.piece).around(self.site)
        except NotLocal:
            return None

    def _way(self, part: Part) -> Way:
        if (
            self.site is None
            or self.site.op == "bias"
            or part.whole
            or part.inside
            or part.replaces
            or part.siblings
            or not part.delta.additive
        ):
            return Way.WEIGHT
        to = part.piece.of_parameter
        if to.expert is not None or to.transposed != self.site.transposed:
            return Way.WEIGHT
        try:
            delta = cut(part.delta, part.piece)
        except NotLocal:
            return Way.WEIGHT
        if delta.low_rank() is not None and (to.cols == ALL or not self.site.kernel):
            return Way.LOW_RANK
        if to.rows == ALL and to.cols == ALL and self._contributes(delta):
            return Way.OWN
        return Way.WEIGHT

    def _contributes(self, delta: Delta) -> bool:
        """Whether the kind has a way of its own here, asked with a batch of no rows."""
        assert self.site is not None
        out, width = self._sizes()
        raw = torch.empty(0, device=self.form[1])
        if self.site.op == "embedding":
            x, y = raw.new_empty(0, dtype=torch.long), raw.new_empty(0, width)
        elif self.site.op == "linear":
            x, y = raw.new_empty(0, width), raw.new_empty(0, out)
        else:
            sides = [(size - 1) * step + 1 for size, step in zip(self.site.kernel, self.site.dilation, strict=True)]
            x = raw.new_empty(0, width * self.site.groups, *sides)
            y = self.site.call(x, raw.new_empty(self.shape))
        with torch.no_grad():
            return delta.contribution(x, y, self.site) is not None

    def sizes(self) -> tuple[int, int]:
        """(out, in * prod(k)) of the logical weight."""
        out, width = self._sizes()
        return out, width * (math.prod(self.site.kernel) if self.site else 1)

    def _sizes(self) -> tuple[int, int]:
        """(out, in) of the logical weight."""
        sizes = list(self.shape[:2])
        if self.site is not None and self.site.transposed:
            sizes.reverse()
        return sizes[0], sizes[1]

    def low_rank(self, parts: Sequence[Part]) -> LowRank | None:
        """The low-rank ones of some parts as factors of the whole logical weight; scales within, where they differ."""
        lows = []
        for part in parts:
            if part.way is not Way.LOW_RANK:
                continue
            low = cut(part.delta, part.piece).low_rank()
            assert low is not None
            lows.append(self._widened(low, part.piece.of_parameter))
        if len(lows) < 2:
            return lows[0] if lows else None
        if len({low.scale for low in lows}) == 1:
            ups, scale = [low.up for low in lows], lows[0].scale
        else:
            ups, scale = [low.up * low.scale for low in lows], 1.0
        return LowRank(torch.cat(ups, 1), torch.cat([low.down for low in lows]), scale)

    def _widened(self, low: LowRank, region: Region) -> LowRank:
        """Factors of a region as factors of the whole, with zeros elsewhere."""
        out, width = self.sizes()
        return LowRank(_spread(low.up, region.rows, out, 0), _spread(low.down, region.cols, width, 1), low.scale)


def _spread(tensor: torch.Tensor, index: Index, size: int, dim: int) -> torch.Tensor:
    if index == ALL:
        return tensor
    places = range(size)[index] if isinstance(index, slice) else index
    shape = (size, tensor.shape[1]) if dim == 0 else (tensor.shape[0], size)
    return tensor.new_zeros(shape).index_copy(dim, torch.tensor(list(places), device=tensor.device), tensor)
