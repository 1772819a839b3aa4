"""Adapters attached to quantised models: added to what the layers compute, whose weights stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch

import lorahub
from lorahub.storages.storage import held_in

from .conftest import outputs


def marks(model):
    return {name: one.read().mark() for name, one in held_in(model).items()}


@pytest.fixture
def ready(quantised, inputs):
    """A quantised model that ran once, and inputs for it: libraries lay weights out anew when a model first runs."""

    def make(name):
        model, x = quantised(name), inputs
        if name == "int8":
            model, x = model.half(), x.half()
        outputs(model, x)
        return model, x

    return make


def test_what_an_adapter_adds_is_what_its_change_does_to_the_inputs(ready, stored, lora):
    model, x = ready(stored)
    folder = lora(size=0.3)
    seen = []
    model.q.register_forward_hook(lambda _module, args, out: seen.append((args[0], out.clone())))
    outputs(model, x)
    with lorahub.attach(model, [folder]):
        outputs(model, x)
    (inputs, before), (_, after) = seen
    delta = lorahub.load(folder).deltas
    change = next(each for target, each in delta.items() if target.module.endswith("q"))
    wanted = inputs.double() @ change.delta(torch.zeros(64, 128)).double().T
    found = after.double() - before.double()
    assert wanted.norm() / before.double().norm() > 0.05
    assert (found - wanted).norm() / wanted.norm() < 0.05


def test_attaching_changes_no_weight_and_leaves_no_trace(ready, stored, lora):
    model, x = ready(stored)
    before, plain = marks(model), outputs(model, x)
    live = lorahub.attach(model, [lora(size=0.3)])
    assert not torch.equal(outputs(model, x), plain)
    assert not any(live.coverage().values())
    live.detach()
    assert torch.equal(outputs(model, x), plain)
    assert marks(model) == before


@pytest.mark.filterwarnings("ignore:Merge lora module")
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8", "ao-int8", "ao-float8", "ct-channel"])
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_a_quantised_model_with_an_adapter_computes_what_peft_computes(ready, kind, lora):
    from peft import PeftModel

    folder = lora(size=0.3)
    model, x = ready(kind)
    theirs, _ = ready(kind)
    plain = outputs(model, x)
    theirs.is_loaded_in_4bit = ("4" in kind.split("-")[0] and "p4" in kind) or kind.startswith("nf4")
    theirs.is_loaded_in_8bit = kind == "int8"
    theirs = PeftModel.from_pretrained(theirs, folder).eval()
    expected = outputs(theirs, x)
    with lorahub.attach(model, [folder]):
        found = outputs(model, x)
    distance = (expected.double() - plain.double()).norm() / plain.double().norm()
    assert distance > 0.02
    assert (found.double() - expected.double()).norm() / (expected.double() - plain.double()).norm() < 0.06


def test_a_change_that_depends_on_the_weight_sees_the_weight(ready, stored, lora):
    """DoRA: the row norms of a sum are those of the numbers, not of the codes."""
    folder = lora(size=0.3, use_dora=True)
    model, x = ready(stored)
    reference = copy.deepcopy(model)
    held = held_in(model)
    seen = []
    model.q.register_forward_hook(lambda _module, args, out: seen.append((args[0], out.clone())))
    outputs(model, x)
    with lorahub.attach(model, [folder]):
        outputs(model, x)
    (inputs, before), (_, after) = seen
    change = next(each for target, each in lorahub.load(folder).deltas.items() if target.module.endswith("q"))
    wanted = inputs.double() @ change.delta(held["q.weight"].read().values()).double().T
    found = after.double() - before.double()
    assert (found - wanted).norm() / wanted.norm() < 0.05
    assert marks(model) == marks(reference)


def test_two_adapters_by_row(ready, lora):
    model, x = ready("nf4")
    first, second = (lora(size=0.3, name=name, seed=seed) for seed, name in enumerate(("one", "two")))
    with lorahub.attach(model, {"one": first, "two": second}) as live:
        alone = {}
        for name in ("one", "two"):
            with live.using([name]):
                alone[name] = outputs(model, x)
        live.adapter_names = ["one", "two", "one", None, "two"]
        mixed = outputs(model, x)
    plain = outputs(model, x)
    for row, name in enumerate(["one", "two", "one", None, "two"]):
        wanted = plain if name is None else alone[name]
        torch.testing.assert_close(mixed[row].float(), wanted[row].float(), rtol=0.05, atol=0.05)
    assert not torch.allclose(alone["one"].float(), alone["two"].float(), atol=0.05)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "ao-float8"])
def test_gradients_reach_the_factors_through_a_quantised_layer(quantised, kind, lora, inputs):
    model = quantised(kind).train()  # in eval mode bitsandbytes has no gradients on some CPUs
    model.requires_grad_(False)
    adapter = lorahub.load(lora(size=0.3))
    tensors = [each for delta in adapter.deltas.values() for each in delta.tensors().values()]
    for each in tensors:
        each.requires_grad_(True)
    with lorahub.attach(model, {"one": adapter}):
        model(inputs).float().pow(2).sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in tensors)


def test_it_makes_no_difference_whether_the_model_ran_before(quantised, ready, stored, lora):
    folder = lora(size=0.3)
    ran, x = ready(stored)
    fresh = quantised(stored)
    fresh = fresh.half() if stored == "int8" else fresh
    with lorahub.attach(ran, [folder]), lorahub.attach(fresh, [folder]):
        assert torch.equal(outputs(ran, x), outputs(fresh, x))
    assert torch.equal(outputs(ran, x), outputs(fresh, x))
