"""The double is a Hub as far as the real client can tell: its contract, through ``huggingface_hub`` itself."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from hub.double import (
    NOBODY,
    READER,
    STRANGER,
    TOKEN,
    Account,
    Action,
    Cut,
    Do,
    Double,
    DropAfter,
    DropBefore,
    Edit,
    Flip,
    Headers,
    Hold,
    Repo,
    Status,
    Swap,
    Truncate,
    card,
    git_id,
)
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

WEIGHTS = random.Random(0).randbytes(200_000)
CARD = card(base_model="acme/base", library_name="peft", license="mit", tags=["lora"], pipeline_tag="text-generation")
INK = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": WEIGHTS, "README.md": CARD}


@pytest.fixture
def api(double: Double, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """The client, which does not wait between its tries."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return double.api()


@pytest.fixture
def ink(double: Double) -> Repo:
    """acme/ink with one commit, tagged v1.0.0."""
    repo = double.repo("acme/ink")
    repo.commit(INK, "v1.0.0")
    return repo


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def got(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def status(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return int(caught.value.response.status_code)


# ------------------------------------------------------------------------------------- what goes up comes down


def test_a_folder_goes_up_in_one_commit_and_comes_down_the_same(double: Double, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("acme/ink")
    done = api.upload_folder(repo_id="acme/ink", folder_path=put(tmp_path / "ink", INK | {"deep/er/a.txt": b"a"}))
    api.create_tag("acme/ink", tag="v1.0.0")
    repo = double.repo("acme/ink")
    newest, _ = repo.history()  # the first is the Hub's own
    assert newest.oid == done.oid == repo.tags["v1.0.0"]
    listed = {each.rfilename: each for each in api.model_info("acme/ink", files_metadata=True).siblings or []}
    assert listed["adapter_model.safetensors"].lfs is not None
    assert listed["adapter_model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert listed["adapter_config.json"].blob_id == git_id(INK["adapter_config.json"])
    folder = api.snapshot_download("acme/ink", revision="v1.0.0", cache_dir=tmp_path / "cache")
    assert got(folder) == repo.files("v1.0.0")
    assert set(got(folder)) == {*INK, "deep/er/a.txt", ".gitattributes"}
    assert api.verify_repo_checksums("acme/ink", cache_dir=tmp_path / "cache").mismatches == []


def test_a_tag_stays_where_it_was_put_and_a_commit_that_is_cached_costs_nothing(
    double: Double, api: HfApi, ink: Repo, tmp_path: Path
) -> None:
    first = ink.tags["v1.0.0"]
    api.create_commit("acme/ink", [add("new.txt", b"new")], commit_message="more")
    assert api.model_info("acme/ink", revision="v1.0.0").sha == first
    assert api.model_info("acme/ink").sha == ink.branches["main"] != first
    api.snapshot_download("acme/ink", revision=first, cache_dir=tmp_path / "cache")
    double.log.clear()
    api.snapshot_download("acme/ink", revision=first, cache_dir=tmp_path / "cache")
    assert double.log == []
    api.snapshot_download("acme/ink", revision="main", cache_dir=tmp_path / "cache")
    double.log.clear()
    api.snapshot_download("acme/ink", revision="main", cache_dir=tmp_path / "cache")
    assert len(double.log) == 1


def test_the_same_content_again_makes_no_commit(double: Double, api: HfApi, ink: Repo) -> None:
    before = ink.branches["main"]
    done = api.create_commit("acme/ink", [add(path, data) for path, data in INK.items()], commit_message="again")
    assert done.oid == before
    assert double.writes() == []


def test_only_the_first_commit_on_a_parent_lands(double: Double, api: HfApi, ink: Repo) -> None:
    parent = ink.branches["main"]
    done = api.create_commit("acme/ink", [add("a.txt", b"a")], commit_message="first", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit("acme/ink", [add("b.txt", b"b")], commit_message="second", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert ink.branches["main"] == done.oid
    api.create_commit("acme/ink", [add("b.txt", b"b")], commit_message="third", parent_commit=done.oid[:10])


def test_of_many_commits_on_one_parent_at_once_one_lands(double: Double, api: HfApi, ink: Repo) -> None:
    parent = ink.branches["main"]
    landed: list[str] = []
    refused: list[int] = []

    def race(number: int) -> None:
        operations = [add(f"{number}.txt", b"x")]
        try:
            landed.append(api.create_commit("acme/ink", operations, commit_message="race", parent_commit=parent).oid)
        except HfHubHTTPError as error:
            refused.append(error.response.status_code)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert landed == [ink.branches["main"]]
    assert refused == [412] * 7
    assert len(ink.history()) == 2


def test_files_are_deleted_and_copied(api: HfApi, ink: Repo) -> None:
    ink.edit({"old/a.txt": b"a", "old/b.txt": b"b", "c.txt": b"c"})
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationDelete("old/"),
        CommitOperationDelete("c.txt"),
        CommitOperationCopy("adapter_model.safetensors", "copy.safetensors"),
    ]
    api.create_commit("acme/ink", operations, commit_message="tidy")
    assert ink.files() == INK | {"copy.safetensors": WEIGHTS}


def test_a_large_object_goes_up_in_parts(double: Double, api: HfApi, ink: Repo) -> None:
    double.site.multipart_above, double.site.chunk = 50_000, 30_000
    large = WEIGHTS[::-1]
    api.create_commit("acme/ink", [add("large.safetensors", large)], commit_message="large")
    assert ink.files()["large.safetensors"] == large
    assert [each.received for each in double.seen(where="cdn", method="PUT")] == [30_000] * 6 + [20_000]
    assert len(double.seen("complete_multipart")) == 1
    double.log.clear()
    api.create_commit("acme/ink", [add("again.safetensors", large)], commit_message="the object is there")
    assert double.seen(where="cdn") == []


def test_a_download_goes_on_where_it_broke_off(
    double: Double, api: HfApi, ink: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    double.fault(Cut(after=150_000), where="cdn")
    path = api.hf_hub_download("acme/ink", "adapter_model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert double.bytes_of(".safetensors", where="cdn") == len(WEIGHTS)
    assert [each.status for each in double.seen(where="cdn", method="GET")] == [200, 206]


def test_small_files_may_come_by_a_relative_redirect(double: Double, api: HfApi, ink: Repo, tmp_path: Path) -> None:
    double.site.resolve_cache = True
    assert got(api.snapshot_download("acme/ink", cache_dir=tmp_path)) == INK
    assert double.seen("/api/resolve-cache/models/acme/ink/", method="GET")


def test_parts_of_a_file_can_be_asked_for(double: Double, ink: Repo) -> None:
    def ask(part: str) -> tuple[int, bytes, str | None]:
        url = f"{double.endpoint}/acme/ink/resolve/main/adapter_config.json"
        with urlopen(Request(url, headers={"Range": part})) as r:
            return r.status, r.read(), r.headers["Content-Range"]

    assert ask("bytes=1-3") == (206, b'"r"', "bytes 1-3/8")
    assert ask("bytes=5-100") == (206, b" 8}"[:3], "bytes 5-7/8")
    assert ask("bytes=-2") == (206, b"8}", "bytes 6-7/8")
    with pytest.raises(OSError, match="416") as caught:
        ask("bytes=8-9")
    assert caught.value.headers["Content-Range"] == "bytes */8"  # type: ignore[attr-defined]
    caught.value.close()  # type: ignore[attr-defined]


def test_no_address_of_an_object_is_given_twice_and_none_works_unsigned(double: Double, ink: Repo, api: HfApi) -> None:
    url = f"{double.endpoint}/acme/ink/resolve/main/adapter_model.safetensors"
    from huggingface_hub import get_hf_file_metadata

    places = [get_hf_file_metadata(url, token=TOKEN).location for _ in range(2)]
    assert places[0] != places[1]
    with pytest.raises(OSError, match="403") as caught:
        urlopen(places[0].partition("?")[0])
    caught.value.close()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ what is refused


def test_the_cdn_takes_no_bytes_but_the_ones_announced(double: Double, api: HfApi, ink: Repo) -> None:
    def announce_another(answer: dict[str, Any]) -> None:
        (upload,) = double.site.uploads.values()
        action = answer["objects"][0]["actions"]["upload"]
        action["href"] = action["href"].replace(upload.oid, "0" * 64)
        upload.oid = "0" * 64

    double.fault(Edit(announce_another), "/objects/batch")
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        api.create_commit("acme/ink", [add("b.safetensors", b"b" * 99)], commit_message="spoilt")
    assert isinstance(caught.value.__cause__, BadRequestError)
    assert "b.safetensors" not in ink.files()


@pytest.mark.parametrize("path", ["../evil", "/evil", "a//b", "a/../b", "./a", ".git/config", ""])
def test_a_commit_of_a_hostile_path_is_refused(double: Double, api: HfApi, ink: Repo, path: str) -> None:
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}},
    ]
    before = ink.branches["main"]
    assert post(double, "/api/models/acme/ink/commit/main", *lines) == 400
    assert ink.branches["main"] == before


def post(double: Double, path: str, *lines: dict[str, Any]) -> int:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # exported at first use

    body = "\n".join(map(json.dumps, lines)).encode()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return int(get_session().post(f"{double.endpoint}{path}", content=body, headers=headers).status_code)


def test_a_commit_of_an_object_that_was_not_uploaded_is_refused(double: Double, ink: Repo) -> None:
    header = {"key": "header", "value": {"summary": "x"}}
    for oid, code in [("0" * 64, 400), (hashlib.sha256(WEIGHTS).hexdigest(), 200)]:
        file = {"key": "lfsFile", "value": {"path": "b.safetensors", "algo": "sha256", "oid": oid}}
        assert post(double, "/api/models/acme/ink/commit/main", header, file) == code
    # another repository's objects are not this one's
    double.repo("acme/other").commit({"a.txt": b"a"})
    assert post(double, "/api/models/acme/other/commit/main", header, file) == 400


def test_a_commit_needs_a_branch_and_a_legible_card(double: Double, api: HfApi, ink: Repo) -> None:
    def commit(revision: str) -> object:
        return api.create_commit("acme/ink", [add("a.txt", b"a")], commit_message="x", revision=revision)

    with pytest.raises(RevisionNotFoundError):
        commit("nowhere")
    with pytest.raises(BadRequestError, match="not a branch"):
        commit("v1.0.0")
    with pytest.raises(ValueError, match="metadata"):
        api.create_commit("acme/ink", [add("README.md", b"---\na: [\n---\n")], commit_message="x")
    assert len(ink.history()) == 1


def test_who_may_do_what(double: Double, api: HfApi, ink: Repo) -> None:
    """A member with a token that writes may; others may read, and propose."""
    assert [each["name"] for each in api.whoami()["orgs"]] == ["acme"]
    for token in (READER, STRANGER, False):
        asks = double.api(token)
        assert asks.model_info("acme/ink").sha == ink.branches["main"]
        expected = 401 if token is False else 403
        assert status(lambda: asks.create_tag("acme/ink", tag="v2")) == expected  # noqa: B023 - called here
        assert status(lambda: asks.auth_check("acme/ink", write=True)) == expected  # noqa: B023
        assert status(lambda: asks.create_repo("acme/mine")) == expected  # noqa: B023
        assert status(lambda: asks.create_commit("acme/ink", [add("a", b"a")], commit_message="x")) == expected  # noqa: B023
    api.auth_check("acme/ink", write=True)
    double.api(STRANGER).create_repo("mallory/mine")
    assert status(lambda: double.api(NOBODY).whoami()) == 401
    assert status(lambda: double.api(NOBODY).model_info("acme/ink")) == 401
    double.store.accounts[NOBODY] = Account(name="bob", orgs=("acme",))
    double.api(NOBODY).create_tag("acme/ink", tag="bobs")
    assert set(ink.tags) == {"v1.0.0", "bobs"}


def test_a_private_repository_is_missing_to_others(double: Double, api: HfApi, ink: Repo) -> None:
    ink.private = True
    assert api.model_info("acme/ink").private
    for token in (STRANGER, False):
        with pytest.raises(RepositoryNotFoundError):
            double.api(token).model_info("acme/ink")
        with pytest.raises(RepositoryNotFoundError):
            double.api(token).model_info("acme/none")
        assert list(double.api(token).list_models()) == []
    assert [each.id for each in api.list_models()] == ["acme/ink"]


def test_a_gated_repository_is_described_to_all_and_given_to_some(double: Double, api: HfApi, ink: Repo) -> None:
    ink.gate("manual")
    for token in (STRANGER, False):
        asks = double.api(token)
        assert asks.model_info("acme/ink").gated == "manual"
        with pytest.raises(GatedRepoError):
            asks.auth_check("acme/ink")
        with pytest.raises(GatedRepoError):
            asks.hf_hub_download("acme/ink", "README.md")
    api.hf_hub_download("acme/ink", "README.md")
    ink.gate(granted=("mallory",))
    double.api(STRANGER).hf_hub_download("acme/ink", "README.md")
    api.update_repo_settings("acme/ink", gated=False)
    double.api(token=False).auth_check("acme/ink")


def test_a_disabled_repository_gives_nothing(double: Double, api: HfApi, ink: Repo) -> None:
    ink.disable()
    assert api.model_info("acme/ink").disabled
    with pytest.raises(DisabledRepoError):
        api.get_hf_file_metadata(url=f"{double.endpoint}/acme/ink/resolve/main/README.md")
    ink.disable(whole=True)
    with pytest.raises(DisabledRepoError):
        api.model_info("acme/ink")


def test_what_is_missing_is_said_to_be(double: Double, api: HfApi, ink: Repo) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/ink", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag("acme/ink", tag="x", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("acme/ink", "none.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("acme/ink", "none"))


# ------------------------------------------------------------------------------------------ names that point


def test_a_repository_is_made_once_renamed_and_deleted(double: Double, api: HfApi, tmp_path: Path) -> None:
    url = api.create_repo("acme/ink", private=True)
    assert double.repo("acme/ink").private
    assert status(lambda: api.create_repo("acme/ink")) == 409
    assert api.create_repo("acme/ink", exist_ok=True) == url
    double.repo("acme/ink").commit(INK, "v1.0.0")
    api.update_repo_settings("acme/ink", private=False)
    api.move_repo("acme/ink", "acme/sumi")
    assert api.model_info("acme/ink").id == "acme/sumi"
    assert [tag.name for tag in api.list_repo_refs("acme/ink").tags] == ["v1.0.0"]
    assert got(api.snapshot_download("acme/ink", cache_dir=tmp_path)) == INK
    api.create_commit("acme/ink", [add("a.txt", b"a")], commit_message="under the old name")
    assert "a.txt" in double.repo("acme/sumi").files()
    api.delete_repo("acme/sumi")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/sumi")
    api.delete_repo("acme/sumi", missing_ok=True)


def test_tags_and_branches_are_made_once_and_deleted(api: HfApi, ink: Repo) -> None:
    first = ink.branches["main"]
    assert status(lambda: api.create_tag("acme/ink", tag="v1.0.0")) == 409
    api.create_tag("acme/ink", tag="v1.0.0", exist_ok=True)
    api.create_branch("acme/ink", branch="feature/x", revision="v1.0.0")
    assert status(lambda: api.create_branch("acme/ink", branch="feature/x")) == 409
    api.create_commit("acme/ink", [add("a.txt", b"a")], commit_message="there", revision="feature/x")
    assert ink.branches["main"] == first != ink.branches["feature/x"]
    api.create_tag("acme/ink", tag="v1.1.0", revision="feature/x", tag_message="from the branch")
    refs = api.list_repo_refs("acme/ink")
    assert {tag.name: tag.target_commit for tag in refs.tags} == ink.tags
    assert {branch.name: branch.target_commit for branch in refs.branches} == ink.branches
    api.delete_tag("acme/ink", tag="v1.1.0")
    api.delete_branch("acme/ink", branch="feature/x")
    assert (set(ink.tags), set(ink.branches)) == ({"v1.0.0"}, {"main"})
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("acme/ink", tag="v1.1.0")


def test_anybody_may_open_a_pull_request(double: Double, ink: Repo, tmp_path: Path) -> None:
    asks, before = double.api(STRANGER), ink.branches["main"]
    done = asks.create_commit("acme/ink", [add("b.safetensors", b"b" * 9)], commit_message="mine", create_pr=True)
    assert (done.pr_revision, done.pr_num) == ("refs/pr/1", 1)
    assert ink.branches["main"] == before
    assert asks.model_info("acme/ink", revision="refs/pr/1").sha == done.oid == ink.pulls[1]
    more = asks.create_commit("acme/ink", [add("c.txt", b"c")], commit_message="more", revision="refs/pr/1")
    assert ink.pulls[1] == more.oid
    listed = asks.list_repo_refs("acme/ink", include_pull_requests=True).pull_requests or []
    assert [each.ref for each in listed] == ["refs/pr/1"]
    assert "c.txt" in got(asks.snapshot_download("acme/ink", revision="refs/pr/1", cache_dir=tmp_path))
    assert [each.title for each in asks.get_repo_discussions("acme/ink")] == ["mine"]
    empty = asks.create_pull_request("acme/ink", title="An empty one")
    assert (empty.num, empty.target_branch, ink.pulls[2]) == (2, "refs/heads/main", before)
    assert not asks.create_discussion("acme/ink", title="Just words").is_pull_request


def test_a_squashed_branch_is_one_commit_and_the_others_are_gone(api: HfApi, double: Double) -> None:
    repo = double.repo("acme/ink")
    lost, kept = repo.commit({"a.txt": b"1"}), repo.commit(INK, "v1.0.0")
    api.super_squash_history("acme/ink")
    assert [each.title for each in repo.history()] == ["Super-squash branch 'main' using huggingface_hub"]
    assert api.model_info("acme/ink", revision=kept).sha == kept  # the tag holds it, and what came before
    assert lost in repo.commits
    repo.tags.clear()
    repo.squash()
    for commit in (lost, kept):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("acme/ink", revision=commit)
    assert repo.files() == INK


# ------------------------------------------------------------------------------------------------- descriptions


def test_a_card_gives_its_tags(api: HfApi, ink: Repo) -> None:
    info = api.model_info("acme/ink")
    tags = info.tags or []
    assert {"base_model:acme/base", "base_model:adapter:acme/base", "license:mit", "lora", "peft"} <= set(tags)
    assert info.card_data is not None
    assert info.card_data.base_model == "acme/base"
    assert (info.library_name, info.pipeline_tag) == ("peft", "text-generation")
    ink.edit({"README.md": card(base_model=["acme/a", "acme/b"], base_model_relation="merge")})
    tags = api.model_info("acme/ink").tags or []
    assert {"base_model:acme/b", "base_model:merge:acme/a"} <= set(tags)
    ink.edit({"README.md": b"no card"})
    assert not [tag for tag in api.model_info("acme/ink").tags or [] if tag.startswith("base_model")]


def test_only_the_fields_asked_for_are_told(double: Double, api: HfApi, ink: Repo) -> None:
    info = api.model_info("acme/ink", expand=["sha", "downloads", "baseModels"])
    assert (info.sha, info.downloads, info.siblings) == (ink.branches["main"], 7, None)
    assert api.model_info("acme/ink", securityStatus=True).security_repo_status is not None


def test_models_are_found_by_every_filter_in_order_and_in_pages(double: Double, api: HfApi) -> None:
    double.site.page_size = 3
    for number in range(10):
        repo = double.repo(f"acme/ink-{number}")
        repo.commit(INK if number % 2 else {"README.md": card(base_model="acme/base", tags=["lora"])})
        repo.downloads = number
    double.repo("mallory/sumi").commit(INK)

    def names(**asked: Any) -> list[str]:
        return [each.id for each in api.list_models(**asked)]

    assert names(filter=["base_model:adapter:acme/base", "lora"], sort="downloads") == [
        *(f"acme/ink-{number}" for number in (9, 7)),
        "mallory/sumi",  # 7 downloads as well
        *(f"acme/ink-{number}" for number in (5, 3, 1)),
    ]
    assert names(author="acme", search="INK-3") == ["acme/ink-3"]
    assert names(filter=["lora", "license:mit"], author="mallory") == ["mallory/sumi"]
    assert names(filter="none") == []
    assert names(sort="created_at", limit=4) == ["mallory/sumi", "acme/ink-9", "acme/ink-8", "acme/ink-7"]
    double.log.clear()
    assert len(names()) == 11
    assert len(double.log) == 4
    (one,) = api.list_models(search="sumi", full=True, cardData=True)
    assert one.card_data is not None
    assert len(one.siblings or []) == 3


def test_a_tree_comes_in_pages_and_by_folder(double: Double, api: HfApi) -> None:
    double.site.page_size = 2
    double.repo("acme/many").commit({"a.txt": b"a", "x/b.txt": b"b", "x/y/c.safetensors": b"c" * 9})

    def paths(folder: str | None = None, *, recursive: bool = False) -> list[str]:
        return [each.path for each in api.list_repo_tree("acme/many", folder, recursive=recursive)]

    assert paths() == ["a.txt", "x"]
    assert paths(recursive=True) == ["a.txt", "x", "x/b.txt", "x/y", "x/y/c.safetensors"]
    assert paths("x") == ["x/b.txt", "x/y"]
    found = api.get_paths_info("acme/many", ["x/y", "x/y/c.safetensors", "none"], expand=True)
    assert [each.path for each in found] == ["x/y", "x/y/c.safetensors"]
    assert [each.last_commit is None for each in found] == [False, False]


def test_a_history_is_told_newest_first(api: HfApi, ink: Repo) -> None:
    ink.edit({"a.txt": b"a"}, message="second")
    listed = api.list_repo_commits("acme/ink")
    assert [each.title for each in listed] == ["second", "Upload"]
    assert [each.commit_id for each in listed] == [each.oid for each in ink.history()]


# ------------------------------------------------------------------------------------------------------- faults


def test_a_lost_answer_is_not_a_lost_commit(double: Double, api: HfApi, ink: Repo) -> None:
    actions: list[tuple[Action, bool]] = [(DropBefore(), False), (DropAfter(), True)]
    for action, lands in actions:
        before = len(ink.history())
        double.fault(action, "/commit/")
        with pytest.raises(Exception, match="disconnected") as caught:
            api.create_commit("acme/ink", [add(f"{lands}.txt", b"a")], commit_message="x")
        assert type(caught.value).__name__ == "RemoteProtocolError"
        assert len(ink.history()) == before + lands
        assert double.log[-1].status == 0


def test_a_fault_is_done_as_often_as_asked_to_the_requests_meant(double: Double, api: HfApi, ink: Repo) -> None:
    fault = double.fault(Status(503), "/refs", method="GET", times=2, after=1)
    api.list_repo_refs("acme/ink")
    for _ in range(2):
        assert status(lambda: api.list_repo_refs("acme/ink")) == 503
    api.list_repo_refs("acme/ink")
    assert fault.hits == 2
    api.model_info("acme/ink")


def test_bytes_are_spoilt_as_asked(double: Double, api: HfApi, ink: Repo, tmp_path: Path) -> None:
    def fetch(name: str) -> bytes:
        return Path(api.hf_hub_download("acme/ink", name, cache_dir=tmp_path, force_download=True)).read_bytes()

    double.fault(Flip(at=7), where="cdn")
    spoilt = fetch("adapter_model.safetensors")  # the client looks at the size alone
    assert [at for at in range(len(WEIGHTS)) if spoilt[at] != WEIGHTS[at]] == [7]
    double.fault(Truncate(3), "adapter_config.json", method="GET")
    with pytest.raises(OSError, match="should be of size"):
        fetch("adapter_config.json")
    double.fault(Swap(b'{"r": 9}'), "adapter_config.json", method="GET")
    assert fetch("adapter_config.json") == b'{"r": 9}'
    double.fault(Edit(lambda refs: {**refs, "tags": []}), "/refs")
    assert api.list_repo_refs("acme/ink").tags == []
    double.fault(Headers({"X-Repo-Commit": "f" * 40}), "README.md", method="HEAD")
    assert "f" * 40 in api.hf_hub_download("acme/ink", "README.md", cache_dir=tmp_path)


def test_somebody_can_be_faster_and_a_client_can_be_held(double: Double, api: HfApi, ink: Repo) -> None:
    parent = ink.branches["main"]
    double.fault(Do(lambda: ink.edit({"theirs.txt": b"t"})), "/commit/")
    operations = [add("mine.txt", b"m")]
    assert status(lambda: api.create_commit("acme/ink", operations, commit_message="x", parent_commit=parent)) == 412
    hold = Hold()
    double.fault(hold, "/refs")
    waits = threading.Thread(target=api.list_repo_refs, args=("acme/ink",))
    waits.start()
    assert hold.reached.wait(30)
    assert waits.is_alive()
    hold.release()
    waits.join(30)
    assert not waits.is_alive()


def test_half_a_request_is_none(double: Double, ink: Repo) -> None:
    """The half holds whole lines, which a careless server would commit."""
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": "a.txt", "content": "", "encoding": "base64"}},
    ]
    half = "".join(json.dumps(line) + "\n" for line in lines).encode()
    head = f"POST /api/models/acme/ink/commit/main HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    framings = [
        f"Content-Length: {2 * len(half)}\r\n\r\n".encode() + half,
        f"Transfer-Encoding: chunked\r\n\r\n{len(half):x}\r\n".encode() + half,
    ]
    for rest in framings:
        with socket.create_connection(("127.0.0.1", int(double.endpoint.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + rest)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
    assert len(ink.history()) == 1
    assert double.log == []


def test_a_token_sent_to_the_cdn_is_refused_and_noted(double: Double, ink: Repo) -> None:
    place = double.site.sign(ink, "adapter_model.safetensors", hashlib.sha256(WEIGHTS).hexdigest())
    with pytest.raises(OSError, match="400") as caught:
        urlopen(Request(place, headers={"Authorization": f"Bearer {TOKEN}"}))
    caught.value.close()  # type: ignore[attr-defined]
    assert "authorization" in double.log.pop().headers  # or the fixture would fail this test


# ---------------------------------------------------------------------------------------------------------- Xet


def test_what_goes_up_through_xet_comes_down_either_way(
    xet: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = xet.api()
    api.create_repo("acme/ink")
    operations = [add(path, data) for path, data in INK.items()]
    api.create_commit("acme/ink", operations, commit_message="through Xet")
    assert xet.seen("xet-write-token")
    assert xet.seen(where="cdn") == []
    assert xet.repo("acme/ink").files().items() >= INK.items()
    (weights,) = api.get_paths_info("acme/ink", "adapter_model.safetensors")
    assert isinstance(weights, RepoFile)
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert got(api.snapshot_download("acme/ink", cache_dir=tmp_path / "one")).items() >= INK.items()
    assert xet.seen(where="cdn") == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert got(api.snapshot_download("acme/ink", cache_dir=tmp_path / "two")).items() >= INK.items()
    assert xet.bytes_of(".safetensors", where="cdn") == len(WEIGHTS)


def test_what_a_test_commits_can_be_fetched_through_xet(xet: Double, tmp_path: Path) -> None:
    xet.repo("acme/ink").commit(INK)
    assert got(xet.api().snapshot_download("acme/ink", cache_dir=tmp_path)) == INK
    assert xet.seen("xet-read-token")
    assert xet.bytes_of(".safetensors") == 0


def test_a_process_pushes_through_xet_too(
    xet: Double, environment: dict[str, str], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    repo = xet.repo("acme/ink")
    repo.commit(INK)
    hf, there = [sys.executable, "-m", "huggingface_hub.cli.hf"], environment | {"HF_HUB_DISABLE_XET": "0"}
    for words in (["upload", "acme/ink", str(make_adapter(size=70_000))], ["download", "acme/ink"]):
        done = subprocess.run([*hf, *words], env=there, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    assert repo.files() == got(make_adapter(size=70_000))
    assert xet.seen(where="cdn") == []
    assert len(xet.seen("xet-write-token")) == len(xet.seen("xet-read-token")) == 1
    repo.edit({"more.safetensors": WEIGHTS[:5000]})


def test_a_hub_without_xet_has_no_token_for_it(
    double: Double, api: HfApi, ink: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError):
        api.create_commit("acme/ink", [add("b.safetensors", b"b" * 99)], commit_message="x")
    assert double.seen("xet-write-token")[0].status == 404


# ---------------------------------------------------------------------------------------------------- processes


def test_a_process_that_is_told_of_the_double_uses_it(
    double: Double, ink: Repo, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "new.txt").write_bytes(b"new")
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    for words in (["upload", "acme/ink", str(tmp_path / "new.txt")], ["download", "acme/ink", "README.md"]):
        done = subprocess.run([*hf, *words], env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    assert ink.files()["new.txt"] == b"new"
    asked = double.seen("acme/ink", where="hub")
    assert all(each.headers["authorization"] == f"Bearer {TOKEN}" for each in asked)


def test_the_double_can_be_a_process_of_its_own(tmp_path: Path, double: Double) -> None:
    put(tmp_path / "repos" / "acme" / "ink", INK)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "hub.double", "--repos", str(tmp_path / "repos")]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint, token = (process.stdout.readline().strip() for _ in range(2))
        try:
            assert (
                got(HfApi(endpoint=endpoint, token=token).snapshot_download("acme/ink", cache_dir=tmp_path / "c"))
                == INK
            )
        finally:
            process.kill()
