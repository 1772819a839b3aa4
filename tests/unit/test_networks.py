"""Networks of their own that lie where adapters lie: told by their names, and refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorahub
from lorahub.errors import UnsupportedKind
from lorahub.files.writer import save_file
from lorahub.formats.networks import NETWORKS, network_of

CONTROLNET = {
    "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
    "input_hint_block.0.weight": (4, 3, 3, 3),
    "zero_convs.0.0.weight": (8, 8, 1, 1),
}
ATTENTION = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FILES = {
    "a ControlNet": CONTROLNET,
    "a ControlNet-LLLite": {f"{ATTENTION}.{part}.0.weight": (4, 4) for part in ("conditioning1", "down", "mid", "up")},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)},
}


@pytest.mark.parametrize("title", FILES)
def test_a_network_beside_the_model_is_refused_by_its_name(title: str, tmp_path: Path) -> None:
    save_file(tmp_path / "x.safetensors", {name: torch.ones(*shape) for name, shape in FILES[title].items()})
    base = tmp_path / "base"
    base.mkdir()
    save_file(base / "model.safetensors", {"q.weight": torch.ones(4, 4)})
    with pytest.raises(UnsupportedKind) as stop:
        lorahub.merge(base, {"x": str(tmp_path / "x.safetensors")}, out=tmp_path / "out")
    assert f"is {title}, which is " in stop.value.message
    assert stop.value.hint
    assert not (tmp_path / "out").exists()


def test_every_sort_of_network_is_tried() -> None:
    assert {each.title for each in NETWORKS} == FILES.keys()
    assert network_of(["unet.mid_block.attentions.0.to_q.lora_A.weight", "lora_unet_x.alpha"]) is None
