"""llama.cpp's adapters: its names, its order of rows, its rule of scale; written as its converter writes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry, IntegrityError, MissingDependency, UnsupportedFormat, UnsupportedKind
from lorahub.files.emit import save_weights
from lorahub.findings import Verdict
from lorahub.formats.rope import to_halves, to_pairs
from lorahub.plugins import Registry
from lorahub.records import SCHEMA_VERSION, AdapterRecord

HIDDEN, INNER, VOCABULARY, HEADS, KEYS = 16, 24, 11, 4, 2
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "num_hidden_layers": 12,
}
SHAPES = {
    "model.embed_tokens": (VOCABULARY, HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 11)
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items()
    },
}
Q = "model.layers.11.self_attn.q_proj"


def base(config: Mapping[str, Any] = LLAMA, prefix: str = "") -> BaseIndex:
    parameters = {
        f"{prefix}{module}.weight": ParameterInfo(shape=shape, dtype="F32", stored_as=f"{module}.weight")
        for module, shape in SHAPES.items()
    }
    return BaseIndex(ref=BaseRef(repo="acme/base"), framework="test", parameters=parameters, config=config)


def factors(rank: int = 2, scale: float = 1.5, dtype: torch.dtype = torch.float32) -> dict[Target, Delta]:
    generator = torch.Generator().manual_seed(rank)
    return {
        Target("", module, "weight"): LoRA(
            torch.randn(out, rank, generator=generator).to(dtype),
            torch.randn(rank, wide, generator=generator).to(dtype),
            scale,
        )
        for module, (out, wide) in SHAPES.items()
    }


def written(folder: Path, deltas: dict[Target, Delta], registry: Registry, **hints: Any) -> Path:
    given = {"base_config": LLAMA, **hints}
    return save(Adapter(deltas=deltas, hints=given), folder, registry=registry, format="gguf")


def adapter_file(path: Path, tensors: Mapping[str, Any], **said: str) -> Path:
    metadata = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    metadata |= {key.replace("__", "."): value for key, value in said.items()}
    return save_weights(path, {key: torch.as_tensor(value) for key, value in tensors.items()}, metadata)


def pair(name: str, out: int = HIDDEN, wide: int = HIDDEN, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + rank)
    return {
        f"{name}.weight.lora_a": torch.randn(rank, wide, generator=generator),
        f"{name}.weight.lora_b": torch.randn(out, rank, generator=generator),
    }


def one(path: Path, registry: Registry, index: BaseIndex | None = None) -> LoRA:
    (delta,) = load(open_header(path, registry, index=index), registry).deltas.values()
    assert isinstance(delta, LoRA)
    return delta


# ---- reading


def test_the_scale_is_alpha_over_each_tensors_own_rank(registry: Registry, tmp_path: Path) -> None:
    tensors = {**pair("blk.0.attn_v", rank=2), **pair("blk.0.ffn_up", rank=4)}
    header = open_header(adapter_file(tmp_path / "a.gguf", tensors, adapter__lora__alpha="6.0"), registry)
    scales = {group.module: group.options["scale"] for group in header.reading.groups}
    assert scales == {"blk.0.attn_v": 3.0, "blk.0.ffn_up": 1.5}
    assert {group.options["scale_rule"] for group in header.reading.groups} == {"alpha/r"}


@pytest.mark.parametrize("said", [{}, {"adapter__lora__alpha": "0.0"}])
def test_an_alpha_of_0_is_a_scale_of_1(registry: Registry, tmp_path: Path, said: dict[str, str]) -> None:
    delta = one(adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"), **said), registry)
    assert delta.scale == 1.0


def test_a_delta_is_scale_times_b_times_a(registry: Registry, tmp_path: Path) -> None:
    tensors = pair("blk.3.ffn_down", out=5, wide=7)
    delta = one(adapter_file(tmp_path / "a.gguf", tensors, adapter__lora__alpha="3.0"), registry)
    a, b = (tensors[f"blk.3.ffn_down.weight.lora_{which}"].double() for which in "ab")
    expected = [[sum(1.5 * float(b[o, r] * a[r, i]) for r in range(2)) for i in range(7)] for o in range(5)]
    torch.testing.assert_close(delta.delta(torch.zeros(5, 7).double()), torch.tensor(expected, dtype=torch.float64))
    assert delta.delta(torch.zeros(5, 7)).norm() > 1e-2


def test_factors_of_token_embeddings_are_the_other_way_round(registry: Registry, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "token_embd.weight.lora_a": torch.randn(VOCABULARY, 2, generator=generator),
        "token_embd.weight.lora_b": torch.randn(HIDDEN, 2, generator=generator),
    }
    delta = one(adapter_file(tmp_path / "a.gguf", tensors), registry)
    assert delta.shape() == (VOCABULARY, HIDDEN)
    a, b = tensors.values()
    torch.testing.assert_close(delta.delta(torch.zeros(VOCABULARY, HIDDEN)), a @ b.T)


def test_without_a_base_names_and_rows_stay_and_it_is_said(registry: Registry, tmp_path: Path) -> None:
    tensors = pair("blk.0.attn_q")
    header = open_header(adapter_file(tmp_path / "a.gguf", tensors), registry)
    assert [(each.code, each.level) for each in header.findings] == [("names-of-llama-cpp", Verdict.EXACT)]
    (delta,) = load(header, registry).deltas.values()
    assert isinstance(delta, LoRA)
    assert torch.equal(delta.up, tensors["blk.0.attn_q.weight.lora_b"])


@pytest.mark.parametrize(("module", "heads"), [("q_proj", HEADS), ("k_proj", KEYS)])
def test_with_a_base_rows_of_queries_and_keys_are_put_into_its_order(
    registry: Registry, tmp_path: Path, module: str, heads: int
) -> None:
    out = HIDDEN if module == "q_proj" else HIDDEN // 2
    tensors = pair(f"blk.11.attn_{module[0]}", out=out)
    delta = one(adapter_file(tmp_path / "a.gguf", tensors), registry, base())
    stored, width = tensors[f"blk.11.attn_{module[0]}.weight.lora_b"], out // heads
    for head in range(heads):
        for at in range(width // 2):  # a pair is two neighbours in the file, half a head apart in the base
            for part in (0, 1):
                wanted = stored[head * width + 2 * at + part]
                assert torch.equal(delta.up[head * width + part * width // 2 + at], wanted)
    assert not torch.equal(delta.up, stored)


def stacks(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        f"{name}.weight.lora_a": torch.randn(3, 2, HIDDEN, generator=generator),
        f"{name}.weight.lora_b": torch.randn(3, 5, 2, generator=generator),
    }


def mixture(*names: str) -> BaseIndex:
    parameters = {name: ParameterInfo(shape=(5, HIDDEN), dtype="F32", stored_as=name) for name in names}
    config = {**LLAMA, "model_type": "qwen3_moe"}
    return BaseIndex(ref=BaseRef(), framework="test", parameters=parameters, config=config)


def test_a_stack_of_experts_is_a_product_for_each(registry: Registry, tmp_path: Path) -> None:
    tensors = stacks("blk.0.ffn_gate_exps")
    said = {"general__architecture": "qwen3moe", "adapter__lora__alpha": "4.0"}
    path = adapter_file(tmp_path / "a.gguf", tensors, **said)
    (delta,) = load(open_header(path, registry), registry).deltas.values()
    a, b = tensors.values()
    torch.testing.assert_close(
        delta.delta(torch.zeros(3, 5, HIDDEN)), torch.stack([2 * b[at] @ a[at] for at in range(3)])
    )
    index = mixture(*(f"model.layers.0.mlp.experts.{at}.gate_proj.weight" for at in range(3)))
    deltas = load(open_header(path, registry, index=index), registry).deltas
    assert {target.module for target in deltas} == {f"model.layers.0.mlp.experts.{at}.gate_proj" for at in range(3)}
    for target, each in deltas.items():
        at = int(target.module.split(".")[5])
        torch.testing.assert_close(each.delta(torch.zeros(5, HIDDEN)), 2 * b[at] @ a[at])


def test_a_stack_of_experts_lands_in_a_parameter_that_holds_them_all(registry: Registry, tmp_path: Path) -> None:
    tensors = stacks("blk.0.ffn_down_exps")
    path = adapter_file(tmp_path / "a.gguf", tensors, general__architecture="qwen3moe")
    header = open_header(path, registry, index=mixture("model.layers.0.mlp.experts.down_proj"))
    assert [target.name for target in header.touches] == ["model.layers.0.mlp.experts.down_proj"]
    assert header.kinds == ("expert-lora",)


@pytest.mark.parametrize(("rows", "heads"), [(16, 4), (8, 2), (96, 3), (256, 1)])
def test_rows_are_put_back_as_transformers_puts_those_of_a_whole_weight(rows: int, heads: int) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    stored = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    theirs = LlamaTensorProcessor(config={})._reverse_permute_weights(stored, 32, heads)
    halves, pairs = to_halves(rows, heads), to_pairs(rows, heads)
    assert halves is not None
    assert pairs is not None
    np.testing.assert_array_equal(stored[list(halves)], theirs)
    np.testing.assert_array_equal(theirs[list(pairs)], stored)


def test_an_architecture_whose_rows_do_not_move_is_left_as_it_is(registry: Registry, tmp_path: Path) -> None:
    tensors = pair("blk.0.attn_q")
    path = adapter_file(tmp_path / "a.gguf", tensors, general__architecture="qwen2")
    delta = one(path, registry, base({**LLAMA, "model_type": "qwen2"}))
    assert torch.equal(delta.up, tensors["blk.0.attn_q.weight.lora_b"])


def test_a_language_model_inside_a_larger_one_is_found(registry: Registry, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v", out=8))
    header = open_header(path, registry, index=base({"text_config": LLAMA}, prefix="language_model."))
    assert [target.name for target in header.touches] == ["language_model.model.layers.0.self_attn.v_proj.weight"]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", {"model_type": "llama"}), ("llama", {**LLAMA, "num_attention_heads": 5}), ("falcon", {})],
)
def test_an_order_of_rows_that_nobody_knows_is_refused(
    registry: Registry, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    path = adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_q"), general__architecture=architecture)
    header = open_header(path, registry, index=base(config))
    (finding,) = header.findings
    assert (finding.code, finding.level) == ("row-order-unknown", Verdict.INCOMPATIBLE)


def test_a_base_of_another_architecture_is_incompatible(registry: Registry, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"), general__architecture="qwen2")
    header = open_header(path, registry, index=base())
    assert [(each.code, each.level) for each in header.findings] == [("base-architecture", Verdict.INCOMPATIBLE)]


def test_a_quantised_factor_is_read_as_float32_and_it_is_said(registry: Registry, tmp_path: Path) -> None:
    raw = quantize(np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", np.ones((4, 2), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = open_header(tmp_path / "a.gguf", registry)
    assert {each.code: each.level for each in header.findings}["tensor-quantised"] is Verdict.EXACT
    assert header.reading.groups[0].slots["down"].dtype == "F32"
    delta = one(tmp_path / "a.gguf", registry)
    assert (delta.down.dtype, delta.up.dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("tensors", "said", "code", "level"),
    [
        ({"blk.0.attn_v.weight": torch.ones(4, 4)}, {}, "key-unknown", Verdict.DEGRADED),
        ({"blk.0.attn_norm.weight": torch.ones(4)}, {}, "norm-left-out", Verdict.UNVERIFIED),
        ({"blk.0.ffn_up.weight.lora_a": torch.ones(2, 4)}, {}, "slot-missing", Verdict.INCOMPATIBLE),
        ({"blk.0.ffn_up_exps.weight.lora_a": torch.ones(3, 2, 4)}, {}, "slot-missing", Verdict.INCOMPATIBLE),
        (
            {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 4), "blk.0.ffn_up.weight.lora_b": torch.ones(4, 3)},
            {},
            "slot-misfit",
            Verdict.INCOMPATIBLE,
        ),
    ],
)
def test_what_does_not_add_up_is_a_finding(
    registry: Registry, tmp_path: Path, tensors: dict[str, Any], said: dict[str, str], code: str, level: Verdict
) -> None:
    header = open_header(adapter_file(tmp_path / "a.gguf", {**tensors, **pair("blk.0.attn_k")}, **said), registry)
    found = {each.code: each for each in header.findings}
    assert found[code].level is level
    assert set(tensors) == set(found[code].where)


def test_an_adapter_that_acts_after_an_invocation_only_is_refused(registry: Registry, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_array("adapter.alora.invocation_tokens", [5, 6])
    for name, value in pair("blk.0.attn_v").items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {each.code: each.level for each in open_header(tmp_path / "a.gguf", registry).findings}
    assert found["config-refused"] is Verdict.INCOMPATIBLE


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"general.type": "model"}, UnsupportedFormat, "GGUF model of architecture llama"),
        ({"general.architecture": "controlvector"}, UnsupportedKind, "control vector"),
        ({"general.type": "adapter", "adapter.type": "new"}, UnsupportedKind, "'new'"),
    ],
)
def test_what_is_no_lora_adapter_is_refused_by_name(
    registry: Registry, tmp_path: Path, said: dict[str, str], error: type[Exception], words: str
) -> None:
    save_weights(tmp_path / "a.gguf", {"w": torch.ones(2, 2)}, {"general.architecture": "llama", **said})
    with pytest.raises(error, match=words):
        open_header(tmp_path / "a.gguf", registry)


def test_an_alpha_that_is_no_number_is_an_integrity_error(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="alpha"):
        open_header(adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"), lorahub__lora__alpha="7.0"), registry)


@pytest.mark.parametrize("alpha", ["much", "nan", "1e999", "true", "9" * 5000, "[" * 100_000, "0x10"])
def test_an_alpha_that_is_text_is_a_number_or_an_integrity_error(
    registry: Registry, tmp_path: Path, alpha: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.lora.alpha", alpha)
    for name, value in pair("blk.0.attn_v").items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(IntegrityError, match="not a number") as caught:
        open_header(tmp_path / "a.gguf", registry)
    assert len(caught.value.message) < 300


def test_the_base_that_a_converted_file_names_is_claimed(registry: Registry, tmp_path: Path) -> None:
    said = {"general__base_model__0__repo_url": "https://huggingface.co/acme/base"}
    assert open_header(adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"), **said), registry).reading.base_repo == (
        "acme/base"
    )
    other = {"general__base_model__0__repo_url": "https://elsewhere.example/acme/base"}
    assert not open_header(adapter_file(tmp_path / "b.gguf", pair("blk.0.attn_v"), **other), registry).reading.base_repo


# ---- writing


def as_the_converter_writes(deltas: Mapping[Target, Delta]) -> dict[str, torch.Tensor]:
    """What convert_lora_to_gguf.py makes of factors for a Llama: names by the package, rows and sizes by its source."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    expected = {}
    for target, delta in deltas.items():
        assert isinstance(delta, LoRA)
        name, a, b = table.get_name(target.module), delta.down, delta.up
        if target.module == "model.embed_tokens":  # PEFT's lora_embedding_A is our up factor, turned
            a, b = delta.up.T, delta.down.T
            a = a.T
        heads = {"q_proj": HEADS, "k_proj": KEYS}.get(target.module.rpartition(".")[2])
        if heads:
            b = b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        expected[f"{name}.weight.lora_a"] = a
        expected[f"{name}.weight.lora_b"] = b
    return expected


def test_a_written_file_is_the_converters_key_by_key(registry: Registry, tmp_path: Path) -> None:
    deltas = factors()
    folder = written(tmp_path / "out", deltas, registry, base_repo="acme/base")
    theirs = gguf.GGUFReader(folder / "adapter.gguf")
    expected = as_the_converter_writes(deltas)
    assert {each.name for each in theirs.tensors} == expected.keys()
    for each in theirs.tensors:
        np.testing.assert_array_equal(each.data, expected[each.name].numpy())
    values = {key: field.contents() for key, field in theirs.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 3.0
    assert values["general.base_model.0.repo_url"] == "https://huggingface.co/acme/base"
    assert "lorahub.lora.alpha" not in values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_written_and_read_again_with_the_base_it_is_the_same(
    registry: Registry, tmp_path: Path, dtype: torch.dtype
) -> None:
    deltas = factors(dtype=dtype)
    folder = written(tmp_path / "out", deltas, registry)
    again = load(open_header(folder, registry, index=base()), registry).deltas
    assert again.keys() == deltas.keys()
    for target, delta in deltas.items():
        found = again[target]
        assert isinstance(found, LoRA)
        assert isinstance(delta, LoRA)
        assert torch.equal(found.up, delta.up)
        assert torch.equal(found.down, delta.down)
        assert (found.up.dtype, found.scale) == (dtype, delta.scale)


def test_read_without_a_base_it_is_written_back_tensor_by_tensor(registry: Registry, tmp_path: Path) -> None:
    first = written(tmp_path / "one", factors(), registry) / "adapter.gguf"
    adapter = load(open_header(first, registry), registry)
    second = save(adapter, tmp_path / "two", registry=registry, format="gguf") / "adapter.gguf"
    one, two = ({each.name: each for each in gguf.GGUFReader(path).tensors} for path in (first, second))
    assert one.keys() == two.keys()
    assert all(each.data.tobytes() == two[name].data.tobytes() for name, each in one.items())


def test_an_alpha_of_rslora_is_rounded_for_llama_cpp_and_kept_beside_it(registry: Registry, tmp_path: Path) -> None:
    scale = 16 / 2**0.5
    folder = written(tmp_path / "out", factors(scale=scale), registry)
    values = {key: field.contents() for key, field in gguf.GGUFReader(folder / "adapter.gguf").fields.items()}
    assert values["adapter.lora.alpha"] == float(np.float32(2 * scale))
    assert values["lorahub.lora.alpha"] / 2 == scale
    assert abs(values["adapter.lora.alpha"] / 2 - scale) <= 2**-24 * scale
    again = load(open_header(folder, registry, index=base()), registry).deltas
    assert {getattr(delta, "scale", None) for delta in again.values()} == {scale}


def test_several_ranks_of_one_alpha_are_one_file(registry: Registry, tmp_path: Path) -> None:
    deltas = {**factors(2, 4.0), Target("", Q, "weight"): factors(4, 2.0)[Target("", Q, "weight")]}
    written(tmp_path / "out", deltas, registry)
    header = open_header(tmp_path / "out", registry, index=base())
    assert {group.options["scale"] for group in header.reading.groups} == {4.0, 2.0}


def test_a_record_beside_a_written_file_holds_its_digests(registry: Registry, tmp_path: Path) -> None:
    record = AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("lora",))
    adapter = Adapter(deltas=factors(), record=record, hints={"base_config": LLAMA})
    folder = save(adapter, tmp_path / "out", registry=registry, format="gguf")
    header = open_header(folder, registry, index=base())
    assert header.record is not None
    assert set(header.record.files or ()) == {"adapter.gguf"}
    assert not header.record.stale(folder)
    assert [each.level for each in header.findings if each.level > Verdict.EXACT] == []


V = Target("", "model.layers.0.self_attn.v_proj", "weight")
LORA = LoRA(torch.ones(8, 2), torch.ones(2, 16), 1.0)
REFUSED: dict[str, tuple[dict[Target, Delta], dict[str, Any]]] = {
    "none is known here": ({V: LORA}, {"base_config": {}}),
    "none that lorahub knows": ({V: LORA}, {"base_config": {}, "gguf_architecture": "falcon"}),
    "one alpha": ({V: LORA, Target("", Q, "weight"): LoRA(torch.ones(16, 2), torch.ones(2, 16), 2.0)}, {}),
    "follows from no alpha": ({V: LoRA(torch.ones(8, 2), torch.ones(2, 16), 0.0)}, {}),
    "too large": ({V: LoRA(torch.ones(8, 2), torch.ones(2, 16), 1e300)}, {}),
    "is dora": ({V: DoRA(torch.ones(8, 2), torch.ones(2, 16), 1.0, torch.ones(8), 0)}, {}),
    "is full": ({V: Full(torch.ones(8, 16))}, {}),
    "change matrices": ({V: LoRA(torch.ones(8, 2, 1, 1), torch.ones(2, 16, 3, 3), 1.0)}, {}),
    "no name for": ({Target("", "model.vision.proj", "weight"): LORA}, {}),
    "LoRA on weights": ({Target("unet", "model.layers.0.self_attn.v_proj", "weight"): LORA}, {}),
    "how many heads": (
        {Target("", Q, "weight"): LoRA(torch.ones(15, 2), torch.ones(2, 16), 1.0)},
        {},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_gguf_has_no_word_for_is_refused_and_nothing_is_written(
    registry: Registry, tmp_path: Path, reason: str
) -> None:
    deltas, hints = REFUSED[reason]
    with pytest.raises(CannotCarry, match=reason):
        written(tmp_path / "out", deltas, registry, **hints)
    assert list(tmp_path.iterdir()) == []


# ---- what need not be installed

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "gguf", "safetensors", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import lorahub
found = lorahub.inspect(sys.argv[1])
print(found.format, found.rows[0].kind, found.rows[0].rank, found.rows[0].scale)
"""


def test_a_file_is_inspected_without_torch_and_the_gguf_package(tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"), adapter__lora__alpha="8.0")
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("gguf lora 2 4.0\n", "")


def test_names_of_a_base_need_the_package_and_the_extra_is_named(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter_file(tmp_path / "a.gguf", pair("blk.0.attn_v"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_header(path, registry).format == "gguf"
    with pytest.raises(MissingDependency) as caught:
        open_header(path, registry, index=base())
    assert caught.value.hint == "pip install 'lorahub-core[gguf]'"
