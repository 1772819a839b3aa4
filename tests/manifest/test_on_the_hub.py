"""Manifests over the real client: requests counted, tags moved, commits gone, names changed, tokens kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.double import TOKEN, Double, Status
from manifest.team import Run, Team

import lorahub
from lorahub.errors import AccessDenied, Degraded, NotFound, Offline
from lorahub.manifest.lockfile import Lock


@pytest.fixture
def served(team: Team, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """The project with one adapter of a Hub in its manifest, and its base a repository there."""
    monkeypatch.setenv("LORAHUB_HUB", double.endpoint)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = team.adapter(tmp_path / "made", seed=1)
    double.repo("acme/ink").commit(files_of(made), "v1.2.0")
    double.repo("acme/base").commit(files_of(team.base))
    team.write('[adapters]\nink = "acme/ink@~=1.2"\n')
    return team


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def newer(served: Team, double: Double, seed: int, tag: str = "") -> str:
    return double.repo("acme/ink").commit(files_of(served.adapter(served.hub.parent / f"made-{seed}", seed=seed)), tag)


def states(name: str = "ink") -> tuple[str, ...]:
    (row,) = [each for each in lorahub.outdated().rows if each.name == name]
    return row.states


# ----------------------------------------------------------------------------------------------- locking, installing


def test_locking_learns_every_sha256_and_downloads_no_weights(served: Team, double: Double) -> None:
    lorahub.lock()
    (ink,) = Lock.load(served.lock).adapter
    assert {each.path for each in ink.file} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorahub.json",
    }
    assert double.bytes_of("adapter_model.safetensors") == 0
    assert ink.license == "apache-2.0"
    assert lorahub.verify().files  # of the lock alone
    double.log.clear()
    lorahub.lock()
    lorahub.lock(check=True)
    assert double.log == []


def test_a_lock_of_another_machine_installs_without_resolving(
    served: Team, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.lock()
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "another"))
    double.log.clear()
    lorahub.sync(locked=True)
    assert [each.path for each in double.log if "/api/" in each.path] == []
    assert lorahub.verify().ok


def test_what_is_pinned_and_cached_asks_nobody(served: Team, double: Double) -> None:
    lorahub.sync()
    shutil.rmtree(served.folder / "adapters")
    double.log.clear()
    assert lorahub.sync(frozen=True).done == {"ink": "installed"}
    assert lorahub.sync(local_files_only=True).done == {"ink": "kept"}
    assert double.log == []


def test_offline_without_a_cache_is_said(served: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lorahub.lock()
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(Offline):
        lorahub.sync(local_files_only=True)
    assert not (served.folder / "adapters" / "ink").exists()


def test_a_tag_that_moved_behind_the_lock_is_not_followed(served: Team, double: Double) -> None:
    lorahub.sync()
    before = served.lock.read_bytes()
    double.repo("acme/ink").tags["v1.2.0"] = newer(served, double, 2)
    shutil.rmtree(served.folder / "adapters")
    lorahub.sync()
    assert served.lock.read_bytes() == before
    assert lorahub.verify().ok
    assert states()[0] == "tag-moved"
    with pytest.raises(Degraded, match=r"v1\.2\.0") as refused:
        lorahub.lock(upgrade=True)
    assert "tag-moved" in {each.code for each in refused.value.findings}
    assert served.lock.read_bytes() == before


def test_a_commit_that_is_gone_is_installed_from_the_cache_alone(
    served: Team, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.sync()
    commit = Lock.load(served.lock).adapter[0].commit
    repo = double.repo("acme/ink")
    repo.tags["v1.2.0"] = newer(served, double, 2)
    repo.forget(commit)
    shutil.rmtree(served.folder / "adapters")
    assert lorahub.sync().done == {"ink": "installed"}
    double.log.clear()
    assert {"commit-gone", "tag-moved"} <= set(states())
    assert len(double.log) == 3
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "empty"))
    shutil.rmtree(served.folder / "adapters")
    with pytest.raises(NotFound, match="ink is locked at commit") as refused:
        lorahub.sync()
    assert "commit-gone" in {each.code for each in refused.value.findings}
    assert refused.value.hint == "to lock what there is now: lorahub lock --upgrade ink"


def test_the_base_of_a_hub_is_locked_by_its_commit_and_weights_unread(served: Team, double: Double) -> None:
    served.write(f'base = "acme/base@main"\n{served.manifest.read_text()}')
    double.log.clear()
    lorahub.lock()
    weights = {len(served.base.joinpath("model.safetensors").read_bytes())}
    assert double.bytes_of("model.safetensors") < min(weights)
    lock = Lock.load(served.lock)
    assert lock.base is not None
    assert lock.base.commit == double.repo("acme/base").branches["main"]
    assert str(lock.adapter[0].verdict) == "exact"
    assert [each.states for each in lorahub.outdated().rows] == [("current",), ("current",)]
    double.repo("acme/base").edit({"README.md": b"new"})
    assert states("base") == ("newer-in-range",)
    double.log.clear()
    lorahub.lock()
    assert double.log == []


def test_a_composition_is_made_of_what_is_cached_and_asks_nobody(served: Team, double: Double) -> None:
    served.write(f'{served.manifest.read_text()}[compositions.mix]\nadapters = ["ink"]\nweights = [0.5]\n')
    lorahub.sync()
    shutil.rmtree(served.folder / "adapters")
    double.log.clear()
    assert lorahub.sync(locked=True, local_files_only=True).done == {"ink": "installed", "mix": "installed"}
    assert double.log == []


# ----------------------------------------------------------------------------------------------------- outdated


def test_what_is_current_takes_two_requests(served: Team, double: Double) -> None:
    lorahub.lock()
    double.log.clear()
    assert states() == ("current",)
    assert len(double.log) == 2


def test_newer_versions_are_told_apart_by_the_range(served: Team, double: Double) -> None:
    lorahub.lock()
    newer(served, double, 2, "v1.3.0")
    newer(served, double, 3, "v2.0.0")
    newer(served, double, 4, "v3.0.0rc1")
    (row,) = lorahub.outdated().rows
    assert (row.states, row.newest) == (("newer-in-range", "newer-outside"), "v1.3.0")
    assert any("v2.0.0" in note for note in row.notes)
    lorahub.lock(upgrade=True)
    assert states() == ("newer-outside",)


def test_a_branch_that_went_on_is_newer_in_range(served: Team, double: Double) -> None:
    served.write('[adapters]\nink = "acme/ink@main"\n')
    lorahub.lock()
    assert states() == ("current",)
    newer(served, double, 2)
    assert states() == ("newer-in-range",)


def test_a_tag_with_a_slash_is_a_tag(served: Team, double: Double) -> None:
    repo = double.repo("acme/ink")
    repo.tags["release/one"] = repo.tags["v1.2.0"]
    served.write('[adapters]\nink = "acme/ink@release%2Fone"\n')
    lorahub.lock()
    assert Lock.load(served.lock).adapter[0].resolved == "release/one"
    assert states() == ("current",)
    repo.tags["release/one"] = newer(served, double, 2)
    assert states() == ("tag-moved",)


def test_a_new_name_is_told(served: Team, double: Double) -> None:
    lorahub.lock()
    double.repo("acme/ink").rename("acme/sumi")
    (row,) = lorahub.outdated().rows
    assert row.states == ("renamed",)
    assert "acme/sumi" in row.notes[0]


def test_a_private_and_a_gone_repository_are_not_told_apart(
    served: Team, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.lock()
    monkeypatch.delenv("HF_TOKEN")
    double.repo("acme/ink").private = True
    assert states() == ("private-or-gone",)


def test_a_gate_is_told_and_keeps_files_back(
    served: Team, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.lock()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "empty"))
    double.repo("acme/ink").gate()
    assert states() == ("gated",)
    with pytest.raises(AccessDenied):
        lorahub.sync()


def test_a_disabled_repository_is_told(served: Team, double: Double) -> None:
    lorahub.lock()
    double.repo("acme/ink").disable()
    assert "disabled" in states()


def test_a_chain_of_successors_is_followed_and_a_circle_left(served: Team, double: Double) -> None:
    def succeed(name: str, by: str) -> None:
        double.repo(name).edit({"README.md": f"---\nnew_version: {by}\n---\n".encode()})

    double.repo("acme/sumi").commit(files_of(served.base))
    double.repo("acme/kuro").commit(files_of(served.base))
    lorahub.lock()
    succeed("acme/ink", "acme/sumi")
    succeed("acme/sumi", "acme/kuro")
    (row,) = lorahub.outdated().rows
    assert row.states[0] == "superseded"
    assert "acme/sumi -> acme/kuro" in row.notes[0]
    succeed("acme/kuro", "acme/ink")
    double.log.clear()
    (row,) = lorahub.outdated().rows
    assert "in a circle" in row.notes[0]
    assert len(double.log) < 10


def test_where_nothing_can_be_asked_everything_is_unknown(
    served: Team, double: Double, run: Callable[..., Run]
) -> None:
    lorahub.lock()
    double.fault(Status(500), "/api/", times=None)
    found = lorahub.outdated()
    assert [each.states for each in found.rows] == [("unknown",)]
    assert not found.checked
    assert run("outdated", "--offline").code == 6


def test_a_token_is_in_no_lock_and_no_output(served: Team, double: Double, run: Callable[..., Run]) -> None:
    double.repo("acme/ink").private = True
    runs = [run("sync"), run("outdated", "--json"), run("verify", "--json"), run("lock", "--upgrade", "--json")]
    assert [each.code for each in runs] == [0, 0, 0, 0]
    written = [path.read_bytes() for path in served.folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in [*written, *(f"{each.out}{each.err}".encode() for each in runs)])
    assert double.endpoint.encode() not in served.lock.read_bytes()


def test_a_machine_that_never_saw_the_version_knows_it_from_the_lock(
    served: Team, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.sync()
    before = served.lock.read_bytes()
    commit = Lock.load(served.lock).adapter[0].commit
    double.repo("acme/ink").tags["v1.2.0"] = newer(served, double, 2)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "of another machine"))
    with pytest.raises(Degraded, match=f"v1.2.0 of acme/ink was commit {commit[:12]} when it was locked"):
        lorahub.lock(upgrade=True)
    assert served.lock.read_bytes() == before
