"""Training timm's models: new heads, parts of fused projections, convolutions, normalisations."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from tiny_timm import timm

import lorahub
import lorahub_timm
from lorahub.errors import UsageError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 1])
BOUND = 32 * torch.finfo(torch.float32).eps


def train(model: Any, parameters: Any, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(IMAGES), CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_new_head_is_trained_with_the_adapter_and_travels_with_it(tmp_path):
    torch.manual_seed(0)
    model = lorahub_timm.create_model("vit_tiny_patch16_224", False, lora={"r": 4}, num_classes=3, **SMALL)
    before = {name: own.clone() for name, own in model.state_dict().items() if not name.startswith("_lorahub.")}
    trainee = lorahub_timm.handle(model)
    assert {name.rpartition(".")[0] for name, _ in trainee.named_parameters()} == {
        *(f"_lorahub.default.blocks.{block}.attn.{each}" for block in (0, 1) for each in ("qkv", "proj")),
        "_lorahub.default.head",
    }
    losses = train(model, trainee.parameters())
    assert losses[-1] < losses[0] - 0.1
    outputs = model.eval()(IMAGES).detach()
    trainee.save(tmp_path / "out")
    trainee.detach()
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    state = {name: own for name, own in before.items() if not name.startswith("head.")}
    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL).eval()
    other.load_state_dict(state, strict=False)
    with lorahub.attach(other, [tmp_path / "out"]):
        assert (other(IMAGES) - outputs).abs().max() <= BOUND * outputs.abs().max()


def test_parts_of_a_fused_projection_are_trained_by_themselves(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL).eval()
    plain = model(IMAGES).detach()
    trainee = lorahub.create(model, r=2, target_modules=["q", "v"])
    assert {target.module for target in trainee.targets} == {
        f"blocks.{block}.attn.{part}" for block in (0, 1) for part in "qv"
    }
    train(model, trainee.parameters(), 10)
    outputs = model(IMAGES).detach()
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    trainee.save(tmp_path / "out")
    trainee.detach()
    before = model.state_dict()["blocks.0.attn.qkv.weight"].clone()
    lorahub.merge(model, [tmp_path / "out"])
    assert (model(IMAGES) - outputs).abs().max() <= BOUND * outputs.abs().max()
    changed = (model.state_dict()["blocks.0.attn.qkv.weight"] != before).any(1)
    assert changed[:32].any()
    assert not changed[32:64].any()  # the keys' rows


def test_convolutions_are_trained_and_running_statistics_stay(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    before = {name: own.clone() for name, own in model.state_dict().items()}
    trainee = lorahub.create(model, r=2, target_modules="all-conv", modules_to_save="fc", layers=[0])
    losses = train(model, trainee.parameters(), 3)
    assert losses[-1] < losses[0]
    outputs = model(IMAGES).detach()
    trainee.save(tmp_path / "out")
    trainee.detach()
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    model.eval()
    with lorahub.attach(model, [tmp_path / "out"]):
        assert (model(IMAGES) - outputs).abs().max() <= BOUND * outputs.abs().max()


def test_a_model_takes_an_adapter_that_is_there_or_one_that_begins():
    with pytest.raises(UsageError, match="is there, or with one that is to be trained"):
        lorahub_timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match="neither weight nor merge"):
        lorahub_timm.create_model("vit_tiny_patch16_224", lora={"r": 4}, merge=True)


def test_a_model_that_nobody_holds_any_more_is_freed_and_a_copy_has_a_handle_of_its_own():
    model = lorahub_timm.create_model("vit_tiny_patch16_224", False, lora={"r": 2}, num_classes=3, **SMALL)
    other = lorahub_timm.handle(copy.deepcopy(model))
    assert type(other) is type(lorahub_timm.handle(model))
    assert other.model is not model
    lorahub_timm.handle(model).detach()
    with pytest.raises(UsageError, match="no adapters attached"):
        lorahub_timm.handle(copy.deepcopy(model))
    del other
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_moving_average_that_timm_keeps_is_that_of_the_adapter():
    torch.manual_seed(0)
    model = lorahub_timm.create_model("vit_tiny_patch16_224", False, lora={"r": 2}, num_classes=3, **SMALL)
    plain = model.eval()(IMAGES).detach()
    last, none = timm.utils.ModelEmaV3(model, decay=0.0), timm.utils.ModelEmaV3(model, decay=1.0)
    optimizer = torch.optim.AdamW(lorahub_timm.handle(model).parameters(), lr=1e-2)
    for _ in range(2):
        model.train()(IMAGES).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        last.update(model)
        none.update(model)
    outputs = model.eval()(IMAGES).detach()
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    assert torch.equal(last.module.eval()(IMAGES), outputs)
    assert torch.equal(none.module.eval()(IMAGES), plain)


def test_a_preset_that_means_nothing_here_is_refused_with_those_that_mean_something():
    small = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    with pytest.raises(UsageError, match="no modules that 'all-linear' means") as refused:
        lorahub.create(small, r=2, target_modules="all-linear")
    assert refused.value.hint == "take another preset: all-conv"
    lorahub.create(small, r=2, target_modules="all-conv")
