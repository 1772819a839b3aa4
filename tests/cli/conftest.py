"""A small base, an adapter for it, and the command line run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lorahub.cli.main import main
from lorahub.files.writer import save_file

WIDTH, RANK, LAYERS = 16, 4, 3


@dataclass(frozen=True)
class Run:
    """What one invocation did."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, object]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


@pytest.fixture
def lorahub(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run ``lorahub ARGS``; caches go to a temporary folder."""
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAHUB_HUB", raising=False)

    def run(*arguments: str | Path) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code=int(stop.value.code or 0), out=captured.out, err=captured.err)

    return run


def write_base(folder: Path, *, seed: int = 0, width: int = WIDTH) -> Path:
    """A folder with one safetensors file of linear weights and no config."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {
        f"layers.{layer}.{name}.weight": torch.randn(width, width, generator=generator)
        for layer in range(LAYERS)
        for name in ("q", "v")
    }
    save_file(folder / "model.safetensors", {name: tensors[name] for name in sorted(tensors)}, {"format": "pt"})
    return folder


def write_adapter(folder: Path, *, seed: int = 1, **config: object) -> Path:
    """A PEFT LoRA folder on ``q`` of every layer, rank 4, alpha 8."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.layers.{layer}.q"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    document = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["q"],
        "bias": "none",
        "task_type": None,
        "base_model_name_or_path": "acme/base",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """``make_base("name", seed=0, width=16)`` -> folder."""
    return lambda name, **options: write_base(tmp_path / name, **options)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """``make_adapter("name", seed=1, use_dora=True)`` -> folder; further options go into its config."""
    return lambda name, **options: write_adapter(tmp_path / name, **options)


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("base")


@pytest.fixture
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter("ink")
