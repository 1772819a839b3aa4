"""PEFT trains and merges, lorahub merges from the files alone: LoRA on parameters, on experts, on attention and tokens.

Numbers are PEFT 0.21.2's own: every adapter parameter is noise, saved, and PEFT's ``merge_and_unload`` is what lorahub
must come to.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lorahub.adapter import load, open_header, save
from lorahub.bases.layout import Target
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.errors import Incompatible, IntegrityError
from lorahub.findings import Verdict
from lorahub.merging import merge
from lorahub.merging.checking import check
from lorahub.merging.preparing import prepare
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

TOLERANCE = 2e-5
"""Float32 products summed in another order, of elements of size 1."""


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


class Experts(nn.Module):
    """Two stacks of four experts, the first one registered last in the alphabet, and a matrix."""

    def __init__(self, *, turned: bool, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.is_transposed = turned
        shapes = ((4, width, hidden), (4, hidden, width)) if turned else ((4, hidden, width), (4, width, hidden))
        self.zig = nn.Parameter(torch.randn(shapes[0]))
        self.alpha = nn.Parameter(torch.randn(shapes[1]))
        self.flat = nn.Parameter(torch.randn(3, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into, out = (self.zig, self.alpha) if self.is_transposed else (self.zig.mT, self.alpha.mT)
        return ((x @ into) @ out).sum(0) + (x @ self.flat.T).sum()


class Toy(nn.Module):
    """Experts beside a linear layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.experts = Experts(**settings)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.experts(x))


def toy(**settings: Any) -> Toy:
    torch.manual_seed(3)
    return Toy(**settings)


_MIXTURE: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts_per_tok": 2,
}

_ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 12},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 6}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4}),
}


def mixture(name: str, **settings: Any) -> nn.Module:
    cls, own = _ARCHITECTURES[name]
    torch.manual_seed(3)
    chosen = getattr(transformers, cls)
    model: nn.Module = chosen(chosen.config_class(**{**_MIXTURE, **own, **settings})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # transformers starts biases at zero, against which no change can be measured
    return model


@dataclass(frozen=True)
class Case:
    """A base, and the PEFT config of an adapter for it."""

    base: Callable[[], nn.Module]
    config: Mapping[str, Any]
    kinds: tuple[str, ...]
    changed: int


_BOTH = ["experts.gate_up_proj", "experts.down_proj"]

CASES: Mapping[str, Case] = {
    "a matrix": Case(toy_base := lambda: toy(turned=False), {"target_parameters": ["experts.flat"]}, ("lora",), 1),
    "the weight of a linear layer": Case(toy_base, {"target_parameters": ["linear.weight"]}, ("lora",), 1),
    "a stack [E, out, in]": Case(toy_base, {"target_parameters": ["experts.zig"]}, ("expert-lora",), 1),
    "a stack [E, in, out]": Case(lambda: toy(turned=True), {"target_parameters": ["experts.zig"]}, ("expert-lora",), 1),
    "a square stack [E, out, in]": Case(
        lambda: toy(turned=False, hidden=6), {"target_parameters": ["experts.alpha"]}, ("expert-lora",), 1
    ),
    "a square stack [E, in, out]": Case(
        lambda: toy(turned=True, hidden=6), {"target_parameters": ["experts.alpha"]}, ("expert-lora",), 1
    ),
    "two stacks of a module": Case(
        toy_base, {"target_parameters": ["experts.alpha", "experts.zig"]}, ("expert-lora",), 2
    ),
    "stacks, a matrix and a linear layer": Case(
        toy_base,
        {"target_parameters": ["experts.alpha", "experts.zig", "experts.flat"], "target_modules": ["linear"]},
        ("expert-lora", "lora"),
        4,
    ),
    "rslora and patterns": Case(
        toy_base,
        {
            "target_parameters": ["experts.alpha", "experts.zig"],
            "use_rslora": True,
            "rank_pattern": {"experts.zig": 3},
            "alpha_pattern": {"experts.alpha": 7},
        },
        ("expert-lora",),
        2,
    ),
    **{
        name: Case(
            lambda name=name: mixture(name),
            {"target_parameters": _BOTH, "target_modules": ["q_proj"]},
            ("expert-lora", "lora"),
            6,
        )
        for name in _ARCHITECTURES
    },
    "gpt_oss, down_proj alone and square": Case(
        lambda: mixture("gpt_oss", intermediate_size=8), {"target_parameters": ["down_proj"]}, ("expert-lora",), 2
    ),
    "mixtral, down_proj alone and square": Case(
        lambda: mixture("mixtral", intermediate_size=8), {"target_parameters": ["down_proj"]}, ("expert-lora",), 2
    ),
    "gpt_oss, biases too": Case(
        lambda: mixture("gpt_oss"),
        {"target_parameters": [*_BOTH, "experts.gate_up_proj_bias", "experts.down_proj_bias"]},
        ("expert-lora", "lora"),
        8,
    ),
    "a router": Case(
        lambda: mixture("mixtral"), {"target_parameters": ["mlp.gate.weight", *_BOTH]}, ("expert-lora", "lora"), 6
    ),
}


def trained(case: Case, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """PEFT's adapter in ``folder``, full of noise; the base before, and what PEFT merges."""
    model = case.base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [], **case.config})
    wrapped: PeftModel = quietly(lambda: get_peft_model(model, config))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    quietly(lambda: wrapped.save_pretrained(str(folder)))
    merged: nn.Module = quietly(wrapped.merge_and_unload)
    return before, dict(merged.state_dict())


def assert_equal(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> int:
    """Element by element; how many parameters changed, none of them by little."""
    assert found.keys() == expected.keys() == before.keys()
    changed = 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=TOLERANCE, rtol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023
        size = ((value - before[name]).norm() / before[name].norm()).item()
        if size:
            assert size > 1e-2, f"{name} changes by {size:.1e} of its norm, too little to test with"
            changed += 1
    return changed


@pytest.mark.parametrize("name", CASES)
def test_merging_from_files_gives_what_peft_merges(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before, expected = trained(case, tmp_path / "adapter")
    model = case.base()
    result = merge(model, {"one": tmp_path / "adapter"})
    assert assert_equal(dict(model.state_dict()), expected, before) >= case.changed
    result.undo()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_read_as_the_kind_it_is(name: str, tmp_path: Path, registry: Registry) -> None:
    case = CASES[name]
    trained(case, tmp_path / "adapter")
    job = prepare(case.base(), {"one": tmp_path / "adapter"})
    header = job.headers["one"]
    assert header.kinds == case.kinds
    assert len(header.touches) == case.changed
    assert job.verdict <= Verdict.UNVERIFIED


# --- attention -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """A MultiheadAttention beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.attention(x, x, x)[0])


def attention() -> Attention:
    torch.manual_seed(3)
    model = Attention()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # torch starts its biases at zero
    return model


ATTENTIONS: Mapping[str, Case] = {
    "plain": Case(attention, {"target_modules": ["attention"]}, ("lora",), 2),
    "beside a linear layer, rslora": Case(
        attention, {"target_modules": ["attention", "linear"], "use_rslora": True}, ("lora",), 3
    ),
    "patterns": Case(
        attention,
        {"target_modules": ["attention"], "rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 7}},
        ("lora",),
        2,
    ),
    "patterns that name the output": Case(
        attention, {"target_modules": ["attention"], "alpha_pattern": {"out_proj": 7}}, ("lora",), 2
    ),
    "biases too": Case(attention, {"target_modules": ["attention"], "bias": "all"}, ("lora", "replace"), 4),
}
"""PEFT wraps the whole attention, and adapts its input and its output."""


@pytest.mark.parametrize("name", ATTENTIONS)
def test_compat_peft_adds_the_change_of_an_attentions_output_twice_as_peft_does(name: str, tmp_path: Path) -> None:
    # https://github.com/huggingface/peft/pull/3774, open; so in PEFT 0.13 to 0.21.2
    case = ATTENTIONS[name]
    before, expected = trained(case, tmp_path / "adapter")
    model = case.base()
    merge(model, {"one": tmp_path / "adapter"}, compat="peft")
    assert assert_equal(dict(model.state_dict()), expected, before) >= 2


@pytest.mark.parametrize("name", ATTENTIONS)
def test_compat_strict_adds_the_change_of_an_attentions_output_once(name: str, tmp_path: Path) -> None:
    # https://github.com/huggingface/peft/pull/3774, open; so in PEFT 0.13 to 0.21.2
    case = ATTENTIONS[name]
    before, expected = trained(case, tmp_path / "adapter")
    model = case.base()
    merge(model, {"one": tmp_path / "adapter"}, compat="strict")
    output = "attention.out_proj.weight"
    once = before[output] + (expected[output] - before[output]) / 2
    assert_equal(dict(model.state_dict()), {**expected, output: once}, before)


def test_an_attention_is_not_merged_until_somebody_chose(tmp_path: Path) -> None:
    # https://github.com/huggingface/peft/pull/3774, open; so in PEFT 0.13 to 0.21.2
    case = ATTENTIONS["beside a linear layer, rslora"]
    before, _ = trained(case, tmp_path / "adapter")
    model = case.base()
    with pytest.raises(Incompatible) as caught:
        merge(model, {"one": tmp_path / "adapter"})
    (finding,) = caught.value.findings
    assert (finding.code, finding.axis, finding.allowable) == ("compat-choice", "policy", False)
    assert finding.message.startswith("for 1 target, ")
    assert "pull/3774" in finding.message
    assert "--compat peft" in finding.remedy
    assert "--compat strict" in finding.remedy
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_parameter_of_an_attention_alone_is_no_matter_of_dispute(tmp_path: Path) -> None:
    case = Case(attention, {"target_parameters": ["attention.in_proj_weight"]}, ("lora",), 1)
    before, expected = trained(case, tmp_path / "adapter")
    model = case.base()
    merge(model, {"one": tmp_path / "adapter"})
    assert assert_equal(dict(model.state_dict()), expected, before) == 1


def test_a_bias_that_peft_never_adds_is_refused(tmp_path: Path) -> None:
    trained(Case(attention, {"target_modules": ["attention"], "lora_bias": True}, (), 0), tmp_path / "adapter")
    with pytest.raises(Incompatible, match="bias, down, up do to in_proj_weight"):
        merge(attention(), {"one": tmp_path / "adapter"}, compat="peft")


# --- tokens beside LoRA ----------------------------------------------------------------------------------------------


def llama(*, tied: bool) -> nn.Module:
    torch.manual_seed(3)
    settings = {key: value for key, value in _MIXTURE.items() if key != "num_experts_per_tok"}
    model: nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**settings, "tie_word_embeddings": tied})
    ).float()
    return model


def rows(base: Callable[[], nn.Module], **fields: Any) -> Case:
    return Case(base, {"target_modules": ["q_proj"], **fields}, ("lora", "tokens"), 3)


ENSURED: Mapping[str, Case] = {
    "a list": rows(lambda: llama(tied=True), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "the output layer, rslora": rows(
        lambda: llama(tied=True), target_modules=["lm_head"], ensure_weight_tying=True, use_rslora=True
    ),
}
"""One change for an embedding and the output layer, which are one weight."""

TIED = ("model.embed_tokens.weight", "lm_head.weight")


def on_disk(case: Case, folder: Path, compat: str | None = None) -> dict[str, torch.Tensor]:
    """All parameters of the model that lorahub stores: tied weights part, which takes another model."""
    quietly(lambda: case.base().save_pretrained(str(folder / "base")))
    merge(folder / "base", {"one": folder / "adapter"}, out=folder / "out", compat=compat)
    return dict(quietly(lambda: transformers.LlamaForCausalLM.from_pretrained(str(folder / "out"))).state_dict())


@pytest.mark.plugin("transformers")
@pytest.mark.parametrize("name", ENSURED)
def test_compat_peft_adds_an_embeddings_change_for_each_name_of_a_tied_weight_as_peft_merges_it(
    name: str, tmp_path: Path
) -> None:
    # PEFT 0.21.2; https://github.com/huggingface/peft/issues/2864 is about tying as a whole
    before, expected = trained(ENSURED[name], tmp_path / "adapter")
    assert assert_equal(on_disk(ENSURED[name], tmp_path, "peft"), expected, before) >= 2


@pytest.mark.plugin("transformers")
@pytest.mark.parametrize("name", ENSURED)
def test_compat_strict_adds_an_embeddings_change_to_a_tied_weight_once(name: str, tmp_path: Path) -> None:
    before, expected = trained(ENSURED[name], tmp_path / "adapter")
    once = {each: before[each] + (expected[each] - before[each]) / 2 for each in TIED}
    assert assert_equal(on_disk(ENSURED[name], tmp_path, "strict"), {**expected, **once}, before) >= 2


@pytest.mark.plugin("transformers")
def test_compat_strict_computes_what_pefts_model_of_a_tied_weight_computes(tmp_path: Path) -> None:
    case = ENSURED["a list"]
    trained(case, tmp_path / "adapter")
    model, ids = case.base().eval(), torch.arange(6)[None]
    wrapped = quietly(lambda: PeftModel.from_pretrained(case.base(), str(tmp_path / "adapter")).eval())
    on_disk(case, tmp_path, "strict")
    merged = quietly(lambda: transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / "out")).eval())
    with torch.no_grad():
        expected, untouched, found = (each(input_ids=ids).logits for each in (wrapped, model, merged))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - untouched).norm() / untouched.norm()) > 1e-2


@pytest.mark.plugin("transformers")
def test_a_tied_weight_is_not_merged_until_somebody_chose_and_one_that_is_apart_is_no_matter_of_dispute(
    tmp_path: Path,
) -> None:
    trained(ENSURED["a list"], tmp_path / "adapter")
    with pytest.raises(Incompatible) as caught:
        on_disk(ENSURED["a list"], tmp_path)
    (finding,) = caught.value.findings
    assert finding.code == "compat-choice"
    assert finding.message.startswith("for 2 targets, ")
    assert not (tmp_path / "out").exists()
    assert "target-unlisted" not in {each.code for each in check(tmp_path / "adapter", tmp_path / "base").findings}
    merge(llama(tied=False), {"one": tmp_path / "adapter"})


TOKENS: Mapping[str, Case] = {
    "a list": rows(lambda: llama(tied=False), trainable_token_indices=[5, 1, 3]),
    "a module": rows(lambda: llama(tied=False), trainable_token_indices={"embed_tokens": [5, 1]}),
    "two modules": rows(lambda: llama(tied=False), trainable_token_indices={"embed_tokens": [5], "lm_head": [1, 3]}),
    "tied": rows(lambda: llama(tied=True), trainable_token_indices={"embed_tokens": [5, 1]}),
    "tied, as ensured": rows(
        lambda: llama(tied=True), trainable_token_indices={"embed_tokens": [5, 1]}, ensure_weight_tying=True
    ),
    "tied, both named": rows(
        lambda: llama(tied=True),
        trainable_token_indices={"embed_tokens": [5, 1], "lm_head": [5, 1]},
        ensure_weight_tying=True,
    ),
    "beside experts": Case(
        lambda: mixture("mixtral"),
        {"target_parameters": _BOTH, "target_modules": ["q_proj"], "trainable_token_indices": [2, 7]},
        ("expert-lora", "lora", "tokens"),
        7,
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_rows_beside_lora_are_replaced_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    case = TOKENS[name]
    before, expected = trained(case, tmp_path / "adapter")
    model = case.base()
    merge(model, {"one": tmp_path / "adapter"})
    assert assert_equal(dict(model.state_dict()), expected, before) >= 3
    assert torch.equal(model.get_parameter("model.embed_tokens.weight")[0], before["model.embed_tokens.weight"][0]), (
        "a row that no token names"
    )


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_rows_of_an_adapter_of_their_own_stay_tied_as_peft_ties_them(tied: bool, tmp_path: Path) -> None:
    model = llama(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TrainableTokensConfig(token_indices=[5, 1], target_modules=["embed_tokens"])
    wrapped = quietly(lambda: get_peft_model(model, config))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(11)))
    quietly(lambda: wrapped.save_pretrained(str(tmp_path / "adapter")))
    expected = dict(quietly(wrapped.merge_and_unload).state_dict())
    found = llama(tied=tied)
    merge(found, {"one": tmp_path / "adapter"})
    assert assert_equal(dict(found.state_dict()), expected, before) == 1 + tied


def test_rows_and_factors_on_one_embedding_are_refused_as_peft_refuses_them(tmp_path: Path) -> None:
    case = rows(lambda: llama(tied=False), trainable_token_indices={"embed_tokens": [5]})
    trained(case, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = "base_model.model.model.embed_tokens"
    tensors |= {f"{stem}.lora_embedding_A": torch.ones(2, 32), f"{stem}.lora_embedding_B": torch.ones(8, 2)}
    save_file(tensors, path)
    report = check(tmp_path / "adapter", case.base())
    assert report.verdict is Verdict.INCOMPATIBLE
    assert any(f"{stem}.lora_embedding_A" in finding.where for finding in report.findings)


# --- writing back ----------------------------------------------------------------------------------------------------

WRITTEN = {**CASES, **{f"attention, {name}": case for name, case in ATTENTIONS.items()}, **TOKENS}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_read_is_written_as_peft_wrote_it_and_peft_merges_it_alike(
    name: str, tmp_path: Path, registry: Registry
) -> None:
    case = WRITTEN[name]
    _, expected = trained(case, tmp_path / "theirs")
    index = prepare(case.base(), {"one": tmp_path / "theirs"}, compat="peft").base.index
    read = load(open_header(tmp_path / "theirs", registry, compat="peft"), registry, index=index)
    save(read, tmp_path / "ours", registry=registry)
    file = "adapter_model.safetensors"
    theirs, ours = load_file(tmp_path / "theirs" / file), load_file(tmp_path / "ours" / file)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    again = case.base()
    loaded = quietly(lambda: PeftModel.from_pretrained(again, str(tmp_path / "ours")))
    for key, value in quietly(loaded.merge_and_unload).state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", ["two stacks of a module", "gpt_oss", "stacks, a matrix and a linear layer"])
def test_what_keys_leave_out_is_written_down_so_that_no_base_is_needed_to_read_it_again(
    name: str, tmp_path: Path, registry: Registry
) -> None:
    case = CASES[name]
    trained(case, tmp_path / "theirs")
    job = prepare(case.base(), {"one": tmp_path / "theirs"})
    with_base = load(job.headers["one"], registry)
    save(with_base, tmp_path / "ours", registry=registry)
    without = load(open_header(tmp_path / "ours", registry), registry)
    assert without.deltas.keys() == with_base.deltas.keys()
    for target, delta in with_base.deltas.items():
        found = without.deltas[target]
        assert type(found) is type(delta)
        assert all(torch.equal(value, found.tensors()[key]) for key, value in delta.tensors().items())
        if isinstance(delta, ExpertLoRA):
            assert found.transposed is delta.transposed is job.base.index.parameters[target.name].turned


def test_whose_result_a_file_was_written_for_is_in_the_file(tmp_path: Path, registry: Registry) -> None:
    case = ATTENTIONS["plain"]
    before, expected = trained(case, tmp_path / "theirs")
    for compat in ("peft", "strict"):
        read = load(open_header(tmp_path / "theirs", registry, compat=compat), registry)
        save(read, tmp_path / compat, registry=registry)
        again = load(open_header(tmp_path / compat, registry), registry)
        target = Target("", "attention.out_proj", "weight")
        assert again.deltas[target].scale == read.deltas[target].scale
        model = case.base()
        merge(model, {"one": tmp_path / compat})
        change = model.attention.out_proj.weight - before["attention.out_proj.weight"]
        whole = expected["attention.out_proj.weight"] - before["attention.out_proj.weight"]
        torch.testing.assert_close(change, whole if compat == "peft" else whole / 2, atol=TOLERANCE, rtol=1e-5)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["peft", "strict", None])
def test_a_weight_goes_inside_doras_norm_under_compat_peft_alone(compat: str | None, tmp_path: Path) -> None:
    # PEFT 0.21.2 (tuners/lora/dora.py): scale_layer changes what is added before the norm is taken
    weight = 0.6
    model = toy(turned=False)
    before = model.linear.weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["linear"])
    wrapped = quietly(lambda: get_peft_model(model, config))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    quietly(lambda: wrapped.save_pretrained(str(tmp_path / "adapter")))
    whole = toy(turned=False)
    merge(whole, {"one": tmp_path / "adapter"})
    wrapped.base_model.model.linear.scale_layer(weight)
    expected = quietly(wrapped.merge_and_unload).linear.weight
    linear = before + weight * (whole.linear.weight - before)
    assert (expected - linear).norm() > 1e-2 * before.norm()
    found = toy(turned=False)
    job = prepare(found, {"one": tmp_path / "adapter"}, weights=[weight], compat=compat)
    merge(found, {"one": tmp_path / "adapter"}, weights=[weight], compat=compat)
    torch.testing.assert_close(found.linear.weight, expected if compat == "peft" else linear, atol=TOLERANCE, rtol=1e-5)
    codes = {each.code for each in job.plan.findings}
    assert ("compat-chosen" in codes) is (compat == "peft")
    assert ("weight-is-linear" in codes) is (compat != "peft")
    (adapter,) = job.provenance()["adapters"]
    assert adapter.get("compat") == ("peft" if compat == "peft" else None)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def stored(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The model as transformers saves it: experts one by one, where the architecture had them so."""
    quietly(lambda: model.save_pretrained(folder))
    return load_file(folder / "model.safetensors")


CHECKPOINTS = {
    name: CASES[name] for name in (*_ARCHITECTURES, "gpt_oss, down_proj alone and square", "gpt_oss, biases too")
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_on_disk_becomes_what_peft_merges_and_transformers_saves(name: str, tmp_path: Path) -> None:
    case = CHECKPOINTS[name]
    _, merged = trained(case, tmp_path / "adapter")
    model = case.base()
    before = stored(model, tmp_path / "base")
    model.load_state_dict(merged)
    expected = stored(model, tmp_path / "expected")
    merge(tmp_path / "base", [str(tmp_path / "adapter")], out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert assert_equal(found, expected, before) >= case.changed


@pytest.mark.parametrize("compat", ["peft", "strict"])
@pytest.mark.parametrize(
    ("name", "place", "parts"),
    [
        ("mixtral", "block_sparse_moe.experts", ["w1", "w2", "w3"]),
        ("qwen3_moe", "mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_rslora_of_experts_from_transformers_4_is_larger_under_compat_peft_alone(
    name: str, place: str, parts: list[str], compat: str, tmp_path: Path
) -> None:
    # PEFT 0.21.2 on transformers 5 (utils/transformers_weight_conversion.py) doubles rank and alpha: alpha / sqrt(r)
    # becomes 2 * alpha / sqrt(2 * r)
    model = mixture(name)
    before = stored(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for key, value in before.items():
        if f".{place}." in key:
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, value.shape[1], generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(value.shape[0], 2, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": parts}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = quietly(lambda: PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload())
    theirs = stored(merged, tmp_path / "theirs")
    with pytest.raises(Incompatible, match="larger by sqrt"):
        merge(tmp_path / "base", [str(tmp_path / "adapter")], out=tmp_path / "none")
    merge(tmp_path / "base", [str(tmp_path / "adapter")], out=tmp_path / "out", compat=compat)
    found = load_file(tmp_path / "out" / "model.safetensors")
    fused = {"w1", "w3", "gate_proj", "up_proj"} if compat == "strict" else set()
    expected = {
        key: before[key] + (value - before[key]) / 2**0.5 if key.split(".")[-2] in fused else value
        for key, value in theirs.items()
    }
    assert assert_equal(found, expected, before) == len(tensors) // 2
    live = mixture(name)
    merge(live, {"one": tmp_path / "adapter"}, compat=compat)
    assert assert_equal(stored(live, tmp_path / "live"), expected, before) == len(tensors) // 2


@pytest.mark.plugin("transformers")
def test_rows_that_say_two_things_of_one_tied_parameter_are_refused(tmp_path: Path) -> None:
    # PEFT 0.21.2 merges these to something else than it computes before
    case = rows(lambda: llama(tied=True), trainable_token_indices={"embed_tokens": [5, 1], "lm_head": [1, 3]})
    trained(case, tmp_path / "adapter")
    with pytest.raises(Incompatible, match="untying lm_head"):
        merge(case.base(), {"one": tmp_path / "adapter"}, allow=["tied-parameter"])


def test_rows_of_tied_names_that_differ_in_their_values_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{name}.trainable_tokens_delta": torch.full((2, 8), float(number))
        for number, name in enumerate(("model.embed_tokens", "lm_head"))
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 1], "target_modules": ["embed_tokens", "lm_head"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=r"lm_head\.weight .*in different ways"):
        merge(llama(tied=True), {"one": tmp_path / "adapter"})
    merge(llama(tied=False), {"one": tmp_path / "adapter"})


def test_a_stack_is_planned_and_folded_expert_by_expert_and_alike_in_memory_and_on_disk(tmp_path: Path) -> None:
    case = CASES["gpt_oss"]
    trained(case, tmp_path / "adapter")
    model = case.base()
    stored(model, tmp_path / "base")
    job = prepare(model, {"one": tmp_path / "adapter"})
    step = next(each for each in job.plan.steps if each.out == "model.layers.0.mlp.experts.down_proj")
    assert [term.piece.of_parameter.expert for term in step.terms] == [0, 1, 2, 3]
    assert all(term.windowed for term in step.terms)
    assert len({term.target for term in step.terms}) == 1
    merge(model, {"one": tmp_path / "adapter"}, weights=[0.7])
    merge(tmp_path / "base", [str(tmp_path / "adapter")], weights=[0.7], out=tmp_path / "out", threads=2)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, model.get_parameter(name)), name


def test_two_adapters_on_one_stack_add_up(tmp_path: Path) -> None:
    case = CASES["two stacks of a module"]
    before, one = trained(case, tmp_path / "one")
    _, other = trained(CASES["a stack [E, out, in]"], tmp_path / "other")
    model = case.base()
    merge(model, {"one": tmp_path / "one", "other": tmp_path / "other"}, weights=[1.0, -0.5])
    for name, value in model.state_dict().items():
        expected = one[name] - 0.5 * (other[name] - before[name])
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=1e-5)
