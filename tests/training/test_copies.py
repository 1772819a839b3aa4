"""Copies of a model that is trained: moving averages, references and pickles compute what it does, on their own."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training.nets import Net, batch, train

import lorahub
from lorahub.errors import UsageError
from lorahub.training.made import Made
from lorahub.training.seating import _Chair
from lorahub.training.seats import Seat
from lorahub.training.trainee import Trainee, _Again

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rank-stabilised": {"kind": "lora", "r": 4, "use_rslora": True, "dropout": 0.1},
    "pissa": {"kind": "lora", "r": 4, "init": "pissa"},
    "dora": {"r": 4},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "ia3": {},
    "vera": {"r": 8},
    "oft": {"oft_block_size": 4},
    "with a head": {"kind": "lora", "r": 4, "modules_to_save": ["head"], "bias": "all"},
}


def begun(case: str = "lora", steps: int = 3) -> tuple[Net, Trainee]:
    arguments = {"kind": case, "target_modules": ["q_proj"]} | KINDS[case]
    model = Net()
    trainee = lorahub.create(model, **arguments)
    train(model, trainee.parameters(), steps, optimizer=torch.optim.AdamW(trainee.parameters(), lr=0.05))
    model.eval()
    return model, trainee


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def saved(model: nn.Module) -> nn.Module:
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)  # type: ignore[no-any-return]


WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", KINDS)
def test_a_copy_computes_what_the_trained_model_does_on_parameters_of_its_own(case: str, way: str) -> None:
    model, trainee = begun(case)
    ids, _ = batch()
    plain, outputs = Net().eval()(ids), model(ids)
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    twin = WAYS[way](model)
    assert torch.equal(twin(ids), outputs)
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for name, own in twin.named_parameters():
            if "_lorahub" in name:
                own.mul_(1.5)
    assert not torch.equal(twin(ids), outputs)
    assert torch.equal(model(ids), outputs)
    trainee.detach()
    assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", KINDS)
def test_a_copy_is_trained_on_saved_and_taken_off_like_its_model(case: str, way: str, tmp_path: Any) -> None:
    model, trainee = begun(case)
    twin = WAYS[way](model)
    other = lorahub.handle(twin)
    assert isinstance(other, Trainee)
    assert lorahub.handle(model) is trainee
    for one, its in ((model, trainee), (twin, other)):
        torch.manual_seed(0)
        train(one.train(), its.parameters(), 3)
    ids, _ = batch()
    assert torch.equal(twin.eval()(ids), model.eval()(ids))
    trainee.save(tmp_path / "model")
    other.save(tmp_path / "twin")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()
    other.detach()
    plain = Net().eval()
    assert torch.equal(twin(ids), plain(ids))
    assert {name: own.requires_grad for name, own in twin.named_parameters()} == dict.fromkeys(plain.state_dict(), True)
    assert vars(twin).keys() == vars(plain).keys()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in twin.modules())


@pytest.mark.parametrize("case", ["lora", "dora", "oft"])
def test_moving_averages_are_those_of_the_trained_parameters(case: str) -> None:
    model, trainee = begun(case, 0)
    kept, last = AveragedModel(model), AveragedModel(model, avg_fn=lambda _mean, new, _count: new)
    states = []
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=0.05)
    for _ in range(3):
        train(model, trainee.parameters(), 1, optimizer=optimizer)
        kept.update_parameters(model)
        last.update_parameters(model)
        states.append({name: own.detach().clone() for name, own in trainee.named_parameters()})
    ids, _ = batch()
    outputs, plain = model.eval()(ids), Net().eval()(ids)
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    assert torch.equal(last.eval()(ids), outputs)
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    with torch.no_grad():
        for name, own in trainee.named_parameters():
            own.copy_(mean[name])
    torch.testing.assert_close(kept.eval()(ids), model(ids))
    assert not torch.equal(model(ids), outputs)


def test_a_frozen_copy_stays_what_it_was_while_the_model_is_trained_on() -> None:
    model, trainee = begun()
    ids, _ = batch()
    reference = copy.deepcopy(model).requires_grad_(False)
    outputs = reference(ids)
    train(model, trainee.parameters())
    assert torch.equal(reference(ids), outputs)
    assert not torch.equal(model.eval()(ids), outputs)
    assert not outputs.requires_grad


def test_a_copy_of_a_model_inside_another_is_trained_too() -> None:
    model, _ = begun()
    ids, _ = batch()
    assert torch.equal(copy.deepcopy(nn.ModuleDict({"inner": model}))["inner"](ids), model(ids))
    assert torch.equal(pickled(nn.Sequential(model))(ids), model(ids))


def test_normalisations_take_their_modes_again_when_a_copy_is_done() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    lorahub.create(model, r=2, target_modules=["0"])
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert not twin[1].training
    lorahub.handle(twin).detach()
    assert twin[1].training
    assert torch.equal(twin[1].running_mean, torch.zeros(4))


def test_a_part_of_a_trained_model_is_not_copied_without_what_is_trained() -> None:
    model, _ = begun()
    with pytest.raises(UsageError, match="a part of a model with adapters"):
        copy.deepcopy(model.layers[0])
    part = pickled(model.layers[0])
    with pytest.raises(UsageError, match="was pickled without the rest"):
        part(torch.zeros(1, 16))


def test_a_copy_that_is_made_of_the_base_alone_is_the_base() -> None:
    model, trainee = begun()
    ids, _ = batch()
    with trainee.aside():
        twin = copy.deepcopy(model)
    assert torch.equal(twin(ids), Net().eval()(ids))
    lorahub.create(twin, r=2, target_modules=["q_proj"])


def test_checkpointing_goes_on_in_a_copy_and_leaves_nothing_behind() -> None:
    model, trainee = begun()
    trainee.require_input_grads()
    twin = copy.deepcopy(model).train()
    seen: list[bool] = []
    twin.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].requires_grad))
    twin(batch()[0])
    assert seen == [True]
    twin.layers[0]._forward_pre_hooks.clear()
    lorahub.handle(twin).detach()
    assert not any(each._forward_hooks for each in twin.modules())


@pytest.mark.slow
def test_a_model_that_is_sent_to_another_process_is_trained_there() -> None:
    model, _ = begun()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        there = pool.apply(_outputs, (model,))
    ids, _ = batch()
    assert torch.equal(torch.tensor(there), model(ids))


def _outputs(model: nn.Module) -> list[list[float]]:
    found: list[list[float]] = model(batch()[0]).tolist()
    return found


def test_what_a_copy_is_made_from_holds_all_that_its_model_was_made_with() -> None:
    assert _names(Made) - {"base", "seats"} <= _names(_Again)
    assert _names(Seat) == _names(_Chair)


def _names(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}
