"""Prompts that were trained for several tasks, on live models: what PEFT computes and generates for each row's task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorahub
from lorahub.errors import IntegrityError, UsageError
from lorahub_transformers import tasks

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "CAUSAL_LM",
        {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "SEQ_2_SEQ_LM",
        {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
    ),
    "bert": ("BertForSequenceClassification", "SEQ_CLS", {"initializer_range": 0.2}),
}
X = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
MASK = (X != 0).long()

Case = Callable[..., tuple[Any, Any, Path]]


@pytest.fixture
def case(tiny: Callable[..., Any], tmp_path: Path) -> Case:
    """``case(kind, tasks)``: a bare model, PEFT's with the prompt, as loaded from its files, and the folder."""

    def make(kind: str, count: int = 3) -> tuple[Any, Any, Path]:
        name, task, settings = CLASSES[kind]
        config = peft.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=3, num_tasks=count, num_ranks=2)
        trained = peft.get_peft_model(tiny(kind, name, **settings), config)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
        folder = tmp_path / kind
        trained.eval().save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(tiny(kind, name, **settings), folder).eval()
        return tiny(kind, name, **settings), theirs, folder

    return make


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": X, "attention_mask": MASK, **({"labels": X} if kind == "t5" else {})}


def put_out(given: Any) -> torch.Tensor:
    return given.logits.detach()


@pytest.mark.parametrize("kind", CLASSES)
def test_each_row_is_computed_for_its_task_as_peft_computes_it(case: Case, kind: str) -> None:
    model, theirs, folder = case(kind)
    inputs, ids = inputs_of(kind), torch.tensor([2, 0])
    with torch.no_grad():
        bare = put_out(model(**inputs))
        live = lorahub.attach(model, [folder])
        for chosen in (ids, ids.flip(0)):
            expected = put_out(theirs(**inputs, task_ids=chosen))
            torch.testing.assert_close(put_out(model(**inputs, task_ids=chosen)), expected, rtol=0, atol=1e-5)
            with tasks(*chosen.tolist()):
                torch.testing.assert_close(put_out(model(**inputs)), expected, rtol=0, atol=1e-5)
            assert expected.shape != bare.shape or (expected - bare).norm() / bare.norm() > 1e-2
        other = put_out(model(**inputs, task_ids=torch.tensor([1])))
        assert (other - expected).norm() / expected.norm() > 1e-2
        torch.testing.assert_close(other, put_out(theirs(**inputs, task_ids=torch.tensor([1, 1]))), rtol=0, atol=1e-5)
        live.detach()
        torch.testing.assert_close(put_out(model(**inputs)), bare, rtol=0, atol=0)


def test_its_vectors_are_the_shared_ones_times_what_a_loop_makes_of_the_factors(case: Case) -> None:
    model, _, folder = case("llama")
    stored = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    shared, columns, rows = (stored[each] for each in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
    wanted = torch.zeros(3, 16, dtype=torch.float64)
    for token in range(3):
        for place in range(16):
            factor = sum(float(columns[1, token, rank] * rows[1, rank, place]) for rank in range(2))
            wanted[token, place] = float(shared[token, place]) * factor
    seen: list[torch.Tensor] = []
    lorahub.attach(model, [folder])
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model(X, task_ids=torch.tensor([1, 1]))
    torch.testing.assert_close(seen[0][1, :3].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generated_tokens_are_those_of_peft(case: Case, kind: str, more: dict[str, Any]) -> None:
    model, theirs, folder = case(kind)
    options = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, **more}
    bare = model.generate(input_ids=X, **options)
    expected = theirs.generate(input_ids=X, task_ids=torch.tensor([2, 0]), **options)
    lorahub.attach(model, [folder])
    with tasks(2, 0):
        found = model.generate(input_ids=X, **options)
    with tasks(1):
        other = model.generate(input_ids=X, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, bare)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_losses_are_those_of_peft(case: Case, kind: str) -> None:
    model, theirs, folder = case(kind)
    inputs = {**inputs_of(kind), "labels": X.masked_fill(X == 0, -100), "task_ids": torch.tensor([0, 1])}
    expected = theirs(**inputs).loss
    lorahub.attach(model, [folder])
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-6, atol=0)


def test_a_decoder_is_given_its_own_half_whether_its_input_is_words_or_labels(case: Case) -> None:
    model, theirs, folder = case("t5")
    ids, words = torch.tensor([0, 1]), model.prepare_decoder_input_ids_from_labels(X)
    mask = torch.ones_like(X)
    expected = put_out(theirs(**inputs_of("t5"), decoder_attention_mask=mask, task_ids=ids))
    lorahub.attach(model, [folder])
    given = {"input_ids": X, "attention_mask": MASK, "decoder_attention_mask": mask, "task_ids": ids}
    found = put_out(model(**given, decoder_input_ids=words))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_task_needs_no_saying(case: Case) -> None:
    model, theirs, folder = case("bert", 1)
    expected = theirs(**inputs_of("bert"), task_ids=torch.tensor([0, 0])).logits
    lorahub.attach(model, [folder])
    torch.testing.assert_close(model(**inputs_of("bert")).logits, expected, rtol=0, atol=1e-5)


def test_a_call_that_does_not_say_its_tasks_or_says_wrong_ones_is_refused(case: Case) -> None:
    model, _, folder = case("llama")
    lorahub.attach(model, [folder])
    with pytest.raises(UsageError, match="was trained for 3 tasks, and nobody says"):
        model(X)
    with pytest.raises(UsageError, match=r"is asked for \[3\]"):
        model(X, task_ids=torch.tensor([3, 3]))
    with pytest.raises(UsageError, match=r"is asked for \[-1\]"), tasks(-1):
        model(X)
    with pytest.raises(UsageError, match="is told 3 tasks for 2 rows"):
        model(X, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(UsageError, match="is told 3 tasks for 2 rows"), tasks(0, 1, 2):
        model(X)


def test_a_configuration_that_contradicts_the_factors_is_refused(case: Case) -> None:
    model, _, folder = case("bert")
    config = json.loads((folder / "adapter_config.json").read_text())
    for wrong in ({"num_tasks": 2}, {"num_ranks": 1}, {"num_tasks": None}):
        (folder / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(IntegrityError):
            lorahub.attach(model, [folder])
    assert not model._forward_pre_hooks
