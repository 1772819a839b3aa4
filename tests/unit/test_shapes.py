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
        ("*<5", (6, 7), "the smallest size must be 5"),
        ("*<5", (5, 4), "the smallest size must be 5"),
        ("*<5", (), "the smallest size must be 5"),
        (">7 in", (6, 5), "7 is the least, 6 found"),
    ],
)
def test_another_product_is_a_misfit_that_names_both(pattern: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ShapeMisfit, match=said):
        unify(pattern, shape, {}, name="weight")


def test_a_product_stands_for_one_size_and_ones_for_as_many_as_the_kernel_has() -> None:
    assert instantiate("out *12", {"out": 5}) == (5, 12)
    assert instantiate("out r *1", {"out": 5, "r": 2, "k": (3, 3)}) == (5, 2, 1, 1)


def test_a_size_may_be_at_least_a_number_or_one_that_is_known_by_name() -> None:
    assert unify(">7 in", (7, 5), {}, name="weight") == {"in": 5}
    assert unify("r >in", (2, 9), {"in": 8}, name="down") == {"in": 8, "r": 2}
    assert unify("r >in", (2, 3), {}, name="down") == {"r": 2}  # nothing is known of it yet, and nothing is learnt
    with pytest.raises(ShapeMisfit, match="8 is the least, 7 found"):
        unify("r >in", (2, 7), {"in": 8}, name="down")


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (5, 5)])
def test_the_smallest_of_the_trailing_sizes_may_be_given(shape: tuple[int, ...]) -> None:
    assert unify("*<5", shape, {}, name="weight") == {}


def test_two_whole_shapes_that_differ_are_both_named() -> None:
    bound = unify("*shape", (48, 16), {}, name="head.weight")
    with pytest.raises(ShapeMisfit, match=r"^value is \[32, 16\] where \[48, 16\] is wanted$"):
        unify("*shape", (32, 16), bound, name="value")
