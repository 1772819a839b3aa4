"""The metadata record: read, judged, written, held against files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version as PackagingVersion

from lorahub.errors import AccessDenied, NotFound, RecordError
from lorahub.names import path_problem
from lorahub.record_fields import PATTERNS
from lorahub.records import LIMIT, AdapterRecord, BaseRecord, FileRecord, ModuleRecord, is_path

COMMIT = "d97c1715fd52a7a7dc38c61a2a6b07e1c9481697"
DIGEST = "sha256:" + "9f3c" * 16
MINIMAL: dict[str, Any] = {"schema_version": "1.0", "kinds": ["lora"]}
FULL: dict[str, Any] = {
    **MINIMAL,
    "name": "acme/ink",
    "version": "1.2.0",
    "license": "apache-2.0",
    "components": ["unet"],
    "modules": [{"path": "a.b", "kind": "lora", "rank": 8, "scale": 0.1, "shape": [3, 4]}],
    "base": {"repo_id": "acme/base", "revision": COMMIT, "weights_digest": DIGEST},
    "description": "Answers in ink.",
    "files": {"adapter_model.safetensors": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}},
}


def record(**fields: object) -> AdapterRecord:
    return AdapterRecord.from_json({**MINIMAL, **fields})


def refused(document: object) -> str:
    with pytest.raises(RecordError) as error:
        AdapterRecord.from_json(document)  # type: ignore[arg-type]
    return error.value.message


def test_a_record_needs_a_schema_version_and_kinds_and_nothing_else() -> None:
    assert AdapterRecord.from_json(MINIMAL).kinds == ("lora",)
    message = refused({})
    assert "schema_version: is missing" in message
    assert "kinds: is missing" in message


def test_a_record_reads_back_as_it_was_written() -> None:
    whole = AdapterRecord.from_json(FULL)
    assert AdapterRecord.from_json(whole.to_json()) == whole
    assert whole.document() == FULL


def test_equal_records_are_equal_bytes() -> None:
    backwards = json.dumps(dict(reversed(FULL.items())))
    text = AdapterRecord.from_json(backwards).to_json()
    assert text == AdapterRecord.from_json(FULL).to_json()
    assert text.endswith("}\n")
    assert '"scale": 0.1,' in text


def test_every_problem_is_told_at_once_with_its_key_path() -> None:
    message = refused(
        {
            "schema_version": "1.0",
            "kinds": ["LoRA"],
            "base": {"revision": "main"},
            "modules": [{"path": "a", "kind": "lora"}, {"kind": "lora", "rank": "8"}],
            "files": {"../x": {"size": -1}},
        }
    )
    for problem in (
        "kinds[0]: 'LoRA' is not a kind in lower case",
        "base.revision: 'main' is not a full commit",
        "modules[1].path: is missing",
        "modules[1].rank: ",
        "files['../x']: '../x' is not a path within the folder",
        "files['../x'].size: ",
        "files['../x'].sha256: is missing",
    ):
        assert problem in message


@pytest.mark.parametrize("text", ["[]", '"lora"', "7", "null"])
def test_a_record_is_an_object(text: str) -> None:
    assert "the whole: is no object" in refused(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (
            '{"schema_version": "1.0", "schema_version": "1.0", "kinds": ["lora"]}',
            "the key 'schema_version' appears twice",
        ),
        ('{"schema_version": "1.0", "kinds": ["lora"], "x": NaN}', "NaN is no finite number"),
        ('{"schema_version": "1.0", "kinds": ["lora"], "x": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        (" " * (LIMIT + 1), "allowed"),
    ],
)
def test_a_text_that_is_not_strict_json_is_refused(text: str | bytes, reason: str) -> None:
    assert reason in refused(text)


def test_values_are_never_bent_into_the_right_type() -> None:
    module = {"path": "a", "kind": "lora"}
    for field, value in [("rank", "8"), ("rank", 8.5), ("rank", True), ("scale", "2"), ("path", 7), ("shape", "34")]:
        assert f"modules[0].{field}: " in refused({**MINIMAL, "modules": [{**module, field: value}]})


@pytest.mark.parametrize("version", ["0.9", "2.0", "2.0.1", "10.0"])
def test_another_major_of_the_schema_is_refused_by_name(version: str) -> None:
    with pytest.raises(RecordError, match=f"written in version {version}, and this lorahub reads 1.x") as error:
        record(schema_version=version)
    assert error.value.hint == "pip install --upgrade lorahub-core"


@pytest.mark.parametrize("version", ["1", "1.0.0", "one", "1.x", 1.0])
def test_a_schema_version_that_is_none_is_refused(version: object) -> None:
    assert "schema_version: " in refused({**MINIMAL, "schema_version": version})


def test_what_a_newer_minor_adds_is_kept_at_every_level() -> None:
    document = {
        "schema_version": "1.7",
        "kinds": ["lora"],
        "carbon": {"grams": [1, None]},
        "gone": None,
        "base": {"repo_id": "gpt2", "mirror": None},
        "modules": [{"path": "a", "kind": "lora", "window": {"start": 3}}],
    }
    again = json.loads(AdapterRecord.from_json(document).changed(name="ink").to_json())
    assert again == {**document, "name": "ink"}


def test_a_change_is_checked_and_none_removes() -> None:
    whole = AdapterRecord.from_json(FULL)
    other = whole.changed(
        version=None, base=BaseRecord(repo_id="acme/other"), modules=(ModuleRecord(path="x", kind="dora"),)
    )
    assert other.version is None
    assert other.document()["base"] == {"repo_id": "acme/other"}
    assert other.modules[0].kind == "dora"
    assert whole.version == "1.2.0"
    with pytest.raises(RecordError, match=r"base\.revision: 'v1' is not a full commit"):
        whole.changed(base={"repo_id": "acme/base", "revision": "v1"})


def test_a_part_made_from_what_a_person_gave_is_checked() -> None:
    assert BaseRecord.checked(repo_id="acme/base").repo_id == "acme/base"
    with pytest.raises(RecordError, match=r"repo_id: '\./base' is not a repository"):
        BaseRecord.checked(repo_id="./base")


def test_a_record_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        AdapterRecord.from_json(FULL).name = "other"  # type: ignore[misc]


def test_the_maths_leave_out_everything_that_may_change_without_the_weights() -> None:
    maths = AdapterRecord.from_json(FULL).maths()
    assert maths == {key: FULL[key] for key in ("schema_version", "kinds", "components", "modules")}
    assert AdapterRecord.from_json({**FULL, "version": "9.9", "license": "mit"}).maths() == maths


def test_the_metadata_digest_covers_all_but_the_digests() -> None:
    one = AdapterRecord.from_json(FULL)
    assert one.metadata_digest() == one.changed(digest={"tensors": DIGEST}).metadata_digest()
    assert one.metadata_digest() != one.changed(title="Ink").metadata_digest()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", one.metadata_digest())


@pytest.mark.parametrize(
    "text",
    [
        "/home/bob/adapters/ink",
        "/scratch/run-7/out",
        "/any/where/at/all",
        r"C:\Users\bob\ink",
        "D:/models/base",
        r"\\server\share\base",
        "~/models/base",
        "file:///data/x",
        "trained from /mnt/nfs/base on Tuesday",
        "see 'C:\\base'",
    ],
)
def test_a_path_on_one_machine_is_never_written(text: str) -> None:
    assert is_path(text)
    for fields in (
        {"description": text},
        {"training": {"trainer": {"name": text}}},
        {"notes": [{"a": text}]},
        {text: 1},
    ):
        with pytest.raises(RecordError, match="is a path on one machine"):
            record(**fields).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "acme/base",
        "https://example.org/home/bob",
        "weights/adapter.safetensors",
        "and/or",
        "1/2",
        "ratio 3:4",
        "/think",
        "http://a.b/c:d/e",
        "<|user|>/<|end|>",
        "s3://bucket/key",
        "n/a",
        "A: yes",
    ],
)
def test_what_is_no_path_is_written(text: str) -> None:
    assert not is_path(text)
    assert AdapterRecord.from_json(record(description=text).to_json()).description == text


def test_a_path_that_others_recorded_can_be_read() -> None:
    assert record(description="/home/bob/x").description == "/home/bob/x"


def test_a_record_over_the_limit_is_not_written() -> None:
    whole = AdapterRecord(schema_version="1.0", kinds=("lora",), usage_hint="z" * LIMIT)
    with pytest.raises(RecordError, match="readers take"):
        whole.to_json()


def test_a_record_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lorahub.json"
    path.write_text(AdapterRecord.from_json(FULL).to_json(), encoding="utf-8")
    assert AdapterRecord.load(path).document() == FULL
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(RecordError, match=re.escape(f"{path} does not follow")):
        AdapterRecord.load(path)
    with pytest.raises(NotFound):
        AdapterRecord.load(tmp_path / "missing.json")
    with pytest.raises(NotFound):
        AdapterRecord.load(tmp_path)


def test_a_file_over_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "lorahub.json"
    with path.open("wb") as file:
        file.truncate(LIMIT * 1000)
    with pytest.raises(RecordError, match="allowed"):
        AdapterRecord.load(path)


def test_files_that_changed_or_went_are_stale(tmp_path: Path) -> None:
    kept = {name: FileRecord(size=3, sha256=hashlib.sha256(b"abc").hexdigest()) for name in ("a", "b", "c", "deep/d")}
    whole = record().changed(files=kept)
    (tmp_path / "deep").mkdir()
    for name in kept:
        (tmp_path / name).write_bytes(b"abc")
    assert whole.stale(tmp_path) == ()
    (tmp_path / "c").write_bytes(b"abd")
    (tmp_path / "a").write_bytes(b"abcd")
    (tmp_path / "deep" / "d").unlink()
    (tmp_path / "new").write_bytes(b"x")
    assert whole.stale(tmp_path) == ("a", "c", "deep/d")


def test_a_file_that_cannot_be_read_is_not_called_stale(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("runs as root, whom permissions do not bind")
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "a").chmod(0)
    with pytest.raises(AccessDenied):
        record(files={"a": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}).stale(tmp_path)


def test_what_publishing_demands_is_listed() -> None:
    assert AdapterRecord.from_json(MINIMAL).missing_for_push() == [
        "name",
        "version",
        "license",
        "base.repo_id",
        "files",
    ]
    assert AdapterRecord.from_json(FULL).missing_for_push() == []


def test_a_base_that_is_in_no_repository_is_known_by_its_digest() -> None:
    whole = AdapterRecord.from_json(FULL)
    assert whole.changed(base={"weights_digest": DIGEST}).missing_for_push() == []
    assert whole.changed(base={"structure": DIGEST}).missing_for_push() == ["base.repo_id"]


def test_what_publishing_advises_is_not_demanded() -> None:
    whole = AdapterRecord.from_json(FULL)
    assert whole.advised_for_push() == []
    bare = whole.changed(base={"repo_id": "acme/base"}, description=None)
    assert bare.missing_for_push() == []
    assert bare.advised_for_push() == ["base.revision", "base.weights_digest", "description"]
    assert whole.changed(base={"weights_digest": DIGEST}).advised_for_push() == []


@given(st.from_regex(PATTERNS["version"][0], fullmatch=True))
def test_every_version_of_a_record_compares(version: str) -> None:
    PackagingVersion(version)


@given(st.from_regex(PATTERNS["path"][0], fullmatch=True).filter(lambda name: len(name) < 80))
def test_no_recorded_file_lies_outside_its_folder(name: str) -> None:
    assert (Path("/folder") / name).is_relative_to("/folder")
    assert ".." not in Path(name).parts
    assert path_problem(name) != "is absolute"


def test_a_version_range_is_one_that_can_be_tested() -> None:
    whole = record(compat={"requires": {"peft": ">=0.15, <1", "torch": "==2.*"}})
    assert whole.compat is not None
    assert [SpecifierSet(text).contains("2.1") for text in whole.compat.requires.values()] == [False, True]
    assert "compat.requires.peft: '>=1..2' is not a version range" in refused(
        {**MINIMAL, "compat": {"requires": {"peft": ">=1..2"}}}
    )
