"""Kinds built from products of small factors against their formulas, written out as loops over Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lorahub.deltas.adalora import ADALORA
from lorahub.deltas.delora import DELORA
from lorahub.deltas.gralora import GRALORA
from lorahub.deltas.hira import HIRA
from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.deltas.loha import LOHA
from lorahub.deltas.lokr import LOKR
from lorahub.deltas.miss import MISS

R = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def indices(shape: tuple[int, ...]):
    return itertools.product(*map(range, shape))


def built(kind: Kind, tensors: dict[str, torch.Tensor], **options: object):
    """The delta that a kind builds for the weight from tensors by slot."""
    slots = {name: TensorRef(key=name, shape=tuple(each.shape), dtype="F32") for name, each in tensors.items()}
    group = Group(module="m", kind=kind.name, slots=slots, options=options)
    kind.touches(group)
    return kind.build(group, tensors)["weight"]


def assert_close(found: torch.Tensor, expected: dict[tuple[int, ...], float], weight: torch.Tensor) -> None:
    """Every element within n eps of the largest value: sums of at most n terms, in another order."""
    norm = math.sqrt(sum(value**2 for value in expected.values()))
    assert norm / weight.norm().item() > 1e-2, "the reference change is trivial"
    assert found.dtype == torch.float64
    assert set(indices(tuple(found.shape))) == expected.keys()
    largest = max(1.0, *(abs(value) for value in expected.values()), weight.abs().max().item())
    bound = weight.numel() * 2.3e-16 * largest * 4
    for at, value in expected.items():
        assert abs(found[at].item() - value) <= bound, at


def flattened(shape: tuple[int, ...], at: tuple[int, ...]) -> int:
    """The column of an element in a factor ``[r, in * prod(k)]``."""
    column = 0
    for size, index in zip(shape[1:], at[1:], strict=True):
        column = column * size + index
    return column


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (3, 4, 2, 3)])
def test_loha_multiplies_two_products_element_by_element(shape: tuple[int, ...]):
    out, flat = shape[0], math.prod(shape[1:])
    a, b, c, d = normal(out, R), normal(R, flat, seed=1), normal(out, R, seed=2), normal(R, flat, seed=3)
    weight = normal(*shape, seed=4).double()
    expected = {}
    for at in indices(shape):
        column = flattened(shape, at)
        one, other = (
            sum(left[at[0], r].item() * right[r, column].item() for r in range(R)) for left, right in ((a, b), (c, d))
        )
        expected[at] = 0.75 * one * other
    delta = built(LOHA, {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}, scale=0.75)
    assert_close(delta.delta(weight), expected, weight)


@pytest.mark.parametrize(("shape", "core"), [((5, 4, 3), (3, 1)), ((3, 4, 2, 3), (2, 3)), ((3, 4, 3, 1), (3, 1))])
def test_loha_cores_sit_between_the_factors(shape: tuple[int, ...], core: tuple[int, ...]):
    a, b, t = normal(R, shape[0]), normal(R, shape[1], seed=1), normal(R, R, *core, seed=5)
    c, d, u = normal(R, shape[0], seed=2), normal(R, shape[1], seed=3), normal(R, R, *core, seed=6)
    weight = normal(*shape, seed=4).double()
    expected = {}
    for at in indices(shape):
        k = at[2:] if len(core) == len(at) - 2 else (*at[2:], 0)
        one, other = (
            sum(
                middle[(i, j, *k)].item() * left[i, at[0]].item() * right[j, at[1]].item()
                for i in range(R)
                for j in range(R)
            )
            for left, right, middle in ((a, b, t), (c, d, u))
        )
        expected[at] = 0.25 * one * other
    delta = built(LOHA, {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d, "t1": t, "t2": u}, scale=0.25)
    assert_close(delta.delta(weight), expected, weight)


def kronecker_sides(shape: tuple[int, ...], form: str) -> tuple[dict[str, torch.Tensor], int, int, int]:
    """Tensors of one form for a weight of ``shape``; and b, d and the number of kernel elements."""
    a, c, kernel = 2, 3, shape[2:]
    b, d, count = shape[0] // a, shape[1] // c, math.prod(shape[2:])
    tensors = {"w1": normal(a, c)} if "1" in form else {"w1_a": normal(a, R), "w1_b": normal(R, c, seed=1)}
    if "2" in form:
        tensors["w2"] = normal(b, d, *kernel, seed=2)
    elif "t" in form:
        tensors |= {"w2_a": normal(R, b, seed=2), "w2_b": normal(R, d, seed=3), "t2": normal(R, R, *kernel, seed=4)}
    else:
        tensors |= {"w2_a": normal(b, R, seed=2), "w2_b": normal(R, d * count, seed=3)}
    return tensors, b, d, count


def second(tensors: dict[str, torch.Tensor], row: int, col: int, k: tuple[int, ...], at: int, count: int) -> float:
    """An element of ``w2``, whatever it is made of; ``at`` is the flat position of ``k``."""
    if "w2" in tensors:
        return tensors["w2"][(row, col, *k)].item()
    a, b = tensors["w2_a"], tensors["w2_b"]
    if "t2" not in tensors:
        return sum(a[row, r].item() * b[r, col * count + at].item() for r in range(R))
    core = tensors["t2"]
    return sum(
        core[(i, j, *k)].item() * a[i, row].item() * b[j, col].item() for i, j in itertools.product(range(R), range(R))
    )


@pytest.mark.parametrize("form", ["12", "1", "2", "", "1t", "t"], ids=lambda form: f"whole {form}")
@pytest.mark.parametrize("shape", [(6, 6), (4, 3, 2), (4, 6, 2, 3)])
def test_lokr_is_a_kronecker_product_of_rows_and_of_inputs(shape: tuple[int, ...], form: str):
    if "t" in form and len(shape) == 2:
        form = form.replace("t", "")  # a linear layer has no kernel to keep in a core
    tensors, b, d, count = kronecker_sides(shape, form)
    weight = normal(*shape, seed=9).double()
    expected = {}
    for at in indices(shape):
        k = at[2:]
        row, col = at[0] // b, at[1] // d
        if "w1" in tensors:
            first = tensors["w1"][row, col].item()
        else:
            first = sum(tensors["w1_a"][row, r].item() * tensors["w1_b"][r, col].item() for r in range(R))
        position = flattened((0, *shape[2:]), (0, *k)) if k else 0
        expected[at] = 0.75 * first * second(tensors, at[0] % b, at[1] % d, k, position, count)
    assert_close(built(LOKR, tensors, scale=0.75, trailing=False).delta(weight), expected, weight)


def test_lokr_on_a_conv1d_is_multiplied_out_the_way_peft_does_it():
    w1, w2 = normal(2, 3), normal(4, 2, 5, seed=1)  # [a, c] and [b, d, k]: torch.kron gives [b, a d, c k]
    spread = [
        w1[i // 2, j // 5].item() * w2[row, i % 2, j % 5].item()
        for row, i, j in itertools.product(range(4), range(4), range(15))
    ]
    shape = (8, 6, 5)
    weight = normal(*shape, seed=2).double()
    expected = {at: 0.5 * value for at, value in zip(indices(shape), spread, strict=True)}
    assert_close(built(LOKR, {"w1": w1, "w2": w2}, scale=0.5, trailing=True).delta(weight), expected, weight)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (3, 4, 2, 3)])
def test_hira_scales_every_element_by_a_product_of_low_rank(shape: tuple[int, ...]):
    up, down = normal(shape[0], R, *(1 for _ in shape[2:])), normal(R, *shape[1:], seed=1)
    weight = normal(*shape, seed=2).double()
    expected = {
        at: weight[at].item() * sum(up.flatten(1)[at[0], r].item() * down[(r, *at[1:])].item() for r in range(R))
        for at in indices(shape)
    }
    assert_close(built(HIRA, {"up": up, "down": down}).delta(weight), expected, weight)


def test_delora_gives_every_direction_its_share_of_the_bound():
    up, down, bound, lengths = normal(5, R), normal(R, 4, seed=1), normal(1, seed=2), normal(4, seed=3).abs()
    up[:, 1] *= 1e-6  # shorter than 1e-4: divided by that instead of its length
    weight = normal(5, 4, seed=4).double()
    ups = [max(math.sqrt(sum(up[row, r].item() ** 2 for row in range(5))), 1e-4) for r in range(R)]
    downs = [math.sqrt(sum(down[r, col].item() ** 2 for col in range(4))) for r in range(R)]
    expected = {}
    for row, col in indices((5, 4)):
        total = sum(up[row, r].item() * down[r, col].item() / (ups[r] * downs[r]) for r in range(R))
        expected[row, col] = bound.item() / R * total * lengths[col].item()
    tensors = {"up": up, "down": down, "bound": bound, "lengths": lengths}
    assert_close(built(DELORA, tensors).delta(weight), expected, weight)


@pytest.mark.parametrize("hybrid", [False, True])
def test_gralora_changes_every_block_by_factors_of_its_own(hybrid: bool):
    k, q, height, width = 2, 3, 2, 4
    down, up = normal(k, width, k * q), normal(k, k * q, height, seed=1)
    general = {"general_down": normal(5, k * width, seed=2), "general_up": normal(k * height, 5, seed=3)}
    weight = normal(k * height, k * width, seed=4).double()
    expected = {}
    for row, col in indices((k * height, k * width)):
        j, o = divmod(row, height)
        block, i = divmod(col, width)
        total = sum(down[block, i, j * q + t].item() * up[j, block * q + t, o].item() for t in range(q))
        if hybrid:
            total += sum(
                general["general_up"][row, h].item() * general["general_down"][h, col].item() for h in range(5)
            )
        expected[row, col] = 0.75 * total
    tensors = {"down": down, "up": up, **(general if hybrid else {})}
    assert_close(built(GRALORA, tensors, scale=0.75).delta(weight), expected, weight)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 3)])
def test_adalora_has_a_value_between_the_factors(shape: tuple[int, ...]):
    up, values, down = normal(shape[0], R), normal(R, 1, seed=1), normal(R, math.prod(shape[1:]), seed=2)
    weight = normal(*shape, seed=3).double()
    expected = {
        at: 0.75
        * sum(up[at[0], r].item() * values[r, 0].item() * down[r, flattened(shape, at)].item() for r in range(R))
        for at in indices(shape)
    }
    assert_close(built(ADALORA, {"up": up, "values": values, "down": down}, scale=0.75).delta(weight), expected, weight)


def test_adalora_pruned_to_nothing_changes_nothing():
    tensors = {"up": torch.empty(5, 0), "values": torch.empty(0, 1), "down": torch.empty(0, 4)}
    weight = normal(5, 4).double()
    assert not built(ADALORA, tensors, scale=0.75).delta(weight).any()


@pytest.mark.parametrize(("variant", "size"), [("balanced", 6), ("mini", 2)])
def test_miss_repeats_a_block_over_the_weight(variant: str, size: int):
    block, weight = normal(R, size), normal(6, 7, seed=1).double()  # 7 is no multiple of 3: the last repeat is cut off
    expected = {(row, col): block[col % R, row % size].item() for row, col in indices((6, 7))}
    assert_close(built(MISS, {"block": block}, variant=variant).delta(weight), expected, weight)


def test_bat_multiplies_every_piece_by_the_block_of_its_rows_and_adds_it():
    block, weight = normal(2, R, R), normal(6, 9, seed=1).double()
    expected = {}
    for row, col in indices((6, 9)):
        mine, start = block[row // R], col - col % R
        product = sum(weight[row, start + b].item() * mine[b, col % R].item() for b in range(R))
        expected[row, col] = product + mine[row % R, col % R].item()
    assert_close(built(MISS, {"block": block}, variant="bat").delta(weight), expected, weight)
