"""A lock is the same bytes for the same state, and says precisely what moved."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lorahub.errors import RecordError, WriteFailed
from lorahub.findings import Verdict, worst
from lorahub.recipe_lock import RecipeLock, compare

SCHEMAS = Path(__file__).parents[2] / "schemas"
VALID = sorted((SCHEMAS / "examples" / "recipe-lock" / "valid").glob("*.toml"))
INVALID = sorted((SCHEMAS / "examples" / "recipe-lock" / "invalid").glob("*.toml"))
LOCK = RecipeLock.load(SCHEMAS / "examples" / "recipe-lock" / "valid" / "two-adapters.toml")
OTHER = "sha256:" + "0" * 64


def published() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        json.loads((SCHEMAS / "recipe-lock.schema.json").read_text(encoding="utf-8"))
    )


def moved(**fields: Any) -> RecipeLock:
    return LOCK.model_copy(update=fields)


def with_adapter(**fields: Any) -> RecipeLock:
    return moved(adapters=(LOCK.adapters[0].model_copy(update=fields), *LOCK.adapters[1:]))


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_example_is_valid_for_schema_and_model_and_reads_back(path: Path) -> None:
    assert list(published().iter_errors(tomllib.loads(path.read_text(encoding="utf-8")))) == []
    lock = RecipeLock.load(path)
    assert RecipeLock.from_text(lock.to_toml()) == lock


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_fails_both_at_its_key_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = next(line.removeprefix("# where: ") for line in text.splitlines() if line.startswith("# where: "))
    assert list(published().iter_errors(tomllib.loads(text))) != []
    with pytest.raises(RecordError, match=re.escape(f"{where}: ")):
        RecipeLock.load(path)


def test_a_lock_is_the_same_bytes_whatever_the_order_of_its_files() -> None:
    files = dict(reversed(LOCK.adapters[0].files.items()))
    assert list(files) != list(LOCK.adapters[0].files)
    assert with_adapter(files=files).to_toml() == LOCK.to_toml()


def test_a_lock_is_written_whole(tmp_path: Path) -> None:
    path = RecipeLock.beside(tmp_path / "mix.toml")
    assert path == tmp_path / "mix.lock"
    LOCK.save(path)
    assert path.read_text(encoding="utf-8") == LOCK.to_toml()
    assert RecipeLock.load(path) == LOCK
    assert [each.name for each in tmp_path.iterdir()] == ["mix.lock"]
    with pytest.raises(WriteFailed):
        LOCK.save(tmp_path / "no" / "mix.lock")


def test_nothing_moved_is_no_finding() -> None:
    assert compare(LOCK, RecipeLock.from_text(LOCK.to_toml())) == []


BASE = LOCK.base
assert BASE is not None
COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("found", "code", "level", "words"),
    [
        (moved(recipe=OTHER), "lock-recipe-changed", Verdict.DEGRADED, "the recipe says something else"),
        (moved(method="linear"), "lock-recipe-changed", Verdict.DEGRADED, "linear, and was ties"),
        (moved(output=OTHER), "lock-output-differs", Verdict.DEGRADED, OTHER),
        (moved(torch="2.16.0"), "lock-versions-differ", Verdict.EXACT, "torch is 2.16.0, and was 2.15.0"),
        (moved(lorahub="9"), "lock-versions-differ", Verdict.EXACT, "lorahub is 9, and was 0.1.0"),
        (moved(base=None), "lock-base-moved", Verdict.DEGRADED, "the base is none, and was acme/base"),
        (moved(base=BASE.model_copy(update={"weights": OTHER})), "lock-weights-differ", Verdict.DEGRADED, "base: "),
        (moved(base=BASE.model_copy(update={"commit": COMMIT})), "lock-base-moved", Verdict.UNVERIFIED, "are the same"),
        (moved(adapters=LOCK.adapters[:1]), "lock-adapters-differ", Verdict.DEGRADED, "./mine was there"),
        (
            with_adapter(tensors=OTHER),
            "lock-weights-differ",
            Verdict.DEGRADED,
            "adapters[0]: the tensors of acme/ink@1.2",
        ),
        (with_adapter(commit=COMMIT), "lock-adapter-moved", Verdict.UNVERIFIED, f"acme/ink@{COMMIT} now, and was"),
        (with_adapter(format="kohya"), "lock-adapter-moved", Verdict.UNVERIFIED, "in kohya files, and was in peft"),
        (
            with_adapter(files={}),
            "lock-file-differs",
            Verdict.DEGRADED,
            "adapter_config.json of acme/ink@1.2 is gone",
        ),
    ],
)
def test_what_moved_is_said_precisely(found: RecipeLock, code: str, level: Verdict, words: str) -> None:
    findings = compare(LOCK, found)
    assert code in [finding.code for finding in findings]
    assert worst(findings) == level
    assert any(words in finding.message for finding in findings)


def test_a_commit_that_moved_with_its_weights_is_both() -> None:
    findings = compare(LOCK, with_adapter(commit=COMMIT, tensors=OTHER))
    assert [(each.code, each.level) for each in findings] == [
        ("lock-weights-differ", Verdict.DEGRADED),
        ("lock-adapter-moved", Verdict.UNVERIFIED),
    ]
    assert "are the same" not in findings[1].message


def test_an_output_is_compared_where_both_have_one() -> None:
    assert compare(LOCK, moved(output=None)) == []
    assert compare(moved(output=None), LOCK) == []


@pytest.mark.parametrize("text", ["x = ", "recipe = nan", "recipe = 2026-01-01", "[" * 100, b"\xff", 'recipe = "x"'])
def test_what_is_no_lock_is_refused(text: str | bytes) -> None:
    with pytest.raises(RecordError):
        RecipeLock.from_text(text)
