"""Created heads and untied parameters, each written to disk by the edits and loaded by plain ``from_pretrained``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorahub.bases.framework import Edits
from lorahub.bases.index import BaseRef
from lorahub.bases.open import survey_base

AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    None: transformers.AutoModelForImageClassification,
}

# kind, the base's class, its settings, PEFT's task, the class it must become
CREATED = [
    ("bert", "BertModel", {}, "SEQ_CLS", "BertForSequenceClassification"),
    ("bert", "BertModel", {}, "TOKEN_CLS", "BertForTokenClassification"),
    ("bert", "BertModel", {}, "QUESTION_ANS", "BertForQuestionAnswering"),
    ("bert", "BertForPreTraining", {}, "SEQ_CLS", "BertForSequenceClassification"),
    ("bert", "BertForMaskedLM", {"tie_word_embeddings": False}, "TOKEN_CLS", "BertForTokenClassification"),
    ("roberta", "RobertaModel", {}, "SEQ_CLS", "RobertaForSequenceClassification"),
    ("roberta", "RobertaForMaskedLM", {}, "SEQ_CLS", "RobertaForSequenceClassification"),
    ("xlm-roberta", "XLMRobertaForMaskedLM", {}, "TOKEN_CLS", "XLMRobertaForTokenClassification"),
    ("camembert", "CamembertModel", {}, "QUESTION_ANS", "CamembertForQuestionAnswering"),
    ("distilbert", "DistilBertModel", {}, "SEQ_CLS", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertForMaskedLM", {}, "TOKEN_CLS", "DistilBertForTokenClassification"),
    ("gpt2", "GPT2Model", {}, "SEQ_CLS", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel", {}, "SEQ_CLS", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel", {"tie_word_embeddings": False}, "TOKEN_CLS", "GPT2ForTokenClassification"),
    ("gpt_neox", "GPTNeoXForCausalLM", {}, "SEQ_CLS", "GPTNeoXForSequenceClassification"),
    ("gpt_neox", "GPTNeoXModel", {}, "CAUSAL_LM", "GPTNeoXForCausalLM"),
    ("llama", "LlamaForCausalLM", {}, "SEQ_CLS", "LlamaForSequenceClassification"),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}, "TOKEN_CLS", "LlamaForTokenClassification"),
    ("llama", "LlamaModel", {}, "QUESTION_ANS", "LlamaForQuestionAnswering"),
    ("mistral", "MistralForCausalLM", {}, "QUESTION_ANS", "MistralForQuestionAnswering"),
    ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, "SEQ_CLS", "Qwen2ForSequenceClassification"),
    ("qwen3", "Qwen3ForCausalLM", {}, "SEQ_CLS", "Qwen3ForSequenceClassification"),
    ("t5", "T5ForConditionalGeneration", {}, "SEQ_CLS", "T5ForSequenceClassification"),
    ("t5", "T5ForConditionalGeneration", {}, "TOKEN_CLS", "T5ForTokenClassification"),
    ("t5", "T5Model", {}, "QUESTION_ANS", "T5ForQuestionAnswering"),
    ("vit", "ViTModel", {}, None, "ViTForImageClassification"),
    ("vit", "ViTForMaskedImageModeling", {}, None, "ViTForImageClassification"),
    ("openai_privacy_filter", "OpenAIPrivacyFilterModel", {}, "TOKEN_CLS", "OpenAIPrivacyFilterForTokenClassification"),
]


@dataclass
class Case:
    """A saved base, its index, and the tensors of a head for it."""

    folder: Path
    index: Any
    head: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor] = field(default_factory=dict)  # canonical

    @property
    def created(self):
        return {name: (tuple(tensor.shape), "F32") for name, tensor in self.head.items()}

    def write(self, edits: Edits, out: Path) -> Path:
        """What a merge does with edits, and nothing more."""
        stored = load_file(self.folder / "model.safetensors")
        kept = {**self.index.parameters, **self.index.extras}
        tensors = {
            edits.renamed.get(name, info.stored_as): stored[info.stored_as]
            for name, info in kept.items()
            if name not in edits.removed and name not in self.head
        }
        tensors |= {edits.renamed.get(name, name): tensor for name, tensor in self.head.items()}
        for name, leader in edits.copied.items():
            tensors[edits.renamed.get(name, name)] = stored[self.index.parameters[leader].stored_as].clone()
        out.mkdir()
        save_file(tensors, out / "model.safetensors")
        config = json.loads((self.folder / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, **edits.config}))
        return out


@pytest.fixture
def case(tiny, saved, framework):
    def make(kind, base, target=None, *, labels=5, **settings):
        model = tiny(kind, base, **settings)
        folder = saved(model)
        index = framework.index(BaseRef(), survey_base(folder))
        head = {}
        if target:
            extra = {} if target.endswith("ForQuestionAnswering") else {"num_labels": labels}
            other = tiny(kind, target, seed=1, **settings, **extra)
            live = framework.parameters(other, framework.index_model(other, BaseRef()))
            table = framework.index_model(other, BaseRef()).parameters
            head = {
                name: live[name].detach().clone()
                for name in table
                if name not in index.parameters and not name.startswith(("bert.", "vit.", "decoder."))
            }
        return Case(folder, index, head, {n: t.detach() for n, t in framework.parameters(model, index).items()})

    return make


def load(auto, folder, **options):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    problems = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not problems, problems
    return model


@pytest.mark.parametrize(("kind", "base", "settings", "task", "target"), CREATED)
def test_a_created_head_loads_with_nothing_missing_and_nothing_left_over(
    kind, base, settings, task, target, case, framework, tmp_path
):
    one = case(kind, base, target, **settings)
    edits = framework.edits(one.index, one.created, {"task_type": task} if task else {})
    assert edits is not None
    assert not edits.missing

    model = load(AUTO[task], one.write(edits, tmp_path / "merged"))
    assert type(model).__name__ == target
    loaded = framework.parameters(model, framework.index_model(model, BaseRef()))
    for name, tensor in one.head.items():
        assert torch.equal(loaded[name], tensor), name
    for name, tensor in one.base.items():
        if name in loaded and name not in one.head:
            assert torch.equal(loaded[name], tensor), name
    if any(name.endswith("weight") and tensor.shape[0] == 5 for name, tensor in one.head.items()):
        assert model.config.num_labels == 5


def test_without_the_edits_the_head_would_be_lost_or_the_load_would_complain(case, tmp_path):
    one = case("bert", "BertModel", "BertForSequenceClassification")
    with pytest.raises((AssertionError, RuntimeError)):
        load(AUTO["SEQ_CLS"], one.write(Edits(), tmp_path / "merged"))


def test_a_bare_checkpoint_that_becomes_one_with_a_head_gets_the_prefix(case, framework):
    one = case("bert", "BertModel", "BertForSequenceClassification")
    renamed = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"}).renamed
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert renamed[name] == name
    assert len(renamed) == len(one.index.parameters)


def test_renaming_keeps_the_old_spelling_below_the_prefix(case, framework):
    one = case("vit", "ViTModel", "ViTForImageClassification")
    renamed = framework.edits(one.index, one.created, {}).renamed
    assert renamed["vit.layers.0.attention.q_proj.weight"] == "vit.encoder.layer.0.attention.attention.query.weight"


def test_a_checkpoint_that_has_its_prefix_is_not_renamed(case, framework):
    one = case("gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification")
    edits = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"})
    assert not edits.renamed
    assert not edits.removed  # the language head was tied, so there is nothing to remove


def test_an_output_layer_of_its_own_is_removed(case, framework):
    one = case("llama", "LlamaForCausalLM", "LlamaForSequenceClassification")
    assert framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"}).removed == ("lm_head.weight",)


def test_a_pooler_that_nobody_has_is_missing_not_made_up(case, framework):
    one = case("bert", "BertForMaskedLM", "BertForSequenceClassification")
    edits = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"})
    assert edits.missing == ("bert.pooler",)


def test_a_pooler_that_the_adapter_brings_is_not_missing(case, framework):
    one = case("bert", "BertForMaskedLM", "BertForSequenceClassification")
    created = one.created | {f"bert.pooler.dense.{each}": ((16, 16), "F32") for each in ("weight", "bias")}
    edits = framework.edits(one.index, created, {"task_type": "SEQ_CLS"})
    assert edits is not None
    assert not edits.missing


def test_half_a_head_is_missing_its_other_half(case, framework):
    one = case("distilbert", "DistilBertModel", "DistilBertForSequenceClassification")
    del one.head["pre_classifier.bias"]
    edits = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"})
    assert edits.missing == ("pre_classifier.bias",)


def test_the_class_is_never_guessed(case, framework):
    # classifier.weight alone could be for sequences, tokens or multiple choice.
    one = case("bert", "BertModel", "BertForSequenceClassification")
    assert framework.edits(one.index, one.created, {}) is None
    named = framework.edits(
        one.index, one.created, {"auto_mapping": {"base_model_class": "BertForTokenClassification"}}
    )
    assert named.config["architectures"] == ["BertForTokenClassification"]
    assert framework.edits(one.index, one.created, {"task_type": "QUESTION_ANS"}) is None


def test_a_parameter_that_no_class_has_cannot_be_taken(case, framework):
    one = case("llama", "LlamaForCausalLM")
    assert framework.edits(one.index, {"reward.weight": ((1, 16), "F32")}, {"task_type": "SEQ_CLS"}) is None
    assert framework.edits(one.index, {"model.layers.0.extra.weight": ((1, 16), "F32")}, {}) is None


def test_a_head_of_which_an_architecture_outside_the_table_has_no_class_is_not_taken(case, framework):
    one = case("opt", "OPTForCausalLM")
    score = {"score.weight": ((2, 16), "F32")}
    assert framework.edits(one.index, score, {"task_type": "SEQ_CLS"}).config["architectures"]
    assert framework.edits(one.index, score, {"task_type": "TOKEN_CLS"}) is None
    assert framework.edits(one.index, score, {}) is None


def test_nothing_created_means_nothing_edited(case, framework):
    assert framework.edits(case("bert", "BertModel").index, {}, {}) == Edits()


def test_a_head_with_another_number_of_labels_changes_the_labels_alone(case, framework, tmp_path):
    one = case("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", num_labels=4)
    torch.manual_seed(2)
    one.head = {"score.weight": torch.randn(7, 16), "score.bias": torch.randn(7)}
    edits = framework.edits(one.index, one.created, {"task_type": "TOKEN_CLS"})

    assert set(edits.config) == {"id2label", "label2id"}
    assert not edits.removed
    assert not edits.renamed
    model = load(AUTO["TOKEN_CLS"], one.write(edits, tmp_path / "merged"))
    assert torch.equal(model.score.weight, one.head["score.weight"])


def test_labels_that_fit_in_number_stay(case, framework, tmp_path):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    one = case("bert", "BertModel", "BertForSequenceClassification", labels=3, id2label=names)
    edits = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"})
    assert "id2label" not in edits.config
    assert load(AUTO["SEQ_CLS"], one.write(edits, tmp_path / "merged")).config.id2label == names


def test_labels_that_the_adapter_names_are_written(case, framework, tmp_path):
    one = case("bert", "BertModel", "BertForSequenceClassification", labels=3)
    hints = {"task_type": "SEQ_CLS", "id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    model = load(AUTO["SEQ_CLS"], one.write(framework.edits(one.index, one.created, hints), tmp_path / "merged"))
    assert model.config.label2id == {"no": 0, "yes": 1, "perhaps": 2}


def test_two_labels_need_no_edit(case, framework, tmp_path):
    one = case("bert", "BertModel", "BertForSequenceClassification", labels=2)
    edits = framework.edits(one.index, one.created, {"task_type": "SEQ_CLS"})
    assert set(edits.config) == {"architectures"}
    assert load(AUTO["SEQ_CLS"], one.write(edits, tmp_path / "merged")).config.num_labels == 2


def test_a_stale_num_labels_of_an_old_configuration_is_brought_in_step(case, framework, tmp_path):
    one = case("bert", "BertModel", "BertForSequenceClassification", labels=3)
    path = one.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 9}))
    index = framework.index(BaseRef(), survey_base(one.folder))
    edits = framework.edits(index, one.created, {"task_type": "SEQ_CLS"})
    assert load(AUTO["SEQ_CLS"], one.write(edits, tmp_path / "merged")).config.num_labels == 3


@pytest.mark.parametrize(
    ("kind", "name", "auto"),
    [
        ("gpt2", "GPT2LMHeadModel", transformers.AutoModelForCausalLM),
        ("llama", "LlamaForCausalLM", transformers.AutoModelForCausalLM),
        ("gpt_neox", "GPTNeoXForCausalLM", transformers.AutoModelForCausalLM),
        ("bert", "BertForMaskedLM", transformers.AutoModelForMaskedLM),
        ("roberta", "RobertaForMaskedLM", transformers.AutoModelForMaskedLM),
        ("distilbert", "DistilBertForMaskedLM", transformers.AutoModelForMaskedLM),
    ],
)
def test_untied_parameters_load_as_two(kind, name, auto, case, framework, tmp_path):
    one = case(kind, name, tie_word_embeddings=True)
    leader, twin = next(group for group in one.index.tied if group[0].endswith("weight"))
    edits = framework.untie(one.index, [twin])
    assert edits.copied[twin] == leader

    folder = one.write(edits, tmp_path / "merged")
    tensors = load_file(folder / "model.safetensors")
    tensors[edits.renamed.get(twin, twin)] += 1
    save_file(tensors, folder / "model.safetensors")
    model = load(auto, folder)
    loaded = framework.parameters(model, framework.index_model(model, BaseRef()))
    assert torch.equal(loaded[leader], one.base[leader])
    assert torch.equal(loaded[twin], one.base[leader] + 1)


def test_what_the_configuration_cannot_say_is_not_untied(case, framework):
    one = case("t5", "T5ForConditionalGeneration")
    assert framework.untie(one.index, ["lm_head.weight"]) is None
