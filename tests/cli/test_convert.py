"""``lorahub convert`` as a person meets it, and the whole way from mystery files to a PEFT model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

Cli = Callable[..., Any]
Make = Callable[..., Path]


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def write_loha(place: Path) -> Path:
    """A LyCORIS file on two layers of the base, rank 2."""
    tensors = {}
    for layer in range(2):
        stem = f"lycoris_layers_{layer}_q"
        for name, size in (("w1_a", (16, 2)), ("w1_b", (2, 16)), ("w2_a", (16, 2)), ("w2_b", (2, 16))):
            tensors[f"{stem}.hada_{name}"] = drawn(*size, seed=len(tensors))
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, place, {"ss_network_module": "lycoris.kohya", "modelspec.title": "Ink"})
    return place


def test_convert_says_what_it_did_and_that_nothing_changed(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("convert", adapter, "--to", "kohya", "-o", tmp_path / "ink.safetensors")
    assert run.code == 0, run.err
    assert "peft -> kohya" in run.out
    assert "none: the same bits" in run.out
    assert "rename" in run.out
    keys = load_file(tmp_path / "ink.safetensors")
    assert sorted(key.partition(".")[0] for key in keys if key.endswith(".alpha")) == [
        f"lycoris_layers_{layer}_q" for layer in range(3)
    ]


def test_quiet_says_only_where_it_is_and_json_says_all(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("convert", adapter, "--to", "mlx", "-o", tmp_path / "one", "-q")
    assert (run.code, run.out.strip()) == (0, str(tmp_path / "one"))
    document = lorahub("convert", adapter, "--to", "mlx", "-o", tmp_path / "two", "--json").json()
    assert (document["from"], document["to"], document["exact"]) == ("peft", "mlx", True)
    assert document["rules"] == {"rename": 3}
    assert (document["max_difference"], document["unverified"]) == (0.0, 0)
    assert [each["difference"] for each in document["targets"]] == [0.0] * 3


def test_verify_lists_every_target(lorahub: Cli, base: Path, tmp_path: Path) -> None:
    source = write_loha(tmp_path / "loha.safetensors")
    arguments = ("convert", source, "--to", "diffusers", "--base", base)
    brief = lorahub(*arguments, "-o", tmp_path / "one")
    assert brief.code == 0, brief.err
    assert "layers.1.q.weight" not in brief.out
    assert "loha-to-lora  loha -> lora  2 -> 4  2" in brief.out
    full = lorahub(*arguments, "-o", tmp_path / "two", "--verify")
    assert "layers.0.q.weight" in full.out
    assert "layers.1.q.weight" in full.out
    blind = lorahub(*arguments, "-o", tmp_path / "three", "--no-verify")
    assert "not compared" in blind.out


def test_a_missing_base_is_the_next_thing_to_type(lorahub: Cli, tmp_path: Path) -> None:
    source = write_loha(tmp_path / "loha.safetensors")
    run = lorahub("convert", source, "--to", "peft", "-o", tmp_path / "out")
    assert run.code == 4
    assert "layers_0_q" in run.err
    assert "--base BASE" in run.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_carried_is_said_and_recorded(lorahub: Cli, base: Path, tmp_path: Path) -> None:
    source = write_loha(tmp_path / "loha.safetensors")
    run = lorahub("convert", source, "--to", "peft", "--base", base, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    assert "ss_network_module" in run.err
    record = json.loads((tmp_path / "out" / "lorahub.json").read_text())
    assert record["title"] == "Ink"
    assert record["derivation"]["converted_from"] == "kohya"
    assert "ss_network_module" in record["derivation"]["losses"][0]
    assert lorahub("inspect", tmp_path / "out").code == 0
    assert lorahub("check", tmp_path / "out", "--base", base).code == 0


def test_an_approximation_is_asked_for_and_told(lorahub: Cli, make_adapter: Make, base: Path, tmp_path: Path) -> None:
    source = make_adapter("dora", use_dora=True)
    weights = load_file(source / "adapter_model.safetensors")
    for layer in range(3):
        weights[f"base_model.model.layers.{layer}.q.lora_magnitude_vector"] = drawn(16, seed=layer).abs() + 1
    save_file(weights, source / "adapter_model.safetensors")
    arguments = ("convert", source, "--to", "mlx", "--kind", "lora", "--base", base)
    kept = lorahub(*arguments, "-o", tmp_path / "kept", "--json").json()
    assert kept["rules"] == {"rename": 3}  # MLX has DoRA, and nothing is approximated unasked
    run = lorahub(*arguments, "-o", tmp_path / "out", "--approximate", "--rank", "6")
    assert run.code == 0, run.err
    assert "as was asked for" in run.out
    assert "approximated" in run.out
    document = lorahub(*arguments, "-o", tmp_path / "again", "--approximate", "--rank", "6", "--json").json()
    assert document["exact"] is False
    assert 1e-2 < document["max_difference"] < 1
    wrong = lorahub(*arguments, "-o", tmp_path / "never", "--rank", "6")
    assert wrong.code == 2
    assert "--approximate" in wrong.err


def test_misspelt_formats_get_a_suggestion(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("convert", adapter, "--to", "kohia", "-o", tmp_path / "out")
    assert run.code == 2
    assert "Did you mean 'kohya'" in run.err
    assert list(tmp_path.glob("out*")) == []


def test_an_unknown_format_is_named_with_the_known_ones(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("convert", adapter, "--to", "nope", "-o", tmp_path / "out")
    assert run.code == 2
    assert all(name in run.err for name in ("peft", "diffusers", "kohya", "mlx"))


def test_a_place_that_is_taken_fails_as_it_does_for_merge(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    codes = {
        lorahub(*command, "-o", taken).code
        for command in (("convert", adapter, "--to", "mlx"), ("merge", adapter, "--base", base))
    }
    assert codes == {1}
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_an_absent_folder_is_named_in_the_command_that_makes_it(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    run = lorahub("convert", adapter, "--to", "mlx", "-o", tmp_path / "not here" / "out")
    assert run.code == 1
    assert f"mkdir -p '{tmp_path / 'not here'}'" in run.err
    assert f"{tmp_path / 'not here' / 'out'} cannot be written" in run.err


class Base(nn.Module):
    """The base as a model: what ``make_base`` stores."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "qv"}) for _ in range(3)
        )
        self.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["q"](x)) + layer["v"](x)
        return x


def test_from_a_folder_of_mystery_files_to_a_model_that_peft_runs(
    lorahub: Cli, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Ask what they are, convert one to PEFT, load it with PEFT: equal to the checkpoint that merging gives."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    write_loha(folder / "a.safetensors")
    save_file({"lora_unet_x.lora_down.weight": drawn(2, 4)}, folder / "broken.safetensors")
    save_file({f"layers.{n}.q.lora_{side}.default.weight": drawn(*size, seed=n) for n in range(3)
               for side, size in (("A", (2, 16)), ("B", (16, 2)))}, folder / "c.safetensors")  # fmt: skip

    listed = {each["name"]: each for each in lorahub("inspect", folder, "--json").json()["adapters"]}
    assert (listed["a.safetensors"]["format"], listed["a.safetensors"]["kinds"]) == ("kohya", ["loha"])
    assert listed["c.safetensors"]["format"] == "state-dict"
    assert len(listed) == 3

    for name in ("a", "c"):
        run = lorahub("convert", folder / f"{name}.safetensors", "--to", "peft", "--base", base, "-o", tmp_path / name)
        assert run.code == 0, run.err
        merged = lorahub("merge", folder / f"{name}.safetensors", "--base", base, "-o", tmp_path / f"{name}-merged")
        assert merged.code == 0, merged.err
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
            from peft import PeftModel

            live = PeftModel.from_pretrained(Base(base), tmp_path / name)  # type: ignore[arg-type]
        x = drawn(4, 16, seed=9)
        with torch.no_grad():
            found, expected, bare = live(x), Base(tmp_path / f"{name}-merged")(x), Base(base)(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert float((expected - bare).norm() / bare.norm()) > 1e-2


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya", "mlx"])
def test_what_cannot_be_read_is_refused_and_nothing_is_left(lorahub: Cli, to: str, tmp_path: Path) -> None:
    source = tmp_path / "broken.safetensors"
    save_file({"lora_unet_x_y.lora_down.weight": drawn(2, 4)}, source)
    run = lorahub("convert", source, "--to", to, "-o", tmp_path / "out")
    assert run.code in (4, 5)
    assert "lora_up" in run.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["broken.safetensors"]
