"""Experts that a base keeps one by one: where the matrices of a stacked parameter lie in it."""

from __future__ import annotations

import pytest
import torch

from lorahub.bases.experts import matrix_pieces, stack_pieces, stack_shape
from lorahub.bases.framework import whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Region, Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.replace import REPLACE, Replace
from lorahub.engine.planning.place import place as put
from lorahub.findings import Verdict

MODULE = "model.layers.0.mlp.experts"


def base(shapes: dict[str, tuple[int, ...]]) -> BaseIndex:
    parameters = {name: ParameterInfo(shape=shape, dtype="F32", stored_as=name) for name, shape in shapes.items()}
    return BaseIndex(ref=BaseRef(repo="acme/base"), framework="test", parameters=parameters)


def experts(place: str, gate: str, up: str, down: str, *, count: int = 3) -> BaseIndex:
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(count):
        shapes |= {f"{place}.{expert}.{name}.weight": (6, 4) for name in (gate, up)}
        shapes[f"{place}.{expert}.{down}.weight"] = (4, 6)
    return base(shapes)


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (MODULE, ("gate_proj", "up_proj", "down_proj")),
        (MODULE, ("w1", "w3", "w2")),
        ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_gate_and_up_lie_one_below_the_other_and_down_by_itself(place: str, names: tuple[str, str, str]) -> None:
    index = experts(place, *names)
    assert stack_shape(index, MODULE, "gate_up_proj") == (3, 12, 4)
    assert stack_shape(index, MODULE, "down_proj") == (3, 4, 6)
    found = [
        (piece.parameter, piece.of_delta.expert, piece.of_delta.rows)
        for piece in stack_pieces(index, MODULE, "gate_up_proj")
    ]
    assert found[:2] == [
        (f"{place}.0.{names[0]}.weight", 0, slice(0, 6)),
        (f"{place}.0.{names[1]}.weight", 0, slice(6, 12)),
    ]
    assert [expert for _, expert, _ in found] == [0, 0, 1, 1, 2, 2]
    target = Target("", MODULE, "down_proj")
    layout = whole_layouts(index, [target])[target]
    assert [piece.parameter for piece in layout.pieces] == [f"{place}.{n}.{names[2]}.weight" for n in range(3)]


@pytest.mark.parametrize(
    "index",
    [
        base({}),
        base({f"{MODULE}.0.gate_proj.weight": (6, 4)}),
        base({f"{MODULE}.1.gate_proj.weight": (6, 4), f"{MODULE}.1.up_proj.weight": (6, 4)}),
        base({f"{MODULE}.0.gate_proj.weight": (6, 4, 1), f"{MODULE}.0.up_proj.weight": (6, 4)}),
    ],
    ids=["nothing", "half an expert", "no first expert", "no matrix"],
)
def test_what_is_no_set_of_experts_has_no_place(index: BaseIndex) -> None:
    assert stack_pieces(index, MODULE, "gate_up_proj") == ()
    assert stack_shape(index, MODULE, "gate_up_proj") is None
    target = Target("", MODULE, "gate_up_proj")
    assert whole_layouts(index, [target]) == {}


def test_a_parameter_that_the_base_has_is_taken_as_it_is() -> None:
    index = base({f"{MODULE}.gate_up_proj": (3, 12, 4), f"{MODULE}.0.down_proj.weight": (4, 6)})
    target = Target("", MODULE, "gate_up_proj")
    (piece,) = whole_layouts(index, [target])[target].pieces
    assert (piece.parameter, piece.of_delta.whole) == (f"{MODULE}.gate_up_proj", True)


@pytest.mark.parametrize("turned", [False, True])
def test_one_expert_of_a_stack_lies_in_a_band_of_its_matrix(turned: bool) -> None:
    shapes = {"gate_up_proj": (3, 4, 12) if turned else (3, 12, 4), "down_proj": (3, 6, 4) if turned else (3, 4, 6)}
    parameters = {
        f"{MODULE}.{name}": ParameterInfo(shape=shape, dtype="F32", stored_as=name, turned=turned)
        for name, shape in shapes.items()
    }
    index = BaseIndex(ref=BaseRef(repo="acme/base"), framework="test", parameters=parameters)
    for place, names in (
        (MODULE, ("gate_proj", "up_proj", "down_proj")),
        (MODULE.replace("mlp", "block_sparse_moe"), ("w1", "w3", "w2")),
    ):
        gate, up, down = (matrix_pieces(index, f"{place}.2.{name}", "weight") for name in names)
        if turned:  # whether the two are woven, as in GPT-OSS, nobody says
            assert gate == up == ()
        two = () if turned else ((gate, "gate_up_proj", slice(0, 6)), (up, "gate_up_proj", slice(6, 12)))
        for found, stack, rows in (*two, (down, "down_proj", slice(None))):
            (piece,) = found
            region = piece.of_parameter
            assert piece.parameter == f"{MODULE}.{stack}"
            assert (region.expert, region.transposed, region.rows) == (2, turned, rows)
    assert matrix_pieces(index, f"{MODULE}.3.gate_proj", "weight") == ()
    assert matrix_pieces(index, f"{MODULE}.2.gate_proj", "bias") == ()
    assert matrix_pieces(index, f"{MODULE}.two.gate_proj", "weight") == ()


def test_one_expert_of_a_stack_has_no_place_where_nobody_says_which_way_round_the_stack_is() -> None:
    index = base({f"{MODULE}.gate_up_proj": (3, 12, 4)})
    assert matrix_pieces(index, f"{MODULE}.0.gate_proj", "weight") == ()


def stacked(*shape: int) -> Group:
    slots = {"value": TensorRef(key="stack", shape=shape, dtype="F32")}
    return Group(module=MODULE, parameter="gate_up_proj", kind="replace", slots=slots)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_a_whole_stack_is_replaced_where_the_base_keeps_its_matrices_one_by_one(names: tuple[str, str, str]) -> None:
    index = experts(MODULE, *names)
    placement = put([stacked(3, 12, 4)], {"replace": REPLACE}, index, TorchModule())
    (placed,) = placement.placed
    assert not placement.findings
    value = torch.arange(3 * 12 * 4.0).reshape(3, 12, 4)
    parts = {}
    for piece in placed.pieces:
        expert = piece.of_delta.expert
        assert expert is not None
        parts[piece.parameter] = Replace(value).expert(expert).region(piece.of_delta.rows, piece.of_delta.cols).value
    assert torch.equal(parts[f"{MODULE}.2.{names[0]}.weight"], value[2, :6])
    assert torch.equal(parts[f"{MODULE}.1.{names[1]}.weight"], value[1, 6:])
    assert len(parts) == 6


@pytest.mark.parametrize("shape", [(4, 12, 4), (2, 12, 4), (3, 4, 12), (3, 12, 5), (12, 4)])
def test_a_stack_of_another_shape_is_refused_before_anything_is_merged(shape: tuple[int, ...]) -> None:
    index = experts(MODULE, "gate_proj", "up_proj", "down_proj")
    placement = put([stacked(*shape)], {"replace": REPLACE}, index, TorchModule())
    (found,) = placement.findings
    assert (found.code, found.level, placement.placed) == ("shape-mismatch", Verdict.INCOMPATIBLE, ())


def test_one_matrix_that_replaces_another_in_a_turned_stack_is_read_as_its_own_module_stores_it() -> None:
    info = ParameterInfo(shape=(3, 6, 4), dtype="F32", stored_as="down_proj", turned=True)
    index = BaseIndex(ref=BaseRef(), framework="test", parameters={f"{MODULE}.down_proj": info})
    slots = {"value": TensorRef(key="one", shape=(4, 6), dtype="F32")}
    group = Group(module=f"{MODULE}.1.down_proj", parameter="weight", kind="replace", slots=slots)
    placement = put([group], {"replace": REPLACE}, index, TorchModule())
    assert not placement.findings
    (placed,) = placement.placed
    assert placed.pieces[0].of_parameter == Region(expert=1, transposed=True)
