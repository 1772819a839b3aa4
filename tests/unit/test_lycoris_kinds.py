"""LyCORIS's kinds by themselves: what their shapes allow, what they refuse, and how they may be cut."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from lorahub.deltas.decomposed import DORA_LOHA, DORA_LOKR, DoLoHa, axis_of
from lorahub.deltas.diag_oft import DIAG_OFT, OutputTurn
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.deltas.lora_sparse import WithRest
from lorahub.deltas.lycoris_boft import LYCORIS_BOFT, OutputButterfly
from lorahub.deltas.lycoris_glora import LYCORIS_GLORA, Mixed
from lorahub.deltas.lycoris_ia3 import LYCORIS_IA3, Growth
from lorahub.deltas.oft import Turn
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal, UnsupportedKind
from lorahub.shapes import ShapeMisfit


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def group(kind: Kind, options: Mapping[str, JSON], **shapes: tuple[int, ...]) -> Group:
    slots = {name: TensorRef(key=name, shape=shape, dtype="F32") for name, shape in shapes.items()}
    return Group(module="m", kind=kind.name, slots=slots, options=options)


# --- rotations of the outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [OutputTurn, OutputButterfly])
def test_a_rotation_keeps_the_length_of_every_column(cls: type[OutputTurn | OutputButterfly]) -> None:
    turn = cls(cls.example((8, 5), r=2, generator=generator()).blocks)
    weight = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    moved = weight + turn.delta(weight)
    torch.testing.assert_close(moved.norm(dim=0), weight.norm(dim=0))
    assert float((moved - weight).norm() / weight.norm()) > 0.1


@pytest.mark.parametrize("cls", [OutputTurn, OutputButterfly])
def test_a_rotation_may_be_cut_across_inputs_and_not_across_outputs(cls: type[OutputTurn | OutputButterfly]) -> None:
    turn = cls.example((8, 5), r=2, generator=generator())
    weight = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    assert torch.equal(turn.region(slice(None), slice(1, 3)).delta(weight[:, 1:3]), turn.delta(weight)[:, 1:3])
    with pytest.raises(NotLocal, match="mixes the outputs"):
        turn.region(slice(0, 4), slice(None))
    with pytest.raises(BaseMismatch, match="for 8 outputs was given a weight"):
        turn.delta(torch.zeros(6, 5))


def test_a_bound_shortens_a_rotation_only_where_it_is_exceeded() -> None:
    blocks = torch.randn(2, 4, 4, generator=generator(), dtype=torch.float64)
    weight = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    length = float((blocks - blocks.transpose(1, 2)).norm())
    free = OutputTurn(blocks).delta(weight)
    torch.testing.assert_close(OutputTurn(blocks, None, length / 8 * 1.01).delta(weight), free)
    half = OutputTurn(blocks, None, length / 16).delta(weight)
    torch.testing.assert_close(half, OutputTurn(blocks / 2).delta(weight))
    assert not torch.allclose(half, free)


@pytest.mark.parametrize("blocks", [(2, 3, 2, 2), (1, 2, 3, 3), (3, 2, 2, 2), (0, 2, 2, 2)])
def test_blocks_that_cannot_be_shuffled_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(IntegrityError, match="cannot be shuffled"):
        LYCORIS_BOFT.touches(group(LYCORIS_BOFT, {}, blocks=blocks))


def test_the_outputs_that_a_rotation_wants_are_said_in_its_dims() -> None:
    (touch,) = DIAG_OFT.touches(group(DIAG_OFT, {}, blocks=(3, 4, 4), rescale=(12, 1)))
    assert (touch.dims, touch.local, touch.additive) == ("12 in *k", False, False)


@pytest.mark.parametrize(("shape", "fits"), [((8, 1), True), ((2, 4, 1), True), ((8, 1, 1), True), ((2, 4), False)])
def test_factors_are_one_for_each_output_as_any_release_stored_them(shape: tuple[int, ...], fits: bool) -> None:
    made = group(DIAG_OFT, {}, blocks=(2, 4, 4), rescale=shape)
    if fits:
        assert DIAG_OFT.touches(made)[0].slots == ("blocks", "rescale")
    else:
        with pytest.raises(ShapeMisfit, match="a factor for each of 8 outputs"):
            DIAG_OFT.touches(made)


# --- GLoRA and IA3 ---------------------------------------------------------------------------------------------------


def test_factors_that_are_all_square_could_be_in_either_order_and_are_refused() -> None:
    square = {"a1": (4, 4), "a2": (4, 4), "b1": (4, 4), "b2": (4, 4)}
    with pytest.raises(ShapeMisfit, match="in the old order or in the new one"):
        LYCORIS_GLORA.touches(group(LYCORIS_GLORA, {"scale": 1.0}, **square))


@pytest.mark.parametrize(
    "shapes",
    [
        {"a1": (4, 2), "a2": (2, 4), "b1": (6, 2), "b2": (2, 5)},
        {"a1": (4, 2), "a2": (3, 4), "b1": (6, 2), "b2": (2, 4)},
        {"a1": (4, 2), "a2": (2, 4), "b1": (6, 2), "b2": (2, 4), "core": (3, 3, 3)},
    ],
)
def test_factors_that_do_not_fit_in_any_order_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMisfit, match="elsewhere"):
        LYCORIS_GLORA.touches(group(LYCORIS_GLORA, {"scale": 1.0}, **shapes))


def test_a_rank_above_the_inputs_is_told_from_the_old_order() -> None:
    """Four input channels and rank 16: the shapes of a first convolution."""
    shapes = {"a1": (4, 16, 1, 1), "a2": (16, 4, 1, 1), "b1": (32, 16, 1, 1), "b2": (16, 4, 3, 3)}
    (touch,) = LYCORIS_GLORA.touches(group(LYCORIS_GLORA, {"scale": 1.0}, **shapes))
    assert (touch.dims, touch.rank) == ("32 4 3 3", 16)


def test_glora_mixes_the_inputs_and_may_be_cut_across_outputs_alone() -> None:
    delta = Mixed.example((6, 4), r=2, generator=generator())
    with pytest.raises(NotLocal, match="mixes the inputs"):
        delta.region(slice(None), slice(0, 2))
    with pytest.raises(BaseMismatch):
        delta.delta(torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(1, 4), (2, 4, 1, 1), (1, 4, 2, 1), ()])
def test_a_growth_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(IntegrityError, match="is neither"):
        LYCORIS_IA3.touches(group(LYCORIS_IA3, {"axis": 0}, growth=shape))


def test_a_growth_is_for_a_weight_with_its_own_number_of_axes() -> None:
    with pytest.raises(BaseMismatch, match="for 4 inputs"):
        Growth(torch.ones(4), 1).delta(torch.zeros(6, 4, 3))


# --- DoRA over other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 1), 0), ((1, 4), 1), ((6, 1, 1, 1), 0), ((1, 4, 1, 1), 1), ((1, 1), 0)]
)
def test_the_axis_of_lengths_is_the_one_that_is_not_one(shape: tuple[int, ...], axis: int) -> None:
    assert axis_of(TensorRef(key="k", shape=shape, dtype="F32")) == axis


@pytest.mark.parametrize(
    ("shape", "text"), [((6,), "rows or of the columns"), ((6, 4), "neither"), ((1, 1, 3), "neither")]
)
def test_lengths_of_no_axis_are_refused(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ShapeMisfit, match=text):
        axis_of(TensorRef(key="k", shape=shape, dtype="F32"))


def test_as_many_lengths_are_wanted_as_the_weight_has_vectors() -> None:
    factors = {"w1_a": (6, 2), "w1_b": (2, 12), "w2_a": (6, 2), "w2_b": (2, 12)}
    for axis, fits, dims in ((0, (6, 1, 1), "6 *12"), (1, (1, 4, 1), "6 4 *3")):
        (touch,) = DORA_LOHA.touches(group(DORA_LOHA, {"scale": 1.0, "axis": axis}, **factors, magnitude=fits))
        assert (touch.dims, touch.local, touch.additive) == (dims, axis == 0, False)
    for axis, misfit in ((0, (5, 1, 1)), (1, (1, 5, 1))):
        with pytest.raises(ShapeMisfit, match="a length for each of"):
            DORA_LOHA.touches(group(DORA_LOHA, {"scale": 1.0, "axis": axis}, **factors, magnitude=misfit))
    sides = {"w1": (2, 2), "w2": (3, 2, 3, 3)}
    (touch,) = DORA_LOKR.touches(group(DORA_LOKR, {"scale": 1.0, "axis": 1}, **sides, magnitude=(1, 4, 1, 1)))
    assert touch.dims == "6 4 3 3"


def test_lengths_that_change_nothing_cannot_be_made_from_a_shape() -> None:
    with pytest.raises(UnsupportedKind, match="the weight's own lengths"):
        DoLoHa.fresh((6, 4), r=2, generator=generator())


# --- a sparse rest, and OneTrainer's OFT -----------------------------------------------------------------------------


def test_places_beyond_sixteen_signed_bits_are_found_again() -> None:
    columns = 40_000
    places = torch.tensor([[0, 1], [39_999, 7]]).to(torch.int16)  # wraps, as it does where it is written
    assert int(places.min()) < 0
    factors = (torch.zeros(2, 1), torch.zeros(1, columns))
    delta = WithRest(*factors, places, torch.tensor([3.0, 4.0]), torch.tensor([2, columns]), 1.0)
    change = delta.delta(torch.zeros(2, columns))
    assert change.nonzero().tolist() == [[0, 39_999], [1, 7]]


def test_places_outside_the_weight_are_refused() -> None:
    factors = (torch.zeros(6, 2), torch.zeros(2, 4))
    delta = WithRest(*factors, torch.tensor([[6], [0]]), torch.ones(1), torch.tensor([6, 4]), 1.0)
    with pytest.raises(BaseMismatch, match="outside"):
        delta.delta(torch.zeros(6, 4))


def test_a_block_of_one_input_has_nothing_to_turn_even_where_it_is_scaled() -> None:
    turn = Turn(torch.zeros(4, 0), (2.0, 2.0, 2.0, 1.0), mirrored=True, scaled=True)
    weight = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    assert torch.equal(turn.delta(weight), torch.zeros_like(weight))
