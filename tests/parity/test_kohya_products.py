"""What kohya's and LyCORIS's tensors mean, element by element in float64, against what the files are read as."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lorahub.adapter import load, open_header
from lorahub.files.writer import save_file
from lorahub.plugins import Registry

Tensors = Mapping[str, torch.Tensor]
Rule = Callable[[Tensors, tuple[int, ...]], float]

LINEAR, CONV = (6, 4), (6, 4, 3, 2)


def lora(t: Tensors, at: tuple[int, ...]) -> float:
    """sum over r of up[o, r] down[r, i, y, x]; a pointwise ``up`` has trailing ones."""
    up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"]
    return sum(float(up[at[0], r]) * float(down[r, *at[1:]]) for r in range(len(down)))


def locon(t: Tensors, at: tuple[int, ...]) -> float:
    """sum over r, s of up[o, r] mid[r, s, y, x] down[s, i]."""
    up, mid, down = t["lora_up.weight"].flatten(1), t["lora_mid.weight"], t["lora_down.weight"].flatten(1)
    pairs = itertools.product(range(mid.shape[0]), range(mid.shape[1]))
    return sum(float(up[at[0], r]) * float(mid[r, s, *at[2:]]) * float(down[s, at[1]]) for r, s in pairs)


def loha(t: Tensors, at: tuple[int, ...]) -> float:
    sides = []
    for n in "12":
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if (core := t.get(f"hada_t{n}")) is not None:
            pairs = itertools.product(range(core.shape[0]), range(core.shape[1]))
            sides.append(sum(float(core[p, q, *at[2:]]) * float(a[p, at[0]]) * float(b[q, at[1]]) for p, q in pairs))
        else:
            column = at[1] if len(at) == 2 else (at[1] * CONV[2] + at[2]) * CONV[3] + at[3]
            sides.append(sum(float(a[at[0], r]) * float(b[r, column]) for r in range(len(b))))
    return sides[0] * sides[1]


def lokr(t: Tensors, at: tuple[int, ...]) -> float:
    """w1[o div b, i div d] times w2[o mod b, i mod d, y, x]."""

    def first(a: int, c: int) -> float:
        if "lokr_w1" in t:
            return float(t["lokr_w1"][a, c])
        return sum(float(t["lokr_w1_a"][a, r]) * float(t["lokr_w1_b"][r, c]) for r in range(len(t["lokr_w1_b"])))

    def second(b: int, d: int, rest: tuple[int, ...]) -> float:
        if "lokr_w2" in t:
            return float(t["lokr_w2"][b, d, *rest])
        one, other = t["lokr_w2_a"], t["lokr_w2_b"]
        if (core := t.get("lokr_t2")) is not None:
            pairs = itertools.product(range(core.shape[0]), range(core.shape[1]))
            return sum(float(core[p, q, *rest]) * float(one[p, b]) * float(other[q, d]) for p, q in pairs)
        column = d if not rest else (d * CONV[2] + rest[0]) * CONV[3] + rest[1]
        return sum(float(one[b, r]) * float(other[r, column]) for r in range(len(other)))

    return first(at[0] // 3, at[1] // 2) * second(at[0] % 3, at[1] % 2, at[2:])


def sparse(t: Tensors, at: tuple[int, ...]) -> float:
    """The factors' product, and what is listed for that place of the flattened weight."""
    column = at[1] if len(at) == 2 else (at[1] * CONV[2] + at[2]) * CONV[3] + at[3]
    places = t["bias_indices"].T.tolist()
    listed = sum(float(t["bias_values"][n]) for n, place in enumerate(places) if place == [at[0], column])
    return (locon if "lora_mid.weight" in t else lora)(t, at) + listed


def diff(t: Tensors, at: tuple[int, ...]) -> float:
    return float(t["diff"][at])


CASES: Mapping[str, tuple[Rule, Mapping[str, Sequence[int]], tuple[int, ...], float | None, float]] = {
    "lora": (lora, {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}, LINEAR, 3.0, 1.5),
    "lora without alpha": (lora, {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}, LINEAR, None, 1.0),
    "lora conv": (lora, {"lora_down.weight": (2, 4, 3, 2), "lora_up.weight": (6, 2, 1, 1)}, CONV, 1.0, 0.5),
    "locon tucker": (
        locon,
        {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 2), "lora_up.weight": (6, 2, 1, 1)},
        CONV,
        3.0,
        1.5,
    ),
    "loha": (
        loha,
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
        LINEAR,
        1.0,
        0.5,
    ),
    "loha conv": (
        loha,
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 24), "hada_w2_a": (6, 2), "hada_w2_b": (2, 24)},
        CONV,
        3.0,
        1.5,
    ),
    "loha tucker": (
        loha,
        {
            **{f"hada_w{n}_a": (2, 6) for n in "12"},
            **{f"hada_w{n}_b": (2, 4) for n in "12"},
            **{f"hada_t{n}": (2, 2, 3, 2) for n in "12"},
        },
        CONV,
        1.0,
        0.5,
    ),
    "lokr": (
        lokr,
        {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
        LINEAR,
        1.0,
        0.5,
    ),
    "lokr whole": (lokr, {"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, LINEAR, 7.0, 1.0),
    "lokr one side whole": (lokr, {"lokr_w1": (2, 2), "lokr_w2_a": (3, 4), "lokr_w2_b": (4, 2)}, LINEAR, 1.0, 0.25),
    "lokr conv": (lokr, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, 3, 2)}, CONV, 7.0, 1.0),
    "lokr conv factors": (lokr, {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 12)}, CONV, 1.0, 0.5),
    "lokr tucker": (
        lokr,
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, 3, 2)},
        CONV,
        1.0,
        0.5,
    ),
    "diff": (diff, {"diff": CONV}, CONV, None, 1.0),
}
"""Name -> how an element comes about, the tensors' shapes, the weight's, alpha, and the scale by hand."""


def stored(shapes: Mapping[str, Sequence[int]], alpha: float | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return tensors | ({} if alpha is None else {"alpha": torch.tensor(alpha)})


def read(folder: Path, registry: Registry, tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    save_file(folder / "a.safetensors", {f"lora_unet_q.{name}": each for name, each in tensors.items()}, {})
    (delta,) = load(open_header(folder, registry), registry).deltas.values()
    return delta.delta(weight)


def by_hand(rule: Rule, tensors: Tensors, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    result = torch.empty(shape, dtype=torch.float64)
    for at in itertools.product(*map(range, shape)):
        result[at] = scale * rule(tensors, at)
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_what_its_tensors_mean_element_by_element(tmp_path: Path, registry: Registry, name: str) -> None:
    rule, shapes, shape, alpha, scale = CASES[name]
    tensors = stored(shapes, alpha)
    expected = by_hand(rule, tensors, shape, scale)
    assert float(expected.abs().max()) > 0.1
    found = read(tmp_path, registry, tensors, torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_scalar_that_was_not_folded_in_multiplies_the_change(tmp_path: Path, registry: Registry) -> None:
    """LyCORIS before 1.8 kept ``scalar`` beside the factors, which a trained one multiplies."""
    for name in ("lora", "loha", "lokr", "lokr whole", "locon tucker"):
        rule, shapes, shape, alpha, scale = CASES[name]
        tensors = stored(shapes, alpha) | {"scalar": torch.tensor(0.25)}
        expected = by_hand(rule, tensors, shape, scale * 0.25)
        found = read(tmp_path, registry, tensors, torch.zeros(shape, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "shape"),
    [
        ({"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}, LINEAR),
        ({"lora_down.weight": (2, 4, 3, 2), "lora_up.weight": (6, 2, 1, 1)}, CONV),
        (
            {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 2), "lora_up.weight": (6, 2, 1, 1)},
            CONV,
        ),
    ],
)
def test_a_sparse_rest_is_added_at_its_places(
    tmp_path: Path, registry: Registry, shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    columns = math.prod(shape[1:])
    places = torch.tensor([[0, 5, 5], [1, 0, columns - 1]], dtype=torch.int16)
    rest = {"bias_indices": places, "bias_values": torch.tensor([3.0, -2.0, 0.5]), "bias_size": torch.tensor([6, 24])}
    tensors = stored(shapes, 2.0) | rest
    expected = by_hand(sparse, tensors, shape, 1.0)
    found = read(tmp_path, registry, tensors, torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def glora(t: Tensors, weight: torch.Tensor, at: tuple[int, ...]) -> float:
    """sum over j of W[o, j, *k] A[j, i], and B[o, i, *k]; all pairs left to right."""
    a1, a2, b1, b2 = (t[name] for name in ("left a", "right a", "left b", "right b"))
    ranks = range(a1.shape[1])
    moved = sum(
        float(weight[at[0], j, *at[2:]]) * float(a1[j, r]) * float(a2[r, at[1]])
        for j in range(weight.shape[1])
        for r in ranks
    )
    if (core := t.get("core")) is not None:
        pairs = itertools.product(ranks, ranks)
        return moved + sum(float(b1[at[0], p]) * float(core[p, q, *at[2:]]) * float(b2[q, at[1]]) for p, q in pairs)
    return moved + sum(float(b1[at[0], r]) * float(b2[r, *at[1:]]) for r in ranks)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("shape", "cored"), [((6, 4), False), ((4, 4), False), ((6, 4, 3, 2), False), ((6, 4, 3, 2), True)]
)
def test_glora_is_read_in_either_order_of_its_factors(
    tmp_path: Path, registry: Registry, shape: tuple[int, ...], cored: bool, old: bool
) -> None:
    """ComfyUI's loader names the layout before LyCORIS 2.0, in which every pair stands the other way round."""
    out, width, *kernel = shape
    generator, ones = torch.Generator().manual_seed(6), [1 for _ in kernel]
    sizes = {
        "left a": (width, 2, *ones),
        "right a": (2, width, *ones),
        "left b": (out, 2, *ones),
        "right b": (2, width, *(ones if cored else kernel)),
    } | ({"core": (2, 2, *kernel)} if cored else {})
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    names = (
        {"left a": "a2", "right a": "a1", "left b": "b2", "right b": "b1"}
        if old
        else {
            "left a": "a1",
            "right a": "a2",
            "left b": "b1",
            "right b": "b2",
        }
    )
    spelled = {f"{ {**names, 'core': 'bm'}[name] }.weight": each for name, each in tensors.items()}
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = {
        name: each.flatten(1) if name in ("left a", "right a", "left b") else each for name, each in tensors.items()
    }
    if cored:
        flat["right b"] = flat["right b"].flatten(1)
    expected = torch.empty(shape, dtype=torch.float64)
    for at in itertools.product(*map(range, shape)):
        expected[at] = 1.5 * glora(flat, weight, at)
    found = read(tmp_path, registry, spelled | {"alpha": torch.tensor(3.0)}, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("n", "shape"), [(2, (5, 6)), (1, (5, 6)), (2, (5, 2, 3, 1)), (1, (5, 2, 3, 1))])
def test_onetrainers_oft_turns_inputs_by_its_series_and_kernels_the_other_way(
    tmp_path: Path, registry: Registry, n: int, shape: tuple[int, ...], scaled: bool
) -> None:
    """``oft_R``: x @ R before a linear layer, W @ R for a convolution; R = I + 2Q + 2Q^2 + 2Q^3 + Q^4."""
    b, inputs = 3, math.prod(shape[1:])
    generator = torch.Generator().manual_seed(7)
    angles = torch.randn((n, 3), generator=generator, dtype=torch.float64) * 0.3
    turn = torch.zeros(inputs, inputs, dtype=torch.float64)
    for block in range(inputs // b):
        own = angles[block % n] / (2 * math.sqrt(b - 1) if scaled else 1)
        q = torch.zeros(b, b, dtype=torch.float64)
        for (row, column), value in zip(itertools.combinations(range(b), 2), own.tolist(), strict=True):
            q[row, column], q[column, row] = value, -value
        powers = [torch.eye(b, dtype=torch.float64)]
        for _ in range(4):
            powers.append(powers[-1] @ q)
        r = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4]
        turn[block * b : block * b + b, block * b : block * b + b] = r
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = weight.flatten(1)
    expected = (flat @ (turn if len(shape) > 2 else turn.T)).reshape(shape) - weight
    assert float(expected.norm() / weight.norm()) > 1e-2
    flag = {"oft_R.scaled_oft": torch.tensor(True)} if scaled else {}
    found = read(tmp_path, registry, {"oft_R.weight": angles, **flag}, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["lora", "lora conv"])
def test_dora_keeps_the_lengths_along_the_axis_that_its_shape_names(
    tmp_path: Path, registry: Registry, name: str, axis: int
) -> None:
    rule, shapes, shape, alpha, scale = CASES[name]
    lengths = tuple(size if dim == axis else 1 for dim, size in enumerate(shape))
    tensors = stored({**shapes, "dora_scale": lengths}, alpha)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moved = weight + by_hand(rule, tensors, shape, scale)
    expected = torch.empty(shape, dtype=torch.float64)
    for index in range(shape[axis]):
        part = moved.select(axis, index)
        norm = math.sqrt(sum(float(value) ** 2 for value in part.flatten()))
        expected.select(axis, index).copy_(part * (float(tensors["dora_scale"].flatten()[index]) / norm))
    torch.testing.assert_close(weight + read(tmp_path, registry, tensors, weight), expected, rtol=1e-12, atol=1e-12)
