"""Approximations: the best of their rank, only where they are asked for, with what is lost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conversion.making import IN, MODULES, OUT, based, change_of, drawn, lora, on, read, sample, write

import lorahub
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.full import Full
from lorahub.errors import CannotCarry, UsageError
from lorahub.opening import Base
from lorahub.records import AdapterRecord


def turned_and_base(folder: Path) -> tuple[dict[Target, Delta], Base]:
    turns = sample("hra")[0]
    write(folder, turns)
    return turns, based({target.name: (OUT, IN) for target in turns}, {})


def test_an_approximation_is_the_best_of_its_rank_and_says_what_is_lost(tmp_path: Path) -> None:
    turns, base = turned_and_base(tmp_path / "turned")  # reflections of rank 2
    report = lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, approximate=True, rank=1)
    found = read(tmp_path / "out").deltas
    assert not report.exact
    for line, (target, delta) in zip(report.targets, turns.items(), strict=True):
        weight = base.model[target.name].double()  # type: ignore[index,union-attr,operator]
        moved = delta.delta(weight).numpy()
        values = np.linalg.svd(moved, compute_uv=False)
        best = math.sqrt(float((values[1:] ** 2).sum() / (values**2).sum()))
        told = np.linalg.norm(change_of(found[target]) - moved) / np.linalg.norm(moved)
        assert best > 1e-2
        assert told == pytest.approx(best, rel=1e-5)
        assert line.difference == pytest.approx(best, rel=1e-5)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert record.derivation.max_error == pytest.approx(report.max_error)
    assert record.derivation.rules == {"approximated": 3}


def test_a_whole_difference_is_approximated_without_a_base(tmp_path: Path) -> None:
    whole = drawn(OUT, IN, seed=3)
    target = Target("", MODULES[1], "weight")
    write(tmp_path / "kohya", {**on(lora(1)), target: Full(whole)}, "kohya")
    with pytest.raises(CannotCarry, match="full rank") as stop:
        lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out")
    assert stop.value.hint == "add: --approximate --rank 32"
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out", approximate=True, rank=20)
    values = np.linalg.svd(whole.double().numpy(), compute_uv=False)
    lost = {each.target: each.difference for each in report.targets}
    assert lost[f"{MODULES[0]}.weight"] == 0.0
    assert lost[target.name] == pytest.approx(math.sqrt(float((values[20:] ** 2).sum() / (values**2).sum())), rel=1e-5)


def test_an_approximation_meets_the_error_that_was_asked_for(tmp_path: Path) -> None:
    _, base = turned_and_base(tmp_path / "turned")
    report = lorahub.convert(
        tmp_path / "turned", "peft", tmp_path / "out", base=base, kind="lora", approximate=True, error=0.1
    )
    assert report.max_error is not None
    assert 0 < report.max_error <= 0.1
    assert {each.after for each in report.targets} == {"lora"}


def test_an_approximation_is_never_made_unasked(tmp_path: Path) -> None:
    _, base = turned_and_base(tmp_path / "turned")
    with pytest.raises(CannotCarry):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base)
    with pytest.raises(UsageError, match="asked for"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, rank=4)
    with pytest.raises(UsageError, match="budget"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, approximate=True)
    with pytest.raises(CannotCarry, match="depends on the weight"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", approximate=True, rank=4)
