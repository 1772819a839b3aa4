"""A project, the hub that its adapters come from, and small real adapters for a small base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import lorahub
from lorahub.files.writer import save_file
from lorahub.hub.folder import FolderHub
from lorahub.names import Ref

WIDTH, RANK, LAYERS = 8, 2, 2


def write_base(folder: Path, *, seed: int = 0, width: int = WIDTH) -> Path:
    """A folder with one safetensors file of linear weights and no config."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {f"layers.{n}.q.weight": torch.randn(width, width, generator=generator) for n in range(LAYERS)}
    save_file(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def write_adapter(folder: Path, *, seed: int = 1) -> Path:
    """A PEFT LoRA folder on every layer."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.layers.{layer}.q"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": ["q"],
        "bias": "none",
        "base_model_name_or_path": "acme/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Team:
    """A project in its folder, and the hub that its adapters come from."""

    folder: Path
    hub: Path
    base: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "lorahub.toml"

    @property
    def lock(self) -> Path:
        return self.folder / "lorahub.lock"

    def write(self, text: str) -> None:
        self.manifest.write_text(text)

    def adapter(self, folder: Path, *, seed: int = 1, licence: str = "apache-2.0", recorded: bool = True) -> Path:
        write_adapter(folder, seed=seed)
        if recorded:
            lorahub.record(folder, self.base, license=licence)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Adapter {seed}\n")
        return folder

    def publish(self, repo: str, version: str | None, *, seed: int = 1, **options: object) -> str:
        """Push an adapter made for the base; the commit."""
        place = self.hub.parent / "made" / f"{repo.replace('/', '-')}-{version}-{seed}"
        folder = place if place.exists() else self.adapter(place, seed=seed, **options)  # type: ignore[arg-type]
        return FolderHub(self.hub).push(folder, Ref(repo=repo), version=version).commit


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that people see."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".lorahub" not in path.relative_to(folder).parts
    }


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
