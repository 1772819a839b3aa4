"""Training models of Transformers: what the trainer saves and goes on from, heads, experts, tied weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lorahub
from lorahub.errors import UsageError
from lorahub_transformers import RecordCallback, TraineeCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft

VOCABULARY = 48
IDS = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 1])
BOUND = 32 * torch.finfo(torch.float32).eps


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    ).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
            initializer_range=0.2,
        )
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            initializer_range=0.2,
        )
    ).eval()


def train(model: Any, parameters: Any, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    labels = CLASSES if hasattr(model, "classifier") else IDS
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (llama, {}),
    "all-linear": (gpt2, {"target_modules": "all-linear", "rank_pattern": {"c_attn": 4}}),
    "experts": (mixtral, {"target_modules": ["q_proj", "experts"]}),
    "parameters": (mixtral, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "head": (bert, {"modules_to_save": "classifier"}),
    "biases": (bert, {"bias": "all"}),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "turned in full": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["c_proj"]}),
    "tied in full": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # what PEFT advises its users
def test_what_is_trained_peft_and_we_compute_alike_from_the_files(case, tmp_path):
    build, arguments = CASES[case]
    model, base = build(), build()
    outputs = model(input_ids=IDS).logits.detach()
    trainee = lorahub.create(model, r=2, **arguments)
    assert torch.allclose(model(input_ids=IDS).logits, outputs, atol=1e-6)
    losses = train(model, trainee.parameters())
    assert losses[-1] < losses[0]
    trained = model(input_ids=IDS).logits.detach()
    assert (trained - outputs).norm() > 1e-2 * outputs.norm()
    trainee.save(tmp_path / "out")
    trainee.detach()
    assert all(torch.equal(own, base.state_dict()[name]) for name, own in model.state_dict().items())
    bound = BOUND * trained.abs().max()
    again = lorahub.create(model, resume=tmp_path / "out")
    assert (model(input_ids=IDS).logits - trained).abs().max() <= bound
    again.detach()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert (theirs(input_ids=IDS).logits - trained).abs().max() <= bound


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.IA3Config, peft.VeraConfig, peft.LoKrConfig])
@pytest.mark.parametrize("build", [llama, bert, gpt2])
@pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # which PEFT then sets itself
def test_a_config_that_names_no_modules_trains_those_of_peft(build, config):
    try:
        theirs = peft.get_peft_model(build(), config())
    except TypeError:  # it has no LoKr for GPT-2's layers
        assert (build, config) == (gpt2, peft.LoKrConfig)
        return
    with lorahub.create(build(), config=config()) as trainee:
        wanted = sorted(theirs.targeted_module_names)
        assert sorted({each.module for each in trainee.targets if each.parameter == "weight"}) == wanted
        assert trainee.trainable_parameters().trained == theirs.get_nb_trainable_parameters()[0]


def test_a_base_is_saved_as_if_nothing_were_there(tmp_path):
    model = llama()
    trainee = lorahub.create(model, r=2)
    train(model, trainee.parameters())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(own, llama().state_dict()[name]) for name, own in loaded.state_dict().items())
    assert any(name.startswith("_lorahub.") for name in model.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_parts_of_a_fused_weight_are_known_again_on_their_base(kind, tmp_path):
    model = gpt2()
    trainee = lorahub.create(model, kind, r=2, target_modules=["q_proj", "v_proj"])
    trainee.save(tmp_path / "ink")
    trainee.detach()
    model.save_pretrained(tmp_path / "base")
    for base in (model, tmp_path / "base"):
        assert "targets-differ" not in {each.code for each in lorahub.check(tmp_path / "ink", base).findings}


def for_peft(folder: Path, base: Path) -> dict[str, Any]:
    found = lorahub.check(folder, base, runtime="peft").findings
    return {each.code: each for each in found if each.code.startswith("peft-") or each.code == "runtime-accepts"}


@pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers")
def test_parts_of_a_fused_weight_are_converted_into_what_peft_reads(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    trainee = lorahub.create(model, r=2, target_modules=["q_proj", "v_proj"])
    train(model, trainee.parameters())
    trained = model(input_ids=IDS).logits.detach()
    trainee.save(tmp_path / "ink")
    found = for_peft(tmp_path / "ink", tmp_path / "base")
    assert list(found) == ["peft-module"]
    assert "q_proj, v_proj" in found["peft-module"].message
    assert "--to peft --base BASE" in found["peft-module"].remedy
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ink")
    lorahub.convert(tmp_path / "ink", to="peft", base=tmp_path / "base", out=tmp_path / "whole")
    assert list(for_peft(tmp_path / "whole", tmp_path / "base")) == ["runtime-accepts"]
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "whole").eval()
    assert (theirs(input_ids=IDS).logits - trained).abs().max() <= BOUND * trained.abs().max()


@pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize(("kind", "code"), [("loha", "peft-product"), ("lokr", "peft-product"), ("oft", "peft-layer")])
def test_a_kind_that_peft_does_not_have_on_the_layers_of_gpt2_is_named(kind, code, tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    with lorahub.create(model, kind, target_modules="attention") as trainee:
        trainee.save(tmp_path / "ink")
    found = for_peft(tmp_path / "ink", tmp_path / "base")
    assert found[code].message.startswith(f"PEFT refuses {kind} on a Conv1D of transformers")
    with pytest.raises((TypeError, ValueError), match="not supported"):
        peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ink")
    if code == "peft-product":
        assert "--kind lora" in found[code].remedy
        lorahub.convert(tmp_path / "ink", to="peft", kind="lora", base=tmp_path / "base", out=tmp_path / "lora")
        assert list(for_peft(tmp_path / "lora", tmp_path / "base")) == ["runtime-accepts"]
        peft.PeftModel.from_pretrained(gpt2(), tmp_path / "lora")


@pytest.mark.parametrize(("module", "says"), [("out_proj", "peft-mamba"), ("in_proj", "runtime-accepts")])
def test_lora_on_what_mamba_passes_by_is_named(module, says, tmp_path):
    def mamba() -> Any:
        return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1))

    model = mamba()
    model.save_pretrained(tmp_path / "base")
    with lorahub.create(model, target_modules=[module], r=2) as trainee:
        trainee.save(tmp_path / "ink")
    assert list(for_peft(tmp_path / "ink", tmp_path / "base")) == [says]
    if says == "peft-mamba":
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            peft.PeftModel.from_pretrained(mamba(), tmp_path / "ink")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_loss(reentrant):
    model = llama()
    plain = train(model.train(), lorahub.create(model, r=2).parameters())
    model = llama()
    trainee = lorahub.create(model, r=2)
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": reentrant})
    assert train(model.train(), trainee.parameters()) == pytest.approx(plain, rel=1e-6)


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.found.append(logs["loss"])


CALLBACKS: dict[str, Any] = {
    "checkpoints": lambda trainee: [TraineeCallback(trainee), RecordCallback()],
    "records": lambda trainee: [RecordCallback(trainee)],
    "both": lambda trainee: [RecordCallback(trainee), TraineeCallback(trainee)],
}


def run(
    folder: Path, *, seed: int = 0, resume: Path | None = None, given: str = "checkpoints"
) -> tuple[Any, Any, Any, list[float]]:
    model, losses = llama(), Losses()
    trainee = lorahub.create(model, r=2, target_modules="all-linear", seed=seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    callbacks = [losses, *CALLBACKS[given](trainee)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, model, trainee, losses.found


@pytest.mark.parametrize("given", CALLBACKS)
def test_the_trainers_checkpoints_are_adapters_and_it_goes_on_from_them_exactly(given, tmp_path):
    trainer, model, trainee, losses = run(tmp_path, given=given)
    half = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json", "lorahub.json"} <= {
        each.name for each in half.iterdir()
    }
    _, _, _, more = run(tmp_path / "again", seed=7, resume=half, given=given)
    assert more == losses[2:]
    trainer.save_model(tmp_path / "ink")
    assert not (tmp_path / "ink" / "model.safetensors").exists()
    outputs = model.eval()(input_ids=IDS).logits.detach()
    trainee.detach()
    assert "save_pretrained" not in vars(model)
    for folder in (tmp_path / "ink", tmp_path / "checkpoint-4"):
        with lorahub.attach(model, [folder]):
            assert (model(input_ids=IDS).logits - outputs).abs().max() <= BOUND * outputs.abs().max()


def test_a_model_that_no_trainer_saves_is_refused():
    trainee = lorahub.create(torch.nn.Linear(4, 4), r=2)
    with pytest.raises(UsageError, match="no save_pretrained"):
        TraineeCallback(trainee)


def test_a_copy_keeps_the_methods_of_the_base():
    model = llama()
    lorahub.create(model, r=2)
    assert copy.deepcopy(model).save_pretrained.model is not model
