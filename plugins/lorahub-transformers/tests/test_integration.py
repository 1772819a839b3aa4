"""Attached models where people use them: generate, pipeline, Trainer, accelerate, quantised, assisted, saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorahub
from lorahub.errors import BaseMismatch, LorahubError

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

SIZE: dict[str, Any] = {
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
TEXTS = ["w5 w6 w7 w8", "w9 w10 w11 w12 w13 w14"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two adapters of it, as PEFT saves them."""
    place = tmp_path_factory.mktemp("integration")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=50, **SIZE
    )
    transformers.LlamaForCausalLM(config).save_pretrained(place / "base")
    for seed, name in enumerate(("ink", "sql"), 1):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
        )
        peft.get_peft_model(load(place), lora).save_pretrained(place / name)
    return place


def load(place: Path, **options: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(place / "base", **options)


def by_peft(place: Path, name: str, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(load(place, **options), place / name).eval()


@pytest.fixture
def batch(words: Any) -> Any:
    return words(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "without a cache": {**GREEDY, "use_cache": False},
    "a static cache": {**GREEDY, "cache_implementation": "static", "disable_compile": True},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "samples": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3},
    "what was said": {**GREEDY, "prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_generates_what_peft_generates(place, batch, way):
    rows = {key: value[1:] for key, value in batch.items()} if way == "what was said" else batch
    model, theirs = load(place), by_peft(place, "ink")

    def run(which: Any) -> torch.Tensor:
        torch.manual_seed(7)
        return which.generate(**rows, **WAYS[way])

    bare, expected = run(model), run(theirs)
    assert not torch.equal(bare, expected)
    with lorahub.attach(model, [place / "ink"]):
        assert torch.equal(run(model), expected)
    assert torch.equal(run(model), bare)


def test_assisted_generation_takes_an_attached_model_on_either_side(place, batch):
    one = {key: value[1:] for key, value in batch.items()}
    model, helper, expected = load(place), load(place), by_peft(place, "ink").generate(**one, **GREEDY)
    lorahub.attach(model, [place / "ink"])
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=helper), expected)
    lorahub.attach(helper, [place / "ink"])
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=helper), expected)


def test_every_row_generates_with_its_own_adapter(place, batch):
    model = load(place)
    expected = [by_peft(place, name).generate(**batch, **GREEDY)[row] for row, name in enumerate(("ink", "sql"))]
    live = lorahub.attach(model, [place / "ink", place / "sql"])
    live.adapter_names = ["ink", "sql"]
    found = model.generate(**batch, **GREEDY)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("way", ["beams", "samples"])
def test_rows_that_generation_multiplies_are_never_given_the_wrong_adapter(place, batch, way):
    model = load(place)
    live = lorahub.attach(model, [place / "ink", place / "sql"])
    live.adapter_names = ["ink", "sql"]
    with pytest.raises(LorahubError, match="rows"):
        model.generate(**batch, **WAYS[way])
    copies = WAYS[way].get("num_beams") or WAYS[way]["num_return_sequences"]
    live.adapter_names = [name for name in ("ink", "sql") for _ in range(copies)]
    torch.manual_seed(7)
    found = model.generate(**batch, **WAYS[way])
    each = WAYS[way]["num_return_sequences"]
    if way == "beams":  # no random numbers, so each row is what it is alone
        for row, name in enumerate(("ink", "sql")):
            assert torch.equal(
                found[row * each : (row + 1) * each],
                by_peft(place, name).generate(**batch, **WAYS[way])[row * each : (row + 1) * each],
            )


def test_a_pipeline_answers_with_the_adapter(place, words):
    model = load(place)

    def answers(which: Any) -> list[str]:
        talk = transformers.pipeline("text-generation", model=which, tokenizer=words, device="cpu")
        return [each[0]["generated_text"] for each in talk(TEXTS, batch_size=2, **GREEDY)]

    bare, expected = answers(model), answers(by_peft(place, "ink").merge_and_unload())
    lorahub.attach(model, [place / "ink"])
    assert answers(model) == expected != bare


def test_a_trainer_evaluates_and_trains_beside_the_adapter(place, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 4

    def trainer(model: Any) -> Any:
        settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True}
        made = transformers.Trainer(
            model, transformers.TrainingArguments(**settings, max_steps=1, save_strategy="no"), train_dataset=rows
        )
        made.remove_callback(transformers.PrinterCallback)
        return made

    model = load(place)
    bare = trainer(model).evaluate(rows)["eval_loss"]
    expected = trainer(by_peft(place, "ink").merge_and_unload()).evaluate(rows)["eval_loss"]
    lorahub.attach(model, [place / "ink"])
    assert abs(bare - expected) > 1e-3
    assert trainer(model).evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer(model).train()  # the base is trained, with the adapter before it
    assert trainer(model).evaluate(rows)["eval_loss"] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_accelerate_brings_when_they_are_called_take_the_adapter(place, batch, when):
    accelerate = pytest.importorskip("accelerate")
    model = load(place)
    bare, expected = model(**batch).logits, by_peft(place, "ink")(**batch).logits
    if when == "before":
        live = lorahub.attach(model, [place / "ink"])
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
        live = lorahub.attach(model, [place / "ink"])
    assert next(model.model.layers.parameters()).is_meta
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(**batch, **GREEDY), by_peft(place, "ink").generate(**batch, **GREEDY))
    live.detach()
    torch.testing.assert_close(model(**batch).logits, bare, rtol=0, atol=0)


KINDS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"], init_lora_weights=False
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
    "embedding": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], init_lora_weights=False
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_every_way_act_on_weights_that_are_brought_when_they_are_called(place, batch, tmp_path, kind):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(load(place), KINDS[kind]()).eval()
    theirs.save_pretrained(tmp_path / "ink")
    model = load(place)
    accelerate.cpu_offload(model, execution_device="cpu")
    lorahub.attach(model, [tmp_path / "ink"])
    bare, expected = load(place)(**batch).logits, theirs(**batch).logits
    assert (expected - bare).norm() > 1e-2 * bare.norm()
    for _ in range(2):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(BaseMismatch, match="meta device") as refused:
        lorahub.merge(model, [tmp_path / "ink"])
    assert "without offloading" in refused.value.hint


def test_a_model_that_is_spread_over_devices_and_disk_takes_the_adapter(place, batch, tmp_path):
    expected = by_peft(place, "ink")(**batch).logits
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    spread |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(place, device_map=spread, offload_folder=tmp_path / "off")
    lorahub.attach(model, [place / "ink"])
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


HOWS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("how", HOWS)
def test_a_quantised_model_generates_with_the_adapter(place, batch, how):
    options = {"quantization_config": HOWS[how](), "device_map": "cpu", "dtype": torch.bfloat16}
    model = load(place, **options)
    lorahub.attach(model, [place / "ink"])
    found, expected = model(**batch).logits, by_peft(place, "ink", **options)(**batch).logits
    bare = load(place, **options)(**batch).logits
    assert (found - expected).norm() < 0.05 * (expected - bare).norm()
    assert model.generate(**batch, **GREEDY).shape == (2, 12)


def test_saving_an_attached_model_saves_the_base_as_it_was(place, tmp_path):
    model = load(place)
    with lorahub.attach(model, [place / "ink"]):
        model.save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert files.pop("model.safetensors") == (place / "base" / "model.safetensors").read_bytes()
    assert not any("adapter" in name for name in files)
