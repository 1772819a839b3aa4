"""Publishing to the Hugging Face Hub through its real client: one commit, one tag, refusals before the first write."""

from __future__ import annotations

import hashlib
import traceback

import pytest
from hub.double import NOBODY, STRANGER, TOKEN, Account, Edit, Fault, Status

from lorahub.errors import AccessDenied, IntegrityError, LorahubError, NotFound, Offline, PushRefused, UsageError
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

INK = Ref(repo="acme/ink")


def commits(double) -> int:
    """How many requests to commit came."""
    return len(double.seen("/commit/", method="POST"))


# ------------------------------------------------------------------------------------------------ what is published


def test_a_first_push_makes_the_repository_one_commit_and_one_tag(double, hub, make_adapter):
    folder = make_adapter()
    pin = hub.push(folder, INK, version="1.2.0")
    repo = double.repo("acme/ink")
    assert repo.tags == {"v1.2.0": pin.commit}
    assert repo.history()[0].oid == pin.commit
    assert commits(double) == 1
    assert set(repo.files()) == {".gitattributes", *(path.name for path in folder.iterdir())}
    assert (pin.why, pin.version, pin.branch) == ("published as v1.2.0 in a new repository", "1.2.0", "main")
    for path, file in pin.files.items():
        assert file.sha256 == hashlib.sha256((folder / path).read_bytes()).hexdigest()
    assert hub.page(pin) == f"{double.endpoint}/acme/ink/tree/v1.2.0"


def test_what_was_pushed_is_pulled_byte_for_byte(hub, make_adapter):
    folder = make_adapter(files={"tokenizer.json": b"{}", "additional_chat_templates/x.jinja": b"{{ x }}"})
    pushed = hub.push(folder, INK, version="1.2.0")
    pulled = hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    assert {path: (pulled / path).read_bytes() for path in pushed.files} == {
        path: (folder / path).read_bytes() for path in pushed.files
    }
    assert set(pushed.files) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pushing_the_same_again_writes_nothing_and_says_so(double, hub, make_adapter):
    folder = make_adapter()
    first = hub.push(folder, INK, version="1.0.0")
    double.log.clear()
    again = hub.push(folder, INK, version="1.0.0")
    assert (again.commit, again.why) == (first.commit, "already published as v1.0.0")
    assert hub.push(folder, INK).why == "already published on branch main"
    assert double.writes() == []


def test_the_same_content_under_a_new_version_is_only_a_tag(double, hub, make_adapter):
    folder = make_adapter()
    first = hub.push(folder, INK, version="1.0.0")
    assert hub.push(folder, INK, version="1.0.1").commit == first.commit
    assert double.repo("acme/ink").tags == {"v1.0.0": first.commit, "v1.0.1": first.commit}
    assert commits(double) == 1


def test_files_that_the_new_version_has_not_are_gone_and_the_hubs_own_stay(double, hub, make_adapter):
    hub.push(make_adapter("one", files={"tokenizer.json": b"{}", "LICENSE": b"mit"}), INK, version="1.0.0")
    hub.push(make_adapter("two", seed=1), INK, version="1.1.0")
    assert set(double.repo("acme/ink").files()) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "tokenizer.json" in double.repo("acme/ink").files("v1.0.0")


def test_a_readme_that_was_written_on_the_hub_stays_where_the_folder_has_none(double, hub, make_adapter):
    hub.push(make_adapter(), INK, version="1.0.0")
    double.repo("acme/ink").edit({"README.md": b"# Written there\n"})
    folder = make_adapter("other", seed=1)
    (folder / "README.md").unlink()
    pin = hub.push(folder, INK, version="1.1.0")
    assert double.repo("acme/ink").files()["README.md"] == b"# Written there\n"
    assert hub.resolve(Ref.parse("acme/ink@1.1.0")).files.keys() == pin.files.keys()


def test_a_subfolder_is_an_adapter_of_its_own(double, hub, make_adapter):
    hub.push(make_adapter("ink"), Ref.parse("acme/zoo/ink"))
    pin = hub.push(make_adapter("sql", seed=1), Ref.parse("acme/zoo/sql"), version="1.0.0")
    hub.push(make_adapter("ink", seed=2), Ref.parse("acme/zoo/ink"))
    assert pin.subfolder == "sql"
    files = double.repo("acme/zoo").files()
    assert b'"seed": 1' in files["sql/adapter_config.json"]
    assert b'"seed": 2' in files["ink/adapter_config.json"]
    assert hub.pull(hub.resolve(Ref.parse("acme/zoo@1.0.0/sql"))).name == "sql"
    assert hub.page(pin).endswith("/acme/zoo/tree/v1.0.0/sql")


def test_a_branch_is_made_from_main_and_main_stays(double, hub, make_adapter):
    first = hub.push(make_adapter(), INK)
    dev = hub.push(make_adapter(seed=1), Ref.parse("acme/ink@dev"))
    repo = double.repo("acme/ink")
    assert repo.branches == {"main": first.commit, "dev": dev.commit}
    assert repo.history("dev")[1].oid == first.commit
    assert hub.push(make_adapter(seed=1), Ref.parse("acme/ink@dev")).why == "already published on branch dev"


def test_a_version_that_exists_is_put_on_the_branch_that_is_asked_for(double, hub, make_adapter):
    folder, dev = make_adapter(), Ref.parse("acme/ink@dev")
    first = hub.push(folder, INK, version="1.0.0")
    planned = hub.push(folder, dev, version="1.0.0", dry_run=True)
    assert (planned.commit, planned.why) == (first.commit, "would be published as v1.0.0, on a new branch dev")
    assert set(double.repo("acme/ink").branches) == {"main"}
    assert hub.push(folder, dev, version="1.0.0").why == "published as v1.0.0, on a new branch dev"
    assert double.repo("acme/ink").branches == {"main": first.commit, "dev": first.commit}
    assert hub.push(folder, dev, version="1.0.0").why == "already published as v1.0.0"
    assert commits(double) == 1


def test_given_content_counts_in_place_of_the_folders(double, hub, make_adapter):
    folder = make_adapter()
    hub.push(folder, INK, given={"README.md": b"# Given\n", "lorahub.json": b"{}"})
    files = double.repo("acme/ink").files()
    assert (files["README.md"], files["lorahub.json"]) == (b"# Given\n", b"{}")
    assert (folder / "README.md").read_bytes() == b"# An adapter\n"
    assert not (folder / "lorahub.json").exists()


def test_large_files_go_in_parts(double, hub, make_adapter, monkeypatch):
    double.site.multipart_above, double.site.chunk = 1 << 20, 1 << 20
    folder = make_adapter(files={"adapter_model.safetensors": bytes(range(256)) * 10_000})
    hub.push(folder, INK, version="1.0.0")
    assert len(double.seen(where="cdn", method="PUT")) == 3
    assert double.repo("acme/ink").files()["adapter_model.safetensors"] == bytes(range(256)) * 10_000


def test_a_file_over_sixteen_megabytes_is_sent_by_path_and_compared(double, hub, make_adapter):
    data = bytes(range(256)) * 70_000
    pin = hub.push(make_adapter(files={"adapter_model.safetensors": data}), INK, version="1.0.0")
    assert double.repo("acme/ink").files()["adapter_model.safetensors"] == data
    assert pin.files["adapter_model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [5000, 17 << 20])
def test_over_xet_the_same_is_published_under_the_same_digests(xet, hub, make_adapter, size):
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    pin = hub.push(make_adapter(files={"adapter_model.safetensors": data}), INK, version="1.0.0")
    assert xet.seen("/xet-write-token/")
    assert not xet.seen(where="cdn", method="PUT")
    assert xet.repo("acme/ink").files()["adapter_model.safetensors"] == data
    assert pin.files["adapter_model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()


def test_progress_ends_with_all_bytes(hub, make_adapter):
    told: list[tuple[str, int, int]] = []
    pin = hub.push(make_adapter(), INK, progress=lambda *step: told.append(step))
    assert told[-1][1:] == (pin.size, pin.size)


# -------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("version", ["1.0.0", "v1.0.0", "1.0"])
def test_a_published_version_never_changes_and_that_is_said_before_a_byte_is_sent(double, hub, make_adapter, version):
    hub.push(make_adapter(), INK, version="1.0.0")
    double.log.clear()
    with pytest.raises(PushRefused, match=r"has v1\.0\.0 already, and it differs in adapter_config\.json") as caught:
        hub.push(make_adapter(seed=1), INK, version=version)
    assert "--move-tag" in caught.value.hint
    assert double.writes() == []
    assert not double.seen("preupload")


def test_a_tag_is_moved_only_when_that_is_asked_for(double, hub, make_adapter):
    first = hub.push(make_adapter(), INK, version="1.0.0")
    moved = hub.push(make_adapter(seed=1), INK, version="1.0.0", move_tag=True)
    repo = double.repo("acme/ink")
    assert repo.tags == {"v1.0.0": moved.commit}
    assert moved.commit != first.commit
    assert repo.history()[1].oid == first.commit
    with pytest.raises(UsageError, match="no version"):
        hub.push(make_adapter(), INK, move_tag=True)


# ------------------------------------------------------------------------------------------------------ proposals


def test_a_pull_request_is_one_commit_without_a_tag(double, hub, make_adapter):
    first = hub.push(make_adapter(), INK, version="1.0.0")
    pin = hub.push(make_adapter(seed=1), INK, version="1.1.0", create_pr=True)
    repo = double.repo("acme/ink")
    assert (repo.pulls, pin.branch) == ({1: pin.commit}, "refs/pr/1")
    assert (repo.branches["main"], set(repo.tags)) == (first.commit, {"v1.0.0"})
    assert hub.page(pin) == f"{double.endpoint}/acme/ink/discussions/1"
    again = hub.push(make_adapter(seed=1), INK, version="1.1.0", create_pr=True)
    assert (again.commit, again.why) == (pin.commit, "already proposed as refs/pr/1")
    assert len(repo.pulls) == 1


def test_a_change_can_be_proposed_to_a_repository_of_others(double, hub, stranger, make_adapter):
    hub.push(make_adapter(), INK)
    assert stranger.push(make_adapter(seed=1), INK, create_pr=True).branch == "refs/pr/1"


def test_there_must_be_something_to_propose_a_change_to(double, hub, make_adapter):
    with pytest.raises(NotFound, match="no acme/ink to propose"):
        hub.push(make_adapter(), INK, create_pr=True)
    with pytest.raises(UsageError, match="main branch"):
        hub.push(make_adapter(), Ref.parse("acme/ink@dev"), create_pr=True)
    assert double.writes() == []


def test_a_version_that_exists_with_other_content_is_not_proposed(double, hub, make_adapter):
    hub.push(make_adapter(), INK, version="1.0.0")
    double.log.clear()
    with pytest.raises(PushRefused, match=r"has v1\.0\.0 already"):
        hub.push(make_adapter(seed=1), INK, version="1.0.0", create_pr=True)
    assert double.writes() == []
    assert hub.push(make_adapter(seed=1), INK, version="1.1.0", create_pr=True).branch == "refs/pr/1"


# -------------------------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_sends_no_write_and_refuses_what_the_push_would(double, hub, make_adapter):
    planned = hub.push(make_adapter(), INK, version="1.0.0", dry_run=True)
    assert planned.why == "would be published as v1.0.0 in a new repository"
    assert set(planned.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert double.writes() == []
    hub.push(make_adapter(), INK, version="1.0.0")
    assert hub.push(make_adapter(), INK, version="1.0.0", dry_run=True).why == "already published as v1.0.0"
    double.log.clear()
    with pytest.raises(PushRefused):
        hub.push(make_adapter(seed=1), INK, version="1.0.0", dry_run=True)
    assert double.writes() == []


# -------------------------------------------------------------------------------------------------- who may, where


def test_a_private_repository_is_made_private(double, hub, make_adapter):
    pin = hub.push(make_adapter(), INK, private=True)
    assert double.repo("acme/ink").private
    assert "new private repository" in pin.why
    assert hub.push(make_adapter(seed=1), INK, private=True).commit != pin.commit


def test_a_public_repository_gets_nothing_that_was_to_be_private(double, hub, make_adapter):
    hub.push(make_adapter(), INK)
    double.log.clear()
    with pytest.raises(PushRefused, match="everybody can read it"):
        hub.push(make_adapter(seed=1), INK, private=True)
    assert double.writes() == []


def test_without_a_token_nothing_is_asked(double, anonymous, make_adapter):
    with pytest.raises(AccessDenied) as caught:
        anonymous.push(make_adapter(), INK)
    assert "hf auth login" in caught.value.hint
    assert double.log == []


def test_a_token_that_only_reads_is_told_from_one_that_writes(double, reader, make_adapter):
    with pytest.raises(AccessDenied, match="may only read"):
        reader.push(make_adapter(), INK)
    assert double.writes() == []


def test_a_token_that_nobody_has_is_refused(double, cache, make_adapter):
    with pytest.raises(AccessDenied, match="token"):
        HuggingFaceHub(api=double.api(NOBODY), cache=cache).push(make_adapter(), INK)
    assert double.writes() == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_namespace_of_others_is_named_with_those_that_are_ones_own(double, hub, stranger, make_adapter, exists):
    if exists:
        hub.push(make_adapter(), INK)
    before = commits(double)
    with pytest.raises(AccessDenied, match="mallory may not write to acme/ink: its namespaces are mallory"):
        stranger.push(make_adapter(seed=1), INK)
    assert commits(double) == before


def test_a_repository_under_a_new_name_is_not_written_under_the_old(double, hub, make_adapter):
    hub.push(make_adapter(), INK)
    double.repo("acme/ink").rename("acme/sumi")
    double.log.clear()
    with pytest.raises(PushRefused, match="is called acme/sumi now"):
        hub.push(make_adapter(seed=1), INK)
    assert double.writes() == []


def test_offline_nothing_is_published(double, offline, make_adapter):
    with pytest.raises(Offline):
        offline.push(make_adapter(), INK)
    assert double.log == []


def test_publishing_can_be_switched_off(double, hub, make_adapter, monkeypatch):
    monkeypatch.setenv("LORAHUB_DISABLE_PUSH", "1")
    with pytest.raises(PushRefused, match="LORAHUB_DISABLE_PUSH"):
        hub.push(make_adapter(), INK)
    assert double.log == []


# ------------------------------------------------------------------------------------------- what must not be sent


def test_links_secrets_and_unknown_files_are_refused_all_at_once_without_a_request(double, hub, make_adapter, tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"content")
    folder = make_adapter(files={".env": b"KEY=1", "train.py": b"pass", "LICENSE": b"hf_" + b"x" * 34})
    (folder / "leak.png").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(PushRefused) as caught:
        hub.push(folder, INK)
    assert {each.code for each in caught.value.findings} == {"secret-file", "secret-text", "unknown-file", "link"}
    assert double.log == []


def test_a_token_in_given_content_is_refused(double, hub, make_adapter):
    with pytest.raises(PushRefused, match=r"README\.md"):
        hub.push(make_adapter(), INK, given={"README.md": b"use " + TOKEN.encode()})
    assert double.log == []


def test_a_file_that_becomes_a_link_during_the_push_is_not_followed(double, hub, make_adapter, tmp_path):
    (tmp_path / "secret").write_bytes(b"do not publish")
    folder = make_adapter()

    def swap(_asked, answer):
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to(tmp_path / "secret")
        return answer()

    double.fault(swap, "/whoami")
    with pytest.raises(IntegrityError, match="changed while"):
        hub.push(folder, INK)
    assert commits(double) == 0


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_changes_during_the_push_is_not_published(double, hub, make_adapter, large):
    data = bytes(range(256)) * (70_000 if large else 10)
    folder = make_adapter(files={"adapter_model.safetensors": data})

    def change(_asked, answer):
        (folder / "adapter_model.safetensors").write_bytes(b"other" + data[5:])
        return answer()

    double.fault(change, "/whoami")
    with pytest.raises(IntegrityError, match="changed while"):
        hub.push(folder, INK, version="1.0.0")
    assert commits(double) == 0
    assert double.repo("acme/ink").tags == {}


def test_a_hub_that_lists_other_content_than_was_sent_gets_no_version(double, hub, make_adapter):
    hub.push(make_adapter(), INK)

    def spoil(info):
        for each in info["siblings"]:
            if "lfs" in each:
                each["lfs"]["sha256"] = "0" * 64

    double.fault(Edit(spoil), "/revision/", after=1)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors\. v1\.0\.0 was not tagged"):
        hub.push(make_adapter(seed=1), INK, version="1.0.0")
    assert double.repo("acme/ink").tags == {}


def test_a_card_that_the_hub_does_not_take_is_refused_before_the_weights_are_sent(double, hub, make_adapter):
    answer = b'{"errors": [{"message": "\\"license\\" must be one of: \\u001b[2J"}], "warnings": []}'
    double.fault(Status(400, body=answer), "/validate-yaml")
    with pytest.raises(PushRefused, match='"license" must be one of') as caught:
        hub.push(make_adapter(), INK)
    assert "\x1b" not in str(caught.value)
    assert not double.seen(where="cdn")


def test_full_storage_is_said_in_the_hubs_words(double, hub, make_adapter):
    def refuse(answer):
        for each in answer["objects"]:
            each.pop("actions", None)
            each["error"] = {"code": 507, "message": "storage limit reached"}

    double.fault(Edit(refuse), "/objects/batch", times=None)
    with pytest.raises(AccessDenied, match="storage limit reached"):
        hub.push(make_adapter(), INK)
    assert commits(double) == 0


@pytest.mark.parametrize(
    ("part", "status"), [("/repos/create", 402), ("/preupload/", 403), ("/commit/", 403), ("/commit/", 413)]
)
def test_no_failure_shows_the_token_or_comes_as_an_error_of_the_client(double, hub, make_adapter, part, status):
    double.fault(Status(status, {"X-Error-Message": f"no, {TOKEN}"}), part, times=None)
    with pytest.raises(LorahubError) as caught:
        hub.push(make_adapter(), INK)
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown
    assert caught.value.__cause__ is None
    assert caught.value.hint


def test_a_member_of_another_organisation_may_write_where_the_hub_says_so(double, cache, make_adapter, hub):
    hub.push(make_adapter(), INK)
    double.store.accounts[STRANGER] = Account(name="mallory", orgs=("acme",))
    fault: Fault = double.fault(Edit(lambda who: who["orgs"].clear()), "/whoami", times=None)
    guest = HuggingFaceHub(api=double.api(STRANGER), cache=cache)
    assert guest.push(make_adapter(seed=1), INK).why == "published on branch main"
    assert fault.hits == 1
