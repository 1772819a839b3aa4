"""Weights by component and block where a pipeline is merged on disk: the numbers asked for, and what is spared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import sd

import lorahub
import lorahub_diffusers
from lorahub.cli.main import main
from lorahub.errors import RecipeError, UsageError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

PLACES: Mapping[str, tuple[str, str, int]] = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": ("unet", "down", 64),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k": ("unet", "mid", 64),
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": ("text_encoder", "", 32),
}
"""Module as diffusers names it -> its component, its block, and its size."""
FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def adapter(folder: Path, seed: int) -> Path:
    """Factors of small multiples of a power of two, so that no product of them is rounded."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (_, _, size) in PLACES.items():
        tensors[f"{module}.lora_A.weight"] = torch.randint(-3, 4, (2, size), generator=generator) / 16
        tensors[f"{module}.lora_B.weight"] = torch.randint(-3, 4, (size, 2), generator=generator) / 16
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A pipeline's folder, and two adapters."""
    place = tmp_path_factory.mktemp("disk")
    sd().save_pretrained(place / "base")
    return place / "base", adapter(place / "ink", 1), adapter(place / "oil", 2)


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {component: load_file(folder / component / file) for component, file in FILES.items()}


def stored(module: str) -> str:
    return f"{module.partition('.')[2].removeprefix('text_model.')}.weight"


def holds(base: Path, out: Path, *given: tuple[Path, Mapping[str, float]]) -> None:
    """The result has each adapter's changes at the number of their component or block, and all else as it was."""
    before, after = states(base), states(out)
    assert {name: each.keys() for name, each in after.items()} == {name: each.keys() for name, each in before.items()}
    expected = {name: dict(each) for name, each in before.items()}
    for module, (component, block, _) in PLACES.items():
        name = next(key for key in before[component] if key.endswith(stored(module)))
        total = before[component][name].double()
        for folder, numbers in given:
            tensors = load_file(folder / "pytorch_lora_weights.safetensors")
            down, up = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
            change = up @ down
            assert change.norm() / before[component][name].norm() > 1e-2
            total = total + numbers.get(block, numbers.get(component, 1.0)) * change
        expected[component][name] = total.float()
    for component, tensors in expected.items():
        for name, each in tensors.items():
            assert (after[component][name] - each).abs().max() <= 2**-23 * each.abs().max()
            if torch.equal(each, before[component][name]):
                assert torch.equal(after[component][name], each)


@pytest.mark.parametrize(
    "weight",
    [
        {"unet": 0.5, "text_encoder": 0.25},
        {"text_encoder": 0.0},
        {"unet": {"down": 0.25, "mid": 0.0}, "text_encoder": 0.5},
    ],
)
def test_components_and_blocks_get_the_numbers_that_are_asked_for(
    weight: dict[str, Any], made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, ink, _ = made
    report = lorahub.merge(base, {"ink": str(ink)}, weights={"ink": weight}, out=tmp_path / "out")
    unet = weight.get("unet", 1.0)
    numbers = {**weight, **(unet if isinstance(unet, dict) else {"unet": unet})}
    holds(base, tmp_path / "out", (ink, numbers))
    assert report.changed == sum(
        number != 0 for number in (numbers.get(b, numbers.get(c, 1)) for c, b, _ in PLACES.values())
    )
    told = json.loads((tmp_path / "out" / "lorahub-merge.json").read_text())
    assert told["adapters"][0]["weight"] == weight


def test_a_folder_and_a_live_pipeline_come_to_the_same_bits(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, ink, _ = made
    weight = {"unet": {"down": 0.25, "mid": 0.75}, "text_encoder": 0.3}
    lorahub.merge(base, {"ink": str(ink)}, weights={"ink": weight}, out=tmp_path / "out")
    one, other = sd(), sd()
    lorahub_diffusers.load_lora_weights(one, ink, weights=weight).merge_into()
    merged = lorahub.merge(other, {"ink": str(ink)}, weights={"ink": weight})
    for component, tensors in states(tmp_path / "out").items():
        for live in (one, other):
            own = getattr(live, component).state_dict()
            for name, each in tensors.items():
                assert torch.equal(own.get(name, own.get(name.removeprefix("text_model."))), each)
    merged.undo()


def test_the_command_weighs_components_of_one_adapter_among_several(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ink, oil = made
    parts = ["--weight", "ink:text_encoder=0.5", "--weight", "ink:unet=0.25"]
    with pytest.raises(SystemExit) as stop:
        main(["merge", f"{ink}:0.5", f"{oil}:2", "--base", str(base), "-o", str(tmp_path / "out"), *parts])
    assert stop.value.code == 0, capsys.readouterr().err
    holds(
        base,
        tmp_path / "out",
        (ink, {"unet": 0.125, "text_encoder": 0.25}),
        (oil, {"unet": 2.0, "text_encoder": 2.0}),
    )


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ("unet=0.5", "of which adapter"),
        ("pen:unet=0.5", "no adapter is called 'pen'"),
        ("ink:unet=half", "no number"),
        ("ink:0.5", "no COMPONENT=NUMBER"),
        ("ink:vae=0.5", "no target is in a component 'vae'"),
    ],
)
def test_a_part_that_means_nothing_is_refused(
    part: str, why: str, made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ink, oil = made
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(ink), str(oil), "--base", str(base), "-o", str(tmp_path / "out"), "--weight", part])
    assert stop.value.code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_by_component_are_refused_where_there_is_no_place_for_them(made: tuple[Path, Path, Path]) -> None:
    base, ink, _ = made
    weights: Any = {"ink": {"unet": 0.5}}
    with pytest.raises(UsageError, match="go into the factors"):
        lorahub.plan(base, {"ink": str(ink)}, weights=weights, compat="peft")
    with pytest.raises(UsageError, match="has one weight"):
        lorahub.attach(sd(), {"ink": str(ink)}, weights=weights)
    with pytest.raises(RecipeError, match="'pen'"):
        lorahub.plan(base, {"ink": str(ink)}, weights={"ink": {"pen": 0.5}})
    with pytest.raises(UsageError, match="the weight of 'ink'"):
        lorahub.plan(base, {"ink": str(ink)}, weights={"ink": {"unet": "half"}})
