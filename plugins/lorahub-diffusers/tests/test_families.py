"""Single models of many families: adapters that diffusers saves and loads give the same outputs here.

Bounds as in ``test_parity``.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import FAMILIES

import lorahub

NOISE = 1e-4

USUAL = frozenset({"Wan", "Qwen-Image", "Flux2"})
"""Families of every run; of the others, ``make test-all`` has all."""

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # in diffusers


@pytest.mark.parametrize(
    "name", [each if each in USUAL else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES]
)
def test_attached_and_merged_outputs_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(family.targets)))
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            if "lora_" in at:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_lora_adapter(tmp_path)
    expected = family.run(model)
    model.unload_lora()
    before = family.run(model)
    largest = float(expected.abs().max())
    assert float((expected - before).norm() / before.norm()) > 1e-2

    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
    model.unload_lora()

    with lorahub.attach(model, {"style": tmp_path}) as live:
        assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
        assert live.coverage() == {"style": ()}
    merged = lorahub.merge(model, {"style": tmp_path})
    assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
    merged.undo()
    assert torch.equal(family.run(model), before)
