"""Weights searched for and learned: against least squares, with controls, and a model that stays what it was."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.composing import compose, learning, searching
from lorahub.composing.learning import Learned
from lorahub.composing.searching import Searched
from lorahub.composing.trying import Stage
from lorahub.composition.searching.controls import Control, Controls
from lorahub.composition.searching.weighed import GRANULARITIES, groups_of, weighed
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import MissingDependency, NotFinite, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.live import entries
from lorahub.live.hooks import Output
from lorahub.recipe import Recipe

INPUTS, OUT = 8, 6


class Net(nn.Module):
    """Two numbered layers, each linear, side by side: outputs are linear in all weights of adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(INPUTS, OUT), nn.Linear(INPUTS, OUT)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, *, rank: int = 2, out: int = OUT, inputs: int = INPUTS) -> LoRA:
    return LoRA(randn(out, rank, seed=seed), randn(rank, inputs, seed=seed + 1), 0.5)


def write(folder: Path, deltas: Mapping[str, Delta]) -> Path:
    targets = {Target("", name.rpartition(".")[0], name.rpartition(".")[2]): delta for name, delta in deltas.items()}
    return lorahub.save(Adapter(deltas=targets), folder, format="peft")


def change(delta: Delta, weight: torch.Tensor) -> torch.Tensor:
    """The change in float64 by the paper's formula."""
    assert isinstance(delta, LoRA)
    found = delta.scale * delta.up.double() @ delta.down.double()
    assert found.norm() / weight.norm() > 1e-2
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


DELTAS = {
    name: {f"layers.{n}.weight": lora(10 * place + 100 * n) for n in range(2)}
    for place, name in enumerate(("ink", "sql", "tea"), start=1)
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: write(tmp_path / name, deltas) for name, deltas in DELTAS.items()}


@pytest.fixture
def pair(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: folders[name] for name in ("ink", "sql")}


X = randn(20, INPUTS, seed=5)


def target(weights: Mapping[str, tuple[float, float]]) -> torch.Tensor:
    """What the net gives when each adapter is merged at these weights, layer by layer; float64 loops."""
    net = Net().double()
    with torch.no_grad():
        for name, each in weights.items():
            for n, weight in enumerate(each):
                own = net.layers[n].weight
                own += weight * change(DELTAS[name][f"layers.{n}.weight"], own)
        return net(X.double()).float()


def mse(wanted: torch.Tensor) -> Callable[..., torch.Tensor]:
    def loss(model: nn.Module, step: int = 0) -> torch.Tensor:
        return (model(X) - wanted).square().mean()

    return loss


def objective(wanted: torch.Tensor) -> Callable[[nn.Module], float]:
    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return mse(wanted)(model).item()

    return value


OPPOSED = target({"ink": (1.0, 1.0), "sql": (-1.0, -1.0)})


def hooked(model: nn.Module) -> bool:
    return any(isinstance(hook, Output) for each in model.modules() for hook in each._forward_hooks.values())


def search(model: nn.Module, adapters: Any, value: Any, **options: Any) -> Searched:
    return searching.search(model, adapters, value, **{"fresh": None, "budget": 12, "draws": 0} | options)


def learn(model: nn.Module, adapters: Any, loss: Any, **options: Any) -> Learned:
    return learning.learn(model, adapters, loss, **{"steps": 5, "draws": 0, "batches": 1} | options)


# ---- search


def quadratic_residual() -> float:
    """The least that ``(sum w B)(sum w A)``, as the published implementation composes, reaches for ``OPPOSED``."""
    grid = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    one, other = (each.reshape(-1, 1, 1) for each in torch.meshgrid(grid, grid, indexing="ij"))
    outputs = []
    for n in range(2):
        first, second = (DELTAS[name][f"layers.{n}.weight"] for name in ("ink", "sql"))
        up = one * first.up.double() + other * second.up.double()
        down = one * first.down.double() + other * second.down.double()
        outputs.append(X.double() @ (0.5 * up @ down).mT)
    plain = Net().double()(X.double()).detach()
    return float((plain + torch.cat(outputs, -1) - OPPOSED).square().mean((1, 2)).min())


def test_a_search_finds_weights_of_opposite_signs(pair):
    model = Net()
    found = search(model, pair, objective(OPPOSED), budget=250, l1=0.0)
    assert found.weights == pytest.approx({"ink": 1.0, "sql": -1.0}, abs=1e-3)
    assert found.loss < 1e-6 * found.controls.base.loss
    assert quadratic_residual() > 0.1 * found.controls.base.loss
    assert len(found.trials) == 250
    assert not hooked(model)


def test_a_model_that_was_searched_with_is_what_it_was(pair):
    model, state = Net(), Net().state_dict()
    search(model, pair, objective(OPPOSED))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), Net()(X))


def test_merging_at_the_weights_found_gives_the_loss_found(pair):
    found = search(Net(), pair, objective(OPPOSED), budget=20)
    model = Net()
    lorahub.merge(model, pair, weights=found.weights)
    assert objective(OPPOSED)(model) == pytest.approx(found.loss, rel=1e-4)
    assert found.loss < 0.9 * found.controls.base.loss


def test_composing_at_the_weights_found_gives_the_loss_found(pair):
    found = search(Net(), pair, objective(OPPOSED), budget=20)
    model = Net()
    lorahub.merge(model, {"mix": compose(pair, weights=found.weights)})
    assert objective(OPPOSED)(model) == pytest.approx(found.loss, rel=1e-4)


def test_a_trial_reads_no_file_and_copies_no_factor(pair, monkeypatch):
    made: list[tuple[int, tuple[str, ...]]] = []
    stack_of = entries.stack_of

    def counting(spot, adapters, *rest):
        made.append((spot.key, tuple(each.name for each in adapters)))
        return stack_of(spot, adapters, *rest)

    monkeypatch.setattr("lorahub.live.desk.stack_of", counting)

    def value(model: nn.Module) -> float:
        for folder in pair.values():  # before the first trial is over nothing is left of the files
            shutil.rmtree(folder, ignore_errors=True)
        return objective(OPPOSED)(model)

    found = search(Net(), pair, value, budget=40)
    assert len({trial.weights for trial in found.trials}) == 40
    assert made.count((0, ("ink", "sql"))) == made.count((1, ("ink", "sql"))) == 1
    assert len(made) == 2 * (1 + 2)  # two layers; both together, and each alone


@pytest.mark.parametrize("optimiser", ["cma", "random"])
def test_the_same_seed_and_objective_give_the_same_document(pair, optimiser):
    def drawing(model: nn.Module) -> float:  # dropout, or a sample of the examples
        return objective(OPPOSED)(model) * (1 + 0.1 * torch.rand(()).item())

    model = Net()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = search(model, pair, drawing, optimiser=optimiser, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other = search(Net(), pair, drawing, optimiser=optimiser, draws=2)
    assert one.document() == other.document()
    json.dumps(one.document(), allow_nan=False)
    assert search(Net(), pair, drawing, optimiser=optimiser, seed=1).trials != one.trials


def test_an_objective_that_fails_leaves_no_adapter_on_the_model(pair):
    model, count = Net(), 0

    def failing(model: nn.Module) -> float:
        nonlocal count
        count += 1
        if count == 5:
            raise ZeroDivisionError("mine")
        return objective(OPPOSED)(model)

    with pytest.raises(ZeroDivisionError, match="mine"):
        search(model, pair, failing)
    assert not hooked(model)
    assert torch.equal(model(X), Net()(X))
    lorahub.attach(model, pair).detach()


def test_weights_at_which_there_is_no_number_are_the_worst(pair):
    def value(model: nn.Module) -> float:
        found = objective(OPPOSED)(model)
        return math.nan if found > 1.05 * base else found

    base = objective(OPPOSED)(Net())
    found = search(Net(), pair, value, budget=60, l1=0.0)
    assert any(math.isnan(trial.loss) for trial in found.trials)
    assert found.loss < 0.5 * base


def test_without_its_package_an_optimiser_is_a_named_error_and_random_search_goes_on(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    model = Net()
    with pytest.raises(MissingDependency, match=r"lorahub-core\[search\]"):
        search(model, pair, objective(OPPOSED))
    assert not hooked(model)
    found = search(model, pair, objective(OPPOSED), optimiser="random", budget=60)
    assert found.loss < found.controls.base.loss


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimiser": "cme"}, "no optimiser 'cme'"),
        ({"draws": -1}, "draws=-1"),
        ({"fresh_steps": 0}, "fresh_steps=0"),
        ({"bounds": (1.0, 1.0)}, "hold nothing"),
        ({"budget": 0}, "budget=0"),
        ({"seed": -1}, "seed=-1"),
        ({"fresh_lr": math.nan}, "learning rate of nan"),
        ({"adapters": {}}, "no adapter was given"),
        ({"adapters": ["INK:0.5"]}, r"'ink' has a weight \(0.5\)"),
    ],
)
def test_a_malformed_search_is_refused_and_leaves_the_model_alone(pair, options, says):
    model = Net()
    given = options.pop("adapters", pair)
    if isinstance(given, list):
        given = [f"{pair['ink']}:0.5"]
    with pytest.raises(UsageError, match=says):
        search(model, given, objective(OPPOSED), **options)
    assert not hooked(model)


def test_a_search_of_a_model_with_adapters_attached_is_refused(pair):
    model = Net()
    with lorahub.attach(model, pair), pytest.raises(UsageError, match="attached already"):
        search(model, pair, objective(OPPOSED))


# ---- a search that goes on


def test_a_search_goes_on_from_its_log_with_all_its_controls(pair, tmp_path):
    log = tmp_path / "log.jsonl"

    def counting(calls: list[float], stop: int | None = None) -> Callable[[nn.Module], float]:
        def value(model: nn.Module) -> float:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(objective(OPPOSED)(model))
            return calls[-1]

        return value

    options: dict[str, Any] = {"budget": 10, "draws": 2, "fresh": mse(OPPOSED), "fresh_lr": 0.05}
    whole: list[float] = []
    unbroken = search(Net(), pair, counting(whole), **options)
    for stop in (4, 13, 25):  # among its trials, among the controls, in a second draw
        log.unlink(missing_ok=True)
        first: list[float] = []
        with pytest.raises(KeyboardInterrupt):
            search(Net(), pair, counting(first, stop), log=log, **options)
        rest: list[float] = []
        resumed = search(Net(), pair, counting(rest), log=log, **options)
        assert resumed.document() == unbroken.document()
        assert first + rest == whole
    again: list[float] = []
    assert search(Net(), pair, counting(again), log=log, **options).document() == unbroken.document()
    assert not again


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import runpy
here = runpy.run_path(sys.argv[2])
count = 0

def value(model):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return here["objective"](here["OPPOSED"])(model)

here["search"](here["Net"](), {"ink": sys.argv[3], "sql": sys.argv[4]}, value, log=sys.argv[5])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_a_search_whose_process_was_killed_goes_on_from_its_log(pair, tmp_path):
    log = tmp_path / "log.jsonl"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(root), __file__, str(pair["ink"]), str(pair["sql"]), str(log)]
    gone = subprocess.run(command, check=False, env=os.environ)
    assert gone.returncode == -signal.SIGKILL
    assert len(log.read_text().splitlines()) == 10  # what is searched for, the base, the start (the base again), seven
    calls: list[int] = []

    def value(model: nn.Module) -> float:
        calls.append(1)
        return objective(OPPOSED)(model)

    resumed = search(Net(), pair, value, log=log)
    calls_of_the_rest = len(calls)
    assert resumed.document() == search(Net(), pair, value).document()
    assert calls_of_the_rest + 8 == len(calls) - calls_of_the_rest


def test_a_log_of_other_adapters_is_refused(pair, folders, tmp_path):
    log = tmp_path / "log.jsonl"
    search(Net(), pair, objective(OPPOSED), log=log)
    with pytest.raises(UsageError, match="other digests"):
        search(Net(), pair | {"sql": folders["tea"]}, objective(OPPOSED), log=log)


# ---- controls


def test_base_equal_weights_and_each_alone_are_what_merging_gives(pair):
    found = search(Net(), pair, objective(OPPOSED)).controls
    for control, weights in (
        (found.base, {}),
        (found.uniform, {"ink": (0.5, 0.5), "sql": (0.5, 0.5)}),
        (found.of("single")[0], {"ink": (1.0, 1.0)}),
        (found.of("single")[1], {"sql": (1.0, 1.0)}),
    ):
        assert control.loss == pytest.approx(float((target(weights) - OPPOSED).square().mean()), rel=1e-4)
    assert found.best_single.name == "ink"


def test_random_adapters_get_the_same_search_and_do_not_reach_what_adapters_know(pair, tmp_path):
    log = tmp_path / "log.jsonl"
    found = search(Net(), pair, objective(OPPOSED), budget=60, l1=0.0, draws=2, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    for of in ("adapters", "random 1", "random 2"):
        assert [line["trial"] for line in lines if line["of"] == of] == list(range(60))
    assert len(found.controls.of("random")) == 2
    assert found.controls.best_random.loss > 10 * found.loss
    assert any("% of that gain at best" in remark for remark in found.controls.remarks())
    assert not any("do as well" in remark for remark in found.controls.remarks())


def test_random_adapters_that_do_as_well_are_told_in_words(pair):
    plain = Net()(X).detach()

    def any_change(model: nn.Module) -> float:
        with torch.no_grad():
            return (float((model(X) - plain).norm()) - 10.0) ** 2

    found = search(Net(), pair, any_change, budget=60, l1=0.0, draws=2)
    assert any(
        "random adapters of the same shapes and norms do as well in" in each for each in found.controls.remarks()
    )
    assert any("is not owed to what these adapters know" in each for each in found.controls.remarks())


def test_a_fresh_adapter_that_the_caller_leaves_out_is_stated(pair):
    found = search(Net(), pair, objective(OPPOSED))
    assert found.controls.fresh.loss is None
    assert "a freshly trained adapter: not run, left out by the caller" in found.controls.remarks()[-1]
    assert {row["control"] for row in found.document()["controls"]["rows"]} == {"base", "uniform", "single", "fresh"}
    assert "random adapters were not tried" in " ".join(found.controls.remarks())


@pytest.mark.parametrize("way", ["search", "learn"])
def test_random_adapters_that_cannot_be_made_are_told_and_stop_nothing(pair, monkeypatch, way):
    def refusing(_stage: Stage, _draw: int) -> None:
        raise UnsupportedFormat("layers.0.weight is stored as U8, in quantised form")

    monkeypatch.setattr(Stage, "random", refusing)
    find = (
        search(Net(), pair, objective(OPPOSED), draws=2)
        if way == "search"
        else learn(Net(), pair, mse(OPPOSED), draws=2)
    )
    assert [row.loss for row in find.controls.of("random")] == [None, None]
    assert "random adapters, draw 1: not run, layers.0.weight is stored as U8" in " ".join(find.controls.remarks())


def test_a_loss_trains_a_fresh_adapter_that_is_scored_by_the_same_objective(pair):
    found = search(Net(), pair, objective(OPPOSED), fresh=mse(OPPOSED), fresh_steps=150, fresh_lr=0.05)
    assert found.controls.fresh.loss < 0.5 * found.controls.base.loss
    assert found.controls.fresh.note == "Adam, 150 steps at 0.05"


def test_a_fresh_adapter_from_elsewhere_is_scored_at_weight_1(pair, folders):
    found = search(Net(), pair, objective(OPPOSED), fresh=folders["tea"])
    expected = (target({"tea": (1.0, 1.0)}) - OPPOSED).square().mean()
    assert found.controls.fresh.loss == pytest.approx(float(expected), rel=1e-4)


def test_random_adapters_have_the_shapes_ranks_and_norms_of_those_they_stand_in_for(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(2, 3, 3), nn.Linear(8, 6)).double()
    deltas = {
        "0.weight": lora(1, rank=3),
        "1.weight": LoRA(randn(3, 2, 1, 1, seed=3), randn(2, 2, 3, 3, seed=4), 0.7),
        "2.weight": DoRA(randn(6, 2, seed=5), randn(2, 8, seed=6), 0.5, randn(6, seed=7).abs(), 0),
    }
    bent = deltas["2.weight"]
    plain = {name: delta for name, delta in deltas.items() if delta is not bent}
    given = {"one": write(tmp_path / "one", plain), "two": write(tmp_path / "two", {"2.weight": bent})}
    with Stage(model, given, seed=0) as stage:
        drawn, again, other = (
            {at: delta for _, each in stage.random(n).values() for at, delta in each.deltas.items()} for n in (1, 1, 2)
        )
    state = model.state_dict()
    for name, own in deltas.items():
        at = Target("", name.rpartition(".")[0], "weight")
        expected = own.delta(state[name])
        found = drawn[at].delta(state[name])
        assert found.shape == expected.shape
        assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=1e-5)
        assert drawn[at].down.shape[0] == own.down.shape[0]
        assert torch.equal(drawn[at].up, again[at].up)
        assert abs(float((found * expected).sum() / expected.norm() ** 2)) < 0.9
        assert not torch.allclose(drawn[at].up, other[at].up)


class Experts(nn.Module):
    """Three matrices in one parameter, all of them used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->beo", self.up, x)


def test_stacks_of_experts_are_weighed_and_stood_in_for_as_stacks(tmp_path):
    deltas = {"up": ExpertLoRA(randn(3, 5, 2, seed=1), randn(3, 2, 4, seed=2), 0.5)}
    given = {"one": write(tmp_path / "one", deltas)}
    model, x = Experts(), randn(7, 4, seed=3)
    with Stage(model, given, seed=0) as stage:
        ((_, each),) = stage.random(1).values()
        (drawn,) = each.deltas.values()
    assert isinstance(drawn, ExpertLoRA)
    expected = deltas["up"].delta(model.up)
    assert float(drawn.delta(model.up).norm()) == pytest.approx(float(expected.norm()), rel=1e-5)
    wanted = torch.einsum("eoi,bi->beo", model.up.detach() + 0.3 * expected.detach(), x)
    found = learn(
        model,
        given,
        lambda model, _step: (model(x) - wanted).square().mean(),
        steps=300,
        lr=0.05,
        draws=1,
        fresh_lr=0.02,
    )
    assert found.by_target["one"] == {"up": pytest.approx(0.3, abs=1e-3)}
    assert found.controls.fresh.loss < 0.5 * found.controls.base.loss
    assert found.controls.best_random.loss > 10 * found.loss


def controls(loss: float, **rows: Any) -> Controls:
    losses = {"base": 1.0, "uniform": 0.9, "ink": 0.8, "random": [0.9, 0.95], "fresh": 0.7} | rows
    return Controls(
        loss=loss,
        rows=(
            Control(role="base", name="the base", loss=losses["base"]),
            Control(role="uniform", name="equal weights", loss=losses["uniform"]),
            Control(role="single", name="ink", loss=losses["ink"]),
            *(Control(role="random", name=f"draw {n}", loss=each, note="n") for n, each in enumerate(losses["random"])),
            Control(role="fresh", name="a freshly trained adapter", loss=losses["fresh"], note="n"),
        ),
    )


@pytest.mark.parametrize(
    ("found", "says", "silent"),
    [
        (controls(0.5), "reach 20% of that gain at best", "as well"),
        (controls(1.2), "no better than the base alone", "random"),
        (controls(math.nan), "no better than the base alone: no finite number", "random"),
        (controls(0.5, random=[0.52, 0.9]), "do as well in 1 of 2 draws (0.52 at best)", "of that gain"),
        (controls(0.5, random=[0.4, 0.45]), "do as well in 2 of 2 draws", "of that gain"),
        (controls(0.5, random=[math.nan, 0.9]), "reach 20% of that gain", "as well"),
        (controls(0.5, random=[math.nan]), "come to no finite number at best", "as well"),
        (controls(0.5, random=[None, 0.45]), "do as well in 1 of 1 draws", "of that gain"),
        (controls(0.5, random=[None]), "random adapters were not tried", "as well"),
        (controls(0.5, random=[None]), "random adapters, draw 0: not run, n", "as well"),
        (controls(0.5, uniform=0.51), "equal weights do as well (0.51)", "reach more"),
        (controls(0.5, ink=0.3), "'ink' alone does better (0.3)", "as well"),
        (controls(0.5, fresh=0.45), "a freshly trained adapter does better (0.45)", "as well"),
        (controls(0.5, fresh=None), "a freshly trained adapter: not run, n", "as well"),
        (controls(0.5, base=math.nan), "the base alone gives no finite loss", "as well"),
    ],
)
def test_controls_say_in_words_what_a_result_is_worth(found, says, silent):
    said = " | ".join(found.remarks())
    assert says in said
    assert silent not in said
    json.dumps(found.document(), allow_nan=False)
    assert found.show().splitlines()[1].startswith("the base ")
    assert found.show().endswith(found.remarks()[-1])


# ---- learning


def least_squares(features: list[torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    """The weights of features whose sum lies nearest to what is wanted; float64, closed form."""
    matrix = torch.stack([each.double().flatten() for each in features], 1)
    return torch.linalg.lstsq(matrix, wanted.double().flatten().unsqueeze(1), driver="gelsd").solution.flatten()


WANTED = target({"ink": (0.8, -0.3), "sql": (-0.5, 0.6)}) + 0.05 * randn(20, 2 * OUT, seed=9)


def test_learned_weights_by_layer_are_those_of_least_squares(pair):
    plain = target({})
    features = [
        target({name: (1.0, 0.0) if n == 0 else (0.0, 1.0)}) - plain for name in ("ink", "sql") for n in range(2)
    ]
    expected = least_squares(features, WANTED - plain).tolist()
    found = learn(Net(), pair, mse(WANTED), steps=400, lr=0.05)
    values = [found.by_target[name][f"layers.{n}.weight"] for name in ("ink", "sql") for n in range(2)]
    assert values == pytest.approx(expected, abs=2e-3)
    assert found.weights["ink"] == (
        {"filter": "layers.0.*", "value": values[0]},
        {"filter": "layers.1.*", "value": values[1]},
    )
    assert len(found.curve) == 400
    assert found.loss < 0.1 * found.controls.base.loss


def test_learned_weights_by_adapter_are_those_of_least_squares(pair):
    plain = target({})
    expected = least_squares([target({name: (1.0, 1.0)}) - plain for name in ("ink", "sql")], WANTED - plain).tolist()
    found = learn(Net(), pair, mse(WANTED), steps=400, lr=0.05, granularity="adapter")
    assert found.weights["ink"] == ({"filter": "*", "value": found.by_target["ink"]["layers.0.weight"]},)
    assert [found.weights[name][0]["value"] for name in ("ink", "sql")] == pytest.approx(expected, abs=2e-3)


def test_learning_begins_at_equal_weights_and_trains_nothing_else(folders):
    model, before = Net(), Net().state_dict()
    opened = {name: lorahub.load(folder) for name, folder in folders.items()}
    held = {name: {at: copy.deepcopy(delta) for at, delta in each.deltas.items()} for name, each in opened.items()}
    found = learn(model, opened, mse(WANTED), steps=1, lr=1e-12)
    third = dict.fromkeys(folders, (1 / 3, 1 / 3))
    assert found.curve[0] == pytest.approx(float((target(third) - WANTED).square().mean()), rel=1e-4)
    assert found.curve[0] == pytest.approx(found.controls.uniform.loss, rel=1e-5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, each in opened.items():
        for at, delta in each.deltas.items():
            assert all(torch.equal(own, held[name][at].tensors()[slot]) for slot, own in delta.tensors().items())
            assert not any(own.requires_grad or own.grad is not None for own in delta.tensors().values())
    assert not hooked(model)


def test_learned_weights_merged_by_hand_give_the_loss_that_is_told(pair):
    found = learn(Net(), pair, mse(WANTED), steps=40, lr=0.05)
    by_hand = target(
        {name: tuple(each[f"layers.{n}.weight"] for n in range(2)) for name, each in found.by_target.items()}
    )
    assert found.loss == pytest.approx(float((by_hand - WANTED).square().mean()), rel=1e-4)
    assert found.loss < found.controls.uniform.loss


def test_a_recipe_with_the_learned_rules_composes_an_adapter_with_the_loss_that_is_told(pair):
    found = learn(Net(), pair, mse(WANTED), steps=40, lr=0.05)
    adapters = [{"ref": str(folder), "weight": found.weights[name]} for name, folder in pair.items()]
    model = Net()
    lorahub.merge(model, {"mix": compose(Recipe(schema_version="1.0", adapters=adapters))})
    assert objective(WANTED)(model) == pytest.approx(found.loss, rel=1e-4)
    assert found.loss < 0.5 * found.controls.base.loss


def test_every_control_of_learning_is_run_by_itself(pair):
    found = learn(Net(), pair, mse(OPPOSED), steps=120, lr=0.05, draws=2, fresh_lr=0.05)
    assert [row.role for row in found.controls.rows] == ["base", "uniform", *["single"] * 2, *["random"] * 2, "fresh"]
    assert all(math.isfinite(row.loss) for row in found.controls.rows)
    assert found.controls.base.loss == pytest.approx(float((target({}) - OPPOSED).square().mean()), rel=1e-4)
    single = (target({"sql": (1.0, 1.0)}) - OPPOSED).square().mean()
    assert found.controls.of("single")[1].loss == pytest.approx(float(single), rel=1e-4)
    assert found.loss < 0.01 * found.controls.base.loss < found.controls.best_random.loss
    assert found.controls.fresh.loss < 0.5 * found.controls.base.loss
    json.dumps(found.document(), allow_nan=False)


def test_learning_with_the_same_seed_gives_the_same_document(pair):
    def drawing(model: nn.Module, step: int) -> torch.Tensor:
        return mse(WANTED)(model) * (1 + 0.1 * torch.rand(()))

    torch.manual_seed(1)
    one = learn(Net(), pair, drawing, draws=1)
    torch.manual_seed(2)
    assert learn(Net(), pair, drawing, draws=1).document() == one.document()
    assert learn(Net(), pair, drawing, draws=1, seed=1).document() != one.document()


class Mixed(nn.Module):
    """Modules that changes reach in different ways, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.spare = nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(self.words(ids).mT).mT))


MIXED: dict[str, Delta] = {
    "words.weight": lora(1, out=10, inputs=6),
    "conv.weight": LoRA(randn(4, 2, 1, seed=3), randn(2, 6, 3, seed=4), 0.7),
    "norm.weight": Full(randn(4, seed=5)),
    "head.weight": DoRA(randn(5, 2, seed=6), randn(2, 4, seed=7), 0.5, randn(5, seed=8).abs(), 0),
    "head.bias": Full(randn(5, seed=9), 0.5),
    "norm.bias": Replace(randn(4, seed=12)),
    "spare.weight": lora(10, out=5, inputs=4),
}
IDS = torch.arange(10).reshape(2, 5)


def test_a_weight_gets_the_gradient_of_its_change_whatever_the_kind_and_the_module(bench):
    model = Mixed()
    leaves = {name: torch.tensor(0.6, requires_grad=True) for name in MIXED}
    bench.attach(model, {"one": {name: weighed(delta, leaves[name]) for name, delta in MIXED.items()}})
    for _ in range(2):  # the second time nothing of the first graph is left over
        found = torch.autograd.grad(model(IDS).square().sum(), list(leaves.values()), allow_unused=True)
    own = dict(Mixed().named_parameters())
    reference = {name: torch.tensor(0.6, requires_grad=True) for name in MIXED}
    weights = {name: own[name].detach() + reference[name] * MIXED[name].delta(own[name].detach()) for name in MIXED}
    outputs = torch.func.functional_call(Mixed(), weights, (IDS,))
    expected = torch.autograd.grad(outputs.square().sum(), list(reference.values()), allow_unused=True)
    for name, gradient, own_gradient in zip(reference, expected, found, strict=True):
        if name == "spare.weight":
            assert gradient is None
            assert own_gradient is None
        else:
            assert abs(gradient) > 1e-3
            torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-4)


def test_bands_of_a_fused_weight_have_weights_of_their_own(bench):
    model, x = nn.Linear(4, 12), randn(3, 4, seed=1)
    deltas = {f"weight[{4 * n}:{4 * n + 4}]": lora(10 * n, out=4, inputs=4) for n in range(3)}
    leaves = [torch.tensor(0.2 + n, requires_grad=True) for n in range(3)]
    bench.attach(model, {"one": {name: weighed(delta, leaves[n]) for n, (name, delta) in enumerate(deltas.items())}})
    found = torch.autograd.grad(model(x).square().sum(), leaves)
    plain = dict(model.named_parameters())
    with torch.no_grad():
        changes = [change(delta, delta.up).float() for delta in deltas.values()]
    stacked = torch.cat([leaf * each for leaf, each in zip(leaves, changes, strict=True)])
    outputs = torch.nn.functional.linear(x, plain["weight"] + stacked, plain["bias"])
    for one, other in zip(found, torch.autograd.grad(outputs.square().sum(), leaves), strict=True):
        assert abs(other) > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_learns_too(pair, dtype):
    x, wanted = X.to(dtype), OPPOSED.to(dtype)

    def loss(model: nn.Module, _step: int) -> torch.Tensor:
        return (model(x) - wanted).float().square().mean()

    found = learn(Net().to(dtype), pair, loss, steps=150, lr=0.05, granularity="adapter")
    expected = {"ink": 1.0, "sql": -1.0}
    for name, weight in expected.items():
        assert found.weights[name][0]["value"] == pytest.approx(weight, abs=0.02)


def test_random_adapters_stand_in_for_new_values_too(tmp_path):
    one = {"layers.0.weight": lora(1), "layers.1.weight": Replace(randn(OUT, INPUTS, seed=2))}
    one["layers.1.bias"] = Replace(randn(OUT, seed=3))
    model = Net()
    state = model.state_dict()
    with Stage(model, {"one": write(tmp_path / "one", one)}, seed=0) as stage:
        drawn = {at.name: delta for _, each in stage.random(1).values() for at, delta in each.deltas.items()}
        _, leaves = stage.fresh()
        with stage.plain(stage.random(1)) as names:
            stage.choose(names)
            assert float((model(X) - Net()(X)).detach().norm()) > 1.0
    for name, value in drawn.items():
        expected = one[name].delta(state[name])
        assert float(value.delta(state[name]).norm()) == pytest.approx(float(expected.norm()), rel=1e-5)
    assert sorted(drawn) == sorted(one)
    assert len(leaves) == 2 + 2 + 1


def test_a_fresh_adapter_has_every_target_of_all_once_and_the_largest_rank(tmp_path):
    one = {"layers.0.weight": lora(1, rank=2)}
    two = {"layers.0.weight": lora(3, rank=3), "layers.1.weight": Replace(randn(OUT, INPUTS, seed=5))}
    two["layers.1.bias"] = Replace(randn(OUT, seed=7))
    given = {"one": write(tmp_path / "one", one), "two": write(tmp_path / "two", two)}
    model = Net()
    before = model(X)
    with Stage(model, given, seed=0) as stage:
        planned, leaves = stage.fresh()
        with stage.plain(planned) as names:
            stage.choose(names)
            assert torch.equal(model(X), before)
    deltas = [(at.name, delta) for _, each in planned.values() for at, delta in each.deltas.items()]
    assert sorted(name for name, _ in deltas) == ["layers.0.weight", "layers.1.bias", "layers.1.weight"]
    assert all(delta.down.shape[0] == 3 for name, delta in deltas if name.endswith(".weight"))
    assert len(leaves) == 5


@pytest.mark.parametrize("rows", [None, ["one", None]])
@pytest.mark.parametrize("name", ["conv.weight", "both.weight[4:8]"])
def test_factors_in_training_get_gradients_after_an_evaluation_without(bench, name, rows):
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 4, 3)
            self.both = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.both(self.conv(x).mT)

    made = {"conv.weight": lambda: LoRA(randn(4, 2, 1, seed=3), randn(2, 6, 3, seed=4), 0.7)}
    delta = made.get(name, lambda: lora(5, out=4, inputs=4))()
    model, x = Some(), randn(2, 6, 5, seed=6)
    leaves = [tensor.requires_grad_() for tensor in delta.tensors().values()]
    live = bench.attach(model, {"one": {name: delta}})
    if rows:
        live.adapter_names = rows
    with torch.no_grad():
        before = model(x)
    for _ in range(2):
        found = torch.autograd.grad(model(x).square().sum(), leaves)
        assert all(float(each.norm()) > 0 for each in found)
    with torch.no_grad():
        leaves[0].mul_(2.0)
        assert float((model(x) - before).norm() / before.norm()) > 1e-2


def test_targets_that_the_loss_never_depends_on_are_told_and_keep_what_they_began_with(tmp_path):
    deltas = {"head.weight": lora(1, out=5, inputs=4), "spare.weight": MIXED["spare.weight"]}
    given = {"one": write(tmp_path / "one", deltas), "two": write(tmp_path / "two", deltas)}
    found = learn(Mixed(), given, lambda model, _step: model(IDS).square().mean())
    assert found.unused == {"one": ("spare.weight",), "two": ("spare.weight",)}
    assert found.by_target["one"]["spare.weight"] == 0.5
    assert found.by_target["one"]["head.weight"] != 0.5


def test_filters_fit_each_target_once(tmp_path):
    names = ["head.weight", "layers.0.a.weight", "layers.0.b.weight", "layers.10.a.weight", "layers.1.a.weight"]
    names += ["layers.weight", "0.weight", "0.1.weight", "weight"]
    targets = [Target("", name.rpartition(".")[0], "weight") for name in names]
    targets += [Target("unet", "layers.0.a", "weight"), Target("unet", "mid", "weight"), Target("", "many", "0")]
    for granularity in GRANULARITIES:
        groups = groups_of(targets, granularity)
        assert sorted(each for group in groups for each in group.targets) == sorted(targets)
        for each in targets:
            fitting = [group for group in groups for one in group.filters if fnmatchcase(each.name, one)]
            assert len(fitting) == 1, (granularity, each)
            assert each in fitting[0].targets


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model, _step: 1.0, "gave a float at step 0"),
        (lambda model, _step: model(X), "gave a Tensor at step 0"),
        (lambda model, _step: model(X).detach().mean(), "no gradient at step 0"),
    ],
)
def test_a_loss_without_gradients_is_refused(pair, loss, says):
    model = Net()
    with pytest.raises(UsageError, match=says):
        learn(model, pair, loss)
    assert not hooked(model)


def test_a_loss_that_is_no_number_stops_the_learning_and_names_the_step(pair):
    model = Net()
    with pytest.raises(NotFinite, match="no finite number at step 2"):
        learn(model, pair, lambda model, step: mse(WANTED)(model) * (math.inf if step == 2 else 1.0))
    assert not hooked(model)
    assert torch.equal(model(X), Net()(X))


def test_a_control_that_diverges_is_told_and_stops_nothing(pair):
    found = learn(Net(), pair, mse(WANTED), steps=30, fresh_lr=1e30)
    assert math.isnan(found.controls.fresh.loss)
    assert found.controls.fresh.note == "its training came to no finite number"


def test_weights_inside_of_factors_are_refused(tmp_path):
    deltas = {"head.weight": MIXED["head.weight"]}
    given = {"one": write(tmp_path / "one", deltas)}
    model = Mixed()
    with pytest.raises(UnsupportedKind, match="compat='peft' the weight of 'one' goes into factors of its dora"):
        learn(model, given, lambda model, _step: model(IDS).square().mean(), compat="peft")
    assert not hooked(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"granularity": "layers"}, "no granularity 'layers'.*layer"),
        ({"steps": 0}, "steps=0"),
        ({"batches": 0}, "batches=0"),
        ({"lr": 0.0}, "learning rate of 0"),
    ],
)
def test_malformed_learning_is_refused(pair, options, says):
    with pytest.raises(UsageError, match=says):
        learn(Net(), pair, mse(WANTED), **options)


# ---- models of transformers


@pytest.mark.plugin("transformers")
def test_a_tiny_transformer_learns_by_layer(tiny_model, tmp_path):
    model = tiny_model("bert")
    names = [f"encoder.layer.{n}.attention.self.{part}.weight" for n in range(2) for part in ("query", "value")]
    given = {
        name: write(tmp_path / name, {each: lora(seed + n, out=16, inputs=16) for n, each in enumerate(names)})
        for name, seed in (("ink", 10), ("sql", 50))
    }
    ids = torch.arange(24).reshape(3, 8)
    with torch.no_grad(), lorahub.attach(model, given, weights=[1.0, -1.0]):
        wanted = model(ids).last_hidden_state

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        return (model(ids).last_hidden_state - wanted).square().mean()

    found = learn(model, given, loss, steps=60, lr=0.1, draws=1)
    assert [rule["filter"] for rule in found.weights["ink"]] == [f"bert.encoder.layer.{n}.*" for n in range(2)]
    assert found.loss < 0.1 * found.controls.base.loss
    assert all(rule["value"] > 0.5 for rule in found.weights["ink"])
    assert all(rule["value"] < -0.5 for rule in found.weights["sql"])


def test_a_tiny_transformer_with_fused_and_transposed_weights_is_searched(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    names = [f"transformer.h.{n}.attn.c_attn.weight" for n in range(2)]
    given = {
        name: write(tmp_path / name, {each: lora(seed + n, out=48, inputs=16) for n, each in enumerate(names)})
        for name, seed in (("ink", 10), ("sql", 50))
    }
    ids = torch.arange(24).reshape(3, 8)
    with torch.no_grad(), lorahub.attach(model, given, weights=[1.0, -1.0]):
        wanted = model(ids).logits

    def value(model: nn.Module) -> torch.Tensor:
        return (model(ids).logits - wanted).square().mean()

    found = search(model, given, value, budget=120, l1=0.0, draws=1)
    assert found.weights == pytest.approx({"ink": 1.0, "sql": -1.0}, abs=0.1)
    assert found.controls.best_random.loss > 10 * found.loss


@pytest.mark.gpu
def test_adapters_on_the_cpu_are_weighed_for_a_model_on_a_device(pair):
    x = X.cuda()

    def loss(model: nn.Module, step: int = 0) -> torch.Tensor:
        return (model(x) - OPPOSED.cuda()).square().mean()

    found = search(Net().cuda(), pair, loss, budget=200, l1=0.0, draws=1, fresh=loss, fresh_steps=100, fresh_lr=0.05)
    assert found.weights == pytest.approx({"ink": 1.0, "sql": -1.0}, abs=1e-2)
    assert found.controls.fresh.loss < 0.5 * found.controls.base.loss
    learned = learn(Net().cuda(), pair, loss, steps=200, lr=0.05, draws=1)
    assert learned.loss < 1e-3 * learned.controls.base.loss
