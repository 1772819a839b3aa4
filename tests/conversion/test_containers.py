"""Pickles and other containers: read for conversion, and refused where they ask for code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion.making import IN, MODULES, OUT, RANK, change_of, close, drawn, lora, on, read, write
from safetensors.torch import load_file

import lorahub
from lorahub.records import AdapterRecord


def test_a_pickle_is_opened_for_conversion_and_for_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text((tmp_path / "peft" / "adapter_config.json").read_text())
    report = lorahub.convert(folder, "peft", tmp_path / "out")
    assert report.adapter == str(folder)
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert set(record.derivation.sources) == {"adapter_model.bin", "adapter_config.json"}


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def test_a_pickle_that_asks_for_code_is_refused_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lora_A": _Payload()}, tmp_path / "x.bin")
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(tmp_path / "x.bin", "peft", tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_an_error_names_the_pickle_and_not_the_place_where_it_was_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor(1.0)}, tmp_path / "x.bin")
    with pytest.raises(lorahub.LorahubError) as stop:
        lorahub.convert(tmp_path / "x.bin", "peft", tmp_path / "out")
    assert str(tmp_path) in stop.value.message


def test_mlxs_npz_is_read_like_its_safetensors(tmp_path: Path) -> None:
    a, b = drawn(IN, RANK), drawn(RANK, OUT, seed=1)
    folder = tmp_path / "mlx"
    folder.mkdir()
    np.savez(folder / "adapters.npz", **{f"{MODULES[0]}.lora_a": a.numpy(), f"{MODULES[0]}.lora_b": b.numpy()})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 0.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lorahub.convert(folder, "peft", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    close(change_of(delta), 0.5 * (a.double() @ b.double()).T.numpy())
