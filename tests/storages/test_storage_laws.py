"""The built-in storages keep the laws of ``lorahub.testing``, in each of the ways that a CPU can make them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorahub.plugins import load_registry
from lorahub.storages.storage import Storage
from lorahub.testing import STORAGE_LAWS, StorageCase

from .conftest import STORED

OWNER = {"nf4": "bitsandbytes-4bit", "fp4": "bitsandbytes-4bit", "int8": "bitsandbytes-int8", "ao": "torchao"}


@pytest.fixture
def case(stored: str, net: nn.Module, inputs: torch.Tensor) -> tuple[Storage, StorageCase]:
    storage = load_registry().storages[OWNER.get(stored.partition("-")[0], "compressed-tensors")]
    half = torch.float16 if stored == "int8" else torch.bfloat16

    def run(model: Any) -> torch.Tensor:
        return model(inputs.to(half))

    def build() -> nn.Module:
        model = STORED[stored](copy.deepcopy(net)).eval()
        return model.half() if stored == "int8" else model

    saved: dict[str, Any] = {}
    if stored in {"nf4", "fp4", "nf4-nested"}:
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        saved = {"settings": settings, "tensors": build().state_dict()}
    if stored == "int8":
        settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        saved = {"settings": settings, "tensors": build().state_dict()}
    return storage, StorageCase(build=build, run=run, **saved)


@pytest.mark.parametrize("law", STORAGE_LAWS.values(), ids=STORAGE_LAWS)
def test_a_storage_keeps_every_law(law: Callable[..., None], case: tuple[Storage, StorageCase]) -> None:
    law(*case)
