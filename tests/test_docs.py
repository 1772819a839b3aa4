"""The README is executed: every command of its tour, with the exit code it promises, and its Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def test_the_tour_does_what_the_readme_says(demo_out: Path) -> None:
    """``demo_out``: the folder that the demo leaves, with untrained adapters in the places of the trained ones."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LORAHUB_CACHE": str(demo_out.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::DeprecationWarning:lorahub",
    }
    for kind, block in BLOCKS:
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", block],
                cwd=demo_out.parent,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            assert "parameters changed" in done.stdout
            continue
        for command, code in commands(block):
            if command.startswith("source "):
                continue  # the environment of this test is active already
            if found := re.fullmatch(r"export (\w+)=(.*)", command):
                environment[found[1]] = found[2]
                continue
            done = subprocess.run(
                shlex.split(command), cwd=demo_out.parent, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
