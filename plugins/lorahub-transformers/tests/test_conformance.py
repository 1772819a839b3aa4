"""The framework keeps the laws of ``lorahub.testing``, for classes with and without a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorahub.testing import FrameworkCase, check_framework

CASES = {
    "bert": ("BertForSequenceClassification", ("attention", "feed-forward", "all-linear")),
    "gpt2": ("GPT2LMHeadModel", ("attention", "feed-forward", "all-linear")),
    "llama": ("LlamaForCausalLM", ("attention", "feed-forward", "all-linear")),
    "vit": ("ViTForImageClassification", ("attention", "feed-forward", "all-linear")),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_framework_keeps_every_law(kind: str, tiny: Any, saved: Any, framework: Any) -> None:
    name, presets = CASES[kind]
    model = tiny(kind, name)
    example = {"pixel_values": torch.randn(2, 3, 8, 8)} if kind == "vit" else {"input_ids": torch.arange(8).view(2, 4)}
    case = FrameworkCase(folder=saved(model), model=model, run=lambda model: model(**example), presets=presets)
    check_framework(framework, case)
