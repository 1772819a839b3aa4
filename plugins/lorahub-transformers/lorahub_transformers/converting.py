"""Stored names and live names as transformers itself converts them when it loads a checkpoint: read off its own table.

Most conversions rename.  Some put tensors together or take one apart; of those, the ones in ``WAYS`` are exact as
pieces of a layout.  What is rearranged in any other way keeps its stored name and has no live one here, so that nobody
places a change in it by guess.  Knows a model on the meta device and names; no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from lorahub.bases.layout import Piece, Region

if TYPE_CHECKING:
    from torch import nn

__all__ = ["WAYS", "Converted", "Shape", "converted", "inverse", "older_names", "stored_shapes", "way"]

Shape: TypeAlias = tuple[int, ...]
Pieces: TypeAlias = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        live: stored name -> the live name of the same tensor.
        within: live name -> where its parts lie in stored tensors.
        rearranged: stored tensors that are converted in a way that no layout says.
    """

    live: Mapping[str, str]
    within: Mapping[str, tuple[Piece, ...]] = field(default_factory=lambda: MappingProxyType({}))
    rearranged: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Group:
    """Tensors that one conversion takes, by the pattern that they fit."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


def converted(model: nn.Module, stored: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Converted:
    """What loading makes of tensors of these names and shapes.

    Args:
        model: of the base's class, live or on the meta device.
        stored: name -> shape in the checkpoint.
        shapes: name -> shape in the model, of tied parameters under all their names.
    """
    loading: Any = import_module("transformers.core_model_loading")
    mapping: Any = import_module("transformers.conversion_mapping")
    steps = mapping.get_model_conversion_mapping(model)
    renamings = [each for each in steps if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in steps if isinstance(each, loading.WeightConverter)]
    owner = {pattern: each for each in converters for pattern in each.source_patterns}
    state = dict.fromkeys(shapes, True)  # asked for names alone
    prefix: Any = getattr(model, "base_model_prefix", "")
    live: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    lost: set[str] = set()
    for name in sorted(stored, key=loading.dot_natural_key):
        new, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            live[name] = new
        elif new in state:
            groups.setdefault(new, _Group(deepcopy(owner[pattern]))).sources.setdefault(pattern, []).append(name)
        else:
            lost.add(name)
    within: Pieces = {}
    for first, group in groups.items():
        names = [name for each in group.sources.values() for name in each]
        made = _pieces(first, group, stored, shapes)
        if made is None:
            lost.update(names)
        else:
            within |= made
    return Converted(live=live, within=within, rearranged=frozenset(lost))


def stored_shapes(model: nn.Module, live: Mapping[str, Shape]) -> dict[str, Shape]:
    """Name -> shape of what saving the model writes, as the library's reversed conversions say.

    Args:
        model: live or on the meta device.
        live: name -> shape of what is written.
    """
    torch: Any = import_module("torch")
    loading: Any = import_module("transformers.core_model_loading")
    state = {name: torch.empty(shape, device="meta") for name, shape in live.items()}
    return {name: tuple(tensor.shape) for name, tensor in loading.revert_weight_conversion(model, state).items()}


def older_names(model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Older name -> live name, of prefixes that checkpoints may have or lack; only those that loading takes back.

    Saving a model that was built anew leaves such prefixes as they are, so ``stored_shapes`` does not show them.

    Args:
        model: live or on the meta device.
        shapes: name -> shape in the model.
    """
    loading: Any = import_module("transformers.core_model_loading")
    mapping: Any = import_module("transformers.conversion_mapping")
    changes: Any = getattr(loading, "PrefixChange", None)
    steps = mapping.get_model_conversion_mapping(model, add_legacy=False)
    if changes is None:  # the first releases of the fifth take a missing prefix of every name, and say nothing of it
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        kept = converted(model, stored_shapes(model, shapes), shapes).live if steps else {}
        found = {old.removeprefix(prefix): name for old, name in kept.items()}
    elif any(isinstance(each, changes) for each in steps):
        back = [each.reverse_transform() for each in steps[::-1] if isinstance(each, loading.WeightRenaming)]
        found = {loading.apply_renamings(name, back): name for name in shapes}
    else:
        return {}
    taken = converted(model, {old: shapes[name] for old, name in found.items() if name in shapes}, shapes).live
    return {old: name for old, name in found.items() if old != name and taken.get(old) == name}


def inverse(within: Mapping[str, tuple[Piece, ...]]) -> Pieces:
    """Stored name -> where its parts lie in live parameters."""
    found: dict[str, list[Piece]] = {}
    for name, pieces in within.items():
        for piece in pieces:
            back = Piece(parameter=name, of_delta=piece.of_parameter, of_parameter=piece.of_delta)
            found.setdefault(piece.parameter, []).append(back)
    return {name: tuple(pieces) for name, pieces in found.items()}


def way(operations: Iterable[Any]) -> tuple[tuple[str | int, ...], ...]:
    """The operations of a conversion as data: a name and the axes of each."""
    return tuple(
        (type(each).__name__, *(getattr(each, axis) for axis in ("dim", "dim0", "dim1") if hasattr(each, axis)))
        for each in operations
    )


def _stacked(sources: Sequence[Sequence[str]], targets: Sequence[str], stored: Mapping[str, Shape]) -> Pieces | None:
    """Experts one by one, whose projections come to lie one below the other."""
    if len(targets) != 1 or len({len(each) for each in sources}) != 1:
        return None
    pieces = []
    for expert, names in enumerate(zip(*sources, strict=True)):
        for name, rows in zip(names, _bands([stored[name][0] for name in names]), strict=True):
            cut = rows if len(names) > 1 else slice(None)
            pieces.append(Piece(parameter=name, of_delta=Region(expert=expert, rows=cut)))
    return {targets[0]: tuple(pieces)}


def _below(sources: Sequence[Sequence[str]], targets: Sequence[str], stored: Mapping[str, Shape]) -> Pieces | None:
    """Several tensors, one below the other."""
    if len(targets) != 1:
        return None
    names = [name for each in sources for name in each]
    bands = _bands([stored[name][0] for name in names])
    pairs = zip(names, bands, strict=True)
    return {targets[0]: tuple(Piece(parameter=name, of_delta=Region(rows=rows)) for name, rows in pairs)}


def _turned(sources: Sequence[Sequence[str]], targets: Sequence[str], stored: Mapping[str, Shape]) -> Pieces | None:
    """A matrix, turned."""
    names = [name for each in sources for name in each]
    if len(names) != 1 or len(targets) != 1 or len(stored[names[0]]) != 2:
        return None
    return {targets[0]: (Piece(parameter=names[0], of_parameter=Region(transposed=True)),)}


_Way: TypeAlias = Callable[[Sequence[Sequence[str]], Sequence[str], Mapping[str, Shape]], Pieces | None]

_APART = frozenset({(("Chunk", 0),), (("Split", 0),)})
"""A tensor taken apart along its rows."""

WAYS: Mapping[tuple[tuple[str | int, ...], ...], _Way] = MappingProxyType(
    {
        (("MergeModulelist", 0),): _stacked,
        (("MergeModulelist", 0), ("Concatenate", 1)): _stacked,
        (("Concatenate", 0),): _below,
        (("Transpose", 0, 1),): _turned,
    }
)
"""Operations of a conversion -> the pieces that say the same."""


def _pieces(first: str, group: _Group, stored: Mapping[str, Shape], live: Mapping[str, Shape]) -> Pieces | None:
    converter = group.converter
    if getattr(converter, "quantization_operation", None) is not None:
        return None
    operations = way(converter.operations)
    sources = [group.sources[pattern] for pattern in converter.source_patterns if pattern in group.sources]
    targets = [first.replace(converter.target_patterns[0], each, 1) for each in converter.target_patterns]
    if converter.target_patterns[0] not in first or not all(name in live for name in targets):
        return None
    if len(sources) != len(converter.source_patterns):
        return None
    if operations in _APART:
        names = [name for each in sources for name in each]
        bands = _bands([live[name][0] for name in targets])
        if len(names) != 1 or bands[-1].stop != stored[names[0]][0]:
            return None
        return {
            name: (Piece(parameter=names[0], of_parameter=Region(rows=rows)),)
            for name, rows in zip(targets, bands, strict=True)
        }
    make = WAYS.get(operations)
    return make(sources, targets, stored) if make else None


def _bands(sizes: Sequence[int]) -> list[slice]:
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
