"""Methods on factors: each equals its definition on dense float64 matrices, and never makes a matrix of that size."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorahub.composition.method import Change, ElementMethod, GramMethod, Method, Terms
from lorahub.composition.methods.core import Core
from lorahub.composition.methods.dare import DareTies
from lorahub.composition.methods.iso_c import IsoC
from lorahub.composition.methods.iso_cts import IsoCts
from lorahub.composition.methods.karcher import Karcher
from lorahub.composition.methods.knots import Knots
from lorahub.composition.methods.linear import Linear
from lorahub.composition.methods.model_stock import ModelStock
from lorahub.composition.methods.multislerp import Multislerp
from lorahub.composition.methods.nuslerp import Nuslerp
from lorahub.composition.methods.peft_linear import PeftLinear
from lorahub.composition.methods.preset import INNER
from lorahub.composition.methods.product import Product
from lorahub.composition.methods.slerp import Slerp
from lorahub.composition.methods.svd import Svd
from lorahub.composition.methods.ties import Ties
from lorahub.composition.methods.tsv import Tsv
from lorahub.deltas.delta import LowRank
from lorahub.errors import UnsupportedKind, UsageError
from lorahub.plugins import load_registry

Matrix = np.ndarray[Any, np.dtype[np.float64]]
OUT, IN = 26, 19


def changes(ranks: Sequence[int], *, out: int = OUT, inner: int = IN, seed: int = 0) -> list[LowRank]:
    """Random factors of which any two have directions in common, so that angles are not all right ones."""
    generator = torch.Generator().manual_seed(seed)
    common_up = torch.randn(out, max([*ranks, 1]), generator=generator)
    common_down = torch.randn(max([*ranks, 1]), inner, generator=generator)
    found = []
    for number, rank in enumerate(ranks):
        up = torch.randn(out, rank, generator=generator) + common_up[:, :rank]
        down = torch.randn(rank, inner, generator=generator) + common_down[:rank]
        found.append(LowRank(up, down, (0.5, -1.5, 0.25, 2.0)[number % 4] * (-1.0 if number % 2 else 1.0)))
    return found


def terms(found: Sequence[Change], weights: Sequence[float] | None = None, whole: torch.Tensor | None = None) -> Terms:
    first = found[0]
    shape = (first.up.shape[0], first.down.shape[1]) if isinstance(first, LowRank) else tuple(first.shape)
    given_weights = tuple(weights or (1.0,) * len(found))
    return Terms(shape=shape, changes=tuple(found), weights=given_weights, seeds=tuple(range(len(found))), whole=whole)


def dense(change: Change) -> Matrix:
    if not isinstance(change, LowRank):
        return np.asarray(change.double().numpy())
    up, down = change.up.double().numpy(), change.down.double().numpy()
    result = np.zeros((up.shape[0], down.shape[1]))
    for row, rank in itertools.product(range(up.shape[0]), range(up.shape[1])):
        result[row] += change.scale * up[row, rank] * down[rank]
    return result


# The definitions, in numpy on dense matrices.


def arc(a: Matrix, b: Matrix, t: float, straight: float) -> Matrix:
    if not np.linalg.norm(a) or not np.linalg.norm(b):
        cosine = 0.0
    else:
        cosine = float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
    if abs(cosine) > straight:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def by_slerp(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return arc(weights[0] * found[0], weights[1] * found[1], 0.3, 0.9995)


def by_nuslerp(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return arc(found[0], found[1], weights[1] / (weights[0] + weights[1]), 1 - 1e-13)


def by_nuslerp_rows(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return np.stack([by_nuslerp([a, b], weights) for a, b in zip(*found, strict=True)])


def by_nuslerp_columns(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return by_nuslerp_rows([each.T for each in found], weights).T


def by_multislerp(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    shares = [weight / sum(weights) for weight in weights]
    mean = np.zeros_like(found[0])
    length = 0.0
    for share, each in zip(shares, found, strict=True):
        mean += share * each / np.linalg.norm(each)
        length += share * float(np.linalg.norm(each))
    return length * mean / np.linalg.norm(mean)


def by_karcher(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    """By descent with another step and many more of them: what is left is the zero of the gradient."""
    shares = [weight / sum(weights) for weight in weights]
    units = [each / np.linalg.norm(each) for each in found]
    mean = units[0] + 0.5 * units[-1]
    mean /= np.linalg.norm(mean)
    for _ in range(400):
        gradient = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = float((unit * mean).sum())
            side = unit - cosine * mean
            if np.linalg.norm(side) > 1e-14:
                gradient += share * math.acos(max(-1.0, min(1.0, cosine))) * side / np.linalg.norm(side)
        mean = mean + 0.5 * gradient
        mean /= np.linalg.norm(mean)
    return mean * sum(share * float(np.linalg.norm(each)) for share, each in zip(shares, found, strict=True))


def by_model_stock(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    scaled = [weight * each for weight, each in zip(weights, found, strict=True)]
    cosines = []
    for a, b in itertools.combinations(scaled, 2):
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float((a * b).sum()) / lengths if lengths else 0.0)
    cosine, count = sum(cosines) / len(cosines), len(found)
    return count * cosine / (1 + (count - 1) * cosine) * sum(scaled, np.zeros_like(found[0])) / count


def by_model_stock_rows(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return np.stack([by_model_stock(list(rows), weights) for rows in zip(*found, strict=True)])


def nearest(columns: Matrix) -> Matrix:
    """The polar factor by way of the square root of the smaller Gram matrix."""
    if columns.shape[1] > columns.shape[0]:
        return nearest(columns.T).T
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return np.asarray(columns @ vectors @ np.diag(values**-0.5) @ vectors.T)


def thin(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vh = np.linalg.svd(matrix)
    count = int((s > 1e-10 * s[0]).sum())
    return u[:, :count], s[:count], vh[:count].T


def by_tsv(found: list[Matrix], weights: Sequence[float], keep: float = 1.0) -> Matrix:
    us, ss, vs = [], [], []
    for weight, each in zip(weights, found, strict=True):
        u, s, v = thin(weight * each)
        count = max(1, int(keep * len(s)))
        us.append(u[:, :count])
        ss.append(s[:count])
        vs.append(v[:, :count])
    return np.asarray(nearest(np.hstack(us)) @ np.diag(np.hstack(ss)) @ nearest(np.hstack(vs)).T)


def by_iso_c(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    u, s, v = thin(sum((w * each for w, each in zip(weights, found, strict=True)), np.zeros_like(found[0])))
    result = np.zeros_like(found[0])
    for k in range(len(s)):
        result += sum(s) / len(s) * np.outer(u[:, k], v[:, k])
    return result


def by_iso_cts(found: list[Matrix], weights: Sequence[float], fraction: float = 0.5) -> Matrix:
    scaled = [w * each for w, each in zip(weights, found, strict=True)]
    u, s, v = thin(sum(scaled, np.zeros_like(found[0])))
    own = round((len(s) - int(len(s) * fraction)) / len(found))
    common = len(s) - own * len(found)
    us, ss, vs = [u[:, :common]], [s[:common]], [v[:, :common]]
    for each in scaled:
        rest_u, rest_s, rest_v = thin(each - u[:, :common] @ u[:, :common].T @ each)
        us.append(rest_u[:, :own])
        ss.append(rest_s[:own])
        vs.append(rest_v[:, :own])
    return np.asarray(np.hstack(ss).mean() * nearest(np.hstack(us)) @ nearest(np.hstack(vs)).T)


def by_sum(found: list[Matrix], weights: Sequence[float]) -> Matrix:
    return sum((w * each for w, each in zip(weights, found, strict=True)), np.zeros_like(found[0]))


Definition = Callable[[list[Matrix], Sequence[float]], Matrix]
METHODS: dict[str, tuple[Method, Definition, int]] = {
    "svd": (Svd(), by_sum, 3),
    "slerp": (Slerp(t=0.3), by_slerp, 2),
    "nuslerp": (Nuslerp(), by_nuslerp, 2),
    "nuslerp by rows": (Nuslerp(nuslerp_flatten=False), by_nuslerp_rows, 2),
    "nuslerp by columns": (Nuslerp(nuslerp_flatten=False, nuslerp_row_wise=True), by_nuslerp_columns, 2),
    "multislerp": (Multislerp(), by_multislerp, 3),
    "karcher": (Karcher(max_iter=100, tol=1e-13), by_karcher, 3),
    "model_stock": (ModelStock(), by_model_stock, 3),
    "model_stock by rows": (ModelStock(filter_wise=True), by_model_stock_rows, 3),
    "tsv": (Tsv(), by_tsv, 3),
    "half of tsv": (Tsv(keep=0.5), lambda found, weights: by_tsv(found, weights, 0.5), 3),
    "iso_c": (IsoC(), by_iso_c, 3),
    "iso_cts": (IsoCts(common_space_fraction=0.5), by_iso_cts, 3),
}
WEIGHTS = (0.7, 1.3, 0.4)
FACTORED = ("tsv", "half of tsv", "iso_c", "iso_cts")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 6, 3), (1, 5, 1)])
def test_a_method_on_factors_is_its_definition_on_dense_matrices(name: str, ranks: tuple[int, ...]) -> None:
    method, definition, count = METHODS[name]
    found = changes(ranks[:count])
    result = method.combine(terms(found, WEIGHTS[:count]))
    assert isinstance(result, LowRank)
    expected = definition([dense(each) for each in found], WEIGHTS[:count])
    assert np.linalg.norm(expected) > 0.1
    # what these take apart has a condition of up to 5,000, so that one BLAS and another differ by 2e-9
    assert np.linalg.norm(dense(result) - expected) <= 1e-8 * np.linalg.norm(expected)
    fewer = [*found[: count - 1], LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN), 1.0)]
    dropped = dense(method.combine(terms(fewer, WEIGHTS[:count])))
    assert np.linalg.norm(dropped - expected) > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_ragged_shapes_and_ranks_make_no_difference(name: str, data: st.DataObject) -> None:
    method, definition, count = METHODS[name]
    out, inner = (data.draw(st.integers(9, 30)) for _ in range(2))
    ranks = [data.draw(st.integers(1, 3)) for _ in range(count)]
    found = changes(ranks, out=out, inner=inner, seed=data.draw(st.integers(0, 999)))
    weights = [data.draw(st.floats(0.2, 2)) for _ in range(count)]
    expected = definition([dense(each) for each in found], weights)
    result = dense(method.combine(terms(found, weights)))
    assert np.linalg.norm(result - expected) <= 1e-7 * max(float(np.linalg.norm(expected)), 1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("iso_cts", "half of tsv")])
def test_more_ranks_than_the_matrix_has_are_no_trouble(name: str) -> None:
    method, definition, count = METHODS[name]
    found = changes((5, 9, 4)[:count], out=6, inner=5)
    expected = definition([dense(each) for each in found], WEIGHTS[:count])
    result = dense(method.combine(terms(found, WEIGHTS[:count])))
    assert np.linalg.norm(result - expected) <= 1e-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FACTORED])
def test_changes_without_factors_are_combined_the_same_way(name: str) -> None:
    method, definition, count = METHODS[name]
    found: list[Change] = [*changes((4, 2, 3)[:count])]
    found[1] = torch.from_numpy(dense(found[1])).float()
    result = method.combine(terms(found, WEIGHTS[:count]))
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float32
    expected = definition([dense(each) for each in found], WEIGHTS[:count])
    assert np.linalg.norm(dense(result) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", FACTORED)
def test_methods_on_factors_refuse_changes_without_them(name: str) -> None:
    with pytest.raises(UnsupportedKind, match="has no factors"):
        METHODS[name][0].combine(terms([changes((2,))[0], torch.ones(OUT, IN), changes((3,))[0]]))


@pytest.mark.parametrize("name", METHODS)
def test_a_vector_is_combined_too(name: str) -> None:
    method, definition, count = METHODS[name]
    vectors = [torch.randn(OUT, generator=torch.Generator().manual_seed(n)) + 1 for n in range(count)]
    result = method.combine(terms(vectors, WEIGHTS[:count]))
    assert isinstance(result, torch.Tensor)
    assert result.shape == (OUT,)
    if name in FACTORED:
        expected = by_sum([dense(each) for each in vectors], WEIGHTS)
    else:
        whole = {"nuslerp by rows": by_nuslerp, "nuslerp by columns": by_nuslerp, "model_stock by rows": by_model_stock}
        expected = whole.get(name, definition)([dense(each) for each in vectors], WEIGHTS[:count])
    assert np.allclose(dense(result), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name][0].ordered])
def test_the_order_of_the_adapters_does_not_count(name: str) -> None:
    method, _, count = METHODS[name]
    found = changes((2, 5, 3)[:count])
    forth = dense(method.combine(terms(found, WEIGHTS[:count])))
    back = dense(method.combine(terms(found[::-1], WEIGHTS[:count][::-1])))
    assert np.linalg.norm(forth - back) <= 1e-9 * np.linalg.norm(forth)


def test_slerp_goes_from_the_first_to_the_second() -> None:
    found = changes((3, 3))
    for t, number in ((0.0, 0), (1.0, 1)):
        result = dense(Slerp(t=t).combine(terms(found)))
        assert np.allclose(result, dense(found[number]), atol=1e-12)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


ON_FACTORS: dict[str, Method] = {
    **{name: method for name, (method, _, _) in METHODS.items()},
    "peft_linear": PeftLinear(),
    "linear": Linear(),
    "knots": Knots(inner=Ties(density=0.5)),
    "core": Core(inner=Ties(density=0.5)),
}


@pytest.mark.parametrize("name", ON_FACTORS)
def test_nothing_of_the_size_of_a_weight_is_ever_made(name: str) -> None:
    out, inner, count = 400, 300, METHODS[name][2] if name in METHODS else 2
    found = changes((4,) * count, out=out, inner=inner)
    with Watch() as watch:
        result = ON_FACTORS[name].combine(terms(found))
        assert isinstance(result, LowRank)
    # all factors side by side take out * 12 numbers; KnOTS holds all changes in a basis of 8
    assert 0 < watch.largest <= 24 * max(out, inner) < out * inner / 10


LEAVES = {"nuslerp by rows": "out", "model_stock by rows": "out", "nuslerp by columns": "in", "knots": "in"}
"""The side whose span a method leaves: it scales or selects what lies along it, element by element."""


@pytest.mark.parametrize("name", ON_FACTORS)
def test_the_result_has_no_more_ranks_than_came_in_and_stays_in_their_span(name: str) -> None:
    count = METHODS[name][2] if name in METHODS else 2
    ranks = (3, 3, 3)[:count]
    found = changes(ranks)
    result = ON_FACTORS[name].combine(terms(found))
    assert isinstance(result, LowRank)
    matrix = dense(result)
    assert np.linalg.matrix_rank(matrix, tol=1e-9 * np.linalg.norm(matrix)) <= sum(ranks)
    left = np.linalg.qr(np.hstack([each.up.double().numpy() for each in found]))[0]
    right = np.linalg.qr(np.hstack([each.down.double().numpy().T for each in found]))[0]
    for side, outside in (("out", matrix - left @ (left.T @ matrix)), ("in", matrix - matrix @ right @ right.T)):
        if side not in LEAVES.get(name, ""):
            assert np.linalg.norm(outside) <= 1e-10 * np.linalg.norm(matrix)
    assert np.linalg.norm(matrix) > 0.1


def test_isotropic_results_have_one_singular_value_where_the_sum_had_any() -> None:
    found = changes((2, 3, 2))
    for method in (IsoC(), IsoCts(common_space_fraction=0.5), IsoC(lambda_=2.0)):
        values = np.linalg.svd(dense(method.combine(terms(found))))[1]
        assert np.allclose(values[:7], values[0])
        assert np.allclose(values[7:], 0, atol=1e-9)
    twice = np.linalg.norm(dense(IsoC(lambda_=2.0).combine(terms(found))))
    assert twice == pytest.approx(2 * np.linalg.norm(dense(IsoC().combine(terms(found)))))


def test_the_same_adapter_twice_makes_no_direction_up() -> None:
    one = changes((3,))[0]
    for method in (Tsv(), IsoC(), IsoCts(common_space_fraction=0.4)):
        matrix = dense(method.combine(terms([one, one])))
        assert np.linalg.matrix_rank(matrix, tol=1e-9) <= 3
        left = np.linalg.qr(one.up.double().numpy())[0]
        assert np.linalg.norm(matrix - left @ left.T @ matrix) < 1e-9
    assert np.allclose(dense(Tsv().combine(terms([one, one]))), dense(one), atol=1e-9)


def test_tsv_of_changes_out_of_each_others_way_is_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(OUT, 6, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(IN, 6, generator=generator).double()).Q
    found = [LowRank(left[:, :3] * 2, right[:, :3].mT, 1.5), LowRank(left[:, 3:], right[:, 3:].mT, -0.5)]
    assert np.allclose(dense(Tsv().combine(terms(found, (1.0, -2.0)))), by_sum([*map(dense, found)], (1.0, -2.0)))


@pytest.mark.parametrize("name", ON_FACTORS)
def test_changes_of_nothing_combine_to_nothing(name: str) -> None:
    count = METHODS[name][2] if name in METHODS else 2
    nothing = [LowRank(torch.zeros(OUT, rank), torch.zeros(rank, IN), 1.0) for rank in (0, 2, 2)[:count]]
    for weights in ((1.0,) * count, (0.0,) * count):
        assert not dense(ON_FACTORS[name].combine(terms(nothing, weights))).any()
    found = changes((2, 2, 2)[:count])
    assert not dense(ON_FACTORS[name].combine(terms(found, (0.0,) * count))).any()


def test_the_angle_may_be_that_of_the_whole_adapters() -> None:
    found = changes((3, 3))
    whole = torch.tensor([[4.0, 1.0], [1.0, 9.0]]).double()
    own = Slerp(t=0.5, scope="adapter").combine(terms(found, whole=whole))
    angle = math.acos(1 / 6)
    expected = math.sin(angle / 2) / math.sin(angle) * (dense(found[0]) + dense(found[1]))
    assert np.allclose(dense(own), expected)
    assert not np.allclose(dense(Slerp(t=0.5).combine(terms(found))), expected)
    for method in (Nuslerp(scope="adapter"), Multislerp(scope="adapter"), Karcher(scope="adapter")):
        result = dense(method.combine(terms(found, whole=whole)))
        coefficients = np.linalg.lstsq(
            np.stack([dense(each).ravel() for each in found], axis=1), result.ravel(), rcond=None
        )[0]
        gram = coefficients @ whole.numpy() @ coefficients
        assert math.sqrt(gram) == pytest.approx(2.5, rel=0.05)  # as long as the mean of 2 and 3, or nearly
    stock = dense(ModelStock(scope="adapter").combine(terms(found, whole=whole)))
    assert np.allclose(stock, 2 * (1 / 6) / (1 + 1 / 6) * (dense(found[0]) + dense(found[1])) / 2)


def test_peft_linear_adds_factors_and_puts_the_sign_on_one_side() -> None:
    found = changes((3, 3, 3))
    weights = (0.5, -2.0, 1.0)
    up, down = np.zeros((OUT, 3)), np.zeros((3, IN))
    for change, weight in zip(found, weights, strict=True):
        both = weight * change.scale
        up += math.sqrt(abs(both)) * change.up.double().numpy()
        down += math.copysign(math.sqrt(abs(both)), both) * change.down.double().numpy()
    result = PeftLinear().combine(terms(found, weights))
    assert isinstance(result, LowRank)
    assert result.up.shape == (OUT, 3)
    assert np.allclose(dense(result), up @ down)
    alone = dense(PeftLinear().combine(terms(found[:1], (-2.0,))))
    assert np.allclose(alone, -2 * dense(found[0]))
    with_nothing = [found[0], LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN), 1.0)]
    assert np.allclose(dense(PeftLinear().combine(terms(with_nothing))), dense(found[0]))


def test_peft_linear_refuses_unequal_ranks() -> None:
    with pytest.raises(UnsupportedKind, match="ranks 2, 4 cannot be added") as caught:
        PeftLinear().combine(terms(changes((2, 4))))
    assert "take linear" in str(caught.value.hint)


def test_svd_is_the_sum_and_asks_for_a_budget() -> None:
    assert Svd.cut
    assert not Linear.cut
    found = changes((2, 3))
    assert np.allclose(dense(Svd().combine(terms(found, (1.0, -0.5)))), by_sum([*map(dense, found)], (1.0, -0.5)))


@pytest.mark.parametrize("preset", [Knots, Core])
@pytest.mark.parametrize("inner", sorted(INNER))
def test_a_preset_is_its_inner_method_in_the_basis(preset: type[Knots | Core], inner: str) -> None:
    method = preset.made({"inner": inner})
    found = changes((3, 2))
    basis = INNER[inner].made({"basis": preset.basis})
    result = dense(method.combine(terms(found)))
    assert np.array_equal(result, dense(basis.combine(terms(found))))
    assert np.linalg.norm(result) > 0.1
    assert preset.made(json.loads(json.dumps(method.parameters()))) == method


def test_presets_pass_parameters_on_and_name_what_is_wrong() -> None:
    method = Knots.made({"inner": "dare_ties", "density": [0.2, 0.7], "lambda": 0.5})
    assert method == Knots(inner=DareTies(density=(0.2, 0.7), lambda_=0.5, basis="core"))
    assert method.parameters()["inner"] == "dare_ties"
    assert "basis" not in method.parameters()
    assert Knots.defaults() == Core.defaults() == {"inner": "ties"}
    assert Knots() == Knots.made({}) == Knots(inner=Ties(basis="knots"))
    with pytest.raises(UsageError, match=r"no inner method 'tise'.*ties") as caught:
        Knots.made({"inner": "tise"})
    assert "the same in every basis: linear" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'ties' has no parameter 'densty'"):
        Core.made({"densty": 0.3})
    with pytest.raises(UsageError, match="no parameter 'basis'"):
        Core.made({"basis": "knots"})
    with pytest.raises(UsageError, match="density"):
        Core.made({"density": 0.0})


def test_gram_methods_see_no_more_than_inner_products() -> None:
    for each in load_registry().methods.values():
        if issubclass(each, GramMethod):
            assert "scope" in each().parameters()


WRONG: list[tuple[type[Method], dict[str, Any], str]] = [
    (Slerp, {"t": 1.5}, "t is 1.5"),
    (Slerp, {"t": "half"}, "t is 'half'"),
    (Slerp, {"scope": "model"}, "no scope 'model'"),
    (Nuslerp, {"nuslerp_row_wise": True}, "no rows"),
    (Nuslerp, {"nuslerp_flatten": False, "scope": "adapter"}, "no rows"),
    (Nuslerp, {"nuslerp_flatten": 1}, "nuslerp_flatten is 1"),
    (Multislerp, {"normalize_weights": "no"}, "normalize_weights is 'no'"),
    (Karcher, {"max_iter": 0}, "max_iter is 0"),
    (Karcher, {"max_iter": 2.5}, "max_iter is 2.5"),
    (Karcher, {"tol": -1.0}, "tol is -1"),
    (ModelStock, {"filter_wise": True, "scope": "adapter"}, "no rows"),
    (Tsv, {"keep": 0.0}, "keep is 0"),
    (Tsv, {"lambda": float("nan")}, "lambda is nan"),
    (IsoC, {"lambda": "1"}, "lambda is '1'"),
    (IsoCts, {"common_space_fraction": 1.5}, "common_space_fraction is 1.5"),
    (PeftLinear, {"density": 0.5}, "'peft_linear' has no parameter 'density'"),
]


@pytest.mark.parametrize(("method", "parameters", "said"), WRONG)
def test_a_value_out_of_its_range_is_refused(method: type[Method], parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        method.made(parameters)


def test_weights_that_name_no_point_are_refused() -> None:
    found = changes((2, 2))
    for method in (Nuslerp(), Multislerp(), Karcher()):
        with pytest.raises(UsageError, match=r"sum to zero|a weight is -1"):
            method.combine(terms(found, (1.0, -1.0)))
    opposite = [found[0], LowRank(found[0].up, found[0].down, -2 * found[0].scale)]
    with pytest.raises(UsageError, match="cancel"):
        Karcher().combine(terms(opposite))
    assert np.allclose(dense(Multislerp().combine(terms(opposite))), by_sum([*map(dense, opposite)], (0.5, 0.5)))
    with pytest.raises(UsageError, match="cancel"):
        Multislerp().combine(terms([*opposite, LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN), 1.0)]))
    assert np.allclose(dense(Nuslerp().combine(terms(opposite))), by_sum([*map(dense, opposite)], (0.5, 0.5)))
    assert np.allclose(dense(Slerp().combine(terms(opposite))), by_sum([*map(dense, opposite)], (0.5, 0.5)))


def test_what_adds_has_no_product() -> None:
    with pytest.raises(UnsupportedKind, match="have no product"):
        Product().combine(terms(changes((2, 2))))


def test_every_method_of_these_is_registered_under_its_name() -> None:
    methods = load_registry().methods
    for method in [*ON_FACTORS.values(), Product()]:
        assert methods[method.name] is type(method)
        again = type(method).made(json.loads(json.dumps(method.parameters())))
        assert again == method
        assert isinstance(again, ElementMethod) is False


@pytest.mark.parametrize("name", ON_FACTORS)
def test_the_bytes_do_not_depend_on_the_number_of_threads(name: str) -> None:
    count = METHODS[name][2] if name in METHODS else 2
    found = changes((4,) * count, out=90, inner=70)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ON_FACTORS[name].combine(terms(found)))
    finally:
        torch.set_num_threads(before)
    one, two = results
    assert isinstance(one, LowRank)
    assert isinstance(two, LowRank)
    assert torch.equal(one.up, two.up)
    assert torch.equal(one.down, two.down)
    assert one.scale == two.scale
