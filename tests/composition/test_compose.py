"""``lorahub.compose``: what people ask for, what comes of it, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from composition.composed import IN, OUT, Model, dense, same, save_base, write

import lorahub
from lorahub import Adapter
from lorahub.bases.layout import Target
from lorahub.composing.asked import requested
from lorahub.composing.job import prepare_composition
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.lora import LoRA
from lorahub.deltas.oft import Turn
from lorahub.errors import (
    BaseMismatch,
    BaseNeeded,
    CannotCarry,
    Degraded,
    RecipeError,
    UnsupportedKind,
    UsageError,
    WriteFailed,
)
from lorahub.files.tensors import FileSource
from lorahub.recipe import Recipe


@pytest.fixture
def pair(tmp_path: Path) -> Mapping[str, Path]:
    return {
        "ink": write(tmp_path / "ink", 1),
        "sql": write(tmp_path / "sql", 2, r=3, names=("q", "k"), use_rslora=True),
    }


def test_the_sum_is_exact_over_ranks_signs_scales_and_targets(pair: Mapping[str, Path]) -> None:
    mix = lorahub.compose(pair, weights=[0.7, -0.3])
    ink, sql = (lorahub.load(folder) for folder in pair.values())
    assert len(mix.deltas) == 6
    for target in mix.deltas:
        wanted = 0.7 * dense(ink, target) - 0.3 * dense(sql, target)
        assert same(dense(mix, target), wanted)
    q = Target("", "layers.0.q", "weight")
    assert not same(dense(mix, q), 0.7 * dense(ink, q), 1e-2)


def test_what_is_written_is_what_is_returned_and_carries_its_recipe(pair: Mapping[str, Path], tmp_path: Path) -> None:
    mix = lorahub.compose(pair, weights={"sql": 0.5}, rank=3, out=tmp_path / "mix")
    again = lorahub.load(tmp_path / "mix")
    assert all(torch.equal(dense(mix, target), dense(again, target)) for target in mix.deltas)
    assert mix.report.energy < 1
    record = again.record
    assert record is not None
    assert record.recipe is not None
    assert [(parent.ref, parent.weight) for parent in record.parents] == [("ink", 1.0), ("sql", 0.5)]
    assert all(parent.digest for parent in record.parents)
    assert record.recipe.method == "linear"
    assert record.recipe.params == {"rank": 3}
    assert str(tmp_path) not in (tmp_path / "mix" / "lorahub.json").read_text()
    recipe = Recipe.from_text(record.recipe.text)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    third = lorahub.compose(tmp_path / "recipe.toml", out=tmp_path / "third")
    assert (tmp_path / "third" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "mix" / "adapter_model.safetensors"
    ).read_bytes()
    assert third.record is not None
    assert third.record.recipe == record.recipe


def test_sums_of_open_adapters_are_lazy_and_merge_in_one_rounding(pair: Mapping[str, Path]) -> None:
    ink, sql = (lorahub.load(folder) for folder in pair.values())
    together, named = Model(), Model()
    lorahub.merge(together, 0.7 * ink - 2 * sql / 4 + sum([ink, ink]) * 0.1)
    lorahub.merge(named, {"ink": ink, "sql": sql}, weights=[0.7 + 2 * 0.1, -0.5])
    assert all(torch.equal(one, other) for one, other in zip(together.parameters(), named.parameters(), strict=True))
    assert not torch.equal(together.get_parameter("layers.0.q.weight"), Model().get_parameter("layers.0.q.weight"))
    mix = lorahub.compose(-(ink - sql))
    q = Target("", "layers.1.q", "weight")
    assert same(dense(mix, q), dense(sql, q) - dense(ink, q))


def test_a_composed_adapter_merges_as_its_parents_do_and_lives_without_a_folder(pair: Mapping[str, Path]) -> None:
    mix = lorahub.compose(pair, weights=[0.7, -0.3])
    one, other = Model().double(), Model().double()
    lorahub.merge(one, {"mix": mix})
    lorahub.merge(other, pair, weights=[0.7, -0.3])
    changed = [
        (new.detach(), old.detach(), before.detach())
        for new, old, before in zip(one.parameters(), other.parameters(), Model().double().parameters(), strict=True)
        if not torch.equal(old, before)
    ]
    assert len(changed) == 6
    assert all(same(new - before, old - before) for new, old, before in changed)
    home = Path(mix.report.out)
    assert home.is_dir()
    del mix
    gc.collect()
    assert not home.exists()


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(pair: Mapping[str, Path], tmp_path: Path) -> None:
    def made(name: str, **fields: object) -> bytes:
        lorahub.compose(pair, method="dare_ties", density=0.4, rank=4, out=tmp_path / name, **fields)  # type: ignore[arg-type]
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = made("first", seed=3, threads=1)
    assert made("second", seed=3, threads=4) == first
    assert made("third", seed=4, threads=1) != first


def test_what_an_adapter_draws_does_not_depend_on_the_others(pair: Mapping[str, Path], tmp_path: Path) -> None:
    third = write(tmp_path / "third", 3, names=("v",))
    few, many = (
        lorahub.compose(given, weights=weights, method="dare_linear", density=0.5, rank=IN)
        for given, weights in ((pair, (1, 1)), ({"other": third, **pair}, (0, 1, 1)))
    )
    assert all(same(dense(many, target), dense(few, target)) for target in few.deltas)


def test_weights_go_by_depth_and_pattern(pair: Mapping[str, Path]) -> None:
    document: dict[str, Any] = {
        "adapters": [
            {"ref": str(pair["ink"]), "weight": {"gradient": [0.2, 0.6]}},
            {"ref": str(pair["sql"]), "weight": [{"filter": "*.k", "value": 2.0, "count": 2}, {"value": 0.0}]},
        ]
    }
    mix = lorahub.compose(Recipe.from_document(document))
    ink, sql = (lorahub.load(folder) for folder in pair.values())
    for layer, share in ((0, 0.2), (1, 0.6)):
        q, k = (Target("", f"layers.{layer}.{name}", "weight") for name in "qk")
        assert same(dense(mix, q), share * dense(ink, q))
        assert same(dense(mix, k), 2.0 * dense(sql, k))
    rules = {"ink": {"gradient": [0.2, 0.6]}, "sql": ({"filter": "*.k", "value": 2.0}, {"value": 0.0})}
    named = lorahub.compose(pair, weights=rules)
    assert all(torch.equal(dense(named, target), dense(mix, target)) for target in mix.deltas)
    document["adapters"][1]["weight"] = [{"filter": "*.nothing", "value": 2.0}, {"value": 0.0}]
    with pytest.raises(RecipeError, match=r"\*\.nothing"):
        lorahub.compose(Recipe.from_document(document))


def test_an_adapter_counts_at_its_weight_also_where_it_changes_nothing(pair: Mapping[str, Path]) -> None:
    mix = lorahub.compose(pair, weights=[1, 3], normalize=True)
    ink, sql = (lorahub.load(folder) for folder in pair.values())
    v, k = Target("", "layers.0.v", "weight"), Target("", "layers.0.k", "weight")
    assert same(dense(mix, v), dense(ink, v) / 4)
    assert same(dense(mix, k), dense(sql, k) * 3 / 4)


def test_sixteen_bit_factors_come_out_exact_and_as_asked(tmp_path: Path) -> None:
    pair = [write(tmp_path / name, seed, dtype=torch.bfloat16) for seed, name in enumerate("ab")]
    ink, sql = (lorahub.load(folder) for folder in pair)
    q = Target("", "layers.0.q", "weight")
    exact = lorahub.compose(pair, weights=[0.3, 0.9])
    assert same(dense(exact, q), 0.3 * dense(ink, q) + 0.9 * dense(sql, q))
    rounded = lorahub.compose(pair, weights=[0.3, 0.9], dtype="bfloat16")
    assert {tensor.dtype for delta in rounded.deltas.values() for tensor in delta.tensors().values()} == {
        torch.bfloat16
    }
    wanted = 0.3 * dense(ink, q) + 0.9 * dense(sql, q)
    lost = float((dense(rounded, q) - wanted).norm() / wanted.norm())
    (row,) = (row for row in rounded.report.rows if row.target == q.name)
    assert row.error is not None
    assert 1e-4 < lost <= row.error * (1 + 1e-9)


def test_a_budget_for_all_targets_goes_where_it_keeps_most(pair: Mapping[str, Path]) -> None:
    mix = lorahub.compose(pair, weights=[1, 0.05], max_parameters=9 * (OUT + IN))
    ranks = {row.target: row.rank or 0 for row in mix.report.rows}
    assert sum(ranks.values()) <= 9
    assert ranks["layers.0.q.weight"] > ranks["layers.0.k.weight"]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_dora_is_refused_linearised_or_taken_at_its_base(pair: Mapping[str, Path], tmp_path: Path) -> None:
    dora = write(tmp_path / "dora", 5, dora=True)
    with pytest.raises(UnsupportedKind, match=r"layers\.0\.q\.weight: a change of kind dora"):
        lorahub.compose({**pair, "dora": dora})
    plain = lorahub.compose({"dora": dora}, non_additive="linearise")
    loaded = lorahub.load(dora)
    q = Target("", "layers.0.q", "weight")
    inside = loaded.deltas[q]
    assert isinstance(inside, DoRA)
    assert inside.magnitude is not None
    assert same(dense(plain, q), inside.scale * (inside.up.double() @ inside.down.double()))
    assert any("lengths" in note for row in plain.report.rows for note in row.notes)
    with pytest.raises(BaseNeeded, match="depends on the base"):
        lorahub.compose({"dora": dora}, non_additive="dense")
    base = save_base(tmp_path / "base")
    taken = lorahub.compose({"dora": dora}, non_additive="dense", base=str(base), rank=16, allow=["base-unrecorded"])
    weight = Model().get_parameter("layers.0.q.weight").detach().double()
    v = weight + inside.scale * (inside.up.double() @ inside.down.double())
    wanted = inside.magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True) - weight
    assert same(dense(taken, q), wanted, 1e-5)


def test_new_heads_are_shared_averaged_or_taken_as_differences_from_a_base(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    one, other = (torch.randn(3, OUT, generator=generator) for _ in range(2))
    a, b, c = (write(tmp_path / name, 1, head=value) for name, value in (("a", one), ("b", one), ("c", other)))

    def head(*given: Path, **fields: Any) -> torch.Tensor:
        value = lorahub.compose(given, **fields).deltas[Target("", "head", "weight")].replacement()
        assert value is not None
        return value

    assert torch.equal(head(a, b, weights=[0.7, 0.6]), one)
    assert torch.equal(head(a, c, weights=[1, 0], method="ties"), one)
    assert same(head(a, c, weights=[0.8, 0.2]).double(), 0.8 * one.double() + 0.2 * other.double())
    with pytest.raises(BaseNeeded, match=r"head\.weight"):
        head(a, c)
    assert torch.equal(head(a, b, weights=[0.5, 0.5], method="slerp", scope="adapter"), one)
    base = str(save_base(tmp_path / "base"))
    before = Model().head.weight.detach().double()
    wanted = before + 0.7 * (one.double() - before) + 0.2 * (other.double() - before)
    assert same(head(a, c, weights=[0.7, 0.2], base=base).double(), wanted)


def test_adapters_that_name_the_same_modules_in_other_parts_are_told_apart(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", 1)
    lorahub.convert(plain, "diffusers", tmp_path / "unet", component="unet")
    with pytest.raises(Degraded, match="the components are none and unet"):
        lorahub.compose([plain, tmp_path / "unet"])


def test_adapters_of_different_bases_and_shapes_are_refused(pair: Mapping[str, Path], tmp_path: Path) -> None:
    named = [write(tmp_path / name, 1, base_model_name_or_path=f"acme/{name}") for name in ("one", "two")]
    with pytest.raises(Degraded, match="different bases"):
        lorahub.compose(named)
    assert lorahub.compose(named, allow=["bases-differ"]).report.findings
    wide = write(tmp_path / "wide", 4, shape=(OUT, IN + 2))
    with pytest.raises(BaseMismatch, match=r"layers\.0\.q\.weight.*\[24, 16\] and \[24, 18\]"):
        lorahub.compose({**pair, "wide": wide})


def test_a_part_whose_modules_lie_one_level_deeper_is_found(tmp_path: Path) -> None:
    shallow, deep = write(tmp_path / "shallow", 1), write(tmp_path / "deep", 2, root="text_model.")
    with pytest.raises(Degraded, match=r"layers\.0\.q\.weight and text_model\.layers\.0\.q\.weight"):
        lorahub.compose([shallow, deep])
    assert lorahub.compose([shallow, write(tmp_path / "k", 3, names=("k",))]).report.findings


def test_any_file_name_does_for_an_adapter(tmp_path: Path) -> None:
    write(tmp_path / "2024 ink!", 1)
    (tmp_path / "mix.toml").write_text('[[adapters]]\nref = "./2024 ink!"\n')
    mix = lorahub.compose(tmp_path / "mix.toml")
    assert mix.record is not None
    assert mix.record.recipe is not None
    assert Recipe.from_text(mix.record.recipe.text).adapters[0].ref == "./a2024-ink-"


def test_what_has_no_factors_says_that_a_rank_makes_some(pair: Mapping[str, Path], tmp_path: Path) -> None:
    dora = write(tmp_path / "dora", 5, dora=True)
    fields: dict[str, Any] = {
        "non_additive": "dense",
        "base": save_base(tmp_path / "base"),
        "allow": ["base-unrecorded"],
    }
    with pytest.raises(CannotCarry) as caught:
        lorahub.compose({"dora": dora}, **fields)
    assert "--rank" in caught.value.hint
    assert lorahub.compose({"dora": dora}, rank=IN, **fields).report.energy > 0.999


def test_what_one_format_cannot_hold_is_offered_in_those_that_can(tmp_path: Path) -> None:
    low = LoRA(torch.randn(IN, 2), torch.randn(2, IN), 1.0)
    one = Adapter(deltas={Target("unet", "mid.to_q", "weight"): low})
    change = torch.randn(IN)
    norm = Adapter(deltas={Target("unet", "mid.norm", "weight"): Full(change)})
    allow = ["base-unrecorded"]
    for layout in ("diffusers", "peft"):
        with pytest.raises(CannotCarry) as caught:
            lorahub.compose({"one": one, "norm": norm}, format=layout, allow=allow)
        assert caught.value.hint.endswith("--format kohya")
    made = lorahub.compose({"one": one, "norm": norm}, format="kohya", allow=allow)
    (kept,) = (delta for delta in made.deltas.values() if isinstance(delta, Full))
    assert torch.equal(kept.diff, change)
    gain = Adapter(deltas={Target("", "mid.q", "weight"): Gain(torch.rand(IN, 1) + 0.5, 0)})
    turn = Adapter(deltas={Target("", "mid.v", "weight"): Turn(torch.randn(IN // 4, 6), (2.0,))})
    with pytest.raises(CannotCarry, match="of one kind") as caught:
        lorahub.compose({"gain": gain, "turn": turn}, method="product", allow=allow)
    assert "--format" not in caught.value.hint
    assert "side by side" in caught.value.hint


def test_a_request_that_makes_no_sense_is_refused_before_anything_is_written(
    pair: Mapping[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="3 weights for 2"):
        lorahub.compose(pair, weights=[1, 2, 3], out=out)
    with pytest.raises(UsageError, match="were not given: inc"):
        lorahub.compose(pair, weights={"inc": 1}, out=out)
    with pytest.raises(UsageError, match="Did you mean 'ties'"):
        lorahub.compose(pair, method="tie", out=out)
    with pytest.raises(UsageError, match="Did you mean 'density'"):
        lorahub.compose(pair, method="ties", densty=0.4, out=out)
    with pytest.raises(RecipeError, match="weight"):
        lorahub.compose(pair, weights=[float("nan"), 1], out=out)
    with pytest.raises(UsageError, match="no adapter was given"):
        lorahub.compose([], out=out)
    with pytest.raises(UsageError, match="every weight is 0"):
        lorahub.compose(pair, weights=[0, 0], out=out)
    with pytest.raises(UsageError, match="is a folder, and a recipe a file"):
        lorahub.compose(str(pair["ink"]), out=out)
    with pytest.raises(UsageError, match="a Combination is no adapter"):
        lorahub.compose([2 * lorahub.load(pair["ink"])], out=out)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="takes 2 adapters"):
        lorahub.compose([*pair.values(), pair["ink"]], method="slerp", out=out)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(WriteFailed, match="exists"):
        lorahub.compose(pair, out=out)
    assert [*out.iterdir()] == [out / "mine"]


def test_a_recipe_says_all_of_it(pair: Mapping[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.inline([str(pair["ink"])])
    with pytest.raises(UsageError, match="rank was given beside it"):
        lorahub.compose(recipe, rank=2)


# ------------------------------------------------------------------------------------------------- plan and checkpoint


def test_the_plan_tells_targets_ranks_and_weights_from_headers(pair: Mapping[str, Path]) -> None:
    outline = prepare_composition(requested(pair, [0.7, 0.3], rank=5)).outline()
    mix = lorahub.compose(pair, weights=[0.7, 0.3], rank=5)
    assert [(line.target, line.ranks, line.rank) for line in outline.lines] == [
        (row.target, row.ranks, row.rank) for row in mix.report.rows
    ]
    assert outline.lines[0].shape == (OUT, IN)
    assert outline.flops > 0
    assert outline.peak_bytes(2) > mix.report.bytes_written / 2


@pytest.mark.parametrize("fields", [{}, {"method": "ties", "parameters": {"density": 0.5}, "rank": 6}], ids=str)
def test_a_checkpoint_holds_what_the_adapters_come_to(
    pair: Mapping[str, Path], tmp_path: Path, fields: Mapping[str, object]
) -> None:
    base = save_base(tmp_path / "base")
    document = {
        "base": str(base),
        "output": "checkpoint",
        "allow": ["base-unrecorded"],
        **fields,
        "adapters": [{"ref": str(folder), "weight": 0.6} for folder in pair.values()],
    }
    recipe = Recipe.from_document(document)
    report = lorahub.compose.checkpoint(recipe, tmp_path / "merged")
    assert ("change-cut" in {finding.code for finding in report.findings}) == bool(fields)
    mix = lorahub.compose(recipe.changed(output="adapter"))
    before = dict(Model().named_parameters())
    with FileSource(tmp_path / "merged" / "model.safetensors") as merged:
        for target in mix.deltas:
            weight = before[target.name].detach().double()
            found = merged.read(target.name).double() - weight
            assert same(found, dense(mix, target), 1e-5)
    with pytest.raises(UsageError, match="makes a checkpoint"):
        lorahub.compose(recipe)
