"""What ``lorahub.create`` does to a model, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training.nets import Net, batch, numbers, same, train

import lorahub
from lorahub.errors import Degraded, UsageError

KINDS = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "ia3": {},
    "vera": {"r": 8},
    "oft": {"oft_block_size": 4, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_with_the_base_learns_and_leaves_the_base_as_it_was(kind):
    model, (ids, _) = Net(), batch()
    before, outputs = numbers(model), model(ids).detach()
    with lorahub.create(model, kind, **{"target_modules": "all-linear", **KINDS[kind]}) as trainee:
        assert (model(ids) - outputs).abs().max() <= 4 * torch.finfo(torch.float32).eps * outputs.abs().max()
        losses = train(model, trainee.parameters(), 12)
        assert losses[-1] < losses[0] - 1e-3
        assert (model(ids) - outputs).norm() > 1e-2 * outputs.norm()
        assert same(numbers(model), before)
    assert same(numbers(model), before)
    assert torch.equal(model(ids), outputs)
    assert all(own.requires_grad for own in model.parameters())
    assert "_lorahub" not in dict(model.named_children())
    assert "_lorahub" not in "".join(model.state_dict())


def test_the_model_has_one_child_more_whose_parameters_are_all_that_is_trained():
    model = Net()
    children = [name for name, _ in model.named_children()]
    trainee = lorahub.create(model, r=2, target_modules="q_proj")
    assert [name for name, _ in model.named_children()] == [*children, "_lorahub"]
    wanting = [name for name, own in model.named_parameters() if own.requires_grad]
    assert wanting == [
        f"_lorahub.default.layers.{layer}.q_proj.weight_{slot}" for layer in (0, 1) for slot in ("down", "up")
    ]
    assert [name for name, _ in trainee.named_parameters()] == wanting
    assert {own.dtype for own in trainee.parameters()} == {torch.float32}


def test_a_training_checkpoint_holds_the_adapter_and_lorahub_takes_none_of_it_for_the_base():
    model = Net()
    index = lorahub.open_base(model).index
    lorahub.create(model, r=2, target_modules="q_proj")
    assert any(name.startswith("_lorahub.default.") for name in model.state_dict())
    assert lorahub.open_base(model).index.structure == index.structure


def test_a_base_is_saved_without_the_adapter_on_request():
    model = Net()
    before = set(model.state_dict())
    trainee = lorahub.create(model, r=2)
    with trainee.aside():
        assert set(model.state_dict()) == before
    assert set(model.state_dict()) > before


def test_parameters_that_wanted_no_gradients_want_none_afterwards():
    model = Net()
    model.embed.weight.requires_grad_(False)
    lorahub.create(model, r=2).detach()
    assert [name for name, own in model.named_parameters() if not own.requires_grad] == ["embed.weight"]


def test_counts_are_those_of_the_formula():
    trainee = lorahub.create(Net(), r=4, target_modules=["q_proj", "up_proj"], layers=[1])
    counts = trainee.trainable_parameters()
    assert counts.trained == 4 * (16 + 16) + 4 * (16 + 33)
    assert counts.total == counts.trained + sum(own.numel() for own in Net().parameters())
    assert counts.percent == 100 * counts.trained / counts.total
    assert str(counts) == "324 of 3,515 parameters are trained (9.218 %)"


def test_a_model_on_the_meta_device_is_counted_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(12288, 12288, bias=False) for _ in range(192)))
    trainee = lorahub.create(model, r=4, target_modules="all-linear")
    assert {own.device.type for own in trainee.parameters()} == {"meta"}
    assert trainee.trainable_parameters().trained == 192 * 2 * 4 * 12288


def test_the_seed_alone_decides_how_an_adapter_begins():
    first, again, other = (lorahub.create(Net(), r=2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    lorahub.create(Net(), r=2)
    assert torch.equal(torch.rand(1), expected)


def test_alpha_is_r_where_nobody_says_otherwise_and_patterns_choose_for_single_modules():
    trainee = lorahub.create(
        Net(), r=4, target_modules="all-linear", rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1\.q_proj": 12}
    )
    scales = {target.module: (delta.scale, delta.down.shape[0]) for target, delta in trainee.adapter.deltas.items()}
    assert scales["layers.0.q_proj"] == (1.0, 4)
    assert scales["layers.1.q_proj"] == (3.0, 4)
    assert scales["layers.0.down_proj"] == (2.0, 2)


def test_outputs_are_the_bases_while_it_is_disabled():
    model, (ids, _) = Net(), batch()
    outputs = model(ids).detach()
    trainee = lorahub.create(model, r=4, target_modules="all-linear")
    train(model, trainee.parameters())
    trained = model(ids)
    with trainee.disabled():
        assert torch.equal(model(ids), outputs)
    assert torch.equal(model(ids), trained)
    assert not torch.equal(trained, outputs)


def test_dropout_acts_while_the_model_trains_and_only_then():
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, r=4, target_modules="all-linear", dropout=0.5)
    train(model, trainee.parameters())
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_running_statistics_of_the_base_are_used_and_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2))
    images = torch.randn(8, 3, 4, 4)
    before, outputs = numbers(model), model.eval()(images).detach()
    model.train()
    trainee = lorahub.create(model, r=2, target_modules="all-conv")
    assert torch.allclose(model(images), outputs)
    assert same(numbers(model), before)
    trainee.detach()
    assert model[1].training


def test_a_module_that_is_trained_in_full_is_replaced_and_never_written_to():
    model, (ids, _) = Net(), batch()
    before, outputs = numbers(model), model(ids).detach()
    trainee = lorahub.create(model, r=2, target_modules="q_proj", modules_to_save="head", bias="lora_only")
    assert torch.equal(model(ids), outputs)
    names = {name.removeprefix("_lorahub.default.") for name, _ in trainee.named_parameters()}
    assert {"head.weight_value", "head.bias_value", "layers.0.q_proj.bias_value"} <= names
    train(model, trainee.parameters())
    assert same(numbers(model), before)
    moved = {target.name: delta for target, delta in trainee.adapter.deltas.items() if delta.replacement() is not None}
    assert all(not torch.equal(delta.replacement(), before[name]) for name, delta in moved.items())


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_beginnings_that_look_at_the_base_do_not_change_what_it_computes(init):
    model, (ids, _) = Net(), batch()
    before, outputs = numbers(model), model(ids).detach()
    trainee = lorahub.create(model, r=4, target_modules="all-linear", init=init, batches=[ids])
    assert torch.allclose(model(ids), outputs, atol=1e-5)
    assert train(model, trainee.parameters())[-1] < train(Net(), Net().parameters(), 1)[0]
    assert same(numbers(model), before)


WRONG = [
    ({"kind": "lorra"}, "Did you mean 'lora'"),
    ({"kind": "hira"}, "not be trained here"),
    ({"rank": 4}, "no setting 'rank'"),
    ({"r": 0}, "r is 0"),
    ({"r": "8"}, "a whole number"),
    ({"alpha": "x"}, "a number"),
    ({"init": "pisa"}, "Did you mean 'pissa'"),
    ({"init": "eva"}, "no batches were run"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"bias": "al"}, "Did you mean 'all'"),
    ({"target_modules": "q_prj"}, "Did you mean 'q_proj'"),
    ({"target_modules": []}, "nothing was named"),
    ({"target_modules": [3]}, "neither a name nor a pattern"),
    ({"target_modules": "norm"}, "no linear layer, convolution or embedding"),
    ({"target_modules": "layers"}, "holds some"),
    ({"exclude_modules": "zzz"}, "no module is called 'zzz'"),
    ({"target_modules": "q_proj", "exclude_modules": "q_proj"}, "is excluded"),
    ({"layers": [7]}, "layers names 7"),
    ({"rank_pattern": {"nope": 3}}, "rank_pattern"),
    ({"modules_to_save": "hed"}, "Did you mean 'head'"),
    ({"kind": "vera", "alpha": 2}, "no setting 'alpha'"),
    ({"kind": "vera", "target_modules": "embed"}, "VeRA cannot stand on embed"),
    ({"name": "a.b"}, "cannot be called"),
    ({"base": "acme/base@main"}, "may move"),
    ({"dtype": torch.int8}, "nothing can be trained in"),
    ({"resume": "somewhere", "r": 4}, "beside resume"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[str(arguments)[1:-1] for arguments, _ in WRONG])
def test_what_cannot_be_done_is_refused_by_name_and_changes_nothing(arguments, said):
    model = Net()
    with pytest.raises(UsageError, match=said):
        lorahub.create(model, **{"target_modules": "all-linear", **arguments})
    assert "_lorahub" not in dict(model.named_children())
    assert all(own.requires_grad for own in model.parameters())
    lorahub.create(model, r=2).detach()


def test_an_adapter_is_trained_on_a_model_once():
    model = Net()
    trainee = lorahub.create(model, r=2)
    with pytest.raises(UsageError, match="trained on this model already"):
        lorahub.create(model, r=2)
    with pytest.raises(UsageError, match="trained on its part 0 already"):
        lorahub.create(nn.Sequential(model), r=2)
    trainee.detach()
    trainee.detach()
    with pytest.raises(UsageError, match="was detached"):
        trainee.trainable_parameters()


def test_nothing_begins_in_inference_mode():
    with torch.inference_mode(), pytest.raises(UsageError, match="inference mode"):
        lorahub.create(Net())


def test_a_model_is_wrapped_afterwards():
    with pytest.raises(UsageError, match="create first"):
        lorahub.create(nn.DataParallel(Net()))


def test_an_adapter_begun_without_gradients_is_trained_all_the_same():
    model = Net()
    with torch.no_grad():
        trainee = lorahub.create(model, "ia3", target_modules="all-linear")
    assert train(model, trainee.parameters())[-1] < train(Net(), [nn.Parameter(torch.zeros(1))], 1)[0]


def test_a_parameter_that_two_modules_share_is_not_parted_unasked():
    model = Net()
    model.head = nn.Linear(16, 20, bias=False)
    model.head.weight = model.embed.weight
    with pytest.raises(Degraded, match="shares its storage"):
        lorahub.create(model, r=2, target_modules="head")
    lorahub.create(model, r=2, target_modules="head", allow=["tied-parameter"]).detach()


def test_the_adapter_follows_its_tensors_to_another_dtype():
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, r=4, target_modules="all-linear")
    train(model, trainee.parameters())
    before = model(ids)
    model.double()
    assert model(ids).dtype == torch.float64
    assert torch.allclose(model(ids).float(), before, atol=1e-5)
    assert train(model, trainee.parameters())[-1] < train(Net().double(), [nn.Parameter(torch.zeros(1))], 1)[0]
