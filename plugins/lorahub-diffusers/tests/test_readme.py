"""The README: its code runs, and its table is the code's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import diffusers, sd
from tiny_loras import outputs, save_lora

from lorahub_diffusers.table import FAMILIES, table

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = sd()
    ink, wash = save_lora(pipe, tmp_path / "ink", seed=1), save_lora(pipe, tmp_path / "wash", seed=2)
    easy = tmp_path / "EasyNegative.safetensors"
    save_file({"emb_params": torch.ones(2, 32)}, easy)
    before = outputs(pipe)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {"pipe": pipe, "ink": ink, "wash": wash, "easy": easy})
    assert all(torch.equal(before[name], value) for name, value in outputs(pipe).items())
    pipe.load_lora_weights(tmp_path / "for-diffusers")
    assert not torch.equal(before["unet"], outputs(pipe)["unet"])
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True)


def test_the_table_is_made_of_the_code() -> None:
    shown = README.partition("<!-- table -->\n")[2].partition("<!-- /table -->")[0]
    assert shown == table(), "write it anew: python -m lorahub_diffusers.table"


def test_what_the_table_names_is_there() -> None:
    assert all(hasattr(diffusers, kind) for kind, _ in FAMILIES.values())
