"""Rows that a device's kernel merges and notes the way back of, many parameters in two launches; see ``tiles``.

First they are only looked at, so that whoever merges can leave out what this is no way for.  Knows no journals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.recipes import Launching
from lorahub.engine.folding.sums import all_finite
from lorahub.engine.kernels.choice import noter
from lorahub.engine.kernels.patches import Patch, batches
from lorahub.engine.kernels.tiles import Foreseen, Noter, Tiles
from lorahub.engine.undoing.checksum import checksums
from lorahub.lazy import torch

__all__ = ["Entry", "Ready", "look", "ready", "write"]


@final
@dataclass(frozen=True, slots=True)
class Ready:
    """Some rows of a parameter that a device's kernel can merge and note.

    Attributes:
        fold: of the parameter.
        unit: which rows.
        live: where the result goes.
        before: what is added to; may be the memory of ``live``.
        parts: the rows as the kernel takes them.
    """

    fold: Fold
    unit: Unit
    live: torch.Tensor
    before: torch.Tensor
    parts: tuple[Launching, ...]


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of rows that were merged and noted.

    Attributes:
        change: what became of them.
        tiles: what taking the change off gets wrong: one for each part of the rows, in order.
        before: a checksum of what they held.
        after: a checksum of what they hold.
    """

    change: Change
    tiles: tuple[Tiles, ...]
    before: torch.Tensor
    after: torch.Tensor


def ready(fold: Fold, unit: Unit, live: torch.Tensor, untouched: torch.Tensor | None) -> Ready | None:
    """Rows made ready; None, with nothing done, where their device has no kernel for them.

    Args:
        fold: of the parameter: of changes that do not look at the weight.
        unit: which rows.
        live: these, in the model.
        untouched: what they held before anything was merged; None where that is what they hold now.
    """
    if live.dtype.itemsize != 2 or noter(live.device, live.dtype).name == "torch":
        return None
    before = live if untouched is None else untouched
    parts = fold.launching(unit, before, live, None)
    if parts is None or any(part.patch.lengths is not None for part in parts):
        return None
    return Ready(fold, unit, live, before, tuple(parts))


def look(several: Sequence[Ready]) -> list[tuple[Foreseen, ...] | None]:
    """What merging rows of one device will come to, for ``write``; None for rows that take wider sums.

    Nothing is written.

    Raises:
        NotFinite: as ``Fold.run``.
    """
    patches = [part.patch for each in several for part in each.parts]
    found = iter(_noter(patches[0]).look(patches) if patches else ())
    result: list[tuple[Foreseen, ...] | None] = []
    for each in several:
        own = tuple(next(found) for _ in each.parts)
        if not all(one.outcome.finite for one in own):
            raise each.fold.not_finite(before=not all_finite(each.before))
        enough = all(part.suffices(one.outcome.change) for part, one in zip(each.parts, own, strict=True))
        result.append(own if enough else None)
    return result


def write(several: Sequence[tuple[Ready, tuple[Foreseen, ...]]]) -> list[Entry]:
    """Merge rows of one device and note them; whatever is raised, they hold then what they held.

    Args:
        several: rows, and what ``look`` foresaw of them.
    """
    before = checksums([each.before for each, _ in several])
    foreseen = [one for _, own in several for one in own]
    tiles: dict[int, Tiles] = {}  # by position among what was foreseen
    try:
        for numbers in batches([one.patch for one in foreseen]):
            some = [foreseen[number] for number in numbers]
            tiles |= zip(numbers, _noter(some[0].patch).write(some), strict=True)
        after = checksums([each.live for each, _ in several])
    except BaseException:
        _give_back(foreseen, tiles)
        raise
    found = iter([tiles[number] for number in range(len(foreseen))])
    return [
        Entry(sum((one.outcome.change for one in own), Change()), tuple(next(found) for _ in own), *marks)
        for (_, own), *marks in zip(several, before, after, strict=True)
    ]


def _noter(patch: Patch) -> Noter:
    """What notes a patch and others of its device, for all of which ``ready`` asked."""
    return noter(patch.weight.device, patch.weight.dtype).run


def _give_back(foreseen: Sequence[Foreseen], tiles: dict[int, Tiles]) -> None:
    for number, noted in tiles.items():
        patch = foreseen[number].patch
        if patch.before is not None:
            patch.weight.copy_(patch.before)
        else:
            run = _noter(patch)
            run.put([replace(patch, scale=-patch.scale)])
            run.restore([(noted, patch.weight)])
