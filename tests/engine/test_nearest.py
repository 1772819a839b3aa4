"""Rounding once: against exact fractions, at and beside every sort of tie."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from lorahub.engine.rounding.nearest import nearest

SHORT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def stored(dtype):
    """Every finite number of a dtype, ascending."""
    width = dtype.itemsize
    codes = torch.arange(1 << (8 * width), dtype=torch.int32).to(torch.uint8 if width == 1 else torch.uint16)
    values = codes.view(dtype).double()
    return values[values.isfinite()].unique()


def by_fractions(value, grid):
    """How far the number of ``grid`` that is nearest to ``value`` is from it."""
    low, high = 0, len(grid) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if grid[middle] <= value else (low, middle)
    return min(abs(Fraction(grid[at]) - Fraction(value)) for at in (low, high))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_numbers_beside_ties_go_to_the_nearer_side_and_ties_to_even(dtype):
    grid = stored(dtype)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(grid) - 1, (2000,), generator=generator)
    low, high = grid[first], grid[first + 1]
    middle = (low + high) / 2
    for nudge in (-1, 0, 1):  # one unit of float64, which float32 cannot tell from the tie
        beside = [math.nextafter(each, nudge * math.inf) if nudge else each for each in middle.tolist()]
        values = torch.tensor(beside, dtype=torch.float64)
        found = nearest(values, dtype).double()
        if nudge:
            assert torch.equal(found, high if nudge > 0 else low)
        else:
            assert ((found == low) | (found == high)).all()
            even = nearest(values, dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16) & 1
            assert not even.any()


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_random_numbers_go_to_the_nearest_as_fractions_tell(dtype):
    grid = stored(dtype).tolist()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    for value, found in zip(values.tolist(), nearest(values, dtype).double().tolist(), strict=True):
        assert abs(Fraction(found) - Fraction(value)) == by_fractions(value, grid)


def test_pytorch_itself_rounds_twice():
    value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1
    assert nearest(value, torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_no_number_or_too_large_stays_so(dtype):
    odd = [math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0, -0.0, 1e-300, -1e-300]
    values = torch.tensor(odd, dtype=torch.float64)
    found = nearest(values, dtype)
    assert found[0].isnan()
    assert found[1:5].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert found[5:].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert found[5:].signbit().tolist() == [False, True, False, True]


def test_other_dtypes_are_converted_as_they_are():
    values = torch.randn(64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nearest(values, torch.bfloat16), values.bfloat16())
    assert torch.equal(nearest(values.double(), torch.float32), values)
    assert nearest(values, torch.float32) is values
