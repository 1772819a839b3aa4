"""What a Hub lets on while an adapter is resolved or pulled: moved versions, new names, successors, what is gone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

import pytest
from hub.double import TOKEN, Edit, card

import lorahub
from lorahub.cli.main import main
from lorahub.errors import AccessDenied, Degraded, DigestMismatch, NotFound, Offline, UsageError, WriteFailed
from lorahub.fetching import pull, resolve
from lorahub.findings import Verdict
from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.folder import FolderHub
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

INK = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(251)) * 400,
    "README.md": b"# Ink\n",
}


@pytest.fixture
def repo(double, cache, monkeypatch):
    """acme/ink at v1.0.0 and v1.2.0, and a user whose hub and cache are those of the test."""
    monkeypatch.setenv("LORAHUB_HUB", double.endpoint)
    monkeypatch.setenv("LORAHUB_CACHE", str(cache.root))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo = double.repo("acme/ink")
    repo.commit(INK | {"README.md": b"first"}, "v1.0.0")
    repo.commit(INK, "v1.2.0")
    return repo


@pytest.fixture
def run(capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def codes(found) -> list[str]:
    return [finding.code for finding in found]


# ---------------------------------------------------------------------------------------------- moved versions


def test_a_moved_version_is_refused_each_time_until_it_is_allowed(double, repo):
    old = pull("acme/ink@1.2").pin.commit
    new = repo.commit(INK | {"README.md": b"behind your back"}, "v1.2.0")
    for _ in range(2):
        with pytest.raises(Degraded) as caught:
            pull("acme/ink@1.2")
        assert codes(caught.value.findings) == ["tag-moved"]
        assert caught.value.exit_code == 3
        assert old[:12] in str(caught.value)
        assert new[:12] in str(caught.value)
    allowed = pull("acme/ink@1.2", allow=["tag-moved"])
    assert (allowed.pin.commit, codes(allowed.findings)) == (new, ["tag-moved"])
    again = pull("acme/ink@1.2")
    assert (again.pin.commit, again.findings) == (new, ())


def test_nothing_of_a_moved_version_is_fetched_before_it_is_allowed(double, repo):
    pull("acme/ink@1.2")
    repo.commit(INK | {"adapter_model.safetensors": b"w" * 9000}, "v1.2.0")
    double.log.clear()
    with pytest.raises(Degraded):
        pull("acme/ink@1.2")
    assert double.seen("/resolve/") == []


def test_a_version_that_was_only_listed_here_is_known_too(repo):
    pull("acme/ink@1.0.0")
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    with pytest.raises(Degraded, match="tag-moved"):
        pull("acme/ink@1.2")


def test_a_version_that_was_deleted_and_made_anew_is_still_known(repo):
    pull("acme/ink@1.2")
    del repo.tags["v1.2.0"]
    assert pull("acme/ink").pin.tag == "v1.0.0"
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    with pytest.raises(Degraded, match="tag-moved"):
        pull("acme/ink")


def test_of_versions_that_several_learn_of_at_once_none_is_forgotten(cache, monkeypatch):
    """Each reads what is known, and only then may another: without that, the last to write forgets the others'."""
    between = Barrier(2)

    def slowly(self, hub, repo):
        known = refs(self, hub, repo)
        with suppress(BrokenBarrierError):  # where nobody else may read now, nobody comes
            between.wait(0.2)
        return known

    refs = Cache.refs
    monkeypatch.setattr(Cache, "refs", slowly)
    learners = [
        Thread(target=Cache(cache.root).trust, args=("hub", "acme/ink", tag, commit * 40))
        for tag, commit in (("v1", "a"), ("v2", "b"))
    ]
    for learner in learners:
        learner.start()
    for learner in learners:
        learner.join()
    monkeypatch.undo()
    assert cache.refs("hub", "acme/ink").known == {"v1": "a" * 40, "v2": "b" * 40}


def test_branches_and_tags_that_are_no_versions_may_move(repo):
    repo.tags["stable"] = repo.tags["v1.0.0"]
    pull("acme/ink@stable")
    pull("acme/ink@main")
    repo.tags["stable"] = repo.commit(INK | {"README.md": b"later"})
    assert pull("acme/ink@stable").findings == pull("acme/ink@main").findings == ()


def test_the_commit_behind_a_moved_version_can_be_had_as_the_remedy_says(repo):
    old = pull("acme/ink@1.2").pin.commit
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    with pytest.raises(Degraded) as caught:
        pull("acme/ink@1.2")
    (finding,) = caught.value.findings
    assert finding.allowable
    assert f"lorahub pull acme/ink@{old}" in finding.remedy
    assert pull(f"acme/ink@{old}").pin.commit == old


def test_offline_a_version_is_what_was_accepted_here(repo, offline):
    old = pull("acme/ink@1.2").pin.commit
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    with pytest.raises(Degraded):
        pull("acme/ink@1.2")
    assert offline.resolve(Ref.parse("acme/ink@1.2")).commit == old


def test_loading_refuses_a_moved_version_as_pulling_does(repo):
    pull("acme/ink@1.2")
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    with pytest.raises(Degraded, match=r"lorahub pull acme/ink@1\.2 --allow tag-moved"):
        lorahub.load("acme/ink@1.2")


def test_the_command_line_refuses_a_moved_version_with_exit_code_3_and_the_way_on(repo, run):
    code, out, _ = run("pull", "acme/ink@1.2", "-q")
    assert (code, Path(out.strip()).name) == (0, "ink")
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    code, out, err = run("pull", "acme/ink@1.2")
    assert (code, out) == (3, "")
    assert "tag-moved" in err
    assert "--allow tag-moved" in err
    code, out, _ = run("pull", "acme/ink@1.2", "--json")
    assert code == 3
    assert json.loads(out)["error"]["findings"][0]["code"] == "tag-moved"
    code, out, err = run("pull", "acme/ink@1.2", "--allow", "tag-moved")
    assert code == 0
    assert "allowed: tag-moved" in err
    assert (Path(out.strip()) / "README.md").read_bytes() == b"moved"
    assert run("pull", "acme/ink@1.2")[0] == 0


def test_a_cache_of_an_earlier_release_knows_its_versions(repo, hub, cache):
    old = pull("acme/ink@1.2").pin.commit
    (place,) = cache.root.rglob("refs.json")
    data = json.loads(place.read_bytes())
    place.write_text(json.dumps({name: data[name] for name in ("tags", "branches")}))
    assert pull("acme/ink@1.2").pin.commit == old


# ------------------------------------------------------------------------------------ new names and successors


def test_a_renamed_repository_is_pulled_with_a_note_of_its_new_name(double, repo, run):
    repo.rename("acme/sumi")
    pulled = pull("acme/ink@1.2")
    (finding,) = pulled.findings
    assert (finding.code, finding.level) == ("repo-renamed", Verdict.EXACT)
    assert "acme/sumi@1.2" in finding.remedy
    assert codes(pull("acme/ink@1.2").findings) == ["repo-renamed"]  # also where the files are in the cache
    code, out, _ = run("pull", "acme/ink@1.2", "--json")
    assert code == 0
    assert json.loads(out)["findings"][0]["code"] == "repo-renamed"
    assert "note: repo-renamed" in run("pull", "acme/ink@1.2")[2]


def test_a_name_that_no_repository_can_have_is_not_repeated(double, repo):
    double.fault(Edit(lambda info: info.update(id="../../\x1b[31mevil")), "/revision/")
    assert pull("acme/ink@1.2").findings == ()


def test_a_card_that_names_a_successor_is_noted_in_two_requests(double, repo):
    repo.edit({"README.md": card(new_version="acme/sumi")}, "v1.3.0")
    double.log.clear()
    (finding,) = resolve("acme/ink").said
    assert finding.code == "superseded"
    assert "acme/sumi" in finding.message
    assert len(double.log) == 2


@pytest.mark.parametrize("says", ["../../x", "acme/ink", "", "\x1b[31m/x"])
def test_a_successor_that_is_none_is_not_spoken_of(double, repo, says):
    double.fault(Edit(lambda info: info.update(cardData={"new_version": says})), "/revision/")
    assert resolve("acme/ink").said == ()


# ---------------------------------------------------------------------------------------------------- standing


def test_standing_is_told_in_two_requests(double, repo, hub):
    repo.edit({"README.md": card(new_version="acme/sumi", license="apache-2.0")})
    repo.gate()
    repo.private = True
    double.log.clear()
    found = hub.standing("acme/ink")
    assert (found.tags, found.branches) == (repo.tags, repo.branches)
    assert (found.private, found.gated, found.disabled) == (True, True, False)
    assert (found.repo, found.successor, found.license) == ("acme/ink", "acme/sumi", "apache-2.0")
    assert len(double.log) == 2


def test_standing_tells_of_a_new_name(repo, hub):
    repo.rename("acme/sumi")
    assert hub.standing("acme/ink").repo == "acme/sumi"


def test_standing_refreshes_what_is_known_offline(repo, hub, offline):
    pull("acme/ink@1.2")
    repo.tags["v1.3.0"] = repo.tags["v1.2.0"]
    hub.standing("acme/ink")
    assert offline.resolve(Ref.parse("acme/ink@1.3.0")).commit == repo.tags["v1.3.0"]
    with pytest.raises(Offline):
        offline.standing("acme/ink")


def test_versions_are_listed_newest_first_with_what_there_is_to_say(double, repo, run):
    repo.edit({"README.md": card(new_version="acme/sumi")})
    code, out, err = run("versions", "acme/ink")
    assert code == 0
    assert out.index("1.2.0") < out.index("1.0.0")
    assert repo.tags["v1.2.0"] in out
    assert "superseded" in err
    assert run("versions", "acme/ink", "-q")[1].split() == ["1.2.0", "1.0.0"]
    document = json.loads(run("versions", "acme/ink", "--json")[1])
    assert document["versions"][0] == {"version": "1.2.0", "tag": "v1.2.0", "commit": repo.tags["v1.2.0"]}
    assert [each["code"] for each in document["findings"]] == ["superseded"]
    assert run("versions", "./ink")[0] == 2


# ------------------------------------------------------------------------------------------------- what is gone


def test_a_commit_that_is_gone_is_its_own_finding_with_a_remedy(double, repo, run):
    commit = repo.tags["v1.0.0"]
    repo.squash()
    repo.forget(commit)
    with pytest.raises(NotFound) as caught:
        pull(f"acme/ink@{commit}")
    assert codes(caught.value.findings) == ["commit-gone"]
    assert caught.value.exit_code == 6
    assert caught.value.hint == "lorahub versions acme/ink"
    code, _, err = run("pull", f"acme/ink@{commit}")
    assert code == 6
    assert err.count(commit) == 1


def test_a_commit_that_goes_between_resolving_and_pulling_is_told_so(double, repo, hub):
    pin = hub.resolve(Ref.parse("acme/ink@1.0.0"))
    repo.forget(pin.commit)
    with pytest.raises(NotFound) as caught:
        hub.pull(pin)
    assert codes(caught.value.findings) == ["commit-gone"]


def test_a_commit_that_is_gone_there_and_pulled_here_is_used(repo, double):
    commit = pull("acme/ink@1.0.0").pin.commit
    repo.forget(commit)
    double.log.clear()
    assert pull(f"acme/ink@{commit}").pin.commit == commit
    assert double.log == []


@pytest.mark.parametrize(
    ("state", "code"), [("gate", "gated"), ("disable", "disabled"), ("private", "repo-missing")], ids=str
)
def test_what_may_not_be_read_has_a_code_and_the_page_to_look_at(double, repo, anonymous, state, code):
    if state == "private":
        repo.private = True
    else:
        getattr(repo, state)()
    with pytest.raises((AccessDenied, NotFound)) as caught:
        anonymous.pull(anonymous.resolve(Ref.parse("acme/ink")))
    assert codes(caught.value.findings) == [code]
    assert f"{double.endpoint}/acme/ink" in caught.value.hint
    assert ("hf auth login" in caught.value.hint) == (code != "disabled")


# ---------------------------------------------------------------------------------------------- options of pull


def test_a_dry_run_tells_files_and_sizes_and_fetches_none(double, repo, cache, run):
    code, out, _ = run("pull", "acme/ink@1.2", "--dry-run")
    assert code == 0
    assert "adapter_model.safetensors" in out
    assert double.seen("/resolve/") == []
    assert not list(cache.root.rglob("pin.json"))
    document = json.loads(run("pull", "acme/ink@1.2", "--dry-run", "--json")[1])
    assert document["bytes"] == sum(map(len, INK.values()))


def test_a_copy_is_put_where_it_is_wanted_and_is_no_link_into_the_cache(repo, run, tmp_path):
    dest = tmp_path / "deep" / "ink"
    code, out, _ = run("pull", "acme/ink@1.2", "--dest", dest, "-q")
    assert (code, out.strip()) == (0, str(dest))
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == INK
    assert all(path.stat().st_nlink == 1 for path in dest.iterdir())
    assert run("pull", "acme/ink@1.2", "--dest", dest)[0] == 0  # the same again
    (dest / "README.md").write_bytes(b"mine")
    code, _, err = run("pull", "acme/ink@1.2", "--dest", dest)
    assert code == 1
    assert "nothing there is overwritten" in err
    assert (dest / "README.md").read_bytes() == b"mine"
    assert (pull("acme/ink@1.2").folder / "README.md").read_bytes() == INK["README.md"]


def test_a_copy_that_fails_leaves_nothing(repo, tmp_path, monkeypatch):
    def torn(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr("lorahub.hub.placing.shutil.copyfile", torn)
    with pytest.raises(DigestMismatch):
        pull("acme/ink@1.2", dest=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name not in {"cache", "client-cache"}]


def test_a_copy_into_a_file_is_refused(repo, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteFailed):
        pull("acme/ink@1.2", dest=tmp_path / "file")


def test_too_little_room_is_told_with_both_numbers_before_a_byte_moves(double, repo, hub, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("lorahub.hub.cache.shutil.disk_usage", lambda _: Usage)
    pin = hub.resolve(Ref.parse("acme/ink@1.2"))
    with pytest.raises(WriteFailed, match=rf"{pin.size:,} more bytes.* 1,000 free"):
        hub.pull(pin)
    assert double.seen("/resolve/") == []


def test_what_was_fetched_already_needs_no_room_twice(double, repo, hub, monkeypatch):
    class Usage:
        free = len(INK["adapter_model.safetensors"]) // 2

    pin = hub.resolve(Ref.parse("acme/ink@1.2"))

    def stop(path: str, done: int, total: int) -> None:
        if done >= total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull(pin, progress=stop)
    monkeypatch.setattr("lorahub.hub.cache.shutil.disk_usage", lambda _: Usage)
    assert pin_of(hub.pull(pin)) is not None


def test_offline_what_was_pulled_is_found_by_the_command_line(repo, double, run):
    run("pull", "acme/ink@1.2")
    double.log.clear()
    code, out, err = run("pull", "acme/ink@1.2", "--offline")
    assert (code, Path(out.strip()).name) == (0, "ink")
    assert "from the cache" in err
    assert double.log == []
    assert run("pull", "acme/ink@1.0.0", "--offline")[0] == 6


def test_only_hub_references_are_resolved(repo, tmp_path):
    with pytest.raises(UsageError):
        resolve(str(tmp_path))


def test_a_token_given_to_pull_is_the_one_that_is_used(double, repo, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    repo.private = True
    with pytest.raises(NotFound):
        pull("acme/ink")
    assert pull("acme/ink", token=TOKEN).pin.tag == "v1.2.0"


def test_the_hub_is_told_apart_from_another_by_its_address(double, repo, cache):
    assert HuggingFaceHub(endpoint=double.endpoint, cache=cache).name == double.endpoint.removeprefix("http://")


def test_who_moves_a_version_by_pushing_is_not_refused_it_afterwards(double, repo, hub, make_adapter):
    pull("acme/ink@1.2")
    pushed = hub.push(make_adapter(seed=7), Ref.parse("acme/ink"), version="1.2.0", move_tag=True)
    pulled = pull("acme/ink@1.2")
    assert (pulled.pin.commit, pulled.findings) == (pushed.commit, ())


def test_a_version_that_is_not_there_is_told_with_those_that_are(repo):
    with pytest.raises(NotFound, match=r"versions: v1\.2\.0, v1\.0\.0") as caught:
        pull("acme/ink@3")
    assert caught.value.hint == "lorahub versions acme/ink"


def test_a_folder_hub_takes_the_same_options(tmp_path, cache, make_adapter, monkeypatch, run):
    monkeypatch.setenv("LORAHUB_CACHE", str(cache.root))
    monkeypatch.setenv("LORAHUB_HUB", str(tmp_path / "folder"))
    hub = FolderHub(tmp_path / "folder", cache=cache)
    hub.push(make_adapter(), Ref.parse("acme/ink"), version="1.0.0")
    assert run("versions", "acme/ink", "-q")[1] == "1.0.0\n"
    assert run("pull", "acme/ink", "--dry-run", "-q")[1].strip() == hub.resolve(Ref.parse("acme/ink")).commit
    code, out, _ = run("pull", "acme/ink@1", "--dest", tmp_path / "out", "-q")
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert run("search", "ink", "-q")[1] == "acme/ink\n"
