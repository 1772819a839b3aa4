"""The plugin in ``examples/plugin``, installed as a distribution of its own: one file a kind, one file a format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lorahub.files.writer import save_file

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which Python finds the plugin installed: its code, and its metadata as an installer writes it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {module}" for name, module in project["entry-points"]["lorahub"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[lorahub]", *points, ""]))
    paths = [str(PLUGIN), str(site)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LORAHUB_CACHE": str(tmp_path / "cache")}


def python(environment: dict[str, str], *arguments: str | Path) -> str:
    """Run Python with the plugin installed; what it says on stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_adapter(folder: Path, shifts: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(folder / "shift.safetensors", {f"{name.replace('.', '/')}/shift": shifts[name] for name in shifts})
    (folder / "shift.json").write_text(json.dumps({"strength": 0.5}))
    return folder


def test_its_kind_and_its_format_are_listed(environment: dict[str, str]) -> None:
    listed = python(environment, "-m", "lorahub", "plugins", "--json")
    provides = [name for plugin in json.loads(listed)["plugins"] for name in plugin["provides"]]
    assert {"kind row-shift", "format slashed"} <= set(provides)


def test_an_adapter_of_its_kind_and_format_is_inspected_and_merged(environment: dict[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{layer}.q.weight": torch.randn(6, 4, generator=generator) for layer in range(2)}
    shifts = {f"layers.{layer}.q": torch.randn(6, generator=generator) for layer in range(2)}
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "base" / "model.safetensors", base)
    adapter = write_adapter(tmp_path / "adapter", shifts)

    document = json.loads(python(environment, "-m", "lorahub", "inspect", adapter, "--json"))
    assert (document["format"], document["kinds"]) == ("slashed", ["row-shift"])

    out = tmp_path / "out"
    python(environment, "-m", "lorahub", "merge", adapter, "--base", tmp_path / "base", "-o", out)
    from safetensors.torch import load_file

    merged = load_file(out / "model.safetensors")
    for name, weight in base.items():
        expected = (weight.double() + 0.5 * shifts[name.removesuffix(".weight")].double()[:, None]).float()
        assert torch.equal(merged[name], expected)
        assert not torch.equal(merged[name], weight)


def test_a_key_that_its_format_does_not_know_is_a_finding(environment: dict[str, str], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"q": torch.ones(3)})
    save_file(adapter / "shift.safetensors", {"q/shift": torch.ones(3), "q/tilt": torch.ones(3)})
    findings = json.loads(python(environment, "-m", "lorahub", "inspect", adapter, "--json"))["findings"]
    assert [(each["code"], each["where"]) for each in findings] == [("key-unknown", ["q/tilt"])]


LAWS = """
from lorahub.testing import check_kind
from lorahub_example.row_shift import ROW_SHIFT
check_kind(ROW_SHIFT)
"""


def test_its_kind_keeps_the_laws(environment: dict[str, str]) -> None:
    python(environment, "-c", LAWS)


SAVED = """
import sys, torch
import lorahub
adapter = lorahub.load(sys.argv[1])
lorahub.save(adapter, sys.argv[2], format="slashed")
again = lorahub.load(sys.argv[2])
assert adapter.deltas.keys() == again.deltas.keys() and adapter.deltas
for target, delta in adapter.deltas.items():
    assert torch.equal(delta.shift, again.deltas[target].shift) and delta.scale == again.deltas[target].scale == 0.5
"""


def test_its_format_writes_what_it_reads(environment: dict[str, str], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"layers.0.q": torch.arange(3.0)})
    python(environment, "-c", SAVED, adapter, tmp_path / "again")
