"""What the patterns of ``create`` mean."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from training.nets import Net

import lorahub
from lorahub.errors import UsageError

LINEAR = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("down_proj", "q_proj", "up_proj")]

MEANT = {
    "a preset": ("all-linear", ["head", *LINEAR]),
    "nothing": (None, ["head", *LINEAR]),
    "the end of a path": ("q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
    "a longer end": (["1.q_proj"], ["layers.1.q_proj"]),
    "a whole path": ("layers.0.up_proj", ["layers.0.up_proj"]),
    "a glob": ("layers.*.up_proj", ["layers.0.up_proj", "layers.1.up_proj"]),
    "a glob for an end": ("0.*_proj", LINEAR[:3]),
    "an expression": (re.compile(r"layers\.1\.(q|up)_proj"), ["layers.1.q_proj", "layers.1.up_proj"]),
    "a list of all": (["head", "1.q*", "all-embedding"], ["embed", "head", "layers.1.q_proj"]),
    "named twice": (["q_proj", "*.q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
}


def modules(model: nn.Module, **arguments) -> list[str]:
    with lorahub.create(model, r=2, **arguments) as trainee:
        return [target.module for target in trainee.targets]


@pytest.mark.parametrize("case", MEANT)
def test_a_pattern_means(case):
    wanted, expected = MEANT[case]
    assert modules(Net(), target_modules=wanted) == expected


def test_an_end_of_a_name_is_no_end_of_a_path():
    with pytest.raises(UsageError, match="no module is called 'proj'"):
        lorahub.create(Net(), target_modules="proj")


def test_what_is_excluded_stays_out():
    assert modules(Net(), target_modules="all-linear", exclude_modules=["head", "*.1.*"]) == LINEAR[:3]


def test_layers_are_chosen_by_their_numbers():
    assert modules(Net(), target_modules="all-linear", layers=1) == LINEAR[3:]
    assert modules(Net(), target_modules="q_proj", layers=range(2)) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_modules_that_are_trained_in_full_take_no_adapter():
    model = Net()
    trainee = lorahub.create(model, target_modules="all-linear", modules_to_save=["layers.0"], r=2)
    kinds = {target.name: delta.kind for target, delta in trainee.adapter.deltas.items()}
    assert {kind for name, kind in kinds.items() if name.startswith("layers.0.")} == {"replace"}
    assert {kind for name, kind in kinds.items() if name.startswith("layers.1.")} == {"lora"}


def test_attention_that_never_calls_its_projection_is_trained_through_the_weight():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    trainee = lorahub.create(model, target_modules="out_proj", r=2)
    model(x, x, x)[0].square().sum().backward()
    assert all(own.grad is not None for own in trainee.parameters())
    assert dict(trainee.named_parameters())["_lorahub.default.out_proj.weight_up"].grad.norm() > 0


def test_a_grouped_convolution_is_trained_and_merges():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
    images = torch.randn(2, 8, 5, 5)
    trainee = lorahub.create(model, target_modules="all-conv", r=2)
    optimizer = torch.optim.SGD(trainee.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    outputs = model(images).detach()
    trainee.merge()
    assert torch.allclose(model(images), outputs, atol=1e-5)


def test_a_sequential_keeps_its_way_through_its_layers_and_names_them_where_a_name_is_wrong():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = model(x)
    with pytest.raises(UsageError, match="no module is called 'head'") as refused:
        lorahub.create(model, target_modules="head")
    assert "there are: 0, 2" in refused.value.hint
    with lorahub.create(model, r=2, target_modules="all-linear") as trainee:
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        assert all(own.grad is not None for own in trainee.parameters())
    assert len(model) == 3


@pytest.mark.plugin("transformers")
def test_a_part_of_a_fused_projection_is_named_by_any_end_of_its_path():
    import transformers

    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    model = transformers.GPT2Model(transformers.GPT2Config(**small, bos_token_id=None, eos_token_id=None))
    every = modules(model, target_modules="q_proj")
    assert len(every) == 2
    assert modules(model, target_modules="attn.q_proj") == every
    assert modules(model, target_modules="1.attn.q_proj") == every[1:]
