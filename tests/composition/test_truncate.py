"""Low-rank changes cut to a budget, dense ones factorised, and ranks shared out: against dense float64 SVDs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lorahub.composition.algebra.budgeting import Spectrum, ranks_for_error, ranks_for_parameters
from lorahub.composition.algebra.factorise import factorise
from lorahub.composition.algebra.truncate import Budget, norm, singular_values, truncate
from lorahub.errors import NotFinite, UsageError

SCALE = 0.37
SHAPES = [(60, 40, 8), (40, 60, 8), (20, 30, 50), (12, 64, 20), (64, 12, 20)]


def factors(out: int, inner: int, rank: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)


def dense(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return SCALE * (up.double() @ down.double())


def best_error(matrix: torch.Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    return math.sqrt(float(squares[rank:].sum() / squares.sum()))


def measured(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    return float((matrix.double() - up @ down).norm() / matrix.double().norm())


@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_singular_values_and_norm_are_those_of_the_product(out: int, inner: int, rank: int) -> None:
    up, down = factors(out, inner, rank)
    expected = torch.linalg.svdvals(dense(up, down))
    found = singular_values(up, down, SCALE)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected[: len(found)], rtol=0, atol=1e-13 * float(expected[0]))
    assert float(expected[len(found) :].sum()) < 1e-10
    assert norm(up, down, SCALE) == pytest.approx(float(expected.norm()), rel=1e-12)
    assert norm(up, down, -SCALE) == norm(up, down, SCALE)


@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_a_rank_gives_the_best_approximation_there_is(out: int, inner: int, rank: int) -> None:
    up, down = factors(out, inner, rank)
    matrix = dense(up, down)
    cut = truncate(up, down, SCALE, Budget(rank=3))
    assert (cut.rank, tuple(cut.up.shape), tuple(cut.down.shape)) == (3, (out, 3), (3, inner))
    assert measured(matrix, cut.up, cut.down) == pytest.approx(best_error(matrix, 3), rel=1e-10)
    assert cut.error == pytest.approx(best_error(matrix, 3), rel=1e-10)
    assert cut.energy == pytest.approx(1 - cut.error**2)
    assert best_error(matrix, 3) > 1e-2


def test_the_full_rank_gives_the_change_itself() -> None:
    up, down = factors(60, 40, 8)
    whole = truncate(up, down, SCALE, Budget(rank=8))
    assert whole.error == 0
    assert measured(dense(up, down), whole.up, whole.down) < 1e-14
    assert truncate(up, down, SCALE, Budget(rank=30)).rank == 8


def test_both_factors_carry_the_roots_of_the_singular_values() -> None:
    cut = truncate(*factors(60, 40, 8), SCALE, Budget(rank=4))
    assert torch.allclose(cut.up.norm(dim=0) ** 2, cut.values)
    assert torch.allclose(cut.down.norm(dim=1) ** 2, cut.values)
    leading = cut.up.gather(0, cut.up.abs().argmax(0, keepdim=True))
    assert bool((leading > 0).all())


def test_an_error_is_met_by_the_smallest_rank() -> None:
    up, down = factors(60, 40, 20)
    cut = truncate(up, down, SCALE, Budget(error=0.3))
    matrix = dense(up, down)
    assert best_error(matrix, cut.rank) <= 0.3 < best_error(matrix, cut.rank - 1)


def test_an_energy_is_met_by_the_smallest_rank_and_a_rank_bounds_it() -> None:
    up, down = factors(60, 40, 20)
    matrix = dense(up, down)
    cut = truncate(up, down, SCALE, Budget(energy=0.8))
    assert 1 - best_error(matrix, cut.rank) ** 2 >= 0.8 > 1 - best_error(matrix, cut.rank - 1) ** 2
    assert truncate(up, down, SCALE, Budget(energy=0.8, rank=2)).rank == 2
    assert truncate(up, down, SCALE, Budget(energy=0.8, error=0.1)).rank > cut.rank


def test_rank_deficient_factors_keep_only_what_counts() -> None:
    up, down = factors(60, 40, 5)
    twice = torch.cat([up, up], dim=1), torch.cat([down, down])
    assert truncate(*twice, SCALE, Budget(rank=10)).rank == 5
    assert truncate(*twice, SCALE, Budget(error=0.0)).rank == 5
    assert truncate(*twice, SCALE, Budget(energy=1.0)).rank == 5


@pytest.mark.parametrize("value", [1.0, 2.0, 20.0])
def test_a_ratio_keeps_what_is_large_beside_the_largest(value: float) -> None:
    up, down = factors(60, 40, 20)
    expected = [float(s) for s in torch.linalg.svdvals(dense(up, down))[:20]]
    count = sum(1 for s in expected if s >= expected[0] / value * (1 - 1e-12))
    assert truncate(up, down, SCALE, Budget(ratio=value)).rank == count


def test_a_cumulative_share_is_met_by_the_smallest_rank() -> None:
    up, down = factors(60, 40, 20)
    values = [float(s) for s in torch.linalg.svdvals(dense(up, down))[:20]]
    count = next(k for k in range(1, 21) if sum(values[:k]) >= 0.7 * sum(values))
    assert truncate(up, down, SCALE, Budget(cumulative=0.7)).rank == count
    assert truncate(up, down, SCALE, Budget(cumulative=1.0)).rank == 20


def test_cutting_again_is_cutting_once() -> None:
    up, down = factors(60, 40, 20)
    once, again = truncate(up, down, SCALE, Budget(rank=3)), truncate(up, down, SCALE, Budget(rank=9)).cut(3)
    assert torch.allclose(once.up, again.up, rtol=0, atol=1e-13)
    assert torch.allclose(once.down, again.down, rtol=0, atol=1e-13)
    assert again.error == pytest.approx(once.error, rel=1e-12)


def test_no_change_stays_no_change() -> None:
    cut = truncate(torch.zeros(6, 2), torch.ones(2, 5), 1.0, Budget(energy=0.9))
    assert (cut.rank, cut.error, cut.norm) == (1, 0.0, 0.0)
    assert not cut.up.any()
    dense_cut = factorise(torch.zeros(6, 5), Budget(error=0.1))
    assert (tuple(dense_cut.up.shape), tuple(dense_cut.down.shape), dense_cut.error) == ((6, 1), (1, 5), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"error": 1.0},
        {"error": -0.1},
        {"ratio": 0.5},
        {"ratio": math.inf},
        {"cumulative": 0.0},
        {"energy": math.nan},
    ],
)
def test_a_budget_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Budget(**wrong)  # type: ignore[arg-type]  # ranks are ints


def test_infinite_factors_are_refused() -> None:
    up, down = factors(6, 5, 2)
    up[0, 0] = math.inf
    with pytest.raises(NotFinite):
        truncate(up, down, 1.0, Budget(rank=1))
    with pytest.raises(NotFinite):
        factorise(up @ down, Budget(rank=1))


def spectra_of(kind: str, out: int, inner: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(out, inner, generator=generator)
    up, down = factors(out, inner, 12, seed=4)
    return {
        "noise": noise,
        "low rank": up @ down,
        "low rank in noise": up @ down + 0.05 * noise,
        "decaying": noise * torch.logspace(0, -3, inner),
    }[kind]


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (600, 660), (660, 600)])
@pytest.mark.parametrize("kind", ["noise", "low rank", "low rank in noise", "decaying"])
@pytest.mark.parametrize("budget", [Budget(rank=8), Budget(error=0.6), Budget(energy=0.5), Budget(rank=40, error=0.3)])
def test_a_dense_difference_is_factorised_as_well_as_by_a_dense_svd(
    shape: tuple[int, int], kind: str, budget: Budget
) -> None:
    matrix = spectra_of(kind, *shape)
    found = factorise(matrix, budget)
    best = best_error(matrix, found.rank)
    assert found.error == pytest.approx(measured(matrix, found.up, found.down), rel=1e-9, abs=1e-9)
    assert found.error <= best * 1.001 + 1e-6
    if budget.rank and not budget.demands:
        assert found.rank == budget.rank
    elif found.rank != budget.rank:
        wanted = budget.error or math.sqrt(1 - (budget.energy or 0))
        assert found.error <= wanted
        assert found.rank == 1 or best_error(matrix, found.rank - 1) > wanted * 0.999


def test_an_exactly_low_rank_difference_comes_back_whole() -> None:
    matrix = spectra_of("low rank", 600, 660)
    found = factorise(matrix, Budget(rank=64))
    assert found.rank == 12
    assert measured(matrix, found.up, found.down) < 1e-6


@pytest.mark.parametrize("shape", [(90, 70), (600, 660)])
def test_the_bytes_do_not_depend_on_the_number_of_threads(shape: tuple[int, int]) -> None:
    matrix = spectra_of("low rank in noise", *shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            dense_cut, cut = factorise(matrix, Budget(rank=8)), truncate(*factors(*shape, 20), SCALE, Budget(rank=8))
            results.append((dense_cut.up, dense_cut.down, cut.up, cut.down))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bfloat16_is_factorised_from_its_exact_values() -> None:
    matrix = spectra_of("decaying", 70, 90).bfloat16()
    found = factorise(matrix, Budget(rank=8))
    assert found.error == pytest.approx(best_error(matrix, 8), rel=1e-9)


SPECTRA = ([5.0, 4.0, 0.1], [3.0, 2.9], [1.0, 0.5, 0.4, 0.3])


def shared(costs: tuple[int, ...] = (1, 1, 1)) -> list[Spectrum]:
    return [
        Spectrum(values=torch.tensor(values, dtype=torch.float64), cost=cost)
        for values, cost in zip(SPECTRA, costs, strict=True)
    ]


def choices() -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(values) + 1) for values in SPECTRA))


def kept(ranks: tuple[int, ...]) -> float:
    return sum(value**2 for values, rank in zip(SPECTRA, ranks, strict=True) for value in values[:rank])


@pytest.mark.parametrize("error", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_water_filling_reaches_an_error_with_the_fewest_values_of_all_choices(error: float) -> None:
    total = kept(tuple(map(len, SPECTRA)))
    found = ranks_for_error(shared(), error**2)
    assert total - kept(tuple(found)) <= error**2 * total + 1e-12
    fewest = min(sum(ranks) for ranks in choices() if total - kept(ranks) <= error**2 * total + 1e-12)
    assert sum(found) == fewest


@pytest.mark.parametrize("parameters", [1, 2, 3, 5, 9])
def test_as_many_parameters_keep_the_most_energy_of_all_choices(parameters: int) -> None:
    found = ranks_for_parameters(shared(), parameters)
    assert sum(found) <= parameters
    assert kept(tuple(found)) == pytest.approx(max(kept(ranks) for ranks in choices() if sum(ranks) <= parameters))


def test_costly_targets_get_fewer_parameters() -> None:
    assert ranks_for_parameters(shared((1000, 1, 1)), 100) == [0, 2, 4]
    with pytest.raises(UsageError):
        ranks_for_parameters(shared((1000, 500, 300)), 100)


def test_energy_that_is_not_among_the_values_counts_as_lost() -> None:
    spectra = [Spectrum(values=torch.tensor([2.0, 1.0]).double(), cost=1, missing=5.0)]
    assert ranks_for_error(spectra, 0.5) == [2]
    assert ranks_for_error(spectra, 0.7) == [1]
