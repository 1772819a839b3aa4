"""Manifest and lock as documents: their schemas, their bytes, what is refused, what is kept."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from lorahub.errors import ManifestError, RecordError
from lorahub.manifest.document import Manifest
from lorahub.manifest.lockfile import Lock

SCHEMAS = Path(__file__).parents[2] / "schemas"
KINDS = {"manifest": (Manifest, ManifestError), "lock": (Lock, RecordError)}


def examples(sort: str) -> list[object]:
    return [
        pytest.param(kind, path, id=f"{kind}-{path.stem}")
        for kind in KINDS
        for path in sorted((SCHEMAS / "examples" / kind / sort).glob("*.toml"))
    ]


def published(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{kind}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def example(kind: str, name: str) -> str:
    return (SCHEMAS / "examples" / kind / "valid" / f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "path"), examples("valid"))
def test_a_valid_example_is_valid_for_schema_and_model(kind: str, path: Path) -> None:
    assert list(published(kind).iter_errors(tomllib.loads(path.read_text(encoding="utf-8")))) == []
    KINDS[kind][0].load(path)


@pytest.mark.parametrize(("kind", "path"), examples("invalid"))
def test_an_invalid_example_fails_both_at_its_key_path(kind: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = next(line.removeprefix("# where: ") for line in text.splitlines() if line.startswith("# where: "))
    assert list(published(kind).iter_errors(tomllib.loads(text))) != []
    model, error = KINDS[kind]
    with pytest.raises(error, match=re.escape(f"{where}: ")):
        model.load(path)


def test_there_are_examples_of_both_sorts() -> None:
    assert len(examples("valid")) >= 6
    assert len(examples("invalid")) >= 15


# ---------------------------------------------------------------------------------------------------- the lock


def test_a_lock_reads_back_as_it_was_written_by_any_toml_reader() -> None:
    lock = Lock.from_text(example("lock", "team"))
    text = lock.to_toml()
    assert tomllib.loads(text) == lock.document()
    assert Lock.from_text(text).to_toml() == text
    assert "\r" not in text


def test_a_lock_is_the_same_bytes_whatever_the_order_of_adapters_and_files() -> None:
    lock = Lock.from_text(example("lock", "team"))
    turned = lock.model_copy(
        update={
            "adapter": tuple(
                each.model_copy(update={"file": tuple(reversed(each.file))}) for each in reversed(lock.adapter)
            )
        }
    )
    assert [each.name for each in turned.adapter] != [each.name for each in lock.adapter]
    assert turned.to_toml() == lock.to_toml()


def test_what_a_newer_minor_version_knows_survives_a_rewrite() -> None:
    before = tomllib.loads(example("lock", "newer-minor"))
    after = tomllib.loads(Lock.from_text(example("lock", "newer-minor")).to_toml())
    assert after == before
    assert after["lock-version"] == "1.4"
    assert after["adapter"][0]["signed-by"]


def test_another_major_of_the_lock_is_refused_by_its_number() -> None:
    with pytest.raises(RecordError, match=r"written in version 2\.0") as refused:
        Lock.from_text('lock-version = "2.0"\nwhatever = 1\n')
    assert refused.value.hint == "pip install --upgrade lorahub-core"


def test_a_lock_whose_digest_is_not_that_of_its_files_was_edited() -> None:
    text = example("lock", "team").replace("size = 612", "size = 613", 1)
    with pytest.raises(RecordError, match=r"adapter\[0\]: digest is not that of the files"):
        Lock.from_text(text)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("adapter_model.bin", "is no file that an adapter may have"),
        ("training_args.pkl", "is no file that an adapter may have"),
        (".env", "is no file that an adapter may have"),
        ("run.py", "is no file that an adapter may have"),
        ("ADAPTER_MODEL.safetensors", "two of its files have one name"),
        ("../adapter_config.json", "climbs out"),
        ("/adapter_config.json", "is absolute"),
        ("a\\\\b.json", "holds one of"),
        ("NUL", "reserved by Windows"),
    ],
)
def test_a_lock_opens_no_door_to_files_that_no_adapter_has(path: str, why: str) -> None:
    text = example("lock", "newer-minor").replace('"adapter_config.json"', f'"{path}"')
    with pytest.raises(RecordError, match=why):
        Lock.from_text(text)


def test_a_lock_merged_by_hand_with_one_adapter_twice_is_refused() -> None:
    text = example("lock", "newer-minor")
    entry = text[text.index("[[adapter]]") :]
    with pytest.raises(RecordError, match="'ink' is there twice"):
        Lock.from_text(f"{text}\n{entry}")


@pytest.mark.parametrize(
    "text",
    [
        "<<<<<<< HEAD\n",
        'lock-version = "1.0"\ncreated = 2026-01-01\n',
        "a = " + "[" * 100 + "]" * 100,
        "a." * 100 + "b = 1",
        "\x00",
        "a = 99999999999999999999",
        b"\xff\xfe",
        'lock-version = ["1.0"]',
        'manifest = "sha256:x"',
        "adapter = 3",
        "[adapter]\nname = 1",
        "a = inf",
    ],
)
def test_hostile_text_is_refused_by_both_with_their_own_error(text: str | bytes) -> None:
    with pytest.raises(RecordError):
        Lock.from_text(text)
    with pytest.raises(ManifestError):
        Manifest.from_text(text)


def test_text_over_the_limit_is_not_read() -> None:
    with pytest.raises(ManifestError, match="more than the"):
        Manifest.from_text("#" * (2 << 20))


# ------------------------------------------------------------------------------------------------ the manifest


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[adapters]\nink = "acme/ink:0.5"', "adapters.ink: 'acme/ink:0.5' carries a name or a weight"),
        ('[adapters]\nink = "/srv/ink"', "adapters.ink: '/srv/ink' is a path on one machine"),
        ('[adapters]\nink = "~/ink"', "adapters.ink: '~/ink' is a path on one machine"),
        ('[adapters]\nink = "ink"', "adapters.ink: "),
        ('[adapters]\ncon = "acme/ink"', "cannot name a folder"),
        ('[adapters]\n"../evil" = "acme/ink"', "is no name"),
        ('[adapters]\nInk = "a/b"\nink = "a/b"', "'Ink' and 'ink' would be one folder"),
        ('[adapters]\nink = { reff = "a/b" }', "Did you mean 'ref'?"),
        ('[adapters]\nmix = "a/b"\n[compositions.mix]\nadapters = ["mix"]', "would be one folder"),
        ('[compositions.mix]\nadapters = ["ink"]', "'ink' is not among the adapters"),
        ("[compositions.mix]\nrank = 4", "names neither adapters nor a recipe"),
        ('[compositions.mix]\nrecipe = "../mix.toml"', "lies beside this file"),
        ('[compositions.mix]\nrecipe = "mix.toml"\nrank = 4', "rank stands beside it"),
        ('[adapters]\na = "a/b"\n[compositions.mix]\nadapters = ["a"]\nweights = [1, 2]', "2 weights for 1 adapters"),
        ('[adapters]\na = "a/b"\n[compositions.mix]\nadapters = ["a"]\nbase = true', "names no base"),
        ('base = { repo = "a/b@v1", revision = "main" }', "revision stands beside a selector"),
        ('base = { repo = "a/b", revision = "a b" }', "cannot name"),
        ("[policy]\nverdic = 1", "Did you mean 'verdict'?"),
    ],
)
def test_a_wrong_manifest_says_what_and_where(text: str, where: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(where)):
        Manifest.from_text(text)


def test_a_manifest_has_one_fingerprint_however_it_is_written() -> None:
    one = Manifest.from_text('base = "a/b@main"\n[adapters]\nink = "acme/ink"\nsql = { ref = "acme/sql", weight = 1 }')
    other = Manifest.from_text(
        '# ours\n[adapters.sql]\nref = "acme/sql"\n[adapters.ink]\nref = "acme/ink"\n'
        '[base]\nrepo = "a/b"\nrevision = "main"'
    )
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != Manifest.from_text('base = "a/b@main"\n[adapters]\nink = "acme/ink"').fingerprint()


@pytest.mark.parametrize("adapters", ['["ink:0.5"]', "{ ink = 0.5 }"])
def test_a_composition_that_is_written_otherwise_is_told_how_one_reads(adapters: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_text(f'[adapters]\nink = "acme/ink"\n[compositions.mix]\nadapters = {adapters}\n')
    assert 'weights = [0.7, 0.3], method = "linear"' in caught.value.hint
