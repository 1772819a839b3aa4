"""The plugin's README: its code runs, with a small base in the Hub's cache and a folder for a hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMIT = "a" * 40

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # and the Hub for the base's configuration at every save
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # where there is no device
]


def test_the_code_runs(tiny: Callable[..., Any], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, place in {"LORAHUB_CACHE": "cache", "LORAHUB_HUB": "hub"}.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "theirs" / "models--acme--base"
    snapshot = repository / "snapshots" / COMMIT
    tiny("llama", "LlamaForCausalLM").save_pretrained(snapshot)
    words.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {"rows": [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 16}
    exec(compile(block, "README.md", "exec"), names)
    base = names["recorder"].records[Path("ink")].base
    assert (base.repo_id, base.revision) == ("acme/base", COMMIT)
    assert not names["recorder"].said
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"
