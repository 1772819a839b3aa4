"""Rules for single elements, and what every element-wise method promises whatever it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorahub.composition.algebra.elements import (
    PIECE,
    drop,
    drop_by_rank,
    elected_mean,
    keep_between,
    kept_count,
    largest,
    trim,
    weighted_sum,
)
from lorahub.composition.method import Change, Method, Terms
from lorahub.composition.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from lorahub.composition.methods.dare import DareLinear, DareTies
from lorahub.composition.methods.della import Della, DellaLinear
from lorahub.composition.methods.magnitude_prune import MagnitudePrune
from lorahub.composition.methods.nearswap import Nearswap
from lorahub.composition.methods.sce import Sce
from lorahub.composition.methods.ties import Ties
from lorahub.deltas.delta import LowRank
from lorahub.errors import NotFinite, UsageError
from lorahub.plugins import Registry

SUMS = [MagnitudePrune, DareLinear, DellaLinear, Breadcrumbs]
MEANS = [Ties, DareTies, Della, BreadcrumbsTies]
THINNED: list[Any] = SUMS + MEANS
ALL: list[Any] = [*THINNED, Sce, Nearswap]
DRAWING: list[Any] = [each for each in THINNED if each.draws]

SHAPES = st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 7), st.integers(1, 7)))
WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.05)
LEVELS = st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 0.5]), min_size=1, max_size=40)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms(changes: Sequence[Change], weights: Sequence[float], shape: tuple[int, ...]) -> Terms:
    return Terms(
        shape=shape, changes=tuple(changes), weights=tuple(weights), seeds=tuple(range(7, 7 + 10 * len(changes), 10))
    )


def dense(change: Change) -> torch.Tensor:
    return change.scale * (change.up @ change.down) if isinstance(change, LowRank) else change


def combined(method: Method, *changes: torch.Tensor, weights: Sequence[float] | None = None) -> torch.Tensor:
    return dense(method.combine(terms(changes, weights or [1.0] * len(changes), tuple(changes[0].shape))))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one.double() - other.double()).norm()) <= 1e-6 * max(1.0, float(other.double().norm()))


class Watch(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given_in = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        new = [each.nbytes for each in made if each.untyped_storage().data_ptr() not in given_in]
        self.largest = max([self.largest, *new])
        return result


# ------------------------------------------------------------------------------------------------------ which are kept


@pytest.mark.parametrize(
    ("density", "length", "count"),
    [(0.2, 10, 2), (0.29, 100, 29), (0.57, 100, 57), (0.2, 14, 2), (0.2, 4, 1), (1e-6, 5, 1), (1, 7, 7), (0.5, 0, 0)],
)
def test_a_density_keeps_what_it_says_in_decimal_and_never_nothing(density: float, length: int, count: int) -> None:
    assert kept_count(density, length) == count


@given(LEVELS, st.data())
def test_exactly_as_many_are_kept_as_asked_although_many_are_equal(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    kept = largest(torch.tensor(values), count)
    expected = sorted(range(len(values)), key=lambda cell: (-abs(values[cell]), cell))[:count]
    assert kept.nonzero().flatten().tolist() == sorted(expected)


def test_equal_ones_are_counted_across_pieces() -> None:
    values = torch.ones(2 * PIECE + 100, dtype=torch.float64)
    values[PIECE + 5] = 3.0
    kept = largest(values, PIECE + 20)
    assert int(kept.sum()) == PIECE + 20
    assert kept[: PIECE + 6].all()
    assert kept[PIECE + 6 : PIECE + 20].all()
    assert not kept[PIECE + 20 :].any()


def test_a_selection_of_many_is_that_of_a_sort() -> None:
    values = noise(3 * PIECE // 7, 5)
    order = values.flatten().abs().sort(descending=True, stable=True).indices
    for count in (1, 1000, values.numel() // 3, values.numel() - 1):
        expected = torch.zeros(values.numel(), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(largest(values, count).flatten(), expected)


def test_trimming_keeps_the_largest_as_they_are() -> None:
    change = torch.tensor([[0.1, -3.0, 0.2], [2.0, -0.3, 0.0]])
    trim(change, 0.5)
    assert change.tolist() == [[0, -3.0, 0], [2.0, pytest.approx(-0.3), 0]]
    whole = noise(4, 4)
    before = whole.clone()
    trim(whole, 1.0)
    assert torch.equal(whole, before)


def test_outliers_go_first_and_density_holds() -> None:
    change = torch.tensor([10.0, -9.0, 8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0])
    some = change.clone()
    keep_between(some, 0.3, 0.2)
    assert some.nonzero().flatten().tolist() == [2, 3, 4]
    most = change.clone()
    keep_between(most, 0.9, 0.2)
    assert most.nonzero().flatten().tolist() == list(range(1, 10))
    few = noise(99)
    keep_between(few, 0.5, 0.005)
    assert int((few != 0).sum()) == 49


def test_what_is_dropped_does_not_depend_on_the_size_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieced, ranked, banded = (noise(60, 50) for _ in range(4))
    drop(whole, 0.4, torch.Generator().manual_seed(3), rescale=True)
    drop_by_rank(ranked, 0.4, 0.2, torch.Generator().manual_seed(3), rescale=True)
    monkeypatch.setattr("lorahub.composition.algebra.elements.PIECE", 120)
    drop(pieced, 0.4, torch.Generator().manual_seed(3), rescale=True)
    drop_by_rank(banded, 0.4, 0.2, torch.Generator().manual_seed(3), rescale=True)
    assert torch.equal(whole, pieced)
    assert torch.equal(ranked, banded)


@pytest.mark.parametrize("last", [2.0, 1.0], ids=["rising", "equal"])
def test_large_elements_are_dropped_less_often_than_small_ones_and_equal_ones_in_order(last: float) -> None:
    change = torch.linspace(1, last, 40).repeat(20_000, 1)
    drop_by_rank(change, 0.5, 0.3, torch.Generator().manual_seed(1), rescale=False)
    shares = (change != 0).double().mean(0)
    expected = torch.linspace(0.2, 0.8, 40, dtype=torch.float64)
    assert float((shares - expected).abs().max()) < 6 * math.sqrt(0.25 / 20_000)


# ---------------------------------------------------------------------------------------------------- which signs win


def test_the_sum_and_the_number_of_values_can_elect_differently() -> None:
    stack = torch.tensor([[-1.0], [-1.0], [3.0]])
    assert elected_mean(stack, [1, 1, 1]).item() == 3.0
    assert elected_mean(stack, [1, 1, 1], by="frequency").item() == -1.0


def test_where_votes_cancel_nothing_is_taken_unless_a_peer_is_asked_for() -> None:
    stack = torch.tensor([[1.0], [-1.0]])
    assert elected_mean(stack, [1, 1]).item() == 0.0
    assert elected_mean(stack, [1, 1], undecided="positive").item() == 1.0


def test_a_negative_weight_votes_for_the_opposite() -> None:
    stack = torch.tensor([[2.0], [1.0]])
    assert elected_mean(stack, [-1, 1]).item() == -2.0
    assert elected_mean(stack, [-1, 1], weigh_votes=False).item() == pytest.approx((-2 + 1) / 2)


@pytest.mark.parametrize(("divisor", "expected"), [("count", 1.25), ("weights", 2.5 / 1.5), ("one", 2.5)])
def test_the_divisor_is_the_count_the_weights_or_none(divisor: Any, expected: float) -> None:
    stack = torch.tensor([[1.0], [3.0], [-1.0]])
    assert elected_mean(stack, [1.0, 0.5, 1.0], divisor=divisor).item() == pytest.approx(expected)


@pytest.mark.parametrize("divisor", ["count", "weights"])
def test_who_leaves_an_element_alone_does_not_dilute_the_mean(divisor: Any) -> None:
    stack = torch.tensor([[4.0, 1.0], [0.0, 3.0]])
    assert elected_mean(stack, [1, 1], divisor=divisor).tolist() == [4.0, 2.0]


def test_sums_are_made_in_float64_and_rounded_once() -> None:
    stack = torch.tensor([[1e8], [1.0], [-1e8]])
    assert weighted_sum(stack, [1, 1, 1]).item() == 1.0
    assert elected_mean(stack, [1, 1, 1]).item() == pytest.approx((1e8 + 1) / 2)


# ------------------------------------------------------------------------------------------- what every method promises


@given(SHAPES, st.lists(WEIGHTS, min_size=1, max_size=4), st.sampled_from(SUMS), st.integers(0, 99))
def test_a_density_of_one_is_the_weighted_sum(
    shape: tuple[int, ...], weights: list[float], method: Any, seed: int
) -> None:
    changes = [noise(*shape, seed=seed + n) for n in range(len(weights))]
    expected = sum(w * change.double() for w, change in zip(weights, changes, strict=True))
    assert close(combined(method(density=1.0), *changes, weights=weights), torch.as_tensor(expected))


@given(SHAPES, st.lists(WEIGHTS, min_size=1, max_size=4), st.sampled_from(MEANS), st.integers(0, 99))
def test_a_density_of_one_leaves_the_election_alone(
    shape: tuple[int, ...], weights: list[float], method: Any, seed: int
) -> None:
    changes = [noise(*shape, seed=seed + n) for n in range(len(weights))]
    found = combined(method(density=1.0, normalize=False), *changes, weights=weights).double()
    weighted = torch.stack([w * change.double() for w, change in zip(weights, changes, strict=True)])
    larger = torch.maximum(weighted.clamp(min=0).sum(0), -weighted.clamp(max=0).sum(0))
    assert close(found.abs(), larger)
    assert bool((found.sign() == weighted.sum(0).sign()).all())


@given(SHAPES, st.sampled_from(THINNED), st.integers(0, 99))
def test_one_adapter_at_density_and_weight_one_stays_what_it_is(shape: tuple[int, ...], method: Any, seed: int) -> None:
    change = noise(*shape, seed=seed)
    assert torch.equal(combined(method(density=1.0), change), change)
    assert close(combined(method(density=1.0), change, weights=[-0.3]), -0.3 * change)


@given(st.permutations(range(4)), st.sampled_from([each for each in ALL if not each.ordered]))
def test_the_order_of_adapters_does_not_count(order: list[int], method: Any) -> None:
    made = method()
    changes, weights = [noise(6, 5, seed=n) for n in range(4)], [1.0, 0.5, -0.7, 0.3]
    whole = terms(changes, weights, (6, 5))
    moved = Terms(
        shape=(6, 5),
        changes=tuple(changes[n] for n in order),
        weights=tuple(weights[n] for n in order),
        seeds=tuple(whole.seeds[n] for n in order),
    )
    assert close(dense(made.combine(moved)), dense(made.combine(whole)))


@pytest.mark.parametrize("method", [each for each in ALL if not each.ordered])
def test_an_adapter_that_leaves_the_target_alone_changes_nothing(method: Any) -> None:
    low = [LowRank(noise(9, 2, seed=n), noise(2, 8, seed=9 + n), 0.5) for n in range(3)]
    absent = LowRank(torch.zeros(9, 0), torch.zeros(0, 8), 1.0)
    for basis in ("dense", "core", "knots"):
        made = method(basis=basis)
        expected = dense(made.combine(terms(low, [1.0, 0.4, -0.6], (9, 8))))
        assert float(expected.norm()) > 0.1
        assert close(dense(made.combine(terms([*low, absent], [1.0, 0.4, -0.6, 0.0], (9, 8)))), expected)
        assert close(dense(made.combine(terms([*low, absent], [1.0, 0.4, -0.6, 1.0], (9, 8)))), expected)


@pytest.mark.parametrize("method", ALL)
def test_no_change_at_all_stays_none(method: Any) -> None:
    absent = LowRank(torch.zeros(9, 0), torch.zeros(0, 8), 1.0)
    for basis in ("dense", "core", "knots"):
        found = dense(method(basis=basis).combine(terms([absent, absent], [1.0, 1.0], (9, 8))))
        assert found.shape == (9, 8)
        assert not found.any()


@pytest.mark.parametrize("method", ALL)
def test_the_changes_that_come_in_are_not_written_to(method: Any) -> None:
    changes = [noise(6, 5, seed=n) for n in range(2)]
    before = [change.clone() for change in changes]
    combined(method(), *changes, weights=[2.0, -1.0])
    assert all(torch.equal(one, other) for one, other in zip(changes, before, strict=True))


@pytest.mark.parametrize("method", [DareLinear, DellaLinear])
def test_what_is_dropped_of_an_adapter_does_not_depend_on_the_others(method: Any) -> None:
    changes = [noise(8, 30, seed=n) for n in range(3)]
    whole = terms(changes, [1.0, 1.0, 1.0], (8, 30))
    alone = [
        method().combine(Terms(shape=(8, 30), changes=(change,), weights=(1.0,), seeds=(seed,)))
        for change, seed in zip(changes, whole.seeds, strict=True)
    ]
    assert close(method().combine(whole), torch.stack(alone).sum(0))
    zeros = [(each == 0) for each in alone]
    assert not torch.equal(zeros[0], zeros[1])


@pytest.mark.parametrize("method", ALL)
def test_the_bytes_do_not_depend_on_the_number_of_threads(method: Any) -> None:
    changes = [noise(300, 290, seed=n) for n in range(2)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(combined(method(), *changes, weights=[1.0, 0.5]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("method", [DareLinear, DellaLinear])
def test_the_expectation_is_the_weighted_sum(method: Any) -> None:
    one, other = noise(3, 4, seed=1), noise(3, 4, seed=2)
    made, runs, least = method(), 3000, 0.5
    total = torch.zeros(3, 4, dtype=torch.float64)
    for seed in range(runs):
        given_in = Terms(shape=(3, 4), changes=(one, other), weights=(1.0, -0.5), seeds=(2 * seed, 2 * seed + 1))
        total += made.combine(given_in)
    deviation = ((one.square() + 0.25 * other.square()) * (1 / least - 1) / runs).sqrt()
    assert bool(((total / runs - (one - 0.5 * other)).abs() < 6 * deviation).all())
    assert float((one - 0.5 * other).norm()) > 1


@pytest.mark.parametrize("method", DRAWING)
def test_another_seed_drops_others(method: Any) -> None:
    change = noise(20, 20)
    found = [
        method().combine(Terms(shape=(20, 20), changes=(change,), weights=(1.0,), seeds=(seed,))) for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", [*THINNED])
def test_l1_gives_each_change_the_norm_that_it_had(method: Any) -> None:
    change = noise(20, 20)
    found = combined(method(density=0.4, rescale="l1", **({"epsilon": 0.1} if "della" in method.name else {})), change)
    assert float(found.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-5)
    assert int((found == 0).sum()) > 100


@pytest.mark.parametrize("method", THINNED)
def test_a_density_for_each_adapter_is_each_ones_own(method: Any) -> None:
    one, other = noise(30, 40, seed=1).abs(), noise(30, 40, seed=2).abs()
    made = method(density=(1.0, 0.5), normalize=False)
    given_in = terms([one, other], [1.0, 1.0], (30, 40))
    kept = ((made.combine(given_in) - one).abs() > 1e-6).double().mean()
    assert float(kept) == pytest.approx(0.5, abs=6 * math.sqrt(0.25 / 1200))
    with pytest.raises(UsageError, match="density lists 2 values for 3 adapters"):
        made.combine(terms([one, other, one], [1.0] * 3, (30, 40)))


@pytest.mark.parametrize("method", ALL)
def test_no_more_is_held_than_a_tensor_of_a_changes_size(method: Any) -> None:
    made, given_in = method(), terms([noise(400, 500, seed=n) for n in range(2)], [1.0, 0.5], (400, 500))
    stack = given_in.stack()
    with Watch() as watch:
        made.elements(stack, given_in)
    piece = len(stack) * PIECE * torch.float64.itemsize
    assert watch.largest <= max(stack[0].nbytes, piece) < stack[0].numel() * torch.int64.itemsize  # no index, no copy


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ALL)
def test_what_is_not_finite_is_refused_and_never_masked_away(method: Any, value: float) -> None:
    change = noise(5, 5)
    change[2, 3] = value
    with pytest.raises(NotFinite, match="NaN or infinity"):
        combined(method(), noise(5, 5, seed=1), change)


@pytest.mark.parametrize("method", ALL)
def test_it_works_in_inference_mode(method: Any) -> None:
    with torch.inference_mode():
        found = combined(method(), noise(5, 5, seed=1), noise(5, 5, seed=2))
    assert found.any()


@pytest.mark.parametrize("method", ALL)
def test_every_method_is_registered_and_made_of_its_own_parameters(method: Any, registry: Registry) -> None:
    found = registry.method(method.name)
    assert found is method
    assert found.made(method().parameters()) == method()
    assert set(found.made({"basis": "core"}).parameters()) >= {"basis"}


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("ties", {"density": 0}, "density is 0"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("ties", {"density": [0.5, -1]}, "density is -1"),
        ("ties", {"density": "0.5"}, "density is '0.5'"),
        ("ties", {"density": True}, "density is True"),
        ("ties", {"lambda": math.inf}, "lambda is inf"),
        ("ties", {"lambda": [1, 2]}, "lambda is"),
        ("ties", {"rescale": True}, "drops nothing at random"),
        ("ties", {"rescale": "l2"}, "rescale is 'l2'"),
        ("ties", {"normalize": "weights"}, "normalize is 'weights'"),
        ("ties", {"normalize": 1}, "normalize is 1"),
        ("ties", {"majority_sign_method": "sum"}, "majority_sign_method is 'sum'"),
        ("ties", {"election": "other"}, "election is 'other'"),
        ("ties", {"densty": 0.5}, "did you mean 'density'"),
        ("magnitude_prune", {"normalize": "count"}, "normalize is 'count'"),
        ("breadcrumbs", {"gamma": 1}, "gamma is 1"),
        ("breadcrumbs_ties", {"gamma": [-0.1]}, "gamma is -0.1"),
        ("della", {"density": 0.1, "epsilon": 0.1}, "probabilities from 0 to 0.2"),
        ("della_linear", {"density": [0.5, 0.95], "epsilon": 0.1}, "probabilities from 0.85 to 1.05"),
        ("della", {"density": [0.5, 0.6], "epsilon": [0.1, 0.1, 0.1]}, "lists 2 values for 3 adapters"),
        ("della", {"epsilon": -0.1}, "epsilon is -0.1"),
        ("sce", {"select_topk": 0}, "select_topk is 0"),
        ("sce", {"select_topk": [0.5, 0.5]}, "select_topk is"),
        ("nearswap", {"t": 0}, "t is 0"),
        ("nearswap", {"t": -1}, "t is -1"),
        ("nearswap", {"t": [1, 2]}, "t is"),
        ("nearswap", {"basis": "dence"}, "basis is 'dence'"),
        ("sce", {"basis": "svd"}, "basis is 'svd'"),
        ("ties", {"basis": ["core"]}, "basis is ('core',)"),
    ],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(
    name: str, parameters: dict[str, Any], told: str, registry: Registry
) -> None:
    with pytest.raises(UsageError) as caught:
        registry.method(name).made(parameters)
    assert told.lower() in str(caught.value).lower()
    assert caught.value.hint


def test_a_density_of_one_needs_no_room_for_epsilon() -> None:
    change = noise(4, 4)
    assert torch.equal(combined(Della(density=1.0, epsilon=0.4), change), change)


def test_weights_that_sum_to_zero_are_not_normalised() -> None:
    with pytest.raises(UsageError, match="sum to zero"):
        combined(DareLinear(normalize=True), noise(3, 3), noise(3, 3, seed=1), weights=[1.0, -1.0])
