"""``lorahub plugins``: what is installed, what became of it and what to do, without importing what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "timm", "diffusers", "peft")

RUN = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write("imported: " + " ".join(each for each in {HEAVY!r} if each in sys.modules)))
from lorahub.cli.main import main
main(sys.argv[1:])
"""

SOUND = """
import lorahub
from lorahub.bases.torch_module import TorchModule
class Keras(TorchModule):
    name, requires = "keras", "keras-of-nobody>=3"
@lorahub.hookimpl
def lorahub_frameworks():
    return [Keras()]
"""
OLD = "LORAHUB_HOOKS = (0, 9)\n"
BROKEN = "import keras_of_nobody\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Three plugins more: a sound one, one for other hooks, and one that cannot be imported."""
    for name, text in {"sound": SOUND, "old": OLD, "broken": BROKEN}.items():
        (tmp_path / f"acme_{name}.py").write_text(text)
        info = tmp_path / f"acme_{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[lorahub]\n{name} = acme_{name}\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "LORAHUB_CACHE": str(tmp_path / "cache")}


def run(environment: dict[str, str], *arguments: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.rpartition("imported: ")[2]


def test_every_plugin_is_told_with_its_state_and_what_to_do(environment: dict[str, str]) -> None:
    text, imported = run(environment, "plugins")
    assert imported == ""
    paragraphs = {each.partition(" ")[0]: each.splitlines() for each in text.split("\n\n")}
    assert paragraphs["sound"] == [
        "sound (acme-sound 1.5): loaded",
        "  frameworks  keras",
        "  requires    keras-of-nobody>=3 (not installed)",
        "  to do       pip install 'keras-of-nobody>=3'",
    ]
    assert paragraphs["old"] == [
        "old (acme-old 1.5): refused",
        "  because  it was made for version 0.9 of lorahub's hooks, and this lorahub has 1.0",
        "  to do    pip install --upgrade acme-old",
    ]
    assert paragraphs["broken"] == [
        "broken (acme-broken 1.5): broken",
        "  because  ModuleNotFoundError: No module named 'keras_of_nobody'",
        "  to do    pip install --upgrade acme-broken; or do without it: LORAHUB_DISABLE_PLUGINS=broken",
    ]


def test_the_same_as_json(environment: dict[str, str]) -> None:
    text, _ = run(environment, "plugins", "--json")
    document = json.loads(text)
    told: dict[str, Any] = {each["name"]: each for each in document["plugins"]}
    assert {name: told[name]["state"] for name in ("sound", "old", "broken")} == {
        "sound": "loaded",
        "old": "refused",
        "broken": "broken",
    }
    assert told["sound"]["hooks"] == ["lorahub_frameworks"]
    assert told["sound"]["provides"] == ["framework keras"]
    assert told["sound"]["version"] == "1.5"
    assert told["sound"]["requires"] == [{"requirement": "keras-of-nobody>=3", "installed": "", "met": False}]
    assert {"torch", "keras"} <= set(document["frameworks"])


def test_one_sort_is_listed_with_who_brings_it(environment: dict[str, str]) -> None:
    text, imported = run(environment, "plugins", "--list", "frameworks", "--json")
    assert imported == ""
    listed = {each["name"]: each for each in json.loads(text)["frameworks"]}
    assert (listed["keras"]["from"], listed["keras"]["requires"]) == ("sound", "keras-of-nobody>=3")
    assert listed["torch"]["from"] == "lorahub"


@pytest.mark.parametrize("sort", ["kinds", "formats", "frameworks", "runtimes", "storages", "methods"])
def test_every_sort_is_a_table_and_in_quiet_mode_its_names(sort: str, lorahub: Any) -> None:
    header, *rows = lorahub("plugins", "--list", sort).out.splitlines()
    assert header.split()[0] == "name"
    assert header.split()[-1] == "from"
    names = lorahub("plugins", "--list", sort, "-q").out.split()
    assert [row.split()[0] for row in rows] == names


def test_a_kind_that_can_be_trained_says_so(lorahub: Any) -> None:
    kinds = {each["name"]: each for each in lorahub("plugins", "--list", "kinds", "--json").json()["kinds"]}
    assert (kinds["lora"]["trains"], kinds["lora"]["source"]) == (True, "https://arxiv.org/abs/2106.09685")
    assert kinds["full"]["trains"] is False
