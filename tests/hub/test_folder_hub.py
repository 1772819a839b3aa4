"""The embedded folder hub: versions, selectors, verified pulls, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorahub import fetching
from lorahub.errors import (
    Degraded,
    DigestMismatch,
    IntegrityError,
    InvalidRef,
    NotFound,
    PushRefused,
    RecordError,
    UsageError,
    WriteFailed,
)
from lorahub.files.user import cache_root
from lorahub.findings import Verdict
from lorahub.hub import open_hub
from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.folder import FolderHub
from lorahub.hub.hub import FilePin, Pin, digest_of
from lorahub.names import Ref

INK = Ref(repo="acme/ink")


@pytest.fixture
def hub(tmp_path: Path, cache: Cache) -> FolderHub:
    return FolderHub(tmp_path / "hub", cache=cache)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return snapshot(folder)


# -------------------------------------------------------------------------------------------- push, then pull


def test_what_was_pushed_is_pulled_byte_for_byte(hub, make_adapter):
    folder = make_adapter(files={"tokenizer.json": b"{}", "additional_chat_templates/x.jinja": b"{{ x }}"})
    pushed = hub.push(folder, INK, version="1.2.0", message="first")
    pin = hub.resolve(Ref.parse("acme/ink@1.2"))
    assert (pin.commit, pin.tag, pin.version) == (pushed.commit, "v1.2.0", "1.2.0")
    assert pin.files == pushed.files
    assert contents(hub.pull(pin)) == contents(folder)


def test_leftovers_of_training_stay_behind(hub, make_adapter):
    folder = make_adapter(files={"optimizer.pt": b"x", "checkpoint-1/adapter_model.safetensors": b"x"})
    pin = hub.push(folder, INK)
    assert set(pin.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_selectors_are_resolved_over_the_tags(hub, make_adapter):
    commits = {
        version: hub.push(make_adapter(f"v{version}", seed=seed), INK, version=version).commit
        for seed, version in enumerate(["1.0.0", "1.2.0", "1.10.0", "2.0.0", "3.0.0rc1"])
    }
    wanted = {
        "": "2.0.0",
        "@1": "1.10.0",
        "@1.2": "1.2.0",
        "@~=1.0": "1.10.0",
        "@<1.5": "1.2.0",
        "@3.0.0rc1": "3.0.0rc1",
    }
    for selector, version in wanted.items():
        pin = hub.resolve(Ref.parse(f"acme/ink{selector}"))
        assert (pin.version, pin.commit) == (version, commits[version])
        assert pin.why
    assert hub.resolve(Ref.parse("acme/ink@main")).commit == commits["3.0.0rc1"]
    assert hub.resolve(Ref.parse(f"acme/ink@{commits['1.0.0']}")).commit == commits["1.0.0"]
    assert [str(each.version) for each in hub.versions("acme/ink")] == ["3.0.0rc1", "2.0.0", "1.10.0", "1.2.0", "1.0.0"]


def test_a_later_version_changes_nothing_for_the_earlier_pin(hub, make_adapter):
    first = hub.push(make_adapter(seed=1), INK, version="1.0.0")
    hub.push(make_adapter(seed=2), INK, version="1.1.0")
    assert b'"seed": 1' in (hub.pull(first) / "adapter_config.json").read_bytes()


def test_a_branch_of_its_own_is_named_with_at(hub, make_adapter):
    hub.push(make_adapter(seed=1), INK)
    dev = hub.push(make_adapter(seed=2), Ref.parse("acme/ink@dev"))
    assert hub.resolve(Ref.parse("acme/ink@dev")).commit == dev.commit
    assert hub.resolve(INK).commit != dev.commit
    with pytest.raises(UsageError, match="no branch"):
        hub.push(make_adapter(), Ref.parse("acme/ink@1.2"))


def test_a_subfolder_is_an_adapter_of_its_own(hub, make_adapter):
    hub.push(make_adapter("root", seed=1), INK)
    hub.push(make_adapter("sql", seed=2), Ref.parse("acme/ink/sql"))
    hub.push(make_adapter("root", seed=3, files={"tokenizer.json": b"{}"}), INK)
    root, sql = hub.resolve(INK), hub.resolve(Ref.parse("acme/ink/sql"))
    assert b'"seed": 3' in (hub.pull(root) / "adapter_config.json").read_bytes()
    assert b'"seed": 2' in (hub.pull(sql) / "adapter_config.json").read_bytes()
    assert "sql/adapter_config.json" not in root.files
    assert hub.pull(sql).name == "sql"


def test_a_single_file_can_be_named(hub, make_adapter):
    hub.push(make_adapter(files={"b.safetensors": b"b"}), INK)
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink/b.safetensors")))
    assert [path.name for path in folder.glob("*.safetensors")] == ["b.safetensors"]


def test_a_folder_of_several_adapters_is_pushed_with_them_all(hub, make_adapter):
    folder = make_adapter(files={"sql/adapter_config.json": b"{}", "sql/adapter_model.safetensors": b"s"})
    pin = hub.push(folder, INK, version="1.0.0")
    assert set(pin.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.push(folder, INK, version="1.0.0").why.startswith("already")
    assert (hub.pull(hub.resolve(Ref.parse("acme/ink/sql"))) / "adapter_model.safetensors").read_bytes() == b"s"


def test_a_folder_that_only_holds_adapters_is_refused(hub, tmp_path, make_adapter):
    make_adapter("several/a")
    with pytest.raises(PushRefused, match="no adapter itself"):
        hub.push(tmp_path / "several", INK)
    assert not (tmp_path / "hub").exists()


# --------------------------------------------------------------------------------------- nothing twice, nothing moved


def test_pushing_the_same_again_writes_nothing_and_says_so(hub, tmp_path, make_adapter):
    folder = make_adapter()
    first = hub.push(folder, INK, version="1.0.0")
    before = snapshot(tmp_path / "hub")
    again = hub.push(folder, INK, version="1.0.0")
    assert (again.commit, again.why) == (first.commit, "already published as v1.0.0")
    assert hub.push(folder, INK).why == "already published on branch main"
    assert snapshot(tmp_path / "hub") == before


def test_the_same_content_under_a_new_version_is_a_tag_on_the_same_commit(hub, make_adapter):
    folder = make_adapter()
    first = hub.push(folder, INK, version="1.0.0")
    second = hub.push(folder, INK, version="1.0.1")
    assert second.commit == first.commit
    assert hub.resolve(Ref.parse("acme/ink@1.0.1")).tag == "v1.0.1"


def test_a_version_that_exists_is_put_on_the_branch_that_is_asked_for(hub, make_adapter):
    folder, dev = make_adapter(), Ref.parse("acme/ink@dev")
    first = hub.push(folder, INK, version="1.0.0")
    assert hub.push(folder, dev, version="1.0.0").why == "published as v1.0.0, on a new branch dev"
    assert hub.resolve(dev).commit == first.commit
    assert hub.push(folder, dev, version="1.0.0").why == "already published as v1.0.0"


@pytest.mark.parametrize("version", ["1.0.0", "v1.0.0", "1.0", "1"])
def test_a_published_version_never_changes(hub, tmp_path, make_adapter, version):
    hub.push(make_adapter(seed=1), INK, version="1.0.0")
    before = snapshot(tmp_path / "hub")
    with pytest.raises(PushRefused, match=r"differs in adapter_config\.json, adapter_model\.safetensors"):
        hub.push(make_adapter(seed=2), INK, version=version)
    assert snapshot(tmp_path / "hub") == before


def test_a_dry_run_says_what_would_be_and_writes_nothing(hub, tmp_path, make_adapter):
    folder = make_adapter()
    planned = hub.push(folder, INK, version="1.0.0", dry_run=True)
    assert planned.why == "would be published as v1.0.0"
    assert not (tmp_path / "hub").exists()
    assert hub.push(folder, INK, version="1.0.0").commit == planned.commit


def test_publishing_can_be_switched_off(hub, tmp_path, make_adapter, monkeypatch):
    monkeypatch.setenv("LORAHUB_DISABLE_PUSH", "1")
    for dry_run in (True, False):
        with pytest.raises(PushRefused, match="LORAHUB_DISABLE_PUSH"):
            hub.push(make_adapter(), INK, dry_run=dry_run)
    assert not (tmp_path / "hub").exists()


def test_a_folder_with_secrets_is_refused_before_anything_is_written(hub, tmp_path, make_adapter):
    folder = make_adapter(files={".env": b"KEY=1", "train.py": b"pass"})
    (folder / "leak.png").symlink_to("/etc/passwd")
    with pytest.raises(PushRefused) as caught:
        hub.push(folder, INK)
    assert {finding.code for finding in caught.value.findings} == {"secret-file", "unknown-file", "link"}
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("version", ["one", "1.0+local", "1!2.0", "", "1.0 || true"])
def test_only_a_plain_version_can_be_published(hub, make_adapter, version):
    with pytest.raises(UsageError):
        hub.push(make_adapter(), INK, version=version)


def test_a_name_that_would_clash_with_another_adapters_folder_is_refused(hub, make_adapter):
    hub.push(make_adapter("a"), Ref.parse("acme/ink/sql"))
    with pytest.raises(PushRefused, match="clash"):
        hub.push(make_adapter("b"), Ref.parse("acme/ink/SQL"))


def test_the_same_history_has_the_same_commits_in_any_hub(tmp_path, cache, make_adapter):
    commits = []
    for place in ("one", "two"):
        hub = FolderHub(tmp_path / place, cache=cache)
        commits.append([hub.push(make_adapter(seed=seed), INK, message="same").commit for seed in (1, 2)])
    assert commits[0] == commits[1]


# --------------------------------------------------------------------------------------------- integrity


def blob_of(root: Path, data: bytes) -> Path:
    name = hashlib.sha256(data).hexdigest()
    return root / "blobs" / name[:2] / name


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove"])
def test_a_damaged_blob_is_noticed_on_pull_and_leaves_nothing(hub, tmp_path, cache, make_adapter, damage):
    folder = make_adapter()
    pin = hub.push(folder, INK)
    data = (folder / "adapter_model.safetensors").read_bytes()
    blob = blob_of(tmp_path / "hub", data)
    if damage == "remove":
        blob.unlink()
    else:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        blob.write_bytes({"flip": flipped, "truncate": data[:-1], "extend": data + b"x"}[damage])
    with pytest.raises(NotFound if damage == "remove" else DigestMismatch) as caught:
        hub.pull(pin)
    assert caught.value.exit_code == (6 if damage == "remove" else 5)
    assert pin_of(cache.root) is None
    assert not list(cache.root.rglob("pin.json"))
    if damage != "remove":
        assert not list(cache.root.rglob("*.safetensors"))


def test_pushing_again_heals_a_damaged_blob(hub, tmp_path, make_adapter):
    folder = make_adapter()
    hub.push(folder, INK)
    data = (folder / "adapter_model.safetensors").read_bytes()
    blob_of(tmp_path / "hub", data).write_bytes(b"rot")
    (folder / "README.md").write_bytes(b"changed")
    assert contents(hub.pull(hub.push(folder, INK)))["adapter_model.safetensors"] == data


def test_a_damaged_commit_is_noticed(hub, tmp_path, make_adapter):
    pin = hub.push(make_adapter(), INK)
    place = tmp_path / "hub" / "repos" / "acme" / "ink" / "commits" / f"{pin.commit}.json"
    place.write_bytes(place.read_bytes().replace(b"README", b"READYOU"))
    with pytest.raises(DigestMismatch):
        hub.resolve(INK)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"branches": {"main": "../../x"}, "tags": {}}', '{"branches": 1, "tags": {}}']
)
def test_damaged_refs_are_noticed(hub, tmp_path, make_adapter, text):
    hub.push(make_adapter(), INK)
    (tmp_path / "hub" / "repos" / "acme" / "ink" / "refs.json").write_text(text)
    with pytest.raises(IntegrityError):
        hub.resolve(INK)


def plant(root: Path, files: object) -> None:
    """Make a commit with any content the head of main, as a hostile hub would."""
    data = json.dumps({"files": files, "message": "", "parent": None}, sort_keys=True, separators=(",", ":")).encode()
    commit = hashlib.sha1(data).hexdigest()
    repo = root / "repos" / "acme" / "ink"
    (repo / "commits" / f"{commit}.json").write_bytes(data)
    (repo / "refs.json").write_text(json.dumps({"branches": {"main": commit}, "tags": {}}))


@pytest.mark.parametrize(
    "name", ["../../../evil.safetensors", "/evil.safetensors", "a\\..\\evil.safetensors", "C:evil.safetensors"]
)
def test_a_hostile_name_in_a_commit_is_refused_before_anything_is_written(hub, tmp_path, cache, make_adapter, name):
    hub.push(make_adapter(), INK)
    plant(tmp_path / "hub", {name: {"sha256": "0" * 64, "size": 1}, "x.safetensors": {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(IntegrityError):
        hub.resolve(INK)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    "files", [[], {"x.safetensors": {"sha256": "../x", "size": 1}}, {"x.safetensors": {"size": 1}}, {"x": 1}]
)
def test_a_commit_that_is_none_is_refused(hub, tmp_path, make_adapter, files):
    hub.push(make_adapter(), INK)
    plant(tmp_path / "hub", files)
    with pytest.raises(IntegrityError):
        hub.resolve(INK)


def test_a_pin_that_disagrees_with_its_commit_is_refused(hub, make_adapter):
    pin = hub.push(make_adapter(), INK)
    other = FilePin(size=1, sha256="0" * 64)
    with pytest.raises(DigestMismatch, match="another README"):
        hub.pull(pin.with_files({**pin.files, "README.md": other}))


def test_a_file_that_changes_while_it_is_pushed_is_not_published(hub, tmp_path, make_adapter, monkeypatch):
    folder = make_adapter()

    def touched(name: str, done: int, total: int) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"new")

    with pytest.raises(IntegrityError, match="changed while"):
        hub.push(folder, INK, progress=touched)
    assert not (tmp_path / "hub" / "repos" / "acme").exists()


# ------------------------------------------------------------------------------------------------- the cache


def test_a_second_pull_reads_nothing_from_the_hub(hub, tmp_path, make_adapter):
    folder = hub.pull(pin := hub.push(make_adapter(), INK))
    for blob in (tmp_path / "hub" / "blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    assert hub.pull(pin) == folder


@pytest.mark.parametrize("damage", ["edit", "remove", "add", "link"])
def test_a_pulled_folder_that_was_changed_is_pulled_anew(hub, make_adapter, damage):
    source = make_adapter()
    folder = hub.pull(pin := hub.push(source, INK))
    weights = folder / "adapter_model.safetensors"
    if damage == "edit":
        data, status = bytearray(weights.read_bytes()), weights.stat()
        data[0] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif damage == "add":
        (folder / "lorahub.json").write_text("{}")
    else:
        weights.unlink()
        if damage == "link":
            weights.symlink_to(source / "adapter_model.safetensors")
    assert contents(hub.pull(pin)) == contents(source)
    assert not weights.is_symlink()


def test_a_touched_file_is_hashed_once_and_kept(hub, make_adapter, monkeypatch):
    folder = hub.pull(pin := hub.push(make_adapter(), INK))
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    inode = (folder / "adapter_model.safetensors").stat().st_ino
    assert hub.pull(pin) == folder
    assert (folder / "adapter_model.safetensors").stat().st_ino == inode

    def hashed(path: object) -> object:
        raise AssertionError(f"{path} was hashed again")

    monkeypatch.setattr("lorahub.hub.cache.file_digest", hashed)
    assert hub.pull(pin) == folder


def test_a_pulled_folder_knows_its_pin_and_any_other_folder_none(hub, make_adapter):
    source = make_adapter()
    pin = hub.resolve(Ref.parse(f"acme/ink@{hub.push(source, INK).commit}"))
    assert pin_of(hub.pull(pin)) == pin
    assert pin_of(source) is None


def test_a_cache_that_cannot_be_written_is_a_typed_error(hub, tmp_path, make_adapter):
    pin = hub.push(make_adapter(), INK)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(WriteFailed):
        hub.pull(pin)


def test_bytes_can_be_read_without_pulling(hub, cache, make_adapter):
    folder = make_adapter()
    pin = hub.push(folder, INK)
    data = (folder / "adapter_model.safetensors").read_bytes()
    assert hub.read(pin, "adapter_model.safetensors", offset=8, length=10) == data[8:18]
    assert hub.read(pin, "adapter_model.safetensors", offset=4990, length=100) == data[4990:]
    assert hub.read(pin, "adapter_model.safetensors", offset=9999) == b""
    assert hub.read(pin, "README.md") == b"# An adapter\n"
    assert not cache.root.exists()
    with pytest.raises(NotFound):
        hub.read(pin, "nothing")


def test_progress_is_told_in_bytes(hub, make_adapter):
    told: list[tuple[str, int, int]] = []
    pin = hub.push(make_adapter(), INK, progress=lambda *step: told.append(step))
    assert told[-1][1:] == (pin.size, pin.size)
    told.clear()
    hub.pull(pin, progress=lambda *step: told.append(step))
    assert told[-1][1:] == (pin.size, pin.size)
    assert [step[1] for step in told] == sorted(step[1] for step in told)


# ----------------------------------------------------------------------------------------------- not there


@pytest.mark.parametrize(
    ("text", "hint"),
    [("acme/inc", "'acme/ink'"), ("acme/ink@9", ""), ("acme/ink/nowhere", ""), ("acme/ink@" + "0" * 40, "")],
)
def test_what_is_not_there_is_not_found(hub, make_adapter, text, hint):
    hub.push(make_adapter(), INK, version="1.0.0")
    with pytest.raises(NotFound) as caught:
        hub.resolve(Ref.parse(text))
    assert hint in caught.value.hint


def test_a_hub_that_is_not_there_yet_says_how_it_comes_to_be(hub):
    with pytest.raises(NotFound) as caught:
        hub.resolve(INK)
    assert "first push" in caught.value.hint


def test_a_folder_of_the_same_name_is_offered(hub, tmp_path, make_adapter, monkeypatch):
    hub.push(make_adapter(), Ref.parse("other/thing"))
    (tmp_path / "here" / "acme" / "ink").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(NotFound) as caught:
        hub.resolve(INK)
    assert "./acme/ink" in caught.value.hint


def test_a_local_path_is_not_in_a_hub(hub):
    with pytest.raises(UsageError):
        hub.resolve(Ref.parse("./mix"))


def test_a_folder_that_holds_something_else_is_not_made_a_hub(tmp_path, cache):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a folder hub"):
        FolderHub(tmp_path, cache=cache)
    with pytest.raises(UsageError, match="is a file"):
        FolderHub(tmp_path / "photo.jpg", cache=cache)


def test_a_hub_of_a_later_schema_is_left_alone(tmp_path, cache):
    (tmp_path / "lorahub-hub.json").write_text('{"schema": "9"}')
    with pytest.raises(UsageError, match="version 9"):
        FolderHub(tmp_path, cache=cache)


def test_search_finds_by_name_and_by_base(hub, make_adapter):
    hub.push(make_adapter(), INK, version="1.0.0")
    hub.push(make_adapter(), Ref.parse("acme/sql"))
    assert [found.repo for found in hub.search("ink")] == ["acme/ink"]
    assert [(found.repo, found.version) for found in hub.search(base="acme/base")] == [
        ("acme/ink", "1.0.0"),
        ("acme/sql", None),
    ]
    assert hub.search(base="acme/other") == []
    assert len(hub.search(limit=1)) == 1


# ----------------------------------------------------------------------------------------------- which hub


def test_the_environment_chooses_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_HUB", str(tmp_path / "from-environment"))
    assert open_hub().name == str(tmp_path / "from-environment")
    assert open_hub(tmp_path / "given").name == str(tmp_path / "given")
    monkeypatch.delenv("LORAHUB_HUB")
    assert open_hub().name == "huggingface.co"
    assert open_hub("hf").name == "huggingface.co"


def test_the_environment_chooses_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("LORAHUB_CACHE")
    assert cache_root().name == "lorahub"


# ---------------------------------------------------------------------------------------------------- pins


def test_a_pin_survives_its_json(hub, make_adapter):
    hub.push(make_adapter(), Ref.parse("acme/ink/sql"), version="1.0.0")
    pin = hub.resolve(Ref.parse("acme/ink@~=1.0/sql"))
    assert Pin.loads(pin.dumps()) == pin
    assert pin.dumps() == Pin.loads(pin.dumps()).dumps()
    assert str(pin) == "acme/ink@v1.0.0/sql"


def test_the_digest_is_of_what_computes_and_of_nothing_else(hub, make_adapter):
    first = hub.push(make_adapter(seed=1), INK)
    card = hub.push(make_adapter(seed=1, files={"README.md": b"better"}), INK)
    other = hub.push(make_adapter(seed=2), INK)
    assert first.commit != card.commit
    assert first.digest() == card.digest() != other.digest()


def test_the_digest_is_the_one_that_is_written_down():
    files = {"b.safetensors": FilePin(size=2, sha256="1" * 64), "é.json": FilePin(size=3, sha256="2" * 64)}
    text = f"{'1' * 64} 2 b.safetensors\n{'2' * 64} 3 é.json\n"
    assert digest_of(files) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert digest_of(dict(reversed(files.items()))) == digest_of(files)


GOOD = {"repo": "acme/ink", "commit": "0" * 40, "files": {"x.safetensors": {"size": 1, "sha256": "0" * 64}}}


@pytest.mark.parametrize(
    "change",
    [
        {"repo": "../.."},
        {"repo": 5},
        {"commit": "main"},
        {"commit": "../../../x"},
        {"files": []},
        {"files": {"../x": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"x": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"x": {"size": True, "sha256": "0" * 64}}},
        {"files": {"x": {"size": 1, "sha256": "../../x"}}},
        {"files": {"x": {"size": 1}}},
        {"files": {"x": {"size": 1, "sha256": "0" * 64, "url": "https://example.org"}}},
        {"subfolder": "../.."},
        {"file": "/etc/passwd"},
        {"holds": "everything"},
        {"surprise": "x"},
    ],
    ids=str,
)
def test_a_pin_from_elsewhere_is_not_believed(change):
    assert Pin.from_json(GOOD)
    with pytest.raises(RecordError):
        Pin.from_json(GOOD | change)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"repo": "a/b"}', "[" * 100000], ids=["nothing", "list", "null", "part", "deep"]
)
def test_text_that_is_no_pin_is_refused(text):
    with pytest.raises(RecordError):
        Pin.loads(text)


# ----------------------------------------------------------------------------------------------- no torch


def test_nothing_here_imports_torch_and_the_folder_hub_no_client():
    code = (
        "import sys, lorahub.names, lorahub.hub.folder, lorahub.hub.selection\n"
        "assert not {'torch', 'huggingface_hub', 'transformers', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
        "import lorahub.hub.huggingface\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_repository_name_never_becomes_another_path(hub):
    with pytest.raises(InvalidRef):
        hub.versions("../../etc")


def test_search_knows_the_base_by_the_name_that_was_recorded_and_by_the_path_it_was_trained_from(hub, make_adapter):
    record = json.dumps({"schema_version": "1.0", "base": {"repo_id": "acme/named"}}).encode()
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/data/base"}).encode()
    hub.push(make_adapter(files={"lorahub.json": record, "adapter_config.json": config}), INK, version="1.0.0")
    (found,) = hub.search(base="acme/named")
    assert found.base == "acme/named"


@pytest.mark.parametrize("record", [b"[]", b'{"base": 3}', b"\xff", b"[" * 100_000])
def test_search_does_without_a_record_that_is_none(hub, make_adapter, record):
    hub.push(make_adapter(files={"lorahub.json": record}), INK, version="1.0.0")
    assert [found.base for found in hub.search()] == ["acme/base"]


# ---------------------------------------------------------------------------------------------- moved versions


def test_a_version_that_somebody_moved_is_told_until_it_is_trusted(tmp_path, make_adapter):
    """Two machines, each with a cache of its own, and one folder."""
    hers, ours = (FolderHub(tmp_path / "hub", cache=Cache(tmp_path / name)) for name in ("hers", "ours"))
    first = hers.push(make_adapter("first"), INK, version="1.2.0")
    assert ours.resolve(Ref.parse("acme/ink@1.2.0")).said == ()
    other = make_adapter("other", files={"tokenizer.json": b"{}"})
    moved = hers.push(other, INK, version="1.2.0", move_tag=True)
    for asked in ("acme/ink@1.2.0", "acme/ink@~=1.2", "acme/ink"):
        pin = ours.resolve(Ref.parse(asked))
        assert pin.commit == moved.commit
        (said,) = pin.said
        assert (said.code, said.level) == ("tag-moved", Verdict.DEGRADED)
        assert first.commit[:12] in said.message
    assert ours.resolve(Ref(repo="acme/ink", selector=first.commit)).said == ()
    assert hers.resolve(Ref.parse("acme/ink@1.2.0")).said == ()  # who moved it knows
    ours.trust(ours.resolve(Ref.parse("acme/ink@1.2.0")))
    assert ours.resolve(Ref.parse("acme/ink@1.2.0")).said == ()


def test_nothing_of_a_moved_version_is_pulled_or_locked_before_it_is_allowed(tmp_path, make_adapter, monkeypatch):
    root, theirs = tmp_path / "hub", Cache(tmp_path / "theirs")
    monkeypatch.setenv("LORAHUB_HUB", str(root))
    FolderHub(root, cache=theirs).push(make_adapter("first"), INK, version="1.2.0")
    before = fetching.pull("acme/ink@1.2.0").pin.commit
    other = make_adapter("other", files={"tokenizer.json": b"{}"})
    after = FolderHub(root, cache=theirs).push(other, INK, version="1.2.0", move_tag=True).commit
    for _ in range(2):
        with pytest.raises(Degraded, match="--allow tag-moved") as refused:
            fetching.pull("acme/ink@1.2.0")
        assert before[:12] in str(refused.value)
    assert fetching.pull("acme/ink@1.2.0", allow=["tag-moved"]).pin.commit == after
    assert fetching.pull("acme/ink@1.2.0").findings == ()


def test_a_folder_under_another_name_is_the_same_hub(tmp_path, make_adapter, monkeypatch, cache):
    FolderHub(tmp_path / "hub", cache=cache).push(make_adapter("first"), INK, version="1.2.0")
    monkeypatch.chdir(tmp_path)
    other = make_adapter("other", files={"tokenizer.json": b"{}"})
    elsewhere = FolderHub(Path("hub"), cache=Cache(tmp_path / "theirs"))
    elsewhere.push(other, INK, version="1.2.0", move_tag=True)
    (said,) = FolderHub(Path("hub"), cache=cache).resolve(Ref.parse("acme/ink@1.2.0")).said
    assert said.code == "tag-moved"


def test_a_version_in_another_spelling_is_called_the_same(hub, make_adapter):
    hub.push(make_adapter("first"), INK, version="1.0")
    with pytest.raises(PushRefused, match=r"has v1\.0 already") as refused:
        hub.push(make_adapter("other", seed=1), INK, version="1.0.0")
    assert "same version: say --version 1.0." in str(refused.value)
    with pytest.raises(PushRefused) as refused:
        hub.push(make_adapter("other", seed=1), INK, version="1.0")
    assert "same version" not in str(refused.value)
