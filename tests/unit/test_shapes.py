"""Shape patterns: products of trailing sizes, beside the names and numbers that the kinds' own tests use."""

from __future__ import annotations

import pytest

from lorahub.shapes import ShapeMisfit, instantiate, unify


@pytest.mark.parametrize("shape", [(5, 12), (5, 4, 3), (5, 3, 2, 2), (5, 12, 1, 1)])
@pytest.mark.parametrize("pattern", ["out *12", "out *%4", "out *%12"])
def test_trailing_sizes_may_have_a_product_or_a_multiple(pattern: str, shape: tuple[int, ...]) -> None:
    assert unify(pattern, shape, {}, name="weight") == {"out": 5}


@pytest.mark.parametrize(
    ("pattern", "shape", "said"),
    [
        ("out *12", (5, 4, 2), "sizes with product 12 were expected, with 8 found"),
        ("out *12", (5,), "sizes with product 12 were expected, with 1 found"),
        ("out *%8", (5, 4, 3), "a multiple of 8 was expected, 12 found"),
        ("out *%8", (5,), "a multiple of 8 was expected, 1 found"),
    ],
)
def test_another_product_is_a_misfit_that_names_both(pattern: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ShapeMisfit, match=said):
        unify(pattern, shape, {}, name="weight")


def test_a_product_stands_for_one_size_and_ones_for_as_many_as_the_kernel_has() -> None:
    assert instantiate("out *12", {"out": 5}) == (5, 12)
    assert instantiate("out r *1", {"out": 5, "r": 2, "k": (3, 3)}) == (5, 2, 1, 1)
