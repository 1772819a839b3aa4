"""What a config trains that names no modules: what PEFT trains then, or nothing."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from torch import nn
from training.nets import Net

import lorahub
from lorahub.errors import UsageError
from lorahub.training.peft_targets import FEEDFORWARD, TARGETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft.utils import constants

OUTPUTS, INPUTS = 0, 1


def plain(table):
    return {name: chosen if isinstance(chosen, str) else sorted(chosen) for name, chosen in table.items()}


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "dora"])
def test_the_table_of_a_kind_is_that_of_the_installed_peft(kind):
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind.upper()}_TARGET_MODULES_MAPPING")
    assert plain(TARGETS[kind]) == plain(theirs)


def test_the_feed_forward_modules_are_those_of_the_installed_peft():
    assert plain(FEEDFORWARD) == plain(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING)
    assert TARGETS["dora"] is TARGETS["lora"]


def of_type(model_type: str) -> nn.Module:
    model = Net()
    model.config = SimpleNamespace(model_type=model_type)
    return model


CONFIGS = {
    "object": peft.LoraConfig(r=2),
    "dictionary": {"peft_type": "LORA", "r": 2},
    "dora": peft.LoraConfig(r=2, use_dora=True),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "vera": peft.VeraConfig(r=2),
    "oft": peft.OFTConfig(oft_block_size=4),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_without_modules_trains_what_peft_chooses_for_such_a_model(case):
    with lorahub.create(of_type("qwen2"), config=CONFIGS[case]) as trainee:  # the net has a q_proj and no v_proj
        assert {target.module.rpartition(".")[2] for target in trainee.targets} == {"q_proj"}


def test_gains_go_to_the_inputs_of_what_peft_takes_for_feed_forward():
    with lorahub.create(of_type("gemma"), config=peft.IA3Config()) as trainee:
        axes = {target.module.rpartition(".")[2]: delta.axis for target, delta in trainee.adapter.deltas.items()}
    assert axes == {"q_proj": OUTPUTS, "down_proj": INPUTS}


def test_feed_forward_modules_can_be_a_set_as_peft_makes_them():
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    with lorahub.create(Net(), config=config) as trainee:
        assert {delta.axis for delta in trainee.adapter.deltas.values()} == {OUTPUTS, INPUTS}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("model", [Net(), of_type("whisper")], ids=["no type", "unknown to PEFT"])
def test_where_peft_has_no_choice_modules_are_asked_for(case, model):
    with pytest.raises(UsageError, match="names no target_modules, and PEFT has no choice"):
        lorahub.create(model, config=CONFIGS[case])
    with lorahub.create(model, config=CONFIGS[case], target_modules=["up_proj"]) as trainee:
        assert {target.module.rpartition(".")[2] for target in trainee.targets} == {"up_proj"}


def test_a_model_that_has_nothing_of_it_is_told_what_was_looked_for():
    with pytest.raises(UsageError, match="this bert has none of those that PEFT takes then: query, value"):
        lorahub.create(of_type("bert"), config=peft.LoraConfig())


def test_feed_forward_modules_are_asked_for_too():
    config = peft.IA3Config(target_modules=["q_proj"])
    with pytest.raises(UsageError, match="names no feedforward_modules"):
        lorahub.create(Net(), config=config)
    with lorahub.create(Net(), config=config, feedforward_modules=[]) as trainee:
        assert {delta.axis for delta in trainee.adapter.deltas.values()} == {OUTPUTS}


def test_no_modules_at_all_is_something_else_than_none_named():
    config = peft.LoraConfig(target_modules=[], target_parameters=["down_proj.weight"])
    with pytest.raises(UsageError, match="target_parameters: no parameter is called"):  # but a module is
        lorahub.create(of_type("llama"), config=config)
