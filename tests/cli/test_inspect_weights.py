"""``lorahub inspect --weights``: norms, spectra and energies against plain float64, and the picture of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file

from lorahub import sources
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.cli.output import Output
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.deltas.oft import Turn
from lorahub.files.writer import save_file
from lorahub.weighing import heat_map, weigh

Cli = Callable[..., Any]
Make = Callable[..., Path]


def products(adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    """Every change, term by term in float64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    result = {}
    for key, up in factors.items():
        if key.endswith(".lora_B.weight"):
            down = factors[key.replace("lora_B", "lora_A")].double()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            terms = [torch.outer(up.double()[:, k], down[k]) for k in range(down.shape[0])]
            result[name] = scale * torch.stack(terms).sum(0)
    return result


def test_norms_spectra_and_energies_are_those_of_the_dense_changes(lorahub: Cli, adapter: Path) -> None:
    document = lorahub("inspect", adapter, "--weights", "--json").json()["weights"]
    dense = products(adapter, 2.0)
    total = sum(float((change**2).sum()) for change in dense.values())
    assert document["norm"] == pytest.approx(math.sqrt(total), rel=1e-10)
    assert len(document["targets"]) == len(dense) == 3
    for each in document["targets"]:
        change = dense[each["target"].removesuffix(".weight")]
        values = torch.linalg.svdvals(change)[:4]
        shares = [float(value) / float(values.sum()) for value in values]
        assert each["norm"] == pytest.approx(float(change.norm()), rel=1e-9)
        assert each["energy"] == pytest.approx(float((change**2).sum()) / total, rel=1e-9)
        assert each["top"] == pytest.approx(values.tolist(), rel=1e-9)
        assert each["stable_rank"] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-9)
        assert each["effective_rank"] == pytest.approx(
            math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-9
        )
        assert each["rank"] == 4
        assert each["relative"] is None
        assert 1 <= each["stable_rank"] <= each["effective_rank"] <= 4


def test_norms_relative_to_the_base_are_its_weights_own(lorahub: Cli, adapter: Path, base: Path) -> None:
    document = lorahub("inspect", adapter, "--weights", "--base", base, "--json").json()["weights"]
    weights, dense = load_file(base / "model.safetensors"), products(adapter, 2.0)
    for each in document["targets"]:
        change = dense[each["target"].removesuffix(".weight")]
        assert each["relative"] == pytest.approx(
            float(change.norm() / weights[each["target"]].double().norm()), rel=1e-9
        )
    assert "relative" in lorahub("inspect", adapter, "--base", base).out


def change_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_changes_without_factors_are_weighed_whole() -> None:
    diff = change_of(1, 6, 9)
    found = weigh(Adapter(deltas={Target("", "a", "weight"): Full(diff=diff, scale=1.0)}))
    (each,) = found.targets
    assert each.norm == pytest.approx(float(diff.double().norm()))
    assert each.top == pytest.approx(torch.linalg.svdvals(diff.double())[:5].tolist())
    assert each.rank is None


def test_a_change_that_depends_on_the_weight_is_listed_without_a_base_and_weighed_with_one() -> None:
    target = Target("", "a", "weight")
    delta = Turn.example((8, 8), r=2, generator=torch.Generator().manual_seed(3))
    adapter = Adapter(deltas={target: delta, Target("", "b", "weight"): Full(diff=change_of(2, 4, 4), scale=1.0)})
    found = weigh(adapter)
    assert [each.target for each in found.targets] == ["b.weight"]
    assert "--base" in found.left_out["a.weight"]

    class One:
        def weight(self, asked: Target) -> torch.Tensor | None:
            return change_of(5, 8, 8).double() if asked == target else None

    with_base = weigh(adapter, base=One())  # type: ignore[arg-type]
    expected = delta.delta(change_of(5, 8, 8).double())
    assert float(expected.norm()) > 0.01
    assert with_base.targets[0].norm == pytest.approx(float(expected.norm()))
    assert with_base.left_out == {}


def test_an_adapter_that_changes_nothing_has_no_ranks() -> None:
    zero = LoRA(up=torch.zeros(4, 2), down=torch.ones(2, 4), scale=1.0)
    (each,) = weigh(Adapter(deltas={Target("", "a", "weight"): zero})).targets
    assert (each.norm, each.energy, each.stable_rank, each.effective_rank) == (0.0, 0.0, None, None)


def test_the_picture_has_a_row_for_each_layer_in_natural_order(make_adapter: Make, tmp_path: Path) -> None:
    tensors = {}
    for layer in range(12):
        for place in ("self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj"):
            stem = f"base_model.model.model.layers.{layer}.{place}"
            tensors[f"{stem}.lora_A.weight"] = change_of(layer, 4, 16)
            tensors[f"{stem}.lora_B.weight"] = change_of(layer + 50, 16, 4) * (layer + 1)
    folder = make_adapter("deep", target_modules=["v_proj", "q_proj", "up_proj"])
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    picture = heat_map(sources.weigh(str(folder)), "norm", title="deep")
    assert picture.rows == [f"layers.{layer}" for layer in range(12)]
    assert list(picture.columns) == ["mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert len(picture.values) == 36
    assert picture.values["layers.11", "mlp.up_proj"] > picture.values["layers.0", "mlp.up_proj"]


def test_many_experts_are_shown_together_with_the_norm_of_all_of_them() -> None:
    deltas = {}
    for layer in range(8):
        for expert in range(32):
            up = torch.full((2, 1), float(expert + 1))
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
            deltas[Target("", name, "weight")] = LoRA(up=up, down=torch.ones(1, 2), scale=1.0)
    picture = heat_map(weigh(Adapter(deltas=deltas)), "norm", title="moe")
    assert picture.rows == [f"layers.{layer}.mlp.experts.*" for layer in range(8)]
    together = math.sqrt(sum((2 * (expert + 1)) ** 2 for expert in range(32)))
    assert list(picture.values.values()) == pytest.approx([together] * 8)


def test_the_svg_is_written_whole_and_the_same_every_time(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("inspect", adapter, "--svg", tmp_path / "one.svg")
    assert run.code == 0, run.err
    assert "one.svg" in run.err
    assert lorahub("inspect", adapter, "--svg", tmp_path / "two.svg").code == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ET.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix == ".svg") == ["one.svg", "two.svg"]


def test_the_terminal_shows_the_table_and_the_picture_without_escapes_in_a_pipe(lorahub: Cli, adapter: Path) -> None:
    run = lorahub("inspect", adapter, "--weights")
    assert "\x1b" not in run.out
    assert "stable rank" in run.out
    assert "layers.2" in run.out
    assert "\u2588" in run.out


@pytest.mark.parametrize(
    ("terminal", "environment", "wanted", "colour"),
    [
        (True, {}, True, True),
        (True, {"NO_COLOR": "1"}, True, False),
        (True, {"NO_COLOR": ""}, True, True),
        (True, {"TERM": "dumb"}, True, False),
        (True, {}, False, False),
        (False, {}, True, False),
    ],
)
def test_colours_only_on_a_terminal_that_wants_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], wanted: bool, colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert Output().colour(wanted=wanted) is colour
    assert os.environ["TERM"]


def test_what_a_picture_shows_can_be_chosen(lorahub: Cli, adapter: Path) -> None:
    assert "effective rank (entropy)" in lorahub("inspect", adapter, "--show", "effective-rank").out
    assert lorahub("inspect", adapter, "--show", "relative").code == 2


def test_weights_of_a_folder_of_adapters_are_a_usage_error(lorahub: Cli, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("a", "b"):
        (shelf / f"{name}.safetensors").write_bytes(b"")
    assert lorahub("inspect", shelf, "--weights").code == 2


def test_every_measure_of_the_document_is_json(lorahub: Cli, adapter: Path) -> None:
    text = lorahub("inspect", adapter, "--weights", "--json").out
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
