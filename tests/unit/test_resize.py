"""Factors cut to other ranks: held against dense SVDs of the products, and PEFT loading the result."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import NotFinite, UnsupportedKind, UsageError
from lorahub.files.writer import save_file

WIDTH, HIDDEN, RANK = 24, 40, 12
FILE = "adapter_model.safetensors"


def lora(out: int, inner: int, *k: int, seed: int, rank: int = RANK, scale: float = 0.5) -> LoRA:
    """Factors whose singular values fall by half or so from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    fall = 0.6 ** torch.arange(rank)
    up = torch.randn(out, rank, generator=generator) * fall
    down = torch.randn(rank, inner, *k, generator=generator)
    return LoRA(up.reshape(out, rank, *(1 for _ in k)), down, scale)


def write(folder: Path, deltas: dict[str, Delta], *, format: str = "peft", **hints: Any) -> Path:  # noqa: A002
    targets = {Target("", name.rpartition(".")[0], name.rpartition(".")[2]): delta for name, delta in deltas.items()}
    return lorahub.save(Adapter(deltas=targets, hints=hints), folder, format=format)


def deltas_of(folder: Path) -> dict[str, Delta]:
    return {target.name: delta for target, delta in lorahub.load(folder).deltas.items()}


def product(delta: Delta) -> torch.Tensor:
    assert isinstance(delta, LoRA)
    return delta.scale * delta.up.flatten(1).double() @ delta.down.flatten(1).double()


def values(delta: Delta) -> list[float]:
    return [float(value) for value in torch.linalg.svdvals(product(delta))[:RANK]]


def lost(values_of_change: list[float], rank: int) -> float:
    squares = [value**2 for value in values_of_change]
    return math.sqrt(sum(squares[rank:]) / sum(squares))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def deltas() -> dict[str, Delta]:
    return {
        "a.q.weight": lora(HIDDEN, WIDTH, seed=1),
        "a.v.weight": lora(WIDTH, HIDDEN, seed=2, scale=2.0),
        "b.conv.weight": lora(HIDDEN, 8, 3, 3, seed=3),
    }


@pytest.fixture
def adapter(tmp_path: Path, deltas: dict[str, Delta]) -> Path:
    return write(tmp_path / "ink", deltas)


def test_a_rank_keeps_the_best_there_is(adapter: Path, deltas: dict[str, Delta], tmp_path: Path) -> None:
    report = lorahub.resize(adapter, tmp_path / "out", rank=5)
    found = deltas_of(tmp_path / "out")
    assert found.keys() == deltas.keys()
    for row in report.rows:
        before, after = deltas[row.target], found[row.target]
        assert isinstance(before, LoRA)
        assert isinstance(after, LoRA)
        assert (row.before, row.rank, after.scale) == (RANK, 5, before.scale)
        assert after.down.shape == (5, *before.down.shape[1:])
        assert after.up.shape == (before.up.shape[0], 5, *before.up.shape[2:])
        error = float((product(after) - product(before)).norm() / product(before).norm())
        assert error == pytest.approx(lost(values(before), 5), rel=1e-4)
        assert error <= (row.error or 0) <= error + 1e-6
        assert row.norm == pytest.approx(float(product(before).norm()), rel=1e-9)
    assert lost(values(deltas["a.q.weight"]), 5) > 1e-2
    total = math.sqrt(sum(row.norm**2 for row in report.rows))
    assert report.error == pytest.approx(
        math.sqrt(sum(((row.error or 0) * row.norm) ** 2 for row in report.rows)) / total
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, WIDTH)
        self.q = nn.Linear(WIDTH, HIDDEN)
        self.conv = nn.Conv1d(HIDDEN, WIDTH, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.conv(self.q(self.embed(tokens)).transpose(1, 2))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q": 5}, "rank_pattern": {"q": 10}}])
def test_peft_loads_the_result_and_computes_the_truncated_change(config: dict[str, Any], tmp_path: Path) -> None:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        wanted = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["embed", "q", "conv"], **config)
        trained = peft.get_peft_model(copy.deepcopy(model), wanted)
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    trained.save_pretrained(tmp_path / "ink")
    lorahub.resize(tmp_path / "ink", tmp_path / "out", rank=3)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    assert {len(part) for name, part in loaded.named_parameters() if ".lora_A." in name} == {3}
    by_hand, original, found = copy.deepcopy(model), trained.merge_and_unload(), loaded.merge_and_unload()
    for name in ("embed.weight", "q.weight", "conv.weight"):
        before = model.get_parameter(name).detach()
        change = (original.get_parameter(name).detach() - before).double()
        u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
        best = (u[:, :3] * s[:3] @ vh[:3]).reshape(change.shape)
        assert float(change.norm() / before.norm()) > 1e-2
        assert float((best - change).norm() / change.norm()) > 1e-2
        by_hand.get_parameter(name).data.add_(best.float())
        assert torch.allclose(found.get_parameter(name), by_hand.get_parameter(name), atol=2e-5)


def test_a_target_whose_rank_would_not_fall_keeps_its_bits(adapter: Path, tmp_path: Path) -> None:
    before = load_file(adapter / FILE)
    report = lorahub.resize(adapter, tmp_path / "out", rank=RANK)
    assert {row.way for row in report.rows} == {"kept"}
    assert report.error == 0
    after = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()


RULES: dict[str, tuple[float, Callable[[list[float]], int]]] = {
    "sv_ratio": (20.0, lambda s: sum(1 for value in s if value >= s[0] / 20)),
    "sv_fro": (
        0.95,
        lambda s: next(k for k in range(1, RANK + 1) if sum(v * v for v in s[:k]) >= 0.95**2 * sum(v * v for v in s)),
    ),
    "sv_cumulative": (0.8, lambda s: next(k for k in range(1, RANK + 1) if sum(s[:k]) >= 0.8 * sum(s))),
    "energy": (0.97, lambda s: next(k for k in range(1, RANK + 1) if lost(s, k) ** 2 <= 0.03)),
    "error": (0.1, lambda s: next(k for k in range(1, RANK + 1) if lost(s, k) <= 0.1)),
}


@pytest.mark.parametrize("rule", RULES)
def test_dynamic_ranks_follow_their_rule(rule: str, adapter: Path, deltas: dict[str, Delta], tmp_path: Path) -> None:
    value, expected = RULES[rule]
    report = lorahub.resize(adapter, tmp_path / "out", **{rule: value})  # type: ignore[arg-type]
    ranks = {row.target: row.rank for row in report.rows}
    assert ranks == {name: expected(values(delta)) for name, delta in deltas.items()}
    assert 1 < min(rank or 0 for rank in ranks.values()) < RANK
    bounded = lorahub.resize(adapter, tmp_path / "bounded", rank=2, **{rule: value})  # type: ignore[arg-type]
    assert bounded.ranks == (2,)


def test_a_common_budget_takes_the_largest_singular_values_wherever_they_are(
    adapter: Path, deltas: dict[str, Delta], tmp_path: Path
) -> None:
    report = lorahub.resize(adapter, tmp_path / "out", error=0.1, adaptive=True)
    every = sorted((value for delta in deltas.values() for value in values(delta)), reverse=True)
    total = sum(value**2 for value in every)
    fewest = next(k for k in range(len(every)) if sum(value**2 for value in every[k:]) <= 0.01 * total)
    assert sum(row.rank or 0 for row in report.rows) == fewest
    level = every[fewest - 1]
    assert {row.target: row.rank or 0 for row in report.rows} == {
        name: sum(1 for value in values(delta) if value >= level * (1 - 1e-9)) for name, delta in deltas.items()
    }
    assert report.error == pytest.approx(math.sqrt(sum(value**2 for value in every[fewest:]) / total), rel=1e-4)


def test_a_target_that_gets_nothing_of_a_common_budget_is_left_out_and_named(tmp_path: Path) -> None:
    faint = lora(HIDDEN, WIDTH, seed=4, scale=1e-6)
    adapter = write(tmp_path / "ink", {"a.q.weight": lora(HIDDEN, WIDTH, seed=1), "a.k.weight": faint})
    report = lorahub.resize(adapter, tmp_path / "out", error=0.05, adaptive=True)
    assert {row.target: row.way for row in report.rows} == {"a.k.weight": "dropped", "a.q.weight": "factors"}
    assert deltas_of(tmp_path / "out").keys() == {"a.q.weight"}


def test_parameters_are_a_budget_for_all(adapter: Path, tmp_path: Path) -> None:
    report = lorahub.resize(adapter, tmp_path / "out", parameters=700)
    stored = load_file(tmp_path / "out" / FILE)
    assert 700 - HIDDEN - 72 < sum(tensor.numel() for tensor in stored.values()) <= 700
    assert report.ranks


def test_factors_can_be_stored_narrower_and_the_error_says_so(
    adapter: Path, deltas: dict[str, Delta], tmp_path: Path
) -> None:
    report = lorahub.resize(adapter, tmp_path / "out", rank=5, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / FILE).values()} == {torch.bfloat16}
    for row in report.rows:
        before, after = product(deltas[row.target]), product(deltas_of(tmp_path / "out")[row.target])
        error = float((after - before).norm() / before.norm())
        assert lost(values(deltas[row.target]), 5) < error <= (row.error or 0)


def test_other_kinds_are_kept_bit_for_bit_and_named(tmp_path: Path) -> None:
    bias = {"a.q.bias": Full(torch.randn(HIDDEN), 0.5)}
    adapter = write(tmp_path / "ink", {"a.q.weight": lora(HIDDEN, WIDTH, seed=1), **bias})
    report = lorahub.resize(adapter, tmp_path / "out", rank=3)
    (finding,) = [finding for finding in report.findings if finding.code == "not-resized"]
    assert finding.where == ("a.q.bias",)
    kept = deltas_of(tmp_path / "out")["a.q.bias"]
    assert isinstance(kept, Full)
    assert torch.equal(kept.diff, bias["a.q.bias"].diff)
    assert {row.target: row.way for row in report.rows} == {"a.q.bias": "kept", "a.q.weight": "factors"}


def test_a_stack_of_experts_is_cut_expert_by_expert(tmp_path: Path) -> None:
    every = [lora(20, 16, seed=seed, rank=8, scale=1.5) for seed in range(3)]
    stacked = ExpertLoRA(torch.stack([each.up for each in every]), torch.stack([each.down for each in every]), 1.5)
    adapter = write(tmp_path / "ink", {"mlp.experts.up": stacked})
    report = lorahub.resize(adapter, tmp_path / "out", rank=3)
    (row,) = report.rows
    after = deltas_of(tmp_path / "out")["mlp.experts.up"]
    assert isinstance(after, ExpertLoRA)
    assert (row.rank, after.scale, tuple(after.down.shape)) == (3, 1.5, (3, 3, 16))
    squares = [[value**2 for value in values(each)] for each in every]
    expected = math.sqrt(sum(sum(each[3:]) for each in squares) / sum(map(sum, squares)))
    change = 1.5 * (after.up.double() @ after.down.double()) - torch.stack([product(each) for each in every])
    before = torch.stack([product(each) for each in every])
    assert float(change.norm() / before.norm()) == pytest.approx(expected, rel=1e-4)
    assert row.error == pytest.approx(expected, rel=1e-4)
    common = lorahub.resize(adapter, tmp_path / "common", error=expected * 1.01, adaptive=True)
    assert common.ranks == (3,)


def test_an_adapter_without_lora_is_refused_by_name(tmp_path: Path) -> None:
    made = lora(HIDDEN, WIDTH, seed=1)
    adapter = write(tmp_path / "ink", {"a.q.weight": DoRA(made.up, made.down, made.scale, torch.ones(HIDDEN), 0)})
    with pytest.raises(UnsupportedKind, match="this adapter is dora"):
        lorahub.resize(adapter, tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()


def test_a_kohya_file_stays_one(tmp_path: Path) -> None:
    before = lora(HIDDEN, WIDTH, seed=1)
    stem = "lora_unet_mid_block_attentions_0_to_q"
    tensors = {
        f"{stem}.lora_up.weight": before.up,
        f"{stem}.lora_down.weight": before.down,
        f"{stem}.alpha": torch.tensor(0.5 * RANK),
    }
    (tmp_path / "ink").mkdir()
    save_file(tmp_path / "ink" / "ink.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    lorahub.resize(tmp_path / "ink" / "ink.safetensors", tmp_path / "out", rank=4)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(file)
    assert stored.keys() == tensors.keys()
    assert float(stored[f"{stem}.alpha"]) == 0.5 * 4
    after = 0.5 * stored[f"{stem}.lora_up.weight"].double() @ stored[f"{stem}.lora_down.weight"].double()
    error = float((after - product(before)).norm() / product(before).norm())
    assert error == pytest.approx(lost(values(before), 4), rel=1e-4)


def test_the_record_goes_along_without_its_version(adapter: Path, tmp_path: Path) -> None:
    lorahub.record(adapter, name="acme/ink", license="mit", version="1.2.0", trigger_words=["ink"])
    lorahub.resize(adapter, tmp_path / "out", energy=0.9, rank=6)
    record = json.loads((tmp_path / "out" / "lorahub.json").read_text())
    assert (record["license"], record["trigger_words"]) == ("mit", ["ink"])
    assert "version" not in record
    assert record["recipe"]["method"] == "resize"
    assert record["recipe"]["params"] == {"energy": 0.9, "rank": 6}
    assert record["parents"][0]["ref"] == "acme/ink@1.2.0"
    assert record["parents"][0]["digest"].startswith("sha256:")


def test_the_bytes_do_not_depend_on_threads(adapter: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        lorahub.resize(adapter, tmp_path / str(threads), error=0.1, adaptive=True, threads=threads)
    assert (tmp_path / "1" / FILE).read_bytes() == (tmp_path / "3" / FILE).read_bytes()


def test_infinite_factors_are_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / FILE)
    next(iter(tensors.values())).view(-1)[0] = math.inf
    save_file(adapter / FILE, tensors, {"format": "pt"})
    with pytest.raises(NotFinite):
        lorahub.resize(adapter, tmp_path / "out", rank=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": -1},
        {"sv_fro": 1.2},
        {"sv_fro": 0.9, "energy": 0.9},
        {"sv_ratio": 20.0, "adaptive": True},
        {"parameters": 0},
        {"rank": 2, "dtype": "int4"},
    ],
)
def test_a_request_that_means_nothing_is_refused(wrong: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        lorahub.resize(adapter, tmp_path / "out", **wrong)
