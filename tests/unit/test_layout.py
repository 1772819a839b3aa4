"""Regions: what they show of a tensor, what they write, and what shape they announce."""

from __future__ import annotations

import pytest
import torch

from lorahub.bases.framework import whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Region, Target

REGIONS = {
    "whole": Region(),
    "transposed": Region(transposed=True),
    "rows": Region(rows=slice(1, 3)),
    "cols": Region(cols=slice(0, 2)),
    "strided rows": Region(rows=slice(0, None, 2)),
    "chosen rows": Region(rows=(2, 0)),
    "chosen rows and cols": Region(rows=(3, 1), cols=(2, 0, 1)),
    "transposed rows": Region(transposed=True, rows=slice(0, 2)),
    "transposed chosen rows": Region(transposed=True, rows=(2, 0), cols=slice(1, None)),
    "expert": Region(expert=1),
    "expert, transposed rows": Region(expert=1, transposed=True, rows=slice(1, 3)),
    "expert, chosen cols": Region(expert=0, cols=(2, 0)),
}


def stored(region: Region) -> torch.Tensor:
    shape = (4, 3) if region.expert is None else (2, 4, 3)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())
def test_the_announced_shape_is_the_shape(region):
    tensor = stored(region)
    assert region.shape(tuple(tensor.shape)) == tuple(region.of(tensor).shape)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())
def test_what_is_put_is_found_and_nothing_else_changes(region):
    tensor = stored(region)
    before = tensor.clone()
    value = -1 - torch.arange(region.of(tensor).numel(), dtype=torch.float32).reshape(region.of(tensor).shape)
    region.put(tensor, value)

    assert torch.equal(region.of(tensor), value)
    assert int((tensor != before).sum()) == value.numel()
    region.put(tensor, region.of(before))
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())
def test_a_view_shares_memory_and_a_gather_does_not(region):
    tensor = stored(region)
    shares = region.of(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert shares is region.is_view


def test_only_the_untouched_region_is_whole():
    assert [name for name, region in REGIONS.items() if region.whole] == ["whole"]


def test_a_vector_has_rows_alone():
    vector = torch.arange(4.0)
    assert Region(rows=slice(1, 3)).of(vector).tolist() == [1.0, 2.0]
    assert Region(rows=slice(1, 3)).shape((4,)) == (2,)
    Region(rows=(3, 0)).put(vector, torch.tensor([8.0, 9.0]))
    assert vector.tolist() == [9.0, 1.0, 2.0, 8.0]


def test_a_convolution_keeps_its_trailing_axes():
    kernel = torch.arange(4 * 3 * 2 * 2.0).reshape(4, 3, 2, 2)
    region = Region(rows=slice(0, 2), cols=(2, 0))
    assert region.shape((4, 3, 2, 2)) == (2, 2, 2, 2)
    assert torch.equal(region.of(kernel), kernel[:2][:, [2, 0]])


def test_a_target_is_named_by_its_parts_that_are_not_empty():
    assert Target("", "h.0.attn", "weight").name == "h.0.attn.weight"
    assert Target("unet", "mid", "bias").name == "unet:mid.bias"
    assert Target("", "", "cls_token").name == "cls_token"


def test_whole_layouts_leave_out_what_is_absent_and_transpose_what_is_declared():
    parameters = {
        "a.weight": ParameterInfo(shape=(4, 3), dtype="F32", stored_as="a.weight", transposed=True),
        "b.weight": ParameterInfo(shape=(4, 3), dtype="F32", stored_as="b.weight"),
    }
    index = BaseIndex(ref=BaseRef(), framework="torch", parameters=parameters, tied=(("b.weight", "c.weight"),))
    a, b, c, z = (Target("", module, "weight") for module in "abcz")
    layouts = whole_layouts(index, [a, b, c, z])

    assert set(layouts) == {a, b, c}
    assert layouts[a].pieces[0].of_parameter == Region(transposed=True)
    assert layouts[b].pieces[0].of_parameter.whole
    assert layouts[c].pieces[0].parameter == "b.weight"
