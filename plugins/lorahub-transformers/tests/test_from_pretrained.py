"""A base and its adapters in one call: which base, which class, what is refused before weights are loaded."""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lorahub
from lorahub.errors import AccessDenied, BaseMismatch, Incompatible, NotFound, Offline, UsageError
from lorahub_transformers import from_pretrained, handle, tokenizer_of

sys.path.append(str(Path(__file__).parents[3] / "tests"))  # for the double of the Hub, which lies in no package

from hub.double import TOKEN, Double

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # huggingface_hub 2.4 hands its plain uploads to httpx2 in a way that it deprecates
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

X = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "LORAHUB_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client-cache"))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("lorahub.hub.huggingface.download.PAUSES", (0.0, 0.0, 0.0))
    close_session()
    with Double() as double:
        yield double
        close_session()


@pytest.fixture
def base(tiny: Callable[..., Any], words: Any, tmp_path: Path) -> Path:
    tiny("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> Path:
    """An adapter as PEFT saves it, with random factors."""
    torch.manual_seed(seed)
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**config))
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits.double()


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(model, folder).eval())


def plain(base: Path) -> torch.Tensor:
    return logits(transformers.LlamaForCausalLM.from_pretrained(base))


def near(found: torch.Tensor, expected: torch.Tensor, bare: torch.Tensor) -> bool:
    """Whether an output is the expected one, to float32's rounding, and the adapter does something at all."""
    change = (expected - bare).norm()
    assert change / bare.norm() > 1e-2
    return bool((found - expected).norm() <= 1e-5 * bare.norm())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_comes_with_the_very_base_it_records_though_its_branch_moved(double, base, tiny, tmp_path):
    commit = double.repo("acme/base").commit(files_of(base))
    folder = adapter(base, tmp_path / "ink")
    lorahub.record(folder, base, base_repo="acme/base", base_revision=commit, license="mit")
    lorahub.push(folder, "acme/ink", version="1.2.0", hub=double.endpoint, token=TOKEN)
    tiny("llama", "LlamaForCausalLM", seed=9).save_pretrained(tmp_path / "other")
    double.repo("acme/base").edit(files_of(tmp_path / "other"))
    model = from_pretrained("acme/ink@1.2", hub=double.endpoint, token=TOKEN)
    assert near(logits(model), by_peft(base, folder), plain(base))
    assert (type(model).__name__, model.name_or_path) == ("LlamaForCausalLM", "acme/base")
    assert len(tokenizer_of(model)) == 50
    asked = len(double.log)
    again = from_pretrained("acme/ink@1.2", hub=double.endpoint, local_files_only=True)
    assert torch.equal(logits(again), logits(model))
    assert len(double.log) == asked


def test_a_base_that_transformers_fetched_before_is_used_where_it_lies(base, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "c" * 40
    snapshot = tmp_path / "client-cache" / "models--acme--base" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    folder = adapter(snapshot, tmp_path / "ink")
    lorahub.record(folder, snapshot, base_repo="acme/base", base_revision=commit)
    assert near(logits(from_pretrained(folder)), by_peft(snapshot, folder), plain(snapshot))
    lorahub.record(folder, base_repo="acme/base", base_revision="d" * 40, base=snapshot)
    with pytest.raises(Offline, match=r"was made for acme/base@d+, which cannot be had"):
        from_pretrained(folder)


def test_adapters_from_a_folder_hub_are_weighed_exchanged_and_taken_off(base, tmp_path):
    folders = [adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("ink", "sql"), 1)]
    hub = str(tmp_path / "hub")
    for folder in folders:
        lorahub.record(folder, base, license="mit", base_repo="acme/base")
        lorahub.push(folder, f"acme/{folder.name}", version="1.0.0", hub=hub)
    model = from_pretrained(["acme/ink@1", "acme/sql@1:0.5"], base=base, hub=hub, active=["ink"])
    live = handle(model)
    assert near(logits(model), by_peft(base, folders[0]), plain(base))
    live.set_adapters(["sql"], weights=[1.0])
    assert near(logits(model), by_peft(base, folders[1]), plain(base))
    live.detach()
    assert torch.equal(logits(model), plain(base))


def test_merged_it_computes_the_same_and_comes_back(base, tmp_path):
    folder = adapter(base, tmp_path / "ink")
    model = from_pretrained(folder, base=base, merge=True)
    assert near(logits(model), by_peft(base, folder), plain(base))
    handle(model).undo()
    assert torch.equal(logits(model), plain(base))


def test_a_head_that_the_adapter_brings_decides_the_class_and_its_labels(tiny, tmp_path, caplog):
    tiny("bert", "BertModel").save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = {"num_labels": 3, "id2label": {0: "yes", 1: "no", 2: "maybe"}}
    trained = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", **config)
    trained = peft.get_peft_model(
        trained, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    ).eval()
    trained.save_pretrained(tmp_path / "mood")
    caplog.clear()
    model = from_pretrained(tmp_path / "mood", base=tmp_path / "base", weights=[1.0])
    assert "newly initialized" not in caplog.text
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_labels == len(model.config.id2label) == 3
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)
    handle(model).detach()
    assert model.classifier.weight.equal(trained.base_model.model.classifier.modules_to_save["default"].weight)


def test_a_task_decides_the_class_where_the_base_has_all_of_it(tiny, tmp_path):
    tiny("llama", "LlamaModel", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    folder = adapter(tmp_path / "tied", tmp_path / "ink")
    model = from_pretrained(folder, base=tmp_path / "tied")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert near(logits(model), by_peft(tmp_path / "tied", folder), plain(tmp_path / "tied"))
    tiny("llama", "LlamaModel").save_pretrained(tmp_path / "bare")
    with pytest.raises(BaseMismatch, match=r"has lm_head.weight, and neither .* would be random numbers"):
        from_pretrained(folder, base=tmp_path / "bare")
    model = from_pretrained(folder, base=tmp_path / "bare", model_class=transformers.LlamaModel)
    assert type(model).__name__ == "LlamaModel"


def test_what_does_not_fit_is_refused_before_weights_are_loaded(base, tiny, tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    folder = adapter(base, tmp_path / "ink")
    tiny("llama", "LlamaForCausalLM", hidden_size=24).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", never)
    with pytest.raises(BaseMismatch):
        from_pretrained(folder, base=tmp_path / "other")
    with pytest.raises(UsageError, match="does not record a base") as refused:
        from_pretrained(folder)
    assert "base='NS/NAME@COMMIT'" in refused.value.hint
    named = folder / "adapter_config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": "acme/base"}))
    with pytest.raises(UsageError) as refused:
        from_pretrained(folder)
    assert "base='acme/base'" in refused.value.hint
    with pytest.raises(UsageError, match="takes no 'revision'"):
        from_pretrained(folder, base=base, revision="main")


def test_a_base_that_cannot_be_had_is_named_with_the_reason(double, base, tmp_path):
    commit = double.repo("acme/base").commit(files_of(base))
    folder = adapter(base, tmp_path / "ink")
    lorahub.record(folder, base, base_repo="acme/base", base_revision=commit)
    double.repo("acme/base").gate("manual")
    with pytest.raises(AccessDenied, match="was made for acme/base@"):
        from_pretrained(folder, hub=double.endpoint, token="hf_strangersstrangersstrangers")
    with pytest.raises(Offline, match="was made for acme/base@"):
        from_pretrained(folder, hub=double.endpoint, local_files_only=True)
    lorahub.record(folder, base, base_repo="acme/gone", base_revision=commit)
    with pytest.raises(NotFound, match="was made for acme/gone@"):
        from_pretrained(folder, hub=double.endpoint, token=TOKEN)


def test_arguments_for_loading_reach_transformers(base, tmp_path):
    folder = adapter(base, tmp_path / "ink")
    model = from_pretrained(folder, base=base, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    expected, bare = by_peft(base, folder), plain(base)
    assert (logits(model) - expected).norm() < 0.1 * (expected - bare).norm()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.parametrize("stored", [False, True])
def test_a_base_in_four_bits_takes_the_adapter(tiny, tmp_path, stored):
    tiny("llama", "LlamaForCausalLM", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "base", tmp_path / "ink")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=how, device_map="cpu"
        )

    if stored:
        load().save_pretrained(tmp_path / "four")
        model = from_pretrained(folder, base=tmp_path / "four", device_map="cpu")
    else:
        model = from_pretrained(folder, base=tmp_path / "base", quantization_config=how, device_map="cpu")
    bare, expected = logits(load()), logits(peft.PeftModel.from_pretrained(load(), folder).eval())
    assert (expected - bare).norm() > 1e-2 * bare.norm()
    assert (logits(model) - expected).norm() < 1e-3 * (expected - bare).norm()


def test_the_tokenizer_is_the_adapters_where_it_brings_one(base, words, tmp_path):
    folders = [adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("ink", "sql"), 1)]
    words.add_tokens(["<ink>"])
    words.save_pretrained(folders[0])
    model = from_pretrained(folders, base=base)
    assert len(tokenizer_of(model)) == 51
    assert len(tokenizer_of(model, adapter="")) == 50
    words.add_tokens(["<sql>"])
    words.save_pretrained(folders[1])
    model = from_pretrained(folders, base=base)
    with pytest.raises(UsageError, match="tokenizers that differ"):
        tokenizer_of(model)
    assert len(tokenizer_of(model, adapter="sql")) == 52


def test_copies_have_adapters_of_their_own_and_nothing_holds_the_model(base, tmp_path):
    folder = adapter(base, tmp_path / "ink")
    model = from_pretrained(folder, base=base)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    handle(twin).detach()
    assert torch.equal(logits(twin), plain(base))
    assert not torch.equal(logits(model), plain(base))
    with pytest.raises(UsageError, match="was not made by"):
        handle(torch.nn.Linear(1, 1))
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_prompt_comes_with_its_base_and_the_head_that_was_trained_beside_it(tiny, tmp_path):
    tiny("bert", "BertModel", initializer_range=0.2).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    trained = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    trained = peft.get_peft_model(trained, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    trained.save_pretrained(tmp_path / "mood")
    model = from_pretrained(tmp_path / "mood", base=tmp_path / "base")
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)
    assert model.config.num_labels == 3
    handle(model).detach()
    assert (logits(model) - logits(trained)).norm() > 1e-2 * logits(trained).norm()
    torch.testing.assert_close(logits(model), logits(trained.base_model), rtol=0, atol=1e-6)  # with its head
    with pytest.raises(Incompatible, match=r"cannot be merged"):
        from_pretrained(tmp_path / "mood", base=tmp_path / "base", merge=True)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_words_that_the_adapter_brings_are_part_of_the_model(base, tmp_path):
    torch.manual_seed(1)
    trained = transformers.LlamaForCausalLM.from_pretrained(base)
    trained.resize_token_embeddings(60, mean_resizing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )
    trained = peft.get_peft_model(trained, config).eval()
    trained.save_pretrained(tmp_path / "ink")
    model = from_pretrained(tmp_path / "ink", base=base)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 60
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "mixtral"])
def test_architectures_that_are_in_no_table_come_too(tiny, tmp_path, kind):
    name = {"opt": "OPTForCausalLM", "mixtral": "MixtralForCausalLM"}[kind]
    if kind == "mixtral":  # whose experts are stored one by one, and live in a stack
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**{**MIXTRAL, "vocab_size": 50})
        base = transformers.MixtralForCausalLM(config)
    else:
        base = tiny(kind, name)
    base.eval().save_pretrained(tmp_path / "base")
    bare = logits(base)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, lora).eval()
    tuned.save_pretrained(tmp_path / "ink")
    model = from_pretrained(tmp_path / "ink", base=tmp_path / "base")
    assert type(model).__name__ == name
    assert near(logits(model), logits(tuned), bare)


MIXTRAL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 20,
}
