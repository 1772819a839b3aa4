"""Renames: what every two formats have words for comes back bit-identical."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion.making import REGISTRY, lora, on, read, sample, write
from safetensors.torch import load_file

import lorahub
from lorahub.conversion.verify import same

SAMPLES = {kind: sample(kind) for kind in REGISTRY.kinds}
CARRIED = {(name, kind) for kind, (_, names) in SAMPLES.items() for name in names}
ROUND_TRIPS = sorted(
    (kind, one, other) for one, kind in CARRIED for other, same_kind in CARRIED if same_kind == kind and one != other
)


def test_the_formats_of_the_lossless_matrix_are_all_in_the_round_trips() -> None:
    expected = {("lora", each) for each in ("peft", "diffusers", "kohya", "mlx")}
    expected |= {("dora", each) for each in ("peft", "diffusers", "kohya", "mlx")}
    expected |= {(kind, each) for kind in ("loha", "lokr") for each in ("peft", "kohya")}
    assert expected <= {(kind, name) for name, kind in CARRIED}


@pytest.mark.parametrize(("kind", "one", "other"), ROUND_TRIPS)
def test_there_and_back_again_is_bit_identical(kind: str, one: str, other: str, tmp_path: Path) -> None:
    deltas, _ = SAMPLES[kind]
    write(tmp_path / "start", deltas, one)
    report = lorahub.convert(tmp_path / "start", other, tmp_path / "there")
    assert (dict(report.rules), report.max_error, report.unverified) == ({"rename": len(deltas)}, 0.0, 0)
    lorahub.convert(tmp_path / "there", one, tmp_path / "back")
    start, again = read(tmp_path / "start").deltas, read(tmp_path / "back").deltas
    assert start.keys() == again.keys()
    assert all(same(start[target], again[target]) for target in start)
    weights = {path.name for path in (tmp_path / "start").iterdir()} & {
        path.name for path in (tmp_path / "back").iterdir()
    }
    assert weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("to", ["diffusers", "kohya", "mlx"])
def test_numbers_keep_their_type(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    deltas = on(*(replace(each, up=each.up.to(dtype), down=each.down.to(dtype)) for each in map(lora, range(3))))
    write(tmp_path / "peft", deltas)
    lorahub.convert(tmp_path / "peft", to, tmp_path / "there")
    lorahub.convert(tmp_path / "there", "peft", tmp_path / "back")
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and other[key].dtype == dtype for key in one)
