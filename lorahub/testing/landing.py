"""The law of where changes land in parameters that are stored fused, turned, split or as experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.kind import Kind
from lorahub.errors import NotLocal
from lorahub.lazy import torch
from lorahub.testing.cases import Case, cases
from lorahub.testing.judging import close
from lorahub.testing.loops import loop_add, positions

__all__ = ["layouts_land_alike"]


def layouts_land_alike(kind: Kind) -> None:
    """Two weighted deltas land where a layout says, element by element, and nowhere else.

    Transposed, expert, fused (a band, an interleaving), split by rows and by columns.
    """
    for case in cases(kind):
        terms = ((0.75, case.delta), (-0.5, case.other))
        changes = [(weight, delta.delta(case.weight)) for weight, delta in terms]
        for how, layout, stored in _layouts(case):
            expected = {name: tensor.clone() for name, tensor in stored.items()}
            for piece in layout.pieces:
                loop_add(piece, expected[piece.parameter], changes)
            _land(layout, stored, terms, tuple(case.weight.shape))
            for name, tensor in stored.items():
                touched = expected[name] != tensor
                close(
                    tensor, expected[name], case.weight, f"{case.name}: {how}: {name} differs in {int(touched.sum())}"
                )


def _land(
    layout: Layout, stored: Mapping[str, torch.Tensor], terms: Sequence[tuple[float, Delta]], shape: tuple[int, ...]
) -> None:
    """Merge through a layout by ``region``, falling back on the whole weight where a delta is not local."""
    whole = torch.empty(shape, dtype=torch.float64)
    for piece in layout.pieces:
        piece.of_delta.put(whole, piece.of_parameter.of(stored[piece.parameter]))
    for piece in layout.pieces:
        window = piece.of_parameter.of(stored[piece.parameter]).clone()
        result = window.clone()
        for weight, delta in terms:
            try:
                change = delta.region(piece.of_delta.rows, piece.of_delta.cols).delta(window)
            except NotLocal:
                change = piece.of_delta.of(delta.delta(whole))
            result += weight * change
        piece.of_parameter.put(stored[piece.parameter], result)


def _layouts(case: Case) -> Iterator[tuple[str, Layout, dict[str, torch.Tensor]]]:
    """Ways to store the case's weight, each with its layout and the tensors that hold it."""
    weight, rest = case.weight, case.weight.shape[1:]
    out = weight.shape[0]
    target = Target("", "layers.0.proj", "weight")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=case.generator, dtype=torch.float64)

    def layout(*pieces: Piece) -> Layout:
        return Layout(target=target, pieces=pieces)

    def fused(rows: Index) -> dict[str, torch.Tensor]:
        tensor = noise(3 * out, *rest)
        for row, value in zip(positions(rows, 3 * out), weight, strict=True):
            tensor[row] = value
        return {"a": tensor}

    yield "whole", layout(Piece(parameter="a")), {"a": weight.clone()}
    experts = Piece(parameter="a", of_parameter=Region(expert=1))
    yield "expert", layout(experts), {"a": torch.stack([noise(out, *rest), weight, noise(out, *rest)])}
    band: Index = slice(out, 2 * out)
    yield "band", layout(Piece(parameter="a", of_parameter=Region(rows=band))), fused(band)
    woven: Index = tuple((3 * row + 1) % (3 * out) for row in reversed(range(out)))
    yield "interleaved", layout(Piece(parameter="a", of_parameter=Region(rows=woven))), fused(woven)
    half = out // 2
    low, high = slice(0, half), slice(half, out)
    split = (Piece(parameter="a", of_delta=Region(rows=low)), Piece(parameter="b", of_delta=Region(rows=high)))
    yield "split rows", layout(*split), {"a": weight[low].clone(), "b": weight[high].clone()}
    if weight.dim() == 1:
        return
    turned = Piece(parameter="a", of_parameter=Region(transposed=True))
    yield "transposed", layout(turned), {"a": weight.transpose(0, 1).contiguous()}
    both = Piece(parameter="a", of_parameter=Region(expert=2, transposed=True))
    stack = torch.stack([noise(*weight.transpose(0, 1).shape) for _ in range(2)] + [weight.transpose(0, 1)])
    yield "transposed expert", layout(both), {"a": stack}
    middle = weight.shape[1] // 2
    left, right = slice(0, middle), slice(middle, weight.shape[1])
    split = (Piece(parameter="a", of_delta=Region(cols=left)), Piece(parameter="b", of_delta=Region(cols=right)))
    yield "split columns", layout(*split), {"a": weight[:, left].clone(), "b": weight[:, right].clone()}
