"""Lost replies, failing servers and commits of others while publishing: what is published is published exactly once.

What the double holds afterwards is counted, not what was asked of it.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hub.double import Do, DropAfter, DropBefore, Edit, Status

from lorahub.errors import LorahubError, Offline, PushRefused, Unavailable
from lorahub.names import Ref

INK = Ref(repo="acme/ink")
GOOD = b'{"ours": true}'


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The pauses that were made, none of them waited for: ours, and the client's own."""
    made: list[float] = []
    clock = SimpleNamespace(sleep=made.append, monotonic=time.monotonic, time=time.time, perf_counter=time.perf_counter)
    monkeypatch.setattr("lorahub.hub.huggingface.place.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return made


@pytest.fixture
def repo(double, hub, make_adapter):
    """acme/ink at v1.0.0, and an empty log."""
    hub.push(make_adapter(), INK, version="1.0.0")
    double.log.clear()
    return double.repo("acme/ink")


def assert_published_once(repo, pin, before: int) -> None:
    """One commit more than before, with what was pushed, and one tag at it."""
    assert len(repo.history()) == before + 1
    assert repo.history()[0].oid == repo.branches["main"] == repo.tags["v1.1.0"] == pin.commit
    assert b'"seed": 1' in repo.files()["adapter_config.json"]


# --------------------------------------------------------------------------------------------- replies that are lost

FAULTS = {"lost after": DropAfter(), "lost before": DropBefore(), "503": Status(503)}
STEPS = ("/preupload/", "/objects/batch", "/upload/", "/objects/verify", "/validate-yaml", "/commit/", "/tag/")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_is_made_good(double, hub, repo, make_adapter, step, fault):
    before = len(repo.history())
    planned = double.fault(FAULTS[fault], step, method="POST PUT")
    pin = hub.push(make_adapter(seed=1, files={"README.md": b"# Another"}), INK, version="1.1.0")
    assert planned.hits == 1
    assert_published_once(repo, pin, before)


@pytest.mark.parametrize("step", ["/commit/", "/tag/"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_again_and_again_is_made_good(double, hub, repo, make_adapter, step, fault):
    before = len(repo.history())
    double.fault(FAULTS[fault], step, method="POST", times=3)
    assert_published_once(repo, hub.push(make_adapter(seed=1), INK, version="1.1.0"), before)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_creation_of_a_repository_is_made_good(double, hub, make_adapter, fault):
    double.fault(FAULTS[fault], "/repos/create")
    pin = hub.push(make_adapter(), INK, version="1.0.0")
    assert len(double.repo("acme/ink").history()) == 2  # the hub's own, and ours
    assert double.repo("acme/ink").tags == {"v1.0.0": pin.commit}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_creation_of_a_branch_is_made_good(double, hub, repo, make_adapter, fault):
    double.fault(FAULTS[fault], "/branch/")
    pin = hub.push(make_adapter(seed=1), Ref.parse("acme/ink@dev"))
    assert repo.branches["dev"] == pin.commit
    assert len(repo.history("dev")) == len(repo.history("main")) + 1


@pytest.mark.parametrize("part", ["/refs", "/revision/", "/commits/", "/whoami"])
def test_reads_are_asked_again(double, hub, repo, make_adapter, part):
    before = len(repo.history())
    double.fault(Status(503), part, times=2)
    assert_published_once(repo, hub.push(make_adapter(seed=1), INK, version="1.1.0"), before)


def test_a_lost_reply_and_a_failing_read_after_it_are_made_good_by_the_next_push(double, hub, repo, make_adapter):
    before = len(repo.history())
    double.fault(DropAfter(), "/commit/")
    double.fault(Status(500), "/refs", times=None, after=1)
    with pytest.raises(Unavailable):
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    double.faults.clear()
    pin = hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert_published_once(repo, pin, before)


def test_a_commit_that_never_goes_through_says_so_and_leaves_nothing(double, hub, repo, make_adapter, no_pauses):
    held = repo.files()
    fault = double.fault(Status(503), "/commit/", method="POST", times=None)
    with pytest.raises(Unavailable):
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert (repo.files(), set(repo.tags)) == (held, {"v1.0.0"})
    assert fault.hits == 4
    assert [pause for pause in no_pauses if pause >= 1] == [1.0, 3.0, 9.0]


def test_a_hub_that_asks_to_wait_is_waited_for(double, hub, repo, make_adapter, no_pauses):
    double.fault(Status(429, {"Retry-After": "7"}), "/commit/", method="POST")
    hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert 7 in no_pauses


def test_a_hub_that_asks_for_an_hour_is_not_waited_for(double, hub, repo, make_adapter, no_pauses):
    double.fault(Status(429, {"Retry-After": "3600"}), "/commit/", method="POST", times=None)
    with pytest.raises(Unavailable, match="3,600 seconds"):
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert 3600 not in no_pauses


def test_a_tag_that_never_goes_through_leaves_a_commit_that_the_next_push_only_tags(double, hub, repo, make_adapter):
    double.fault(Status(503), "/tag/", times=None)
    with pytest.raises(Unavailable, match=r"is published, but not tagged v1\.1\.0") as caught:
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert "only tags" in caught.value.hint
    double.faults.clear()
    double.log.clear()
    pin = hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert repo.tags["v1.1.0"] == pin.commit == repo.branches["main"]
    assert not double.seen("/commit/", method="POST")


def test_a_hub_that_is_not_there_is_said_to_be_so(double, hub, make_adapter):
    folder = make_adapter()
    double.close()
    with pytest.raises(Offline):
        hub.push(folder, INK)


# --------------------------------------------------------------------------------------------- commits of others


def test_a_commit_that_came_first_is_named_and_nothing_is_published(double, hub, repo, make_adapter):
    double.fault(Do(lambda: repo.edit({"NOTICE": b"theirs"}, message="Mine first")), "/commit/", method="POST")
    with pytest.raises(PushRefused, match=r"changed meanwhile, so nothing was published") as caught:
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    theirs = repo.history()[0]
    assert theirs.oid[:12] in caught.value.message
    assert "'Mine first'" in caught.value.message
    assert "alice" in caught.value.message
    assert str(theirs.date.year) in caught.value.message
    assert set(repo.tags) == {"v1.0.0"}
    assert b'"seed": 0' in repo.files()["adapter_config.json"]
    assert hub.push(make_adapter(seed=1), INK, version="1.1.0").commit == repo.history()[0].oid
    assert repo.history()[1].oid == theirs.oid


def test_the_words_of_a_foreign_commit_cannot_drive_the_terminal(double, hub, repo, make_adapter):
    double.fault(Do(lambda: repo.edit({"NOTICE": b"x"}, message="\x1b]0;owned\x07")), "/commit/", method="POST")
    with pytest.raises(PushRefused) as caught:
        hub.push(make_adapter(seed=1), INK)
    assert "\x1b" not in caught.value.message


def test_the_same_content_from_somebody_else_is_success(double, hub, repo, make_adapter):
    folder = make_adapter(seed=1)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    double.fault(Do(lambda: repo.edit(files, message="The same")), "/commit/", method="POST")
    pin = hub.push(folder, INK, version="1.1.0")
    assert repo.tags["v1.1.0"] == pin.commit == repo.history()[0].oid
    assert repo.history()[0].title == "The same"


def test_our_commit_is_found_under_one_that_came_after_it(double, hub, repo, make_adapter):
    def lost(asked, answer):
        answer()
        repo.edit({"NOTICE": b"theirs"}, message="Later")
        return DropBefore()(asked, answer)

    double.fault(lost, "/commit/", method="POST")
    pin = hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert [each.title for each in repo.history()[:2]] == ["Later", "Publish 1.1.0 with lorahub"]
    assert repo.tags["v1.1.0"] == pin.commit == repo.history()[1].oid


def without_parent(asked, answer):
    """A hub that does not look at what a commit builds on."""
    object.__setattr__(asked, "body", asked.body.replace(b'"parentCommit"', b'"whatever"'))
    return answer()


@pytest.mark.parametrize("reply", ["comes", "is lost"])
def test_a_hub_that_ignores_the_parent_is_found_out_and_nothing_is_tagged(double, hub, repo, make_adapter, reply):
    if reply == "is lost":
        double.fault(DropAfter(), "/commit/", method="POST")
    double.fault(Do(lambda: repo.edit({"NOTICE": b"theirs"}, message="Between")), "/commit/", method="POST")
    double.fault(without_parent, "/commit/", method="POST")
    with pytest.raises(PushRefused, match=r"on top of one that came meanwhile: .*'Between'.*v1\.1\.0 was not tagged"):
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert set(repo.tags) == {"v1.0.0"}


def test_a_version_that_somebody_else_makes_meanwhile_is_not_taken_from_them(double, hub, repo, make_adapter):
    old = repo.branches["main"]
    double.fault(Do(lambda: repo.tags.update({"v1.1.0": old})), "/tag/", method="POST")
    with pytest.raises(PushRefused, match=r"v1\.1\.0 of acme/ink was made at commit"):
        hub.push(make_adapter(seed=1), INK, version="1.1.0")
    assert repo.tags["v1.1.0"] == old


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["DELETE", "POST"])
def test_a_tag_that_is_moved_ends_where_it_should(double, hub, repo, make_adapter, fault, method):
    double.fault(FAULTS[fault], "/tag/", method=method)
    pin = hub.push(make_adapter(seed=1), INK, version="1.0.0", move_tag=True)
    assert repo.tags == {"v1.0.0": pin.commit}
    assert repo.branches["main"] == pin.commit


# ------------------------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pull_request_is_opened_once(double, hub, repo, make_adapter, fault):
    double.fault(FAULTS[fault], "/commit/", method="POST")
    pin = hub.push(make_adapter(seed=1), INK, create_pr=True)
    assert repo.pulls == {1: pin.commit}


# ----------------------------------------------------------------------------------------------- strange answers


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.update(commitOid="../../x"),
        lambda answer: answer.clear(),
        lambda answer: "nothing",
    ],
)
def test_an_answer_that_names_no_commit_is_not_believed(double, hub, repo, make_adapter, change):
    before = len(repo.history())
    double.fault(Edit(change), "/commit/", method="POST")
    assert_published_once(repo, hub.push(make_adapter(seed=1), INK, version="1.1.0"), before)


def test_a_page_in_place_of_an_answer_is_one_of_our_errors(double, hub, make_adapter):
    double.fault(Status(200, {"Content-Type": "text/html"}, b"<html>log in</html>"), times=None)
    with pytest.raises(LorahubError):
        hub.push(make_adapter(), INK)


@pytest.mark.parametrize("size", [5000, 17 << 20])
def test_a_hub_without_xet_gets_plain_uploads(double, hub, make_adapter, monkeypatch, size):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    hub.push(make_adapter(files={"adapter_model.safetensors": data}), INK, version="1.0.0")
    assert double.seen("/xet-write-token/")
    assert double.repo("acme/ink").files()["adapter_model.safetensors"] == data
    assert len(double.repo("acme/ink").history()) == 2
