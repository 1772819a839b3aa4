"""The way back, and from one adapter to the next, as people call it: a live model and adapters in folders."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorahub
from lorahub.errors import IntegrityError, LorahubError, UsageError
from lorahub.files.writer import save_file


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 96)).bfloat16().requires_grad_(False)


@pytest.fixture
def adapters(model, tmp_path):
    """Two LoRAs as PEFT saves them; the first changes both layers, the second the last one."""
    from peft import LoraConfig, get_peft_model

    folders = []
    for number, targets in enumerate((["0", "1"], ["1"])):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(number)
        copied = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 96)).bfloat16()
        wrapped = get_peft_model(copied, config, autocast_adapter_dtype=False)
        wrapped.save_pretrained(tmp_path / f"adapter{number}")
        folders.append(tmp_path / f"adapter{number}")
    return folders


@pytest.fixture
def origin(model, tmp_path):
    """The folder that the model's weights lie in."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
    return folder


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("undo", ["auto", "copy", "journal", "host", "reload"])
def test_merge_swap_weights_and_undo(model, adapters, origin, undo):
    before = state(model)
    merged = lorahub.merge(model, [adapters[0]], undo=undo, origin=origin, allow=["delta-lost"])
    one = state(model)
    assert not same(model, before)
    report = merged.swap([adapters[1]])
    assert same(model, _fresh(model, before, [adapters[1]]))
    assert list(report.changes) == ["1.weight"]
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    merged.set_weights([0.5])
    assert same(model, _fresh(model, before, [adapters[1]], weights=[0.5]))
    merged.swap(adapters, weights=[1.0, 0.25])
    assert same(model, _fresh(model, before, adapters, weights=[1.0, 0.25]))
    merged.set_weights([-1.0, 0.5])
    assert same(model, _fresh(model, before, adapters, weights=[-1.0, 0.5]))
    merged.swap([adapters[0]])
    assert same(model, one)
    merged.undo()
    assert same(model, before)


def test_one_number_is_for_all(model, adapters):
    before = state(model)
    with lorahub.merge(model, adapters, weights=0.5):
        one = state(model)
    assert same(model, before)
    merged = lorahub.merge(model, adapters, weights=[0.5, 0.5])
    assert same(model, one)
    merged.set_weights(0.25)
    merged.set_weights(torch.tensor(0.5))
    assert same(model, one)
    merged.undo()
    assert (
        lorahub.plan(model, adapters, weights=0.5).digest()
        == lorahub.plan(model, adapters, weights=(0.5, 0.5)).digest()
    )
    with lorahub.attach(model, dict(zip("ab", adapters, strict=True)), weights=0.5, active="a") as live:
        assert live.active == {"a": 0.5}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("0.5", "weights='0.5' are no weights"),
        (object, "are no weights"),
        (["0.5", 1], "the weight of adapter0 is '0.5', which is no number"),
        ({"adapter0": True}, "the weight of adapter0 is True, which is no number"),
        ({"adapter0": float("inf")}, "the weight of adapter0 is inf"),
        ([1], "1 weights for 2 adapters"),
        (torch.ones(3), "3 weights for 2 adapters"),
    ],
)
@pytest.mark.parametrize("act", [lorahub.merge, lorahub.attach, lorahub.plan])
def test_weights_that_are_none_are_refused(model, adapters, weights, says, act):
    before = state(model)
    with pytest.raises(UsageError, match=says):
        act(model, adapters, weights=weights)
    assert same(model, before)


def test_prepared_swaps_need_no_files_and_give_the_same(model, adapters, tmp_path):
    before = state(model)
    merged = lorahub.merge(model, [adapters[0]], allow=["delta-lost"])
    ready = [merged.prepare([adapters[1]], weights=[0.5]), merged.prepare(adapters)]
    wanted = [
        _fresh(model, before, [adapters[1]], weights=[0.5]),
        _fresh(model, before, adapters),
    ]
    for folder in adapters:
        shutil.rmtree(folder)
    for number in (0, 1, 0, 1):
        merged.swap(ready[number])
        assert same(model, wanted[number])
    assert not same(model, wanted[0])
    merged.undo()
    assert same(model, before)


def test_preparing_what_does_not_fit_changes_nothing(model, adapters, tmp_path):
    merged = lorahub.merge(model, [adapters[0]], allow=["delta-lost"])
    one = state(model)
    wrong = tmp_path / "wrong"
    shutil.copytree(adapters[1], wrong)
    config = (wrong / "adapter_config.json").read_text().replace('"1"', '"7"')
    (wrong / "adapter_config.json").write_text(config)
    tensors = load_file(wrong / "adapter_model.safetensors")
    renamed = {name.replace(".1.", ".7."): tensor for name, tensor in tensors.items()}
    save_file(wrong / "adapter_model.safetensors", renamed, {"format": "pt"})
    with pytest.raises(LorahubError, match="7"):
        merged.prepare([wrong])
    assert same(model, one)
    ready = merged.prepare([adapters[1]])
    model.float()
    with pytest.raises(UsageError, match="moved, converted or replaced"):
        merged.swap(ready)


def _fresh(model, before, adapters, **options):
    """What merging into the untouched model gives."""
    other = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 96)).bfloat16()
    other.load_state_dict(before)
    lorahub.merge(other, adapters, allow=["delta-lost"], **options)
    return state(other)


def test_a_swap_that_cannot_be_planned_leaves_the_merge(model, adapters, tmp_path):
    merged = lorahub.merge(model, [adapters[0]], undo="journal")
    held = state(model)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (wrong / name).write_bytes((adapters[0] / name).read_bytes())
    config = (wrong / "adapter_config.json").read_text()
    (wrong / "adapter_config.json").write_text(config)
    tensors = {
        "base_model.model.9.lora_A.weight": torch.ones(2, 96),
        "base_model.model.9.lora_B.weight": torch.ones(80, 2),
    }
    save_file(wrong / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(lorahub.errors.LorahubError):
        merged.swap([wrong])
    assert same(model, held)
    with pytest.raises(UsageError):
        merged.set_weights([1.0, 2.0])
    assert same(model, held)


def test_a_model_that_was_converted_or_replaced_since_is_refused(model, adapters):
    before = state(model)
    merged = lorahub.merge(model, adapters)
    memory, held = {name: tensor.data for name, tensor in model.named_parameters()}, state(model)
    model.float()
    converted = state(model)
    for refused in (merged.undo, lambda: merged.swap(adapters[:1]), lambda: merged.set_weights([1.0, 2.0])):
        with pytest.raises(lorahub.errors.LorahubError):
            refused()
        assert same(model, converted)
    with pytest.raises(UsageError, match="moved, converted or replaced"):
        merged.undo()
    for name, tensor in model.named_parameters():
        tensor.data = memory[name]
    model.load_state_dict({name: tensor.clone() for name, tensor in held.items()}, assign=True)
    with pytest.raises(UsageError, match="moved, converted or replaced"):
        merged.swap(adapters[:1])
    assert same(model, held)
    assert not same(model, before)


def test_reading_again_needs_to_know_from_where(model, adapters, origin):
    before = state(model)
    with pytest.raises(UsageError, match="does not record a base"):
        lorahub.merge(model, adapters, undo="reload")
    with pytest.raises(UsageError, match="origin is a live model"):
        lorahub.merge(model, adapters, undo="reload", origin=model)
    assert same(model, before)


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_a_journal_is_exact_whatever_the_settings_of_arithmetic_are_meanwhile(model, adapters, precision):
    before = state(model)
    merged = lorahub.merge(model, adapters[:1], undo="journal")
    held, setting = state(model), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    caught = None
    try:
        merged.undo()
    except IntegrityError as error:
        caught = error
    finally:
        torch.set_float32_matmul_precision(setting)
    assert same(model, held if caught else before)
    if not merged.undone:
        merged.undo()
    assert same(model, before)
