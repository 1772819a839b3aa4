"""What ``lorahub.create`` makes of values that cannot be meant, before anything is changed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from training.nets import Net

import lorahub
from lorahub.errors import UsageError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target_modules": 5}, "target_modules is 5, which is neither"),
        ({"exclude_modules": 5}, "exclude_modules is 5, which is neither"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**64}, "at most 64 bits"),
        ({"alpha": 0}, "alpha is 0, by which the change is multiplied"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\] is 0"),
        ({"task_type": "FOO"}, "there is no task_type='FOO'"),
        ({"task_type": "causal_lm"}, r"Did you mean 'CAUSAL_LM'\?"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(given: dict[str, Any], says: str) -> None:
    model = Net()
    with pytest.raises(UsageError, match=says):
        lorahub.create(model, **({"r": 4, "target_modules": ["q_proj"]} | given))
    assert all(own.requires_grad for own in model.parameters())
    assert [name for name, _ in model.named_children()] == ["embed", "layers", "head"]


@pytest.mark.parametrize("task", [*peft.TaskType, *(each.value for each in peft.TaskType)])
def test_tasks_are_those_of_peft_as_words_or_as_its_enumeration(task: Any, tmp_path: Any) -> None:
    lorahub.create(Net(), r=2, target_modules=["q_proj"], task_type=task).save(tmp_path / "out")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out")).task_type == peft.TaskType(task)


def test_ranks_above_the_smaller_side_of_a_weight_are_spoken_of_and_trained() -> None:
    trainee = lorahub.create(Net(), r=8, target_modules=["q_proj", "head"])
    (found,) = (each for each in trainee.findings if each.code == "rank-above-side")
    assert found.where == ("head.weight",)
    assert "5 of head.weight" in found.message
    trainee.detach()
    assert all(each.code != "rank-above-side" for each in lorahub.create(Net(), r=5, target_modules="head").findings)
