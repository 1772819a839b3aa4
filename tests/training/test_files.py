"""What is trained, in files: PEFT computes the same from them, and training goes on from them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from training.nets import Net, batch, numbers, same, train

import lorahub
from lorahub.errors import IntegrityError, NotFinite, UnsupportedKind, UsageError, WriteFailed
from lorahub.records import AdapterRecord

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft

CASES = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 4, "alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}, "target_modules": "all-linear"},
    "embedding": {"r": 4, "target_modules": ["embed", "q_proj"]},
    "head": {"r": 4, "target_modules": "q_proj", "modules_to_save": ["head"]},
    "norms": {"r": 4, "target_modules": "q_proj", "modules_to_save": ["head", "norm"]},
    "biases": {"r": 4, "target_modules": "q_proj", "bias": "lora_only"},
    "all biases": {"r": 4, "target_modules": "q_proj", "bias": "all"},
    "pissa": {"r": 4, "target_modules": "all-linear", "init": "pissa"},
    "olora": {"r": 4, "target_modules": ["q_proj", "up_proj"], "init": "olora", "modules_to_save": ["head"]},
    "dora": {"kind": "dora", "r": 4, "target_modules": "all-linear"},
    "ia3": {"kind": "ia3", "target_modules": "all-linear"},
}
BOUND = 16 * torch.finfo(torch.float32).eps
"""Of the largest output: two sums of some ten float32 terms each, in different orders."""


def trained(model: nn.Module, folder: Path, **arguments) -> torch.Tensor:
    """Train, save and detach: the outputs as trained, which differ from the base's by far more than rounding."""
    ids, _ = batch()
    outputs = model(ids).detach()
    with lorahub.create(model, **arguments) as trainee:
        train(model, trainee.parameters(), 8)
        result = model(ids).detach()
        trainee.save(folder)
    assert (result - outputs).norm() > 1e-2 * outputs.norm()
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(CASE)``: a folder and the outputs of the model that was trained."""
    found: dict[str, tuple[Path, torch.Tensor]] = {}

    def one(case: str) -> tuple[Path, torch.Tensor]:
        if case not in found:
            folder = tmp_path_factory.mktemp("saved") / "out"
            found[case] = folder, trained(Net(), folder, **CASES[case])
        return found[case]

    return one


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_from_the_files_what_was_trained(case, saved):
    folder, outputs = saved(case)
    ids, _ = batch()
    loaded = peft.PeftModel.from_pretrained(Net(), folder)
    assert (loaded(ids) - outputs).abs().max() <= BOUND * outputs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_training_is_taken_up_where_it_was_left(case, saved):
    folder, outputs = saved(case)
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, resume=folder)
    assert (model(ids) - outputs).abs().max() <= BOUND * outputs.abs().max()
    assert train(model, trainee.parameters(), 4)[-1] < nn.functional.cross_entropy(outputs, batch()[1])


@pytest.mark.parametrize("case", ["lora", "head", "biases", "pissa", "olora"])
def test_with_the_optimizers_state_the_losses_are_those_of_a_training_that_was_not_interrupted(case, tmp_path):
    model = Net()
    trainee = lorahub.create(model, **CASES[case])
    whole = train(model, trainee.parameters(), 10)
    model = Net()
    trainee = lorahub.create(model, **CASES[case])
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-2)
    first = train(model, [], 5, optimizer=optimizer)
    trainee.save(tmp_path / "out")
    names = [name for name, _ in trainee.named_parameters()]
    states = {name: optimizer.state[own] for name, own in trainee.named_parameters()}
    model = Net()
    trainee = lorahub.create(model, resume=tmp_path / "out")
    again = torch.optim.AdamW(trainee.parameters(), lr=1e-2)
    assert sorted(names) == sorted(name for name, _ in trainee.named_parameters())
    for name, own in trainee.named_parameters():
        again.state[own] = copy.deepcopy(states[name])
    assert first + train(model, [], 5, optimizer=again) == whole


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_is_taken_up_as_what_was_trained_and_no_more(init, tmp_path):
    """The file is LoRA of rank 8; of that 4 are trained, and the 4 that they began as are not."""
    model = Net()
    trainee = lorahub.create(model, r=4, target_modules="all-linear", init=init)
    train(model, trainee.parameters())
    trainee.save(tmp_path / "one")
    again = lorahub.create(Net(), resume=tmp_path / "one")
    assert again.trainable_parameters() == trainee.trainable_parameters()
    state = trainee.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    again.save(tmp_path / "two")
    first, second = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("one", "two"))
    assert first == second
    assert {delta.down.shape[0] for delta in lorahub.load(tmp_path / "one").deltas.values()} == {8}


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_dropout_is_kept_in_the_files_for_us_and_for_peft(kind, tmp_path):
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, kind, r=4, target_modules="q_proj", dropout=0.25)
    train(model, trainee.parameters(), 2)
    trainee.save(tmp_path / "out")
    trainee.detach()
    config = peft.PeftConfig.from_pretrained(tmp_path / "out").to_dict()
    assert config["vera_dropout" if kind == "vera" else "lora_dropout"] == 0.25
    with lorahub.create(model.train(), resume=tmp_path / "out") as again:
        assert not torch.equal(model(ids), model(ids))
        again.save(tmp_path / "again")
    with lorahub.create(model, resume=tmp_path / "again"):
        assert not torch.equal(model(ids), model(ids))
    with lorahub.create(model, resume=tmp_path / "out", dropout=0.0):
        assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("{", "cannot be"),
        ('{"dropout": 2}', "no chance"),
        ('{"departed": "all"}', "no list"),
        ('{"departed": [3]}', "no list"),
        ('{"departed": ["layers.7.q_proj.weight"]}', "layers.7.q_proj.weight is not in it"),
        ('{"departed": ["layers.0.q_proj.weight"]}', "no two halves"),
    ],
)
def test_what_a_file_says_of_its_training_is_held_against_its_tensors(said, match, tmp_path):
    with lorahub.create(Net(), r=3, target_modules="q_proj") as trainee:
        trainee.save(tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"format": "pt", "lorahub.training": said})
    (tmp_path / "out" / "lorahub.json").unlink()
    with pytest.raises(IntegrityError, match=match):
        lorahub.create(Net(), resume=tmp_path / "out")


def test_a_state_goes_into_an_adapter_that_was_made_alike_and_into_no_other():
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, r=4, target_modules="all-linear", init="pissa")
    train(model, trainee.parameters())
    state, outputs = {name: value.clone() for name, value in trainee.state_dict().items()}, model(ids)
    other = Net()
    again = lorahub.create(other, r=4, target_modules="all-linear", init="pissa", seed=3)
    again.load_state_dict(state)
    assert torch.equal(other(ids), outputs)
    with pytest.raises(UsageError, match="state of another adapter"):
        lorahub.create(Net(), r=2, target_modules="q_proj").load_state_dict(state)


def test_an_adapter_that_peft_trained_is_taken_up_with_its_dropout(tmp_path):
    ids, _ = batch()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["q_proj", "up_proj"], modules_to_save=["head"]
    )
    theirs = peft.get_peft_model(Net(), config)
    train(theirs, [own for own in theirs.parameters() if own.requires_grad])
    theirs.eval().save_pretrained(tmp_path)
    model = Net().eval()
    trainee = lorahub.create(model, resume=tmp_path)
    assert (model(ids) - theirs(ids)).abs().max() <= BOUND * theirs(ids).abs().max()
    assert trainee.trainable_parameters().trained == theirs.get_nb_trainable_parameters()[0]
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_what_is_trained_is_merged_and_taken_back():
    model, (ids, _) = Net(), batch()
    before = numbers(model)
    trainee = lorahub.create(model, r=4, target_modules="all-linear", modules_to_save="head")
    train(model, trainee.parameters())
    outputs = model(ids).detach()
    merged = trainee.merge()
    assert "_lorahub" not in dict(model.named_children())
    assert (model(ids) - outputs).abs().max() <= BOUND * outputs.abs().max()
    assert not same(numbers(model), before)
    merged.undo()
    assert same(numbers(model), before)


def test_the_record_names_the_base_as_far_as_it_is_known(tmp_path):
    model = Net()
    structure = lorahub.open_base(model).index.structure
    trainee = lorahub.create(model, r=2, base=f"acme/base@{'a' * 40}", task_type="SEQ_CLS")
    trainee.save(tmp_path / "out")
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.base is not None
    assert (record.base.repo_id, record.base.revision, record.base.structure) == ("acme/base", "a" * 40, structure)
    assert record.kinds == ("lora",)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"
    assert config["task_type"] == "SEQ_CLS"


def test_a_state_that_somebody_gathered_is_saved_in_place_of_the_models_own(tmp_path):
    model, (ids, _) = Net(), batch()
    trainee = lorahub.create(model, r=4, target_modules="all-linear", modules_to_save="head")
    train(model, trainee.parameters())
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model(ids).detach()
    train(model, trainee.parameters())
    trainee.save(tmp_path / "out", state=gathered)
    trainee.detach()
    with lorahub.attach(model, [tmp_path / "out"]):
        assert (model(ids) - outputs).abs().max() <= BOUND * outputs.abs().max()
    with pytest.raises(UsageError, match="the state lacks _lorahub"):
        lorahub.create(model, r=2).save(tmp_path / "other", state=numbers(model))


def test_folders_on_the_way_are_made_and_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with lorahub.create(Net(), r=2, target_modules="q_proj") as trainee:
        assert (trainee.save(tmp_path / "runs" / "1" / "ink") / "adapter_config.json").is_file()
        with pytest.raises(WriteFailed, match="file"):
            trainee.save(tmp_path / "file" / "ink")


def test_what_diverged_is_not_saved(tmp_path):
    trainee = lorahub.create(Net(), r=2)
    with torch.no_grad():
        next(trainee.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite, match="diverged"):
        trainee.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_a_value_that_training_does_not_change():
    model = Net()
    trainee = lorahub.create(model, r=2, target_modules="q_proj")
    before = trainee.adapter
    copied = {target: delta.up.clone() for target, delta in before.deltas.items()}
    train(model, trainee.parameters())
    assert all(torch.equal(delta.up, copied[target]) for target, delta in before.deltas.items())
    assert not any(torch.equal(delta.up, copied[target]) for target, delta in trainee.adapter.deltas.items())


CONFIGS = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]}),
    "pattern": (
        peft.LoraConfig,
        {"r": 4, "target_modules": r"model\.layers\.1\..*_proj", "rank_pattern": {"q_proj": 2}},
    ),
    "rest": (peft.LoraConfig, {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "bias": "all"}),
    "layers": (
        peft.LoraConfig,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["head"]},
    ),
    "dora": (peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 2, "target_modules": ["q_proj"]}),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 2, "target_modules": ["q_proj"]}),
    "ia3": (peft.IA3Config, {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": (peft.VeraConfig, {"r": 8, "target_modules": ["q_proj"]}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]}),
}


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


@pytest.mark.parametrize(
    ("case", "form"),
    [*((case, "object") for case in CONFIGS), ("lora", "dictionary"), ("lora", "file"), ("oft", "dictionary")],
)
def test_a_config_of_peft_makes_as_many_parameters_as_peft_does(case, form, tmp_path):
    kind, fields = CONFIGS[case]
    config = kind(**fields)
    # PEFT finds a layer's number only where something stands before the list
    theirs = peft.get_peft_model(Within(), kind(**fields))
    if form == "file":
        config.save_pretrained(tmp_path)
        config = tmp_path / "adapter_config.json"
    counts = lorahub.create(
        Within(), config=config.to_dict() if form == "dictionary" else config
    ).trainable_parameters()
    # of "all-linear" PEFT leaves out the head of a transformers model only
    assert counts.trained == theirs.get_nb_trainable_parameters()[0]


def test_what_a_config_says_and_nobody_here_does_is_refused_by_name():
    with pytest.raises(UsageError, match="layer_replication"):
        lorahub.create(Net(), config=peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1)]))
    with pytest.raises(UsageError, match="init_lora_weights"):
        lorahub.create(Net(), config={"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "loftq"})
    with pytest.raises(UnsupportedKind, match="PROMPT_TUNING"):
        lorahub.create(Net(), config={"peft_type": "PROMPT_TUNING"})
    with pytest.raises(UsageError, match="no config of PEFT"):
        lorahub.create(Net(), config=3)


def test_what_is_given_beside_a_config_counts_first():
    trainee = lorahub.create(Net(), config=peft.LoraConfig(r=4, target_modules=["q_proj"]), r=2)
    assert {delta.down.shape[0] for delta in trainee.adapter.deltas.values()} == {2}
    trainee.detach()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, bias="all")
    with lorahub.create(Net(), "lora", config=config, bias="none") as trainee:
        assert {target.parameter for target in trainee.targets} == {"weight"}
        assert {delta.kind for delta in trainee.adapter.deltas.values()} == {"lora"}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_what_was_trained_on_a_base_is_known_again_on_it(kind, tmp_path):
    """Gains on outputs change biases too."""
    with lorahub.create(Net(), kind, target_modules=["q_proj", "embed"][: 1 + (kind == "lora")]) as trainee:
        trainee.save(tmp_path)
    assert not {each.code for each in lorahub.check(tmp_path, Net()).findings} & {"targets-differ", "structure-differs"}


def test_biases_that_are_changed_already_are_not_trained_in_full_as_well():
    with pytest.raises(UsageError, match=r"changes layers\.0\.q_proj\.bias itself, and bias='all' trains it in full"):
        lorahub.create(Net(), "ia3", target_modules="q_proj", bias="all")


@pytest.mark.parametrize("more", [{"kind": "dora"}, {"bias": "all"}, {"seed": 1}, {"task_type": "CAUSAL_LM"}, {"r": 4}])
def test_what_an_adapter_is_cannot_be_chosen_when_it_is_taken_up(more, tmp_path):
    with lorahub.create(Net(), r=2, target_modules="q_proj") as trainee:
        trainee.save(tmp_path)
    with pytest.raises(UsageError, match=f"{next(iter(more))} cannot be chosen"):
        lorahub.create(Net(), resume=tmp_path, **more)


@pytest.mark.parametrize("rslora", [False, True])
def test_twenty_steps_have_the_losses_of_peft(rslora):
    """From the same factors and data, in float32: sums in another order, far below 1e-4 of a loss."""
    config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=["q_proj", "up_proj", "down_proj"])
    theirs = peft.get_peft_model(Net(), config)
    model = Net()
    trainee = lorahub.create(model, config=config)
    start = {name.removeprefix("base_model.model."): own for name, own in theirs.named_parameters()}
    slots = {"weight_down": "lora_A.default.weight", "weight_up": "lora_B.default.weight"}
    with torch.no_grad():
        for name, own in trainee.named_parameters():
            module, _, slot = name.removeprefix("_lorahub.default.").rpartition(".")
            own.copy_(start[f"{module}.{slots[slot]}"])
    expected = train(theirs, [own for own in theirs.parameters() if own.requires_grad], 20)
    losses = train(model, trainee.parameters(), 20)
    assert expected[-1] < 0.95 * expected[0]
    assert losses == pytest.approx(expected, rel=1e-4)
