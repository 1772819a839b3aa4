"""One batch over many adapters: every row of a module's output gets the change of its own adapter.

Rows are sorted out once for a selection, and all modules share that.  In a module, the rows of all adapters of one rank
make one batched product each for ``down`` and ``up``, a row an entry: no rank and no row is padded.  For that the
factors of a selection are stacked in the order of its rows, on first use, and kept with it.  An adapter of many rows
has products of its own instead of many copies.  Where rows are long, so that gathering them would cost more than it
saves, each is multiplied by itself, in place.

What becomes of a row does not depend on the order of the batch: it never is one of several in a matrix, and how many
entries a product has follows from ranks and numbers of rows alone.

The sum is rounded once in a linear layer; rows without an adapter are not touched.  Gradients flow.  All this is plain
torch; on a device that has a compiled kernel, rows of linear layers go to that where no gradient is wanted.  Knows
factors and sites; no modules, no names of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lorahub.bases.site import Site
from lorahub.deltas.delta import LowRank
from lorahub.engine.kernels.choice import adder
from lorahub.engine.kernels.segments import Segments
from lorahub.errors import BaseMismatch, UsageError
from lorahub.lazy import torch

__all__ = ["Rows", "add"]

LONG = 2**17
"""Numbers that a row moves when it is gathered and put back, from which on it is multiplied by itself.

Measured: two products of their own cost about as much as moving that many numbers in memory.
"""

COPIES = 4
"""How many rows of one adapter get a copy of its factors each; those of more rows are not copied."""


_COMPILED = frozenset({"torch.bfloat16", "torch.float16", "torch.float32"})  # what kernels add to


@dataclass(frozen=True, slots=True)
class _Class:
    """Rows that one batched product serves, in order, and for each the position of its adapter in ``Rows.adapters``.

    ``span`` is where the rows lie if they follow one another; else they are gathered.
    """

    rows: tuple[int, ...]
    which: tuple[int, ...]
    span: slice | None


@dataclass(frozen=True, slots=True)
class _Stack:
    """A class with its factors as they are multiplied from the right, ``up`` [n, r, out] and ``down`` [n, in, r].

    ``scales`` [n], float32 at least, multiply what lies between the two; they are all ``scale`` if ``even``.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    scales: torch.Tensor
    even: bool
    which: torch.Tensor
    rows: torch.Tensor
    span: slice | None


@dataclass(frozen=True, slots=True)
class _Single:
    """One adapter with its factors, ``up`` [out, r] and ``down`` [r, in], and its rows."""

    which: int
    rows: tuple[int, ...]
    up: torch.Tensor
    down: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Segmented:
    """All rows for the device's kernel, and for each a scale, float32, and the position of its adapter."""

    segments: Segments
    scales: torch.Tensor
    which: torch.Tensor


_Present: TypeAlias = "tuple[LowRank | None, ...]"
"""The factors that a module has for each of the selected adapters."""


@dataclass(slots=True)
class _Prepared:
    """What a selection made of one module's factors, for one dtype on one device; filled at first use."""

    present: _Present
    dtype: torch.dtype
    device: torch.device
    segmented: _Segmented | None = None
    stacks: tuple[_Stack, ...] | None = None
    singles: tuple[_Single, ...] | None = None

    def serves(self, factors: Mapping[str, LowRank], adapters: Sequence[str], y: torch.Tensor) -> bool:
        """Whether it is for these factors still, the very same."""
        if self.dtype != y.dtype or self.device != y.device:
            return False
        return all(factors.get(name) is low for name, low in zip(adapters, self.present, strict=True))


class Rows:
    """Which adapter each row of a batch takes.  Make it once for a selection; every module then shares its work.

    It keeps stacked copies of the selected factors until it is dropped: as many bytes as those have, times the rows
    that share an adapter, and no more than ``COPIES`` times.  Safe to share between threads.

    Attributes:
        size: how many rows there are.
        adapters: the names that occur, in order of their first row.
        places: the rows of each, ascending.
    """

    __slots__ = ("_classes", "_prepared", "adapters", "places", "size")

    def __init__(self, adapters: Sequence[str | None]) -> None:
        """``adapters`` names one for each row; None leaves a row as it is."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(adapters):
            if name is not None:
                places.setdefault(name, []).append(row)
        self.size = len(adapters)
        self.adapters = tuple(places)
        self.places = tuple(map(tuple, places.values()))
        self._classes: dict[tuple[int, ...], tuple[_Class, ...]] = {}
        self._prepared: dict[int, _Prepared] = {}

    def classes(self, ranks: tuple[int, ...]) -> tuple[_Class, ...]:
        """The rows by rank of their adapter; a rank of 0 leaves one out.  Shared by modules of equal ranks."""
        found = self._classes.get(ranks)
        if found is None:
            alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for which, (rank, places) in enumerate(zip(ranks, self.places, strict=True)):
                if rank:
                    own = which if len(places) > COPIES else -1
                    alike.setdefault((rank, own), []).extend((row, which) for row in places)
            found = self._classes[ranks] = tuple(_class(sorted(entries)) for entries in alike.values())
        return found

    def prepared(self, factors: Mapping[str, LowRank], y: torch.Tensor) -> _Prepared:
        """What was made of these factors before, or a new place for it.

        Factors that are being trained change in place, so that nothing of theirs is kept.
        """
        found = self._prepared.get(id(factors))
        if found is not None and found.serves(factors, self.adapters, y):
            return found
        fresh = _Prepared(tuple(map(factors.get, self.adapters)), y.dtype, y.device)
        sizes = {(low.up.shape[0], low.down.shape[1]) for low in fresh.present if low}
        if len(sizes) > 1:
            raise BaseMismatch(f"adapters of one module have factors for weights of different sizes: {sorted(sizes)}")
        if not any(low.up.requires_grad or low.down.requires_grad for low in fresh.present if low):
            self._prepared[id(factors)] = fresh  # a mapping that took the place of a dead one has other factors
        return fresh

    def forget(self) -> None:
        """Drop the stacked copies; for whoever changes factors in place."""
        self._prepared.clear()


def _class(entries: Sequence[tuple[int, int]]) -> _Class:
    rows, which = tuple(row for row, _ in entries), tuple(one for _, one in entries)
    follows = rows == tuple(range(rows[0], rows[0] + len(rows)))
    return _Class(rows, which, slice(rows[0], rows[-1] + 1) if follows else None)


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    site: Site,
    factors: Mapping[str, LowRank],
    rows: Rows,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add to each row of ``y``, in place, the change that its adapter makes: ``weight * scale * up @ down`` of ``x``.

    Args:
        y: a module's output, [..., out], or [batch, out, *places]; its dtype is the one that is computed in.
        x: the module's input.
        site: how the output comes from the weight; its ``rows`` is the axis of the batch's rows.
        factors: name of an adapter -> its factors in this module.  Adapters that it lacks change nothing.  Pass the
            same mapping each time: what a selection makes of it is kept under its identity.
        rows: which adapter each row takes.
        weights: [len(rows.adapters)], a weight for each; 1 by default.

    Returns:
        ``y``.

    Raises:
        UsageError: the batch has another number of rows, or they cannot be told apart here.
        BaseMismatch: factors have other sizes than input and output.
    """
    axis = site.rows
    if axis is None:
        raise UsageError("rows of the batch cannot be told apart here, so they cannot take adapters of their own")
    if {x.shape[axis], y.shape[axis]} != {rows.size}:
        raise UsageError(f"adapters are named for {rows.size} rows, and a module was called with {x.shape[axis]}")
    prepared = rows.prepared(factors, y)
    if not any(prepared.present) or not y.numel():
        return y
    if site.op != "linear":
        return _one_by_one(y, x, site, axis, _singles(prepared, rows), weights)
    if axis:
        _linear(y.movedim(axis, 0), x.movedim(axis, 0), prepared, rows, weights)
        return y
    return _linear(y, x, prepared, rows, weights)


def _linear(
    y: torch.Tensor, x: torch.Tensor, prepared: _Prepared, rows: Rows, weights: torch.Tensor | None
) -> torch.Tensor:
    """Rows of a linear layer, [size, ..., in] and [size, ..., out]."""
    tokens = y.numel() // (rows.size * y.shape[-1])
    outputs = _middle(y, tokens)
    if outputs is None:  # no view of such strides has three axes
        return y.copy_(_linear(y.contiguous(), x, prepared, rows, weights))
    inputs = x.reshape(rows.size, tokens, x.shape[-1]).to(y.dtype)
    if _is_compiled(outputs, inputs, prepared, weights):
        _by_segments(outputs, inputs, prepared, rows, weights)
    elif tokens * (x.shape[-1] + 2 * y.shape[-1]) > LONG:
        for single in _singles(prepared, rows):
            _long(outputs, inputs, single, weights)
    else:
        for stack in _stacks(prepared, rows):
            _short(outputs, inputs, stack, weights)
    return y


def _is_compiled(y: torch.Tensor, x: torch.Tensor, prepared: _Prepared, weights: torch.Tensor | None) -> bool:
    """Whether the device has a kernel for these rows, and nobody wants gradients."""
    if torch.compiler.is_compiling() or str(y.dtype) not in _COMPILED or adder(y.device, y.dtype).name == "torch":
        return False
    if not torch.is_grad_enabled():
        return True
    factors = (each for low in prepared.present if low for each in (low.up, low.down))
    return not any(each is not None and each.requires_grad for each in (y, x, weights, *factors))


def _by_segments(
    y: torch.Tensor, x: torch.Tensor, prepared: _Prepared, rows: Rows, weights: torch.Tensor | None
) -> None:
    if prepared.segmented is None:
        prepared.segmented = _segmented(prepared, rows)
    segmented = prepared.segmented
    scales = segmented.scales if weights is None else segmented.scales * weights[segmented.which]
    adder(y.device, y.dtype).run(y, x, segmented.segments, scales)


def _segmented(prepared: _Prepared, rows: Rows) -> _Segmented:
    present = [(which, low) for which, low in enumerate(prepared.present) if low]
    dtype, device = prepared.dtype, prepared.device
    segments = Segments.of(
        [rows.places[which] for which, _ in present],
        [low.up.to(device, dtype) for _, low in present],
        [low.down.to(device, dtype) for _, low in present],
    )
    scales = [present[each][1].scale for each in segments.which]
    return _Segmented(
        segments,
        torch.tensor(scales, dtype=torch.float32, device=device),
        torch.tensor([present[each][0] for each in segments.which], device=device),
    )


def _middle(y: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """``y`` as [size, tokens, out] in the same memory, or None."""
    if y.dim() == 3:
        return y
    return y.view(y.shape[0], tokens, y.shape[-1]) if y.is_contiguous() else None


def _short(y: torch.Tensor, x: torch.Tensor, stack: _Stack, weights: torch.Tensor | None) -> None:
    """One batched product for ``down`` and one for ``up``, over all rows of a class."""
    if stack.span is not None:
        inputs, outputs = x[stack.span], y[stack.span]
    else:
        inputs, outputs = x.index_select(0, stack.rows), y.index_select(0, stack.rows)
    inner = torch.bmm(inputs, stack.down)
    even = stack.even and weights is None
    if not even:
        scales = stack.scales if weights is None else stack.scales * weights[stack.which]
        inner = (inner * scales[:, None, None]).to(y.dtype)
    outputs.baddbmm_(inner, stack.up, alpha=stack.scale if even else 1.0)
    if stack.span is None:
        y.index_copy_(0, stack.rows, outputs)


def _long(y: torch.Tensor, x: torch.Tensor, single: _Single, weights: torch.Tensor | None) -> None:
    """Two products for each row of an adapter."""
    down, up = single.down.t(), single.up.t()
    weight = None if weights is None else weights[single.which].to(y)
    for row in single.rows:
        inner = torch.mm(x[row], down)
        y[row].addmm_(inner if weight is None else inner * weight, up, alpha=single.scale)


def _one_by_one(
    y: torch.Tensor, x: torch.Tensor, site: Site, axis: int, singles: Sequence[_Single], weights: torch.Tensor | None
) -> torch.Tensor:
    """Convolutions and embeddings: one call for each adapter, over its rows."""
    for single in singles:
        rows = torch.tensor(single.rows, device=y.device)
        inputs = x.index_select(axis, rows)
        if site.op != "embedding":
            inputs = inputs.to(y.dtype)
        inner = site.inner(inputs, single.up, single.down) * single.scale
        if weights is not None:
            inner = inner * weights[single.which].to(y)
        y.index_add_(axis, rows, site.outer(inner, single.up, single.down))
    return y


def _stacks(prepared: _Prepared, rows: Rows) -> tuple[_Stack, ...]:
    if prepared.stacks is None:
        ranks = tuple(low.down.shape[0] if low else 0 for low in prepared.present)
        prepared.stacks = tuple(_stack(each, prepared) for each in rows.classes(ranks))
    return prepared.stacks


def _stack(alike: _Class, prepared: _Prepared) -> _Stack:
    lows = [low for which in alike.which if (low := prepared.present[which])]
    scales = [low.scale for low in lows]
    dtype, device = prepared.dtype, prepared.device

    def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(set(alike.which)) == 1:
            return tensors[0].to(device, dtype).contiguous().expand(len(tensors), -1, -1)
        return torch.stack([each.to(device, dtype) for each in tensors])

    return _Stack(
        stacked([low.up.t() for low in lows]),  # in memory as they are multiplied: a product over so few is slow else
        stacked([low.down for low in lows]).transpose(1, 2),
        scales[0],
        torch.tensor(scales, dtype=torch.promote_types(dtype, torch.float32), device=device),
        len(set(scales)) == 1,
        torch.tensor(alike.which, device=device),
        torch.tensor(alike.rows, device=device),
        alike.span,
    )


def _singles(prepared: _Prepared, rows: Rows) -> tuple[_Single, ...]:
    if prepared.singles is None:
        dtype, device = prepared.dtype, prepared.device
        prepared.singles = tuple(
            _Single(which, rows.places[which], low.up.to(device, dtype), low.down.to(device, dtype), low.scale)
            for which, low in enumerate(prepared.present)
            if low
        )
    return prepared.singles
