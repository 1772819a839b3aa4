"""Resolving and pulling from the Hugging Face Hub, through its real client, against the double.

Regular files come from the hub itself, weights by a redirect to the CDN, which is another origin and must never see a
token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub.double import TOKEN, Cut, Double, Edit, Flip, Headers, Repo, Status, Swap, card, git_id
from huggingface_hub import HfApi

from lorahub.errors import (
    AccessDenied,
    DigestMismatch,
    IntegrityError,
    InvalidRef,
    LorahubError,
    NotFound,
    Offline,
    Unavailable,
    UnsafePath,
    UsageError,
    WriteFailed,
)
from lorahub.fetching import as_ref
from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

WEIGHTS = bytes(range(251)) * 13_000  # about 3 MiB: a few chunks
INK = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": WEIGHTS,
    "README.md": b"# Ink\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "optimizer.pt": b"pickle",
}


@pytest.fixture
def repo(double: Double) -> Repo:
    """acme/ink at v1.0.0 and v1.2.0, and a main that is ahead of both."""
    repo = double.repo("acme/ink")
    repo.commit(INK | {"README.md": b"first"}, "v1.0.0")
    repo.commit(INK, "v1.2.0")
    repo.commit(INK | {"README.md": b"unreleased"})
    return repo


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PULLED = {name: INK[name] for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")}


# ------------------------------------------------------------------------------------------ resolve and pull


@pytest.mark.parametrize(
    ("text", "tag", "branch"),
    [
        ("", "v1.2.0", None),
        ("@1", "v1.2.0", None),
        ("@1.0.0", "v1.0.0", None),
        ("@<1.1", "v1.0.0", None),
        ("@main", None, "main"),
    ],
)
def test_a_selector_comes_to_its_commit_in_two_requests(double, repo, hub, text, tag, branch):
    pin = hub.resolve(Ref.parse(f"acme/ink{text}"))
    assert (pin.tag, pin.branch, pin.commit) == (tag, branch, (repo.tags | repo.branches)[tag or branch])
    assert len(double.log) == 2
    assert pin.why


def test_a_pull_request_is_found_when_it_is_named(repo, hub):
    number = repo.open_pull(INK | {"README.md": b"proposed"})
    assert hub.resolve(Ref.parse(f"acme/ink@refs/pr/{number}")).commit == repo.pulls[number]


def test_a_pull_brings_what_belongs_to_an_adapter_and_nothing_else(double, repo, hub, cache):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    assert files_in(folder) == PULLED
    assert folder.name == "ink"
    assert not [path for path in double.paths() if "optimizer" in path or "gitattributes" in path]


def test_the_hub_sees_the_token_and_the_cdn_does_not(double, repo, hub):
    hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert all(each.headers["authorization"] == f"Bearer {TOKEN}" for each in double.seen(where="hub"))
    assert double.paths("cdn")  # the fixture holds every request there to carry none


def test_the_folder_knows_every_sha256_once_pulled(repo, hub):
    pin = hub.resolve(Ref.parse("acme/ink"))
    with pytest.raises(LorahubError, match="pulled"):
        pin.digest()
    full = pin_of(hub.pull(pin))
    assert full is not None
    assert {name: file.sha256 for name, file in full.files.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in PULLED.items()
    }
    assert full.digest().startswith("sha256:")
    assert hub.resolve(Ref.parse("acme/ink")).digest() == full.digest()


def test_a_pinned_commit_that_was_pulled_costs_no_request(double, repo, hub):
    ref = Ref.parse(f"acme/ink@{repo.tags['v1.2.0']}")
    folder = hub.pull(hub.resolve(ref))
    double.log.clear()
    assert hub.pull(hub.resolve(ref)) == folder
    assert double.log == []


def test_a_tag_that_was_pulled_costs_one_request(double, repo, hub):
    hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    double.log.clear()
    hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    assert len(double.log) == 1


def test_a_moved_tag_is_seen_and_the_old_pin_still_holds(repo, hub):
    old = hub.resolve(Ref.parse("acme/ink@v1.2.0"))
    repo.commit(INK | {"README.md": b"moved"}, "v1.2.0")
    new = hub.resolve(Ref.parse("acme/ink@v1.2.0"))
    assert new.commit != old.commit
    assert (hub.pull(old) / "README.md").read_bytes() == b"# Ink\n"
    assert (hub.pull(new) / "README.md").read_bytes() == b"moved"


def test_a_subfolder_and_a_single_file_can_be_named(double, hub):
    files = {f"sql/{name}": data for name, data in INK.items()} | {"sql/b.safetensors": b"b" * 9}
    double.repo("acme/many").commit(files, "v1.0")
    assert set(files_in(hub.pull(hub.resolve(Ref.parse("acme/many/sql"))))) == {*PULLED, "b.safetensors"}
    one = hub.pull(hub.resolve(Ref.parse("acme/many@1/sql/b.safetensors")))
    assert set(files_in(one)) == {"README.md", "adapter_config.json", "b.safetensors"}


def test_progress_is_told_in_bytes(repo, hub):
    told: list[tuple[str, int, int]] = []
    pin = hub.resolve(Ref.parse("acme/ink"))
    hub.pull(pin, progress=lambda *step: told.append(step))
    assert told[-1][1:] == (pin.size, pin.size)
    assert [step[1] for step in told] == sorted(step[1] for step in told)


def test_a_header_can_be_read_without_pulling(double, repo, hub, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    assert hub.read(pin, "adapter_model.safetensors", offset=8, length=100) == WEIGHTS[8:108]
    assert double.bytes_of(".safetensors") == 100
    assert hub.read(pin, "adapter_config.json") == INK["adapter_config.json"]
    assert not list(cache.root.rglob("*.safetensors"))
    hub.pull(pin)
    double.log.clear()
    assert hub.read(pin, "adapter_model.safetensors", offset=8, length=100) == WEIGHTS[8:108]
    assert double.log == []


def test_what_the_client_downloaded_before_is_taken_over_if_it_is_sound(double, repo, hub, tmp_path):
    place = tmp_path / "client-cache" / "models--acme--ink" / "snapshots" / repo.tags["v1.2.0"]
    place.mkdir(parents=True)
    (place / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (place / "README.md").write_bytes(b"# Inc\n")  # as long as the real one, and not it
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))) == PULLED
    assert double.paths("cdn") == []
    assert (place / "README.md").read_bytes() == b"# Inc\n"


def test_versions_and_search_are_answered(double, repo, hub):
    assert [each.tag for each in hub.versions("acme/ink")] == ["v1.2.0", "v1.0.0"]
    repo.edit({"README.md": card(base_model="acme/base")})
    double.repo("acme/ink-of-another").commit(INK | {"README.md": card(base_model="acme/another")})
    assert [found.repo for found in hub.search("ink", base="acme/base")] == ["acme/ink"]
    assert "base_model%3Aadapter%3Aacme%2Fbase" in double.log[-1].target


# ------------------------------------------------------------------------------------------- wrong bytes


def nothing_usable(cache: Cache) -> bool:
    return not list(cache.root.rglob("pin.json")) and not list(cache.root.rglob("*.safetensors"))


def test_a_flipped_byte_of_the_right_length_is_refused_and_nothing_is_kept(double, repo, hub, cache):
    double.fault(Flip(), where="cdn", times=None)
    pin = hub.resolve(Ref.parse("acme/ink"))
    with pytest.raises(DigestMismatch, match=r"adapter_model\.safetensors") as caught:
        hub.pull(pin)
    assert caught.value.exit_code == 5
    assert nothing_usable(cache)
    assert len(double.paths("cdn")) == 2  # once more, then no more
    double.faults.clear()
    assert files_in(hub.pull(pin)) == PULLED


def test_a_flipped_byte_that_does_not_come_again_is_repaired(double, repo, hub):
    double.fault(Flip(), where="cdn", times=1)
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == PULLED
    assert len(double.paths("cdn")) == 2


def test_a_regular_file_is_held_to_gits_own_hash(double, repo, hub, cache):
    def swap(info):
        (file,) = [each for each in info["siblings"] if each["rfilename"] == "adapter_config.json"]
        file["blobId"] = git_id(b"something else")

    double.fault(Edit(swap), "/revision/")
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json"):
        hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert nothing_usable(cache)


def test_a_body_that_breaks_off_is_gone_on_with_where_it_stopped(double, repo, hub):
    double.fault(Cut(after=2_000_000), where="cdn")
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.log.clear()
    assert files_in(hub.pull(pin)) == PULLED
    assert double.seen(where="cdn")[1].headers["range"].startswith("bytes=")
    assert double.bytes_of() <= pin.size + (1 << 20)


def test_a_body_that_always_breaks_off_at_the_start_ends_in_an_error(double, repo, hub, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.fault(Cut(after=0), times=None)
    with pytest.raises((Unavailable, IntegrityError)):
        hub.pull(pin)
    assert not list(cache.root.rglob("pin.json"))


def test_a_pull_that_was_interrupted_goes_on_where_it_stopped(double, repo, hub):
    pin = hub.resolve(Ref.parse("acme/ink"))

    def stop(path: str, done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull(pin, progress=stop)
    double.log.clear()
    assert files_in(hub.pull(pin)) == PULLED
    (asked,) = double.seen(where="cdn")
    assert int(asked.headers["range"].removeprefix("bytes=").rstrip("-")) >= 2_000_000 - (1 << 20)


def test_a_longer_body_than_listed_is_refused_before_it_fills_the_disk(double, repo, hub, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.fault(Swap(b"x" * 5_000_000), "/resolve/", times=None)
    with pytest.raises(IntegrityError, match="more than"):
        hub.pull(pin)
    assert not list(cache.root.rglob("pin.json"))


def test_hostile_headers_decide_no_path(double, repo, hub, tmp_path):
    hostile = dict.fromkeys(("X-Repo-Commit", "X-Linked-Etag"), "../../../evil") | {"ETag": '"../../../evil"'}
    double.fault(Headers(hostile), times=None)
    hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert not list(tmp_path.rglob("*evil*"))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# ------------------------------------------------------------------------------------------ hostile listings


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "a\\..\\evil.safetensors", "C:evil.safetensors", "/evil.safetensors"]
)
def test_a_hostile_name_in_the_listing_is_refused_before_anything_is_fetched(double, repo, hub, cache, name):
    evil = {"rfilename": name, "size": 4, "blobId": git_id(b"evil")}
    double.fault(Edit(lambda info: info["siblings"].append(evil)), "/revision/")
    with pytest.raises(UnsafePath):
        hub.resolve(Ref.parse("acme/ink"))
    assert double.paths("cdn") == []
    assert nothing_usable(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"size": None},
        {"size": "4"},
        {"size": -4},
        {"lfs": None, "blobId": "../../../x"},
        {"lfs": None, "blobId": None},
        {"lfs": {"sha256": "../../../x", "size": 4, "pointerSize": 1}},
        {"lfs": {"sha256": "A" * 64, "size": 4, "pointerSize": 1}},
        {"rfilename": 5},
    ],
    ids=str,
)
def test_a_listing_without_proper_sizes_and_hashes_is_refused(double, repo, hub, change):
    double.fault(Edit(lambda info: info["siblings"][1].update(change)), "/revision/")
    with pytest.raises(IntegrityError):
        hub.resolve(Ref.parse("acme/ink"))


def test_a_listing_beyond_all_size_is_refused_before_a_byte_moves(double, repo, hub):
    double.fault(Edit(lambda info: info["siblings"][1].update(size=1 << 40)), "/revision/")
    with pytest.raises(IntegrityError, match="larger"):
        hub.resolve(Ref.parse("acme/ink"))


def test_an_answer_for_another_commit_is_refused(double, repo, hub):
    double.fault(Edit(lambda info: info.update(sha="0" * 40)), "/revision/")
    with pytest.raises(IntegrityError, match="another commit"):
        hub.resolve(Ref.parse("acme/ink"))


def test_a_ref_at_what_is_no_commit_is_refused(repo, hub):
    repo.tags["v9.0.0"] = "../../../x"
    with pytest.raises(IntegrityError, match="no commit"):
        hub.resolve(Ref.parse("acme/ink"))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b'{"siblings": 5}', b"[" * 100_000], ids=lambda body: repr(body[:9])
)
def test_an_answer_that_is_none_is_a_typed_error(double, repo, hub, body):
    double.fault(Status(200, body=body), "/revision/", times=None)
    with pytest.raises((Unavailable, IntegrityError)):
        hub.resolve(Ref.parse("acme/ink"))


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("who", ["stranger", "anonymous"])
def test_a_gated_repository_says_where_to_ask(double, repo, hub, cache, who, request):
    repo.gate()
    asks = request.getfixturevalue(who)
    pin = asks.resolve(Ref.parse("acme/ink"))
    with pytest.raises(AccessDenied, match="gated") as caught:
        asks.pull(pin)
    assert f"{double.endpoint}/acme/ink" in caught.value.hint
    assert nothing_usable(cache)
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == PULLED  # a member passes


def test_a_missing_repository_is_not_found_and_may_be_private(hub, double):
    with pytest.raises(NotFound, match="no acme/none, or it is private") as caught:
        hub.resolve(Ref.parse("acme/none"))
    assert "hf auth login" in caught.value.hint


def test_a_folder_of_the_same_name_is_offered(hub, double, tmp_path, monkeypatch):
    (tmp_path / "acme" / "none").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound) as caught:
        hub.resolve(Ref.parse("acme/none"))
    assert "./acme/none" in caught.value.hint


@pytest.mark.parametrize("text", ["@9", "@nightly", "@" + "0" * 40])
def test_a_missing_revision_is_not_found(repo, hub, text):
    with pytest.raises(NotFound):
        hub.resolve(Ref.parse(f"acme/ink{text}"))


@pytest.mark.parametrize("whole", [False, True])
def test_a_disabled_repository_is_refused(repo, hub, whole):
    repo.disable(whole=whole)
    with pytest.raises(AccessDenied, match="disabled"):
        hub.resolve(Ref.parse("acme/ink"))


STATUSES = {
    401: AccessDenied,
    403: AccessDenied,
    429: Unavailable,
    500: Unavailable,
    503: Unavailable,
    418: Unavailable,
}


@pytest.mark.parametrize("part", ["/refs", "/revision/", "/resolve/"])
@pytest.mark.parametrize("status", STATUSES)
def test_every_failure_is_a_typed_error_that_tells_nothing_of_the_token(double, repo, hub, status, part):
    body = f'{{"error": "{TOKEN} \\u001b[31m"}}'.encode()
    double.fault(Status(status, {"X-Error-Message": f"\x9b31m {TOKEN}"}, body), part, times=None)
    with pytest.raises(STATUSES[status]) as caught:
        hub.pull(hub.resolve(Ref.parse("acme/ink")))
    error: BaseException | None = caught.value
    assert caught.value.hint
    while error is not None:
        assert TOKEN not in str(error)
        assert "\x1b" not in str(error)
        assert not hasattr(error, "response")
        error = error.__cause__ or error.__context__


def test_a_passing_failure_is_tried_again(double, repo, hub):
    failures = {"/refs": 2, "/revision/": 1, "/resolve/": 2}
    busy = Status(503, {"Retry-After": "0"}, b"")
    faults = [double.fault(busy, part, times=times) for part, times in failures.items()]
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == PULLED
    assert [fault.hits for fault in faults] == list(failures.values())


def test_a_long_wait_is_not_sat_out_but_told(double, repo, hub):
    double.fault(Status(429, {"Retry-After": "3600"}), "/refs", times=None)
    with pytest.raises(Unavailable, match=r"3,?600 seconds"):
        hub.resolve(Ref.parse("acme/ink"))
    assert len(double.log) == 1


def test_a_server_that_is_not_there_is_offline(double, hub, repo):
    double.close()
    with pytest.raises(Offline) as caught:
        hub.resolve(Ref.parse("acme/ink"))
    assert caught.value.exit_code == 6


def test_a_full_disk_is_said_to_be_one(repo, hub, monkeypatch):
    pin = hub.resolve(Ref.parse("acme/ink"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorahub.hub.huggingface.download._fetch", full)
    with pytest.raises(WriteFailed, match="No space left"):
        hub.pull(pin)


@pytest.mark.parametrize("endpoint", ["http://example.org", "ftp://127.0.0.2", "http://127.0.0.1.example.org"])
def test_an_unencrypted_endpoint_elsewhere_is_refused(cache, endpoint):
    with pytest.raises(UsageError, match="not encrypted"):
        HuggingFaceHub(endpoint=endpoint, cache=cache)


@pytest.mark.parametrize("token", ["", " ", "hf_x\nInjected: yes", "hf_ü"])
def test_a_token_that_is_none_is_refused_and_not_shown(cache, token):
    with pytest.raises(UsageError) as caught:
        HuggingFaceHub(token=token, cache=cache)
    assert "Injected" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- offline


def test_what_was_pulled_is_there_offline_by_commit_tag_and_range(double, repo, hub, offline):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    double.log.clear()
    for selector in (repo.tags["v1.2.0"], "v1.2.0", "~=1.0"):
        pin = offline.resolve(Ref.parse(f"acme/ink@{selector}"))
        assert offline.pull(pin) == folder
        assert "from the cache" in pin.why
    assert double.log == []


def test_what_was_not_pulled_is_offline_and_what_was_is_listed(double, repo, hub, offline):
    hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    double.log.clear()
    for text in ("acme/ink@1.0.0", f"acme/ink@{'0' * 40}", "acme/ink@main"):
        with pytest.raises(Offline, match=r"v1\.2\.0"):
            offline.resolve(Ref.parse(text))
    with pytest.raises(Offline, match="nothing of it"):
        offline.resolve(Ref.parse("acme/other"))
    with pytest.raises(Offline):
        offline.search("ink")
    assert double.log == []


def test_the_environment_switches_the_network_off(double, repo, hub, cache, monkeypatch):
    pin = hub.resolve(Ref.parse("acme/ink"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    double.log.clear()
    with pytest.raises(Offline):
        HuggingFaceHub(api=HfApi(endpoint=double.endpoint), cache=cache).pull(pin)
    assert double.log == []


# ----------------------------------------------------------------------------------------------------- bases

BASE = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 1000,
    "pytorch_model.bin": b"p" * 1000,
    "tokenizer.json": b"{}",
    "vocab.txt": b"a",
    "modeling_evil.py": b"import os",
}


def test_a_base_is_described_without_a_byte_of_it(double, hub):
    repo = double.repo("acme/base")
    commit = repo.commit(BASE)
    other = repo.commit(BASE | {"README.md": b"new words"})
    pins = [hub.base_pin(Ref.parse(f"acme/base@{each}")) for each in (commit, other)]
    assert pins[0].digest() == pins[1].digest()  # another commit, the same weights
    assert pins[0].files["model.safetensors"].sha256 == hashlib.sha256(BASE["model.safetensors"]).hexdigest()
    assert not [path for path in double.paths() if "/resolve/" in path]
    repo.commit(BASE | {"model.safetensors": b"v" * 1000})
    assert hub.base_pin(Ref.parse("acme/base")).digest() != pins[0].digest()


def test_a_base_by_its_branch_is_one_request_and_known_offline_from_then_on(double, hub, offline):
    commit = double.repo("acme/base").commit(BASE)
    pin = hub.base_pin(Ref.parse("acme/base"))
    assert (pin.commit, pin.branch, double.paths()) == (commit, "main", ["/api/models/acme/base/revision/main"])
    assert offline.base_pin(Ref.parse("acme/base")).files == pin.files


def test_what_is_missing_of_a_base_is_told_apart(double, hub):
    double.repo("acme/base").commit(BASE, branch="trunk")
    with pytest.raises(NotFound, match="nothing that 'refs/heads/main' could mean"):
        hub.base_pin(Ref.parse("acme/base"))
    with pytest.raises(NotFound, match="there is no acme/none"):
        hub.base_pin(Ref.parse("acme/none"))


def test_a_base_is_pulled_without_pickles_and_code(double, hub, offline):
    repo = double.repo("acme/base")
    commit = repo.commit(BASE, tag="v0.1")
    repo.commit(BASE | {"config.json": b'{"new": 1}'})
    ref = Ref.parse(f"acme/base@{commit}")
    folder = hub.pull_base(ref)
    assert set(files_in(folder)) == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert hub.base_pin(Ref.parse("acme/base")).commit == repo.branches["main"]  # the branch, whatever is tagged
    assert offline.pull_base(ref) == folder


def test_a_base_is_no_adapter(double, hub):
    double.repo("acme/base").commit(BASE)
    with pytest.raises(NotFound, match="base model"):
        hub.resolve(Ref.parse("acme/base"))


def test_a_page_of_the_hub_that_the_environment_names_can_be_pasted(double, repo, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", double.endpoint)
    for page in (f"{double.endpoint}/acme/ink/tree/v1.0.0", f"{double.endpoint}/acme/ink/blob/v1.0.0/x.safetensors"):
        assert (as_ref(page).repo, as_ref(page).selector) == ("acme/ink", "v1.0.0")
    monkeypatch.setenv("HF_ENDPOINT", "https://other.example")
    with pytest.raises(InvalidRef, match="only pages of"):
        as_ref(f"{double.endpoint}/acme/ink/tree/v1.0.0")
