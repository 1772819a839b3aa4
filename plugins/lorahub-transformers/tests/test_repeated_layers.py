"""Adapters of a model that repeats layers of its base: PEFT trains and saves, lorahub writes the deeper checkpoint.

PEFT keeps one weight for all copies of a layer, so its merge adds the changes of all copies to that weight and is not
the model that was trained: https://github.com/huggingface/peft/issues/1707, for PEFT 0.10 to 0.21.2.  ``strict`` is
held against PEFT's unmerged model, ``peft`` against its ``merge_and_unload``, both through checkpoints that plain
transformers loads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorahub
from lorahub.adapter import load, open_header
from lorahub.cli.main import main
from lorahub.engine.writing.staging import staging_of
from lorahub.errors import BaseMismatch, Incompatible, IntegrityError, UnsupportedKind
from lorahub.files.writer import StreamWriter
from lorahub.merging.job import PROVENANCE
from lorahub.merging.preparing import prepare
from lorahub.plugins import load_registry

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    # peft's check for unsharded factors takes a bias of theirs for one
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 14 LoRA tensor"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

Tiny = Callable[..., Any]
Saved = Callable[..., Path]

UPSTREAM = "https://github.com/huggingface/peft/issues/1707"
MAP = [[0, 4], [2, 5]]
SOURCES = [0, 1, 2, 3, 2, 3, 4]
DEPTH = 5
INPUTS = {"input_ids": torch.arange(10)[None]}
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Trained:
    """A base, an adapter of a deeper model, and what PEFT makes of the two."""

    model: Any
    base: Path
    adapter: Path
    live: torch.Tensor
    merged: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    untrained: torch.Tensor


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS)[0]


def noise(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3, generator=generator)


def trained(
    model: Any, saved: Saved, folder: Path, *, layers: Any = MAP, targets: Any = ("q_proj", "down_proj"), **config: Any
) -> Trained:
    """What PEFT 0.21.2 makes of ``model``: adapter parameters are noise, as are all of the base's."""
    noise(model.parameters(), 1)
    base = saved(model, max_shard_size="20KB")
    settings = {"r": 4, "lora_alpha": 6, "layer_replication": layers, **config}
    chosen = targets if isinstance(targets, str) else list(targets)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=chosen, **settings)).eval()
    if types := getattr(wrapped.config, "layer_types", None):  # PEFT leaves as many as there were, and cannot run
        wrapped.config.layer_types = types[:1] * wrapped.config.num_hidden_layers
    given = [each for name, each in wrapped.named_parameters() if each.requires_grad and "magnitude" not in name]
    before = output(wrapped)  # the deeper model, without what is trained
    noise(given, 2)
    wrapped.save_pretrained(folder)
    live = output(wrapped)
    result = wrapped.merge_and_unload()
    return Trained(model, base, folder, live, output(result), result.state_dict(), before)


def reopened(cls: type, folder: Path) -> Any:
    """The checkpoint in plain transformers; every parameter has a place, and every place a parameter."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "all-linear"),
    "mistral": ("MistralForCausalLM", "all-linear"),
    "qwen2": ("Qwen2ForCausalLM", "all-linear"),
    "qwen3": ("Qwen3ForCausalLM", "all-linear"),
    "bert": ("BertModel", ("query", "output.dense")),
    "roberta": ("RobertaModel", ("query", "output.dense")),
    "gpt2": ("GPT2Model", ("c_attn", "c_proj")),
    "gpt_neox": ("GPTNeoXModel", ("query_key_value", "dense_4h_to_h")),
}
"""Those of the table for which PEFT finds the layers: it looks below ``model`` and ``bert``, and nowhere else."""


def depth_of(kind: str) -> str:
    return {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_strict_writes_the_model_that_was_trained_and_peft_what_peft_merges(
    kind: str, tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    """Upstream: issues/1707; PEFT 0.21.2."""
    name, targets = ARCHITECTURES[kind]
    case = trained(tiny(kind, name, **{depth_of(kind): DEPTH}), saved, tmp_path / "adapter", targets=targets)
    for compat, wanted, other in (("strict", case.live, case.merged), ("peft", case.merged, case.live)):
        out = tmp_path / compat
        lorahub.merge(case.base, {"a": case.adapter}, compat=compat, out=out)
        model = reopened(type(case.model), out)
        assert model.config.num_hidden_layers == len(SOURCES)
        torch.testing.assert_close(output(model), wanted, atol=TOLERANCE, rtol=1e-4)
        assert apart(wanted, other) > 1e-2  # the two results differ,
        assert apart(wanted, case.untrained) > 1e-2  # and neither is what one gets without the adapter


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_every_stored_parameter_is_what_it_should_be(kind: str, tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    """Upstream: issues/1707; PEFT 0.21.2."""
    model = tiny(kind, ARCHITECTURES[kind][0], num_hidden_layers=DEPTH)
    case = trained(model, saved, tmp_path / "adapter")
    before, factors = model.state_dict(), load_file(case.adapter / "adapter_model.safetensors")
    results = {}
    for compat in ("strict", "peft"):
        lorahub.merge(case.base, {"a": case.adapter}, compat=compat, out=tmp_path / compat)
        results[compat] = {
            name: each for file in (tmp_path / compat).glob("*.safetensors") for name, each in load_file(file).items()
        }
    assert results["strict"].keys() == results["peft"].keys() == case.weights.keys()
    for name, merged in results["peft"].items():
        torch.testing.assert_close(merged, case.weights[name], atol=TOLERANCE, rtol=1e-4)
    changed = 0
    for name, merged in results["strict"].items():
        _, at, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        source = before[f"model.layers.{SOURCES[int(number)]}.{leaf}" if at else name]
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in factors:
            assert torch.equal(merged, source), name
            continue
        wanted = source.double() + 6 / 4 * (
            factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
        )
        torch.testing.assert_close(merged.double(), wanted, atol=1e-6, rtol=1e-6)
        assert apart(merged, source) > 1e-2
        changed += 1
    assert changed == 2 * len(SOURCES)
    for first, second in ((2, 4), (3, 5)):  # copies of one layer
        one, other = (
            [results[compat][f"model.layers.{layer}.self_attn.q_proj.weight"] for compat in results]
            for layer in (first, second)
        )
        assert not torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_peft_itself_cannot_save_what_it_merges(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    """What ``compat peft`` adds: copies are stored apart; transformers refuses to save them as PEFT 0.21.2 has them."""
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH)
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=MAP)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    layers = merged.model.layers
    assert len(layers) == len(SOURCES)
    for name, parameter in layers[2].named_parameters():  # norms too: everything is shared, not only what is adapted
        assert layers[4].get_parameter(name) is parameter
    with pytest.raises(RuntimeError, match="shared tensors"):
        merged.save_pretrained(tmp_path / "merged")


VARIANTS: dict[str, dict[str, Any]] = {
    "biases trained": {"targets": ["q_proj"], "bias": "lora_only"},
    "all biases trained": {"targets": ["q_proj"], "bias": "all"},
    "bias of the factors": {"targets": ["q_proj", "k_proj"], "lora_bias": True},
    "modules kept whole": {"targets": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "only copies adapted": {"layers_to_transform": [4, 5], "layers_pattern": "layers"},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"layers.4.self_attn.q_proj": 2}},
    "the head too": {"targets": ["q_proj", "lm_head"]},
    "three copies": {"layers": [[0, 3], [2, 4], [2, 5]]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_else_the_adapter_changes_both_results_hold(
    name: str, tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    """Upstream: issues/1707; PEFT 0.21.2."""
    model = tiny("qwen2", "Qwen2ForCausalLM", num_hidden_layers=DEPTH)  # it has biases
    case = trained(model, saved, tmp_path / "adapter", **VARIANTS[name])
    for compat, wanted in (("strict", case.live), ("peft", case.merged)):
        lorahub.merge(case.base, {"a": case.adapter}, compat=compat, out=tmp_path / compat)
        torch.testing.assert_close(output(reopened(type(model), tmp_path / compat)), wanted, atol=TOLERANCE, rtol=1e-4)
        assert apart(wanted, case.untrained) > 1e-2
    assert apart(case.live, case.merged) > 1e-4


def test_embeddings_stay_tied(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH, tie_word_embeddings=True)
    case = trained(model, saved, tmp_path / "adapter")
    lorahub.merge(case.base, {"a": case.adapter}, compat="strict", out=tmp_path / "out")
    merged = reopened(type(model), tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(output(merged), case.live, atol=TOLERANCE, rtol=1e-4)


def test_a_head_that_the_base_lacks_is_created_beside_the_copies(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    model = tiny("llama", "LlamaForSequenceClassification", num_hidden_layers=DEPTH, pad_token_id=0)
    case = trained(model, saved, tmp_path / "adapter", targets=["q_proj"], task_type="SEQ_CLS")
    bare = saved(model.model)
    lorahub.merge(bare, {"a": case.adapter}, compat="strict", out=tmp_path / "out")
    merged = reopened(type(model), tmp_path / "out")
    torch.testing.assert_close(output(merged), case.live, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("layers", [[[0, 2], [3, 5]], [[3, 5], [0, 2]]], ids=["left out", "in another order"])
def test_without_copies_there_is_one_result_and_nothing_to_choose(
    layers: list[list[int]], tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH)
    case = trained(model, saved, tmp_path / "adapter", layers=layers)
    torch.testing.assert_close(case.live, case.merged, atol=TOLERANCE, rtol=1e-4)
    lorahub.merge(case.base, {"a": case.adapter}, out=tmp_path / "out")
    merged = reopened(type(model), tmp_path / "out")
    assert merged.config.num_hidden_layers == 4
    torch.testing.assert_close(output(merged), case.live, atol=TOLERANCE, rtol=1e-4)
    assert apart(case.live, case.untrained) > 1e-2


def test_dora_follows_each_copys_own_norm_and_has_no_sum_under_peft(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    """Upstream: issues/1707; PEFT 0.21.2, whose second copy is normed by what the first one left."""
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH)
    case = trained(model, saved, tmp_path / "adapter", targets=["q_proj"], use_dora=True)
    lorahub.merge(case.base, {"a": case.adapter}, compat="strict", out=tmp_path / "out")
    torch.testing.assert_close(output(reopened(type(model), tmp_path / "out")), case.live, atol=TOLERANCE, rtol=1e-4)
    with pytest.raises(Incompatible) as stop:
        lorahub.merge(case.base, {"a": case.adapter}, compat="peft", out=tmp_path / "never")
    (found,) = stop.value.findings
    assert (found.code, len(found.where)) == ("compat-refused", 4)
    assert "--compat strict" in found.remedy


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_took_from_the_weight_of_all_copies_is_refused(
    start: str, tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    model = tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH)
    case = trained(model, saved, tmp_path / "adapter", targets=["q_proj"], init_lora_weights=start)
    for compat in ("strict", "peft"):
        with pytest.raises(Incompatible) as stop:
            lorahub.merge(case.base, {"a": case.adapter}, compat=compat, out=tmp_path / "out")
        assert any(each.code == "config-refused" and start in each.message for each in stop.value.findings)


def test_layer_types_that_differ_go_along_with_their_layers(tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    model = tiny("qwen2", "Qwen2ForCausalLM", num_hidden_layers=DEPTH, **window)
    types = model.config.layer_types
    assert len(set(types)) == 2
    case = trained(model, saved, tmp_path / "adapter")
    wanted = [types[number] for number in SOURCES]
    for old in (False, True):  # as releases before the fifth wrote it: without the list
        config = json.loads((case.base / "config.json").read_text())
        if old:
            del config["layer_types"]
            (case.base / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"out-{old}"
        lorahub.merge(case.base, {"a": case.adapter}, compat="strict", out=out)
        assert reopened(type(model), out).config.layer_types == wanted


# --- the choice ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def llama(tiny: Tiny, saved: Saved, tmp_path: Path) -> Trained:
    return trained(tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH), saved, tmp_path / "adapter")


def test_the_command_line_asks_and_says_what_it_does_and_records_the_choice(
    llama: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, answer, said = run(capsys, "inspect", llama.adapter)
    assert code == 0
    assert "7, made of its base's 0-3, 2-4" in answer
    assert "compat-choice" in said
    code, answer, said = run(capsys, "check", llama.adapter, "--base", llama.base)
    assert code == 4
    assert UPSTREAM in said
    assert "its 5 layers made 7 (0-3, 2-4)" in answer
    code, _, said = run(capsys, "merge", llama.adapter, "--base", llama.base, "-o", out)
    assert code == 4
    assert "--compat peft" in said
    assert "--compat strict" in said
    assert not out.exists()
    code, answer, _ = run(capsys, "merge", llama.adapter, "--base", llama.base, "--plan", "--compat", "strict")
    assert code == 0
    lines = {line.split()[0]: line for line in answer.splitlines() if line}
    assert "7 in model.layers, made of the base's 5: 0-3, 2-4" in lines["layers"]
    assert "num_hidden_layers: 5 -> 7" in lines["config.json"]
    assert lines["changes"].endswith("14 targets in 14 parameters")
    assert "21 parameters of repeated layers" in lines["copied"]
    assert "untied" not in lines
    for compat in ("peft", "strict"):
        code, _, said = run(
            capsys, "merge", llama.adapter, "--base", llama.base, "-o", tmp_path / compat, "--compat", compat
        )
        assert code == 0, said
        written = json.loads((tmp_path / compat / PROVENANCE).read_text())
        assert written["adapters"][0]["compat"] == compat
        assert written["layers"] == SOURCES
    assert run(capsys, "record", llama.adapter, "--base", llama.base, "--compat", "strict")[0] == 0
    code, answer, _ = run(capsys, "check", llama.adapter, "--base", llama.base, "--json")
    assert code == 0
    document = json.loads(answer)
    assert document["verdict"] == "exact"  # the very base, though its layers are repeated
    assert {"compat-chosen", "layers-repeated", "base-weights-equal"} <= {each["code"] for each in document["findings"]}


def test_the_plan_counts_what_is_written(llama: Trained, tmp_path: Path) -> None:
    for compat in ("strict", "peft"):
        job = prepare(llama.base, {"a": llama.adapter}, compat=compat)
        report = job.write(tmp_path / compat)
        stored = [each for file in (tmp_path / compat).glob("*.safetensors") for each in load_file(file).values()]
        size = sum(each.nbytes for each in stored)
        assert sum(step.after.nbytes for step in job.plan.steps) + job.plan.untouched_bytes == size
        assert len(job.plan.steps) + len(job.plan.untouched) == len(stored)
        index = json.loads((tmp_path / compat / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert report.changed == 14
    strict, together = (prepare(llama.base, {"a": llama.adapter}, compat=each).plan for each in ("strict", "peft"))
    largest = max(term.nbytes for step in strict.steps for term in step.terms)
    # an adapter's tensors are held once, wherever they go; only what is cast for one parameter at a time is more
    assert 0 < together.peak_bytes() - strict.peak_bytes() <= 4 * largest


def test_copies_lie_in_the_shard_of_their_source(llama: Trained, tmp_path: Path) -> None:
    lorahub.merge(llama.base, {"a": llama.adapter}, compat="strict", out=tmp_path / "out")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (llama.base, tmp_path / "out")
    )
    assert len(set(after.values())) == len(set(before.values())) > 1
    for name, file in after.items():
        _, at, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        assert file == before[f"model.layers.{SOURCES[int(number)]}.{leaf}" if at else name]


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, done = tmp_path / "out", StreamWriter.commit, []

    def commit(self: StreamWriter) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        real(self)

    lorahub.merge(llama.base, {"a": llama.adapter}, compat="peft", out=tmp_path / "whole")
    monkeypatch.setattr(StreamWriter, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        lorahub.merge(llama.base, {"a": llama.adapter}, compat="peft", out=out)
    monkeypatch.undo()
    assert not out.exists()
    assert len(list(staging_of(out).glob("*.safetensors"))) == 1
    report = lorahub.merge(llama.base, {"a": llama.adapter}, compat="peft", out=out)
    assert report.resumed == 1
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_the_result_does_not_depend_on_threads(llama: Trained, tmp_path: Path) -> None:
    for threads in (1, 3):
        lorahub.merge(llama.base, {"a": llama.adapter}, compat="peft", out=tmp_path / str(threads), threads=threads)
    for file in (tmp_path / "1").glob("*.safetensors"):
        assert (tmp_path / "3" / file.name).read_bytes() == file.read_bytes()


def test_weights_multiply_each_copys_change(llama: Trained, tmp_path: Path) -> None:
    lorahub.merge(llama.base, {"a": llama.adapter}, weights=[0.5], compat="strict", out=tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(llama.model), llama.adapter)
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(0.5)
    merged = reopened(type(llama.model), tmp_path / "out")
    torch.testing.assert_close(output(merged), output(wrapped), atol=TOLERANCE, rtol=1e-4)


# --- what cannot be --------------------------------------------------------------------------------------------------


def adapter_for(model: Any, folder: Path, **config: Any) -> Path:
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], **config))
    noise([each for each in wrapped.parameters() if each.requires_grad], 7)
    wrapped.save_pretrained(folder)
    return folder


def test_two_adapters_of_the_same_deeper_model_are_merged_together(llama: Trained, tmp_path: Path) -> None:
    second = adapter_for(llama.model, tmp_path / "second", layer_replication=MAP)
    lorahub.merge(llama.base, {"a": llama.adapter, "b": second}, compat="peft", out=tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(llama.model), llama.adapter, adapter_name="a")
    state = load_file(second / "adapter_model.safetensors")
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        for layer, module in enumerate(merged.model.layers):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            module.self_attn.q_proj.weight += state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(
        output(reopened(type(llama.model), tmp_path / "out")), output(merged), atol=TOLERANCE, rtol=1e-4
    )


@pytest.mark.parametrize("layers", [None, [[0, 5], [2, 5]]], ids=["of the base as it is", "of another deeper model"])
def test_adapters_of_different_models_are_not_merged_together(layers: Any, llama: Trained, tmp_path: Path) -> None:
    other = adapter_for(llama.model, tmp_path / "other", layer_replication=layers)
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(llama.base, {"a": llama.adapter, "b": other}, compat="strict", out=tmp_path / "out")
    assert {each.code for each in stop.value.findings} == {"layers-differ"}


def test_a_live_model_keeps_its_layers(llama: Trained) -> None:
    before = copy.deepcopy(llama.model.state_dict())
    with pytest.raises(Incompatible, match="repeats layers 0-3, 2-4") as stop:
        lorahub.merge(llama.model, {"a": llama.adapter}, compat="strict")
    assert "merge to disk" in stop.value.hint
    assert all(torch.equal(each, before[name]) for name, each in llama.model.state_dict().items())


@pytest.mark.parametrize("layers", [MAP, [[3, 5], [0, 3]]], ids=["deeper", "as deep, in another order"])
def test_files_that_are_written_in_place_keep_their_layers(
    layers: Any, tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    case = trained(
        tiny("llama", "LlamaForCausalLM", num_hidden_layers=DEPTH), saved, tmp_path / "adapter", layers=layers
    )
    before = {file.name: file.read_bytes() for file in case.base.iterdir()}
    with pytest.raises(Incompatible, match="written in place"):
        lorahub.merge(case.base, {"a": case.adapter}, compat="strict", in_place=True)
    assert {file.name: file.read_bytes() for file in case.base.iterdir() if file.is_file()} == before
    lorahub.merge(case.base, {"a": case.adapter}, compat="strict", out=tmp_path / "out")
    torch.testing.assert_close(
        output(reopened(type(case.model), tmp_path / "out")), case.live, atol=TOLERANCE, rtol=1e-4
    )


def test_a_model_that_peft_made_deeper_shares_its_layers_and_is_refused(llama: Trained) -> None:
    deeper = peft.PeftModel.from_pretrained(copy.deepcopy(llama.model), llama.adapter).unload()
    assert len(deeper.model.layers) == len(SOURCES)
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(deeper, {"a": llama.adapter}, compat="strict")
    assert {each.code for each in stop.value.findings} == {"layers-tied"}


def test_a_base_with_too_few_layers_is_refused(llama: Trained, tiny: Tiny, saved: Saved, tmp_path: Path) -> None:
    short = saved(tiny("llama", "LlamaForCausalLM", num_hidden_layers=4))
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(short, {"a": llama.adapter}, compat="strict", out=tmp_path / "out")
    (found,) = stop.value.findings
    assert found.code == "layers-out-of-range"
    assert "has 4 of them" in found.message


def test_an_architecture_without_a_declaration_is_refused_by_name(llama: Trained, saved: Saved, tmp_path: Path) -> None:
    config = transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=50, ffn_hidden_size=24
    )
    model = transformers.FalconModel(config)  # which PEFT repeats: https://github.com/huggingface/peft/pull/1368
    with pytest.raises(BaseMismatch, match="cannot be done") as stop:
        lorahub.merge(
            saved(model),
            {"a": trained(model, saved, tmp_path / "falcon", targets=["query_key_value"]).adapter},
            compat="strict",
            out=tmp_path / "out",
        )
    (found,) = stop.value.findings
    assert found.code == "layers-undeclared"
    assert "model_type 'falcon'" in found.message


def test_alone_it_is_a_value_of_no_base_and_is_not_loaded(llama: Trained, tmp_path: Path) -> None:
    registry = load_registry()
    for compat in ("strict", "peft"):
        header = open_header(llama.adapter, registry, compat=compat)
        with pytest.raises(UnsupportedKind, match="repeats layers of its base") as stop:
            load(header, registry)
        assert "-o FOLDER" in stop.value.hint


def test_a_map_of_no_layers_is_refused_as_damage(llama: Trained, tmp_path: Path) -> None:
    path = llama.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[4, 0]]}))
    with pytest.raises(IntegrityError):
        lorahub.merge(llama.base, {"a": llama.adapter}, compat="strict", out=tmp_path / "out")
    report = lorahub.check(llama.adapter, llama.base, compat="strict")
    assert any("[4, 0], which is no range of layers" in each.message for each in report.findings)
