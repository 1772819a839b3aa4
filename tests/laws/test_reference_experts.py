"""LoRA on a stack of experts against its formula, written out as loops over Python floats: never our own code again."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorahub.deltas.expert_lora import EXPERT_LORA, ExpertLoRA
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.stacks import COLUMNS, ROWS, stack, stacked_shape, unstack
from lorahub.errors import BaseMismatch, NotLocal

E, OUT, IN, R, SCALE = 3, 5, 4, 2, 0.7


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UP, DOWN = normal(E, OUT, R, seed=0), normal(E, R, IN, seed=1)


def reference(expert: int, row: int, col: int) -> float:
    """``scale * sum over r of up[e, row, r] * down[e, r, col]``."""
    return SCALE * sum(UP[expert, row, r].item() * DOWN[expert, r, col].item() for r in range(R))


@pytest.mark.parametrize("told", [True, False], ids=["told", "by shape"])
@pytest.mark.parametrize("transposed", [False, True], ids=["[E, out, in]", "[E, in, out]"])
def test_every_expert_gets_the_product_of_its_own_factors(transposed: bool, told: bool) -> None:
    weight = normal(E, IN, OUT, seed=2).double() if transposed else normal(E, OUT, IN, seed=2).double()
    change = ExpertLoRA(UP, DOWN, SCALE, transposed if told else None).delta(weight)
    assert change.shape == weight.shape
    assert (change.norm() / weight.norm()).item() > 1e-2
    for expert, row, col in itertools.product(range(E), range(OUT), range(IN)):
        at = (expert, col, row) if transposed else (expert, row, col)
        assert abs(change[at].item() - reference(expert, row, col)) <= 1e-14


def test_pefts_matrices_hold_one_expert_after_the_other_down_and_woven_up() -> None:
    down, up = stack(DOWN, ROWS), stack(UP, COLUMNS)
    assert (tuple(down.shape), tuple(up.shape)) == ((E * R, IN), (OUT, R * E))
    for expert, r in itertools.product(range(E), range(R)):
        assert all(down[expert * R + r, col].item() == DOWN[expert, r, col].item() for col in range(IN))
        assert all(up[row, r * E + expert].item() == UP[expert, row, r].item() for row in range(OUT))
    for matrix, way, whole in ((down, ROWS, DOWN), (up, COLUMNS, UP)):
        shape = stacked_shape(tuple(matrix.shape), way, E)
        assert shape == tuple(whole.shape)
        assert torch.equal(unstack(matrix, way, shape), whole)


@pytest.mark.parametrize(("shape", "experts"), [((7, 4), 3), ((4,), 2), ((2, 3, 4), 2), ((4, 4), 0)])
def test_a_matrix_that_does_not_divide_into_experts_has_no_shape_as_a_stack(
    shape: tuple[int, ...], experts: int
) -> None:
    assert stacked_shape(shape, ROWS, experts) is None


def test_a_square_stack_that_nobody_described_is_refused() -> None:
    square = ExpertLoRA(normal(E, IN, R, seed=3), DOWN, SCALE, None)
    with pytest.raises(BaseMismatch, match="cannot tell rows from columns"):
        square.delta(torch.zeros(E, IN, IN))
    with pytest.raises(NotLocal, match="which way round"):
        square.region(slice(None), slice(0, 2))
    assert square.shape() is None


@pytest.mark.parametrize("transposed", [False, True, None])
def test_a_weight_of_another_shape_is_refused(transposed: bool | None) -> None:
    delta = ExpertLoRA(UP, DOWN, SCALE, transposed)
    for shape in ((E + 1, OUT, IN), (E, OUT, IN + 1), (OUT, IN)):
        with pytest.raises(BaseMismatch, match="was given a weight"):
            delta.delta(torch.zeros(shape))


def test_factors_of_any_spelling_build_one_delta_on_the_parameter_they_name() -> None:
    refs = {
        name: TensorRef(key=f"experts.w1.{name}", shape=tuple(tensor.shape), dtype="F32")
        for name, tensor in (("down", DOWN), ("up", UP))
    }
    group = Group(module="experts", parameter="w1", kind="expert-lora", slots=refs, options={"scale": SCALE})
    (touch,) = EXPERT_LORA.touches(group)
    assert (touch.parameter, touch.dims, touch.rank, touch.additive) == ("w1", "experts out in", R, True)
    built = EXPERT_LORA.build(group, {"down": DOWN, "up": UP})
    assert built.keys() == {"w1"}
    assert built["w1"].shape() == (E, OUT, IN)
