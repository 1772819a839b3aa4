"""``lorahub extract``, ``resize`` and ``diff`` as a person meets them: answers, tables, exit codes, next commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorahub.files.writer import save_file

Cli = Callable[..., Any]
Make = Callable[..., Path]
FILE = "adapter_model.safetensors"


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    """The base with ``q`` moved by rank 2 in every layer, and ``v`` of the first by noise."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(base / "model.safetensors")
    for name in sorted(tensors):
        if ".q." in name:
            tensors[name] += torch.randn(16, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    tensors["layers.0.v.weight"] += 0.1 * torch.randn(16, 16, generator=generator)
    (tmp_path / "tuned").mkdir()
    save_file(tmp_path / "tuned" / "model.safetensors", tensors, {"format": "pt"})
    return tmp_path / "tuned"


def test_extract_writes_an_adapter_and_says_how_close_it_is(
    lorahub: Cli, base: Path, tuned: Path, tmp_path: Path
) -> None:
    run = lorahub("extract", tuned, "--base", base, "-o", tmp_path / "lora", "--rank", "2")
    assert run.code == 0, run.err
    assert "4 factors, 2 equal" in run.out
    assert "layers.0.v.weight" in run.out
    assert "base-undeclared" in run.err
    stored = load_file(tmp_path / "lora" / FILE)
    assert sorted({name.partition(".lora_")[0].removeprefix("base_model.model.") for name in stored}) == [
        "layers.0.q",
        "layers.0.v",
        "layers.1.q",
        "layers.2.q",
    ]
    again = lorahub("check", tmp_path / "lora", "--base", base)
    assert again.code == 0, again.err


def test_extract_answers_in_json_and_bare(lorahub: Cli, base: Path, tuned: Path, tmp_path: Path) -> None:
    run = lorahub("extract", tuned, "--base", base, "-o", tmp_path / "a", "--error", "0.2", "--json")
    document = run.json()
    rows = {row["target"]: row for row in document["rows"]}  # type: ignore[attr-defined]  # a list of objects
    assert rows["layers.1.q.weight"]["rank"] == 2
    assert rows["layers.1.v.weight"] == {
        "target": "layers.1.v.weight",
        "way": "equal",
        "shape": [16, 16],
        "norm": 0.0,
    }
    change = (
        load_file(tuned / "model.safetensors")["layers.0.v.weight"]
        - load_file(base / "model.safetensors")["layers.0.v.weight"]
    )
    squares = torch.linalg.svdvals(change.double()) ** 2
    smallest = next(k for k in range(16) if float(squares[k:].sum()) <= 0.04 * float(squares.sum()))
    became = rows["layers.0.v.weight"]
    assert (became["way"] == "whole") == (smallest * 32 >= 256)
    bare = lorahub("extract", tuned, "--base", base, "-o", tmp_path / "b", "--rank", "2", "-q")
    assert bare.out == f"{tmp_path / 'b'}\n"


def test_extract_without_a_budget_is_malformed_and_into_a_full_folder_fails_as_merge_does(
    lorahub: Cli, base: Path, tuned: Path, tmp_path: Path
) -> None:
    run = lorahub("extract", tuned, "--base", base, "-o", tmp_path / "a")
    assert run.code == 2
    assert "give a rank, an energy or an error" in run.err
    run = lorahub("extract", tuned, "--base", base, "-o", base, "--rank", "2")
    assert run.code == 1
    assert "exists" in run.err


def test_extract_names_what_no_adapter_can_say(
    lorahub: Cli, base: Path, tuned: Path, make_base: Make, tmp_path: Path
) -> None:
    other = make_base("wider", width=20)
    run = lorahub("extract", other, "--base", base, "-o", tmp_path / "a", "--rank", "2")
    assert run.code == 4
    assert "layers.0.q.weight [16, 16] -> [20, 20]" in run.err
    assert "--leave-out" in run.err


def test_extract_says_what_to_ask_for_where_no_factors_are_as_close_as_asked(
    lorahub: Cli, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.v.weight"] += torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    (tmp_path / "far").mkdir()
    save_file(tmp_path / "far" / "model.safetensors", tensors, {"format": "pt"})
    run = lorahub("extract", tmp_path / "far", "--base", base, "-o", tmp_path / "lora", "--error", "1e-9")
    assert run.code == 4
    assert "layers.0.v.weight" in run.err
    assert "--rank R" in run.err
    assert not (tmp_path / "lora").exists()
    assert lorahub("extract", tmp_path / "far", "--base", base, "-o", tmp_path / "lora", "--rank", "4").code == 0


def test_resize_cuts_and_tells_the_error(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("resize", adapter, "-o", tmp_path / "small", "--rank", "2")
    assert run.code == 0, run.err
    assert "4 -> 2" in run.out
    before, after = load_file(adapter / FILE), load_file(tmp_path / "small" / FILE)
    stem = "base_model.model.layers.0.q"
    change = 2 * before[f"{stem}.lora_B.weight"].double() @ before[f"{stem}.lora_A.weight"].double()
    squares = torch.linalg.svdvals(change) ** 2
    document = lorahub("resize", adapter, "-o", tmp_path / "again", "--rank", "2", "--json").json()
    row = document["rows"][0]  # type: ignore[index]  # a list of objects
    assert row["error"] == pytest.approx(math.sqrt(float(squares[2:].sum() / squares.sum())), rel=1e-4)
    assert after[f"{stem}.lora_A.weight"].shape == (2, 16)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)


@pytest.mark.parametrize(
    "budget", [["--energy", "0.9"], ["--sv-ratio", "2"], ["--sv-fro", "0.9"], ["--sv-cumulative", "0.7"]]
)
def test_resize_takes_dynamic_ranks(budget: list[str], lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("resize", adapter, "-o", tmp_path / "small", *budget, "--json")
    assert run.code == 0, run.err
    assert all(1 <= rank <= 4 for rank in run.json()["ranks"])  # type: ignore[attr-defined]  # a list


def test_resize_refuses_what_has_no_lora(lorahub: Cli, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter("dora", use_dora=True)
    tensors = load_file(folder / FILE)
    tensors |= {f"base_model.model.layers.{n}.q.lora_magnitude_vector": torch.ones(16) for n in range(3)}
    save_file(folder / FILE, tensors, {"format": "pt"})
    run = lorahub("resize", folder, "-o", tmp_path / "small", "--rank", "2")
    assert run.code == 4
    assert "this adapter is dora" in run.err


def test_diff_says_equal_and_exits_with_zero(lorahub: Cli, adapter: Path, make_adapter: Make, tmp_path: Path) -> None:
    run = lorahub("diff", adapter, make_adapter("copy"))
    assert run.code == 0, run.err
    assert run.out.startswith("equal\n")
    assert "3 equal" in run.out
    assert lorahub("diff", adapter, make_adapter("copy2"), "-q").out == "equal\n"


def test_diff_takes_other_factors_of_one_change_for_the_same(lorahub: Cli, adapter: Path, make_adapter: Make) -> None:
    other = make_adapter("folded", lora_alpha=4)
    tensors = load_file(other / FILE)
    save_file(
        other / FILE,
        {name: tensor * 2 if "lora_B" in name else tensor for name, tensor in tensors.items()},
        {"format": "pt"},
    )
    run = lorahub("diff", adapter, other, "--json")
    assert run.code == 0
    assert run.json()["targets"]["close"] == 3  # type: ignore[index]  # counts by state


def test_diff_tells_how_two_adapters_differ_and_exits_with_one(lorahub: Cli, adapter: Path, make_adapter: Make) -> None:
    other = make_adapter("other", seed=9)
    tensors = load_file(other / FILE)
    gone = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    save_file(other / FILE, gone, {"format": "pt"})
    run = lorahub("diff", adapter, other)
    assert run.code == 1
    assert run.out.startswith("different\n")
    assert "only in A" in run.out
    document = lorahub("diff", adapter, other, "--json").json()
    assert document["equal"] is False
    row = document["rows"][0]  # type: ignore[index]  # a list of objects
    stem = "base_model.model.layers.0.q"
    before = load_file(adapter / FILE)
    a, b = (
        2 * each[f"{stem}.lora_B.weight"].double() @ each[f"{stem}.lora_A.weight"].double() for each in (before, gone)
    )
    assert row["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-9)
    assert row["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-9)
    assert row["relative_difference"] == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-9)
    assert len(row["angles_out"]) == len(row["angles_in"]) == 4


def test_diff_after_resize_gives_the_error_that_resize_told(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    told = lorahub("resize", adapter, "-o", tmp_path / "small", "--rank", "3", "--json").json()
    found = lorahub("diff", adapter, tmp_path / "small", "--json").json()
    assert found["relative_difference"] == pytest.approx(told["error"], rel=1e-4)


def test_diff_compares_across_formats_where_the_base_is_known(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ink.safetensors"
    made = lorahub("convert", adapter, "--to", "kohya", "-o", file, "--base", base)
    assert made.code == 0, made.err
    run = lorahub("diff", adapter, file, "--base", base)
    assert run.code == 0, run.err + run.out
    assert "3 " in run.out


def test_diff_does_not_call_equal_what_it_cannot_read(lorahub: Cli, adapter: Path, make_adapter: Make) -> None:
    other = make_adapter("more")
    tensors = load_file(other / FILE)
    save_file(other / FILE, tensors | {"base_model.model.layers.0.q.other": torch.ones(2)}, {"format": "pt"})
    run = lorahub("diff", adapter, other)
    assert run.code == 3
    assert "key-unknown" in run.err
    assert lorahub("diff", adapter, other, "--allow", "key-unknown").code == 0


def test_diff_does_not_call_two_prompts_equal(lorahub: Cli, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        prompt = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        save_file(tmp_path / name / FILE, {"prompt_embeddings": prompt}, {"format": "pt"})
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 16, "task_type": "CAUSAL_LM"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert lorahub("diff", tmp_path / "one", tmp_path / "two").code != 0


def test_diff_of_a_missing_adapter_is_unavailable(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("diff", adapter, tmp_path / "nothing")
    assert run.code == 6
    assert "Hint:" in run.err


def test_diff_with_a_base_compares_kinds_that_look_at_the_weights(
    lorahub: Cli, adapter: Path, base: Path, make_adapter: Make
) -> None:
    folder = make_adapter("dora", use_dora=True)
    tensors = load_file(folder / FILE)
    tensors |= {f"base_model.model.layers.{n}.q.lora_magnitude_vector": torch.ones(16) for n in range(3)}
    save_file(folder / FILE, tensors, {"format": "pt"})
    run = lorahub("diff", adapter, folder)
    assert run.code == 1
    assert "name the base" in run.out
    run = lorahub("diff", adapter, folder, "--base", base)
    assert run.code == 1
    assert "3 different" in run.out
