"""LoRA on convolutions in groups, also of one channel each: exact where it has the weight's shape, else refused."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
from tiny_timm import TINY, Tiny, build, images, timm

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.deltas.lora import LoRA
from lorahub.errors import IntegrityError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]

RANK = 4
GROUPED = {
    "convnext, one channel each": (TINY["convnext"], "conv_dw"),
    "efficientnet, one channel each": (TINY["efficientnet"], "conv_dw"),
    "regnet, several channels each": (Tiny("regnetx_002"), "conv2.conv"),
}


def grouped(model: torch.nn.Module, leaf: str) -> dict[str, torch.nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1 and name.endswith(leaf)
    }


def written(modules: dict[str, torch.nn.Conv2d], folder: Path, *, by_group: bool) -> dict[str, LoRA]:
    """Factors of each weight's own shape; by group, every group of outputs has rank components of its own."""
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for name, module in modules.items():
        out, width, *kernel = module.weight.shape
        rank = RANK * module.groups if by_group else RANK
        up = torch.randn(out, rank, 1, 1, generator=generator) * 0.4
        if by_group:
            each = out // module.groups
            for group in range(module.groups):
                mine = slice(group * each, (group + 1) * each)
                kept = up[mine, group * RANK : (group + 1) * RANK].clone()
                up[mine] = 0
                up[mine, group * RANK : (group + 1) * RANK] = kept
        down = torch.randn(rank, width, *kernel, generator=generator) * 0.4
        deltas[name] = LoRA(up, down, 0.5)
    targets = {Target("", name, "weight"): delta for name, delta in deltas.items()}
    lorahub.save(Adapter(deltas=MappingProxyType(targets)), folder)
    return deltas


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("what", GROUPED)
def test_it_merges_exactly_and_attached_it_gives_the_same(what: str, by_group: bool, tmp_path: Path) -> None:
    tiny, leaf = GROUPED[what]
    model = build(tiny)
    modules = grouped(model, leaf)
    assert modules
    some = dict(list(modules.items())[:1])
    deltas = written(some, tmp_path / "adapter", by_group=by_group)
    before = {name: module.weight.detach().clone().double() for name, module in some.items()}
    x = images(tiny)
    with torch.no_grad():
        plain = model(x)
        with lorahub.attach(model, {"one": tmp_path / "adapter"}):
            attached = model(x)
        merged = lorahub.merge(model, {"one": tmp_path / "adapter"})
        expected = model(x)
    assert float((attached - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((plain - expected).abs().max() / expected.abs().max()) > 1e-3
    for name, delta in deltas.items():
        weight = before[name]
        for out in range(weight.shape[0]):
            for rank in range(delta.down.shape[0]):
                weight[out] += 0.5 * delta.up[out, rank, 0, 0].double() * delta.down[rank].double()
        found = some[name].weight.detach().double()
        assert float((found - weight).abs().max()) <= 2e-7 * max(1.0, float(weight.abs().max()))
    merged.undo()
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_factors_that_connect_all_channels_are_refused(tmp_path: Path) -> None:
    tiny = TINY["convnext"]
    model: Any = build(tiny)
    config = peft.LoraConfig(r=8, target_modules=["stages.0.blocks.0.conv_dw"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IntegrityError, match="do not fit together"):
        lorahub.merge(build(tiny), {"one": tmp_path / "adapter"})


def test_a_convolution_that_pads_by_itself_takes_the_changed_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_b0", num_classes=5).eval()
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Conv2dSame"]
    assert names
    first = model.get_submodule(names[0])
    up, down = torch.randn(first.weight.shape[0], RANK, 1, 1), torch.randn(RANK, *first.weight.shape[1:])
    adapter = Adapter(deltas=MappingProxyType({Target("", names[0], "weight"): LoRA(up, down, 0.5)}))
    lorahub.save(adapter, tmp_path / "adapter")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        with lorahub.attach(model, {"one": tmp_path / "adapter"}):
            attached = model(x)
        lorahub.merge(model, {"one": tmp_path / "adapter"})
        merged = model(x)
    assert float((attached - merged).abs().max() / merged.abs().max()) < 1e-4
    assert not torch.equal(plain, merged)
