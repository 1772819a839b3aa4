"""Projections inside fused parameters: every entry of the table against the rows that the real classes take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

import lorahub
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.deltas.lora import LoRA
from lorahub.errors import LorahubError
from lorahub_transformers import Transformers
from lorahub_transformers.fused import entries_of, parts_of

_USUAL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20, "n_ctx": 20}
_FALCON = {**_USUAL, "ffn_hidden_size": 24, "alibi": False}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "decision transformer": ("decision_transformer", {**_GPT, "hidden_size": 32, "state_dim": 4, "act_dim": 2}),
    "imagegpt": ("imagegpt", _GPT),
    "openai gpt": ("openai-gpt", _GPT),
    "bigcode, one pair of keys and values": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "bigcode, all heads": ("gpt_bigcode", {**_GPT, "multi_query": False}),
    "gpt-neox": ("gpt_neox", _USUAL),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "falcon, all heads": ("falcon", {**_FALCON, "multi_query": False, "new_decoder_architecture": False}),
    "falcon 7b": ("falcon", {**_FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon 40b": (
        "falcon",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "persimmon": ("persimmon", {**_USUAL, "qk_layernorm": False}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_seq_len": 20}),
    "modernbert": ("modernbert", {**_USUAL, "cls_token_id": 1, "sep_token_id": 2}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 4}),
    "phi3": ("phi3", {**_USUAL, "num_key_value_heads": 2}),
    "gpt-neox in Japanese": ("gpt_neox_japanese", {**_USUAL, "intermediate_multiple_size": 1}),
    "deberta": ("deberta", _USUAL),
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 50,
            "max_seq_len": 20,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1000.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32},
        },
    ),
}
"""What it is -> (``model_type``, settings); halves are held in a test of their own, more in test_fused_classes.py."""

HALVES = {"phi3": {**_USUAL, "num_key_value_heads": 2}, "glm": _USUAL, "glm4": _USUAL}


def build(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModel.from_config(config, attn_implementation="eager").float().eval()


class _Seen(TorchFunctionMode):
    """Keeps what goes into products of queries and keys, and of probabilities and values."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"matmul", "bmm", "baddbmm", "__matmul__", "scaled_dot_product_attention"}:
            given = [*args, *(kwargs or {}).values()]
            self.kept += [each.detach().clone() for each in given if isinstance(each, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def taken(model: Any, module: str, inputs: dict[str, Any], rows: int) -> list[torch.Tensor]:
    """The tensors that products take when the fused module gives the number of each row, at one position."""

    def numbers(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.arange(1, rows + 1, dtype=output.dtype).expand(output.shape).clone()

    seen = _Seen()
    handle = model.get_submodule(module).register_forward_hook(numbers)
    try:
        with torch.no_grad(), seen:
            model(**inputs)
    finally:
        handle.remove()
    return seen.kept


def inputs_of(kind: str) -> dict[str, Any]:
    if kind == "decision_transformer":
        numbers = {"states": torch.ones(1, 1, 4), "actions": torch.ones(1, 1, 2), "rewards": torch.ones(1, 1, 1)}
        steps = torch.zeros(1, 1, dtype=torch.long)
        return {**numbers, "returns_to_go": torch.ones(1, 1, 1), "timesteps": steps}
    return {"input_ids": torch.ones(1, 1, dtype=torch.long)}


@pytest.mark.parametrize("what", MODELS)
def test_each_projection_has_the_rows_that_the_class_takes_for_it(what: str) -> None:
    kind, settings = MODELS[what]
    model = build(kind, settings)
    framework = Transformers()
    index = framework.index_model(model, BaseRef())
    inside = [(fused, part) for fused, part in parts_of(index) if part.rpartition(".")[2] in "q_proj k_proj v_proj"]
    fused = inside[0][0]
    parts = {path.rpartition(".")[2]: Target("", path, "weight") for each, path in inside if each == fused}
    layouts = framework.layouts(index, list(parts.values()))
    stored = index.parameters[f"{fused}.weight"]
    total = stored.shape[1 if stored.transposed else 0]
    live = next(name for name, _ in model.named_modules() if fused.endswith(name) and name.count(".") >= 2)
    kept = taken(model, live, inputs_of(kind), total)
    first = [cut for each in kept for cut in ([each[..., :1, :], each[..., :1]] if each.dim() > 2 else [])]
    found = [tensor.flatten().tolist() for tensor in (*kept, *first)]
    covered: list[int] = []
    for name, target in parts.items():
        (piece,) = layouts[target].pieces
        rows = piece.of_parameter.rows
        wanted = list(range(total))[rows] if isinstance(rows, slice) else list(rows)
        covered += wanted
        numbers = [row + 1 for row in wanted]
        assert any(_same(each, numbers, name) for each in found), f"{name} of {fused}: no product takes these rows"
    assert sorted(covered) == list(range(total))


def _same(given: list[float], rows: list[int], name: str) -> bool:
    """Whether a product takes these rows in this order: queries and keys scaled, each as often as heads share it."""
    if len(given) < len(rows) or not given[0] or len(given) % len(rows):
        return False
    scale = 1.0 if name == "v_proj" else given[0] / rows[0]
    plain = [each / scale for each in given]
    if _near(plain, rows):
        return True
    repeat, size = len(given) // len(rows), 8  # heads of eight rows, repeated for those that share them
    heads = [rows[start : start + size] for start in range(0, len(rows), size)]
    return _near(plain, [row for head in heads for _ in range(repeat) for row in head])


def _near(given: list[float], rows: list[int]) -> bool:
    return len(given) == len(rows) and all(abs(a - b) < 1e-3 for a, b in zip(given, rows, strict=True))


@pytest.mark.parametrize("kind", HALVES)
def test_gates_are_the_rows_that_go_through_the_activation(kind: str) -> None:
    model = build(kind, HALVES[kind])
    framework = Transformers()
    index = framework.index_model(model, BaseRef())
    fused, gate = next(each for each in parts_of(index) if each[1].endswith("gate_proj"))
    target = Target("", gate, "weight")
    rows = framework.layouts(index, [target])[target].pieces[0].of_parameter.rows
    mlp = model.get_submodule(fused.rpartition(".")[0])
    seen: list[torch.Tensor] = []
    inner = mlp.activation_fn

    class Keep(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return inner(x)

    mlp.activation_fn = Keep()
    x = torch.randn(1, 1, 32)
    mlp(x)
    torch.testing.assert_close(seen[0], (x @ mlp.gate_up_proj.weight.T)[..., rows], atol=1e-5, rtol=1e-5)


def test_a_configuration_that_does_not_say_declares_nothing() -> None:
    model = build("falcon", MODELS["falcon 40b"][1])
    framework = Transformers()
    index = framework.index_model(model, BaseRef())
    assert list(parts_of(index))
    unsaid = {key: value for key, value in index.config.items() if key != "new_decoder_architecture"}
    object.__setattr__(index, "config", unsaid)
    assert not list(parts_of(index))
    assert not entries_of("whisper")


def adapter_on(module: str, folder: Path, width: int, rows: int) -> Path:
    """A LoRA adapter as PEFT writes it, on one module."""
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    stem = f"base_model.model.{module}"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(2, width, generator=generator) * 0.3,
        f"{stem}.lora_B.weight": torch.randn(rows, 2, generator=generator) * 0.3,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    leaf = module.rpartition(".")[2]
    settings = f'{{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["{leaf}"]}}'
    (folder / "adapter_config.json").write_text(settings)
    return folder


@pytest.mark.parametrize("what", ["gpt2", "gpt-neox", "falcon 40b", "phi3"])
def test_an_adapter_of_queries_alone_changes_their_rows_and_no_others(what: str, tmp_path: Path) -> None:
    kind, settings = MODELS[what]
    model = build(kind, settings)
    framework = Transformers()
    index = framework.index_model(model, BaseRef())
    fused, query = next(each for each in parts_of(index) if each[1].endswith("q_proj"))
    target = Target("", query, "weight")
    region = framework.layouts(index, [target])[target].pieces[0].of_parameter
    live = framework.parameters(model, index)[f"{fused}.weight"]
    before = live.detach().clone()
    rows, width = region.shape(tuple(live.shape))
    folder = adapter_on(query, tmp_path / "adapter", width, rows)
    lora = lorahub.load(folder).deltas[target]
    assert isinstance(lora, LoRA)
    expected = before.double().clone()
    change = (lora.up.double() @ lora.down.double()) * 2.0
    region.put(expected, region.of(expected) + change)
    merged = lorahub.merge(model, {"adapter": folder})
    torch.testing.assert_close(live.detach().double(), expected, atol=1e-6, rtol=1e-6)
    assert (live.detach() - before).norm() / before.norm() > 1e-2
    merged.undo()
    words = torch.arange(1, 7)[None]  # several, or the queries make no difference
    plain = model(words)[0].detach()
    with lorahub.attach(model, {"adapter": folder}):
        attached = model(words)[0].detach()
    lorahub.merge(model, {"adapter": folder})
    torch.testing.assert_close(attached, model(words)[0].detach(), atol=1e-5, rtol=1e-5)
    assert (attached - plain).norm() / plain.norm() > 1e-4


@pytest.mark.parametrize("name", ["Qwen2VLForConditionalGeneration", "Qwen2VLModel"])
def test_queries_are_found_under_every_name_that_their_module_has(name: str, tmp_path: Path) -> None:
    config = transformers.Qwen2VLConfig(
        text_config={**_USUAL, "num_key_value_heads": 2},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 1},
    )
    model = getattr(transformers, name)(config)
    (fused,) = (path for path, _ in model.named_modules() if path.endswith("blocks.1.attn.qkv"))
    for number, spelled in enumerate(("visual", "model.visual")):  # as releases before the fifth had it, and today's
        folder = adapter_on(f"{spelled}.blocks.1.attn.q_proj", tmp_path / str(number), 32, 32)
        planned = lorahub.plan(model, {"adapter": folder})
        assert [step.source for step in planned.steps] == [f"{fused}.weight"]


def test_an_architecture_without_a_declared_layout_refuses_queries_inside_a_fused_weight(
    tmp_path: Path, tiny: Callable[..., Any]
) -> None:
    config = transformers.JetMoeConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        num_attention_heads=4,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=2,
        vocab_size=50,
    )
    model = transformers.JetMoeModel(config).eval()
    assert "layers.0.self_attention.kv_proj" in dict(model.named_modules())
    folder = adapter_on("layers.0.self_attention.k_proj", tmp_path / "adapter", 32, 16)
    with pytest.raises(LorahubError, match="k_proj"):
        lorahub.merge(model, {"adapter": folder})
    fused = adapter_on("layers.0.self_attn.qkv_proj", tmp_path / "fused", 16, 32)
    with pytest.raises(LorahubError, match="qkv_proj"):
        lorahub.merge(tiny("llama", "LlamaForCausalLM"), {"adapter": fused})


_PICTURE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_HEADS = [head * 24 + row for head in range(4) for row in range(8)]
"""The queries of four heads, where each has eight rows of queries, eight of keys and eight of values."""

QUERIES: dict[str, tuple[Callable[[], Any], str, str, list[int]]] = {
    "blip": (
        lambda: transformers.BlipVisionModel(transformers.BlipVisionConfig(**_PICTURE)),
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.0.self_attn.qkv.weight",
        list(range(32)),
    ),
    "the tower of qwen2-vl": (
        lambda: (
            transformers.AutoModel.from_config(
                transformers.Qwen2VLConfig(
                    text_config={**_USUAL, "num_key_value_heads": 2},
                    vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 1},
                )
            ).visual
        ),
        "blocks.1.attn.q_proj",
        "blocks.1.attn.qkv.weight",
        list(range(32)),
    ),
    "siglip, whose pooling is torch's attention": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_PICTURE)),
        "head.attention.q_proj",
        "head.attention.in_proj_weight",
        list(range(32)),
    ),
    "deberta": (
        lambda: transformers.DebertaModel(transformers.DebertaConfig(**_USUAL)),
        "encoder.layer.0.attention.self.q_proj",
        "encoder.layer.0.attention.self.in_proj.weight",
        _HEADS,
    ),
    "dbrx": (
        lambda: build(*MODELS["dbrx"]),
        "blocks.0.norm_attn_norm.attn.q_proj",
        "blocks.0.norm_attn_norm.attn.Wqkv.weight",
        list(range(32)),
    ),
}
"""What it is -> (the model, its queries, the parameter that has them, its rows that are the queries)."""


def seen_by(model: Any) -> dict[str, torch.Tensor]:
    """What such a model is called with."""
    if hasattr(model, "patch_embed"):
        return {"hidden_states": torch.randn(16, 1176), "grid_thw": torch.tensor([[1, 4, 4]])}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.arange(1, 7)[None]}


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model puts out, of pictures also what it pools."""
    given = model(**inputs)
    pooled = given.get("pooler_output")
    return torch.cat([each.flatten() for each in (given[0], pooled) if each is not None])


@pytest.mark.parametrize("what", QUERIES)
def test_queries_alone_give_the_model_whose_rows_a_loop_has_changed(what: str, tmp_path: Path) -> None:
    make, module, name, rows = QUERIES[what]
    torch.manual_seed(0)
    model = make().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some classes begin with weights of nearly nothing
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    changed = copy.deepcopy(model)
    inputs = seen_by(model)
    folder = adapter_on(module, tmp_path / "adapter", 32, 32)
    lora = lorahub.load(folder).deltas[Target("", module, "weight")]
    assert isinstance(lora, LoRA)
    down, up = lora.down.double().tolist(), lora.up.double().tolist()
    weight = changed.get_parameter(name)
    before = weight.detach().clone()
    sums = before.double().tolist()
    for number, row in enumerate(rows):
        for column in range(32):
            sums[row][column] += 2.0 * sum(up[number][rank] * down[rank][column] for rank in range(2))
    with torch.no_grad():
        weight.copy_(torch.tensor(sums))
        assert (weight - before).norm() / before.norm() > 1e-2
        plain, wanted = outputs_of(model, inputs), outputs_of(changed, inputs)
        with lorahub.attach(model, {"adapter": folder}):
            attached = outputs_of(model, inputs)
        lorahub.merge(model, {"adapter": folder})
        merged = outputs_of(model, inputs)
    torch.testing.assert_close(model.get_parameter(name), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attached, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).norm() / plain.norm() > 1e-2
