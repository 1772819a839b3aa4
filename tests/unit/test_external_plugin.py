"""The plugins in ``examples``, each installed as a distribution of its own: a kind, and a format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.files.writer import save_file

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGINS = ("plugin", "plugin_format")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which Python finds both installed: their code, and metadata as an installer writes it."""
    site = tmp_path / "site"
    for plugin in PLUGINS:
        project = tomllib.loads((EXAMPLES / plugin / "pyproject.toml").read_text())["project"]
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        points = [f"{name} = {module}" for name, module in project["entry-points"]["lorahub"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[lorahub]", *points, ""]))
    paths = [str(site), *(str(EXAMPLES / plugin) for plugin in PLUGINS)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LORAHUB_CACHE": str(tmp_path / "cache")}


def python(environment: dict[str, str], *arguments: str | Path, cwd: Path | None = None) -> str:
    """Run Python with the plugins installed; what it says on stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lorahub(environment: dict[str, str], *arguments: str | Path) -> Any:
    return json.loads(python(environment, "-m", "lorahub", *arguments, "--json"))


MODULES = ("layers.0.q", "layers.1.q")


def write_adapter(folder: Path, shifts: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}.shift": shift for name, shift in shifts.items()}
    save_file(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "ROW_SHIFT", "target_modules": ["q"]}))
    return folder


def test_the_first_example_is_a_whole_package_of_fewer_than_80_lines() -> None:
    files = sorted((EXAMPLES / "plugin").rglob("*.py"))
    assert [file.name for file in files] == ["lorahub_row_shift.py", "test_row_shift.py"]
    assert sum(len(file.read_text().splitlines()) for file in files) < 80


def test_what_they_bring_is_listed(environment: dict[str, str]) -> None:
    listed = lorahub(environment, "plugins")["plugins"]
    found = {each["name"]: (each["state"], each["provides"]) for each in listed}
    assert found["row-shift"] == ("loaded", ["kind row-shift"])
    assert found["slashed"] == ("loaded", ["format slashed"])


def test_an_adapter_of_a_plugins_kind_is_inspected_and_merged(environment: dict[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(6, 4, generator=generator) for name in MODULES}
    shifts = {name: torch.randn(6, generator=generator) for name in MODULES}
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "base" / "model.safetensors", base)
    adapter = write_adapter(tmp_path / "adapter", shifts)
    document = lorahub(environment, "inspect", adapter)
    assert (document["format"], document["kinds"]) == ("peft", ["row-shift"])
    lorahub(environment, "merge", adapter, "--base", tmp_path / "base", "-o", tmp_path / "out")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in base.items():
        expected = (weight.double() + shifts[name.removesuffix(".weight")].double()[:, None]).float()
        assert torch.equal(merged[name], expected)
        assert not torch.equal(merged[name], weight)


CONVERTED = """
import sys
import lorahub
lorahub.convert(sys.argv[1], to="peft", out=sys.argv[2] + "/peft")
lorahub.convert(sys.argv[2] + "/peft", to="slashed", out=sys.argv[2] + "/again")
"""


def test_a_plugins_format_writes_lora_and_another_reads_it_back(environment: dict[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {
        f"{name.replace('.', '/')}/{side}": torch.randn(shape, generator=generator)
        for name in MODULES
        for side, shape in (("A", (2, 4)), ("B", (6, 2)))
    }
    save_file(folder / "slashes.safetensors", tensors)
    (folder / "slashes.json").write_text('{"scale": 0.5}')
    document = lorahub(environment, "inspect", folder)
    assert (document["format"], document["kinds"], document["findings"]) == ("slashed", ["lora"], [])
    python(environment, "-c", CONVERTED, folder, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 0.5
    from safetensors.torch import load_file

    again = load_file(tmp_path / "again" / "slashes.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("plugin", PLUGINS)
def test_its_own_test_passes(plugin: str, environment: dict[str, str]) -> None:
    (file,) = (EXAMPLES / plugin).glob("test_*.py")
    run = (
        f"import runpy; names = runpy.run_path({str(file)!r}); [names[each]() for each in names if each[:5] == 'test_']"
    )
    assert f"from {next((EXAMPLES / plugin).glob('lorahub_*.py')).stem} import" in file.read_text()
    python(environment, "-c", run)
