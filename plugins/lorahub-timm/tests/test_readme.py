"""The README: its code runs, and its table is the code's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_timm import TINY

from lorahub_timm.families import FAMILIES, family_of
from lorahub_timm.table import table

README = (Path(__file__).parents[1] / "README.md").read_text()

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert (tmp_path / "birds" / "lorahub.json").is_file()
    assert "timm/test_vit.r160_in1k" in (tmp_path / "birds" / "lorahub.json").read_text()
    assert names["merged"] is not names["model"]


def test_the_table_is_made_of_the_code() -> None:
    shown = README.partition("<!-- table -->\n")[2].partition("<!-- /table -->")[0]
    assert shown == table(), "write it anew: python -m lorahub_timm.table"


def test_what_the_table_names_is_tested() -> None:
    tested = {family_of(each.name) for each in TINY.values()}
    named = ("ViT", "DeiT", "Swin", "BEiT", "EVA", "PVT", "MaxViT", "LeViT", "ConvNeXt", "EfficientNet")
    assert all(any(family in tested for family in FAMILIES if each in family.name) for each in named)
