"""The claims of ``docs/evidence.md``: exact ones are counted again, measured ones come to sense in small."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.plugin("transformers")

EVIDENCE = Path(__file__).resolve().parents[2] / "examples" / "evidence"
SCRIPTS = ("counts", "memory", "latency", "switching", "ranks", "paper_checkpoint")
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    monkeypatch.syspath_prepend(str(EVIDENCE.parent))
    yield
    for name in (*SCRIPTS, "claims", "docstrings", "train"):  # others have modules of such names
        sys.modules.pop(name, None)


def script(name: str) -> Any:
    return importlib.import_module(name)


def page() -> str:
    text: str = script("claims").PAGE.read_text()
    return text


def test_parameters_and_files_are_counted_as_the_page_says_up_to_gpt_3() -> None:
    counts = script("counts")
    lines = script("claims").table(counts.rows())
    assert [line for line in lines if line not in page()] == []
    figures = {(case.name, case.rank): case.paper for case in counts.CASES}
    here = {(case.name, case.rank): case.layers * 4 * case.width * case.rank for case in counts.CASES}
    agree = {
        key for key, paper in figures.items() if f"{here[key] / 1e6:.{len(paper.partition('.')[2]) - 1}f}M" == paper
    }
    assert set(figures) - agree == {("GPT-2 medium", 4), ("GPT-2 large", 4), ("GPT-3", 4)}  # as the page says of them


def test_a_wrong_count_ends_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = script("counts")
    monkeypatch.setattr(counts, "CASES", counts.CASES[:1])
    monkeypatch.setattr(counts, "counted", lambda _case: (294_913, 1))
    with pytest.raises(script("claims").WrongClaim, match="expected 294912, came 294913"):
        counts.rows()


def test_the_page_has_every_table_with_its_command_and_machine() -> None:
    text = page()
    for name in SCRIPTS:
        part = text.partition(f"<!-- {name}.py -->")[2].partition(f"<!-- end of {name}.py -->")[0]
        assert "| claim | formula | paper | here |" in part, name
        assert f"`python examples/evidence/{name}.py`; " in part, name
        assert "cores; Python 3." in part, name


def test_a_table_is_put_between_its_comments_and_nowhere_else() -> None:
    replaced = script("claims").replaced
    text = "a\n<!-- x.py -->\nold\n<!-- end of x.py -->\nb\n"
    assert replaced(text, "x.py", "new") == "a\n<!-- x.py -->\n\nnew\n\n<!-- end of x.py -->\nb\n"
    with pytest.raises(ValueError, match="needs the lines"):
        replaced(text, "y.py", "new")


@pytest.mark.slow
def test_gradients_and_states_are_as_many_bytes_as_what_is_trained_asks_for() -> None:
    made = script("memory").rows(TINY)
    assert made[2].claim.endswith("weights, gradients and states")
    memory = script("memory")
    full, lora = memory.measured("full", TINY), memory.measured("lora", TINY)
    assert lora["trained"] == 2 * 2 * 2 * TINY["n_embd"] * memory.RANK
    assert full["gradients"] == full["weights"]
    assert lora["gradients"] < full["gradients"] / 3


@pytest.mark.slow
def test_what_is_merged_has_the_modules_of_the_base_and_what_is_timed_says_the_same() -> None:
    assert len(script("latency").rows(repeats=1)) == 4  # it ends with WrongClaim otherwise


@pytest.mark.slow
def test_every_way_to_switch_works() -> None:
    assert len(script("switching").rows(TINY, repeats=2)) == 4


@pytest.mark.slow
def test_any_rank_is_better_than_the_head_alone() -> None:
    """The least of them, on all texts: a third of these leaves too few to test on to tell the two apart."""
    alone, one = script("ranks").rows(ranks=[1], seeds=1)
    assert float(one.here.rstrip("%")) > float(alone.here.rstrip("%"))


@pytest.mark.slow
def test_the_papers_checkpoint_is_converted_and_merged_to_the_last_rounding(real_adapters: Path) -> None:
    lines = script("claims").table(script("paper_checkpoint").rows())
    assert [line for line in lines if line not in page()] == []
