"""A project in a folder of its own, a folder hub, and the command line in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.conftest import double  # noqa: F401 - a fixture: the Hub double, for what only a server can do
from manifest.team import Run, Team, write_base

import lorahub
from lorahub.cli.main import main


def enter(root: Path, patch: pytest.MonkeyPatch) -> Team:
    """The project below ``root``, as the current folder of somebody with a hub and a cache of their own there."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    patch.setenv("LORAHUB_CACHE", str(root / "cache"))
    patch.setenv("LORAHUB_HUB", str(root / "hub"))
    patch.chdir(root / "project")
    return Team(folder=root / "project", hub=root / "hub", base=root / "project" / "base")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """A project with a base and no manifest yet; it is the current folder."""
    write_base(tmp_path / "project" / "base")
    return enter(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def model_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``locked`` is a copy of."""
    root = tmp_path_factory.mktemp("manifest")
    write_base(root / "project" / "base")
    with pytest.MonkeyPatch.context() as patch:
        team = enter(root, patch)
        team.publish("acme/ink", "1.2.0", seed=1)
        team.publish("acme/sql", "1.0.0", seed=2)
        team.adapter(team.folder / "own", seed=3)
        team.write(
            'base = "./base"\n\n[adapters]\nink = "acme/ink@~=1.2"\n'
            'sql = { ref = "acme/sql@1", weight = 0.5 }\nown = "./own"\n'
        )
        lorahub.lock()
    return root


@pytest.fixture
def locked(model_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """The project with two adapters of the hub and one of its own, locked; it is the current folder."""
    for name in ("project", "hub"):
        shutil.copytree(model_project / name, tmp_path / name)
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """``run("lock", "--check")``: the command line in this process."""

    def invoke(*arguments: str | os.PathLike[str]) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([os.fspath(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code=int(stop.value.code or 0), out=captured.out, err=captured.err)

    return invoke
