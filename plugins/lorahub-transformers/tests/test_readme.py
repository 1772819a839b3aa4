"""The README is executed: every command of its tour, with the exit code it promises, and its Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from transformers import BertForSequenceClassification

import lorahub
from lorahub.cli.main import main

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", README, flags=re.DOTALL)


def commands(block: str) -> list[tuple[str, int]]:
    """The lines after ``$``, with the exit code that a trailing comment promises (0 without one)."""
    lines = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    return [
        (line.split("  #")[0].rstrip(), int(found[1]) if (found := re.search(r"# exit (\d)", line)) else 0)
        for line in lines
    ]


def test_the_readme_has_a_tour() -> None:
    assert sum(kind == "console" for kind, _ in BLOCKS) >= 4
    assert any(kind == "python" for kind, _ in BLOCKS)


@pytest.fixture
def demo_out(tmp_path: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the demo leaves, with untrained adapters on a small base in the places of the trained ones."""
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "demo-out"
    bases = {
        "minilm": tiny("bert", "BertModel"),
        "retrained": tiny("bert", "BertModel", seed=1),
        "gpt2": tiny("gpt2", "GPT2LMHeadModel"),
    }
    for name, model in bases.items():
        model.save_pretrained(root / "bases" / name)
    versions = (("topics-1.0.0", 0, {}), ("topics-1.1.0", 1, {}), ("parts", 0, {"use_dora": True}))
    for name, seed, more in versions:
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(root / "bases" / "minilm", num_labels=5)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False, **more
        )
        folder = root / "adapters" / name
        peft.get_peft_model(model, config).save_pretrained(folder)
        (folder / "README.md").unlink()
        lorahub.record(folder, root / "bases" / "minilm", license="apache-2.0", name=name.partition("-")[0])
        title, _, version = name.partition("-")
        lorahub.push(folder, f"demo/{title}", version=version or "1.0.0", hub=str(root / "hub"))
    return root


def in_a_process(words: list[str], place: Path) -> tuple[int, str]:
    """How a command ends in a process of its own, and what it says."""
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    return done.returncode, f"{done.stdout}\n{done.stderr}"


def in_this_process(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """How a command of lorahub ends, and what it says; torch and the framework are loaded already."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    return int(stop.value.code or 0), f"{said.out}\n{said.err}"


def test_the_tour_does_what_the_readme_says(
    demo_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = demo_out.parent
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:lorahub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = set()
    for kind, block in BLOCKS:
        if kind == "python":
            code, said = in_a_process([sys.executable, "-c", block], place)
            assert code == 0, f"{block}\n{said}"
            assert ("parameters changed" in said) == ("lorahub.merge(" in block)
            assert ("parameters are trained" in said) == ("lorahub.create(" in block)
            continue
        for command, expected in commands(block):
            if command.startswith("source "):
                continue  # the environment of this test is active already
            if found := re.fullmatch(r"export (\w+)=(.*)", command):
                monkeypatch.setenv(found[1], found[2])
                continue
            words = shlex.split(command)
            if words[0] in started and words[0] == "lorahub":
                code, said = in_this_process(words[1:], capsys)
            else:  # each program once as it is installed
                code, said = in_a_process(words, place)
            started.add(words[0])
            assert code == expected, f"{command}: exit {code}\n{said}"
