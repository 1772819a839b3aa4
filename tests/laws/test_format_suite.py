"""Every built-in format keeps the laws of ``lorahub.testing``, on what it writes and on files of each layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus.test_every_layout import LAYOUTS

from lorahub.plugins import load_registry
from lorahub.testing import FormatCase, check_format

FORMATS = load_registry().formats
USUAL = {"xlabs", "mlx"}  # one that only reads, and one that writes
LLAMA_CPP = FormatCase(modules=("blk.0.ffn_up", "blk.0.ffn_down", "blk.1.ffn_up"), hints={"gguf_architecture": "gemma"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in FORMATS]
)
def test_a_format_keeps_every_law(name: str, tmp_path: Path) -> None:
    own = [layout for layout in LAYOUTS.values() if layout.format == name]
    folders = [layout.write(tmp_path / str(number)) for number, layout in enumerate(own)]
    check_format(FORMATS[name], LLAMA_CPP if name == "gguf" else FormatCase(folders=folders))
