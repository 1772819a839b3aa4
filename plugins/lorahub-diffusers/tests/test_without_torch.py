"""Everything but opening a pipeline works where neither torch nor diffusers can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_diffusers import sd

from lorahub.opening import open_base

BLOCKED = """
import sys

for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None  # as if it were not installed
"""

JOB = """
from lorahub.bases.index import BaseRef
from lorahub.bases.open import index_base, survey_base
from lorahub.plugins import load_registry

frameworks = load_registry().frameworks
files = survey_base(sys.argv[1])
chosen, index = index_base(files, BaseRef(), frameworks)
assert chosen.name == "diffusers-pipeline"
assert len(chosen.targets(index, "attention")) == 32
assert len(chosen.layouts(index, chosen.targets(index, "all-linear"))) > 32
assert "scheduler/scheduler_config.json" in chosen.companions(files)
assert not any(sys.modules[name] for name in ("torch", "diffusers", "transformers"))
print(index.parts["unet"].index.structure)
"""

OPEN = """
from pathlib import Path
from lorahub.errors import MissingDependency
from lorahub_diffusers import Diffusers, Pipelines

for framework, folder in ((Pipelines(), sys.argv[1]), (Diffusers(), sys.argv[1] + "/unet")):
    try:
        framework.open_base(Path(folder))
    except MissingDependency as error:
        print(error.hint)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    sd().save_pretrained(place)
    return place


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_pipeline_in_a_folder_is_indexed(folder: Path) -> None:
    assert run(JOB, str(folder)) == open_base(folder / "unet").index.structure


def test_opening_says_what_is_missing(folder: Path) -> None:
    assert run(OPEN, str(folder)).count("pip install 'diffusers") == 2
