"""Recording while training: what stands beside a checkpoint, whatever the base was loaded from, and never a failure."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import constants

import lorahub
from lorahub.bases.open import survey_base
from lorahub.bases.weights import weights_digest
from lorahub.errors import UsageError
from lorahub.findings import Verdict
from lorahub.records import AdapterRecord
from lorahub_transformers import RecordCallback, from_pretrained, handle

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # it asks the Hub for the base's configuration at every save, and says so of words that were added
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def base(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def snapshot(hub: Path, commit: str, files: Path, *, main: bool = True) -> Path:
    """What the Hub's cache holds of acme/base at a commit: names that point to contents."""
    import hashlib

    repo = hub / "models--acme--base"
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for path in files.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    (repo / "refs").mkdir(exist_ok=True)
    if main:
        (repo / "refs" / "main").write_text(commit)
    return folder


def load(name: str | Path, **options: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(name, **options)


def with_lora(model: Any, **options: Any) -> Any:
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def train(model: Any, out: Path, recorder: RecordCallback, *, steps: int = 2, **options: Any) -> Any:
    settings = {
        "output_dir": str(out),
        "max_steps": steps,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        **options,
    }
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**settings), train_dataset=ROWS, callbacks=[recorder]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def recorded(folder: Path) -> AdapterRecord:
    return AdapterRecord.load(folder / "lorahub.json")


def codes(recorder: RecordCallback) -> list[str]:
    return [finding.code for finding in recorder.said]


def test_every_checkpoint_names_the_very_weights_it_was_trained_on(base, tmp_path):
    recorder = RecordCallback(license="mit", datasets=[f"acme/data@{FIRST}"])
    train(with_lora(load(base)), tmp_path / "out", recorder)
    for step in (1, 2):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        record = recorded(folder)
        assert record.base
        assert record.base.weights_digest == weights_digest(survey_base(base))
        assert (record.training.steps, record.license) == (step, "mit")
        assert record.training.loss
        assert record.training.lr == pytest.approx(5e-5)
        assert record.training.versions["torch"] == torch.__version__
        assert [(each.id, each.revision) for each in record.training.datasets] == [("acme/data", FIRST)]
        assert lorahub.check(folder, base).verdict is Verdict.EXACT
        assert record == recorder.records[folder]
    assert not recorder.said


def test_a_folder_saved_after_the_training_is_recorded_when_asked(base, tmp_path):
    recorder = RecordCallback()
    trainer = train(with_lora(load(base)), tmp_path / "out", recorder)
    trainer.save_model(str(tmp_path / "final"))
    assert recorder.record(tmp_path / "final") == recorded(tmp_path / "final")
    assert recorded(tmp_path / "final").training.steps == 2
    with pytest.raises(UsageError, match="holds no adapter"):
        recorder.record(base)


def test_the_commit_is_the_one_whose_files_hold_the_models_numbers(base, tiny, tmp_path):
    tiny("llama", "LlamaForCausalLM", seed=1).save_pretrained(tmp_path / "newer")
    snapshot(tmp_path / "hub", SECOND, tmp_path / "newer")
    snapshot(tmp_path / "hub", FIRST, base, main=False)
    recorder = RecordCallback()
    train(with_lora(load("acme/base", revision=FIRST)), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.repo_id, found.revision) == ("acme/base", FIRST)
    assert found.weights_digest == weights_digest(survey_base(base))  # from the names of contents, which are hashes
    assert not recorder.said


def test_a_folder_in_the_cache_of_the_hub_has_the_name_of_its_repository(base, tmp_path):
    folder = snapshot(tmp_path / "hub", FIRST, base)
    recorder = RecordCallback()
    train(with_lora(load(folder)), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.repo_id, found.revision) == ("acme/base", FIRST)


def test_a_commit_that_cannot_be_shown_is_not_written_down(base, tmp_path):
    folder = snapshot(tmp_path / "hub", FIRST, base)
    model = with_lora(load("acme/base"))
    shutil.rmtree(folder)
    recorder = RecordCallback()
    train(model, tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.repo_id, found.revision, found.weights_digest) == ("acme/base", None, None)
    assert found.structure == lorahub.open_base(base).index.structure
    assert codes(recorder) == ["base-commit-unknown"]


def test_what_somebody_says_of_the_base_is_taken(base, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base))
    model.load_state_dict(load(base).state_dict())
    model.config._name_or_path = ""
    train(with_lora(model), tmp_path / "out", RecordCallback(base=base), steps=1)
    assert recorded(tmp_path / "out" / "checkpoint-1").base.weights_digest == weights_digest(survey_base(base))
    recorder = RecordCallback(base=f"acme/elsewhere@{FIRST}")  # which cannot be had here
    train(with_lora(load(base)), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.repo_id, found.revision, found.weights_digest) == ("acme/elsewhere", FIRST, None)
    assert codes(recorder) == ["base-unread"]


@pytest.mark.parametrize("merge", [False, True])
def test_of_a_model_that_lorahub_loaded_the_base_is_known_until_something_is_merged(base, tmp_path, merge):
    folder = snapshot(tmp_path / "hub", FIRST, base)
    torch.manual_seed(1)
    one = {"target_modules": ["model.layers.1.self_attn.v_proj"], "init_lora_weights": False}
    with_lora(load(folder), **one).save_pretrained(tmp_path / "ink")
    model = from_pretrained(tmp_path / "ink", base=f"acme/base@{FIRST}", merge=merge)
    if not merge:
        handle(model).detach()
    train(with_lora(model), tmp_path / "out", RecordCallback(), steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.revision, found.weights_digest is None) == ((None, True) if merge else (FIRST, False))


def test_a_model_that_was_loaded_from_nowhere_is_recorded_by_its_structure(base, tiny, tmp_path):
    recorder = RecordCallback()
    train(with_lora(tiny("llama", "LlamaForCausalLM")), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert (found.repo_id, found.weights_digest) == (None, None)
    assert found.structure == lorahub.open_base(base).index.structure
    assert codes(recorder) == ["base-unknown"]


def test_a_folder_that_holds_other_weights_by_now_is_not_taken_for_the_base(base, tiny, tmp_path):
    model = with_lora(load(base))
    tiny("llama", "LlamaForCausalLM", seed=1).save_pretrained(base)
    recorder = RecordCallback()
    train(model, tmp_path / "out", recorder, steps=1)
    assert recorded(tmp_path / "out" / "checkpoint-1").base.weights_digest is None
    assert "other weights" in recorder.said[0].message


def test_words_that_the_adapter_brings_leave_the_base_what_it_was(base, tmp_path):
    model = load(base)
    model.resize_token_embeddings(60, mean_resizing=False)
    recorder = RecordCallback()
    train(with_lora(model, modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "out", recorder, steps=1)
    assert recorded(tmp_path / "out" / "checkpoint-1").base.weights_digest == weights_digest(survey_base(base))
    assert not recorder.said


def test_a_model_that_was_rebuilt_is_another_structure_and_says_so(base, tmp_path):
    model = load(base)
    for layer in model.model.layers:
        weight, layer.mlp.down_proj = layer.mlp.down_proj.weight, torch.nn.Linear(24, 16, bias=True)
        layer.mlp.down_proj.weight = weight
    model.config.mlp_bias = True
    recorder = RecordCallback()
    train(with_lora(model, target_modules=["down_proj"], bias="lora_only"), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert found.weights_digest is None
    assert found.structure != lorahub.open_base(base).index.structure
    assert codes(recorder) == ["base-changed"]


def test_a_base_in_four_bits_is_recorded_as_its_files_and_how_it_was_quantised(tiny, tmp_path):
    tiny("llama", "LlamaForCausalLM", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = peft.prepare_model_for_kbit_training(
        load(tmp_path / "base", quantization_config=how, dtype=torch.bfloat16, device_map="cpu"),
        use_gradient_checkpointing=False,
    )
    recorder = RecordCallback()
    train(with_lora(model), tmp_path / "out", recorder, steps=1)
    found = recorded(tmp_path / "out" / "checkpoint-1").base
    assert found.weights_digest == weights_digest(survey_base(tmp_path / "base"))
    assert found.quantization == {"method": "bitsandbytes", "bits": 4}
    assert not recorder.said


def test_a_failure_is_said_twice_and_the_training_ends_well(base, tmp_path, caplog):
    recorder = RecordCallback(version="not a version")
    with caplog.at_level(logging.WARNING, logger="lorahub_transformers"):
        trainer = train(with_lora(load(base)), tmp_path / "out", recorder, steps=1)
    assert trainer.state.global_step == 1
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-1" / "lorahub.json").exists()
    said = [each.getMessage() for each in caplog.records]
    assert len(said) == 2
    assert all("not a version" in each for each in said)


def test_a_checkpoint_without_an_adapter_is_a_finding(base, tmp_path):
    recorder = RecordCallback()
    train(load(base), tmp_path / "out", recorder, steps=1)
    assert codes(recorder)[-1] == "adapter-missing"


def test_other_processes_write_nothing(base, tmp_path):
    state = transformers.TrainerState(is_world_process_zero=False)
    recorder, args = RecordCallback(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model = with_lora(load(base))
    model.save_pretrained(tmp_path / "checkpoint-0")
    for event in (recorder.on_train_begin, recorder.on_save, recorder.on_train_end):
        event(args, state, transformers.TrainerControl(), model=model)
    assert recorder.record(tmp_path / "checkpoint-0") is None
    assert not (tmp_path / "checkpoint-0" / "lorahub.json").exists()
    with pytest.raises(UsageError, match="no training has begun"):
        RecordCallback().record(tmp_path / "checkpoint-0")


def test_each_of_several_adapters_has_its_record(base, tmp_path):
    model = with_lora(load(base))
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]))
    train(model, tmp_path / "out", RecordCallback(), steps=1)
    paths = [recorded(tmp_path / "out" / "checkpoint-1" / name).modules[0].path for name in ("", "other")]
    assert paths == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]


def test_a_prompt_that_was_tuned_is_recorded(base, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    train(peft.get_peft_model(load(base), config), tmp_path / "out", RecordCallback(), steps=1)
    record = recorded(tmp_path / "out" / "checkpoint-1")
    assert record.base.weights_digest == weights_digest(survey_base(base))
    assert record.kinds != ("unknown",)


def test_trl_is_named_with_the_data_that_was_fetched(base, words, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"input_ids": [1, 2, 3, 4]}] * 4)
    data.info.download_checksums = {f"hf://datasets/acme/talk@{FIRST}/train.parquet": {}}
    recorder = RecordCallback()
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        load(base),
        args=args,
        train_dataset=data,
        processing_class=words,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        callbacks=[recorder],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    record = recorded(tmp_path / "out" / "checkpoint-1")
    assert record.training.trainer.name == "trl"
    assert [(each.id, each.revision) for each in record.training.datasets] == [("acme/talk", FIRST)]
    assert record.base.weights_digest == weights_digest(survey_base(base))
    assert not recorder.said


def test_an_adapter_that_lorahub_made_is_saved_into_every_checkpoint_and_recorded(base, tmp_path):
    model = load(base)
    trainee = lorahub.create(model, "lora", r=4, target_modules="attention", task_type="CAUSAL_LM")
    recorder = RecordCallback(trainee)
    train(model, tmp_path / "out", recorder, learning_rate=0.1)
    for step in (1, 2):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        assert recorded(folder).base.weights_digest == weights_digest(survey_base(base))
        assert recorded(folder).training.steps == step
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]])).logits
        found = peft.PeftModel.from_pretrained(load(base), folder)(torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(found, expected)
    assert not recorder.said
    forgotten, model = RecordCallback(), load(base)
    lorahub.create(model, "lora", r=4)
    train(model, tmp_path / "again", forgotten, steps=1)
    assert "RecordCallback(trainee)" in forgotten.said[-1].remedy
