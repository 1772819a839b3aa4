"""What adapters would do to each other in a sum, held against loops over every element; and the advice that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lorahub import adapter as adapters
from lorahub.bases.layout import Target
from lorahub.composition.analysis import interference as module
from lorahub.composition.analysis import side_by_side
from lorahub.composition.analysis import similarity as alike
from lorahub.composition.analysis.advice import Advice, Pair, advise, advise_all
from lorahub.composition.analysis.interference import Interference
from lorahub.composition.analysis.interference_report import InterferenceReport, balanced_weights, even_weights
from lorahub.composition.analysis.picturing import conflict_map
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.plugins import Registry

OUT, IN = 9, 7


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, *, rank: int = 3, out: int = OUT, inner: int = IN, scale: float = 0.5) -> LoRA:
    return LoRA(normal(out, rank, seed=seed), normal(rank, inner, seed=seed + 1000), scale)


def at(**deltas: Delta) -> dict[Target, Delta]:
    return {Target("", name, "weight"): delta for name, delta in deltas.items()}


def looked_at(
    *given: Mapping[Target, Delta],
    factors: Sequence[float] = (),
    base: Mapping[str, torch.Tensor] | None = None,
    threads: int = 2,
) -> Interference:
    return module.interference(
        [f"a{number}" for number in range(len(given))],
        given,
        factors=factors or [1.0] * len(given),
        threads=threads,
        base=None if base is None else lambda target: base.get(target.name),
    )


def reported(*given: Mapping[Target, Delta], factors: Sequence[float] = ()) -> InterferenceReport:
    names, factors = [f"a{number}" for number in range(len(given))], factors or [1.0] * len(given)
    found = alike.similarity(names, given, factors=factors, tolerance=1e-6, threads=1)
    return InterferenceReport(similarity=found, signs=looked_at(*given, factors=factors))


def elements(delta: Delta, *shape: int) -> list[float]:
    values: list[float] = delta.delta(torch.zeros(shape or (OUT, IN)).double()).flatten().tolist()
    return values


def by_hand(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(weighted conflict, plain share), in a loop."""
    opposite = whole = differ = count = 0.0
    for a, b in zip(one, other, strict=True):
        whole += abs(a * b)
        opposite += abs(a * b) if a * b < 0 else 0.0
        count += a != 0 and b != 0
        differ += a * b < 0
    return opposite / whole, differ / count


@pytest.mark.parametrize("tile", [5, 16, 1 << 16])
def test_every_element_is_looked_at_and_none_twice(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TILE", tile)
    monkeypatch.setattr(side_by_side, "WINDOW", 2 * tile)
    sparse = normal(OUT, IN, seed=9)
    sparse[sparse.abs() < 0.5] = 0
    given = [at(q=lora(1), v=lora(2)), at(q=lora(3, rank=2, scale=-1.0), v=Full(sparse)), at(v=lora(5), k=lora(6))]
    found = looked_at(*given)
    values = {
        (number, name): elements(delta)
        for number, each in enumerate(given)
        for name in "qv"
        if (delta := each.get(Target("", name, "weight")))
    }
    joined = {number: values.get((number, "q"), [0.0] * OUT * IN) + values[number, "v"] for number in range(3)}
    for one, other in ((0, 1), (0, 2), (1, 2)):
        conflict, count = by_hand(joined[one], joined[other])
        assert found.conflict(one, other) == pytest.approx(conflict, abs=1e-10)
        assert found.count(one, other) == pytest.approx(count, abs=1e-12)
    whole = left = 0.0
    for name, members in (("q", (0, 1)), ("v", (0, 1, 2))):
        for several in zip(*(values[number, name] for number in members), strict=True):
            whole += sum(map(abs, several))
            left += abs(sum(several))
    assert found.cancelled == pytest.approx(1 - left / whole, abs=1e-12)
    assert found.elements == 2 * OUT * IN


def test_experts_and_changes_that_look_at_the_weight_are_looked_at_too() -> None:
    up, down = normal(2, 5, 3, seed=1), normal(2, 3, 4, seed=2)
    experts, whole = ExpertLoRA(up, down, 1.5, True), Full(normal(2, 4, 5, seed=3))
    conflict, count = by_hand(elements(experts, 2, 4, 5), elements(whole, 2, 4, 5))
    found = looked_at(at(e=experts), at(e=whole))
    assert (found.conflict(0, 1), found.count(0, 1)) == (pytest.approx(conflict), pytest.approx(count))
    weight = normal(OUT, IN, seed=4).double()
    dora = DoRA(lora(1).up, lora(1).down, 0.5, normal(OUT, seed=5).abs())
    conflict, _ = by_hand(dora.delta(weight).flatten().tolist(), elements(lora(2)))
    based = looked_at(at(q=dora), at(q=lora(2)), base={"q.weight": weight})
    assert based.conflict(0, 1) == pytest.approx(conflict, abs=1e-9)
    assert looked_at(at(q=dora), at(q=lora(2))).conflict(0, 1) is None


def test_equal_changes_have_no_conflict_and_opposite_ones_nothing_else() -> None:
    one = lora(1)
    same = looked_at(at(q=one), at(q=one))
    assert (same.conflict(0, 1), same.count(0, 1), same.cancelled) == (0, 0, pytest.approx(0, abs=1e-15))
    against = looked_at(at(q=one), at(q=one), factors=[1.0, -1.0])
    assert (against.conflict(0, 1), against.count(0, 1), against.cancelled) == (1, 1, 1)


def test_independent_changes_conflict_in_half_and_lose_what_is_expected() -> None:
    given = [at(q=lora(seed, out=400, inner=300, rank=32)) for seed in (1, 2, 3)]
    found = looked_at(*given)
    assert found.conflict(0, 1) == pytest.approx(0.5, abs=0.01)
    assert found.expected == pytest.approx(1 - 1 / math.sqrt(3), abs=0.01)
    assert found.cancelled == pytest.approx(found.expected, abs=0.01)


def test_changes_of_other_shapes_and_unshared_targets_are_no_part_of_it() -> None:
    found = looked_at(at(q=lora(1), v=lora(2)), at(q=lora(3, inner=IN + 1)), at(k=lora(4)))
    assert found.rows == ()
    assert (found.cancelled, found.expected, found.elements) == (None, None, 0)
    apart = looked_at(at(q=lora(1)), at(q=lora(3, inner=IN + 1)), at(q=lora(4)))
    assert apart.conflict(0, 1) is None
    assert apart.conflict(0, 2) == pytest.approx(by_hand(elements(lora(1)), elements(lora(4)))[0])


def test_the_report_is_the_same_for_any_number_of_threads() -> None:
    given = [at(**{name: lora(10 * seed + at_) for at_, name in enumerate("qkvo")}) for seed in (1, 2, 3)]
    texts = {
        json.dumps([row.document() for row in looked_at(*given, threads=threads).rows], allow_nan=False)
        for threads in (1, 2, 5)
    }
    assert len(texts) == 1
    document = json.loads(json.dumps(reported(*given).document(), allow_nan=False))
    assert [pair["adapters"] for pair in document["pairs"]] == [["a0", "a1"], ["a0", "a2"], ["a1", "a2"]]
    assert document["targets"][0]["conflicts"][0][1] == document["targets"][0]["conflicts"][1][0]
    assert document["elements"] == 4 * OUT * IN
    picture = conflict_map(looked_at(*given))
    assert picture.values["a1", "a2"] == document["pairs"][2]["conflict"]
    assert ("a1", "a1") not in picture.values


# -------------------------------------------------------------------------------------------------------- advice


def pair(**numbers: object) -> Pair:
    known: dict[str, object] = {
        "names": ("ink", "oil"),
        "shared": 10,
        "same": False,
        "cosine": 0.02,
        "overlap_out": 0.03,
        "overlap_in": 0.02,
        "chance_out": 0.01,
        "chance_in": 0.01,
        "conflict": 0.49,
        "count": 0.5,
        "norms": (1.0, 1.2),
    }
    return Pair(**(known | numbers))  # type: ignore[arg-type]


RULES: tuple[tuple[str, dict[str, object]], ...] = (
    ("near-orthogonal", {}),
    ("near-orthogonal", {"overlap_out": None, "overlap_in": None, "chance_out": None, "chance_in": None}),
    ("near-orthogonal", {"overlap_out": 0.9}),  # they write to the same directions, and read from others
    ("near-orthogonal", {"overlap_out": 0.3, "overlap_in": 0.3, "chance_out": 0.25, "chance_in": 0.25}),
    ("same-subspace", {"overlap_out": 0.4, "overlap_in": 0.3}),
    ("same-direction", {"cosine": 0.7, "conflict": 0.2, "overlap_out": 0.8, "overlap_in": 0.8}),
    ("partly-alike", {"cosine": 0.3, "conflict": 0.35}),
    ("opposite-signs", {"cosine": -0.2, "conflict": 0.62}),
    ("opposite-directions", {"cosine": -0.15, "conflict": 0.52}),
    ("other-targets", {"shared": 0, "cosine": 0.0, "conflict": None}),
    ("nothing-known", {"cosine": None, "conflict": None}),
    ("same-change", {"cosine": 1.0, "same": True, "conflict": 0.0}),
)


@pytest.mark.parametrize(("code", "numbers"), RULES)
def test_advice_follows_the_numbers_and_says_them(code: str, numbers: dict[str, object]) -> None:
    (advice,) = advise(pair(**numbers))
    assert advice.code == code
    cosine = numbers.get("cosine", 0.02)
    if code not in ("other-targets", "nothing-known", "same-change"):
        assert f"cosine {cosine:.2f}" in advice.words
    if code == "opposite-signs":
        assert "opposite signs 62%" in advice.words


def test_norms_that_are_far_apart_are_advised_on_besides() -> None:
    found = advise(pair(norms=(1.0, 12.0)))
    assert [each.code for each in found] == ["near-orthogonal", "norms-apart"]
    assert found[1].methods[0] == "nuslerp"
    assert "oil has 12.0 times the norm of ink" in found[1].words
    assert len(advise(pair(norms=(1.0, 12.0), shared=0))) == 1


def test_all_methods_that_are_advised_exist(registry: Registry) -> None:
    every = [advice for _, numbers in RULES for advice in advise(pair(**numbers))]
    every += advise(pair(norms=(1.0, 12.0)))
    every += [over for _, numbers in RULES if (over := advise_all([pair(**numbers)]))]
    named = {method for advice in every for method in advice.methods}
    assert {"linear", "cat", "ties", "dare_ties", "slerp", "karcher", "nuslerp", "knots"} <= named
    assert named <= registry.methods.keys()
    for advice in every:
        assert all(method in advice.words for method in advice.methods), advice


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (["near-orthogonal", "near-orthogonal", "other-targets"], "near-orthogonal"),
        (["near-orthogonal", "opposite-signs"], "opposite-signs"),
        (["same-direction", "same-direction"], "same-direction"),
        (["same-direction", "near-orthogonal"], "groups"),
        (["same-direction", "same-subspace"], "same-subspace"),
        (["other-targets"], "other-targets"),
    ],
)
def test_the_pair_that_asks_for_most_care_decides_for_all(codes: list[str], expected: str) -> None:
    numbers = dict(reversed(RULES))
    found = advise_all([pair(**numbers[code]) for code in codes])
    assert found is not None
    assert found.code == expected


def test_there_is_no_advice_where_nothing_is_known() -> None:
    assert advise_all([pair(cosine=None)]) is None
    assert advise_all([pair(same=True)]) is None


def test_balanced_weights_bring_each_change_out_at_its_own_strength() -> None:
    common, other = lora(3, rank=2), lora(4, rank=2)
    one, mixed = (
        LoRA(torch.cat([each.up, common.up], dim=1), torch.cat([each.down, common.down]), 0.5)
        for each in (lora(1, rank=2), lora(2, rank=2))
    )
    found = reported(at(q=one), at(q=mixed), at(v=other))
    weights = balanced_weights(found.similarity)
    assert weights is not None
    vectors = [
        torch.tensor(elements(one) + [0.0] * OUT * IN),
        torch.tensor(elements(mixed) + [0.0] * OUT * IN),
        torch.tensor([0.0] * OUT * IN + elements(other)),
    ]
    total = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    assert isinstance(total, torch.Tensor)
    for vector in vectors:
        assert float(total @ vector) == pytest.approx(float(vector @ vector), rel=1e-5)
    assert weights[2] == pytest.approx(1.0)
    assert weights[0] < 0.9


def test_weights_that_are_no_help_are_not_given() -> None:
    one = lora(1)
    equal = reported(at(q=one), at(q=one))
    assert balanced_weights(equal.similarity) == pytest.approx((0.5, 0.5))
    assert balanced_weights(reported(at(q=one), at(q=one), factors=[1.0, -1.0]).similarity) is None
    assert even_weights(reported(at(q=one), at(q=one), factors=[1.0, -4.0]).similarity) == pytest.approx((2.0, -2.0))
    nothing = LoRA(torch.zeros(OUT, 1), torch.ones(1, IN), 1.0)
    assert even_weights(reported(at(q=one), at(q=nothing)).similarity) is None


def test_advice_knows_real_relations() -> None:
    generator = torch.Generator().manual_seed(3)

    def code(*given: Mapping[Target, Delta]) -> list[str]:
        return [advice.code for advice in advise(reported(*given).pairs[0])]

    one = lora(1, out=200, inner=150)
    noisy = LoRA(one.up + 0.2 * torch.randn(one.up.shape, generator=generator), one.down, one.scale)
    turned = LoRA(one.up @ torch.linalg.qr(normal(3, 3, seed=4)).Q, one.down, one.scale)
    assert code(at(q=one), at(q=noisy)) == ["same-direction"]
    two = reported(at(q=one), at(q=noisy)).advice
    assert two is not None
    assert "slerp" in two.methods
    three = reported(at(q=one), at(q=noisy), at(q=one)).advice
    assert three is not None
    assert "slerp" not in three.methods
    assert code(at(q=one), at(q=lora(2, out=200, inner=150))) == ["near-orthogonal"]
    assert code(at(q=one), at(v=one)) == ["other-targets"]
    assert code(at(q=one), at(q=LoRA(noisy.up, noisy.down, -0.5))) == ["opposite-signs"]
    permuted = LoRA(one.up[:, [1, 2, 0]], one.down, one.scale)
    cosine = reported(at(q=one), at(q=permuted)).pairs[0].cosine
    assert cosine is not None
    assert abs(cosine) < 0.1
    assert code(at(q=one), at(q=permuted)) == ["same-subspace"]
    assert isinstance(advise(reported(at(q=one), at(q=turned)).pairs[0])[0], Advice)


# -------------------------------------------------------------------------------------------------- real adapters


def test_real_adapters_conflict_as_their_dense_changes_do(real_adapters: Path, registry: Registry) -> None:
    path = real_adapters / "huggingface__diffusers__sd_pokemon_docs"
    original = adapters.load(adapters.open_header(path, registry), registry)
    chosen = sorted(original.deltas, key=lambda target: target.name)[:3]
    one = {target: original.deltas[target] for target in chosen}
    other: dict[Target, Delta] = {}
    dense = []
    for number, target in enumerate(chosen):
        low = one[target].low_rank()
        assert low is not None
        noise = normal(*low.up.shape, seed=number) * float(low.up.float().std())
        other[target] = LoRA(low.up.float() + noise, low.down.float(), low.scale)
        dense.append([scale * (up.double() @ low.down.double()) for up, scale in (
            (low.up, low.scale), (low.up.float() + noise, low.scale)
        )])  # fmt: skip
    a, b = (torch.cat([pair[side].flatten() for pair in dense]) for side in (0, 1))
    assert float(a.norm()) > 0
    products = a * b
    expected = float(-products[products < 0].sum() / products.abs().sum())
    found = looked_at(one, other)
    assert found.conflict(0, 1) == pytest.approx(expected, abs=1e-9)
    assert 0.05 < expected < 0.45
    assert found.cancelled == pytest.approx(float(1 - (a + b).abs().sum() / (a.abs() + b.abs()).sum()), abs=1e-9)
