"""Projections and experts that one side keeps together and the other apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion.making import IN, NOWHERE, RANK, REGISTRY, based, change_of, close, drawn, lora, read, start, write
from safetensors.torch import load_file

import lorahub
from lorahub.adapter import load, open_header
from lorahub.bases.layout import Piece, Region, Target
from lorahub.conversion.change import Origin
from lorahub.conversion.fused import land, trimmed
from lorahub.conversion.verify import same
from lorahub.deltas.dora import DoRA
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry
from lorahub.opening import Base

FUSED, PARTS = Target("", "attn.qkv", "weight"), tuple(Target("", f"attn.{name}", "weight") for name in "qkv")
SIZES = (6, 6, 8)


def bands() -> list[slice]:
    stops = np.cumsum(SIZES).tolist()
    return [slice(stop - size, stop) for stop, size in zip(stops, SIZES, strict=True)]


def splitting() -> Base:
    """Adapters say qkv, the base has q, k and v."""
    pieces = tuple(
        Piece(parameter=part.name, of_delta=Region(rows=rows)) for part, rows in zip(PARTS, bands(), strict=True)
    )
    return based({part.name: (size, IN) for part, size in zip(PARTS, SIZES, strict=True)}, {FUSED: pieces})


def fusing() -> Base:
    """Adapters say q, k and v, the base has qkv."""
    pieces = {
        part: (Piece(parameter=FUSED.name, of_parameter=Region(rows=rows)),)
        for part, rows in zip(PARTS, bands(), strict=True)
    }
    return based({FUSED.name: (sum(SIZES), IN)}, pieces)


def test_a_fused_projection_splits_by_rows_and_shares_its_down(tmp_path: Path) -> None:
    whole = lora(1, out=sum(SIZES), rank=3)
    write(tmp_path / "fused", {FUSED: whole}, "kohya")
    report = lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    found = read(tmp_path / "out").deltas
    assert set(found) == set(PARTS)
    for part, rows in zip(PARTS, bands(), strict=True):
        delta = found[part]
        assert isinstance(delta, LoRA)
        assert torch.equal(delta.down, whole.down)
        assert torch.equal(delta.up, whole.up[rows])
        close(change_of(delta, (rows.stop - rows.start, IN)), change_of(whole, (sum(SIZES), IN))[rows], 1e-15)
    assert report.rules == {"fused-to-split": 3}
    assert report.max_error == 0.0


def test_factors_trained_apart_are_found_again_in_a_block_diagonal_up(tmp_path: Path) -> None:
    apart = [lora(seed, out=size, rank=2) for seed, size in enumerate(SIZES)]
    up = torch.zeros(sum(SIZES), 6)
    for at, (rows, each) in enumerate(zip(bands(), apart, strict=True)):
        up[rows, 2 * at : 2 * at + 2] = each.up
    write(tmp_path / "fused", {FUSED: LoRA(up, torch.cat([each.down for each in apart]), 1.5)}, "kohya")
    lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    found = read(tmp_path / "out").deltas
    assert all(same(found[part], each) for part, each in zip(PARTS, apart, strict=True))
    # ... and back: the very file it was
    lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back", base=fusing())
    one, other = (load_file(tmp_path / each / "lora.safetensors") for each in ("fused", "back"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_split_projections_fuse_beside_each_other_or_at_their_own_rank_where_down_is_one(tmp_path: Path) -> None:
    apart = {part: lora(seed, out=size, scale=scale) for seed, (part, size, scale) in
             enumerate(zip(PARTS, SIZES, (1.5, 0.7, 1.5), strict=True))}  # fmt: skip
    write(tmp_path / "apart", apart, "kohya")
    report = lorahub.convert(tmp_path / "apart", "peft", tmp_path / "out", base=fusing())
    delta = read(tmp_path / "out").deltas[FUSED]
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 3 * RANK
    expected = np.concatenate([change_of(each, (size, IN)) for each, size in zip(apart.values(), SIZES, strict=True)])
    close(change_of(delta, (sum(SIZES), IN)), expected)
    assert report.targets[0].sources == tuple(part.name for part in PARTS)

    shared = {part: replace(each, down=drawn(RANK, IN, seed=77), scale=1.5) for part, each in apart.items()}
    write(tmp_path / "shared", shared, "kohya")
    lorahub.convert(tmp_path / "shared", "peft", tmp_path / "small", base=fusing())
    small = read(tmp_path / "small").deltas[FUSED]
    assert isinstance(small, LoRA)
    assert small.down.shape[0] == RANK
    expected = np.concatenate([change_of(each, (size, IN)) for each, size in zip(shared.values(), SIZES, strict=True)])
    close(change_of(small, (sum(SIZES), IN)), expected, 1e-15)


def test_parts_of_scale_zero_take_nothing_from_the_part_beside_them(tmp_path: Path) -> None:
    scales = (0.0, 1.5, 0.0)
    apart = {
        part: lora(seed, out=size, scale=scale)
        for seed, (part, size, scale) in enumerate(zip(PARTS, SIZES, scales, strict=True))
    }
    write(tmp_path / "apart", apart)
    lorahub.convert(tmp_path / "apart", "peft", tmp_path / "out", base=fusing())
    whole = change_of(read(tmp_path / "out").deltas[FUSED], (sum(SIZES), IN))
    first, middle, last = bands()
    assert not whole[first].any()
    assert not whole[last].any()
    close(whole[middle], change_of(apart[PARTS[1]], (SIZES[1], IN)))


def test_experts_of_scale_zero_take_nothing_from_those_beside_them(tmp_path: Path) -> None:
    places = gates(0, 2)
    apart = {
        target: lora(seed, out=INNER, into=HIDDEN, scale=1.5 * (place.expert == 2))
        for seed, (target, place) in enumerate(places.items())
    }
    write(tmp_path / "apart", apart)
    pieces = {target: (Piece(parameter=STACK.name, of_parameter=place),) for target, place in gates(0, 1, 2).items()}
    stack = based({STACK.name: (EXPERTS, 2 * INNER, HIDDEN)}, pieces)
    lorahub.convert(tmp_path / "apart", "peft", tmp_path / "stack", base=stack)
    header = open_header(tmp_path / "stack", REGISTRY, index=stack.index)
    (found,) = load(header, REGISTRY).deltas.values()
    whole = found.delta(torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.float64)).numpy()
    assert not whole[:2].any()
    for target, place in places.items():
        if place.expert == 2:
            close(whole[2][place.rows], change_of(apart[target], (INNER, HIDDEN)))  # type: ignore[index]


def test_lengths_of_dora_go_with_their_rows(tmp_path: Path) -> None:
    size = sum(SIZES)
    whole = DoRA(drawn(size, RANK), drawn(RANK, IN, seed=1), 1.0, drawn(size, seed=2).abs() + 1)
    write(tmp_path / "fused", {FUSED: whole}, "kohya")
    report = lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    assert report.max_error is not None
    assert report.max_error <= 1e-12
    found = read(tmp_path / "out").deltas
    for part, rows in zip(PARTS, bands(), strict=True):
        delta = found[part]
        assert isinstance(delta, DoRA)
        assert torch.equal(delta.magnitude, whole.magnitude[rows])  # type: ignore[arg-type,index]
    lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back", base=fusing())
    again = read(tmp_path / "back").deltas[FUSED]
    weight = drawn(size, IN, seed=5, dtype=torch.float64)
    close(again.delta(weight).numpy(), whole.delta(weight).numpy(), 1e-12)


def test_a_part_and_the_whole_that_it_is_of_are_not_laid_over_each_other(tmp_path: Path) -> None:
    both = {FUSED: lora(1, out=sum(SIZES)), PARTS[0]: lora(2, out=SIZES[0])}
    write(tmp_path / "both", both, "kohya")
    with pytest.raises(CannotCarry, match="another also changes") as stop:
        lorahub.convert(tmp_path / "both", "peft", tmp_path / "out", base=fusing())
    assert {name for each in stop.value.findings for name in each.where} == {FUSED.name, PARTS[0].name}


def test_a_part_that_the_adapter_leaves_alone_stays_zero() -> None:
    base = fusing()
    apart = [replace(start(lora(1, out=SIZES[1])), target=PARTS[1], origins=(Origin(target=PARTS[1]),))]
    (only,), stuck = land(apart, base.framework.layouts(base.index, list(PARTS)), base.index, NOWHERE)
    assert not stuck
    assert only.target == FUSED
    whole = change_of(only.delta, (sum(SIZES), IN))
    assert not whole[bands()[0]].any()
    assert not whole[bands()[2]].any()
    close(whole[bands()[1]], change_of(apart[0].delta, (SIZES[1], IN)), 1e-15)


STACK = Target("", "mlp.experts", "gate_up_proj")
EXPERTS, INNER, HIDDEN = 3, 5, 8


def gates(*experts: int) -> dict[Target, Region]:
    """The gate and up projections of some experts, and where they lie in the stack."""
    return {
        Target("", f"mlp.experts.{at}.{name}_proj", "weight"): Region(expert=at, rows=slice(first, first + INNER))
        for at in experts
        for name, first in (("gate", 0), ("up", INNER))
    }


def test_experts_trained_one_by_one_become_the_stack_of_the_base_and_come_apart_again(tmp_path: Path) -> None:
    """transformers 5 stacks what adapters of earlier releases name one by one."""
    places = gates(0, 2)
    apart = {
        target: lora(seed, out=INNER, into=HIDDEN, rank=2 + seed % 2, scale=1.5) for seed, target in enumerate(places)
    }
    write(tmp_path / "apart", apart)
    pieces = {target: (Piece(parameter=STACK.name, of_parameter=place),) for target, place in gates(0, 1, 2).items()}
    stack = based({STACK.name: (EXPERTS, 2 * INNER, HIDDEN)}, pieces)
    report = lorahub.convert(tmp_path / "apart", "peft", tmp_path / "stack", base=stack)
    assert report.rules == {"experts-to-stack": 1}
    assert report.max_error == 0.0
    assert report.targets[0].sources == tuple(target.name for target in sorted(apart))
    expected = np.zeros((EXPERTS, 2 * INNER, HIDDEN))
    for target, place in places.items():
        assert place.expert is not None
        expected[place.expert][place.rows] = change_of(apart[target], (INNER, HIDDEN))  # type: ignore[index]
    header = open_header(tmp_path / "stack", REGISTRY, index=stack.index)
    (found,) = load(header, REGISTRY).deltas.values()
    zero = torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.float64)
    close(found.delta(zero).numpy(), expected, 1e-12)

    whole = tuple(Piece(parameter=target.name, of_delta=place) for target, place in gates(0, 1, 2).items())
    shapes = {target.name: (INNER, HIDDEN) for target in gates(0, 1, 2)}
    experts = based({**shapes, STACK.name: (EXPERTS, 2 * INNER, HIDDEN)}, {STACK: whole})
    back = lorahub.convert(tmp_path / "stack", "mlx", tmp_path / "back", base=experts)
    assert set(back.rules) == {"stack-to-experts", "rank-padded"}
    again = read(tmp_path / "back").deltas
    for target, place in gates(0, 1, 2).items():
        assert place.expert is not None
        one = change_of(again[target], (INNER, HIDDEN))
        assert np.abs(one - expected[place.expert][place.rows]).max() <= 1e-12  # type: ignore[index]


def test_what_is_no_lora_is_not_stacked(tmp_path: Path) -> None:
    (target,) = list(gates(1))[:1]
    stack = based(
        {STACK.name: (EXPERTS, 2 * INNER, HIDDEN)},
        {target: (Piece(parameter=STACK.name, of_parameter=gates(1)[target]),)},
    )
    dora = DoRA(drawn(INNER, 2), drawn(2, HIDDEN, seed=1), 1.0, drawn(INNER, seed=2).abs() + 1)
    write(tmp_path / "one", {target: dora})
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(tmp_path / "one", "peft", tmp_path / "out", base=stack)
    assert not (tmp_path / "out").exists()


def test_trimming_keeps_one_component_of_a_change_that_does_nothing() -> None:
    found = trimmed(LoRA(torch.zeros(4, 3), drawn(3, 5), 1.0))
    assert isinstance(found, LoRA)
    assert found.up.shape == (4, 1)
