"""Names of parts and modules, and what a format has no word for: told in full, and allowed by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversion.making import IN, based, drawn, lora, on, read, sample, write
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.bases.layout import Target
from lorahub.conversion.verify import same
from lorahub.deltas.replace import Replace
from lorahub.errors import BaseMismatch, CannotCarry, Degraded, UsageError
from lorahub.records import AdapterRecord

# Names and parts of pipelines


def test_one_part_of_a_pipeline_goes_to_a_format_for_one_model(tmp_path: Path) -> None:
    both = {**on(lora(1), component="unet"), **on(lora(2), component="text_encoder")}
    write(tmp_path / "both", both, "diffusers")
    with pytest.raises(CannotCarry, match="one model") as stop:
        lorahub.convert(tmp_path / "both", "mlx", tmp_path / "out")
    assert "--component" in stop.value.hint
    report = lorahub.convert(tmp_path / "both", "mlx", tmp_path / "out", component="unet")
    assert set(read(tmp_path / "out").deltas) == set(on(lora(1)))
    assert any("'text_encoder'" in loss and "1 targets" in loss for loss in report.losses)
    with pytest.raises(UsageError, match="no component 'vae'"):
        lorahub.convert(tmp_path / "both", "mlx", tmp_path / "never", component="vae")


def test_a_bare_adapter_is_named_for_a_part_of_a_pipeline(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors", component="unet")
    keys = load_file(tmp_path / "x.safetensors").keys()
    assert {key.partition(".")[0] for key in keys} == {"lora_unet_model_layers_0_self_attn_q_proj"}


def test_underscores_for_dots_need_a_base(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_to_q"
    save_file(
        {f"{stem}.lora_down.weight": drawn(2, 6), f"{stem}.lora_up.weight": drawn(6, 2)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out")
    assert "--base" in stop.value.hint
    assert stop.value.findings[0].where == ("mid_block_to_q",)
    base = based({"mid_block.to_q.weight": (6, 6)}, {})
    lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out", base=base)
    assert set(read(tmp_path / "out").deltas) == {Target("", "mid_block.to_q", "weight")}
    other = based({"up_block.to_q.weight": (6, 6)}, {})
    with pytest.raises((CannotCarry, Degraded, BaseMismatch)):
        lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "never", base=other)
    assert not (tmp_path / "never").exists()


# What there is no word for


def test_a_change_that_no_format_has_a_word_for_is_listed_in_full_with_a_remedy(tmp_path: Path) -> None:
    turns = sample("hra")[0]
    write(tmp_path / "turned", turns)
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "turned", "kohya", tmp_path / "out")
    assert sorted(stop.value.findings[0].where) == sorted(target.name for target in turns)
    assert "--approximate" in stop.value.hint
    assert "--base" in stop.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["turned"]


def test_what_is_left_out_is_allowed_by_name_and_written_down(tmp_path: Path) -> None:
    head = Target("", "score", "weight")
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(drawn(3, IN))}, modules_to_save=["score"])
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "out")
    assert stop.value.findings[0].where == (head.name,)
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "out", allow=["cannot-carry"])
    assert any(head.name in loss for loss in report.losses)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert any(head.name in loss for loss in record.derivation.losses)


def test_parts_that_change_no_weight_are_never_dropped_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "prompt"
    folder.mkdir()
    save_file({"prompt_embeddings": drawn(4, 8)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(folder, "kohya", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]


def test_an_unknown_key_blocks_until_it_is_allowed_and_then_is_a_loss(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({**load_file(file), "mystery": drawn(2)}, file)
    with pytest.raises(Degraded, match="mystery"):
        lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out")
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", allow=["key-unknown"])
    assert any("mystery" in loss for loss in report.losses)


def test_whole_differences_travel_with_the_factors(tmp_path: Path) -> None:
    """Ten tensors of a Wan file in, ten out: norms, biases and factors."""
    stem = "diffusion_model.blocks.0"
    tensors = {f"{stem}.self_attn.{name}.lora_{side}.weight": drawn(*size, seed=seed)
               for seed, name in enumerate("qk") for side, size in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    tensors |= {f"{stem}.self_attn.{name}.diff_b": drawn(8, seed=20) for name in "qkvo"}
    tensors |= {f"{stem}.norm3.diff": drawn(8, seed=30), f"{stem}.norm3.diff_b": drawn(8, seed=31)}
    save_file(tensors, tmp_path / "wan.safetensors")
    report = lorahub.convert(tmp_path / "wan.safetensors", "kohya", tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert len([key for key in written if not key.endswith(".alpha")]) == len(tensors) == 10
    assert report.losses == ()
    assert {key.partition(".")[0].removesuffix("_q") for key in written} >= {
        "lora_unet_blocks_0_self_attn",
        "lora_unet_blocks_0_norm3",
    }
    source = {
        Target("unet", target.module, target.parameter): delta
        for target, delta in read(tmp_path / "wan.safetensors").deltas.items()
    }
    found = read(tmp_path / "out.safetensors").deltas
    assert source.keys() == found.keys()
    assert all(same(source[target], found[target]) for target in source)
