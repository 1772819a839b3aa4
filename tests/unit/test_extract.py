"""Tuned minus base as an adapter: held against dense SVDs, the tuned weights, and PEFT loading the result."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorahub
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.composition.algebra.truncate import Budget
from lorahub.composition.reducing import extract as extraction
from lorahub.composition.reducing.pairing import Way, pair
from lorahub.errors import BaseMismatch, CannotCarry, Degraded, NotFinite, UsageError, WriteFailed
from lorahub.files.dtypes import from_torch
from lorahub.files.shards import encode_index
from lorahub.files.tensors import open_weights
from lorahub.files.writer import save_file

Tensors = dict[str, torch.Tensor]
WIDTH, HIDDEN, WORDS = 32, 48, 40

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`:UserWarning",
)


class Net(nn.Module):
    """One of everything: an embedding, linear layers with and without a bias, a convolution, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.patch = nn.Conv2d(1, 24, (3, 5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        x = x + self.down(torch.relu(self.up(x)))
        x = self.conv(x.transpose(1, 2))
        return self.patch(x[:, None]).flatten(1)


TOKENS = torch.arange(12).reshape(1, 12) * 3


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def tune(model: Any, *, rank: int = 3, noise: float = 1e-3, seed: int = 1) -> Any:
    """A copy whose matrices moved by something of a rank, and a little in every direction; vectors moved too."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            flat = parameter.view(parameter.shape[0], -1)
            moved = torch.randn(flat.shape, generator=generator) * noise
            if parameter.dim() > 1:
                moved += 0.03 * (
                    torch.randn(len(flat), rank, generator=generator)
                    @ torch.randn(rank, flat.shape[1], generator=generator)
                )
            else:
                moved += 0.05
            flat.add_(moved)
    return tuned


def best(matrix: torch.Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    return math.sqrt(float(squares[rank:].sum() / squares.sum()))


def write(folder: Path, tensors: Tensors, *, shards: int = 1, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    names = ["model.safetensors"] if shards == 1 else [f"model-{n}-of-{shards}.safetensors" for n in range(shards)]
    where = {name: names[number % shards] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file(folder / file, {name: tensors[name] for name in sorted(tensors) if where[name] == file})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_bytes(encode_index(where, 0))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> Tensors:
    with open_weights(folder) as source:
        return {name: source.read(name) for name in source.names()}


def matrices(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (40, 32), "k": (24, 32), "v": (32, 24)}
    tensors = {
        f"layers.{layer}.{name}.weight": torch.randn(*size, generator=generator) * 0.05
        for layer in range(2)
        for name, size in sizes.items()
    }
    tensors["norm.weight"] = torch.ones(32)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def moved(tensors: Tensors, *, rank: int = 4, seed: int = 7, noise: float = 1e-4) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2:
            return tensor + 0.1
        out, inner = tensor.shape
        low = torch.randn(out, rank, generator=generator) @ torch.randn(rank, inner, generator=generator) * 0.01
        return (tensor.float() + low + noise * torch.randn(out, inner, generator=generator)).to(tensor.dtype)

    return {name: change(tensor) for name, tensor in tensors.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", matrices())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write(tmp_path / "tuned", moved(matrices()), shards=3)


# ------------------------------------------------------------------------------------------- the result, used


def peft_output(model: Any, folder: Path, call: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    import peft

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    with torch.no_grad():
        return call(loaded)


def test_peft_loads_the_result_and_computes_what_the_tuned_model_computes(tmp_path: Path) -> None:
    model = seeded(Net)
    tuned = tune(model, noise=0.0)
    report = lorahub.extract(tuned, model, tmp_path / "out", rank=3)
    with torch.no_grad():
        before, after = model(TOKENS), tuned(TOKENS)
    assert float((before - after).norm() / after.norm()) > 1e-2
    found = peft_output(model, tmp_path / "out", lambda loaded: loaded(TOKENS))
    assert float((found - after).norm() / after.norm()) < 1e-5
    assert report.error < 1e-5
    assert {row.target: row.way for row in report.rows} == {
        "conv.bias": "whole",
        "conv.weight": "factors",
        "down.weight": "factors",
        "embed.weight": "factors",
        "norm.bias": "whole",
        "norm.weight": "whole",
        "patch.bias": "whole",
        "patch.weight": "factors",
        "up.bias": "whole",
        "up.weight": "factors",
    }


@pytest.mark.plugin("transformers")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_a_transformers_checkpoint_comes_back_through_peft_and_through_merging(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    size = (
        {"n_embd": 32} if family == "gpt2" else {"d_model": 32, "d_ff": 48} if family == "t5" else {"hidden_size": 32}
    )
    model = tiny_model(family, tie_word_embeddings=False, **size) if family == "llama" else tiny_model(family, **size)
    tuned = tune(model, noise=0.0)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, leave_out=_shared(family))
    if family != "t5":  # its encoder and decoder share one embedding, left out here
        call = {"input_ids": TOKENS}
        with torch.no_grad():
            before, after = model(**call)[0], tuned(**call)[0]
        assert float((before - after).norm() / after.norm()) > 1e-2
        found = peft_output(model, tmp_path / "out", lambda loaded: loaded(**call)[0])
        assert float((found - after).norm() / after.norm()) < 1e-4
    lorahub.merge(tmp_path / "base", [tmp_path / "out"], out=tmp_path / "merged")
    merged, wanted = read(tmp_path / "merged"), read(tmp_path / "tuned")
    left = {name for name in wanted if name.startswith("shared")}
    assert all(torch.allclose(merged[name], wanted[name], atol=2e-6) for name in wanted.keys() - left)


def _shared(family: str) -> list[str]:
    return ["shared.weight"] if family == "t5" else []


@pytest.mark.plugin("transformers")
def test_a_tied_embedding_becomes_a_change_of_every_name_it_has(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("gpt2", n_embd=32)
    tuned = tune(model, noise=0.0)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3)
    names = {target.name for target in lorahub.load(tmp_path / "out").deltas}
    assert {"transformer.wte.weight", "lm_head.weight"} <= names


@pytest.mark.plugin("transformers")
def test_an_embedding_with_three_names_is_refused_by_name(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("t5", d_model=32, d_ff=48)
    tune(model).save_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CannotCarry, match=r"shared\.weight \[50, 32\]: it is tied to") as refused:
        lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3)
    assert "--leave-out" in refused.value.hint
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- how close the result is


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_merging_the_result_gives_the_tuned_weights_within_the_stated_error(
    rank: int, base: Path, tuned: Path, tmp_path: Path
) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=rank)
    lorahub.merge(base, [tmp_path / "out"], out=tmp_path / "merged", allow=["base-undeclared"])
    before, after, merged = read(base), read(tuned), read(tmp_path / "merged")
    assert len(report.rows) == 7
    for row in report.rows:
        change = after[row.target].double() - before[row.target].double()
        lost = float((merged[row.target].double() - after[row.target].double()).norm() / change.norm())
        assert row.error is not None
        rounding = 2**-24 * float(after[row.target].double().norm() / change.norm())
        assert lost <= row.error + rounding
        assert row.norm == pytest.approx(float(change.norm()), rel=1e-5)
        assert row.relative == pytest.approx(float(change.norm() / before[row.target].double().norm()), rel=1e-5)
        if row.way == "factors":
            assert row.rank == rank
            assert row.error == pytest.approx(best(change, rank), rel=1e-4, abs=1e-6)
    changes = {row.target: after[row.target].double() - before[row.target].double() for row in report.rows}
    total = math.sqrt(sum(float(change.norm()) ** 2 for change in changes.values()))
    lost = math.sqrt(sum((best(changes[row.target], rank) * row.norm) ** 2 for row in report.rows if row.rank))
    assert report.error == pytest.approx(lost / total, rel=1e-3)


@pytest.mark.parametrize("asked", [{"error": 0.05}, {"energy": 0.9}])
def test_a_quality_is_met_by_the_smallest_rank_of_each_parameter(
    asked: dict[str, float], base: Path, tuned: Path, tmp_path: Path
) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", **asked)  # type: ignore[arg-type]
    before, after = read(base), read(tuned)
    limit = asked.get("error") or math.sqrt(1 - asked["energy"])
    ranks = {row.target: row.rank for row in report.rows if row.rank}
    assert len(ranks) == 6
    for name, rank in ranks.items():
        change = after[name] - before[name]
        assert best(change, rank) <= limit < best(change, rank - 1)


def test_water_filling_takes_fewer_singular_values_than_the_same_error_everywhere(tmp_path: Path) -> None:
    tensors = matrices()
    after = moved(tensors, rank=4, noise=2e-3)
    after["layers.0.q.weight"] = tensors["layers.0.q.weight"] + 8 * (
        after["layers.0.q.weight"] - tensors["layers.0.q.weight"]
    )
    base, tuned = write(tmp_path / "base", tensors), write(tmp_path / "tuned", after)
    each = lorahub.extract(tuned, base, tmp_path / "each", error=0.2)
    shared = lorahub.extract(tuned, base, tmp_path / "shared", error=0.2, adaptive=True)

    def spent(report: Any) -> int:
        return sum(row.rank or 0 for row in report.rows)

    changes = {name: after[name].double() - tensors[name].double() for name in tensors if tensors[name].dim() > 1}
    squares = sorted(float(s) ** 2 for change in changes.values() for s in torch.linalg.svdvals(change))
    total, lost, dropped = sum(squares), 0.0, 0
    while lost + squares[dropped] <= 0.04 * total:
        lost += squares[dropped]
        dropped += 1
    assert spent(shared) == len(squares) - dropped < spent(each)
    factored = [row for row in shared.rows if row.way in ("factors", "dropped")]
    error = math.sqrt(sum((row.error or 0) ** 2 * row.norm**2 for row in factored) / total)
    assert error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    names = {target.name for target in lorahub.load(tmp_path / "shared").deltas}
    assert names == {row.target for row in shared.rows if row.way in ("factors", "whole")}


def test_a_bound_on_ranks_that_does_not_bind_changes_nothing_but_rounding(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    free = lorahub.extract(tuned, base, tmp_path / "free", error=0.02, adaptive=True)
    bounded = lorahub.extract(tuned, base, tmp_path / "bounded", error=0.02, adaptive=True, rank=13)
    assert {row.target: row.rank for row in free.rows} == {row.target: row.rank for row in bounded.rows}
    assert free.error == pytest.approx(bounded.error, rel=1e-5)
    one, other = (read(tmp_path / name / "adapter_model.safetensors") for name in ("free", "bounded"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_quality_that_the_rank_forbids_is_reported(adaptive: bool, base: Path, tuned: Path, tmp_path: Path) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", error=0.1, rank=2, adaptive=adaptive)
    (finding,) = [finding for finding in report.findings if finding.code == "budget-unmet"]
    assert len(finding.where) == 6
    assert "0.1 was asked for" in finding.message
    met = lorahub.extract(tuned, base, tmp_path / "met", error=0.1, rank=8, adaptive=adaptive)
    assert "budget-unmet" not in {finding.code for finding in met.findings}


def test_a_number_of_parameters_is_not_exceeded(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", parameters=600)
    spent = sum(sum(row.shape) * (row.rank or 0) for row in report.rows)
    assert 600 - 72 < spent <= 600


def test_sixteen_bit_factors_state_their_rounding(base: Path, tuned: Path, tmp_path: Path) -> None:
    wide = lorahub.extract(tuned, base, tmp_path / "wide", rank=4)
    narrow = lorahub.extract(tuned, base, tmp_path / "narrow", rank=4, dtype="bfloat16")
    assert {tensor.dtype for name, tensor in read(tmp_path / "narrow" / "adapter_model.safetensors").items()} == {
        torch.bfloat16,
        torch.float32,
    }
    lorahub.merge(base, [tmp_path / "narrow"], out=tmp_path / "merged")
    before, after, merged = read(base), read(tuned), read(tmp_path / "merged")
    for one, other in zip(wide.rows, narrow.rows, strict=True):
        if not one.rank:
            continue
        change = after[one.target].double() - before[one.target].double()
        lost = float((merged[one.target].double() - after[one.target].double()).norm() / change.norm())
        assert (one.error or 0) < lost <= (other.error or 0) < (one.error or 0) + 2**-7


def test_bfloat16_checkpoints_are_subtracted_in_float32(tmp_path: Path) -> None:
    tensors = matrices(dtype=torch.bfloat16)
    after = moved(tensors, noise=0.0)
    base, tuned = write(tmp_path / "base", tensors), write(tmp_path / "tuned", after)
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=5)
    for row in report.rows:
        if row.rank:
            change = after[row.target].double() - tensors[row.target].double()
            assert row.error == pytest.approx(best(change, 5), rel=1e-4)


# ---------------------------------------------------------------------------------- what is kept, left, refused


def test_equal_parameters_are_skipped_and_equal_checkpoints_refused(base: Path, tmp_path: Path) -> None:
    after = matrices()
    after["layers.0.q.weight"] = moved(after)["layers.0.q.weight"]
    report = lorahub.extract(write(tmp_path / "tuned", after), base, tmp_path / "out", rank=4)
    assert report.count("equal") == 6
    assert [target.name for target in lorahub.load(tmp_path / "out").deltas] == ["layers.0.q.weight"]
    with pytest.raises(UsageError, match="hold the same weights"):
        lorahub.extract(base, base, tmp_path / "nothing", rank=4)
    assert not (tmp_path / "nothing").exists()


def test_a_matrix_that_factors_would_not_make_smaller_is_kept_whole(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=14)
    ways = {row.target: (row.way, row.rank) for row in report.rows}
    assert ways["layers.0.k.weight"] == ("whole", None)
    assert ways["layers.0.q.weight"] == ("factors", 14)
    lorahub.merge(base, [tmp_path / "out"], out=tmp_path / "merged")
    assert torch.equal(read(tmp_path / "merged")["layers.0.k.weight"], read(tuned)["layers.0.k.weight"])


def test_an_embedding_that_no_plugin_knows_can_be_named(tmp_path: Path) -> None:
    model = seeded(Net)
    tuned = tune(model, noise=0.0)
    states = {
        name: {key: value.clone() for key, value in each.state_dict().items()}
        for name, each in (("base", model), ("tuned", tuned))
    }
    for name, state in states.items():
        write(tmp_path / name, state)
    report = lorahub.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, embedding=["embed.weight"], whole=["conv.*"]
    )
    assert "--embedding" in next(each.remedy for each in report.findings if each.code == "base-undeclared")
    with torch.no_grad():
        after = tuned(TOKENS)
    found = peft_output(model, tmp_path / "out", lambda loaded: loaded(TOKENS))
    assert float((found - after).norm() / after.norm()) < 1e-5


def test_patterns_keep_parameters_whole_or_leave_them_out(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=4, whole=["*.v.weight"], leave_out=["*.1.*", "norm*"])
    ways = {row.target: row.way for row in report.rows}
    assert ways["layers.0.v.weight"] == "whole"
    assert [ways[name] for name in ("layers.1.q.weight", "layers.1.v.weight", "norm.weight")] == ["left out"] * 3
    with pytest.raises(UsageError, match="no parameter is called"):
        lorahub.extract(tuned, base, tmp_path / "again", rank=4, whole=["nothing.*"])


def test_a_changed_vocabulary_is_refused_by_name_until_somebody_decides(base: Path, tmp_path: Path) -> None:
    after = moved(matrices())
    after["layers.0.v.weight"] = torch.randn(34, 24)
    tuned = write(tmp_path / "tuned", after)
    with pytest.raises(BaseMismatch, match="changed their shape") as refused:
        lorahub.extract(tuned, base, tmp_path / "out", rank=4)
    assert refused.value.findings[0].where == ("layers.0.v.weight [32, 24] -> [34, 24]",)
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=4, whole=["layers.0.v.weight"])
    assert {row.target: row.way for row in report.rows}["layers.0.v.weight"] == "whole"
    kept = {target.name: delta for target, delta in lorahub.load(tmp_path / "out").deltas.items()}
    assert torch.equal(kept["layers.0.v.weight"].tensors()["value"], after["layers.0.v.weight"])
    lorahub.extract(tuned, base, tmp_path / "without", rank=4, leave_out=["layers.0.v.weight"])


def test_a_stack_of_experts_must_be_equal_or_be_decided_on(tmp_path: Path) -> None:
    stack = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(3))
    tensors = matrices() | {"mlp.experts.up": stack}
    base = write(tmp_path / "base", tensors)
    same = moved(matrices()) | {"mlp.experts.up": stack}
    report = lorahub.extract(write(tmp_path / "same", same), base, tmp_path / "out", rank=4)
    assert {row.target: row.way for row in report.rows}["mlp.experts.up"] == "equal"
    other = write(tmp_path / "other", same | {"mlp.experts.up": stack + 1})
    with pytest.raises(CannotCarry, match=r"mlp\.experts\.up \[3, 8, 16\]: it is a stack of matrices"):
        lorahub.extract(other, base, tmp_path / "refused", rank=4)
    lorahub.extract(other, base, tmp_path / "whole", rank=4, whole=["mlp.experts.*"])
    kept = {target.name: delta for target, delta in lorahub.load(tmp_path / "whole").deltas.items()}
    assert torch.equal(kept["mlp.experts.up"].tensors()["value"], stack + 1)


class Mixture(nn.Module):
    """Experts as one parameter, whose matrices are [in, out] where they are said to be transposed."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed=transposed)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.experts(x))


class Experts(nn.Module):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn((3, WIDTH, 24) if transposed else (3, 24, WIDTH)) * 0.1)
        self.down = nn.Parameter(torch.randn((3, 24, WIDTH) if transposed else (3, WIDTH, 24)) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return ((x @ up) @ down).sum(0)


def tuned_mixture(model: Any, ranks: tuple[int, ...]) -> Any:
    """A copy in which every expert moved by a rank of its own."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for stack in (tuned.experts.up, tuned.experts.down):
            for expert, rank in enumerate(ranks):
                left = torch.randn(stack.shape[1], rank, generator=generator)
                stack[expert] += 0.05 * left @ torch.randn(rank, stack.shape[2], generator=generator)
        tuned.out.weight += 0.05 * torch.randn(WIDTH, 1, generator=generator)
    return tuned


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_get_factors_each_and_peft_loads_them(transposed: bool, tmp_path: Path) -> None:
    model = seeded(lambda: Mixture(transposed=transposed))
    tuned, x = tuned_mixture(model, (1, 3, 2)), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4))
    report = lorahub.extract(tuned, model, tmp_path / "out", rank=3)
    assert {row.target: (row.way, row.rank) for row in report.rows if row.way != "equal"} == {
        "experts.down": ("factors", 3),
        "experts.up": ("factors", 3),
        "out.weight": ("factors", 1),
    }
    assert report.error < 1e-5
    with torch.no_grad():
        before, after = model(x), tuned(x)
    assert float((before - after).norm() / after.norm()) > 1e-2
    found = peft_output(model, tmp_path / "out", lambda loaded: loaded(x))
    assert float((found - after).norm() / after.norm()) < 1e-5


def test_a_stack_loses_what_its_experts_lose(tmp_path: Path) -> None:
    model = seeded(lambda: Mixture(transposed=False))
    tuned = tuned_mixture(model, (6, 8, 7))
    report = lorahub.extract(tuned, model, tmp_path / "out", rank=4)
    shared = lorahub.extract(tuned, model, tmp_path / "shared", error=0.2, adaptive=True)
    for row in report.rows[:2]:
        change = (tuned.get_parameter(row.target) - model.get_parameter(row.target)).detach().double()
        squares = torch.linalg.svdvals(change) ** 2
        assert row.error == pytest.approx(math.sqrt(float(squares[:, 4:].sum() / squares.sum())), rel=1e-4)
        assert row.norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert 0.1 < shared.error <= 0.2


def test_integers_must_be_equal(base: Path, tmp_path: Path) -> None:
    codes = {"layers.0.g.weight": torch.arange(12, dtype=torch.uint8).reshape(3, 4)}
    base = write(tmp_path / "coded", matrices() | codes)
    tuned = write(tmp_path / "tuned", moved(matrices()) | {name: code + 1 for name, code in codes.items()})
    with pytest.raises(CannotCarry, match="stored as U8"):
        lorahub.extract(tuned, base, tmp_path / "out", rank=4)
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=4, whole=["*.g.weight"])
    assert {row.target: row.way for row in report.rows}["layers.0.g.weight"] == "whole"


def test_checkpoints_of_different_dtypes_are_subtracted_as_numbers(tmp_path: Path) -> None:
    tensors = matrices(dtype=torch.bfloat16)
    base = write(tmp_path / "base", tensors)
    same = {name: tensor.float() for name, tensor in tensors.items()}
    after = same | {"layers.0.q.weight": moved(same)["layers.0.q.weight"]}
    report = lorahub.extract(write(tmp_path / "tuned", after), base, tmp_path / "out", rank=4)
    assert report.count("equal") == 6
    change = after["layers.0.q.weight"].double() - tensors["layers.0.q.weight"].double()
    assert next(row.error for row in report.rows if row.rank) == pytest.approx(best(change, 4), rel=1e-3)


def test_a_parameter_that_the_tuned_checkpoint_lacks_is_refused_unless_allowed(base: Path, tmp_path: Path) -> None:
    after = moved(matrices())
    del after["norm.weight"]
    tuned = write(tmp_path / "tuned", after)
    with pytest.raises(Degraded, match=r"base-parameter-missing.*norm\.weight") as refused:
        lorahub.extract(tuned, base, tmp_path / "out", rank=4)
    assert "--allow base-parameter-missing" in refused.value.hint
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=4, allow=["base-parameter-missing"])
    assert report.count("left out") == 1


def test_a_new_parameter_is_kept_whole_and_named(base: Path, tmp_path: Path) -> None:
    tuned = write(tmp_path / "tuned", moved(matrices()) | {"score.weight": torch.randn(2, 32)})
    report = lorahub.extract(tuned, base, tmp_path / "out", rank=4)
    assert [finding.where for finding in report.findings if finding.code == "parameter-new"] == [("score.weight",)]
    assert "score.weight" in {target.name for target in lorahub.load(tmp_path / "out").deltas}


@pytest.mark.plugin("transformers")
def test_a_head_on_a_bare_encoder_is_named_as_its_class_names_it(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    base = tiny_model("bert", hidden_size=32)
    base.save_pretrained(tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    tuned = tune(model, noise=0.0)
    tuned.save_pretrained(tmp_path / "tuned")
    lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3)
    with torch.no_grad():
        before, after = model(TOKENS).logits, tuned(TOKENS).logits
    assert float((before - after).norm() / after.norm()) > 1e-2
    found = peft_output(model, tmp_path / "out", lambda loaded: loaded(TOKENS).logits)
    assert float((found - after).norm() / after.norm()) < 1e-4
    lorahub.merge(tmp_path / "base", [tmp_path / "out"], out=tmp_path / "merged")
    merged, wanted = read(tmp_path / "merged"), read(tmp_path / "tuned")
    assert all(torch.allclose(merged[name], wanted[name], atol=2e-6) for name in wanted)


@pytest.mark.plugin("transformers")
def test_parameters_that_are_tied_on_one_side_only_are_refused_by_name(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model("gpt2", n_embd=32).save_pretrained(tmp_path / "base")
    apart = tiny_model("gpt2", n_embd=32, tie_word_embeddings=False, seed=1)
    apart.save_pretrained(tmp_path / "tuned")
    with pytest.raises(BaseMismatch, match="tied in the base and stored apart") as refused:
        lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3)
    assert [finding.where for finding in refused.value.findings] == [("lm_head.weight",)]
    lorahub.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, leave_out=["lm_head.weight"])


def test_nan_is_refused_with_the_name_of_its_parameter(base: Path, tmp_path: Path) -> None:
    after = moved(matrices())
    after["layers.1.k.weight"][0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"layers\.1\.k\.weight"):
        lorahub.extract(write(tmp_path / "tuned", after), base, tmp_path / "out", rank=4)
    after = moved(matrices()) | {"score.weight": torch.full((2, 32), math.nan)}
    with pytest.raises(NotFinite, match=r"score\.weight"):
        lorahub.extract(write(tmp_path / "new", after), base, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(WriteFailed, match="exists"):
        lorahub.extract(tuned, base, tmp_path / "out", rank=4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("wrong", [{}, {"rank": 0}, {"rank": 4, "dtype": "int8"}, {"adaptive": True, "rank": 4}])
def test_a_request_that_means_nothing_is_refused_before_anything_is_read(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        lorahub.extract(tmp_path / "no tuned", tmp_path / "no base", tmp_path / "out", **wrong)


# --------------------------------------------------------------------------------------------- how it is made


def test_the_record_says_what_was_made_from_what(base: Path, tuned: Path, tmp_path: Path) -> None:
    lorahub.extract(tuned, base, tmp_path / "out", rank=4, base_repo="acme/base", base_revision="a" * 40)
    record = json.loads((tmp_path / "out" / "lorahub.json").read_text())
    assert (record["base"]["repo_id"], record["base"]["revision"]) == ("acme/base", "a" * 40)
    assert record["base"]["weights_digest"].startswith("sha256:")
    assert record["parents"] == [{"ref": "tuned", "role": "tuned checkpoint"}]
    assert record["recipe"]["method"] == "extract"
    assert record["recipe"]["params"]["rank"] == 4
    assert record["recipe"]["params"]["tuned_weights"].startswith("sha256:")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"
    assert lorahub.check(tmp_path / "out", base).verdict < lorahub.Verdict.DEGRADED


def test_the_bytes_do_not_depend_on_threads_or_on_how_the_checkpoint_is_cut(base: Path, tmp_path: Path) -> None:
    after = moved(matrices(), noise=1e-3)
    one, many = write(tmp_path / "a" / "tuned", after), write(tmp_path / "b" / "tuned", after, shards=4)
    for name, place, threads in (("one", one, 1), ("many", many, 3)):
        lorahub.extract(place, base, tmp_path / name, error=0.1, adaptive=True, threads=threads)
    file = "adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()


def test_a_live_model_is_not_written_to() -> None:
    model = seeded(Net)
    tuned = tune(model)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    found = lorahub.open_base(tuned)
    assert found.model is tuned
    pairs, _ = pair(lorahub.open_base(model).index, found.index)
    assert {each.way for each in pairs} == {Way.FACTORS, Way.WHOLE}
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())


def test_no_more_than_one_pair_of_parameters_a_thread_is_held_at_a_time() -> None:
    count, alive, most = 12, weakref.WeakSet[Any](), [0]
    info = {
        f"layers.{number}.weight": ParameterInfo(shape=(64, 48), dtype="F32", stored_as="", role="linear")
        for number in range(count)
    }
    index = BaseIndex(ref=BaseRef(), framework="torch", parameters=info)
    pairs, _ = pair(index, index)

    def reader(seed: int) -> Callable[[Any], torch.Tensor]:
        def give(each: Any) -> torch.Tensor:
            tensor = torch.randn(each.shape, generator=torch.Generator().manual_seed(seed))
            assert from_torch(tensor.dtype) == "F32"
            alive.add(tensor)
            most[0] = max(most[0], len(alive))
            return tensor

        return give

    found = extraction.extract(pairs, reader(0), reader(1), Budget(rank=4), dtype=torch.float32, threads=2)
    assert len(found.deltas) == count
    assert most[0] <= 4
