"""Element-wise composition methods against mergekit, PEFT, and the papers' formulas as plain loops in float64.

The peers draw from PyTorch's global generator; here ``torch.bernoulli`` is replaced, for the peer alone, by one that
draws for each adapter from the generator its seed gives, so that masks can be compared and not only their share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from mergekit.merge_methods import registry as mergekit
from mergekit.merge_methods.base import TensorGroup
from peft.utils import merge_utils as peft

from lorahub.composition.algebra.coordinates import enter
from lorahub.composition.method import Change, Method, Terms
from lorahub.composition.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from lorahub.composition.methods.dare import DareLinear, DareTies
from lorahub.composition.methods.della import Della, DellaLinear
from lorahub.composition.methods.magnitude_prune import MagnitudePrune
from lorahub.composition.methods.nearswap import Nearswap
from lorahub.composition.methods.sce import Sce
from lorahub.composition.methods.ties import Ties
from lorahub.deltas.delta import LowRank

SHAPES = [(7, 5), (3, 11), (1, 6), (6, 1), (13,)]
WEIGHTS = (1.0, 0.6, -0.35)
SEEDS = (11, 22, 33)

Loop = Callable[[Sequence[Sequence[float]], Sequence[float], int, "Draws"], list[float]]
"""Flat changes, weights, the length of a row, what is drawn for each adapter -> the flat result."""
Draws = list[list[float]]


def base(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def terms(shape: tuple[int, ...], *, weights: Sequence[float] = WEIGHTS, low: bool = False) -> Terms:
    """Adapters of which the last two read from one another's space, so that signs agree and conflict."""
    generator = torch.Generator().manual_seed(len(shape) * 100 + shape[0])
    changes: list[Change] = []
    for rank in range(1, len(weights) + 1):
        if low:
            up, down = (torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
            changes.append(LowRank(up, down, 0.5))
        else:
            changes.append(0.4 * torch.randn(shape, generator=generator))
    return Terms(shape=shape, changes=tuple(changes), weights=tuple(weights), seeds=SEEDS[: len(weights)])


def without_last(whole: Terms) -> Terms:
    return Terms(shape=whole.shape, changes=whole.changes[:-1], weights=whole.weights[:-1], seeds=whole.seeds[:-1])


def result(method: Method, given: Terms) -> torch.Tensor:
    found = method.combine(given)
    if isinstance(found, LowRank):
        return found.scale * (found.up.double() @ found.down.double())
    return found.double()


def agree(method: Method, given: Terms, expected: torch.Tensor, *, drop: bool = True) -> None:
    """Equal to float32's rounding, of a size that matters, and not what comes out without the last adapter."""
    found = result(method, given)
    size = float(expected.norm())
    assert tuple(found.shape) == given.shape
    assert size / float(base(given.shape).norm()) > 1e-2
    assert float((found - expected).norm()) <= 1e-6 * size
    if drop:
        assert float((result(method, without_last(given)) - expected).norm()) > 1e-3 * size


# --------------------------------------------------------------------------------------- the papers, as plain loops


def kept(change: Sequence[float], density: float) -> int:
    return max(1, math.floor(Fraction(str(density)) * len(change)))


def descending(change: Sequence[float]) -> list[int]:
    return sorted(range(len(change)), key=lambda cell: (-abs(change[cell]), cell))


def trimmed(change: Sequence[float], density: float) -> list[float]:
    chosen = set(descending(change)[: kept(change, density)])
    return [value if cell in chosen else 0.0 for cell, value in enumerate(change)]


def crumbs(change: Sequence[float], density: float, gamma: float) -> list[float]:
    outliers = math.floor(gamma * len(change))
    chosen = set(descending(change)[outliers : outliers + kept(change, density)])
    return [value if cell in chosen else 0.0 for cell, value in enumerate(change)]


def dropped(change: Sequence[float], density: float, draws: Sequence[float]) -> list[float]:
    return [value / density if draw < density else 0.0 for value, draw in zip(change, draws, strict=True)]


def sampled(change: Sequence[float], density: float, epsilon: float, row: int, draws: Sequence[float]) -> list[float]:
    made = []
    for start in range(0, len(change), row):
        part = change[start : start + row]
        by_size = sorted(range(row), key=lambda cell: (abs(part[cell]), cell))
        for cell, value in enumerate(part):
            rank = by_size.index(cell) / (row - 1) if row > 1 else 0.5
            chance = density - epsilon + 2 * epsilon * rank
            made.append(value / chance if draws[start + cell] < chance else 0.0)
    return made


def summed(changes: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    return [sum(w * value for w, value in zip(weights, cell, strict=True)) for cell in zip(*changes, strict=True)]


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def disjoint(changes: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    made = []
    for cell in zip(*changes, strict=True):
        weighted = [w * value for w, value in zip(weights, cell, strict=True)]
        elected = sign(sum(weighted))
        agreeing = [value for value in weighted if elected and sign(value) == elected]
        made.append(sum(agreeing) / max(1, len(agreeing)))
    return made


def sce(changes: Sequence[Sequence[float]], weights: Sequence[float], share: float) -> list[float]:
    weighted = [[w * value for value in change] for w, change in zip(weights, changes, strict=True)]
    spread = []
    for cell in zip(*weighted, strict=True):
        mean = sum(cell) / len(cell)
        spread.append(sum((value - mean) ** 2 for value in cell) / len(cell))
    chosen = set(descending(spread)[: kept(spread, share)])
    selected = [[value if cell in chosen else 0.0 for cell, value in enumerate(change)] for change in weighted]
    squares = [sum(value**2 for value in change) / len(change) for change in selected]
    shares = [each / sum(squares) for each in squares]
    made = []
    for cell in zip(*selected, strict=True):
        elected = sign(sum(cell))
        agreeing = [(value, s) for value, s in zip(cell, shares, strict=True) if value and sign(value) == elected]
        made.append(sum(v * s for v, s in agreeing) / sum(s for _, s in agreeing) if agreeing else 0.0)
    return made


def nearswap(changes: Sequence[Sequence[float]], weights: Sequence[float], t: float) -> list[float]:
    made = []
    for first, second in zip(*changes, strict=True):
        a, b = first * weights[0], second * weights[1]
        share = min(1.0, t / abs(a - b)) if a != b else 1.0
        made.append((1 - share) * a + share * b)
    return made


LOOPS: Mapping[str, tuple[Method, Loop]] = {
    "magnitude_prune": (
        MagnitudePrune(density=0.4, lambda_=1.5),
        lambda cs, ws, _row, _d: [1.5 * v for v in summed([trimmed(c, 0.4) for c in cs], ws)],
    ),
    "ties": (Ties(density=0.45), lambda cs, ws, _row, _d: disjoint([trimmed(c, 0.45) for c in cs], ws)),
    "ties, lambda": (
        Ties(density=0.45, lambda_=0.7),
        lambda cs, ws, _row, _d: [0.7 * v for v in disjoint([trimmed(c, 0.45) for c in cs], ws)],
    ),
    "dare_linear": (
        DareLinear(density=0.6),
        lambda cs, ws, _row, ds: summed([dropped(c, 0.6, d) for c, d in zip(cs, ds, strict=True)], ws),
    ),
    "dare_ties": (
        DareTies(density=0.6),
        lambda cs, ws, _row, ds: disjoint([dropped(c, 0.6, d) for c, d in zip(cs, ds, strict=True)], ws),
    ),
    "della": (
        Della(density=0.6, epsilon=0.3),
        lambda cs, ws, row, ds: disjoint([sampled(c, 0.6, 0.3, row, d) for c, d in zip(cs, ds, strict=True)], ws),
    ),
    "della_linear": (
        DellaLinear(density=0.6, epsilon=0.3),
        lambda cs, ws, row, ds: summed([sampled(c, 0.6, 0.3, row, d) for c, d in zip(cs, ds, strict=True)], ws),
    ),
    "breadcrumbs": (
        Breadcrumbs(density=0.4, gamma=0.2, lambda_=0.3),
        lambda cs, ws, _row, _d: [0.3 * v for v in summed([crumbs(c, 0.4, 0.2) for c in cs], ws)],
    ),
    "breadcrumbs_ties": (
        BreadcrumbsTies(density=0.4, gamma=0.2),
        lambda cs, ws, _row, _d: disjoint([crumbs(c, 0.4, 0.2) for c in cs], ws),
    ),
    "sce": (Sce(select_topk=0.6), lambda cs, ws, _row, _d: sce(cs, ws, 0.6)),
    "sce, all": (Sce(), lambda cs, ws, _row, _d: sce(cs, ws, 1.0)),
    "nearswap": (Nearswap(t=0.2), lambda cs, ws, _row, _d: nearswap(cs, ws, 0.2)),
}


def looped(loop: Loop, stack: torch.Tensor, given: Terms) -> torch.Tensor:
    """A loop over the elements of a stack, whatever basis it is in."""
    shape = stack.shape[1:]
    draws = [torch.rand(shape, generator=given.draw(number)).flatten().tolist() for number in range(len(stack))]
    flat = stack.double().flatten(1).tolist()
    return torch.tensor(loop(flat, given.weights, shape[-1], draws), dtype=torch.float64).reshape(shape)


def for_method(method: Method, shape: tuple[int, ...], *, low: bool = False) -> Terms:
    most = type(method).count[1]
    return terms(shape, weights=WEIGHTS[:most] if most else WEIGHTS, low=low)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_every_method_is_its_papers_formula(name: str, shape: tuple[int, ...]) -> None:
    method, loop = LOOPS[name]
    given = for_method(method, shape)
    agree(method, given, looped(loop, given.stack(), given), drop=len(given.weights) > 2 and max(shape) > 6)


@pytest.mark.parametrize("basis", ["core", "knots"])
@pytest.mark.parametrize("name", LOOPS)
def test_every_method_is_the_same_formula_in_other_coordinates(name: str, basis: Any) -> None:
    plain, loop = LOOPS[name]
    method = type(plain).made(plain.parameters() | {"basis": basis})
    given = for_method(method, (17, 12), low=True)
    coordinates = enter(basis, given)
    back = coordinates.back(looped(loop, coordinates.stack, given))
    assert isinstance(back, LowRank)
    assert isinstance(method.combine(given), LowRank)
    agree(method, given, back.scale * (back.up @ back.down), drop=len(given.weights) > 2)
    assert float((result(method, given) - result(plain, given)).norm()) > 1e-2 * float(result(plain, given).norm())


# ---------------------------------------------------------------------------------------------------------- the peers


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Terms], None]:
    """Let the peers' next draws be those of these terms, one adapter after the other."""

    def replace(given: Terms) -> None:
        generators: Iterator[torch.Generator] = (given.draw(number) for number in range(len(given.changes)))

        def bernoulli(chances: torch.Tensor) -> torch.Tensor:
            draws = torch.rand(chances.shape, generator=next(generators))
            return (draws < chances).to(chances.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return replace


def by_mergekit(name: str, given: Terms, shared: Mapping[str, Any], each: Mapping[str, Any]) -> torch.Tensor:
    """mergekit's method on a base and models that differ from it by the changes, all in float64."""
    start = base(given.shape)
    models = [start + change for change in given.stack().double()]
    group = TensorGroup.from_tensors([start, *models], base_index=0)
    numbers = range(1, len(models) + 1)
    listed = {key: dict.fromkeys(numbers, value) for key, value in each.items()}
    weight = dict(zip(numbers, given.weights, strict=True))
    defaults = {"int8_mask": False, "lambda": 1.0}
    merged = mergekit.get(name).merge_group(group, weight=weight, **listed, **{**defaults, **shared})
    return merged - start


MERGEKIT: Mapping[str, tuple[Method, str, dict[str, Any], dict[str, Any]]] = {
    "ties": (
        Ties(density=0.3, election="mergekit", normalize=True),
        "ties",
        {"normalize": True, "rescale": False},
        {"density": 0.3},
    ),
    "ties, sums": (
        Ties(density=0.3, election="mergekit", normalize=False, lambda_=0.8),
        "ties",
        {"normalize": False, "rescale": False, "lambda": 0.8},
        {"density": 0.3},
    ),
    "ties, rescaled": (
        Ties(density=0.3, election="mergekit", normalize=True, rescale="l1"),
        "ties",
        {"normalize": True, "rescale": True},
        {"density": 0.3},
    ),
    "dare_linear": (
        DareLinear(density=0.6, rescale="l1"),
        "dare_linear",
        {"normalize": False, "rescale": True},
        {"density": 0.6},
    ),
    "dare_linear, normalized": (
        DareLinear(density=0.6, rescale=False, normalize=True),
        "dare_linear",
        {"normalize": True, "rescale": False},
        {"density": 0.6},
    ),
    "dare_ties": (
        DareTies(density=0.6, rescale="l1", election="mergekit", normalize=False),
        "dare_ties",
        {"normalize": False, "rescale": True},
        {"density": 0.6},
    ),
    "della": (
        Della(density=0.6, epsilon=0.25, rescale="l1", election="mergekit", normalize=True),
        "della",
        {"normalize": True, "rescale": True},
        {"density": 0.6, "epsilon": 0.25},
    ),
    "della_linear": (
        DellaLinear(density=0.6, epsilon=0.25, rescale="l1", lambda_=1.1),
        "della_linear",
        {"normalize": False, "rescale": True, "lambda": 1.1},
        {"density": 0.6, "epsilon": 0.25},
    ),
    "breadcrumbs": (
        Breadcrumbs(density=0.5, gamma=0.1),
        "breadcrumbs",
        {"normalize": False, "rescale": False},
        {"density": 0.5, "gamma": 0.1},
    ),
    "breadcrumbs, no room": (
        Breadcrumbs(density=0.95, gamma=0.2),
        "breadcrumbs",
        {"normalize": False, "rescale": False},
        {"density": 0.95, "gamma": 0.2},
    ),
    "breadcrumbs_ties": (
        BreadcrumbsTies(density=0.5, gamma=0.1, election="mergekit", normalize=False),
        "breadcrumbs_ties",
        {"normalize": False, "rescale": False},
        {"density": 0.5, "gamma": 0.1},
    ),
}


@pytest.mark.parametrize("shape", [(9, 14), (40,)], ids=str)
@pytest.mark.parametrize("name", MERGEKIT)
def test_mergekits_result_is_a_choice_of_parameters(
    name: str, shape: tuple[int, ...], drawn: Callable[[Terms], None]
) -> None:
    method, theirs, shared, each = MERGEKIT[name]
    given = terms(shape)
    drawn(given)
    agree(method, given, by_mergekit(theirs, given, shared, each))


def by_function(name: str, given: Terms, **parameters: Any) -> torch.Tensor:
    """mergekit's methods that take no weights, on changes that are already at their weight."""
    start = base(given.shape)
    models = [start + w * change for w, change in zip(given.weights, given.stack().double(), strict=True)]
    if name == "nearswap":
        (merged,) = mergekit.get(name)([TensorGroup.from_tensors(models, base_index=0)], parameters=parameters)
    else:
        group = TensorGroup.from_tensors([start, *models], base_index=0)
        (merged,) = mergekit.get(name)([group], parameters=parameters)
    return merged - start


@pytest.mark.parametrize("shape", [(9, 14), (40,)], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_sce_is_mergekits(share: float, shape: tuple[int, ...]) -> None:
    given = terms(shape, weights=(1.0, 0.6, 0.8))
    agree(Sce(select_topk=share), given, by_function("sce", given, select_topk=share))


def test_sce_weighs_small_changes_as_large_ones_where_mergekit_weighs_them_alike() -> None:
    given = terms((9, 14), weights=(1.0, 0.6, 0.8))
    small = Terms(shape=given.shape, changes=given.changes, weights=(1e-4, 0.6e-4, 0.8e-4), seeds=given.seeds)
    expected = 1e-4 * result(Sce(), given)
    agree(Sce(), Terms(shape=given.shape, changes=given.changes, weights=given.weights, seeds=SEEDS), 1e4 * expected)
    assert float((result(Sce(), small) - expected).norm()) <= 1e-6 * float(expected.norm())
    assert float((by_function("sce", small) - expected).norm()) > 1e-2 * float(expected.norm())


@pytest.mark.parametrize("t", [0.01, 0.3, 5.0])
def test_nearswap_is_mergekits(t: float) -> None:
    given = terms((9, 14), weights=(1.0, 0.7))
    agree(Nearswap(t=t), given, by_function("nearswap", given, t=t), drop=False)
    other = Terms(shape=given.shape, changes=given.changes[::-1], weights=given.weights[::-1], seeds=SEEDS[:2])
    assert float((result(Nearswap(t=t), other) - result(Nearswap(t=t), given)).norm()) > 1e-3


PEFT: Mapping[str, tuple[Method, Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]]] = {
    "magnitude_prune": (MagnitudePrune(density=0.3), lambda cs, ws: peft.magnitude_prune(cs, ws, 0.3)),
    "ties": (Ties(density=0.3, election="peft"), lambda cs, ws: peft.ties(cs, ws, 0.3)),
    "ties, frequency": (
        Ties(density=0.8, election="peft", majority_sign_method="frequency"),
        lambda cs, ws: peft.ties(cs, ws, 0.8, "frequency"),
    ),
    "dare_linear": (DareLinear(density=0.6), lambda cs, ws: peft.dare_linear(cs, ws, 0.6)),
    "dare_ties": (DareTies(density=0.6, election="peft"), lambda cs, ws: peft.dare_ties(cs, ws, 0.6)),
    "dare_ties, frequency": (
        DareTies(density=0.6, election="peft", majority_sign_method="frequency"),
        lambda cs, ws: peft.dare_ties(cs, ws, 0.6, "frequency"),
    ),
}


@pytest.mark.parametrize("shape", [(9, 14), (40,)], ids=str)
@pytest.mark.parametrize("name", PEFT)
def test_pefts_result_is_a_choice_of_parameters(
    name: str, shape: tuple[int, ...], drawn: Callable[[Terms], None]
) -> None:
    method, theirs = PEFT[name]
    given = terms(shape)
    drawn(given)
    expected = theirs(list(given.stack().double()), torch.tensor(given.weights, dtype=torch.float64))
    agree(method, given, expected)


def test_the_peers_keep_the_same_share_with_their_own_draws() -> None:
    change = torch.ones(40_000)
    given = Terms(shape=(40_000,), changes=(change,), weights=(1.0,), seeds=(5,))
    torch.manual_seed(0)
    ours = float((result(DareLinear(density=0.3), given) != 0).double().mean())
    theirs = float((peft.dare_linear([change], torch.ones(1), 0.3) != 0).double().mean())
    six_sigma = 6 * math.sqrt(0.3 * 0.7 / 40_000)
    assert abs(ours - 0.3) < six_sigma
    assert abs(theirs - 0.3) < six_sigma
