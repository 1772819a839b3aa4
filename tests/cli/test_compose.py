"""``lorahub compose`` as a person meets it: answers, plans, recipes, locks, and what to type next."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Cli = Callable[..., Any]
Make = Callable[..., Path]
FILE = "adapter_model.safetensors"


@pytest.fixture
def other(make_adapter: Make) -> Path:
    return make_adapter("sql", seed=2)


def change(folder: Path, stem: str = "base_model.model.layers.1.q") -> torch.Tensor:
    """A target's change in float64, from the file alone."""
    tensors = load_file(folder / FILE)
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = (
        config["rank_pattern"].get(stem.removeprefix("base_model.model."), config["r"])
        if "rank_pattern" in config
        else config["r"]
    )
    alpha = config.get("alpha_pattern", {}).get(stem.removeprefix("base_model.model."), config["lora_alpha"])
    up, down = (tensors[f"{stem}.lora_{name}.weight"].double() for name in "BA")
    assert up.shape[1] == rank
    return alpha / rank * up @ down


def recipe(folder: Path, *adapters: Path, **fields: object) -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    for adapter in adapters:
        lines += ["[[adapters]]", f'ref = "{adapter}"', "weight = 0.5"]
    path = folder / "mix.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_compose_sums_and_says_what_it_made(lorahub: Cli, adapter: Path, other: Path, tmp_path: Path) -> None:
    run = lorahub("compose", f"{adapter}:0.7", f"{other}:-0.3", "-o", tmp_path / "mix")
    assert run.code == 0, run.err
    assert run.out.splitlines()[0] == str(tmp_path / "mix")
    assert "3 factors" in run.out
    wanted = 0.7 * change(adapter) - 0.3 * change(other)
    assert torch.allclose(change(tmp_path / "mix"), wanted, rtol=0, atol=1e-5)
    assert lorahub("compose", adapter, other, "-o", tmp_path / "bare", "-q").out == f"{tmp_path / 'bare'}\n"
    document = lorahub("compose", adapter, other, "--rank", "4", "-o", tmp_path / "j", "--json").json()
    assert document["ranks"] == [4, 4]
    assert 0 < document["error"] < 1


def test_methods_take_their_parameters_from_the_command_line(
    lorahub: Cli, adapter: Path, other: Path, tmp_path: Path
) -> None:
    run = lorahub(
        "compose", adapter, other, "--method", "dare_ties", "--set", "density=0.4", "--set", "lambda=0.5",
        "--seed", "7", "--rank", "6", "-o", tmp_path / "mix",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "energy kept" in run.out
    said = json.loads((tmp_path / "mix" / "lorahub.json").read_text())["recipe"]
    assert said["method"] == "dare_ties"
    assert said["seed"] == 7
    assert said["params"] == {"rank": 6, "density": 0.4, "lambda": 0.5}
    listed = lorahub("compose", "--methods")
    assert listed.code == 0
    assert "arxiv.org/abs/2306.01708" in listed.out
    assert lorahub("compose", "--methods", "--json").json()["ties"]["parameters"]["density"] == 0.2


def test_the_plan_is_told_and_nothing_is_written(lorahub: Cli, adapter: Path, other: Path, tmp_path: Path) -> None:
    run = lorahub("compose", adapter, other, "--method", "ties", "--rank", "5", "--explain")
    assert run.code == 0, run.err
    assert "3, as layers.0.q.weight" in run.out
    assert "memory" in run.out
    document = lorahub("compose", adapter, other, "--rank", "5", "--explain", "--json").json()
    assert [line["rank"] for line in document["targets"]] == [5, 5, 5]
    assert document["recipe"]["rank"] == 5
    assert not [*tmp_path.glob("**/lorahub.json")]


def test_a_recipe_is_locked_and_composed_again(lorahub: Cli, adapter: Path, other: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, adapter, other, method="dare_linear", rank=4, seed=1)
    assert lorahub("compose", path, "-o", tmp_path / "none", "--locked").code == 2
    assert lorahub("compose", path, "-o", tmp_path / "first").code == 0
    lock = (tmp_path / "mix.lock").read_bytes()
    again = lorahub("compose", path, "-o", tmp_path / "second", "--locked")
    assert again.code == 0, again.err
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()
    assert (tmp_path / "mix.lock").read_bytes() == lock
    assert [len(each["files"]) for each in tomllib.loads(lock.decode())["adapters"]] == [2, 2]

    weights = other / FILE
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    moved = lorahub("compose", path, "-o", tmp_path / "third", "--locked")
    assert moved.code == 3
    assert "lock-weights-differ" in moved.err
    assert not (tmp_path / "third").exists()
    path.write_text(path.read_text().replace("0.5", "0.6"))
    changed = lorahub("compose", path, "-o", tmp_path / "third", "--locked")
    assert changed.code == 3
    assert "lock-recipe-changed" in changed.err


def test_a_pinned_reference_stays_where_it_was_locked(
    lorahub: Cli, adapter: Path, other: Path, base: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"

    def push(folder: Path, version: str) -> None:
        recorded = lorahub(
            "record", folder, "--base", base, "--base-repo", "acme/base", "--license", "mit", "--name", "acme/ink"
        )
        assert recorded.code == 0, recorded.err
        pushed = lorahub("push", "acme/ink", folder, "--version", version, "--hub", hub)
        assert pushed.code == 0, pushed.err

    push(adapter, "1.0.0")
    path = tmp_path / "mix.toml"
    path.write_text('[[adapters]]\nref = "acme/ink@1"\n')
    first = lorahub("compose", path, "-o", tmp_path / "first", "--hub", hub)
    assert first.code == 0, first.err
    push(other, "1.1.0")
    assert lorahub("compose", path, "-o", tmp_path / "same", "--hub", hub, "--locked").code == 0
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "same" / FILE).read_bytes()
    assert lorahub("compose", path, "-o", tmp_path / "newer", "--hub", hub).code == 0
    assert (tmp_path / "newer" / FILE).read_bytes() != (tmp_path / "same" / FILE).read_bytes()
    said = json.loads((tmp_path / "same" / "lorahub.json").read_text())
    assert len(said["parents"][0]["revision"]) == 40
    assert said["base"]["repo_id"] == "acme/base"


def test_a_recipe_for_a_checkpoint_merges_in_one_pass(
    lorahub: Cli, adapter: Path, other: Path, base: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, adapter, other, base=str(base), output="checkpoint", allow=["base-undeclared"])
    run = lorahub("compose", path, "-o", tmp_path / "merged")
    assert run.code == 0, run.err
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    moved = after["layers.1.q.weight"].double() - before["layers.1.q.weight"].double()
    assert torch.allclose(moved, 0.5 * change(adapter) + 0.5 * change(other), rtol=0, atol=1e-5)
    assert (tmp_path / "mix.lock").exists()
    inline = lorahub("compose", f"{adapter}:0.5", f"{other}:0.5", "--base", base, "--checkpoint", "-o", tmp_path / "m2")
    assert inline.code == 0, inline.err
    assert (tmp_path / "m2" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_a_mergekit_configuration_becomes_a_recipe(
    lorahub: Cli, adapter: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # mergekit's local paths start where it is run
    path = tmp_path / "mergekit.yml"
    path.write_text(
        "merge_method: dare_ties\nbase_model: acme/base\nmodels:\n"
        f"  - model: acme/base+./{adapter.name}\n    parameters: {{weight: 0.5, density: 0.5}}\n"
        f"  - model: acme/base+./{other.name}\n    parameters: {{weight: 0.3, density: 0.5}}\n"
    )
    shown = lorahub("compose", "--from-mergekit", path, "--recipe")
    assert shown.code == 0, shown.err
    found = tomllib.loads(shown.out)
    assert found["method"] == "dare_ties"
    assert [each["weight"] for each in found["adapters"]] == [0.5, 0.3]
    assert "acme/base is not read" in shown.err
    run = lorahub("compose", "--from-mergekit", path, "--rank", "4", "-o", tmp_path / "mix")
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "no adapter was given"),
        (["{ink}"], 2, "-o FOLDER"),
        (["{ink}", "-o", "{out}", "--method", "tise"], 2, "Did you mean 'ties'"),
        (["{ink}", "-o", "{out}", "--set", "density"], 2, "NAME=VALUE"),
        (["{ink}", "{sql}", "-o", "{out}", "--method", "ties", "--set", "density=7"], 2, "density"),
        (["{ink}", "-o", "{out}", "--rank", "0"], 2, "rank"),
        (["{ink}", "{sql}", "{ink}", "-o", "{out}", "--method", "slerp"], 2, "takes 2 adapters"),
        (["./nowhere", "-o", "{out}"], 6, "there is no adapter at nowhere"),
        (["{ink}:fast", "-o", "{out}"], 2, "no weight"),
        (["x.toml", "{ink}", "-o", "{out}"], 2, "stands alone"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_to_type(
    lorahub: Cli, adapter: Path, other: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    filled = [each.format(ink=adapter, sql=other, out=tmp_path / "out") for each in arguments]
    run = lorahub("compose", *filled)
    assert run.code == code, run.err
    assert says in run.err
    assert "Traceback" not in run.err
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases_are_refused_until_allowed(
    lorahub: Cli, adapter: Path, make_adapter: Make, tmp_path: Path
) -> None:
    stray = make_adapter("stray", seed=4, base_model_name_or_path="acme/another")
    refused = lorahub("compose", adapter, stray, "-o", tmp_path / "mix")
    assert refused.code == 3
    assert "acme/another" in refused.err
    assert "--allow bases-differ" in refused.err
    assert lorahub("compose", adapter, stray, "-o", tmp_path / "mix", "--allow", "bases-differ").code == 0
