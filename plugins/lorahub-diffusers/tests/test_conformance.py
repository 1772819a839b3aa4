"""The framework of single models keeps the laws of ``lorahub.testing``, for models of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny_diffusers import flux, sd3, unet, vae
from tiny_loras import denoised

from lorahub.testing import FrameworkCase, check_framework
from lorahub_diffusers import Diffusers

MODELS: Any = MappingProxyType(
    {
        "UNet": unet,
        "SD3": lambda: sd3().transformer,
        "Flux": lambda: flux().transformer,
        "autoencoder": vae,
    }
)


def run(model: Any) -> object:
    torch.manual_seed(0)
    if hasattr(model, "decoder"):
        return model(torch.randn(1, 3, 8, 8)).sample
    return denoised(type(model).__name__, model)


def case_of(make: Callable[[], Any], folder: Path) -> FrameworkCase:
    model = make()
    model.save_pretrained(folder)
    return FrameworkCase(folder=folder, model=model, run=run, presets=("attention", "all-linear"))


@pytest.mark.parametrize("what", MODELS)
def test_the_framework_keeps_every_law(what: str, tmp_path: Path) -> None:
    check_framework(Diffusers(), case_of(MODELS[what], tmp_path))


def test_a_framework_that_breaks_a_law_is_told(tmp_path: Path) -> None:
    class Forgetful(Diffusers):
        def layouts(self, index: Any, targets: Any) -> Any:
            return {}

    with pytest.raises(AssertionError, match="has no layout"):
        check_framework(Forgetful(), case_of(unet, tmp_path))
