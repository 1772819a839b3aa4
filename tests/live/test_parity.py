"""PEFT trains and saves, lorahub attaches from the files: outputs equal PEFT's own live model, unmerged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorahub
from lorahub.errors import Degraded, Incompatible, UsageError

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]


class Small(nn.Module):
    """Attention of torch's own, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2))


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama lora": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA)),
    "llama rslora with patterns": (
        "llama",
        lambda: peft.LoraConfig(
            r=4, use_rslora=True, target_modules=LLAMA, rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 5}
        ),
    ),
    "llama dora": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=LLAMA)),
    "llama embedding": (
        "llama",
        lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "v_proj"]),
    ),
    "llama biases and norms": (
        "llama",
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm", "lm_head"]),
    ),
    "llama loha": ("llama", lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LLAMA)),
    "llama lokr": ("llama", lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=LLAMA, decompose_factor=4)),
    "llama vera": ("llama", lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])),
    "llama oft": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=LLAMA, use_cayley_neumann=False),
    ),
    "llama ia3": (
        "llama",
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "bert lora with biases": (
        "bert",
        lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value", "dense"], bias="lora_only"),
    ),
    "bert ia3": ("bert", lambda: peft.IA3Config(target_modules=["value", "dense"], feedforward_modules=["dense"])),
    "gpt2 lora": ("gpt2", lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["c_attn", "c_fc", "c_proj"])),
    "gpt2 dora": ("gpt2", lambda: peft.LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["c_attn"])),
    "convolution and embedding": (
        "small",
        lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["embed", "conv", "head"]),
    ),
    "multi-head attention": ("small", lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["mha", "head"])),
}


@pytest.fixture
def build(tiny_model: Any) -> Callable[[str], Any]:
    def make(family: str) -> Any:
        if family != "small":
            return tiny_model(family)
        torch.manual_seed(0)
        return Small().eval()

    return make


def trained(base: Any, config: Any, folder: Path, seed: int = 3) -> Any:
    """A copy of the base with an adapter of noise, as PEFT runs it, and the adapter saved."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                offset = 1.0 if "ia3_l" in name or "norm" in name or "magnitude" in name else 0.0
                spread = 3.0 if "ia3_l" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + offset)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=ids)
    return found if isinstance(found, torch.Tensor) else found[0]


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(50, (rows, 7), generator=torch.Generator().manual_seed(1))


def agree(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    assert (expected - plain).norm() / plain.norm() > 1e-2, "the adapter does nothing, so nothing is tested"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_peft(name, build, tmp_path):
    family, config = CASES[name]
    base = build(family)
    theirs = trained(base, config(), tmp_path / "adapter")
    plain, expected = logits(base, ids()), logits(theirs, ids())
    # PEFT applies the change of an attention's out_proj twice
    with lorahub.attach(base, {"one": tmp_path / "adapter"}, compat="peft" if family == "small" else None) as live:
        agree(logits(base, ids()), expected, plain)
        assert not any(live.coverage().values())
    assert torch.equal(logits(base, ids()), plain)


def test_rows_are_those_of_a_mixed_batch_of_peft(build, tmp_path):
    base = build("llama")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA)
    theirs = trained(base, config, tmp_path / "one", seed=3)
    trained(base, peft.LoraConfig(r=6, target_modules=["q_proj", "down_proj"]), tmp_path / "two", seed=4)
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids(), adapter_names=["two", "__base__", "default"]).logits
    plain = logits(base, ids())
    with lorahub.attach(base, {"one": tmp_path / "one", "two": tmp_path / "two"}) as live:
        live.adapter_names = ["two", None, "one"]
        agree(logits(base, ids()), expected, plain)
        assert torch.equal(logits(base, ids())[1], plain[1])
        with pytest.raises(UsageError, match="named for 3 rows"):
            logits(base, ids(4))


def test_rows_take_their_own_heads_and_biases_as_models_of_their_own(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5
    )
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).eval()
    both = {"one": ["query"], "two": ["query", "value"]}
    theirs = {}
    for seed, (name, targets) in enumerate(both.items()):
        lora = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", bias="lora_only")
        theirs[name] = logits(trained(base, lora, tmp_path / name, seed=seed), ids())
    plain = logits(base, ids())
    with lorahub.attach(base, {name: tmp_path / name for name in both}, active=[]) as live:
        assert torch.equal(logits(base, ids()), plain)
        live.adapter_names = ["two", None, "one"]
        found = logits(base, ids())
        agree(found[0], theirs["two"][0], plain[0])
        agree(found[2], theirs["one"][2], plain[2])
        torch.testing.assert_close(found[1], plain[1], rtol=1e-6, atol=1e-6)


def test_generation_is_that_of_peft(build, tmp_path):
    base = build("llama")
    base.generation_config.pad_token_id = 0
    theirs = trained(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA), tmp_path / "one")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    expected = theirs.generate(input_ids=ids(), **options)
    plain = base.generate(input_ids=ids(), **options)
    assert not torch.equal(plain, expected)
    with lorahub.attach(base, {"one": tmp_path / "one"}) as live:
        assert torch.equal(base.generate(input_ids=ids(), **options), expected)
        live.adapter_names = ["one", None, "one"]
        rows = base.generate(input_ids=ids(), **options)
        assert torch.equal(rows[[0, 2]], expected[[0, 2]])
        assert torch.equal(rows[1], plain[1])


@pytest.mark.plugin("transformers")
def test_a_tied_head_is_changed_alone_where_that_is_allowed(build, tmp_path):
    base = build("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        theirs = trained(base, config, tmp_path / "one")
    plain, expected = logits(base, ids()), logits(theirs, ids())
    with pytest.raises(Degraded, match="tied"):
        lorahub.attach(base, {"one": tmp_path / "one"})
    assert torch.equal(logits(base, ids()), plain)
    with lorahub.attach(base, {"one": tmp_path / "one"}, allow=["tied-parameter"]):
        agree(logits(base, ids()), expected, plain)  # the embedding stays as it is, in PEFT too


def test_a_new_head_has_no_place_in_a_live_model(tiny_model, tmp_path):
    import transformers

    base = tiny_model("bert")
    classifier = transformers.BertForSequenceClassification(base.config)
    trained(classifier, peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "one")
    with pytest.raises(Incompatible):
        lorahub.attach(base, {"one": tmp_path / "one"})
    assert not base._forward_hooks


def test_factors_of_the_adapter_that_was_given_get_their_gradients(build, tmp_path):
    base = build("llama").requires_grad_(False)
    trained(base, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "one")
    one = lorahub.load(tmp_path / "one")
    leaves = [tensor.requires_grad_() for delta in one.deltas.values() for tensor in delta.tensors().values()]
    with lorahub.attach(base, {"one": one}):
        base(input_ids=ids()).logits.square().sum().backward()
    assert leaves
    assert all(leaf.grad.norm() > 0 for leaf in leaves)


def test_what_a_merge_refuses_is_refused(build, tmp_path):
    base = build("llama")
    trained(build("bert"), peft.LoraConfig(r=4, target_modules=["query"]), tmp_path / "one")
    with pytest.raises(lorahub.LorahubError):
        lorahub.attach(base, {"one": tmp_path / "one"})
    assert not base._forward_pre_hooks
    with pytest.raises(UsageError, match="2 weights for 1"):
        lorahub.attach(base, {"one": tmp_path / "one"}, weights=[1, 2])


def test_two_heads_are_attached_together_and_chosen_apart(build, tmp_path):
    base = build("llama")
    theirs = {}
    for seed, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        theirs[name] = logits(trained(base, config, tmp_path / name, seed=seed), ids())
    plain = logits(base, ids())
    adapters = {name: tmp_path / name for name in theirs}
    with pytest.raises(lorahub.LorahubError, match="both replace") as error:
        lorahub.attach(base, adapters)
    assert "active=['one']" in error.value.hint
    with lorahub.attach(base, adapters, active=["one"]) as live:
        agree(logits(base, ids()), theirs["one"], plain)
        with pytest.raises(lorahub.LorahubError, match="both replace"):
            live.set_adapters(["one", "two"])
        live.set_adapters(["two"])
        agree(logits(base, ids()), theirs["two"], plain)


@pytest.mark.parametrize("order", ["attached before", "attached after"])
def test_weights_that_are_offloaded_between_calls(build, tmp_path, order):
    import accelerate

    base = build("llama")
    dora = peft.LoraConfig(r=4, use_dora=True, target_modules=LLAMA)
    theirs = logits(trained(base, dora, tmp_path / "dora"), ids())
    low = logits(trained(base, peft.LoraConfig(r=4, target_modules=LLAMA), tmp_path / "low"), ids())
    plain, model = logits(base, ids()), copy.deepcopy(base)
    adapters = {"dora": tmp_path / "dora", "low": tmp_path / "low"}
    if order == "attached after":
        accelerate.cpu_offload(model, execution_device="cpu")
    with lorahub.attach(model, adapters, active=["dora"]) as live:
        if order == "attached before":
            accelerate.cpu_offload(model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in model.parameters())
        agree(logits(model, ids()), theirs, plain)
        live.set_adapters(["low"])
        agree(logits(model, ids()), low, plain)
        live.set_adapters([])
        assert torch.equal(logits(model, ids()), plain)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_activations_that_are_computed_again_get_the_same_adapters(build, tmp_path):
    base = build("llama").train().requires_grad_(False)
    trained(base, peft.LoraConfig(r=4, target_modules=LLAMA), tmp_path / "one")
    one = lorahub.load(tmp_path / "one")
    leaves = [tensor.requires_grad_() for delta in one.deltas.values() for tensor in delta.tensors().values()]
    with lorahub.attach(base, {"one": one}):
        expected = torch.autograd.grad(base(input_ids=ids()).logits.square().sum(), leaves)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = torch.autograd.grad(base(input_ids=ids(), use_cache=False).logits.square().sum(), leaves)
    assert all(grad.norm() > 0 for grad in expected)
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_stacked_experts_get_their_own_changes(build, tmp_path):
    import transformers

    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(config).eval()
    adapter = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = trained(base, adapter, tmp_path / "one")
    plain, expected = logits(base, ids()), logits(theirs, ids())
    with lorahub.attach(base, {"one": tmp_path / "one"}) as live:
        agree(logits(base, ids()), expected, plain)
        with pytest.raises(UsageError, match=r"mlp\.experts\.down_proj"):
            live.adapter_names = ["one", None, "one"]
