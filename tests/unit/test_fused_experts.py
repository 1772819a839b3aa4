"""Projections that a model keeps in one parameter: which part each is, and that nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorahub.bases.framework import whole_layouts
from lorahub.bases.fused_experts import part_pieces
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.kind import Group, TensorRef
from lorahub.formats.experts import in_base

MODULE = "model.layers.0.mlp.experts"


def base(config: dict[str, Any], *shape: int, name: str = "gate_up_proj") -> BaseIndex:
    info = ParameterInfo(shape=shape, dtype="F32", stored_as=f"{MODULE}.{name}")
    return BaseIndex(ref=BaseRef(), framework="test", parameters={f"{MODULE}.{name}": info}, config=config)


def stack(parameter: str, inputs: int = 3, out: int = 4) -> Group:
    slots = {
        "down": TensorRef(key="a", shape=(2, 1, inputs), dtype="F32"),
        "up": TensorRef(key="b", shape=(2, out, 1), dtype="F32"),
    }
    options = {"scale": 1.0, "transposed": None}
    return Group(module=MODULE, parameter=parameter, kind="expert-lora", slots=slots, options=options)


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen3_moe"}, {"model_type": "x", "text_config": {"model_type": "qwen3_vl_moe_text"}}]
)
@pytest.mark.parametrize(("parameter", "rows"), [("gate_proj", slice(0, 4)), ("up_proj", slice(4, 8))])
def test_gates_lie_above_ups(config: dict[str, Any], parameter: str, rows: slice) -> None:
    stored = torch.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    pieces = part_pieces(base(config, 2, 8, 3), MODULE, parameter)
    assert [piece.of_delta.expert for piece in pieces] == [0, 1]
    for expert, piece in enumerate(pieces):
        assert torch.equal(piece.of_parameter.of(stored), stored[expert, rows])


@pytest.mark.parametrize(("parameter", "first"), [("w1", 0), ("w3", 1)])
def test_gpt_oss_weaves_them_and_stores_them_turned(parameter: str, first: int) -> None:
    stored = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    for expert, piece in enumerate(part_pieces(base({"model_type": "gpt_oss"}, 2, 3, 8), MODULE, parameter)):
        assert torch.equal(piece.of_parameter.of(stored), stored[expert, :, first::2].T)


@pytest.mark.parametrize(
    ("config", "shape", "parameter"),
    [
        ({}, (2, 8, 3), "gate_proj"),
        ({"model_type": "somebodys"}, (2, 8, 3), "gate_proj"),
        ({"model_type": "qwen3_moe"}, (2, 7, 3), "gate_proj"),
        ({"model_type": "qwen3_moe"}, (8, 3), "gate_proj"),
        ({"model_type": "qwen3_moe"}, (2, 8, 3), "down_proj"),
    ],
)
def test_nothing_is_guessed(config: dict[str, Any], shape: tuple[int, ...], parameter: str) -> None:
    index = base(config, *shape)
    assert part_pieces(index, MODULE, parameter) == ()
    assert whole_layouts(index, [Target("", MODULE, parameter)]) == {}


def test_a_layout_is_made_of_the_pieces() -> None:
    index, target = base({"model_type": "qwen3_moe"}, 2, 8, 3), Target("", MODULE, "up_proj")
    assert whole_layouts(index, [target])[target].pieces == part_pieces(index, MODULE, "up_proj")


@pytest.mark.parametrize(
    ("shape", "inputs", "out", "way"),
    [((2, 4, 3), 3, 4, False), ((2, 3, 4), 3, 4, True), ((2, 4, 4), 4, 4, None), ((2, 9, 9), 3, 4, None)],
)
def test_a_stack_is_turned_as_the_bases_parameter_is_where_that_tells(
    shape: tuple[int, ...], inputs: int, out: int, way: bool | None
) -> None:
    (group,) = in_base(stack("down_proj", inputs, out), base({}, *shape, name="down_proj"))
    assert group.options["transposed"] is way


def test_part_of_a_fused_parameter_is_cut_the_way_the_layout_says() -> None:
    (group,) = in_base(stack("gate_proj"), base({"model_type": "gpt_oss"}, 2, 3, 8))
    assert group.options["transposed"] is False
    assert in_base(stack("gate_proj"), None) == [stack("gate_proj")]
