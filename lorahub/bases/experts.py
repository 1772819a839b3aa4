"""Experts that one side has one by one, and the other in one parameter.

Transformers 5 stacks the experts of a mixture when it loads a checkpoint, ``gate_up_proj`` [E, 2 * inner, hidden] and
``down_proj`` [E, hidden, inner], and takes them apart again when it saves one, as in ``experts.3.gate_proj.weight``.
Adapters of then and now name the one or the other, and so do checkpoints and models.  A table of names, held against
those of a base; shapes come from the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Piece, Region

__all__ = ["matrix_pieces", "stack_pieces", "stack_shape"]

_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
        "up_proj": (("up_proj",), ("w3",)),
        "down_proj": (("down_proj",), ("w2",)),
    }
)
"""Stacked parameter -> what checkpoints call the parts of one expert, one below the other."""

_PLACES = (("", ""), (".mlp.experts", ".block_sparse_moe.experts"))
"""(end of a module's path in the model, its end in checkpoints); Mixtral's experts have moved."""


def stack_pieces(index: BaseIndex, module: str, parameter: str) -> tuple[Piece, ...]:
    """Where the matrices of a stacked parameter lie in a base that keeps them one by one; none where it does not."""
    for model, stored in _PLACES:
        if not module.endswith(model):
            continue
        place = module.removesuffix(model) + stored if model else module
        for parts in _PARTS.get(parameter, ()):
            if pieces := _pieces(index, place, parts):
                return pieces
    return ()


def _pieces(index: BaseIndex, place: str, parts: tuple[str, ...]) -> tuple[Piece, ...]:
    found: list[Piece] = []
    expert = 0
    while all(f"{place}.{expert}.{part}.weight" in index.parameters for part in parts):
        start = 0
        for part in parts:
            name = f"{place}.{expert}.{part}.weight"
            shape = index.parameters[name].shape
            if len(shape) != 2:
                return ()
            rows = slice(start, start + shape[0]) if len(parts) > 1 else slice(None)
            found.append(Piece(parameter=name, of_delta=Region(expert=expert, rows=rows)))
            start += shape[0]
        expert += 1
    return tuple(found)


def matrix_pieces(index: BaseIndex, module: str, parameter: str) -> tuple[Piece, ...]:
    """Where the weight of one expert's projection lies in a base that stacks them; none where it does not.

    Only where the base says which way round its stacks are, as a live model does.
    """
    around, _, leaf = module.rpartition(".")
    place, _, number = around.rpartition(".")
    if parameter != "weight" or not number.isascii() or not number.isdigit():
        return ()
    for model, stored in _PLACES:
        if place.endswith(stored):
            where = place.removesuffix(stored) + model if stored else place
            for stack, names in _PARTS.items():
                if piece := _band(index, f"{where}.{stack}", int(number), leaf, names):
                    return (piece,)
    return ()


def _band(index: BaseIndex, name: str, expert: int, leaf: str, names: tuple[tuple[str, ...], ...]) -> Piece | None:
    """The rows that one projection has of one expert's matrix in a stack."""
    info = index.parameters.get(name)
    parts = next((each for each in names if leaf in each), ())
    if info is None or info.turned is None or not parts or expert >= info.shape[0]:
        return None
    rows = info.shape[2 if info.turned else 1]
    if rows % len(parts) or (info.turned and len(parts) > 1):  # GPT-OSS weaves the two, others do not
        return None
    each = rows // len(parts)
    start = each * parts.index(leaf)
    cut = slice(start, start + each) if len(parts) > 1 else slice(None)
    return Piece(parameter=name, of_parameter=Region(expert=expert, transposed=info.turned, rows=cut))


def stack_shape(index: BaseIndex, module: str, parameter: str) -> tuple[int, int, int] | None:
    """The shape that the stacked parameter has in the model, [E, out, in], or None."""
    pieces = stack_pieces(index, module, parameter)
    if not pieces:
        return None
    shapes = [index.parameters[piece.parameter].shape for piece in pieces if piece.of_delta.expert == 0]
    experts = pieces[-1].of_delta.expert
    assert experts is not None
    return experts + 1, sum(shape[0] for shape in shapes), shapes[0][1]
