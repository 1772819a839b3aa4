"""Training on a 4-bit base whose library packed its weights for inference: gradients reach everything all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training.nets import Net, batch, train

import lorahub
from lorahub.storages.storage import held_in

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "ia3": {},
    "vera": {"r": 8},
    "oft": {"oft_block_size": 4},
}


class Deep(nn.Module):
    """Two linear layers of sizes that can be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return y


def quantised(*, packed: bool) -> Deep:
    import bitsandbytes as bnb
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    model = Deep()
    for name, own in list(model.named_children()):
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(own.weight.data.clone(), requires_grad=False, quant_type="nf4")
        layer.bias = own.bias
        layer = layer.to("cpu")
        if packed:  # as the first call in evaluation does on some CPUs
            layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        setattr(model, name, layer)
    return model.train()


def plain_of(model: Deep) -> Deep:
    """The model that the codes stand for, in float32."""
    plain = Deep()
    for name, held in held_in(model).items():
        plain.get_parameter(name).data = held.read().values()
        module = name.rpartition(".")[0]
        plain.get_submodule(module).bias.data = model.get_submodule(module).bias.detach().clone()
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_numbers_that_the_codes_stand_for(kind: str) -> None:
    model = quantised(packed=True)
    plain, x = plain_of(model), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for each in (model, plain):
        trainee = lorahub.create(each, kind, target_modules="all-linear", **KINDS[kind])
        with torch.no_grad():
            for own in trainee.parameters():
                own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        each(x).square().mean().backward()
        found.append({name: own.grad for name, own in trainee.named_parameters()})
    for name, grad in found[1].items():
        assert grad is not None
        assert float(grad.norm()) > 0
        torch.testing.assert_close(found[0][name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_packing_back_and_forth_changes_no_number() -> None:
    model = quantised(packed=True)
    numbers = {name: held.read().values() for name, held in held_in(model).items()}
    trainee = lorahub.create(model, "ia3", target_modules="all-linear")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.train()(x).sum().backward()
        assert not any(each.weight.quant_state.packing_format_for_cpu for each in (model.one, model.two))
        with torch.no_grad():
            model.eval()(x)
    trainee.detach()
    assert all(torch.equal(held.read().values(), numbers[name]) for name, held in held_in(model).items())
    assert not any(each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_copy_of_a_model_on_four_bits_is_trained_too(kind: str) -> None:
    model, x = quantised(packed=False), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    trainee = lorahub.create(model, kind, r=4, target_modules="all-linear")
    train(model, trainee.parameters(), 2, data=(x, torch.zeros(8, dtype=torch.long)))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    before = model(x).detach()
    train(twin, lorahub.handle(twin).parameters(), 1, data=(x, torch.zeros(8, dtype=torch.long)))
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["leaf", "view"])
def test_outputs_that_autograd_lets_nobody_write_into_are_not_written_into(kind: str, how: str) -> None:
    model, (ids, _) = Net(), batch()
    lorahub.create(model, kind, target_modules=["q_proj"], **KINDS[kind])
    outputs = model(ids)
    if how == "leaf":
        model.layers[0].q_proj.register_forward_hook(lambda *each: each[2].detach().requires_grad_(), prepend=True)
    else:
        model.layers[0].q_proj.register_forward_hook(lambda *each: _View.apply(each[2]), prepend=True)
    again = model(ids)
    torch.testing.assert_close(again, outputs)
    again.sum().backward()


class _View(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(_context: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad
