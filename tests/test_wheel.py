"""The distributions build, and hold what they must and nothing else."""

from __future__ import annotations

import configparser
import email
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Build the wheel of a project folder with what is installed here."""
    if not all(importlib.util.find_spec(name) for name in ("hatchling", "build")):
        pytest.skip("hatchling is not installed")

    def wheel(project: Path) -> zipfile.ZipFile:
        out = tmp_path_factory.mktemp(project.name)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(project)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = out.glob("*.whl")
        return zipfile.ZipFile(path)

    return wheel


@pytest.fixture(scope="module")
def core(build) -> zipfile.ZipFile:
    return build(ROOT)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def entry_points(wheel: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    return {section: dict(parser[section]) for section in parser.sections()}


def version() -> str:
    namespace: dict[str, str] = {}
    line = next(
        line for line in (ROOT / "lorahub" / "__init__.py").read_text().splitlines() if line.startswith("__version__")
    )
    exec(line, namespace)
    return namespace["__version__"]


def test_the_core_holds_every_module_and_nothing_else(core: zipfile.ZipFile) -> None:
    inside = {name for name in core.namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lorahub").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == sources
    assert "lorahub/py.typed" in inside


def test_the_core_is_called_lorahub_core_and_carries_its_licence(core: zipfile.ZipFile) -> None:
    about = metadata(core)
    assert about["Name"] == "lorahub-core"
    assert about["Version"] == version()
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    (licence,) = (name for name in core.namelist() if name.endswith("licenses/LICENSE"))
    assert core.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_core_brings_two_commands_of_one_function(core: zipfile.ZipFile) -> None:
    scripts = entry_points(core)["console_scripts"]
    assert scripts == {"lorahub": "lorahub.__main__:main", "lorahub-core": "lorahub.__main__:main"}


def test_torch_is_an_extra_and_no_framework_is_required(core: zipfile.ZipFile) -> None:
    requirements = [Requirement(text) for text in metadata(core).get_all("Requires-Dist")]
    always = {each.name for each in requirements if each.marker is None}
    assert not always & {"torch", "numpy", "safetensors", "transformers", "peft", "diffusers", "timm"}
    assert "torch" in {each.name for each in requirements if each.marker and each.marker.evaluate({"extra": "torch"})}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_is_a_distribution_with_an_entry_point(build, name: str) -> None:
    wheel = build(ROOT / "plugins" / name)
    assert metadata(wheel)["Name"] == name
    assert metadata(wheel)["Version"] == version(), "plugins and core are released in step"
    assert set(entry_points(wheel)) == {"lorahub"}
    package = name.replace("-", "_")
    assert {entry.split("/")[0] for entry in wheel.namelist() if ".dist-info/" not in entry} == {package}


def test_what_is_declared_can_be_installed_under_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not {"lorahub", "lorahub-core", *PLUGINS} & set(pinned)
    assert all(not set("@/:") & set(line) for line in lines if not line.startswith("#"))
    versions = {name.lower().replace("_", "-"): pin for name, pin in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    declared += [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if line and line[0] != "#"]
    for text in declared:
        requirement = Requirement(text)
        if requirement.name != "lorahub-core":
            assert requirement.specifier.contains(versions[requirement.name.lower()]), text
