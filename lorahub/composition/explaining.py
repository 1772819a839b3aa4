"""What a composition would do, before it does it: targets, ranks, operations and memory, from headers alone; no torch.

Operations and bytes are those of the terms that grow: products, QR, the SVD of small cores, and for element-wise rules
the tensors of a weight's size.  They are estimates, the bytes on the high side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lorahub.adapter import AdapterHeader
from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.method import ElementMethod, Method
from lorahub.deltas.kind import JSON, Kind
from lorahub.shapes import ShapeMisfit, bind, instantiate

__all__ = ["Line", "Outline", "Seen", "outline", "seen"]


WRITING = 1.05
"""Bytes held while a result is written and read back, over its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One target.

    Attributes:
        target: its name.
        shape: of the parameter, or None where headers do not tell.
        ranks: of each adapter's change; None where it has none, 0 where it leaves the target alone.
        weights: of each adapter.
        rank: of the result, at most; None for what has no rank, and where the budget decides it.
        flops: floating-point operations.
        working: bytes held while it is worked on.
        result: bytes of its result.
    """

    target: str
    shape: tuple[int, ...] | None
    ranks: tuple[int | None, ...]
    weights: tuple[float, ...]
    rank: int | None
    flops: float
    working: int
    result: int

    def document(self) -> dict[str, JSON]:
        """The line as JSON-ready values."""
        return {
            "target": self.target,
            "shape": list(self.shape) if self.shape is not None else None,
            "ranks": list(self.ranks),
            "weights": list(self.weights),
            "rank": self.rank,
            "flops": self.flops,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """All of it.

    Attributes:
        method: its name.
        adapters: what they are called.
        lines: one for each target, in natural order.
    """

    method: str
    adapters: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations in all."""
        return sum(line.flops for line in self.lines)

    def peak_bytes(self, threads: int) -> int:
        """Bytes held at the most: the result, and what each thread works on."""
        largest = sorted((line.working for line in self.lines), reverse=True)[:threads]
        return round(WRITING * sum(line.result for line in self.lines)) + sum(largest)

    def document(self, threads: int) -> dict[str, JSON]:
        """The outline as JSON-ready values."""
        return {
            "method": self.method,
            "adapters": list(self.adapters),
            "flops": self.flops,
            "peak_bytes": self.peak_bytes(threads),
            "targets": [line.document() for line in self.lines],
        }


def outline(
    adapters: Sequence[Mapping[Target, Seen]],
    labels: Sequence[str],
    method_of: Callable[[Target], Method],
    weights: Sequence[Mapping[Target, float]],
    *,
    rank: int | None,
    undecided: bool,
    item: int,
) -> Outline:
    """Work out what composing these adapters takes.

    Args:
        adapters: for each, what it does to each target.
        labels: what they are called.
        method_of: the method of a target.
        weights: for each adapter, of each target.
        rank: the budget's, or None.
        undecided: whether the budget demands a quality, so that the numbers decide the ranks.
        item: bytes of a number of the result.
    """
    targets = sorted({target for each in adapters for target in each}, key=lambda target: natural(target.name))
    lines = []
    for target in targets:
        here = [each.get(target) for each in adapters]
        shape = next((each.shape for each in here if each and each.shape is not None), None)
        ranks = tuple(0 if each is None else each.rank for each in here)
        whole = any(each.whole for each in here if each)
        weighed = tuple(each.get(target, 0.0) for each in weights)
        lines.append(_line(target, shape, whole, ranks, weighed, method_of(target), rank, undecided, item))
    return Outline(
        method=(lines and method_of(targets[0]).name) or "",
        adapters=tuple(labels),
        lines=tuple(lines),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One target of one adapter: the parameter's shape, the change's rank, and whether it is a whole new value."""

    shape: tuple[int, ...] | None
    rank: int | None
    whole: bool


def seen(header: AdapterHeader, kinds: Mapping[str, Kind]) -> dict[Target, Seen]:
    """What an adapter does to each target, as far as headers tell."""
    result: dict[Target, Seen] = {}
    for group in header.reading.groups:
        kind = kinds[group.kind]
        for touch in kind.touches(group):
            used = [(name, group.slots[name]) for name in touch.slots if name in group.slots]
            slots = tuple((name, kind.slot(name).dims, ref.shape) for name, ref in used)
            try:
                shape = instantiate(touch.dims, bind(slots))
            except (ShapeMisfit, KeyError):  # a shape that only the base tells
                shape = None
            target = Target(group.component, group.module, touch.parameter)
            result[target] = Seen(shape=shape, rank=touch.rank, whole=touch.replaces)
    return result


def _line(
    target: Target,
    shape: tuple[int, ...] | None,
    whole: bool,
    ranks: tuple[int | None, ...],
    weights: tuple[float, ...],
    method: Method,
    rank: int | None,
    undecided: bool,
    item: int,
) -> Line:
    if shape is None or len(shape) < 2 or whole:
        size = prod(shape or (0,))
        return Line(
            target=target.name, shape=shape, ranks=ranks, weights=weights, rank=None,
            flops=2.0 * size * len(ranks), working=8 * size * (len(ranks) + 2), result=item * size,
        )  # fmt: skip
    stacked = len(shape) == 3 and None not in ranks
    count = shape[0] if stacked else 1
    out, inner = (shape[1], shape[2]) if stacked else (shape[0], prod(shape[1:]))
    small = min(out, inner)
    known = [each for each in ranks if each is not None]
    every = min(sum(known), small) if len(known) == len(ranks) else small
    kept = min(every, rank or every)
    dense = None in ranks or (isinstance(method, ElementMethod) and method.basis == "dense")
    flops, working = (_dense if dense else _factored)(out, inner, len(ranks), every, kept)
    return Line(
        target=target.name,
        shape=shape,
        ranks=ranks,
        weights=weights,
        rank=None if undecided else kept,
        flops=count * flops,
        working=working + item * count * kept * (out + inner),
        result=item * count * kept * (out + inner),
    )


def _factored(out: int, inner: int, _count: int, every: int, kept: int) -> tuple[float, int]:
    """(operations, bytes) on factors: QR of both sides, the SVD of a core, and back; float64, with LAPACK's copies."""
    both = out + inner
    return 4.0 * both * every**2 + 20.0 * every**3 + 2.0 * both * every * kept, 8 * 10 * both * every


def _dense(out: int, inner: int, count: int, every: int, kept: int) -> tuple[float, int]:
    """(operations, bytes) on elements: the changes themselves, the rule, and factors of the result; float32."""
    size, width = out * inner, kept + 16
    factorise = 12.0 * 4 * size * width if min(out, inner) > 512 else 2.0 * size * min(out, inner)
    return 2.0 * size * every + 10.0 * count * size + factorise, 4 * size * (count + 4) + 8 * 6 * (out + inner) * width
