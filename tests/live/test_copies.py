"""Copies of a model with adapters attached: they have them too, and their own; what cannot have them is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import lorahub
from lorahub.deltas.dora import DoRA
from lorahub.errors import UsageError
from lorahub.live.attached import Live


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

    def first(self, x):
        return self.a(x)


class Around(nn.Module):
    """A model inside another, which it knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.known = [self]

    def forward(self, x):
        return self.inner(x)


def deltas(bench, seed=0):
    down = bench.lora(6, 6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": bench.lora(6, 8, seed=seed),
        "b.weight": DoRA(down.up, down.down, down.scale, torch.rand(6, generator=generator) + 1),
    }


def test_a_deep_copy_computes_what_the_model_does_and_changes_apart_from_it(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    plain = model(x)
    live = bench.attach(model, {"one": deltas(bench), "two": deltas(bench, 3)}, active=["one"])
    outputs, first = model(x), model.first(x)
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.first(x), first)
    assert torch.equal(twin(x), outputs)
    other = lorahub.handle(twin)
    assert isinstance(other, Live)
    assert other is not live
    assert other.adapters == live.adapters
    other.set_adapters(["two"], weights=[0.5])
    assert not torch.equal(twin(x), outputs)
    assert torch.equal(model(x), outputs)
    live.detach()
    assert torch.equal(model(x), plain)
    other.set_adapters(["one"])
    assert torch.equal(twin(x), outputs)
    other.detach()
    assert torch.equal(twin(x), plain)
    assert all(type(each._parameters) is dict and not each._forward_hooks for each in twin.modules())
    assert vars(twin).keys() == vars(Two()).keys()


def test_a_copy_has_factors_of_its_own(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    given = deltas(bench)
    bench.attach(model, {"one": given})
    outputs = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        given["a.weight"].up.zero_()
    assert torch.equal(twin(x), outputs)


def test_a_copy_takes_rows_and_weights_as_they_were_chosen(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": deltas(bench), "two": deltas(bench, 3)})
    live.set_rows(["two", None, "one"], weights={"one": 0.5})
    outputs = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), outputs)
    assert lorahub.handle(twin).adapter_names == ("two", None, "one")


def test_a_copy_of_a_copy_has_adapters_too_and_each_is_freed_by_itself(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    bench.attach(model, {"one": deltas(bench)})
    twin = copy.deepcopy(model)
    third = copy.deepcopy(twin)
    assert torch.equal(third(x), model(x))
    assert len(third.a._forward_hooks) == len(model.a._forward_hooks)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_a_model_inside_another_is_copied_with_its_adapters(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    whole = Around(model)
    bench.attach(model, {"one": deltas(bench)})
    twin = copy.deepcopy(whole)
    assert torch.equal(twin(x), model(x))
    assert twin.known[0] is twin
    assert lorahub.handle(twin.inner) is not lorahub.handle(model)


def test_hooks_of_others_stay_in_a_copy(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    model.a.register_forward_hook(double)
    bench.attach(model, {"one": deltas(bench)})
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert list(copy.deepcopy(model).a._forward_hooks.values()).count(double) == 1


def double(_module, _args, y):
    return 2 * y


def test_a_copy_of_a_part_and_a_pickle_of_an_attached_model_are_refused(bench):
    model = Two().eval()
    live = bench.attach(model, {"one": deltas(bench)})
    with pytest.raises(UsageError, match="a part of a model with adapters"):
        copy.deepcopy(model.a)
    for part in (model, model.b):
        with pytest.raises(UsageError, match="pickles a model with adapters"):
            pickle.dumps(part)
        with pytest.raises(UsageError, match="pickles a model with adapters"):
            torch.save(part, io.BytesIO())
    live.detach()
    assert torch.equal(pickle.loads(pickle.dumps(model)).a.weight, copy.deepcopy(model.a).weight)


def test_tensors_out_of_a_graph_are_not_copied_silently(bench):
    model = Two().eval()
    low = bench.lora(6, 8)
    grown = type(low)(low.up.requires_grad_() * 2, low.down, low.scale)
    bench.attach(model, {"one": {"a.weight": grown}})
    with pytest.raises(UsageError, match="computed with gradients"):
        copy.deepcopy(model)


def test_a_model_without_adapters_has_no_handle():
    with pytest.raises(UsageError, match="no adapters attached"):
        lorahub.handle(Two())
