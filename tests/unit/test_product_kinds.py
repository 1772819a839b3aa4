"""Kinds built from products of small factors: what contradicts itself is refused, and cuts wait for a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lorahub.deltas.adalora import ADALORA, AdaLoRA
from lorahub.deltas.delora import DeLoRA
from lorahub.deltas.gralora import GRALORA
from lorahub.deltas.hira import HIRA
from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.deltas.loha import LOHA, LoHa
from lorahub.deltas.lokr import LOKR, LoKr
from lorahub.deltas.miss import MISS, Bat, MiSS
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.shapes import ShapeMisfit, unify


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def refs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    return {slot: TensorRef(key=slot, shape=shape, dtype="F32") for slot, shape in shapes.items()}


def group(kind: Kind, shapes: Mapping[str, tuple[int, ...]], **options: Any) -> Group:
    return Group(module="m", kind=kind.name, slots=refs(shapes), options=options)


HADA = {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
GRID = {"down": (2, 3, 4), "up": (2, 4, 5)}
PAIR = {"up": (6, 2), "down": (2, 4)}
TRIPLE = {"up": (6, 2), "values": (2, 1), "down": (2, 4)}


@pytest.mark.parametrize(
    ("kind", "shapes", "config", "says"),
    [
        (LOHA, HADA, {"r": 3}, "says rank 3"),
        (LOHA, HADA, {"r": 2, "rank_pattern": {"m": 4}}, "says rank 4"),
        (LOHA, HADA, {"r": 2, "alpha": "8"}, "alpha should be a number"),
        (LOKR, {"w1": (2, 2), "w2_a": (3, 2), "w2_b": (2, 2)}, {"r": 4}, "says rank 4"),
        (LOKR, {"w1": (2, 2), "w2": (3, 2)}, {"r": 0}, "above zero"),
        (HIRA, PAIR, {"r": 3, "rank_pattern": {"m": 4}}, "says rank 4"),
        (GRALORA, GRID, {"r": 4, "gralora_k": 4}, "gralora_k is 4"),
        (GRALORA, GRID, {"r": 4, "gralora_k": 2, "hybrid_r": 2}, "hybrid_r is 2"),
        (ADALORA, TRIPLE, {"init_r": 3}, "init_r is 3"),
        (ADALORA, TRIPLE, {"init_r": 3, "rank_pattern": {"m.lora_E": [True, False, False]}}, "keeps 1 ranks"),
        (ADALORA, TRIPLE, {"init_r": 3, "rank_pattern": {"m.lora_E": 2}}, "list of true and false"),
        (MISS, {"block": (2, 6)}, {"init_weights": "bat"}, "no such block"),
        (MISS, {"block": (3, 2, 2)}, {"init_weights": True}, "no such block"),
        (MISS, {"block": (2, 6)}, {"init_weights": "mini", "mini_r": 3}, "mini_r is 3"),
        (MISS, {"block": (2, 6)}, {"init_weights": "other"}, "should be"),
        (MISS, {"block": (2, 6)}, {"r": 3}, "r is 3"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    kind: Kind, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(IntegrityError, match=says):
        kind.spellings[0].options(config, "m", refs(shapes))


@pytest.mark.parametrize(
    ("kind", "shapes", "says"),
    [
        (LOHA, HADA | {"t1": (2, 2, 3, 3)}, "without the other"),
        (LOHA, HADA | {"w2_b": (2, 5)}, "flat is 4 elsewhere"),
        (LOKR, {"w1": (2, 2), "w1_a": (2, 2), "w2": (2, 2)}, "makes none"),
        (LOKR, {"w1": (2, 2)}, "it has nothing"),
        (LOKR, {"w1": (2, 2), "w2_a": (2, 3), "t2": (2, 2, 3, 3)}, "makes none"),
        (GRALORA, GRID | {"general_up": (10, 2)}, "without the other"),
        (GRALORA, GRID | {"general_up": (10, 2), "general_down": (2, 7)}, "6 was expected"),
        (GRALORA, {"down": (3, 3, 4), "up": (3, 4, 5)}, "cannot share"),
    ],
)
def test_slots_that_make_no_delta_are_refused_from_their_shapes(
    kind: Kind, shapes: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(ShapeMisfit, match=says):
        kind.touches(group(kind, shapes))


@pytest.mark.parametrize(
    ("kind", "groups", "says"),
    [
        (HIRA, [({"down": (2, 4)}, {}), ({"down": (3, 4)}, {})], "rank_pattern it ignores"),
        (GRALORA, [(GRID, {"scale": 1.0}), (GRID, {"scale": 2.0})], "one scale for all"),
        (
            MISS,
            [({"block": (2, 6)}, {"variant": "balanced"}), ({"block": (2, 6)}, {"variant": "mini"})],
            "init_weights",
        ),
        (LOKR, [({"w1": (2, 2), "w2": (2, 2, 3)}, {"scale": 1.0, "trailing": False})], "multiply out"),
        (LOKR, [({"w1": (1, 2), "w2": (10, 2)}, {"scale": 1.0, "trailing": False})], "decompose_factor"),
    ],
)
def test_what_pefts_config_cannot_say_is_not_written(kind: Kind, groups: list[Any], says: str) -> None:
    made = {f"m{at}": group(kind, shapes, **options) for at, (shapes, options) in enumerate(groups)}
    with pytest.raises(CannotCarry, match=says):
        kind.spellings[0].config(made)


@pytest.mark.parametrize(
    "delta",
    [
        LoHa(normal(6, 2), normal(2, 12), normal(6, 2), normal(2, 12), 0.5),
        LoKr(0.5, normal(2, 2), w2_a=normal(3, 2), w2_b=normal(2, 6)),
        AdaLoRA(normal(6, 2), normal(2, 1), normal(2, 12), 0.5),
    ],
    ids=lambda delta: delta.kind,
)
def test_a_flattened_factor_is_cut_in_columns_once_a_kernel_is_known(delta: Any) -> None:
    for shape in ((6, 12), (6, 4, 3), (6, 2, 2, 3)):
        weight = torch.zeros(shape, dtype=torch.float64)
        change = delta.delta(weight)
        part = delta.region((3, 1), slice(1, None)).region(slice(0, 1), (0,))
        found = part.delta(weight[:1, :1])
        torch.testing.assert_close(found, change[3:4, 1:2], rtol=1e-14, atol=1e-14)
        assert found.any()
    with pytest.raises(BaseMismatch):
        delta.delta(torch.zeros(6, 5, 3))


def test_a_miss_block_is_not_cut_from_an_end_it_does_not_know() -> None:
    delta = MiSS(normal(2, 6))
    for index in (slice(-2, None), slice(None, None, -1), (-1, 0)):
        with pytest.raises(NotLocal):
            delta.region(slice(None), index)
    with pytest.raises(BaseMismatch, match="leaves 3 positions"):
        delta.region(slice(0, 3), slice(None)).delta(torch.zeros(2, 4))
    with pytest.raises(NotLocal, match="through one"):
        Bat(normal(3, 2, 2)).region(slice(None), slice(1, 3))


def test_a_fresh_delora_is_measured_on_the_weight_it_is_for() -> None:
    weight = normal(5, 4)
    fresh = DeLoRA.fresh((5, 4), r=2, generator=torch.Generator().manual_seed(0))
    assert fresh.lengths.tolist() == [1.0] * 4
    torch.testing.assert_close(fresh.measured(weight).lengths, weight.norm(dim=0))


def test_a_dimension_can_be_declared_a_multiple() -> None:
    assert unify("%4 in", (8, 3), {}, name="w") == {"in": 3}
    with pytest.raises(ShapeMisfit, match="no multiple of 4"):
        unify("%4 in", (6, 3), {}, name="w")
