"""What every test stands on, in tests/ and in the plugins': which skips are allowed, the registry, real adapters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lorahub.plugins import Registry, load_registry

settings.register_profile("lorahub", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorahub")  # no test depends on how fast the machine is, and a run can be repeated

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; kernels then run on the CPU

os.environ.setdefault("LORAHUB_KERNELS", str(Path(__file__).parent / ".pytest_cache" / "kernels"))  # compiled once

SKIPS = {
    "set LORAHUB_REAL_ADAPTERS to a folder of real adapters": "they are too large, and not ours to publish",
    "triton is not installed": "there is none for this platform; its kernels have twins in plain torch",
    "no compiled kernel": "there is no C compiler for the CPU's; plain PyTorch is what runs and is tested then",
    "no CUDA device": "the marker gpu; every kernel has a twin that is tested without one",
    "hatchling is not installed": "building a wheel needs it; `make` installs it",
    "diffusers is not installed": "the plugin for its pipelines is tested where its framework is; `make` installs it",
    "no package index": "the lowest versions that are allowed come from one; every other test has those at hand",
    "no room for an environment of its own": "the lowest versions that are allowed take some GB",
    "lorahub-": "a plugin is tested where it is installed; `make` installs them all",
    "timm is not installed": "the plugin for its models is tested where its framework is; `make` installs it",
    "transformers is not installed": "the plugin for its models is tested where its framework is; `make` installs it",
    "runs as root, whom permissions do not bind": "a file cannot be made unreadable for root",
    "this file system": "it cannot hold what the test needs: links, case, a hole, a long name",
    "this kernel has no such weights": "without instructions for float16, those weights go the plain way",
    "this machine": "its processor lacks the instructions that a kernel is made of",
    "this platform": "the system call that is tested is not there",
}
"""How a reason for skipping begins -> why that is no gap.  Any other skip fails."""


_PLUGIN = "lorahub-"
"""How the folder of a plugin is called, before the name of its framework."""


class _Absent(pytest.Module):
    """A file of tests for a plugin that cannot be used here: skipped without being imported."""

    def collect(self) -> list[pytest.Item]:
        folder = next(part for part in self.path.parts if part.startswith(_PLUGIN))
        pytest.skip(f"{_lacking(folder)} is not installed", allow_module_level=True)


@cache
def _lacking(plugin: str) -> str:
    """What a plugin's tests lack: its framework, or itself; "" where both are there."""
    framework = plugin.removeprefix(_PLUGIN)
    wanted = {framework: framework, f"lorahub_{framework}": plugin}
    return next((name for module, name in wanted.items() if find_spec(module) is None), "")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Tests of a plugin are for where its framework is."""
    inside = module_path.relative_to(Path(__file__).parent).parts
    if inside[0] == "plugins" and _lacking(inside[1]):
        return _Absent.from_parent(parent, path=module_path)
    return None


def _unlisted(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The reason of a skip that nobody has justified."""
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return None
    reason = report.longrepr[2].removeprefix("Skipped: ")
    return None if reason.startswith(tuple(SKIPS)) else reason


def _fail_unlisted(report: Any) -> Any:
    if (reason := _unlisted(report)) is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped for a reason that conftest.py does not list: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """An unlisted skip is a failure."""
    return _fail_unlisted((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """An unlisted skip of a whole file is a failure."""
    return _fail_unlisted((yield))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no device, those marked ``plugin`` where it is not loaded."""
    if (marked := [item for item in items if item.get_closest_marker("gpu")]) and not _device():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for item in items:
        if (mark := item.get_closest_marker("plugin")) and (name := mark.args[0]) not in _plugins():
            item.add_marker(pytest.mark.skip(reason=f"{_PLUGIN}{name} is not installed"))


def _device() -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def _plugins() -> frozenset[str]:
    """The plugins that are loaded."""
    return frozenset(each.name for each in load_registry().plugins if each.state == "loaded")


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Built-ins and the installed plugins."""
    return load_registry()


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """The folder of real adapters that ``LORAHUB_REAL_ADAPTERS`` names."""
    folder = os.environ.get("LORAHUB_REAL_ADAPTERS")
    if not folder:
        pytest.skip("set LORAHUB_REAL_ADAPTERS to a folder of real adapters")
    assert Path(folder).is_dir(), f"LORAHUB_REAL_ADAPTERS names {folder}, which is no folder"
    return Path(folder)
