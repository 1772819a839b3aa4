"""Adapters as their authors stored them, merged into bases of the right shapes and held against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import lorahub
from lorahub.merging.preparing import prepare

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

SMALLER: dict[str, dict[str, Any]] = {
    # parameters that no adapter here touches, cut down so that the bases fit into a test
    "cyberagent/open-calm-1b": {"vocab_size": 64, "intermediate_size": 32},
    "openai/privacy-filter": {
        "vocab_size": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "pad_token_id": 0,
        "num_labels": 33,
    },
    "gpt2": {"vocab_size": 64},
    "distilgpt2": {"vocab_size": 64},
}
CASES = {
    "niket-sharma__LLMs-from-groundup__distilgpt2": ("distilgpt2", "GPT2LMHeadModel"),
    "BK7195__deltacompression-poc__opencalm_fp16_r1": ("cyberagent/open-calm-1b", "GPTNeoXForCausalLM"),
    "deepbiolab__gpt2-classification-peft__gpt2_cls_cproj": ("gpt2", "GPT2ForSequenceClassification"),
    "branbot6__sift-opf-zh__privacy_filter_moe": ("openai/privacy-filter", "OpenAIPrivacyFilterForTokenClassification"),
}


def base_of(built: dict[str, Any], name: str, class_name: str) -> Any:
    """A base of the adapter's shapes with random weights, the same each time."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**built["config_kwargs"], **SMALLER[name]})
    torch.manual_seed(0)
    return model_class(config).eval()


SLOW = {"BK7195__deltacompression-poc__opencalm_fp16_r1"}  # a base with the widths of a billion parameters


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def case(request: pytest.FixtureRequest, real_adapters: Path) -> tuple[Path, Any, Any]:
    """The adapter's folder, and its base twice."""
    name, class_name = CASES[request.param]
    built = json.loads((real_adapters / "bases.json").read_text())[name]
    return real_adapters / request.param, base_of(built, name, class_name), base_of(built, name, class_name)


def test_a_real_adapter_merges_as_peft_merges_it(case: tuple[Path, Any, Any]) -> None:
    folder, ours, theirs = case
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    job = prepare(ours, {"real": str(folder)})
    assert not [finding for finding in job.findings if finding.level >= lorahub.Verdict.DEGRADED]
    merged = lorahub.merge(ours, {"real": str(folder)})
    with torch.no_grad():
        reference = PeftModel.from_pretrained(theirs, folder).merge_and_unload().state_dict()
    after = ours.state_dict()
    touched = {step.out for step in job.plan.steps}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert len(changed) >= len(touched)
    for name, weight in after.items():
        torch.testing.assert_close(weight, reference[name], atol=2e-5, rtol=1e-4, msg=name)
    largest = max(float((after[name] - before[name]).norm() / before[name].norm()) for name in changed)
    assert largest > 1e-2
    merged.undo()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
