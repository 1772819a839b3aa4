"""The codes of findings: the table holds what the source holds, and ``--allow`` takes no other."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import lorahub
from lorahub.cli.main import main
from lorahub.codes import CODES, demand_known
from lorahub.errors import UsageError
from lorahub.plugins import load_registry

ROOT = Path(__file__).parents[2] / "lorahub"
KEBAB = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+")
MADE = re.compile(r"[a-z-]+-missing")
NO_CODES = {"layer-replication", "lora-vit", "qv-lora", "retry-after", "sentence-transformers"}
"""What looks like a code, in modules that make findings of several codes: names of formats, fields and headers."""


@cache
def _sources() -> list[tuple[Path, ast.AST]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py")) if path.name != "codes.py"]


@cache
def _words(tree: ast.AST) -> frozenset[str]:
    return frozenset(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _given(tree: ast.AST) -> tuple[set[str], bool]:
    """The codes that are written where findings are made, and whether some are made elsewhere."""
    values = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"Finding", "Rule"}
        for keyword in node.keywords
        if keyword.arg == "code"
    ]
    written = {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}
    return written, any(not isinstance(value, ast.Constant) for value in values)


def test_every_code_in_the_source_is_in_the_table() -> None:
    found: dict[str, str] = {}
    for path, tree in _sources():
        written, elsewhere = _given(tree)
        if elsewhere:
            written |= {word for word in _words(tree) if KEBAB.fullmatch(word)} - NO_CODES
        found |= dict.fromkeys(written, path.name)
    assert {code: place for code, place in found.items() if code not in CODES} == {}


def test_what_commands_are_advised_to_allow_is_in_the_table() -> None:
    said = [word for _, tree in _sources() for word in _words(tree)]
    advised = {code for word in said for code in re.findall(r"--allow ([a-z]+(?:-[a-z0-9]+)+)", word)}
    assert len(advised) > 10
    assert advised - CODES == set()


def test_the_table_holds_nothing_that_is_not_in_the_source() -> None:
    words = frozenset().union(*(_words(tree) for _, tree in _sources()))
    assert {code for code in CODES - words if not MADE.fullmatch(code)} == set()


def test_a_code_that_no_finding_has_is_an_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pull", "acme/ink", "--allow", "tag-movd", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert (stop.value.code, error["exit_code"]) == (2, 2)
    assert error["message"] == "no finding has the code 'tag-movd'. Did you mean 'tag-moved'?"


def test_a_plugin_says_which_codes_its_findings_have(monkeypatch: pytest.MonkeyPatch) -> None:
    @lorahub.hookimpl
    def lorahub_kinds() -> list[object]:
        return []

    module = SimpleNamespace(lorahub_kinds=lorahub_kinds, LORAHUB_FINDINGS=("some-code",))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda _: module)
    point = metadata.EntryPoint(name="coded", value="coded", group="lorahub")
    (plugin,) = load_registry(entry_points=[point], env={}).plugins
    assert (plugin.state, plugin.findings) == ("loaded", ("some-code",))
    demand_known(["some-code", "tag-moved"], plugin.findings)
    with pytest.raises(UsageError, match="no finding has the code 'some-code'"):
        demand_known(["some-code"])
    module.LORAHUB_FINDINGS = "some-code"
    (plugin,) = load_registry(entry_points=[point], env={}).plugins
    assert (plugin.state, "LORAHUB_FINDINGS" in plugin.error) == ("broken", True)
