"""Codes times scales: values out, values in, scales kept where they reach."""

from __future__ import annotations

import pytest
import torch

from lorahub.storages.grid import Grid


def integers(rows: int = 4, cols: int = 6, block: tuple[int, int] = (1, 3), zero: bool = False) -> Grid:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, cols), generator=generator, dtype=torch.int8)
    shape = (-(-rows // block[0]), -(-cols // block[1]))
    scale = torch.rand(shape, generator=generator) + 0.5
    zeros = torch.randint(-3, 4, shape, generator=generator, dtype=torch.int8) if zero else None
    return Grid(codes=codes, scale=scale, block=block, low=-127, high=127, zero=zeros)


def by_loop(grid: Grid) -> torch.Tensor:
    values = torch.empty(grid.codes.shape, dtype=torch.float64)
    for row in range(values.shape[0]):
        for col in range(values.shape[1]):
            at = row // grid.block[0], col // grid.block[1]
            zero = 0 if grid.zero is None else int(grid.zero[at])
            values[row, col] = (float(grid.codes[row, col]) - zero) * float(grid.scale[at]) / grid.unit
    return values


@pytest.mark.parametrize("block", [(1, 3), (2, 6), (3, 4), (4, 6), (1, 1)])
@pytest.mark.parametrize("zero", [False, True])
def test_values_are_codes_times_the_scale_of_their_block(block, zero):
    grid = integers(block=block, zero=zero)
    torch.testing.assert_close(grid.values().double(), by_loop(grid), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("block", [(1, 3), (3, 4)])
def test_what_is_on_the_grid_keeps_its_codes_and_scales(block, zero):
    grid = integers(block=block, zero=zero)
    again = grid.requantised(grid.values())
    assert torch.equal(again.codes, grid.codes)
    assert torch.equal(again.scale, grid.scale)


def test_a_block_keeps_its_scale_until_a_value_is_out_of_reach():
    grid = integers()
    values = grid.values()
    values[1, 4] = 3 * 127 * float(grid.scale[1, 1])
    again = grid.requantised(values)
    grown = torch.zeros_like(grid.scale, dtype=torch.bool)
    grown[1, 1] = True
    assert torch.equal(again.scale != grid.scale, grown)
    assert again.codes[1, 4] == 127
    assert again.values()[1, 4] == pytest.approx(float(values[1, 4]), rel=1e-6)
    others = ~grown.repeat_interleave(3, 1)
    assert torch.equal(again.codes[others], grid.codes[others])


def test_no_value_is_further_from_the_grid_than_half_a_step():
    grid = integers()
    values = grid.values() * torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) * 4
    again = grid.requantised(values)
    steps = again.scale.repeat_interleave(3, 1)
    assert ((again.values() - values).abs() <= steps / 2 * 1.0001).all()


def test_eight_bit_floats_are_rounded_to_the_nearest_and_never_to_infinity():
    codes = torch.zeros(2, 4, dtype=torch.float8_e4m3fn)
    grid = Grid(codes=codes, scale=torch.ones(2, 1), block=(1, 4), low=-448, high=448)
    values = torch.tensor([[1.06, -447.0, 10_000.0, 0.0], [3.0, -5.0, 0.1, 0.0]])
    again = grid.requantised(values)
    assert again.scale.flatten().tolist() == [pytest.approx(10_000 / 448), 1.0]
    assert torch.isfinite(again.values()).all()
    assert again.values()[0, 2] == pytest.approx(10_000.0)
    assert again.values()[1].tolist() == [3.0, -5.0, 0.1015625, 0.0]


def test_a_block_of_zeros_without_a_scale_takes_one_when_it_needs_it():
    grid = Grid(
        codes=torch.zeros(2, 3, dtype=torch.int8), scale=torch.zeros(2, 1), block=(1, 3), low=-127, high=127, unit=127.0
    )
    assert torch.equal(grid.requantised(torch.zeros(2, 3)).values(), torch.zeros(2, 3))
    values = torch.tensor([[0.0, 0.0, 0.0], [1.27, -0.5, 0.01]])
    again = grid.requantised(values)
    assert again.scale.flatten().tolist() == [0.0, pytest.approx(1.27)]
    assert again.codes[1].tolist() == [127, -50, 1]


def test_a_copy_is_not_the_memory_of_the_grid():
    grid = integers(zero=True)
    copy, before = grid.copy(), grid.values()
    grid.codes.zero_()
    grid.scale.zero_()
    assert torch.equal(copy.values(), before)
    assert copy.mark() != grid.mark()
    assert copy.nbytes == 24 + 8 * 4 + 8
