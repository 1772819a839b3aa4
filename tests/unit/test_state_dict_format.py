"""Raw PEFT factors without a config: read with scale 1, and never without saying that alpha is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorahub.adapter import load, open_header
from lorahub.errors import CannotCarry
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.state_dict import StateDictFormat
from lorahub.plugins import Registry

STEM = "transformer_blocks.0.attn.to_q"


def pair() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.lora_A.default.weight": torch.randn(2, 6, generator=generator),
        f"{STEM}.lora_B.default.weight": torch.randn(4, 2, generator=generator),
    }


def test_the_scale_is_one_and_a_finding_says_that_alpha_is_unknown(registry: Registry, tmp_path: Path) -> None:
    tensors = pair()
    save_file(tmp_path / "epoch-1.safetensors", tensors, {})
    header = open_header(tmp_path, registry)
    (finding,) = header.findings
    assert (header.format, finding.code, finding.level) == ("state-dict", "alpha-unknown", Verdict.UNVERIFIED)
    ((target, delta),) = load(header, registry).deltas.items()
    assert target.name == f"{STEM}.weight"
    down, up = (each.double() for each in tensors.values())
    torch.testing.assert_close(delta.delta(torch.zeros(4, 6).double()), up @ down, rtol=1e-12, atol=1e-12)


def test_embeddings_are_turned_and_magnitudes_make_it_dora(registry: Registry, tmp_path: Path) -> None:
    tensors = {
        **pair(),
        f"{STEM}.lora_magnitude_vector.default.weight": torch.full((4,), 2.0),
        "emb.lora_embedding_A.default": torch.ones(2, 9),
        "emb.lora_embedding_B.default": torch.ones(5, 2),
    }
    save_file(tmp_path / "epoch-1.safetensors", tensors, {})
    header = open_header(tmp_path, registry)
    assert header.kinds == ("dora", "lora")
    shapes = {target.name: delta.shape() for target, delta in load(header, registry).deltas.items()}
    assert shapes == {f"{STEM}.weight": (4, 6), "emb.weight": (9, 5)}


def test_beside_a_peft_config_it_is_pefts(registry: Registry, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{key}": value for key, value in pair().items()}
    save_file(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = open_header(tmp_path, registry)
    assert (header.format, header.reading.groups[0].options["scale"]) == ("peft", 4.0)


@pytest.mark.parametrize(
    ("more", "codes"),
    [
        ({"x.weight": torch.ones(2, 2)}, ["key-unknown", "alpha-unknown"]),
        ({"x.lora_A.default.weight": torch.ones(2, 2)}, ["slot-missing", "alpha-unknown"]),
    ],
)
def test_what_is_no_factor_is_a_finding(
    registry: Registry, tmp_path: Path, more: dict[str, torch.Tensor], codes: list[str]
) -> None:
    save_file(tmp_path / "a.safetensors", pair() | more, {})
    assert [each.code for each in open_header(tmp_path, registry).findings] == codes


def test_it_is_read_only(registry: Registry) -> None:
    with pytest.raises(CannotCarry):
        StateDictFormat().write({}, tuple(registry.kinds.values()), {})
