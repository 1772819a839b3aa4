"""The proof that the result is the change, and the result as a whole: records, bytes, places."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion.making import IN, MODULES, NOWHERE, OUT, change_of, close, drawn, lora, on, read, start, write
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.adapter import open_header, save
from lorahub.bases.layout import Target
from lorahub.composition.algebra.truncate import Budget
from lorahub.conversion.losses import told
from lorahub.conversion.verify import difference
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.loha import LoHa
from lorahub.errors import CannotCarry, UsageError, WriteFailed
from lorahub.findings import Finding, Verdict
from lorahub.plugins import Registry
from lorahub.records import AdapterRecord

# The proof


def test_the_proof_sees_a_change_in_one_number() -> None:
    delta = lora(1)
    moved = replace(delta, up=delta.up.clone())
    moved.up[3, 1] += 1e-3
    target = Target("", "m", "weight")
    found = difference(start(delta), moved, {target: delta}, NOWHERE)
    expected = np.linalg.norm(change_of(moved) - change_of(delta)) / np.linalg.norm(change_of(delta))
    assert found == pytest.approx(expected, rel=1e-9)
    assert difference(start(delta), delta, {target: delta}, NOWHERE) == 0.0


def test_the_proof_of_what_depends_on_the_weight_needs_the_weight() -> None:
    target = Target("", "m", "weight")
    one = DoRA(drawn(6, 2), drawn(2, 5, seed=1), 1.0, drawn(6, seed=2).abs() + 1)
    other = replace(one, up=one.up * 2, scale=0.5)
    assert difference(start(one), other, {target: one}, NOWHERE) is None
    weight = drawn(6, 5, seed=3, dtype=torch.float64)
    assert difference(start(one), other, {target: one}, lambda _: weight) == pytest.approx(0, abs=1e-12)
    shorter = replace(one, magnitude=one.magnitude * 0.5)  # type: ignore[operator]
    assert difference(start(one), shorter, {target: one}, lambda _: weight) > 1e-2  # type: ignore[operator]


def test_a_store_that_is_too_narrow_is_told_and_one_that_was_asked_for_is_not_refused(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out.safetensors", dtype="fp16")
    assert report.rules == {"stored-as-f16": 1}
    assert report.max_error is not None
    assert 1e-5 < report.max_error < 1e-3
    assert load_file(tmp_path / "out.safetensors")[
        "lycoris_model_layers_0_self_attn_q_proj.lora_up.weight"
    ].dtype == torch.float16  # fmt: skip


# The result as a whole


def test_a_record_says_how_the_files_came_about_and_keeps_what_it_said(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.record(tmp_path / "peft", name="ink", license="mit")
    lorahub.convert(tmp_path / "peft", "diffusers", tmp_path / "out")
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert (record.name, record.license) == ("ink", "mit")
    assert record.stale(tmp_path / "out") == ()
    assert record.derivation is not None
    assert record.derivation.converted_from == "peft"
    assert set(record.derivation.sources) == {"adapter_model.safetensors", "adapter_config.json"}
    assert record.derivation.rules == {"rename": 1}
    assert record.derivation.max_error == 0.0
    assert open_header(tmp_path / "out", registry).findings == ()


def test_what_a_header_says_of_the_adapter_goes_into_the_record_and_the_rest_is_named(tmp_path: Path) -> None:
    stem = "lora_unet_a_b"
    said = {
        "modelspec.title": "Ink",
        "modelspec.trigger_phrase": "ink wash, brush",
        "ss_dataset_dirs": '{"/home/me/secret": 3}',
        "lorahub.modules": json.dumps({stem: "a.b"}),
    }
    tensors = {f"{stem}.lora_down.weight": drawn(2, 6), f"{stem}.lora_up.weight": drawn(6, 2)}
    save_file(tensors, tmp_path / "x.safetensors", said)
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out")
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert (record.title, record.trigger_words) == ("Ink", ("ink wash", "brush"))
    assert report.losses[-1] == "metadata of the file that is not carried: ss_dataset_dirs"
    assert "secret" not in (tmp_path / "out" / "lorahub.json").read_text()


def test_a_loss_that_speaks_of_somebodys_machine_is_told_without_its_path() -> None:
    found = Finding(
        code="key-unknown", axis="format", level=Verdict.DEGRADED, message="in /home/me/secret", allowable=True
    )
    (loss,) = told([found], ["key-unknown"], {}, [], [])
    assert "key-unknown" in loss
    assert "secret" not in loss


def test_a_place_that_is_taken_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    taken = tmp_path / "x.safetensors"
    taken.write_text("precious")
    with pytest.raises(WriteFailed, match="exists"):
        lorahub.convert(tmp_path / "peft", "kohya", taken)
    assert taken.read_text() == "precious"


def test_a_format_that_is_a_folder_is_not_squeezed_into_a_file(tmp_path: Path) -> None:
    write(tmp_path / "kohya", on(lora(1)), "kohya")
    with pytest.raises(CannotCarry, match="is a folder"):
        lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["kohya"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    write(
        tmp_path / "loha", on(LoHa(drawn(20, 2), drawn(2, 20, seed=1), drawn(20, 2, seed=2), drawn(2, 20, seed=3), 1.0))
    )
    for name in ("one", "two"):
        lorahub.convert(tmp_path / "loha", "kohya", tmp_path / f"{name}.safetensors", kind="lora")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_several_kinds_become_one_where_a_format_has_one(tmp_path: Path) -> None:
    mixed = on(lora(1), LoHa(drawn(OUT, 2), drawn(2, IN, seed=1), drawn(OUT, 2, seed=2), drawn(2, IN, seed=3), 1.0))
    write(tmp_path / "kohya", mixed, "kohya")
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out")
    assert report.rules == {"loha-to-lora": 1, "rename": 1}
    found = read(tmp_path / "out").deltas
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    for target, delta in mixed.items():
        close(change_of(found[target]), delta.delta(zero).numpy())


def test_a_scaled_bias_keeps_what_it_does(tmp_path: Path) -> None:
    factors = lora(1, scale=0.75)
    module = MODULES[0]
    both = {Target("", module, "weight"): factors, Target("", module, "bias"): Full(drawn(OUT, seed=4), 0.75)}
    write(tmp_path / "peft", both)
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out")
    found = read(tmp_path / "out").deltas[Target("", module, "bias")]
    assert isinstance(found, Full)
    assert found.scale == 1.0
    close(found.diff.double().numpy(), 0.75 * drawn(OUT, seed=4).double().numpy(), 1e-7)
    assert report.rules == {"rename": 1, "scale-folded": 1}


def test_budgets_are_checked_before_anything_is_read() -> None:
    with pytest.raises(UsageError):
        Budget(rank=0)


def test_saving_what_was_converted_needs_no_conversion(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "kohya")
    save(read(tmp_path / "kohya"), tmp_path / "again", registry=registry, format="kohya")
    one, other = (load_file(tmp_path / each / "lora.safetensors") for each in ("kohya", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
