"""An adapter weighed against a base, from files or live."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lorahub
from lorahub.files.writer import save_file


@pytest.mark.parametrize("live", [False, True])
def test_norms_are_those_of_a_dense_product_whether_the_base_is_files_or_live(tmp_path: Path, live: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q", nn.Linear(12, 16, bias=False))
    down, up = torch.randn(4, 12), torch.randn(16, 4)
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    stem = "base_model.model.q"
    save_file(adapter / "adapter_model.safetensors", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(base / "model.safetensors", {"q.weight": model.q.weight.detach()})

    (found,) = lorahub.weigh(adapter, model if live else base).targets
    norm = float(torch.linalg.matrix_norm(2.0 * up.double() @ down.double()))
    relative = norm / float(torch.linalg.matrix_norm(model.q.weight.detach().double()))
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert found.relative == pytest.approx(relative, rel=1e-12)
    assert relative > 1e-2
