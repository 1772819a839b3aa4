"""A README that was edited on the hub: nothing that people wrote there is lost unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.double import Double
from hub.trained import trained_folder

import lorahub
from lorahub.errors import PushRefused
from lorahub.publishing import Pushed

EDITED = b"---\nlicense: apache-2.0\nlanguage: en\n---\n\n# Ink\n\nWritten by hand on the hub.\n"


def push(double: Double, folder: Path, version: str = "1.0.0", **options: object) -> Pushed:
    options = {"hub": double.endpoint, "token": double.api().token} | options
    return lorahub.push(folder, "acme/ink", version=version, **options)


def readme(double: Double, revision: str = "main") -> bytes:
    return double.repo("acme/ink").files(revision)["README.md"]


def codes(pushed: Pushed) -> set[str]:
    return {each.code for each in pushed.said}


@pytest.fixture
def published(double, tmp_path) -> Path:
    """A folder whose first version is on the hub."""
    folder = trained_folder(tmp_path / "out")
    push(double, folder)
    return folder


def without_readme(folder: Path) -> Path:
    (folder / "README.md").unlink()
    return folder


def test_a_card_is_made_around_what_was_written_on_the_hub_where_the_folder_has_none(double, published):
    double.repo("acme/ink").edit({"README.md": EDITED})
    folder = without_readme(published)
    pushed = push(double, folder, "1.1.0")
    text = readme(double).decode()
    assert "Written by hand on the hub." in text
    assert "language: en" in text
    assert "| Version | 1.1.0 |" in text
    assert (folder / "README.md").read_bytes() == readme(double)
    assert "card-replaces-hub-text" not in codes(pushed)
    double.log.clear()
    assert push(double, folder, "1.1.0").pin.why == "already published as v1.1.0"
    assert double.writes() == []


def test_the_same_version_again_without_a_readme_is_nothing_to_do(double, published):
    double.repo("acme/ink").edit({"README.md": EDITED})
    pushed = push(double, without_readme(published))
    assert pushed.pin.why == "already published as v1.0.0"
    assert (published / "README.md").read_bytes() == readme(double, "v1.0.0")


def test_the_folders_text_wins_and_that_is_told_with_the_commit_that_keeps_the_other(double, published):
    commit = double.repo("acme/ink").edit({"README.md": EDITED})
    planned = push(double, published, "1.1.0", dry_run=True)
    pushed = push(double, published, "1.1.0")
    (found,) = (each for each in pushed.said if each.code == "card-replaces-hub-text")
    assert commit in found.remedy
    assert str(published / "README.md") in found.remedy
    assert found in planned.said
    assert b"by hand" not in readme(double)


def test_metadata_that_were_added_on_the_hub_count_as_text(double, published):
    changed = readme(double).replace(b"\n---", b"\nlanguage: en\n---", 1)
    assert changed != readme(double)
    double.repo("acme/ink").edit({"README.md": changed})
    assert "card-replaces-hub-text" in codes(push(double, published, "1.1.0"))


def test_an_edit_in_the_folder_alone_is_no_loss(double, published):
    mine = published / "README.md"
    mine.write_text(mine.read_text().replace("Trained with TRL.", "Trained with TRL, and well."))
    assert "card-replaces-hub-text" not in codes(push(double, published, "1.1.0"))
    assert b"and well" in readme(double)


def test_a_card_that_cannot_be_made_around_the_text_there_is_refused_and_nothing_is_sent(double, published):
    by_hand = readme(double).replace(b"| Version | 1.0.0 |", b"| Version | the best |")
    double.repo("acme/ink").edit({"README.md": by_hand})
    folder = without_readme(published)
    double.log.clear()
    with pytest.raises(PushRefused, match="cannot be made around") as caught:
        push(double, folder, "1.1.0")
    assert "--no-card" in caught.value.hint
    assert double.writes() == []
    assert push(double, folder, "1.1.0", card=False).pin.version == "1.1.0"


def test_a_folder_hub_keeps_what_was_written_there_as_well(tmp_path):
    place = str(tmp_path / "hub")
    first = trained_folder(tmp_path / "one")
    (first / "README.md").write_bytes(EDITED)
    lorahub.push(first, "acme/ink", version="1.0.0", hub=place)
    second = trained_folder(tmp_path / "two")
    (second / "README.md").unlink()
    pushed = lorahub.push(second, "acme/ink", version="1.1.0", license="apache-2.0", hub=place)
    assert b"Written by hand on the hub." in (second / "README.md").read_bytes()
    assert "card-replaces-hub-text" not in codes(pushed)


def test_other_adapters_below_the_folder_are_named(double, tmp_path):
    folder = trained_folder(tmp_path / "out")
    trained_folder(folder / "poet")
    pushed = push(double, folder)
    assert {"poet/adapter_model.safetensors", "poet/adapter_config.json"} <= set(pushed.others)
    assert set(pushed.others) | pushed.pin.files.keys() | {".gitattributes"} == set(double.repo("acme/ink").files())
