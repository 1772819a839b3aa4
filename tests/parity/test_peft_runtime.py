"""What ``check --for peft`` says of an adapter and a base, and what PEFT does with the two."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorahub
from lorahub.errors import UsageError
from lorahub.plugins import load_registry
from lorahub.runtimes.peft import LAYERS, PEFT, TURNED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft.tuners import tuners_utils

LAYER: dict[str, Any] = {
    "Linear": lambda: nn.Linear(8, 4),
    TURNED: lambda: Conv1D(4, 8),
    "Embedding": lambda: nn.Embedding(6, 8),
    "Conv1d": lambda: nn.Conv1d(8, 4, 3),
    "Conv2d": lambda: nn.Conv2d(8, 4, 3),
    "Conv3d": lambda: nn.Conv3d(8, 4, 3),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "oblong": lambda: nn.Conv2d(8, 4, (1, 3)),
}
SAID = {
    "depthwise": {"lora": "peft-grouped", "dora": "peft-grouped", "oft": "peft-grouped"},
    "oblong": {"oft": "peft-oblong-kernel"},
}


def net(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(LAYER[layer]()))


def loads(model: nn.Module, folder: Path) -> bool:
    """Whether PEFT takes an adapter, whatever the way in which it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.PeftModel.from_pretrained(model, folder)
        except (TypeError, ValueError, RuntimeError):
            return False
    return True


def said(folder: Path, base: Any) -> set[str]:
    codes = {rule.code for rule in PEFT.rules} | {"runtime-accepts"}
    return {each.code for each in lorahub.check(folder, base, runtime="peft").findings} & codes


@pytest.mark.parametrize("layer", LAYER)
@pytest.mark.parametrize("kind", LAYERS)
def test_peft_refuses_what_its_table_says_and_takes_the_rest(kind: str, layer: str, tmp_path: Path) -> None:
    told = {"oft": {"oft_block_size": 3}}.get(kind, {} if kind == "ia3" else {"r": 2})
    model = net(layer)
    try:
        with lorahub.create(model, kind, target_modules=["0.0"], **told) as trainee:
            trainee.save(tmp_path)
    except UsageError:  # where it cannot stand at all
        assert kind != "lora"
        return
    found = said(tmp_path, model) - {"runtime-accepts", "peft-oft-unmerged"}
    assert bool(found) is not loads(net(layer), tmp_path)
    expected = SAID.get(layer, {}).get(kind)
    assert found <= ({expected} if expected else {"peft-layer", "peft-product"})


def test_of_oft_on_a_kernel_it_is_said_that_it_has_to_be_merged(tmp_path: Path) -> None:
    model = net("Conv2d")
    with lorahub.create(model, "oft", target_modules=["0.0"], oft_block_size=3) as trainee:
        trainee.save(tmp_path)
    (found,) = [
        each for each in lorahub.check(tmp_path, model, runtime="peft").findings if each.code.startswith("peft-")
    ]
    assert found.code == "peft-oft-unmerged"
    assert found.remedy.endswith(".merge_and_unload()")
    x = torch.randn(1, 8, 5, 5)
    theirs = peft.PeftModel.from_pretrained(net("Conv2d"), tmp_path).eval()
    assert (theirs(x) - model(x)).norm() > 0.1 * model(x).norm()  # though the adapter changes nothing yet
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x))


def test_a_module_that_the_base_does_not_have_as_such_is_named(tmp_path: Path) -> None:
    with lorahub.create(net("Linear"), target_modules=["0.0"], r=2) as trainee:
        trainee.save(tmp_path)
    other = nn.Sequential(nn.Linear(8, 4))
    assert "peft-module" in said(tmp_path, other)
    assert not loads(nn.Sequential(nn.Linear(8, 4)), tmp_path)


def test_without_a_base_the_files_alone_are_judged(tmp_path: Path) -> None:
    with lorahub.create(net("Linear"), target_modules=["0.0"], r=2) as trainee:
        trainee.save(tmp_path / "a")
    assert said(tmp_path / "a", None) == {"runtime-accepts"}
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert said(tmp_path / "a", None) & {"peft-files", "peft-format"}
    assert not loads(net("Linear"), tmp_path / "a")


def test_the_architectures_that_refuse_layers_are_those_of_peft() -> None:
    import inspect

    from lorahub.runtimes.peft import MAMBAS

    source = inspect.getsource(tuners_utils._check_lora_target_modules_mamba)
    assert all(f'"{each}"' in source for each in MAMBAS)
    assert source.count('"') // 2 >= len(MAMBAS)
    assert load_registry().runtime("peft") is PEFT
