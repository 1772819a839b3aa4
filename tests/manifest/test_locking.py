"""Locking: what references come to, what stays, what moves when it is asked to, what the policy refuses."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from manifest.team import Team, write_base

import lorahub
from lorahub.errors import BaseMismatch, Degraded, ManifestError, NotFound, RecordError, UsageError, WriteFailed
from lorahub.hub.folder import FolderHub
from lorahub.manifest.lockfile import Lock
from lorahub.names import Ref


def entries(team: Team) -> dict[str, dict[str, object]]:
    return {each["name"]: each for each in tomllib.loads(team.lock.read_text())["adapter"]}


def test_a_lock_says_what_was_asked_for_and_what_it_came_to(locked: Team) -> None:
    pin = FolderHub(locked.hub).resolve(Ref.parse("acme/ink@1.2.0"))
    ink = entries(locked)["ink"]
    assert (ink["requested"], ink["resolved"], ink["version"]) == ("acme/ink@~=1.2", "v1.2.0", "1.2.0")
    assert (ink["commit"], ink["digest"], ink["license"]) == (pin.commit, pin.digest(), "apache-2.0")
    assert ink["verdict"] == "exact"
    assert {each["path"]: each["sha256"] for each in ink["file"]} == {p: f.sha256 for p, f in pin.files.items()}
    own = entries(locked)["own"]
    assert own["path"] == "./own"
    assert not own.keys() & {"repo", "commit", "resolved"}


def test_locking_again_does_not_touch_the_file(locked: Team) -> None:
    before = locked.lock.stat()
    again = lorahub.lock()
    assert again.changes == ()
    assert locked.lock.stat().st_mtime_ns == before.st_mtime_ns
    assert locked.lock.stat().st_ino == before.st_ino


def test_two_machines_write_the_same_bytes(locked: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "another" / "place"
    shutil.copytree(locked.folder, elsewhere, ignore=shutil.ignore_patterns("lorahub.lock"))
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "another-cache"))
    lorahub.lock(manifest=elsewhere)
    text = (elsewhere / "lorahub.lock").read_bytes()
    assert text == locked.lock.read_bytes()
    assert str(tmp_path).encode() not in text


def test_a_newer_version_changes_nothing_until_it_is_asked_for(locked: Team) -> None:
    before = locked.lock.read_bytes()
    locked.publish("acme/ink", "1.3.0", seed=4)
    locked.publish("acme/ink", "2.0.0", seed=5)
    locked.publish("acme/sql", "1.1.0", seed=6)
    lorahub.lock()
    assert locked.lock.read_bytes() == before
    changed = lorahub.lock(upgrade=["ink"])
    assert [(each.name, each.what) for each in changed.changes] == [("ink", "updated")]
    assert entries(locked)["ink"]["version"] == "1.3.0"  # within the range
    assert entries(locked)["sql"]["version"] == "1.0.0"
    lorahub.lock(upgrade=True)
    assert entries(locked)["sql"]["version"] == "1.1.0"


def test_what_is_locked_stays_where_the_manifest_still_means_it(locked: Team) -> None:
    locked.publish("acme/ink", "1.3.0", seed=4)
    locked.write(locked.manifest.read_text().replace("acme/ink@~=1.2", "acme/ink@>=1.1,<2"))
    lorahub.lock()
    ink = entries(locked)["ink"]
    assert (ink["version"], ink["requested"]) == ("1.2.0", "acme/ink@>=1.1,<2")
    locked.write(locked.manifest.read_text().replace("acme/ink@>=1.1,<2", "acme/ink@>=1.3"))
    lorahub.lock()
    assert entries(locked)["ink"]["version"] == "1.3.0"


@pytest.mark.parametrize("selector", ["main", "refs/heads/main", "v1.2.0", "1.2.0", "1", ""])
def test_whatever_a_selector_came_to_is_kept(locked: Team, selector: str) -> None:
    locked.write(f'[adapters]\nink = "acme/ink{f"@{selector}" if selector else ""}"\n')
    lorahub.lock()
    before = locked.lock.read_bytes()
    locked.publish("acme/ink", "1.3.0", seed=4)  # main moves along
    lorahub.lock()
    assert locked.lock.read_bytes() == before


def test_a_commit_is_locked_as_one(locked: Team) -> None:
    commit = entries(locked)["ink"]["commit"]
    locked.write(f'[adapters]\nink = "acme/ink@{commit}"\n')
    lorahub.lock(upgrade=True)
    assert entries(locked)["ink"]["resolved"] == commit


def test_a_folder_or_file_within_a_repository_is_locked(locked: Team, tmp_path: Path) -> None:
    folder = locked.adapter(tmp_path / "deep", seed=7)
    FolderHub(locked.hub).push(folder, Ref.parse("acme/ink/deep"), version="1.4.0")
    locked.write('[adapters]\ndeep = "acme/ink@1.4/deep"\none = "acme/ink@1.4/deep/adapter_model.safetensors"\n')
    lorahub.lock()
    found = entries(locked)
    assert found["deep"]["subfolder"] == "deep"
    assert found["one"]["weight-name"] == "adapter_model.safetensors"
    assert lorahub.sync()["one"].joinpath("adapter_model.safetensors").exists()


def test_upgrade_of_a_name_that_is_not_there_says_which_there_are(locked: Team) -> None:
    with pytest.raises(UsageError, match="Did you mean 'ink'"):
        lorahub.lock(upgrade=["inkk"])


def test_unknown_keys_of_a_lock_survive_save_those_of_what_was_replaced(locked: Team) -> None:
    text = locked.lock.read_text()
    text = text.replace("manifest =", 'future = "kept"\nmanifest =', 1)
    text = text.replace('verdict = "exact"', 'verdict = "exact"\nsigned = "by me"')
    locked.lock.write_text(text)
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=["ink"])
    after = tomllib.loads(locked.lock.read_text())
    assert after["future"] == "kept"
    assert entries(locked)["sql"]["signed"] == "by me"
    assert "signed" not in entries(locked)["ink"]


def test_check_asks_nobody_and_writes_nothing(locked: Team) -> None:
    shutil.rmtree(locked.hub)
    lorahub.lock(check=True)
    before = locked.lock.read_bytes()
    locked.write(locked.manifest.read_text().replace("acme/sql@1", "acme/sql@2"))
    with pytest.raises(Degraded, match="sql is acme/sql@2 now, and was locked as acme/sql@1") as refused:
        lorahub.lock(check=True)
    assert (refused.value.exit_code, refused.value.hint) == (3, "lorahub lock")
    assert locked.lock.read_bytes() == before


def test_check_sees_that_a_folder_of_the_project_changed(locked: Team) -> None:
    (locked.folder / "own" / "README.md").write_text("# other words\n")
    with pytest.raises(Degraded, match=r"./own has other files"):
        lorahub.lock(check=True)
    lorahub.lock()
    lorahub.lock(check=True)


def test_comments_and_order_of_the_manifest_make_no_difference(locked: Team) -> None:
    locked.write(f"# a word\n{locked.manifest.read_text()}\n# another\n")
    lorahub.lock(check=True)


def test_without_a_manifest_the_next_command_is_said(team: Team) -> None:
    for function in (lorahub.lock, lorahub.sync, lorahub.verify, lorahub.outdated):
        with pytest.raises(UsageError, match=r"no lorahub.toml here or above") as refused:
            function()
        assert "lorahub add" in refused.value.hint
    with pytest.raises(NotFound, match="no manifest at"):
        lorahub.lock(manifest="elsewhere.toml")


def test_a_manifest_is_found_from_a_folder_below(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(locked.folder / "own")
    assert lorahub.lock(check=True).path == locked.lock


def test_a_lock_that_is_none_is_not_overwritten(locked: Team) -> None:
    locked.lock.write_text("<<<<<<< HEAD\n")
    with pytest.raises(RecordError, match=r"lorahub.lock"):
        lorahub.lock()
    assert locked.lock.read_text() == "<<<<<<< HEAD\n"
    locked.lock.unlink()  # as the hint says
    lorahub.lock()


# ------------------------------------------------------------------------------------------------------ policy


def test_an_adapter_whose_base_nobody_recorded_is_refused_by_default(team: Team) -> None:
    team.publish("acme/wild", "1.0.0", recorded=False)
    team.write('base = "./base"\n[adapters]\nwild = "acme/wild"\n')
    with pytest.raises(Degraded, match=r"wild is unverified, and lorahub\.toml accepts nothing worse than") as refused:
        lorahub.lock()
    assert "base-unrecorded" in {each.code for each in refused.value.findings}
    assert 'verdict = "unverified"' in refused.value.hint
    assert not team.lock.exists()
    said = {each.code: each.where for each in lorahub.add(verdict="unverified").findings}  # as the hint says
    assert '[policy]\nverdict = "unverified"\n' in team.manifest.read_text()
    assert said["base-unrecorded"] == ("wild",)
    assert entries(team)["wild"]["verdict"] == "unverified"


def test_an_adapter_for_another_base_cannot_be_locked_and_changes_nothing(locked: Team) -> None:
    before = locked.lock.read_bytes()
    write_base(locked.folder / "wide", width=16)
    locked.write(locked.manifest.read_text().replace("./base", "./wide"))
    with pytest.raises(BaseMismatch) as refused:
        lorahub.lock()
    assert refused.value.exit_code == 4
    assert "ink" in refused.value.message
    assert refused.value.findings
    assert locked.lock.read_bytes() == before


def test_a_base_of_other_weights_is_degraded_unless_its_code_is_allowed(locked: Team) -> None:
    write_base(locked.folder / "tuned", seed=9)
    text = locked.manifest.read_text().replace("./base", "./tuned")
    locked.write(text)
    with pytest.raises(Degraded, match="ink is degraded") as refused:
        lorahub.lock()
    assert refused.value.hint.endswith('in [policy] of lorahub.toml: allow = ["base-weights-differ"]')
    locked.write(f'{text}[policy]\nallow = ["base-weights-differ"]\n')
    lorahub.lock()
    assert entries(locked)["ink"]["verdict"] == "degraded"  # what was so is written down, whoever accepts it


def test_owners_and_licences_are_refused_by_the_line_of_the_policy(locked: Team) -> None:
    locked.publish("mallory/ink", "1.0.0", seed=8, licence="cc-by-nc-4.0")
    locked.write(
        f'{locked.manifest.read_text()}theirs = "mallory/ink"\n[policy]\nowners = ["acme"]\nlicenses = ["MIT"]\n'
    )
    with pytest.raises(Degraded) as refused:
        lorahub.lock()
    told = refused.value.message
    assert 'theirs is from mallory, and owners = ["acme"]' in told
    assert 'theirs is under cc-by-nc-4.0, and licenses = ["MIT"]' in told
    assert "ink is under apache-2.0" in told
    assert {each.code for each in refused.value.findings} == {"policy-owner", "policy-license"}
    assert "[policy]" in refused.value.hint


def test_case_of_a_licence_does_not_count_and_none_is_refused(locked: Team) -> None:
    text = locked.manifest.read_text()
    locked.write(f'{text}[policy]\nlicenses = ["Apache-2.0"]\n')
    lorahub.lock()
    record = locked.folder / "own" / "lorahub.json"
    record.write_text(record.read_text().replace('"license": "apache-2.0",', ""))
    (locked.folder / "own" / "README.md").unlink()
    with pytest.raises(Degraded, match="own states no licence"):
        lorahub.lock()


def test_without_a_base_nothing_is_held_against_one_and_that_is_said(team: Team) -> None:
    team.publish("acme/ink", "1.0.0")
    team.write('[adapters]\nink = "acme/ink"\n')
    assert [each.code for each in lorahub.lock().findings] == ["base-unnamed"]
    assert "verdict" not in entries(team)["ink"]


def test_a_verdict_is_asked_again_only_where_the_base_or_the_adapter_is_another(
    locked: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr("lorahub.merging.checking.check", never)
    locked.write(locked.manifest.read_text().replace("own =", "mine ="))
    with pytest.raises(AssertionError, match="checked again"):
        lorahub.lock()
    locked.write(locked.manifest.read_text().replace('mine = "./own"\n', ""))
    assert [each.what for each in lorahub.lock().changes] == ["removed"]


# ------------------------------------------------------------------------------------------------ add and remove


def test_add_makes_a_manifest_writes_the_range_and_locks(team: Team) -> None:
    team.publish("acme/ink", "1.2.3")
    done = lorahub.add("acme/ink", base="./base")
    assert 'base = "./base"' in team.manifest.read_text()
    assert 'ink = "acme/ink@~=1.2"' in team.manifest.read_text()
    assert {each.name for each in done.changes} == {"base", "ink"}
    assert Lock.load(team.lock).adapter[0].version == "1.2.3"


def test_add_keeps_what_a_person_wrote(locked: Team) -> None:
    before = f"# ours\n{locked.manifest.read_text()}# the end\n"
    locked.write(before)
    locked.publish("acme/more", None, seed=4)
    lorahub.add("more=acme/more:0.25")
    after = locked.manifest.read_text()
    assert [line for line in after.splitlines() if line not in before.splitlines()] == [
        'more = { ref = "acme/more", weight = 0.25 }'  # no version to make a range of
    ]
    assert [line for line in before.splitlines() if line not in after.splitlines()] == []
    lorahub.remove("more")
    assert locked.manifest.read_text() == before


def test_add_of_what_is_there_takes_the_new_reference_and_names_others_apart(locked: Team) -> None:
    locked.publish("acme/ink", "2.0.0", seed=4)
    locked.publish("bob/ink", "1.0.0", seed=5)
    lorahub.add("acme/ink@2")
    lorahub.add("bob/ink")
    text = locked.manifest.read_text()
    assert 'ink = "acme/ink@2"' in text
    assert 'ink-2 = "bob/ink@~=1.0"' in text


def test_what_is_refused_changes_neither_file(locked: Team) -> None:
    locked.publish("acme/wild", "1.0.0", recorded=False)
    before = locked.manifest.read_bytes(), locked.lock.read_bytes()
    with pytest.raises(Degraded, match="wild is unverified"):
        lorahub.add("acme/wild")
    with pytest.raises(NotFound):
        lorahub.add("acme/nothing")
    with pytest.raises(UsageError, match="is no name"):
        lorahub.add("acme/ink", name="my ink")
    assert (locked.manifest.read_bytes(), locked.lock.read_bytes()) == before


def test_a_path_is_written_from_the_manifest_on(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.adapter(locked.folder / "deep" / "mine", seed=6)
    monkeypatch.chdir(locked.folder / "deep")
    lorahub.add("./mine", (locked.folder / "deep" / "mine").as_posix() + ":0.5")
    assert 'mine = { ref = "./deep/mine", weight = 0.5 }' in locked.manifest.read_text()


def test_add_without_locking_asks_nobody(team: Team) -> None:
    lorahub.add("acme/ink", no_lock=True)
    assert 'ink = "acme/ink"' in team.manifest.read_text()
    assert not team.lock.exists()


def test_remove_of_what_a_composition_needs_names_it(locked: Team) -> None:
    locked.write(f'{locked.manifest.read_text()}[compositions.mix]\nadapters = ["ink", "sql"]\n')
    with pytest.raises(ManifestError, match="ink goes into mix"):
        lorahub.remove("ink")
    with pytest.raises(UsageError, match="Did you mean 'own'"):
        lorahub.remove("ownn")


def test_links_to_manifest_and_lock_stay_links(locked: Team, tmp_path: Path) -> None:
    for path in (locked.manifest, locked.lock):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    lorahub.remove("own")
    assert locked.manifest.is_symlink()
    assert locked.lock.is_symlink()
    assert {each.name for each in Lock.load(tmp_path / "lorahub.lock").adapter} == {"ink", "sql"}


def test_a_manifest_that_another_changes_meanwhile_is_not_overwritten(
    locked: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_args: object, **_kwargs: object) -> list[object]:
        locked.write(f"{locked.manifest.read_text()}# theirs\n")
        return []

    monkeypatch.setattr("lorahub.manifest.resolving.offences", meanwhile)
    with pytest.raises(WriteFailed, match="was changed by another meanwhile"):
        lorahub.remove("own")
    assert locked.manifest.read_text().endswith('own = "./own"\n# theirs\n')


def test_a_lock_that_only_follows_its_manifest_is_written_and_says_so(locked: Team) -> None:
    locked.write(locked.manifest.read_text().replace("~=1.2", ">=1.2"))
    before = locked.lock.read_bytes()
    found = lorahub.lock()
    assert (found.changes, found.written, locked.lock.read_bytes() != before) == ((), True, True)
    assert not lorahub.lock().written
