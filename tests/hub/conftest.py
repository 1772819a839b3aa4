"""A double of the Hugging Face Hub and clients of it, small adapter folders, and a cache of its own for every test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub.bases import base, query_lora
from hub.double import READER, STRANGER, TOKEN, Double
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # exported at first use

from lorahub import publishing
from lorahub.hub.cache import Cache
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.merging.checking import check
from lorahub.report import CheckReport

MakeAdapter = Callable[..., Path]

_UNSET = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_CACHE",
    "LORAHUB_CACHE",
    "LORAHUB_HUB",
    "LORAHUB_DISABLE_PUSH",
)
"""Variables of the one who runs the tests that would decide what is tested."""

_CLIENTS_OWN = "Use 'content="
"""What huggingface_hub's plain upload makes its HTTP library say."""


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    """A Hub without repositories, and a client in this process that keeps nothing from one test to the next."""
    warnings.filterwarnings("ignore", _CLIENTS_OWN, DeprecationWarning)  # for this test: pytest puts it back
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "client-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in _UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorahub.hub.huggingface.download.PAUSES", (0.0, 0.0, 0.0))
    close_session()
    with Double() as double:
        yield double
        close_session()
    assert double.broken == []
    assert not [each for each in double.log if each.where == "cdn" and "authorization" in each.headers]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def hub(double: Double, cache: Cache) -> HuggingFaceHub:
    """May write to acme."""
    return HuggingFaceHub(api=double.api(TOKEN), cache=cache)


@pytest.fixture
def reader(double: Double, cache: Cache) -> HuggingFaceHub:
    """A member of acme with a token that only reads."""
    return HuggingFaceHub(api=double.api(READER), cache=cache)


@pytest.fixture
def stranger(double: Double, cache: Cache) -> HuggingFaceHub:
    """Somebody with a token, and no right to anything that is not public."""
    return HuggingFaceHub(api=double.api(STRANGER), cache=cache)


@pytest.fixture
def anonymous(double: Double, cache: Cache) -> HuggingFaceHub:
    """Nobody: the client sends no token."""
    return HuggingFaceHub(api=double.api(token=False), cache=cache)


@pytest.fixture
def offline(double: Double, cache: Cache) -> HuggingFaceHub:
    return HuggingFaceHub(api=HfApi(endpoint=double.endpoint), cache=cache, local_files_only=True)


@pytest.fixture
def xet(double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    """The double with Xet, which the client in this process uses."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet-cache"))
    monkeypatch.setattr("huggingface_hub.utils._xet.XET_CONNECTION_INFO_CACHE", {})
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    double.enable_xet(tmp_path / "cas")
    return double


@pytest.fixture
def environment(double: Double, tmp_path: Path) -> dict[str, str]:
    """Variables for a subprocess that is to use the double as its Hub, and nothing of this machine's user."""
    return {name: value for name, value in os.environ.items() if name not in _UNSET} | {
        "HF_ENDPOINT": double.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LORAHUB_CACHE": str(tmp_path / "lorahub-cache"),
    }


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


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on the queries of ``hub.bases.base()``, without a record."""
    folder = tmp_path / "ink"
    folder.mkdir()
    for name, data in query_lora().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def recorded(double: Double, adapter: Path) -> Path:
    """The adapter, with a record of ``acme/base`` as it was at first."""
    double.repo("acme/base").commit(base())
    publishing.record(adapter, "acme/base", hub=double.endpoint, license="mit")
    double.log.clear()
    return adapter


@pytest.fixture
def at(double: Double) -> Callable[..., CheckReport]:
    """``at(FOLDER, "acme/base")``: what ``check`` reports, asked at the double."""
    return lambda source, ref=None, **options: check(source, ref, hub=double.endpoint, **options)
