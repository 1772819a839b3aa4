"""Everything but opening a model works where neither torch nor timm can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_timm import TINY, build

from lorahub.bases.index import BaseRef
from lorahub_timm import Timm

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
"""

JOB = """
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_base, survey_base
from lorahub.bases.torch_module import TorchModule
from lorahub_timm import lorahub_frameworks

(framework,) = lorahub_frameworks()
files = survey_base(sys.argv[1])
chosen, index = index_base(files, BaseRef(), {"torch": TorchModule(), "timm": framework})
assert chosen is framework
assert len(framework.targets(index, "attention")) == 4
queries = [Target("", f"blocks.{at}.attn.q", "weight") for at in (0, 1)]
assert len(framework.layouts(index, queries)) == 2
edits = framework.edits(index, {"head.weight": ((3, 24), "F32"), "head.bias": ((3,), "F32")}, {})
assert edits.config["num_classes"] == 3
assert framework.companions(files) == ("config.json",)
assert not {"torch", "timm"} & set(sys.modules)
print(index.structure)
"""

OPEN = """
from pathlib import Path
from lorahub.errors import MissingDependency
from lorahub_timm import Timm

try:
    Timm().open_base(Path(sys.argv[1]))
except MissingDependency as error:
    print(error.hint)
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_index_layouts_and_edits_need_neither_torch_nor_timm(saved: Any, framework: Timm) -> None:
    model = build(TINY["vit"])
    assert run(JOB, str(saved(model))) == framework.index_model(model, BaseRef()).structure


def test_opening_a_model_says_what_to_install(tmp_path: Path) -> None:
    assert run(OPEN, str(tmp_path)) == f"pip install '{Timm.requires}'"


def test_a_folder_opens_as_what_it_was(saved: Any, framework: Timm) -> None:
    import torch

    model = build(TINY["swin"])
    folder = saved(model)
    opened = framework.open_base(folder)
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in opened.state_dict().items())
    assert not opened.training
    half = framework.open_base(folder, dtype="BF16")
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}


def test_the_requirement_is_the_one_that_is_installed_with() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"{Timm.requires}"' in text
