"""The picture of a card: targets down, layers across, for every way in which models are built."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cards.making import PEFT, RECORD, write

from lorahub.cards.layers import picture_of
from lorahub.pictures.layer_map import LayerMap, Section, svg
from lorahub.plugins import load_registry
from lorahub.records import AdapterRecord


def drawn(tmp_path: Path, modules: dict[str, int]) -> str:
    """The picture of an adapter with these modules and ranks."""
    shapes = {
        f"base_model.model.{name}.lora_{side}.weight": (rank, 8) if side == "A" else (8, rank)
        for name, rank in modules.items()
        for side in "AB"
    }
    config = PEFT | {"rank_pattern": dict(modules), "alpha_pattern": dict.fromkeys(modules, 2.0)}
    header = write(tmp_path / "a", "adapter_model.safetensors", shapes, adapter_config=config)
    return picture_of(header, AdapterRecord.from_json(RECORD), load_registry())[0]


def titles(picture: str) -> list[str]:
    """What the cells say when they are pointed at."""
    return [each.text or "" for each in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")][1:]


def test_ranks_are_shown_where_they_differ_in_the_order_of_layers(tmp_path: Path) -> None:
    ranks = {f"model.layers.{at}.self_attn.{name}": at + 1 for at in range(12) for name in ("v_proj", "q_proj")}
    picture = drawn(tmp_path, ranks)
    assert titles(picture)[:3] == [f"self_attn.q_proj, layers {at}: {at + 1}" for at in range(3)]
    assert titles(picture)[12] == "self_attn.v_proj, layers 0: 1"
    assert ">rank</text>" in picture


def test_sizes_are_shown_where_all_ranks_are_one(tmp_path: Path) -> None:
    picture = drawn(tmp_path, {f"model.layers.{at}.mlp.up_proj": 2 for at in range(3)})
    assert titles(picture)[0] == "up_proj, layers 0: 32" or titles(picture)[0] == "mlp.up_proj, layers 0: 32"
    assert "trained parameters per target: 32, everywhere" in picture


def test_what_is_in_no_layer_stands_apart(tmp_path: Path) -> None:
    picture = drawn(tmp_path, {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 2, "lm_head": 4})
    assert any(title.startswith("lm_head, other") for title in titles(picture))


def test_experts_of_a_layer_share_a_row(tmp_path: Path) -> None:
    picture = drawn(
        tmp_path, {f"model.layers.{at}.mlp.experts.{one}.up_proj": 2 for at in range(4) for one in range(50)}
    )
    assert len(titles(picture)) == 4


def test_a_file_with_more_targets_than_fit_has_no_picture(tmp_path: Path) -> None:
    assert drawn(tmp_path, {f"block.{'ab' * (at + 1)}.lin": 2 for at in range(60)}) == ""


@pytest.mark.parametrize("layers", [1, 12, 32, 80, 126])
def test_the_picture_is_as_wide_as_a_page_and_nothing_leaves_it(layers: int) -> None:
    picture = LayerMap(
        title="ink <&> \x1b",
        rows=("q", "a very long name of a projection that nobody needs"),
        sections=(Section(name="layers", layers=tuple(range(layers))), Section(name="other")),
        values={("q", 0, at): float(at) for at in range(layers)},
        measure="rank",
    )
    root = ET.fromstring(svg(picture))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert width <= 900
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height
    assert "0" in re.findall(r">(\d+)</text>", svg(picture))
    assert svg(picture) == svg(picture)
