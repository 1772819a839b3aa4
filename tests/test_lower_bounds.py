"""The lowest versions that the pyprojects allow: they install together, and what is done with them works.

One environment of its own, with the oldest torch and frameworks, made from the package index; some minutes and GB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PLUGINS = sorted((ROOT / "plugins").glob("*/pyproject.toml"))
NEWER = "lorahub-diffusers"
"""Its framework asks for newer versions of what the others need: it is installed beside them afterwards."""

ROOM = 15 << 30  # bytes: torch for CUDA brings its libraries


def lowest(*projects: Path) -> dict[str, str]:
    """Distribution -> the lowest version that the projects together allow; of the core with all its extras."""
    found: dict[str, Version] = {}
    for path in projects:
        project = tomllib.loads(path.read_text())["project"]
        extras = (each for name, each in project.get("optional-dependencies", {}).items() if f"lorahub-{name}" != NEWER)
        for text in (*project["dependencies"], *(each for extra in extras for each in extra)):
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name.startswith("lorahub-"):
                continue
            (least,) = (Version(each.version) for each in requirement.specifier if each.operator in (">=", "~=", "=="))
            found[name] = max(found.get(name, least), least)
    return {name: str(version) for name, version in sorted(found.items())}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with the core and its frameworks, each at its lowest version."""
    folder = tmp_path_factory.mktemp("lowest")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip("no room for an environment of its own")
    versions = lowest(ROOT / "pyproject.toml", *(each for each in PLUGINS if each.parent.name != NEWER))
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), f"pluggy=={versions['pluggy']}"],
        capture_output=True,
        check=False,
    )
    if asked.returncode:
        pytest.skip("no package index")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    found = folder / "venv" / "bin" / "python"
    install(found, versions)
    local = [ROOT, *(each.parent for each in PLUGINS if each.parent.name != NEWER)]
    run(found, "-m", "pip", "install", "--quiet", "--no-deps", *local, cwd=folder)
    yield found
    shutil.rmtree(folder, ignore_errors=True)  # some GB


def install(python: Path, versions: dict[str, str], *newest: str) -> None:
    wanted = [*(f"{name}=={version}" for name, version in versions.items()), *newest]
    run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--upgrade", *wanted, cwd=python.parent)


SCHEMAS = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("generate", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
folder = pathlib.Path(sys.argv[1]).parent
assert {name: (folder / name).read_text() for name in module.texts()} == module.texts()
"""

WORK = """
import pathlib, sys
import torch
import lorahub
from lorahub.plugins import load_registry
from lorahub.testing import check_format, check_kind

registry = load_registry()
assert {info.state for info in registry.plugins} == {"loaded"}, registry.plugins
assert all(each.met for info in registry.plugins for each in info.requires), registry.plugins
check_kind(registry.kind("lora"))
check_format(registry.format("mlx"))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
x = torch.randn(5, 8)
before = model(x).detach()
trainee = lorahub.create(model, "lora", r=2, target_modules="all-linear", base="acme/base@" + 40 * "a")
optimizer = torch.optim.SGD(trainee.parameters(), lr=0.5)
for _ in range(3):
    model(x).square().sum().backward()
    optimizer.step()
trained = model(x).detach()
trainee.save("ink")
trainee.detach()
assert not torch.allclose(trained, before, atol=1e-2)
with lorahub.attach(model, ["ink"]):
    assert torch.allclose(model(x), trained, atol=1e-4)
merged = lorahub.merge(model, ["ink"])
assert torch.allclose(model(x), trained, atol=1e-4)
merged.undo()
assert torch.equal(model(x), before)
"""

COMMANDS = [
    ["inspect", "ink", "--weights"],
    ["push", "acme/ink", "ink", "--version", "1.0.0", "--hub", "hub", "--license", "apache-2.0"],
    ["versions", "acme/ink", "--hub", "hub"],
    ["convert", "ink", "--to", "kohya", "-o", "kohya"],
    ["compose", "ink:0.5", "ink:0.5", "-o", "mix"],
    ["plugins"],
]

TRANSFORMERS = """
import pathlib, torch, transformers
from lorahub.testing import FrameworkCase, check_framework
from lorahub_transformers import Transformers

sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
kinds = {"LlamaForCausalLM": "llama", "BertForSequenceClassification": "bert", "OPTForCausalLM": "opt"}
for name, kind in kinds.items():
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(kind)
    ids = torch.arange(8).view(2, 4)
    check_framework(
        Transformers(),
        FrameworkCase(folder=pathlib.Path(kind), model=model, run=lambda model: model(input_ids=ids)),
    )
"""

TIMM = """
import pathlib, timm, torch
from timm.models._hub import save_for_hf
from lorahub.testing import FrameworkCase, check_framework
from lorahub_timm import Timm

model = timm.create_model("test_vit", num_classes=3).eval()
save_for_hf(model, "vit", safe_serialization=True)
x = torch.randn(1, 3, 160, 160)
check_framework(Timm(), FrameworkCase(folder=pathlib.Path("vit"), model=model, run=lambda model: model(x)))
"""

DIFFUSERS = """
import pathlib, diffusers, torch
from lorahub.bases.index import BaseRef
from lorahub.bases.open import survey_base
from lorahub.plugins import load_registry

model = diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
)
model.save_pretrained("sd3")
registry = load_registry()
framework = registry.framework_to_run("diffusers")
files = framework.index(BaseRef(), survey_base(pathlib.Path("sd3")))
assert files.structure == framework.index_model(model, BaseRef()).structure
"""


def test_every_lower_bound_is_stated_once_for_all() -> None:
    versions = lowest(ROOT / "pyproject.toml", *PLUGINS)
    assert {"torch", "pydantic", "huggingface-hub", "transformers", "timm", "diffusers"} <= set(versions)
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in PLUGINS:
        framework = path.parent.name.removeprefix("lorahub-")
        (own,) = (
            each for each in tomllib.loads(path.read_text())["project"]["dependencies"] if each.startswith(framework)
        )
        assert own in core.get(framework, [own]), f"the extra '{framework}' of the core asks for another version"


@pytest.mark.slow
def test_the_core_works_with_the_lowest_versions(python: Path, tmp_path: Path) -> None:
    run(python, "-c", SCHEMAS, ROOT / "schemas" / "generate.py", cwd=tmp_path)
    run(python, "-c", WORK, cwd=tmp_path)
    for command in COMMANDS:
        run(python, "-m", "lorahub", *command, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRANSFORMERS, TIMM], ids=["transformers", "timm"])
def test_a_framework_keeps_the_laws_at_its_lowest_version(script: str, python: Path, tmp_path: Path) -> None:
    run(python, "-c", script, cwd=tmp_path)


@pytest.mark.slow
def test_diffusers_is_read_alike_at_its_lowest_version(python: Path, tmp_path: Path) -> None:
    wanted = lowest(ROOT / "plugins" / NEWER / "pyproject.toml")
    install(python, wanted, "transformers<6")  # its lowest goes with an older huggingface-hub than diffusers takes
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT / "plugins" / NEWER, cwd=tmp_path)
    run(python, "-c", DIFFUSERS, cwd=tmp_path)
