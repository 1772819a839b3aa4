"""The pages in ``docs``: their Python runs, what they show of the code is the code's own, and no link leads nowhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_of_the_code_is_the_codes_own(page: Path, generate: ModuleType) -> None:
    if page.stem in generate.PLUGINS and importlib.util.find_spec(f"lorahub_{page.stem}") is None:
        pytest.skip(f"lorahub-{page.stem} is not installed")
    assert generate.generated(page) == page.read_text(), "write it anew: python docs/generate.py"


def test_the_page_on_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), flags=re.DOTALL)
    assert len(blocks) > 3
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "training.md", "exec"), names)
    assert (tmp_path / "ink" / "lorahub.json").is_file()


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([a-z-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_link_leads_nowhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:lorahub|plugins|examples)/[\w./-]+)`", page.read_text())
    assert [path for path in paths if not (DOCS.parent / path).exists()] == []


def test_every_hook_is_on_the_page_for_authors() -> None:
    from lorahub import hookspecs, testing

    text = (DOCS / "write-a-plugin.md").read_text()
    assert [hook for hook in hookspecs.__all__ if hook.startswith("lorahub_") and f"`{hook}`" not in text] == []
    checks = {name for name in testing.__all__ if name.startswith("check_")}
    assert {name for name in checks if f"`{name}(" not in text} == set()
