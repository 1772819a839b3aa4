"""Several adapters beside each other: held against dense matrices in float64, which are never made here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorahub import adapter as adapters
from lorahub import interference, similarity, subspace_overlap
from lorahub.bases.layout import Target
from lorahub.comparing.naming import names_of
from lorahub.composition.analysis import side_by_side
from lorahub.composition.analysis import similarity as module
from lorahub.composition.analysis.measuring import target_row
from lorahub.composition.analysis.picturing import SHOWS, conflict_map, pair_map, subspace_map, target_map
from lorahub.composition.analysis.side_by_side import Side, line_up, tiles
from lorahub.composition.analysis.similarity import Similarity
from lorahub.composition.analysis.subspaces import Subspaces, subspaces
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.kind import Kind
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import UsageError
from lorahub.pictures.heat_map import svg
from lorahub.plugins import Registry, load_registry
from lorahub.testing.cases import cases

OUT, IN = 30, 22
KINDS = load_registry().kinds


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, *, rank: int = 4, out: int = OUT, inner: int = IN, scale: float = 0.5) -> LoRA:
    return LoRA(normal(out, rank, seed=seed), normal(rank, inner, seed=seed + 1000), scale)


def at(**deltas: Delta) -> dict[Target, Delta]:
    return {Target("", name, "weight"): delta for name, delta in deltas.items()}


def compared(
    *given: Mapping[Target, Delta],
    factors: Sequence[float] = (),
    base: Mapping[str, torch.Tensor] | None = None,
    threads: int = 2,
    tolerance: float = 1e-6,
) -> Similarity:
    return module.similarity(
        [f"a{number}" for number in range(len(given))],
        given,
        factors=factors or [1.0] * len(given),
        tolerance=tolerance,
        threads=threads,
        base=None if base is None else lambda target: base.get(target.name),
    )


def dense(delta: Delta | None, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if delta is None else delta.delta(weight)


def flat(given: Mapping[Target, Delta], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A whole adapter as one vector."""
    by_name = {target.name: delta for target, delta in given.items()}
    return torch.cat([dense(by_name.get(name), weight).flatten() for name, weight in weights.items()])


def angle(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten() @ other.flatten() / (one.norm() * other.norm()))


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


# ------------------------------------------------------------------------------------------------ whole adapters


def mixed() -> tuple[list[dict[Target, Delta]], dict[str, torch.Tensor]]:
    """Three adapters of unlike kinds, ranks and targets, and a base for them."""
    conv = LoRA(normal(6, 3, 1, 1, seed=7), normal(3, 5, 3, 3, seed=8), 0.7)
    given = [
        at(q=lora(1), v=lora(2, rank=9), conv=conv, experts=ExpertLoRA(*stack(1), 0.5, False)),
        at(q=lora(3, rank=7, scale=-1.5), v=Full(normal(OUT, IN, seed=4)), experts=ExpertLoRA(*stack(3), 2.0, False)),
        at(q=DoRA(*factors(5), 0.5, normal(OUT, seed=6).abs()), conv=Full(normal(6, 5, 3, 3, seed=9))),
    ]
    weights = {
        "q.weight": normal(OUT, IN, seed=20).double(),
        "v.weight": normal(OUT, IN, seed=21).double(),
        "conv.weight": normal(6, 5, 3, 3, seed=22).double(),
        "experts.weight": normal(3, 8, 5, seed=23).double(),
    }
    return given, weights


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = lora(seed)
    return made.up, made.down


def stack(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(3, 8, 2, seed=seed), normal(3, 2, 5, seed=seed + 1)


def test_cosines_norms_and_differences_are_those_of_whole_adapters_as_vectors() -> None:
    given, weights = mixed()
    found, vectors = compared(*given, base=weights), [flat(each, weights) for each in given]
    assert found.norms == pytest.approx([float(each.norm()) for each in vectors], rel=1e-10)
    for one, other in found.pairs:
        a, b = vectors[one], vectors[other]
        assert found.cosine(one, other) == pytest.approx(angle(a, b), abs=1e-10)
        assert found.difference(one, other) == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-9)
    assert [found.shared(*pair) for pair in found.pairs] == [3, 2, 1]
    assert not found.left_out


def test_a_target_that_an_adapter_leaves_alone_counts_as_zero() -> None:
    shared = lora(1)
    one, other = at(q=shared), at(q=shared, v=lora(2))
    found = compared(one, other, at(k=lora(3)))
    norms = [float(dense(lora(seed), torch.zeros(OUT, IN).double()).norm()) for seed in (1, 2)]
    assert found.cosine(0, 1) == pytest.approx(norms[0] / math.hypot(*norms), rel=1e-12)
    assert found.cosine(0, 2) == 0
    assert not found.same(0, 1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_is_compared_as_its_own_delta_says(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TILE", 16)
    monkeypatch.setattr(side_by_side, "WINDOW", 40)
    for case in list(cases(kind))[::3]:
        target = Target("", "layer", "weight")
        siblings = {target.name: case.weight}
        full = Full(torch.randn(case.weight.shape, generator=case.generator))
        every = [case.delta, case.other, full]
        found = compared(*({target: delta} for delta in every), base=siblings, threads=1)
        if found.left_out:  # what reads more than this base has, or may be stored either way round
            assert all("does not have" in each.reason or "are stored" in each.reason for each in found.left_out)
            continue
        vectors = [delta.delta(case.weight) for delta in every]
        assert found.norms == pytest.approx([float(each.norm()) for each in vectors], rel=1e-6), case.name
        for one, other in found.pairs:
            assert found.cosine(one, other) == pytest.approx(angle(vectors[one], vectors[other]), abs=1e-6), case.name


def test_experts_count_however_their_matrices_are_stored() -> None:
    up, down = stack(1)
    other_up, other_down = stack(5)
    straight = compared(at(e=ExpertLoRA(up, down, 1.0, False)), at(e=ExpertLoRA(other_up, other_down, 1.0, False)))
    turned = compared(at(e=ExpertLoRA(up, down, 1.0, True)), at(e=ExpertLoRA(other_up, other_down, 1.0, True)))
    unsaid = compared(at(e=ExpertLoRA(up, down, 1.0, None)), at(e=ExpertLoRA(other_up, other_down, 1.0, None)))
    expected = angle(up.double() @ down.double(), other_up.double() @ other_down.double())
    for found in (straight, turned, unsaid):
        assert found.cosine(0, 1) == pytest.approx(expected, abs=1e-12)
    beside_full = compared(at(e=ExpertLoRA(up, down, 1.0, True)), at(e=Full((up @ down).mT.contiguous())))
    assert beside_full.cosine(0, 1) == pytest.approx(1.0, abs=1e-6)
    unknown = compared(at(e=ExpertLoRA(up, down, 1.0, None)), at(e=ExpertLoRA(up, down, 1.0, False)))
    assert unknown.cosine(0, 1) == pytest.approx(1.0)
    square = normal(3, 5, 2, seed=1), normal(3, 2, 5, seed=2)
    open_, said = (at(e=ExpertLoRA(*square, 1.0, transposed)) for transposed in (None, False))
    unsure = compared(open_, said)
    assert unsure.cosine(0, 1) is None
    assert unsure.left_out[0].reason == "nothing says which way round the matrices of a0 are stored"


def test_weights_multiply_changes() -> None:
    given, weights = mixed()
    plain, weighed = compared(*given, base=weights), compared(*given, factors=[2.0, -0.5, 1.0], base=weights)
    norms = [norm or 0.0 for norm in plain.norms]
    assert weighed.norms == pytest.approx([2 * norms[0], 0.5 * norms[1], norms[2]], rel=1e-10)
    assert weighed.cosine(0, 1) == pytest.approx(-(plain.cosine(0, 1) or 0), rel=1e-9)


def test_the_overlap_is_the_cosine_of_the_operators_with_all_targets_as_one_matrix() -> None:
    one, other = at(q=lora(1), v=lora(2, rank=2)), at(q=lora(3, rank=6), v=lora(4), k=lora(5))
    found = compared(one, other)
    zero = torch.zeros(OUT, IN).double()
    for space, operator in (("out", lambda d: d @ d.mT), ("in", lambda d: d.mT @ d)):
        a, b = (
            torch.block_diag(*(operator(dense(each.get(Target("", name, "weight")), zero)) for name in "qvk"))
            for each in (one, other)
        )
        assert found.overlap(0, 1, space) == pytest.approx(angle(a, b), rel=1e-9)  # type: ignore[arg-type]


def test_the_overlap_is_one_for_equal_directions_and_zero_for_orthogonal_spaces() -> None:
    up, down = torch.linalg.qr(normal(OUT, 8, seed=1)).Q, torch.linalg.qr(normal(IN, 8, seed=2)).Q.mT
    one, turned, apart = LoRA(up[:, :4], down[:4], 1.0), LoRA(up[:, :4], down[4:], 1.0), LoRA(up[:, 4:], down[4:], 1.0)
    found = compared(at(q=one), at(q=turned), at(q=apart))
    assert found.overlap(0, 1, "out") == pytest.approx(1.0)
    assert found.overlap(0, 1, "in") == pytest.approx(0.0, abs=1e-10)
    assert found.overlap(0, 2, "out") == pytest.approx(0.0, abs=1e-10)
    assert found.cosine(0, 1) == pytest.approx(0.0, abs=1e-6)


def test_chance_is_what_turned_directions_come_to_on_average() -> None:
    one, other = lora(1), lora(2, rank=2)
    generator = torch.Generator().manual_seed(0)
    overlaps = []
    for _ in range(400):
        turn = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator)).Q
        overlaps.append(
            compared(at(q=one), at(q=LoRA(turn @ other.up, other.down, 1.0)), threads=1).overlap(0, 1, "out")
        )
    mean = sum(each or 0.0 for each in overlaps) / len(overlaps)
    assert compared(at(q=one), at(q=other)).chance(0, 1, "out") == pytest.approx(mean, rel=0.05)


# ----------------------------------------------------------------------------------------------- sameness, gaps


def test_adapters_are_equal_within_the_tolerance_only() -> None:
    one = lora(1)
    folded = LoRA(one.up.double() * 2, one.down.double(), one.scale / 2)
    near = LoRA(one.up.double() * (1 + 1e-7), one.down.double(), one.scale)
    assert compared(at(q=one), at(q=folded), at(q=lora(1))).equal
    assert compared(at(q=one), at(q=near), tolerance=2e-7).equal
    assert not compared(at(q=one), at(q=near), tolerance=5e-8).equal
    assert compared(at(q=one), at(q=near)).difference(0, 1) == pytest.approx(1e-7, rel=1e-4)
    full = Full(dense(one, torch.zeros(OUT, IN).double()))
    assert compared(at(q=one), at(q=full), tolerance=1e-12).equal


def test_equal_tensors_are_equal_also_where_nobody_can_say_what_they_do() -> None:
    value = normal(5, seed=1)
    found = compared(at(head=Replace(value)), at(head=Replace(value.clone())))
    assert found.equal
    assert found.cosine(0, 1) is None
    assert not compared(at(head=Replace(value)), at(head=Replace(value + 1))).equal


def test_what_looks_at_the_weight_is_named_without_a_base_and_leaves_the_other_pairs_alone() -> None:
    dora = DoRA(*factors(5), 0.5, normal(OUT, seed=6).abs())
    found = compared(at(q=lora(1)), at(q=lora(2)), at(q=dora))
    assert found.cosine(0, 1) == pytest.approx(compared(at(q=lora(1)), at(q=lora(2))).cosine(0, 1))
    assert (found.cosine(0, 2), found.norms[2], found.difference(0, 2)) == (None, None, None)
    (left,) = found.left_out
    assert (left.target, left.adapters) == ("q.weight", ("a2",))
    assert left.reason == "a change of kind dora looks at the weight: name the base"
    weight = normal(OUT, IN, seed=9).double()
    based = compared(at(q=lora(1)), at(q=dora), base={"q.weight": weight})
    assert based.cosine(0, 1) == pytest.approx(angle(lora(1).delta(weight), dora.delta(weight)), abs=1e-9)
    elsewhere = compared(at(q=dora), at(q=lora(1)), base={})
    assert elsewhere.left_out[0].reason.endswith("the base has none of that name")


def test_changes_of_other_shapes_are_named_and_left_out_of_their_pairs() -> None:
    found = compared(at(q=lora(1), v=lora(2)), at(q=lora(3, inner=IN + 1), v=lora(4)), at(q=lora(5), v=lora(6)))
    (left,) = found.left_out
    assert left.adapters == ("a0", "a1")
    assert left.reason == (
        f"a0 changes a weight [{OUT}, {IN}], and a1 changes a weight [{OUT}, {IN + 1}]: they are for different bases"
    )
    zero = torch.zeros(OUT, IN).double()
    assert found.cosine(0, 1) == pytest.approx(angle(lora(2).delta(zero), lora(4).delta(zero)), abs=1e-9)
    assert found.cosine(0, 2) is not None


def test_the_document_holds_everything_and_is_the_same_for_any_number_of_threads() -> None:
    given, weights = mixed()
    documents = {
        json.dumps(compared(*given, base=weights, threads=threads).document(), allow_nan=False) for threads in (1, 2, 5)
    }
    assert len(documents) == 1
    document = json.loads(documents.pop())
    assert [row["target"] for row in document["rows"]] == ["conv.weight", "experts.weight", "q.weight", "v.weight"]
    assert document["cosines"][1][1] == 1.0
    assert document["cosines"][0][2] == document["cosines"][2][0]
    assert document["rows"][3]["kinds"] == ["lora", "full", ""]
    assert document["rows"][2]["overlaps_in"][0][2] is None  # a DoRA has no factors
    unknown = json.dumps(compared(*given).document(), allow_nan=False)
    assert '"norms": [' in unknown


# -------------------------------------------------------------------------------------------------------- memory


def test_nothing_of_the_size_of_the_weight_is_made_of_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TILE", 1 << 12)
    deltas = [lora(seed, out=700, inner=600) for seed in (1, 2, 3)]
    target = Target("", "q", "weight")
    with Watch() as watch:
        found = line_up(target, deltas, [1.0] * 3)
        target_row("q", ("lora",) * 3, found, deltas, [1.0] * 3)
    assert watch.largest <= 700 * 8
    with Watch() as watch:
        total = sum(tile.shape[1] for tile in tiles([each for each in found if isinstance(each, Side)]))
    assert total == 700 * 600
    assert watch.largest <= 3 * (1 << 12)


def test_a_full_difference_is_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TILE", 1 << 10)
    monkeypatch.setattr(side_by_side, "WINDOW", 1 << 12)
    full = Full(normal(700, 600, seed=1), 2.0)
    with Watch() as watch:
        (side,) = line_up(Target("", "q", "weight"), [full], [0.5])
        assert isinstance(side, Side)
        parts = [tile[0].clone() for tile in tiles([side])]
    assert torch.equal(torch.cat(parts), full.diff.double().flatten())
    assert watch.largest <= 1 << 13


# ----------------------------------------------------------------------------------------------------- subspaces


def strongest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, _, vh = torch.linalg.svd(matrix)
    return u[:, :rank], vh[:rank].mT


def overlaps(
    one: Mapping[Target, Delta], other: Mapping[Target, Delta], *, most: int = 16, threads: int = 2
) -> Subspaces:
    return subspaces(("a", "b"), one, other, most=most, threads=threads)


def test_phi_is_that_of_the_dense_singular_vectors_for_every_pair_of_counts() -> None:
    one, other = lora(1, rank=5), lora(2, rank=3)
    found = overlaps(at(q=one), at(q=other))
    zero = torch.zeros(OUT, IN).double()
    a, b = strongest(one.delta(zero), 5), strongest(other.delta(zero), 3)
    for space, left, right in (("out", a[0], b[0]), ("in", a[1], b[1])):
        grid = found.grids[space]  # type: ignore[index]
        assert (len(grid.phi), len(grid.phi[0])) == (5, 3)
        for i in range(1, 6):
            for j in range(1, 4):
                expected = float((left[:, :i].mT @ right[:, :j]).norm() ** 2) / min(i, j)
                assert grid.phi[i - 1][j - 1] == pytest.approx(expected, abs=1e-10)
                assert grid.chance[i - 1][j - 1] == pytest.approx(max(i, j) / (OUT if space == "out" else IN))


def test_phi_does_not_depend_on_how_a_change_is_factored() -> None:
    one, other = lora(1), lora(2)
    turn = normal(4, 4, seed=5).double()
    folded = LoRA(one.up.double() @ turn, torch.linalg.inv(turn) @ one.down.double(), one.scale)
    assert overlaps(at(q=one), at(q=other)).grids["in"].phi[2] == pytest.approx(
        overlaps(at(q=folded), at(q=other)).grids["in"].phi[2], abs=1e-9
    )


def test_phi_is_one_within_a_space_and_zero_across() -> None:
    up, down = torch.linalg.qr(normal(OUT, 8, seed=1)).Q, torch.linalg.qr(normal(IN, 8, seed=2)).Q.mT
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    one = LoRA(up[:, :4] * values, down[:4], 1.0)
    other = LoRA(up[:, :2] * values[:2], down[4:6], 1.0)
    grids = overlaps(at(q=one), at(q=other)).grids
    assert grids["out"].phi[1][1] == pytest.approx(1.0)
    assert grids["out"].phi[3][1] == pytest.approx(1.0)
    assert grids["out"].phi[0][1] == pytest.approx(1.0)
    assert grids["in"].phi[3][1] == pytest.approx(0.0, abs=1e-10)


def test_phi_is_averaged_over_the_targets_that_have_so_many_directions() -> None:
    pairs = {"q": (lora(1), lora(2)), "v": (lora(3, rank=2), lora(4))}
    found = overlaps(*(at(**{name: pair[side] for name, pair in pairs.items()}) for side in (0, 1)))
    single = {name: overlaps(at(q=pair[0]), at(q=pair[1])).grids["out"] for name, pair in pairs.items()}
    grid = found.grids["out"]
    assert grid.phi[1][3] == pytest.approx((single["q"].phi[1][3] + single["v"].phi[1][3]) / 2)
    assert grid.phi[3][3] == pytest.approx(single["q"].phi[3][3])
    assert (grid.counts[1][3], grid.counts[3][3]) == (2, 1)
    assert found.targets == ("q.weight", "v.weight")


def test_directions_are_limited_and_those_that_cancel_are_none() -> None:
    one = lora(1)
    doubled = LoRA(torch.cat([one.up, one.up], dim=1), torch.cat([one.down, one.down]), 1.0)
    found = overlaps(at(q=doubled), at(q=one))
    assert (len(found.grids["out"].phi), len(found.grids["out"].phi[0])) == (4, 4)
    limited = overlaps(at(q=doubled), at(q=one), most=3)
    assert len(limited.grids["out"].phi) == 3
    assert limited.grids["out"].phi[2] == pytest.approx(found.grids["out"].phi[2][:3])


def test_targets_without_factors_are_named_and_threads_do_not_count() -> None:
    one, other = at(q=lora(1), v=Full(normal(OUT, IN, seed=2)), k=lora(6)), at(q=lora(3), v=lora(4))
    found = overlaps(one, other)
    assert found.targets == ("q.weight",)
    assert [(each.target, each.adapters) for each in found.left_out] == [("v.weight", ("a",))]
    texts = {json.dumps(overlaps(one, other, threads=threads).document(), allow_nan=False) for threads in (1, 2, 5)}
    assert len(texts) == 1
    nothing = overlaps(at(q=lora(1)), at(v=lora(1)))
    assert nothing.targets == ()
    assert nothing.grids["in"].phi == ()


# ------------------------------------------------------------------------------------------------------ pictures


def test_the_picture_of_pairs_holds_every_number_twice_and_ones_in_between() -> None:
    found = compared(at(q=lora(1)), at(q=lora(2)), at(q=DoRA(*factors(5), 0.5)))
    picture = pair_map(found, "cosine")
    assert picture.values["a0", "a1"] == picture.values["a1", "a0"] == found.cosine(0, 1)
    assert picture.values["a0", "a0"] == 1
    assert ("a2", "a2") not in picture.values  # nobody knows what it does
    assert pair_map(found, "overlap-in").values["a0", "a1"] == found.overlap(0, 1, "in")
    assert "<svg" in svg(picture)


def test_the_picture_of_directions_and_the_one_of_targets_hold_their_numbers() -> None:
    one, other = at(**{"layers.0.q": lora(1), "layers.1.q": lora(2)}), at(**{"layers.0.q": lora(3)})
    grid = overlaps(one, other)
    picture = subspace_map(grid, "in")
    assert picture.values["2", "3"] == grid.grids["in"].phi[1][2]
    assert (picture.low, picture.high) == (0, 1)
    assert svg(picture) == svg(subspace_map(overlaps(one, other, threads=1), "in"))
    found = compared(one, other)
    drawn = target_map(found)
    assert list(drawn.values.values()) == pytest.approx([found.rows[0].gram[0][1] / math.prod(
        math.sqrt(found.rows[0].gram[each][each]) for each in (0, 1)
    )])  # fmt: skip


# ------------------------------------------------------------------------------------------------------- scripts


def test_names_are_as_short_as_they_can_be_and_still_differ() -> None:
    assert names_of(["./runs/ink", "./runs/oil"]) == ("ink", "oil")
    assert names_of(["./one/ink", "./two/ink"]) == ("one/ink", "two/ink")
    assert names_of(["./ink", "./ink", "./ink:0.5"]) == ("ink", "ink (2)", "ink (3)")
    assert names_of(["./ink", "./ink", "./ink (2)"]) == ("ink", "ink (2)", "ink (2) (2)")
    assert names_of(["./x/ink.safetensors", "./y/oil.safetensors"]) == ("ink", "oil")
    assert names_of(["mine=./x/ink", "acme/oil@1.2:0.3", "./oil"]) == ("mine", "oil@1.2", "oil")


def test_scripts_refuse_what_makes_no_sense() -> None:
    adapter = adapters.Adapter(deltas=at(q=lora(1)), record=None, parts={}, hints={})
    with pytest.raises(UsageError, match="1 adapter cannot be compared"):
        similarity([adapter])
    with pytest.raises(UsageError, match="3 weights for 2 adapters"):
        similarity([adapter, adapter], weights=[1, 2, 3])
    with pytest.raises(UsageError, match="makes no sense"):
        similarity([adapter, adapter], tolerance=-1)
    with pytest.raises(UsageError, match=r"no target .* is called 'q.weigth'. Did you mean 'q.weight'"):
        subspace_overlap(adapter, adapter, target="q.weigth")
    with pytest.raises(UsageError, match="0 directions are none"):
        subspace_overlap(adapter, adapter, directions=0)


def test_scripts_compare_open_adapters() -> None:
    one, other = (adapters.Adapter(deltas=at(q=lora(seed)), record=None, parts={}, hints={}) for seed in (1, 2))
    found = similarity([one, other, one], weights=[1, 1, -1])
    assert found.names == ("adapter 1", "adapter 2", "adapter 3")
    assert found.cosine(0, 2) == pytest.approx(-1)
    assert subspace_overlap(one, other, directions=2).grids["in"].phi[1][1] < 1
    report = interference([one, other])
    assert {show for show in SHOWS if show.startswith("subspace")} == {"subspace-out", "subspace-in"}
    assert conflict_map(report.signs).values["adapter 1", "adapter 2"] == report.signs.conflict(0, 1)


# -------------------------------------------------------------------------------------------------- real adapters


def test_real_adapters_are_as_alike_as_their_dense_changes(
    real_adapters: Path, registry: Registry, tmp_path: Path
) -> None:
    path = real_adapters / "huggingface__diffusers__sd_pokemon_docs"
    original = adapters.load(adapters.open_header(path, registry), registry)
    chosen = sorted(original.deltas, key=lambda target: target.name)[:12]
    given = [
        {target: original.deltas[target] for target in chosen},
        {target: shifted(original.deltas[target]) for target in chosen[4:]},
    ]
    found = compared(*given)
    vectors = [torch.cat([full(each.get(target), original.deltas[target]) for target in chosen]) for each in given]
    assert float(vectors[0].norm()) > 0
    assert found.norms == pytest.approx([float(each.norm()) for each in vectors], rel=1e-9)
    assert found.cosine(0, 1) == pytest.approx(angle(*vectors), abs=1e-9)
    assert 0.01 < abs(found.cosine(0, 1) or 0) < 0.99


def shifted(delta: Delta) -> Delta:
    """A change of other factors that keeps something of the first."""
    low = delta.low_rank()
    assert low is not None
    noise = torch.randn(low.up.shape, generator=torch.Generator().manual_seed(3)) * float(low.up.float().std())
    return LoRA(low.up.float() + noise, low.down.float(), low.scale)


def full(delta: Delta | None, beside: Delta) -> torch.Tensor:
    low = (delta or beside).low_rank()
    assert low is not None
    change = low.scale * (low.up.double() @ low.down.double())
    return (change if delta else torch.zeros_like(change)).flatten()
