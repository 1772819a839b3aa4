"""Every example of ``examples`` runs as it stands, offline, and comes to what it says; the README lists each."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.plugin("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

SAYS = {
    "train_llm": ("1,792 of 24,480 parameters are trained", "adapter_model.safetensors"),
    "train_vision": ("dora", "replace"),
    "record_and_push": ("recorded: acme/tiny-llama", "pushed: demo/ink 1.0.0", "versions: 1.0.0"),
    "pull_and_merge": ("does it fit? exact", "undone, bit for bit: True"),
    "compose": ("nothing is lost", "of its squared norm is kept"),
    "many_tenants": ("row 6: the base, as if it were alone: True",),
    "switch": ("half ink, half chalk", "bit for bit the base: True"),
    "convert": ("to peft, the same bits: True",),
}
"""Example -> what it prints, among other things."""

SLOW = {
    "train_diffusion": ("pytorch_lora_weights.safetensors",),
    "trainer_callback": ("checkpoint-1: exact", "checkpoint-2: exact"),
}
"""Those that import diffusers or train with PEFT."""

NO_EXAMPLES = {"demo", "docstrings", "table", "tiny", "train"}
"""What stands beside them: the demo, and modules that they share."""


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their folder is where they look for what they share."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    sys.modules.pop("tiny", None)


def _run(name: str, capsys: pytest.CaptureFixture[str], says: tuple[str, ...]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert [text for text in says if text not in printed] == [], printed
    assert "False" not in printed


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_as_it_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run(name, capsys, SAYS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_an_example_with_other_libraries_runs_as_it_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run(name, capsys, SLOW[name])


def test_every_example_is_run_here_and_listed_in_the_readme() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - NO_EXAMPLES
    assert names == {*SAYS, *SLOW}
    listed = (EXAMPLES / "README.md").read_text()
    assert [name for name in names if f"`{name}.py`" not in listed] == []


def test_no_example_is_longer_than_forty_lines_of_code() -> None:
    for name in {*SAYS, *SLOW}:
        lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
        assert 10 <= len([line for line in lines if line.strip()]) <= 40, name
