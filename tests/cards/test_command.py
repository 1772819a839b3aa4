"""``lorahub card`` and ``lorahub.card``: what a push would write, shown or written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cards.making import RECORD
from click.testing import CliRunner, Result

import lorahub
from lorahub.adapter import AdapterHeader
from lorahub.cli.main import make_cli
from lorahub.errors import InvalidRef, UsageError


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(make_cli(), ["card", *map(str, arguments)], catch_exceptions=False)


def recorded(header: AdapterHeader, **fields: Any) -> Path:
    """The adapter's folder, with a record."""
    (header.folder / "lorahub.json").write_text(json.dumps(RECORD | fields))
    return header.folder


def test_the_card_is_shown_and_nothing_is_written(ink: AdapterHeader) -> None:
    folder = recorded(ink)
    before = sorted(folder.iterdir())
    shown = run(folder, "--repo", "acme/ink")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("---\nlicense: apache-2.0\n")
    assert "lorahub pull acme/ink@1.2.0" in shown.stdout
    assert sorted(folder.iterdir()) == before


def test_the_card_is_written_with_its_picture_and_again_with_the_same_bytes(ink: AdapterHeader) -> None:
    folder = recorded(ink)
    (folder / "README.md").write_bytes(b"# Mine\r\n")
    written = run(folder, "--write", "--json")
    document = json.loads(written.stdout)
    assert document["written"] == [f"{folder}/README.md", f"{folder}/lorahub-layers.svg"]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first["README.md"] == document["text"].encode()
    assert b"\r\n# Mine\r\n" in first["README.md"]
    assert run(folder, "--write").exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_repository_is_the_records_or_of_nobody_yet(ink: AdapterHeader) -> None:
    assert "lorahub pull NS/ink@1.2.0" in lorahub.card(recorded(ink)).text
    assert "lorahub pull acme/pen@1.2.0" in lorahub.card(recorded(ink, name="acme/pen")).text


@pytest.mark.parametrize("repo", ["acme/ink@1.0", "./ink", "acme/ink:0.5", "a b/c"])
def test_what_is_no_repository_is_refused(ink: AdapterHeader, repo: str) -> None:
    with pytest.raises((UsageError, InvalidRef)):
        lorahub.card(recorded(ink), repo)


def test_a_folder_without_a_record_is_told_how_to_get_one(ink: AdapterHeader) -> None:
    with pytest.raises(UsageError) as caught:
        lorahub.card(ink.folder)
    assert caught.value.hint == f"lorahub record {ink.folder} --base BASE"


def test_differences_are_told_on_stderr(ink: AdapterHeader) -> None:
    folder = recorded(ink)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: /home/me/llama\n---\n")
    told = run(folder).stderr
    assert "refused: card-license-differs" in told
    assert "warning: card-base-replaced" in told


def test_no_torch_is_imported(ink: AdapterHeader, run_script: Any) -> None:
    script = (
        "import json, sys, lorahub\nlorahub.card(sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    assert run_script(script, recorded(ink)) == []
