"""Small adapter folders, and a cache of their own for every test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorahub.hub.cache import Cache

MakeAdapter = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """A folder of an adapter's files; the content differs with ``seed``."""

    def make(name: str = "adapter", *, seed: int = 0, files: dict[str, bytes] | None = None, size: int = 5000) -> Path:
        folder = tmp_path / name
        content = {
            "adapter_config.json": b'{"base_model_name_or_path": "acme/base", "seed": %d}' % seed,
            "adapter_model.safetensors": bytes((index * 7 + seed) % 251 for index in range(size)),
            "README.md": b"# An adapter\n",
        } | (files or {})
        for path, data in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    return make
