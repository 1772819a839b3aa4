"""torchtune's adapters: Meta's names, rows in pairs, and magnitudes that move with their factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.header import read_header
from lorahub.files.tensors import FileSource
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.torchtune import TorchtuneFormat, torchtune_name
from lorahub.plugins import Registry

HIDDEN, HEADS, KEYS = 16, 4, 2
LLAMA: dict[str, Any] = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KEYS}
NAMES = {
    "model.layers.0.self_attn.q_proj": "layers.0.attn.q_proj",
    "model.layers.0.self_attn.k_proj": "layers.0.attn.k_proj",
    "model.layers.0.self_attn.v_proj": "layers.0.attn.v_proj",
    "model.layers.10.self_attn.o_proj": "layers.10.attn.output_proj",
    "model.layers.10.mlp.gate_proj": "layers.10.mlp.w1",
    "model.layers.10.mlp.down_proj": "layers.10.mlp.w2",
    "model.layers.10.mlp.up_proj": "layers.10.mlp.w3",
    "lm_head": "output",
}
"""Hugging Face's -> torchtune's, as in torchtune's convert_weights."""

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}


def out(module: str) -> int:
    return HIDDEN // 2 if module.endswith(("k_proj", "v_proj")) else HIDDEN


def base(config: Mapping[str, Any] = LLAMA) -> BaseIndex:
    parameters = {
        f"{module}.weight": ParameterInfo(shape=(out(module), HIDDEN), dtype="F32", stored_as=f"{module}.weight")
        for module in NAMES
    }
    return BaseIndex(ref=BaseRef(repo="acme/base"), framework="test", parameters=parameters, config=config)


def factors(*, magnitude: bool = False) -> dict[Target, Delta]:
    generator = torch.Generator().manual_seed(1)
    deltas: dict[Target, Delta] = {}
    for module in NAMES:
        up, down = torch.randn(out(module), 2, generator=generator), torch.randn(2, HIDDEN, generator=generator)
        lengths = torch.rand(out(module), generator=generator) + 0.5
        deltas[Target("", module, "weight")] = DoRA(up, down, 3.0, lengths, 0) if magnitude else LoRA(up, down, 3.0)
    return deltas


def file(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(name: str = "layers.0.attn.q_proj", rows: int = HIDDEN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        f"{name}.lora_a.weight": torch.randn(2, HIDDEN, generator=generator),
        f"{name}.lora_b.weight": torch.randn(rows, 2, generator=generator),
    }


def hf_order(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """torchtune's own export of an up factor (``tune_to_peft_adapter_weights``), for any number of columns."""
    width = stored.shape[0] // heads
    return stored.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(stored.shape)


def test_it_is_told_from_peft_although_its_config_names_a_peft_type(registry: Registry, tmp_path: Path) -> None:
    header = open_header(file(tmp_path / "a", pair()), registry)
    assert (header.format, header.kinds, header.ranks) == ("torchtune", ("lora",), (2,))
    assert [(each.code, each.level) for each in header.findings] == [("names-of-torchtune", Verdict.EXACT)]


def test_the_scale_is_alpha_over_rank(registry: Registry, tmp_path: Path) -> None:
    tensors = {key: value.double() for key, value in pair("layers.0.mlp.w2", rows=3).items()}
    (delta,) = load(open_header(file(tmp_path / "a", tensors), registry), registry).deltas.values()
    a, b = tensors.values()
    expected = [[sum(3 * float(b[o, r] * a[r, i]) for r in range(2)) for i in range(HIDDEN)] for o in range(3)]
    found = delta.delta(torch.zeros(3, HIDDEN).double())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found.norm() > 1e-2


@pytest.mark.parametrize(("module", "heads"), [("q_proj", HEADS), ("k_proj", KEYS)])
def test_with_a_base_queries_and_keys_are_as_torchtunes_own_export_has_them(
    registry: Registry, tmp_path: Path, module: str, heads: int
) -> None:
    rows = HIDDEN if module == "q_proj" else HIDDEN // 2
    tensors = pair(f"layers.0.attn.{module}", rows)
    adapter = load(open_header(file(tmp_path / "a", tensors), registry, index=base()), registry)
    ((target, delta),) = adapter.deltas.items()
    assert target.name == f"model.layers.0.self_attn.{module}.weight"
    assert isinstance(delta, LoRA)
    stored = tensors[f"layers.0.attn.{module}.lora_b.weight"]
    assert torch.equal(delta.up, hf_order(stored, heads))
    assert not torch.equal(delta.up, stored)


def test_magnitudes_move_with_the_rows_they_belong_to(registry: Registry, tmp_path: Path) -> None:
    lengths = torch.arange(1.0, HIDDEN + 1)
    tensors = pair() | {"layers.0.attn.q_proj.magnitude": lengths}
    adapter = load(open_header(file(tmp_path / "a", tensors), registry, index=base()), registry)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, DoRA)
    assert delta.magnitude is not None
    assert torch.equal(delta.magnitude, hf_order(lengths[:, None], HEADS)[:, 0])
    # The merged weight in torchtune's order, then exported, is what the delta makes of the exported weight.
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)).double()
    a, b = (tensors[f"layers.0.attn.q_proj.lora_{which}.weight"].double() for which in "ab")
    moved = weight + 3 * b @ a
    merged = lengths[:, None].double() * moved / moved.norm(dim=1, keepdim=True)
    ours = hf_order(weight, HEADS)
    torch.testing.assert_close(ours + delta.delta(ours), hf_order(merged, HEADS))


def test_a_model_whose_rows_do_not_move_is_left_as_it_is(registry: Registry, tmp_path: Path) -> None:
    index = base({**LLAMA, "model_type": "qwen2"})
    (delta,) = load(open_header(file(tmp_path / "a", pair()), registry, index=index), registry).deltas.values()
    assert isinstance(delta, LoRA)
    assert torch.equal(delta.up, pair()["layers.0.attn.q_proj.lora_b.weight"])


def test_without_a_base_names_and_rows_stay(registry: Registry, tmp_path: Path) -> None:
    adapter = load(open_header(file(tmp_path / "a", pair()), registry), registry)
    ((target, delta),) = adapter.deltas.items()
    assert target.name == "layers.0.attn.q_proj.weight"
    assert isinstance(delta, LoRA)
    assert torch.equal(delta.up, pair()["layers.0.attn.q_proj.lora_b.weight"])


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {**LLAMA, "num_attention_heads": 3}, {}])
def test_an_order_of_rows_that_nobody_knows_is_refused(
    registry: Registry, tmp_path: Path, config: dict[str, Any]
) -> None:
    header = open_header(file(tmp_path / "a", pair()), registry, index=base(config))
    assert [(each.code, each.level) for each in header.findings] == [("row-order-unknown", Verdict.INCOMPATIBLE)]


@pytest.mark.parametrize(
    ("tensors", "config", "code"),
    [
        (pair(), {**CONFIG, "r": 8}, "config-contradicts-tensors"),
        (pair(), {**CONFIG, "use_rslora": True}, "config-unknown"),
        (pair() | {"layers.0.sa_norm.scale": torch.ones(4)}, CONFIG, "key-unknown"),
        ({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 4)}, CONFIG, "slot-missing"),
        (pair() | {"layers.0.attn.q_proj.magnitude": torch.ones(3)}, CONFIG, "config-contradicts-tensors"),
    ],
)
def test_what_does_not_add_up_is_a_finding(
    registry: Registry, tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], code: str
) -> None:
    header = open_header(file(tmp_path / "a", tensors, config), registry)
    assert code in {each.code for each in header.findings}


@pytest.mark.parametrize("config", [None, {"r": 2}])
def test_without_its_alpha_the_strength_is_unknown(
    registry: Registry, tmp_path: Path, config: dict[str, Any] | None
) -> None:
    with pytest.raises(UnsupportedFormat, match="strength"):
        open_header(file(tmp_path / "a", pair(), config), registry)


@pytest.mark.parametrize("value", ["6", True, None, float("inf")])
def test_an_alpha_that_is_no_number_is_an_integrity_error(registry: Registry, tmp_path: Path, value: object) -> None:
    with pytest.raises(IntegrityError):
        open_header(file(tmp_path / "a", pair(), {**CONFIG, "lora_alpha": value}), registry)


# ---- writing


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_written_and_read_again_with_the_base_it_is_the_same(
    registry: Registry, tmp_path: Path, *, magnitude: bool
) -> None:
    deltas = factors(magnitude=magnitude)
    hints = {"base_config": LLAMA, "base_repo": "acme/base"}
    folder = save(Adapter(deltas=deltas, hints=hints), tmp_path / "out", registry=registry, format="torchtune")
    names = {key.partition(".lora_")[0].removesuffix(".magnitude") for key in read_header(folder / FILE).tensors}
    assert names == set(NAMES.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, "acme/base")
    assert config["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3", "output"])
    header = open_header(folder, registry, index=base())
    assert (header.format, header.findings, header.reading.base_repo) == ("torchtune", (), "acme/base")
    again = load(header, registry).deltas
    assert again.keys() == deltas.keys()
    for target, delta in deltas.items():
        mine, theirs = delta.tensors(), again[target].tensors()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


FILE = "adapter_model.safetensors"


def test_what_is_written_torchtunes_own_export_turns_back(registry: Registry, tmp_path: Path) -> None:
    deltas = factors()
    save(Adapter(deltas=deltas, hints={"base_config": LLAMA}), tmp_path / "o", registry=registry, format="torchtune")
    with FileSource(tmp_path / "o" / FILE) as source:
        for target, delta in deltas.items():
            assert isinstance(delta, LoRA)
            stored = source.read(f"{NAMES[target.module]}.lora_b.weight")
            heads = {"q_proj": HEADS, "k_proj": KEYS}.get(target.module.rpartition(".")[2])
            assert torch.equal(hf_order(stored, heads) if heads else stored, delta.up)
            assert torch.equal(source.read(f"{NAMES[target.module]}.lora_a.weight"), delta.down)


Q = Target("", "model.layers.0.self_attn.q_proj", "weight")
REFUSED: dict[str, tuple[Callable[[], dict[Target, Delta]], dict[str, Any]]] = {
    "one alpha": (lambda: factors() | {Q: LoRA(torch.ones(16, 2), torch.ones(2, 16), 1.0)}, LLAMA),
    "one rank": (lambda: factors() | {Q: LoRA(torch.ones(16, 3), torch.ones(3, 16), 2.0)}, LLAMA),
    "base's config does not say how": (factors, {"model_type": "llama"}),
    "no word for full": (lambda: {Q: Full(torch.ones(16, 16))}, LLAMA),
    "no word for dora": (lambda: {Q: DoRA(torch.ones(16, 2), torch.ones(2, 16), 1.0, torch.ones(16), 1)}, LLAMA),
    "no components": (lambda: {Target("unet", Q.module, "weight"): factors()[Q]}, LLAMA),
    "no name of its own": (lambda: {Target("", "model.vision.proj", "weight"): factors()[Q]}, LLAMA),
    "embeddings": (lambda: {Target("", "model.embed_tokens", "weight"): factors()[Q]}, LLAMA),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_torchtune_has_no_word_for_is_refused(registry: Registry, reason: str) -> None:
    deltas, config = REFUSED[reason]
    with pytest.raises(CannotCarry, match=reason):
        TorchtuneFormat().write(deltas(), tuple(registry.kinds.values()), {"base_config": config})


def test_names_are_those_of_torchtunes_table() -> None:
    assert {module: torchtune_name(module) for module in NAMES} == NAMES
    others = ("model.layers.x.self_attn.q_proj", "model.layers.0.self_attn", "layers.0.attn.q_proj", "model.norm")
    assert [torchtune_name(module) for module in others] == [None] * 4
