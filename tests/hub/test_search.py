"""Searching a Hub through its real client, and a folder, with one question and one kind of answer."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from hub.double import TOKEN, Edit, Status, Swap, card
from huggingface_hub import HfApi

import lorahub
from lorahub.cli.main import main
from lorahub.errors import Offline, Unavailable, UsageError
from lorahub.hub.folder import FolderHub
from lorahub.hub.hub import Listing
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.hub.huggingface.client import HubClient
from lorahub.names import Ref

WEIGHTS = {"adapter_model.safetensors": b"w" * 900, "adapter_config.json": b"{}"}


@pytest.fixture
def filled(double, cache, monkeypatch):
    """Three adapters of one base, one of another, and a base."""
    monkeypatch.setenv("LORAHUB_HUB", double.endpoint)
    monkeypatch.setenv("LORAHUB_CACHE", str(cache.root))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for count, name in enumerate(["acme/ink", "acme/sumi-ink", "bob/ink-wash"]):
        repo = double.repo(name)
        about = card(base_model="org/base", license="mit", library_name="peft", tags=["lora", f"style-{count}"])
        repo.commit(WEIGHTS | {"README.md": about})
        repo.downloads = 10 * count
    double.repo("acme/other").commit(WEIGHTS | {"README.md": card(base_model="org/second", tags=["lora"])})
    double.repo("org/base").commit({"config.json": b"{}", "README.md": card(license="mit", tags=["llm"])})
    return double


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


def names(found: list[Listing]) -> list[str]:
    return [each.repo for each in found]


def test_adapters_of_a_base_are_found_most_downloaded_first_with_what_their_cards_say(filled):
    found = lorahub.search(base="org/base")
    assert names(found) == ["bob/ink-wash", "acme/sumi-ink", "acme/ink"]
    first = found[0]
    assert (first.base, first.downloads, first.library, first.license) == ("org/base", 20, "peft", "mit")
    assert len(first.updated) == len("2026-01-31")
    assert "style-2" in first.tags
    assert not first.gated


def test_the_commit_of_a_base_plays_no_part(filled):
    assert len(lorahub.search(base=f"org/base@{'0' * 40}")) == 3
    assert lorahub.search(base="bare-base") == []


@pytest.mark.parametrize("base", ["./base", "/tmp/base", "a b", "org/base/../x"])
def test_a_base_that_is_no_name_is_refused_before_anything_is_asked(filled, base):
    with pytest.raises(UsageError):
        lorahub.search(base=base)
    assert filled.log == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({"text": "sumi"}, ["acme/sumi-ink"]),
        ({"text": "ink", "author": "acme"}, ["acme/sumi-ink", "acme/ink"]),
        ({"library": "peft", "tags": ["style-1"]}, ["acme/sumi-ink"]),
        ({"tags": ["style-0", "style-1"]}, []),
        ({"base": "org/base", "text": "wash"}, ["bob/ink-wash"]),
        ({"text": "base"}, []),  # a base model is no adapter
        ({"tags": ["llm"]}, ["org/base"]),  # unless it is asked for
        ({"base": "org/base", "sort": "likes", "limit": 1}, ["bob/ink-wash"]),
    ],
    ids=str,
)
def test_all_that_is_given_must_hold(filled, question, answer):
    found = lorahub.search(**question)
    assert sorted(names(found)) == sorted(answer) or len(found) == question.get("limit")


def test_pages_are_followed_as_far_as_the_limit_and_no_further(double, filled):
    double.site.page_size = 2
    for count in range(9):
        double.repo(f"many/a{count}").commit(WEIGHTS | {"README.md": card(base_model="org/base", tags=["lora"])})
    double.log.clear()
    assert len(set(names(lorahub.search(base="org/base", limit=5)))) == 5
    assert len(double.log) == 3
    double.log.clear()
    assert len(set(names(lorahub.search(base="org/base", limit=500)))) == 12
    assert len(double.log) == 6


def test_a_next_page_elsewhere_is_asked_of_the_same_hub_so_nothing_is_lost_and_no_token_goes_there(double, filled):
    def of_the_server_it_stands_for(asked, answer):
        reply = answer()
        link = reply.headers.get("Link", "")
        return _with_header(reply, "Link", re.sub("<https?://[^/]+", "<https://elsewhere.example", link))

    double.site.page_size = 1
    double.fault(of_the_server_it_stands_for, "/api/models", times=None)
    assert len(set(names(lorahub.search(base="org/base")))) == 3
    assert len(double.log) == 3  # here, and one to another name could not have been answered


@pytest.mark.parametrize(
    ("after", "asked"),
    [
        ("https://huggingface.co/api/models?cursor=x&a=%2F", "https://mirror.example/hf/api/models?cursor=x&a=%2F"),
        ("http://mirror.example/hf/api/models?cursor=x", "https://mirror.example/hf/api/models?cursor=x"),
        ("/hf/api/models?cursor=x", "https://mirror.example/hf/api/models?cursor=x"),
        ("//elsewhere.example/api/models?cursor=x", "https://mirror.example/hf/api/models?cursor=x"),
        ("?cursor=x", "https://mirror.example/hf/api/models?cursor=x"),
        ("https://mirror.example/hf/api/models?cursor=1", ""),  # the page that it is on
        ("", ""),
    ],
)
def test_a_mirror_is_asked_for_the_next_page_below_its_own_path(after, asked):
    client = HubClient(HfApi(endpoint="https://mirror.example/hf"))
    assert client._next("https://mirror.example/hf/api/models?cursor=1", after) == asked


def test_a_next_page_that_is_the_same_again_does_not_go_on_for_ever(double, filled):
    def again(asked, answer):
        return _with_header(answer(), "Link", f'<{asked.target}&again=1>; rel="next"')

    double.fault(again, "/api/models", times=None)
    assert len(lorahub.search(base="org/base", limit=100)) == 3
    assert len(double.log) == 2


def _with_header(reply, name, value):
    reply.headers = {**reply.headers, name: value}
    return reply


def test_a_failure_on_the_second_page_is_tried_again(double, filled):
    double.site.page_size = 2
    double.fault(Status(503), "/api/models", after=1, times=2)
    assert len(lorahub.search(base="org/base")) == 3


def test_a_long_rate_limit_is_told_and_not_sat_out(double, filled):
    double.fault(Status(429, {"RateLimit": '"api";r=0;t=250'}), "/api/models", times=None)
    with pytest.raises(Unavailable, match="250 seconds") as caught:
        lorahub.search("ink")
    assert [finding.code for finding in caught.value.findings] == ["rate-limited"]
    assert len(double.log) == 1


HOSTILE = [
    {"id": "../../x", "downloads": 1},
    {"id": "a/\x1b[31mred"},
    {"id": 7},
    {},
    "text",
    None,
    {"id": "ok/one", "downloads": "many", "likes": -1, "tags": 5, "lastModified": 9, "library_name": "\x1b]0;x\x07"},
    {"id": "ok/two", "tags": ["license:\x1b[31m", None, "base_model:adapter:../..", "base_model:adapter:org/base"]},
]


def test_answers_that_name_no_repository_are_left_out_and_the_rest_is_made_safe(double, filled, run):
    double.fault(Swap(json.dumps(HOSTILE).encode()), "/api/models", times=None)
    one, two = lorahub.search("ok")
    assert (one.repo, one.downloads, one.likes, one.tags, one.updated) == ("ok/one", None, None, (), "")
    assert (two.repo, two.base) == ("ok/two", "org/base")
    for arguments in (["search", "ok"], ["search", "ok", "--json"], ["search", "ok", "-q"]):
        code, out, err = run(*arguments)
        assert code == 0
        assert "\x1b" not in out + err


@pytest.mark.parametrize("body", [b"{}", b"7", b"null", b"<html>log in</html>", b"[" * 100_000, b'[{"id":'])
def test_an_answer_that_is_no_list_is_a_typed_error(double, filled, body):
    double.fault(Swap(body), "/api/models")
    with pytest.raises(Unavailable):
        lorahub.search("ink")


def test_an_answer_without_end_is_cut_off(double, filled, monkeypatch):
    monkeypatch.setattr("lorahub.hub.huggingface.client._LARGEST_ANSWER", 1000)
    double.fault(Swap(b"[" + b" " * 100_000 + b"]"), "/api/models")
    with pytest.raises(Unavailable):
        lorahub.search("ink")


def test_what_needs_the_network_does_not_send_people_to_the_cache(cache, make_adapter):
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        hub = HuggingFaceHub(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}", token=TOKEN, cache=cache)
        with pytest.raises(Offline) as searched:
            hub.search("ink")
        with pytest.raises(Offline) as pushed:
            hub.push(make_adapter(), Ref(repo="acme/ink"))
    assert "HF_HUB_OFFLINE" not in searched.value.hint + pushed.value.hint
    assert "Push again" in pushed.value.hint


def test_a_search_that_meets_a_login_page_names_the_hub_and_no_repository(double, filled):
    double.fault(Swap(b"<html>log in</html>"), "/api/models")
    with pytest.raises(Unavailable) as caught:
        lorahub.search("ink")
    assert f"open {double.endpoint} in" in caught.value.hint


def test_offline_nothing_is_asked(filled, offline):
    with pytest.raises(Offline):
        offline.search("ink")
    assert filled.log == []


def test_a_folder_answers_the_same_question(tmp_path, make_adapter, cache, monkeypatch):
    folder = FolderHub(tmp_path / "folder", cache=cache)
    for author, seed in (("acme", 1), ("bob", 2)):
        about = card(library_name="peft", license="mit", tags=["lora", author])
        about = about if isinstance(about, bytes) else about.encode()
        folder.push(
            make_adapter(author, seed=seed, files={"README.md": about}), Ref(repo=f"{author}/ink"), version="1.0"
        )
    where = str(tmp_path / "folder")
    monkeypatch.setenv("LORAHUB_CACHE", str(cache.root))
    (found,) = lorahub.search("INK", author="bob", library="peft", tags=["bob"], base="acme/base@main", hub=where)
    assert (found.repo, found.version, found.base, found.license) == ("bob/ink", "1.0", "acme/base", "mit")
    assert lorahub.search(tags=["nothing"], hub=where) == lorahub.search(library="diffusers", hub=where) == []
    assert names(lorahub.search(hub=where, limit=1)) == ["acme/ink"]
    with pytest.raises(UsageError):
        lorahub.search(hub=where, sort="beauty")


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_line_shows_a_table(filled, run):
    code, out, err = run("search", "ink", "--base", "org/base", "--sort", "updated")
    assert code == 0
    assert out.splitlines()[0].split()[:2] == ["NAME", "VERSION"]
    assert "bob/ink-wash" in out
    assert "mit" in out
    assert err == ""
    assert "more with --limit" in run("search", "ink", "--limit", "1")[2]


def test_quiet_prints_names_alone(filled, run):
    assert run("search", "--base", "org/base", "-q")[1].split() == ["bob/ink-wash", "acme/sumi-ink", "acme/ink"]


def test_the_json_keys_are_those_of_the_help(filled, run):
    (found,) = json.loads(run("search", "sumi", "--json")[1])
    keys = ["repo", "version", "base", "downloads", "likes", "updated", "library", "license", "tags", "gated"]
    assert list(found) == keys
    helped = " ".join(run("search", "--help")[1].split())
    assert all(key in helped for key in keys)


def test_nothing_found_says_what_to_try(filled, run):
    code, out, err = run("search", "--base", "org/none", "--tag", "x")
    assert (code, out) == (0, "")
    assert "lorahub search none" in err
    assert json.loads(run("search", "nothing-like-it", "--json")[1]) == []
    assert "--library peft" in run("search", "nothing-like-it")[2]
    assert "lorahub search 'no name' --author bob --library peft" in run("search", "no name", "--author", "bob")[2]


def test_the_orders_of_the_command_line_are_those_of_the_hub():
    from lorahub.cli import search as module
    from lorahub.hub.hub import SORTS

    assert module._SORTS == SORTS


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--sort", "beauty"], ["--base", "./here"]], ids=str)
def test_a_question_that_is_none_is_a_usage_error(filled, run, arguments):
    assert run("search", *arguments)[0] == 2


def test_gated_adapters_are_marked(double, filled, run, tmp_path: Path):
    double.repo("acme/ink").gate()
    assert "gated" in run("search", "ink")[1]
    double.fault(Edit(lambda found: [each.update(gated="manual") for each in found]), "/api/models")
    assert all(each.gated for each in lorahub.search("ink"))


def test_versions_that_are_known_here_are_listed_offline_and_said_to_be_those(double, filled, run, hub, make_adapter):
    hub.push(make_adapter(), Ref(repo="acme/fresh"), version="1.2.0")
    assert run("versions", "acme/fresh", "-q")[1].split() == ["1.2.0"]
    double.log.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        code, out, err = run("versions", "acme/fresh")
        assert run("versions", "acme/ink")[0] == 6
    assert (code, double.log) == (0, [])
    assert "1.2.0" in out
    assert "versions-from-cache" in err
