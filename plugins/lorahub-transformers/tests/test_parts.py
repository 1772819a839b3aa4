"""Prompts and prefixes on live models: what PEFT computes and generates, and the model as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorahub
from lorahub.errors import BaseMismatch, IntegrityError, UnsupportedKind, UsageError
from lorahub.formats.peft.types import TYPES
from lorahub_transformers import parts

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Token type ids are not supported:UserWarning"),
]

HOWS: dict[str, Callable[..., Any]] = {
    "prompt": lambda **more: peft.PromptTuningConfig(num_virtual_tokens=3, **more),
    "p": lambda **more: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **more),
    "prefix": lambda **more: peft.PrefixTuningConfig(num_virtual_tokens=3, **more),
    "projected": lambda **more: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **more
    ),
}
TASKS = {
    "llama": ("LlamaForCausalLM", "CAUSAL_LM"),
    "gpt2": ("GPT2LMHeadModel", "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "bert": ("BertForSequenceClassification", "SEQ_CLS"),
    "bert tokens": ("BertForTokenClassification", "TOKEN_CLS"),
    "bert answers": ("BertForQuestionAnswering", "QUESTION_ANS"),
    "bert features": ("BertModel", "FEATURE_EXTRACTION"),
    "roberta": ("RobertaForSequenceClassification", "SEQ_CLS"),
    "llama classes": ("LlamaForSequenceClassification", "SEQ_CLS"),
    "mistral": ("MistralForCausalLM", "CAUSAL_LM"),
    "opt": ("OPTForCausalLM", "CAUSAL_LM"),
    "gemma2": ("Gemma2ForCausalLM", "CAUSAL_LM"),
    "bart": ("BartForConditionalGeneration", "SEQ_2_SEQ_LM"),
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.2},
    "gpt2": {
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    },
    "bert": {"initializer_range": 0.2},
    "t5": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
    "roberta": {"max_position_embeddings": 30},
    "mistral": {"sliding_window": 6, "initializer_range": 0.2, "eos_token_id": None},
    "opt": {"max_position_embeddings": 40, "eos_token_id": None},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": 50,
        "sliding_window": 6,
        "initializer_range": 0.2,
        "eos_token_id": None,
    },
    "bart": {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
        "d_model": 16,
        "vocab_size": 50,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 1,
        "scale_embedding": True,
        "init_std": 0.2,
    },
}
"""Architectures that are built here alone."""
X = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
MASK = (X != 0).long()


def build(tiny: Callable[..., Any], what: str) -> Any:
    kind = what.partition(" ")[0]
    if kind in OTHERS:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **OTHERS[kind])
        return getattr(transformers, TASKS[what][0])(config).eval()
    return tiny(kind, TASKS[what][0], **SIZES.get(kind, {}))


@pytest.fixture
def case(tiny, tmp_path) -> Callable[..., tuple[Any, Any, Path]]:
    """``case(what, how)``: a bare model, PEFT's with the part, as loaded from its files, and the folder."""

    def make(what: str, how: str, seed: int = 3) -> tuple[Any, Any, Path]:
        folder = tmp_path / f"{what}-{how}-{seed}".replace(" ", "-")
        trained = peft.get_peft_model(build(tiny, what), HOWS[how](task_type=TASKS[what][1]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, value in trained.named_parameters():
                if value.requires_grad:  # the prompt's, and a head's
                    value.copy_(torch.randn_like(value) * (0.5 if "prompt_encoder" in name else 0.2))
        trained.eval().save_pretrained(folder)
        return build(tiny, what), peft.PeftModel.from_pretrained(build(tiny, what), folder).eval(), folder

    return make


def outputs(model: Any, what: str, **more: Any) -> torch.Tensor:
    inputs = {
        "input_ids": X,
        "attention_mask": MASK,
        **({"decoder_input_ids": X} if what in ("t5", "bart") else {}),
        **more,
    }
    with torch.no_grad():
        return model(**inputs)[0].double()


QUICK = {("llama", "prompt"), ("llama", "prefix"), ("t5", "prompt"), ("t5", "prefix"), ("bert", "prefix")}
CASES = [(what, how) for what in TASKS for how in ("prompt", "prefix")]
CASES += [("llama", "p"), ("llama", "projected"), ("t5", "p"), ("bert", "projected")]


def some_slow(cases: Any) -> list[Any]:
    """The cases, those that are not quick left to the long run."""
    return [pytest.param(*each, marks=[] if each[:2] in QUICK else [pytest.mark.slow]) for each in cases]


@pytest.mark.parametrize(("what", "how"), some_slow(CASES))
def test_attached_it_computes_what_peft_computes(case, what, how):
    model, theirs, folder = case(what, how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bare, expected = outputs(model, what), outputs(theirs, what)
    with lorahub.attach(model, [folder]):
        found = outputs(model, what)
        assert {*model.state_dict()} == {*before}
    assert found.shape == expected.shape
    assert (expected[:, -bare.shape[1] :] - bare).norm() > 1e-2 * bare.norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(model, what), bare, rtol=0, atol=0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


GENERATES = ("llama", "gpt2", "t5", "mistral", "gemma2", "bart")
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize(("what", "how"), some_slow((w, h) for w in GENERATES for h in ("prompt", "prefix")))
def test_it_generates_what_peft_generates(case, what, how, way):
    model, theirs, folder = case(what, how)
    options = {"input_ids": X, "attention_mask": MASK, "max_new_tokens": 6, **WAYS[way]}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    bare, expected = model.generate(**options), theirs.generate(**options)
    assert (expected.scores[0] - bare.scores[0]).norm() > 1e-2 * bare.scores[0].norm()
    live = lorahub.attach(model, [folder])
    found = model.generate(**options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=0, atol=1e-5)
    live.detach()
    assert torch.equal(model.generate(**options).sequences, bare.sequences)


@pytest.mark.parametrize("how", ["prompt", "prefix"])
def test_tokens_do_not_depend_on_whether_there_is_a_cache(case, how):
    model, _, folder = case("llama", how)
    lorahub.attach(model, [folder])
    row = {"input_ids": X[1:], "attention_mask": MASK[1:], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**row, use_cache=False), model.generate(**row))
    with torch.no_grad():  # token by token, as people write it themselves
        first = model(X[1:, :4])
        second = model(X[1:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(X[1:]).logits[:, -2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "how"), [("llama", "prompt"), ("llama", "prefix"), ("t5", "prompt"), ("bert", "prompt")]
)
def test_losses_are_those_of_peft(case, what, how):
    model, theirs, folder = case(what, how)
    labels = torch.tensor([0, 1]) if what == "bert" else X.masked_fill(X == 0, -100)
    inputs = {"input_ids": X, "attention_mask": MASK, "labels": labels}
    bare, expected = model(**inputs).loss, theirs(**inputs).loss
    lorahub.attach(model, [folder])
    assert not torch.isclose(bare, expected, rtol=1e-3)
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-6, atol=0)


def test_several_are_chosen_one_at_a_time_beside_changes_of_weights(case, tiny, tmp_path):
    model, one, first = case("llama", "prompt")
    _, two, second = case("llama", "prefix", seed=4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(build(tiny, "llama"), config)
    wrapped.save_pretrained(tmp_path / "lora")
    bare = outputs(model, "llama")
    live = lorahub.attach(model, {"one": first, "two": second, "lora": tmp_path / "lora"}, active=["one"])
    torch.testing.assert_close(outputs(model, "llama"), outputs(one, "llama"), rtol=0, atol=1e-6)
    live.set_adapters(["two"])
    torch.testing.assert_close(outputs(model, "llama"), outputs(two, "llama"), rtol=0, atol=1e-6)
    live.set_adapters(["two", "lora"])
    both = peft.PeftModel.from_pretrained(wrapped.merge_and_unload(), second).eval()
    torch.testing.assert_close(outputs(model, "llama"), outputs(both, "llama"), rtol=0, atol=1e-5)
    live.set_adapters(["one", "lora"], weights=[0.0, 0.0])
    torch.testing.assert_close(outputs(model, "llama"), bare, rtol=0, atol=0)
    with pytest.raises(UsageError, match="only one can"):
        live.set_adapters(["one", "two"])
    with pytest.raises(UsageError, match=r"there is none of it at 0\.5"):
        live.set_adapters(["one"], weights=[0.5])
    with pytest.raises(UsageError, match="some rows only"):
        live.adapter_names = ["one", None]
    live.adapter_names = ["one", "one"]
    torch.testing.assert_close(outputs(model, "llama"), outputs(one, "llama"), rtol=0, atol=1e-6)
    live.set_adapters([])
    live.swap("one", second)
    live.set_adapters(["one"])
    torch.testing.assert_close(outputs(model, "llama"), outputs(two, "llama"), rtol=0, atol=1e-6)
    live.set_adapters(["lora"], weights=[0.5])
    with pytest.raises(UsageError, match=r"there is none of it at 0\.5"):
        live.swap("lora", first)
    live.set_adapters([])
    live.remove("one")
    assert live.adapters == ("two", "lora")


def test_copies_have_it_too_and_let_go_of_it_by_themselves(case):
    model, _, folder = case("bert", "prompt")
    bare = outputs(model, "bert")
    live = lorahub.attach(model, [folder])
    acting = outputs(model, "bert")
    assert not torch.equal(acting, bare)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(outputs(twin, "bert"), acting, rtol=0, atol=0)
    other = lorahub.handle(twin)
    other.set_adapters([])
    torch.testing.assert_close(outputs(twin, "bert"), bare, rtol=0, atol=0)
    torch.testing.assert_close(outputs(model, "bert"), acting, rtol=0, atol=0)
    live.detach()
    other.set_adapters(other.adapters)
    torch.testing.assert_close(outputs(twin, "bert"), acting, rtol=0, atol=0)
    torch.testing.assert_close(outputs(model, "bert"), bare, rtol=0, atol=0)


def test_a_half_precision_model_takes_it_in_its_own_dtype(case):
    model, theirs, folder = case("llama", "prefix")
    model, theirs = model.to(torch.bfloat16), theirs.to(torch.bfloat16)
    lorahub.attach(model, [folder])
    expected = theirs.base_model(X, attention_mask=None, past_key_values=theirs.get_prompt(2)).logits
    torch.testing.assert_close(model(X).logits, expected, rtol=0, atol=1e-2)


def test_what_does_not_fit_is_refused_with_the_reason(case, tiny):
    _, _, prompt = case("llama", "prompt")
    _, _, prefix = case("llama", "prefix")
    _, _, headed = case("bert", "prompt")
    with pytest.raises(BaseMismatch, match=r"embeddings of 16, and this .* has 24"):
        lorahub.attach(tiny("llama", "LlamaForCausalLM", hidden_size=24), [prompt])
    with pytest.raises(BaseMismatch, match="2 layers"):
        lorahub.attach(tiny("llama", "LlamaForCausalLM", num_hidden_layers=3), [prefix])
    with pytest.raises(BaseMismatch, match="num_labels=2"):
        lorahub.attach(tiny("bert", "BertForSequenceClassification", num_labels=3), [headed])
    with pytest.raises(BaseMismatch, match="brings classifier"):
        lorahub.attach(tiny("bert", "BertModel"), [headed])
    with pytest.raises(UnsupportedKind, match="takes a plugin"):
        lorahub.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), [prompt])
    with pytest.raises(UnsupportedKind, match="cannot be merged"):
        lorahub.load(prompt)


def test_a_configuration_that_contradicts_the_tensors_is_refused(case):
    import json

    model, _, folder = case("llama", "prefix")
    config = json.loads((folder / "adapter_config.json").read_text())
    for wrong in ({"num_layers": 3}, {"num_virtual_tokens": 0}, {"num_attention_heads": 3}):
        (folder / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(IntegrityError):
            lorahub.attach(model, [folder])
    assert not model._forward_pre_hooks


def test_a_cache_that_somebody_shortened_is_refused(case):
    model, _, folder = case("llama", "prompt")
    lorahub.attach(model, [folder])
    with torch.no_grad():
        cache = model(X[1:]).past_key_values
        cache.crop(-2)
        with pytest.raises(UsageError, match="shortened the cache"):
            model(X[1:, -1:], attention_mask=torch.ones(1, 6), past_key_values=cache)


def test_a_static_cache_has_no_room_for_it(case):
    model, _, folder = case("llama", "prompt")
    lorahub.attach(model, [folder])
    with pytest.raises(UsageError, match="static cache"):
        model.generate(X, attention_mask=MASK, max_new_tokens=3, cache_implementation="static", disable_compile=True)


def test_what_peft_types_are_said_to_be_attached_is_what_is_attached() -> None:
    assert {about.part for about in TYPES.values() if about.live} == parts._WAYS.keys()
