"""``lorahub diff`` of several adapters, and its pictures, as a person meets them: answers, tables, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file

from lorahub.files.writer import save_file

Cli = Callable[..., Any]
Make = Callable[..., Path]
FILE = "adapter_model.safetensors"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def three(make_adapter: Make) -> tuple[Path, Path, Path]:
    """Two that have nothing in common, and one that is close to the first."""
    ink, oil, near = make_adapter("ink", seed=1), make_adapter("oil", seed=2), make_adapter("near", seed=1)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(near / FILE)
    moved = {name: each + 0.3 * torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
    save_file(near / FILE, moved, {"format": "pt"})
    return ink, oil, near


def vector(folder: Path) -> torch.Tensor:
    """The whole adapter, its scale (alpha 8, rank 4) in it."""
    tensors = load_file(folder / FILE)
    stems = sorted({name.partition(".lora_")[0] for name in tensors})
    changes = [2 * tensors[f"{s}.lora_B.weight"].double() @ tensors[f"{s}.lora_A.weight"].double() for s in stems]
    return torch.cat([each.flatten() for each in changes])


def with_dora(make_adapter: Make) -> Path:
    folder = make_adapter("dora", use_dora=True, seed=4)
    tensors = load_file(folder / FILE)
    tensors |= {f"base_model.model.layers.{n}.q.lora_magnitude_vector": torch.full((16,), 3.0) for n in range(3)}
    save_file(folder / FILE, tensors, {"format": "pt"})
    return folder


def elsewhere(make_adapter: Make) -> Path:
    folder = make_adapter("elsewhere", seed=5, target_modules=["v"])
    tensors = load_file(folder / FILE)
    save_file(folder / FILE, {name.replace(".q.", ".v."): each for name, each in tensors.items()}, {"format": "pt"})
    return folder


def test_three_adapters_give_a_matrix_of_cosines_and_exit_with_one(lorahub: Cli, three: tuple[Path, ...]) -> None:
    run = lorahub("diff", *three)
    assert run.code == 1
    assert run.out.startswith("different: 3 adapters, 3 targets; 3 changed by all")
    assert "ink, near" in run.out
    assert "cosine of whole adapters" in run.out
    document = lorahub("diff", *three, "--json").json()
    vectors = [vector(folder) for folder in three]
    for row, one in enumerate(vectors):
        for column, other in enumerate(vectors):
            expected = float(one @ other / (one.norm() * other.norm()))
            assert document["cosines"][row][column] == pytest.approx(expected, abs=1e-9)
    assert document["norms"] == pytest.approx([float(each.norm()) for each in vectors])
    assert [each["name"] for each in document["adapters"]] == ["ink", "oil", "near"]
    assert [each["targets"] for each in document["adapters"]] == [3, 3, 3]
    assert document["equal"] is False
    assert lorahub("diff", *three, "-q").out == "different\n"


def test_equal_adapters_exit_with_zero(lorahub: Cli, adapter: Path, make_adapter: Make) -> None:
    run = lorahub("diff", adapter, make_adapter("copy"), adapter)
    assert run.code == 0, run.err
    assert run.out.startswith("equal: 3 adapters")
    assert "ink (2)" in run.out
    assert lorahub("diff", adapter, adapter, adapter, "-q").out == "equal\n"


def test_two_adapters_are_compared_as_before(lorahub: Cli, three: tuple[Path, ...]) -> None:
    document = lorahub("diff", *three[:2], "--json").json()
    assert {"a", "b", "rows", "cosine"} <= document.keys()
    assert not {"similarity", "interference", "subspaces", "adapters"} & document.keys()
    assert "heat" not in lorahub("diff", *three[:2]).out


def test_formats_are_compared_by_the_names_of_the_base(
    lorahub: Cli, three: tuple[Path, ...], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "oil.safetensors"
    assert lorahub("convert", three[1], "--to", "kohya", "-o", file, "--base", base).code == 0
    run = lorahub("diff", *three, file, "--base", base, "--json")
    document = run.json()
    assert document["cosines"][1][3] == pytest.approx(1, abs=1e-6)
    assert [each["format"] for each in document["adapters"]] == ["peft", "peft", "peft", "kohya"]
    assert len({each["name"] for each in document["adapters"]}) == 4


def test_a_dora_is_named_without_the_base_and_compared_with_it(
    lorahub: Cli, three: tuple[Path, ...], base: Path, make_adapter: Make
) -> None:
    dora = with_dora(make_adapter)
    run = lorahub("diff", *three[:2], dora)
    assert run.code == 1
    assert "not compared" in run.out
    assert "dora: 3 of 3 targets" in run.out
    assert "name the base" in run.out
    without = lorahub("diff", *three[:2], dora, "--json").json()
    assert without["cosines"][0][2] is None
    assert without["norms"][2] is None
    assert without["cosines"][0][1] is not None
    based = lorahub("diff", *three[:2], dora, "--base", base, "--json").json()
    tensors, weights = load_file(dora / FILE), load_file(base / "model.safetensors")
    changes = []
    for layer in range(3):
        stem, weight = f"base_model.model.layers.{layer}.q", weights[f"layers.{layer}.q.weight"].double()
        product = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        moved = weight + 2 * product
        changes.append((3 * moved / moved.norm(dim=1, keepdim=True) - weight).flatten())
    one, other = vector(three[0]), torch.cat(changes)
    assert based["cosines"][0][2] == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-6)
    assert based["left_out"] == []


def test_adapters_that_share_no_target_have_a_cosine_of_zero_and_a_hint(
    lorahub: Cli, three: tuple[Path, ...], make_adapter: Make
) -> None:
    other = elsewhere(make_adapter)
    run = lorahub("diff", three[0], three[2], other)
    assert "name the base: --base BASE" in run.out
    document = lorahub("diff", three[0], three[2], other, "--interference", "--json").json()
    assert document["cosines"][0][2] == 0
    assert document["shared"][0] == [None, 3, 0]
    advice = {tuple(pair["adapters"]): pair["advice"] for pair in document["interference"]["pairs"]}
    assert [each["code"] for each in advice["ink", "elsewhere"]] == ["other-targets"]
    assert [each["code"] for each in advice["ink", "near"]] == ["same-direction"]


def test_interference_looks_at_every_element_and_advises(lorahub: Cli, three: tuple[Path, ...]) -> None:
    run = lorahub("diff", *three, "--interference")
    assert "every one of 768 elements of 3 shared targets" in run.out
    assert "what suits" in run.out
    assert "ink, near" in run.out
    assert "norms made even" not in run.out  # they are even enough
    even = lorahub("diff", three[0], three[1], f"{three[2]}:0.88", "--interference")
    assert "each at its own strength" in even.out
    document = lorahub("diff", *three, "--interference", "--json").json()["interference"]
    a, b = vector(three[0]), vector(three[1])
    products = a * b
    (pair,) = [each for each in document["pairs"] if each["adapters"] == ["ink", "oil"]]
    assert pair["conflict"] == pytest.approx(float(-products[products < 0].sum() / products.abs().sum()), abs=1e-9)
    assert pair["count"] == pytest.approx(float((products < 0).double().mean()), abs=1e-12)
    assert all(pair["advice"] for pair in document["pairs"])
    assert document["elements"] == 768


def test_interference_of_two_comes_with_the_comparison(lorahub: Cli, three: tuple[Path, ...]) -> None:
    run = lorahub("diff", *three[:2], "--interference")
    assert run.code == 1
    assert run.out.startswith("different\n")
    assert "interference: every one of 768 elements" in run.out
    document = lorahub("diff", *three[:2], "--interference", "--json").json()
    assert document["cosine"] == pytest.approx(document["interference"]["pairs"][0]["cosine"])
    assert document["similarity"]["cosines"][0][1] == pytest.approx(document["cosine"])


def test_weights_in_references_count(lorahub: Cli, three: tuple[Path, ...]) -> None:
    plain = lorahub("diff", *three, "--json").json()
    weighed = lorahub("diff", f"{three[0]}:0.5", f"{three[1]}:-1", three[2], "--interference", "--json").json()
    assert weighed["norms"] == pytest.approx([plain["norms"][0] / 2, *plain["norms"][1:]])
    assert weighed["cosines"][0][1] == pytest.approx(-plain["cosines"][0][1])
    assert [each["weight"] for each in weighed["adapters"]] == [0.5, -1.0, 1.0]
    apart = lorahub("diff", f"{three[0]}:0.1", *three[1:], "--interference")
    assert "norms made even" in apart.out
    assert "nuslerp" in apart.out
    assert [each["name"] for each in weighed["adapters"]] == ["ink", "oil", "near"]


@pytest.mark.parametrize("show", ["cosine", "overlap-out", "overlap-in", "conflict"])
def test_the_picture_of_pairs_is_written_as_svg(
    show: str, lorahub: Cli, three: tuple[Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "alike.svg"
    run = lorahub("diff", *three, "--show", show, "--svg", out)
    assert run.code == 1
    assert f"the heat map is in {out}" in run.err
    root = ET.fromstring(out.read_text(encoding="utf-8"))
    said = [each.text for each in root.iter(f"{SVG}title")]
    assert sum(": " in (text or "") for text in said) == (6 if show == "conflict" else 9)
    again = tmp_path / "again.svg"
    lorahub("diff", *three, "--show", show, "--svg", again, "--threads", "3")
    assert again.read_bytes() == out.read_bytes()


def test_the_svg_of_two_is_of_their_directions(lorahub: Cli, three: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "directions.svg"
    run = lorahub("diff", three[0], three[2], "--svg", out)
    assert "overlap of subspaces (phi), 3 targets" in run.out
    root = ET.fromstring(out.read_text(encoding="utf-8"))
    assert sum(": " in (each.text or "") for each in root.iter(f"{SVG}title")) == 16
    document = lorahub("diff", three[0], three[2], "--show", "subspace-out", "--json").json()
    tensors = [load_file(folder / FILE) for folder in (three[0], three[2])]
    total = torch.zeros(4, 4).double()
    for layer in range(3):
        stem = f"base_model.model.layers.{layer}.q"
        one, other = (
            torch.linalg.svd(each[f"{stem}.lora_B.weight"].double() @ each[f"{stem}.lora_A.weight"].double())[0]
            for each in tensors
        )
        for i in range(4):
            for j in range(4):
                total[i, j] += (one[:, : i + 1].mT @ other[:, : j + 1]).norm() ** 2 / (min(i, j) + 1) / 3
    assert torch.tensor(document["subspaces"]["out"]["phi"]).double() == pytest.approx(total, abs=1e-6)


def test_directions_of_one_target_and_as_many_as_asked(lorahub: Cli, three: tuple[Path, ...]) -> None:
    run = lorahub("diff", *three[:2], "--target", "layers.1.q.weight", "--directions", "2", "--json")
    found = run.json()["subspaces"]
    assert found["targets"] == ["layers.1.q.weight"]
    assert [len(row) for row in found["in"]["phi"]] == [2, 2]
    pattern = lorahub("diff", *three[:2], "--target", "layers.*", "--show", "subspace-in", "--json").json()
    assert len(pattern["subspaces"]["targets"]) == 3


def test_the_picture_of_targets_is_layers_down_and_targets_across(lorahub: Cli, three: tuple[Path, ...]) -> None:
    run = lorahub("diff", three[0], three[2], "--show", "targets")
    lines = run.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("layers.")] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--show", "subspace-in"], "--show subspace-in is of two adapters, and these are 3"),
        (["--show", "targets"], "--show targets is of two adapters"),
        (["--target", "x"], "--target is of two adapters"),
        (["--directions", "4"], "--directions is of two adapters"),
        (["--show", "angles"], "'angles' is not one of"),
        (["--tolerance", "2"], "a tolerance of 2.0 makes no sense"),
    ],
)
def test_what_does_not_go_together_is_malformed(
    options: list[str], said: str, lorahub: Cli, three: tuple[Path, ...]
) -> None:
    run = lorahub("diff", *three, *options)
    assert run.code == 2
    assert said in run.err


def test_wrong_names_are_told_with_what_there_is(
    lorahub: Cli, three: tuple[Path, ...], make_adapter: Make, tmp_path: Path
) -> None:
    run = lorahub("diff", *three[:2], "--target", "layers.1.k.weight")
    assert run.code == 2
    assert "Did you mean 'layers.1.q.weight'?" in run.err
    run = lorahub("diff", *three[:2], "--target", "layers.*", "--show", "cosine")
    assert run.code == 2
    assert "they go with --show subspace-in or -out" in run.err
    run = lorahub("diff", three[0], elsewhere(make_adapter), "--show", "subspace-in")
    assert run.code == 2
    assert "the two change no target in common" in run.err
    run = lorahub("diff", *three[:2], tmp_path / "nothing")
    assert run.code == 6
    assert "Hint:" in run.err
    assert lorahub("diff", three[0]).code == 2


def test_what_cannot_be_read_stops_until_it_is_allowed(
    lorahub: Cli, three: tuple[Path, ...], make_adapter: Make
) -> None:
    other = make_adapter("more")
    tensors = load_file(other / FILE)
    save_file(other / FILE, tensors | {"base_model.model.layers.0.q.other": torch.ones(2)}, {"format": "pt"})
    run = lorahub("diff", *three[:2], other)
    assert run.code == 3
    assert "key-unknown" in run.err
    assert lorahub("diff", *three[:2], other, "--allow", "key-unknown").code == 1


def test_adapters_of_different_bases_are_compared_with_a_warning(
    lorahub: Cli, three: tuple[Path, ...], make_adapter: Make
) -> None:
    other = make_adapter("foreign", seed=8, base_model_name_or_path="other/base")
    run = lorahub("diff", *three, other)
    assert run.code == 1
    assert "bases-differ" in run.err
    document = lorahub("diff", *three, other, "--json").json()
    assert [each["code"] for each in document["findings"]] == ["bases-differ"]


def test_long_names_become_letters_that_the_first_table_explains(lorahub: Cli, make_adapter: Make) -> None:
    folders = [make_adapter(f"a-rather-long-name-of-an-adapter-{seed}", seed=seed) for seed in range(3)]
    run = lorahub("diff", *folders)
    assert "\n  a  a-rather-long-name-of-an-adapter-0" in run.out
    assert "a, b  " in run.out
    many = [make_adapter(f"m{seed}", seed=seed) for seed in range(5)]
    text = lorahub("diff", *many, "--interference").out
    assert "other pairs" in text  # ten pairs of one sort are advised on once
    assert json.loads(lorahub("diff", *many, "--json").out)["targets"] == 3


def test_prompts_make_adapters_unequal(lorahub: Cli, tmp_path: Path) -> None:
    folders = []
    for seed, name in enumerate(("one", "two", "three")):
        (tmp_path / name).mkdir()
        prompt = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        save_file(tmp_path / name / FILE, {"prompt_embeddings": prompt}, {"format": "pt"})
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 16, "task_type": "CAUSAL_LM"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        folders.append(tmp_path / name)
    assert lorahub("diff", *folders).code != 0
