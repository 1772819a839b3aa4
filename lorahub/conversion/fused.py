"""Fused projections split and split ones fused, as the base's layouts declare them; nothing is guessed from names.

Splitting takes each part's rows of ``up`` and leaves ``down`` to all of them.  Rank components whose rows of ``up`` are
all zero change nothing there and are left out, so that a file trained with kohya's ``split_qkv`` (block-diagonal
``up``) gives back the smaller factors it was made of.  Fusing puts the parts' factors beside each other with zeros
between, or keeps their rank where all have the very same ``down``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.conversion.change import Change, Origin, Weight, target_of
from lorahub.conversion.folding import commonest, fold
from lorahub.conversion.rewrite import Obstacle, rewrite
from lorahub.conversion.stacked import expert_of, stacked
from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import NotLocal
from lorahub.lazy import torch

__all__ = ["land", "trimmed"]


def land(
    changes: Sequence[Change], layouts: Mapping[Target, Layout], index: BaseIndex, weight: Weight
) -> tuple[list[Change], dict[Target, str]]:
    """The changes under the names of the parameters that the base stores.

    Args:
        changes: as the source has them.
        layouts: where each target lands; one that is not there stays as it is.
        index: the base.
        weight: its weights, for kinds that need them to become LoRA.

    Returns:
        The changes, and for each target that could not be moved why, as the end of "because ...".
    """
    result: list[Change] = []
    stuck: dict[Target, str] = {}
    gathered: dict[str, list[tuple[Region, Change]]] = {}
    for change in changes:
        layout = layouts.get(change.target)
        if layout is None or _stays(layout):
            name = layout.pieces[0].parameter if layout else ""
            named = not name or index.stored(change.target.name) == name
            result.append(change if named else replace(change, target=target_of(name)))
            continue
        try:
            parts = [(piece, _cut(change, piece)) for piece in layout.pieces]
        except (NotLocal, Obstacle) as error:
            stuck[change.target] = str(error)
            result.append(change)
            continue
        for piece, part in parts:
            gathered.setdefault(piece.parameter, []).append((piece.of_parameter, part))
    for parameter, bands in gathered.items():
        target = target_of(parameter)
        if len(bands) == 1 and _is_all(bands[0][0]):
            result.append(replace(bands[0][1], target=target))
            continue
        try:
            if any(region.expert is not None for region, _ in bands):
                together = partial(_together, weight=weight)
                result.append(stacked(target, bands, index.parameters[parameter].shape, together))
                continue
            result.append(_joined(target, sorted(bands, key=_first_row), _logical(index, parameter), weight))
        except Obstacle as obstacle:
            for _, part in bands:
                stuck |= {origin.target: obstacle.reason for origin in part.origins}
    twice = {target for target, count in Counter(change.target for change in result).items() if count > 1}
    for change in result:
        if change.target in twice:
            stuck |= {origin.target: f"another also changes {change.target.name}" for origin in change.origins}
    return result, stuck


def _stays(layout: Layout) -> bool:
    """Whether a target is one whole parameter, however that is stored."""
    (first, *more) = layout.pieces
    return not more and _is_all(first.of_parameter) and first.of_delta.whole


def _is_all(region: Region) -> bool:
    return region.expert is None and region.rows == ALL and region.cols == ALL


def _first_row(band: tuple[Region, Change]) -> int:
    rows = band[0].rows
    return (rows.start or 0) if isinstance(rows, slice) else min(rows, default=0)


def _logical(index: BaseIndex, name: str) -> tuple[int, ...]:
    info = index.parameters[name]
    return (*info.shape[1::-1], *info.shape[2:]) if info.transposed and len(info.shape) > 1 else info.shape


def _cut(change: Change, piece: Piece) -> Change:
    """One piece of a change, without the rank components that do nothing there."""
    cut = piece.of_delta
    if cut.whole:
        return change
    if cut.expert is not None:
        part = replace(change, origins=(Origin(target=change.target, of_delta=cut),), shape=None)
        return part.become(trimmed(expert_of(change.delta, cut)), "stack-to-experts")
    delta = trimmed(change.delta.region(cut.rows, cut.cols))
    part = replace(change, origins=(Origin(target=change.target, of_delta=cut),), shape=None)
    return part.become(delta, "fused-to-split" if isinstance(cut.rows, slice) else "rows-reordered")


def trimmed(delta: Delta) -> Delta:
    """A LoRA or DoRA without the rank components whose column of ``up`` is zero; at least one is left."""
    if not isinstance(delta, LoRA | DoRA):
        return delta
    kept = delta.up.flatten(1).ne(0).any(0).nonzero().flatten()
    if len(kept) == delta.down.shape[0]:
        return replace(delta, up=delta.up.contiguous(), down=delta.down.contiguous())
    kept = kept if len(kept) else torch.zeros(1, dtype=torch.long)
    return replace(delta, up=delta.up.index_select(1, kept), down=delta.down.index_select(0, kept))


def _joined(target: Target, bands: Sequence[tuple[Region, Change]], shape: tuple[int, ...], weight: Weight) -> Change:
    """Several changes to parts of one stored parameter as one change of it.

    Raises:
        Obstacle: they are of kinds that cannot stand beside each other.
    """
    if any(region.expert is not None or region.cols != ALL for region, _ in bands):
        raise Obstacle("only bands of rows can be fused", "")
    origins = tuple(
        replace(origin, of_parameter=Region(rows=region.rows)) for region, part in bands for origin in part.origins
    )
    kinds = {type(part.delta) for _, part in bands}
    rules = tuple(dict.fromkeys(rule for _, part in bands for rule in part.rules))
    start = Change(target=target, delta=bands[0][1].delta, origins=origins, shape=shape, rules=rules)
    if kinds == {Full}:
        return start.become(_joined_full(bands, shape), "split-to-fused")
    if kinds == {DoRA}:
        return start.become(_joined_dora(bands, shape), "split-to-fused")
    plain = [(region, rewrite(part, weight) if not isinstance(part.delta, LoRA) else part) for region, part in bands]
    rules = tuple(dict.fromkeys(rule for _, part in plain for rule in part.rules))
    return replace(start, rules=rules).become(_joined_lora(plain, shape), "split-to-fused")


def _together(bands: Sequence[tuple[Region, Change]], shape: tuple[int, int], weight: Weight) -> LoRA:
    """Changes of parts of one matrix as one LoRA.

    Raises:
        Obstacle: one is none.
    """
    plain = [(region, part if isinstance(part.delta, LoRA) else rewrite(part, weight)) for region, part in bands]
    only = plain[0][1].delta
    if len(plain) == 1 and _is_all(plain[0][0]) and isinstance(only, LoRA):
        return only
    if any(region.cols != ALL for region, _ in plain):
        raise Obstacle("only bands of rows can be fused", "")
    return _joined_lora(sorted(plain, key=_first_row), shape)


def _rows(bands: Sequence[tuple[Region, Change]], size: int) -> list[torch.Tensor]:
    every = torch.arange(size)
    return [every[rows] if isinstance(rows := region.rows, slice) else _positions(rows) for region, _ in bands]


def _positions(rows: Index) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long)


def _joined_full(bands: Sequence[tuple[Region, Change]], shape: tuple[int, ...]) -> Full:
    deltas = [part.delta for _, part in bands]
    diffs = [fold(each.diff, each.scale) for each in deltas if isinstance(each, Full)]
    dtype = _common(diffs)
    whole = torch.zeros(shape, dtype=dtype)
    for rows, diff in zip(_rows(bands, shape[0]), diffs, strict=True):
        whole[rows] = diff.to(dtype)
    return Full(whole)


def _joined_lora(bands: Sequence[tuple[Region, Change]], shape: tuple[int, ...]) -> LoRA:
    deltas = [part.delta for _, part in bands if isinstance(part.delta, LoRA)]
    return LoRA(*_factors(deltas, _rows(bands, shape[0]), shape[0]))


def _joined_dora(bands: Sequence[tuple[Region, Change]], shape: tuple[int, ...]) -> DoRA:
    """Rows with lengths of their own; rows that no part has would need the base's."""
    deltas = [part.delta for _, part in bands if isinstance(part.delta, DoRA)]
    rows = _rows(bands, shape[0])
    if any(each.axis or each.magnitude is None for each in deltas) or len(set(torch.cat(rows).tolist())) < shape[0]:
        raise Obstacle("the lengths of a DoRA can only be fused by rows, and for all of them", "")
    lengths = [each.magnitude for each in deltas if each.magnitude is not None]
    magnitude = torch.zeros(shape[0], dtype=_common(lengths))
    for at, length in zip(rows, lengths, strict=True):
        magnitude[at] = length.to(magnitude.dtype)
    return DoRA(*_factors(deltas, rows, shape[0]), magnitude, 0)


def _factors(
    deltas: Sequence[LoRA] | Sequence[DoRA], rows: Sequence[torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up, down, scale) of the whole: one ``down`` where all have the same, else each beside the others."""
    scale = commonest(each.scale for each in deltas)
    ups = [fold(each.up, each.scale / scale) if scale else each.up for each in deltas]
    downs = [each.down for each in deltas]
    dtype = _common([*ups, *downs])
    shared = all(torch.equal(each, downs[0]) for each in downs[1:]) if _alike(downs) else False
    down = downs[0].to(dtype) if shared else torch.cat([each.to(dtype) for each in downs])
    up = torch.zeros(size, down.shape[0], *ups[0].shape[2:], dtype=dtype)
    start = 0
    for at, each in zip(rows, ups, strict=True):
        stop = start + each.shape[1]
        up[at, start:stop] = each.to(dtype)
        start = 0 if shared else stop
    return up, down, scale


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    return len({(each.shape, each.dtype) for each in tensors}) == 1


def _common(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for each in tensors[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype
