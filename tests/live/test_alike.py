"""Adapters of one structure are placed once, and others as what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorahub
from lorahub import attaching

NAMES = ("a", "b")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)
        for layer in (self.a, self.b):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def saved(
    folder: Path, seed: int, *, alpha: int = 4, names: tuple[str, ...] = NAMES, r: int = 2, **more: object
) -> Path:
    """An adapter in PEFT's layout."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (6, 8), "b": (8, 6)}
    folder.mkdir()
    tensors = {}
    for name in names:
        out, width = sizes[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, width, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, r, generator=generator)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(names)} | more
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters that were planned, by name."""
    asked: list[str] = []
    prepare = attaching.prepare

    def counted(base: Any, adapters: Any, **options: Any) -> Any:
        asked.extend(adapters)
        return prepare(base, adapters, **options)

    monkeypatch.setattr(attaching, "prepare", counted)
    return asked


def expected(folder: Path, x: torch.Tensor) -> torch.Tensor:
    model = Model()
    lorahub.merge(model, {"it": lorahub.load(folder)})
    return model(x)


def attached(folders: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """What the model gives with each of the adapters chosen."""
    model, x = Model(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    with (
        lorahub.attach(model, {})
        if not folders
        else lorahub.attach(model, {name: lorahub.load(folder) for name, folder in folders.items()}, active=[]) as live
    ):
        for name, folder in folders.items():
            live.set_adapters([name])
            found, merged = model(x), expected(folder, x)
            assert float((merged - plain).norm() / plain.norm()) > 1e-2
            torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)
            yield name, found


@torch.no_grad()
def test_adapters_that_differ_in_their_numbers_alone_are_planned_once(tmp_path: Path, plans: list[str]) -> None:
    folders = {f"n{seed}": saved(tmp_path / f"n{seed}", seed) for seed in range(4)}
    found = dict(attached(folders))
    assert plans.count("n0") == 1
    assert not {"n1", "n2", "n3"} & set(plans)
    assert len({float(output.sum()) for output in found.values()}) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [{"alpha": 7}, {"names": ("a",)}, {"r": 3}, {"use_rslora": True}, {"alpha_pattern": {"a": 1}}],
    ids=str,
)
def test_adapters_that_differ_in_what_their_files_say_are_planned_each(
    other: dict[str, Any], tmp_path: Path, plans: list[str]
) -> None:
    folders = {"one": saved(tmp_path / "one", 0), "other": saved(tmp_path / "other", 1, **other)}
    assert len(dict(attached(folders))) == 2
    assert {"one", "other"} <= set(plans)


@torch.no_grad()
def test_numbers_that_a_format_keeps_as_tensors_are_part_of_the_structure(tmp_path: Path, plans: list[str]) -> None:
    """In kohya's layout alpha is a tensor, so headers alone are equal."""
    folders = {}
    for at, alpha in enumerate((1.0, 5.0, 1.0)):
        generator = torch.Generator().manual_seed(at)
        tensors = {}
        for name, (out, width) in {"a": (6, 8), "b": (8, 6)}.items():
            tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
            tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
        folder = folders[f"k{at}"] = tmp_path / f"k{at}"
        folder.mkdir()
        save_file(tensors, folder / "kohya.safetensors")
    pipeline = {name: lorahub.load(folder) for name, folder in folders.items()}
    scales = [next(iter(adapter.deltas.values())).scale for adapter in pipeline.values()]  # type: ignore[attr-defined]
    assert scales[0] != scales[1]
    alike = attaching.Alike()
    plan: Any = type("", (), {"steps": ()})()
    alike.keep(pipeline["k0"], plan)
    assert alike.plan(pipeline["k1"]) is None
    assert alike.plan(pipeline["k2"]) is plan


@torch.no_grad()
def test_a_recorded_adapter_is_judged_by_its_own_record(tmp_path: Path, plans: list[str]) -> None:
    folders = {name: saved(tmp_path / name, seed) for seed, name in enumerate(("one", "other"))}
    for folder in folders.values():
        lorahub.record(folder)
    assert len(dict(attached(folders))) == 2
    assert {"one", "other"} <= set(plans)
