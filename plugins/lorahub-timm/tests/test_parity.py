"""PEFT trains and saves, lorahub merges and attaches from the files: weights and outputs equal PEFT's, per family.

Bounds: a change is a sum of ``r`` products in float32, rounded in another order by the two, and an output passes
through as many layers as the model has; 1e-5 of the largest weight and 1e-4 of the largest output are far above both,
and far below the changes, which are over 1e-2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_timm import TINY, Tiny, build, images, timm

import lorahub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "trained biases": {"bias": "lora_only"},
}


PASSED_BY = ("beit", "eva", "swin v2")
"""Their attention takes the weight of ``qkv`` and does not call it, so what PEFT adds to its output is without effect:
unmerged, PEFT's own model is not what its merged one is."""


def trained(model: Any, folder: Path, modules: tuple[str, ...], **more: Any) -> Any:
    """PEFT's model with noise for what training would give, saved."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(modules), **more))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "magnitude" in name else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def output(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found[0] if isinstance(found, tuple) else found


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


USUAL = ("vit", "swin", "beit", "convnext", "levit")
CASES = [
    pytest.param(what, variant, marks=() if variant == "lora" or what in USUAL else pytest.mark.slow)
    for what in TINY
    for variant in VARIANTS
]


@pytest.mark.parametrize(("what", "variant"), CASES)
def test_merged_and_attached_it_is_what_peft_makes_of_it(what: str, variant: str, tmp_path: Path) -> None:
    tiny = TINY[what]
    more = VARIANTS[variant]
    if variant == "dora" and what in ("efficientnet", "coatnet", "levit", "maxvit", "maxvit of tensorflow"):
        tiny = Tiny(tiny.name, tiny.args, tiny.side, ("fc1",) if "max" in what else tiny.modules, tiny.head)
    base, x = build(tiny), images(tiny)
    theirs = trained(copy.deepcopy(base), tmp_path / "adapter", tiny.modules, **more)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    alone = output(theirs, x)
    with torch.no_grad():
        theirs = theirs.merge_and_unload()
    reference = theirs.state_dict()
    plain, expected = output(base, x), output(theirs, x)
    if what in PASSED_BY:
        assert far(alone, expected) > 1e-3
    else:
        assert far(alone, expected) < 1e-4

    live = lorahub.attach(base, {"one": tmp_path / "adapter"})
    assert far(output(base, x), expected) < 1e-4
    assert not any(live.coverage().values())
    live.detach()
    assert torch.equal(output(base, x), plain)
    assert far(expected, plain) > 1e-2

    merged = lorahub.merge(base, {"one": tmp_path / "adapter"})
    changed = 0
    for key, tensor in base.state_dict().items():
        largest = float(reference[key].abs().max()) if tensor.is_floating_point() and tensor.numel() else 1.0
        torch.testing.assert_close(tensor, reference[key], atol=1e-5 * max(largest, 1.0), rtol=0, msg=key)
        changed += not torch.equal(tensor, before[key])
    assert changed == merged.report.changed > 0
    assert far(output(base, x), expected) < 1e-4
    merged.undo()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize("what", ["vit", "swin v2", "beit", "maxvit", "levit", "efficientnet"])
def test_a_merged_folder_is_what_timm_loads(what: str, tmp_path: Path, saved: Any) -> None:
    tiny = TINY[what]
    base, x = build(tiny), images(tiny)
    folder = saved(base)
    theirs = trained(copy.deepcopy(base), tmp_path / "adapter", tiny.modules)

    lorahub.merge(folder, {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected = output(theirs.merge_and_unload(), x)
    assert far(output(loaded, x), expected) < 1e-4
    assert far(output(base, x), expected) > 1e-2


def test_rows_of_a_batch_take_adapters_of_their_own(tmp_path: Path) -> None:
    tiny = TINY["vit"]
    base, x = build(tiny), images(tiny, 3)
    theirs = trained(copy.deepcopy(base), tmp_path / "adapter", tiny.modules)
    plain, expected = output(base, x), output(theirs, x)
    with lorahub.attach(base, {"one": tmp_path / "adapter"}) as live:
        live.adapter_names = ["one", None, "one"]
        found = output(base, x)
    assert far(found[[0, 2]], expected[[0, 2]]) < 1e-4
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["swin", "swin v2", "beit", "eva", "maxvit"])
def test_where_images_cannot_be_told_apart_rows_of_their_own_are_refused(what: str, tmp_path: Path) -> None:
    tiny = TINY[what]
    base = build(tiny)
    trained(copy.deepcopy(base), tmp_path / "adapter", ("qkv",))
    with (
        lorahub.attach(base, {"one": tmp_path / "adapter"}) as live,
        pytest.raises(lorahub.errors.UsageError, match="some rows"),
    ):
        live.adapter_names = ["one", None]
