"""Rewritings that are exact: kinds that are LoRA in other words, held against loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conversion.making import MODULES, NOWHERE, REGISTRY, based, change_of, close, drawn, lora, on, read, start, write

import lorahub
from lorahub.conversion.rewrite import REWRITINGS, Obstacle, rewrite
from lorahub.deltas.adalora import AdaLoRA
from lorahub.deltas.decomposed import DoLoHa
from lorahub.deltas.dora import DoRA
from lorahub.deltas.locon import LoCon
from lorahub.deltas.loha import LoHa
from lorahub.deltas.lokr import LoKr
from lorahub.deltas.lora import LoRA
from lorahub.deltas.miss import MiSS
from lorahub.deltas.vera import VeRA
from lorahub.errors import BaseMismatch, CannotCarry


def test_loha_becomes_lora_of_the_product_of_its_ranks(tmp_path: Path) -> None:
    a, b, c, d = drawn(24, 2, seed=1), drawn(2, 20, seed=2), drawn(24, 2, seed=3), drawn(2, 20, seed=4)
    write(tmp_path / "loha", on(LoHa(a, b, c, d, 0.7)))
    report = lorahub.convert(tmp_path / "loha", "diffusers", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    first, second = (
        np.array([[sum(x[o, k] * y[k, i] for k in range(2)) for i in range(20)] for o in range(24)])
        for x, y in ((a.double().numpy(), b.double().numpy()), (c.double().numpy(), d.double().numpy()))
    )
    close(change_of(delta, (24, 20)), 0.7 * first * second)
    assert dict(report.rules) == {"loha-to-lora": 1}
    assert [(each.rank_before, each.rank_after) for each in report.targets] == [(2, 4)]
    assert report.max_error is not None
    assert 0 < report.max_error <= 1e-6


def test_loha_whose_product_of_ranks_is_not_low_is_still_exact(tmp_path: Path) -> None:
    a, b, c, d = drawn(10, 4, seed=1), drawn(4, 8, seed=2), drawn(10, 4, seed=3), drawn(4, 8, seed=4)
    write(tmp_path / "loha", on(LoHa(a, b, c, d, 0.7)))
    lorahub.convert(tmp_path / "loha", "mlx", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 8
    close(change_of(delta, (10, 8)), 0.7 * (a @ b).double().numpy() * (c @ d).double().numpy())


def test_lokr_becomes_lora_of_the_product_of_its_sides_ranks(tmp_path: Path) -> None:
    w1, a, b = drawn(3, 4, seed=1), drawn(8, 2, seed=2), drawn(2, 6, seed=3)
    write(tmp_path / "lokr", on(LoKr(scale=0.5, w1=w1, w2_a=a, w2_b=b)), "kohya")
    lorahub.convert(tmp_path / "lokr", "diffusers", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 3 * 2
    close(change_of(delta, (24, 24)), 0.5 * np.kron(w1.double().numpy(), (a.double() @ b.double()).numpy()))


def test_a_tucker_core_becomes_a_plain_convolution_of_the_same_rank(tmp_path: Path) -> None:
    up, mid, down = drawn(6, 2, 1, 1, seed=1), drawn(2, 2, 3, 3, seed=2), drawn(2, 5, 1, 1, seed=3)
    write(tmp_path / "locon", on(LoCon(up, mid, down, 0.25)), "kohya")
    lorahub.convert(tmp_path / "locon", "peft", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert (delta.up.shape, delta.down.shape) == ((6, 2, 1, 1), (2, 5, 3, 3))
    expected = np.zeros((6, 5, 3, 3))
    u, m, d = up.double().numpy(), mid.double().numpy(), down.double().numpy()
    for o in range(6):
        for i in range(5):
            for r in range(2):
                for s in range(2):
                    expected[o, i] += u[o, r, 0, 0] * m[r, s] * d[s, i, 0, 0]
    close(change_of(delta, (6, 5, 3, 3)), 0.25 * expected)


def test_vera_takes_its_vectors_into_the_factors() -> None:
    gain, mix, up, down = drawn(5, seed=1), drawn(3, seed=2), drawn(9, 3, seed=3), drawn(3, 9, seed=4)
    found = rewrite(start(VeRA(gain, mix, up, down), (5, 7)), NOWHERE).delta
    expected = np.array(
        [[float(gain[o]) * sum(float(up[o, k] * mix[k]) * float(down[k, i]) for k in range(3)) for i in range(7)]
         for o in range(5)]
    )  # fmt: skip
    close(change_of(found, (5, 7)), expected)


def test_miss_is_lora_of_its_native_rank() -> None:
    block = drawn(3, 8, seed=1)
    found = rewrite(start(MiSS(block), (8, 10)), NOWHERE).delta
    assert isinstance(found, LoRA)
    assert found.down.shape[0] == 3
    expected = np.array([[float(block[i % 3, o]) for i in range(10)] for o in range(8)])
    close(change_of(found, (8, 10)), expected, 1e-15)


def test_dora_over_another_kind_is_dora_over_lora(tmp_path: Path) -> None:
    inner = LoHa(drawn(24, 2, seed=1), drawn(2, 20, seed=2), drawn(24, 2, seed=3), drawn(2, 20, seed=4), 0.7)
    lengths = drawn(24, seed=5).abs() + 1
    dressed = DoLoHa(inner.w1_a, inner.w1_b, inner.w2_a, inner.w2_b, 0.7, lengths[:, None], 0)
    write(tmp_path / "kohya", on(dressed), "kohya")
    base = based({f"{MODULES[0]}.weight": (24, 20)}, {})
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out", base=base)
    assert report.rules == {"dora-loha-to-dora": 1}
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, DoRA)
    weight = drawn(24, 20, seed=6).double().numpy()
    moved = weight + 0.7 * (inner.w1_a @ inner.w1_b).double().numpy() * (inner.w2_a @ inner.w2_b).double().numpy()
    expected = lengths.double().numpy()[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
    close(delta.delta(torch.from_numpy(weight)).numpy(), expected)


def test_a_format_that_is_only_read_says_so_at_once(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    with pytest.raises(CannotCarry, match="read only"):
        lorahub.convert(tmp_path / "peft", "xlabs", tmp_path / "out")


def test_what_does_not_say_how_large_it_is_asks_for_the_base() -> None:
    with pytest.raises(Obstacle) as stop:
        rewrite(start(MiSS(drawn(3, 8))), NOWHERE)
    assert stop.value.remedy == "--base BASE"


@pytest.mark.parametrize("kind", REWRITINGS)
def test_every_rewriting_of_the_table_is_the_same_change(kind: str) -> None:
    tried = 0
    for cls in REGISTRY.kinds[kind].deltas:
        for shape in ((24, 20), (6, 5, 3, 3)):
            generator = torch.Generator().manual_seed(1)
            try:
                delta = cls.example(shape, r=2, generator=generator)
                plain = rewrite(start(delta, shape), NOWHERE).delta
            except (BaseMismatch, Obstacle):
                continue
            tried += 1
            zero = torch.zeros(shape, dtype=torch.float64)
            close(change_of(plain, shape), delta.delta(zero).numpy())
    assert tried


def test_pruned_singular_values_leave_a_lora_that_does_nothing() -> None:
    pruned = AdaLoRA(up=drawn(4, 0), down=drawn(0, 6), values=drawn(0, 1), scale=1.0)
    found = rewrite(start(pruned), NOWHERE).delta
    assert isinstance(found, LoRA)
    assert (found.down.shape, int(found.up.count_nonzero())) == ((1, 6), 0)
