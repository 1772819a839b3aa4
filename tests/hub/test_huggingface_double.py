"""The Hugging Face Hub through its real client, against a small double on two local ports: the hub, and its CDN.

The double serves what resolving and pulling need, keeps a log of every request, and can be told to misbehave.  Regular
files come from the hub itself, weights by a redirect to the CDN, which is another origin and must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session

from lorahub.errors import (
    AccessDenied,
    DigestMismatch,
    IntegrityError,
    LorahubError,
    NotFound,
    Offline,
    PushRefused,
    Unavailable,
    UnsafePath,
    UsageError,
    WriteFailed,
)
from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

TOKEN = "hf_" + "s3cret0Tok3n" * 3
WEIGHTS = bytes(range(251)) * 13_000  # about 3 MiB: a few chunks
INK = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": WEIGHTS,
    "README.md": b"# Ink\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "optimizer.pt": b"pickle",
}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps(sorted((name, git_id(data)) for name, data in files.items())).encode()).hexdigest()


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    disabled: bool = False

    def commit(self, files: dict[str, bytes], tag: str = "", branch: str = "main") -> str:
        commit = commit_id(files)
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        if tag:
            self.tags[tag] = commit
        return commit


class Reply(Exception):
    """An answer, raised from wherever it is known."""

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Double:
    """The two servers and what they hold.

    Attributes:
        faults: part of a path -> called before the answer, may raise another.
        listing: changes a description before it is sent.
        cut, cuts_left: so many of the next longer bodies break off after so many bytes.
        flip: the CDN changes the first byte.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.faults: dict[str, Callable[[str], None]] = {}
        self.listing: Callable[[dict[str, object]], None] = lambda info: None
        self.cut = 0
        self.cuts_left = 0
        self.flip = False
        self.served = 0
        self.hub = self._serve("hub", self._hub)
        self.cdn = self._serve("cdn", self._cdn)

    def _serve(self, where: str, answer: Callable[[str], Reply]) -> ThreadingHTTPServer:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                double.log.append((where, self.path, headers))
                try:
                    for part, fault in double.faults.items():
                        if part in self.path:
                            fault(self.path)
                    reply = answer(self.path)
                except Reply as raised:
                    reply = raised
                double._send(self, reply, headers.get("range"))

            def log_message(self, *_: object) -> None:
                """Silence: the double keeps its own log."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def close(self) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def _hub(self, path: str) -> Reply:
        parts = urlsplit(path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 2:
            names = [{"id": name, "downloads": 7, "tags": []} for name in self.repos]
            return Reply(200, json.dumps(names).encode())
        api = parts[:2] == ["api", "models"]
        name, verb, rest = (
            ("/".join(parts[2:4]), parts[4], parts[5:]) if api else ("/".join(parts[:2]), parts[2], parts[3:])
        )
        repo = self.repos.get(name)
        if repo is None:
            raise Reply(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        if verb == "refs":
            return Reply(200, json.dumps(refs(repo, "include_prs" in path)).encode())
        revision = unquote(rest[0])
        commit = revision if revision in repo.commits else (repo.tags | repo.branches).get(revision)
        if commit is None:
            raise Reply(404, b"{}", X_Error_Code="RevisionNotFound")
        if verb == "revision":
            info = describe(name, repo, commit)
            self.listing(info)
            return Reply(200, json.dumps(info).encode())
        if repo.gated:
            raise Reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message=f"no access for {TOKEN}")
        data = repo.commits[commit].get(unquote("/".join(rest[1:])))
        if data is None:
            raise Reply(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if rest[-1].endswith(".safetensors"):
            sha = hashlib.sha256(data).hexdigest()
            place = f"http://127.0.0.1:{self.cdn.server_port}/{name}/{commit}/{'/'.join(rest[1:])}"
            return Reply(302, Location=place, X_Repo_Commit=commit, X_Linked_Etag=f'"{sha}"', ETag='"../../../evil"')
        return Reply(200, data, ETag='"../../../evil"', X_Repo_Commit="../../evil")

    def _cdn(self, path: str) -> Reply:
        namespace, name, commit, *rest = unquote(path).strip("/").split("/")
        data = self.repos[f"{namespace}/{name}"].commits[commit]["/".join(rest)]
        return Reply(200, bytes([data[0] ^ 1]) + data[1:] if self.flip else data, ETag='"../../../evil"')

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply, part: str | None) -> None:
        status, body = reply.status, reply.body
        if part is not None and status == 200:
            first, _, last = part.removeprefix("bytes=").partition("-")
            stop = int(last) + 1 if last else len(body)
            if int(first) >= len(body):
                status, body = 416, b""
            else:
                reply.headers["Content-Range"] = f"bytes {first}-{min(stop, len(body)) - 1}/{len(body)}"
                status, body = 206, body[int(first) : stop]
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cuts_left and len(body) > self.cut:
            self.cuts_left -= 1
            body = body[: self.cut]
            handler.close_connection = True
        try:
            handler.wfile.write(body)
        except OSError:  # the client hung up, as some tests make it do
            return
        self.served += len(body)

    def paths(self, where: str | None = None) -> list[str]:
        return [path for server, path, _ in self.log if where in {None, server}]


def refs(repo: Repo, pulls: bool) -> dict[str, object]:
    def each(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

    found: dict[str, object] = {
        "branches": each("heads", repo.branches),
        "tags": each("tags", repo.tags),
        "converts": [],
    }
    return found | ({"pullRequests": each("pr", repo.pulls)} if pulls else {})


def describe(name: str, repo: Repo, commit: str) -> dict[str, object]:
    siblings: list[dict[str, object]] = []
    for path, data in repo.commits[commit].items():
        entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git_id(data)}
        if path.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        siblings.append(entry)
    return {
        "_id": "0",
        "id": name,
        "sha": commit,
        "private": False,
        "gated": "auto" if repo.gated else False,
        "disabled": repo.disabled,
        "downloads": 7,
        "likes": 0,
        "tags": [],
        "spaces": [],
        "siblings": siblings,
    }


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "client-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "LORAHUB_CACHE", "LORAHUB_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lorahub.hub.download.PAUSES", (0.0, 0.0, 0.0))
    close_session()
    double = Double()
    yield double
    close_session()
    double.close()
    assert not [headers for where, _, headers in double.log if where == "cdn" and "authorization" in headers]


@pytest.fixture
def repo(double: Double) -> Repo:
    """acme/ink at v1.0.0 and v1.2.0, and a main that is ahead of both."""
    repo = double.repos["acme/ink"] = Repo()
    repo.commit(INK | {"README.md": b"first"}, "v1.0.0")
    repo.commit(INK, "v1.2.0")
    repo.commit(INK | {"README.md": b"unreleased"})
    return repo


@pytest.fixture
def hub(double: Double, cache: Cache) -> HuggingFaceHub:
    return HuggingFaceHub(api=HfApi(endpoint=double.endpoint, token=TOKEN), cache=cache)


@pytest.fixture
def offline(double: Double, cache: Cache) -> HuggingFaceHub:
    return HuggingFaceHub(api=HfApi(endpoint=double.endpoint), cache=cache, local_files_only=True)


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
    repo.pulls["3"] = repo.commit(INK | {"README.md": b"proposed"}, branch="elsewhere")
    assert hub.resolve(Ref.parse("acme/ink@refs/pr/3")).commit == repo.pulls["3"]


def test_a_pull_brings_what_belongs_to_an_adapter_and_nothing_else(double, repo, hub, cache):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink@1.2")))
    assert files_in(folder) == PULLED
    assert folder.name == "ink"
    assert not [path for path in double.paths() if "optimizer" in path or "gitattributes" in path]


def test_the_hub_sees_the_token_and_the_cdn_does_not(double, repo, hub):
    hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for where, _, headers in double.log if where == "hub")
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
    double.repos["acme/many"] = Repo()
    double.repos["acme/many"].commit(files, "v1.0")
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
    double.served = 0
    assert hub.read(pin, "adapter_model.safetensors", offset=8, length=100) == WEIGHTS[8:108]
    assert double.served < 1000
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
    assert [found.repo for found in hub.search("ink", base="acme/base")] == ["acme/ink"]
    assert "base_model%3Aadapter%3Aacme%2Fbase" in double.paths()[-1]


# ------------------------------------------------------------------------------------------- wrong bytes


def nothing_usable(cache: Cache) -> bool:
    return not list(cache.root.rglob("pin.json")) and not list(cache.root.rglob("*.safetensors"))


def test_a_flipped_byte_of_the_right_length_is_refused_and_nothing_is_kept(double, repo, hub, cache):
    double.flip = True
    pin = hub.resolve(Ref.parse("acme/ink"))
    with pytest.raises(DigestMismatch, match=r"adapter_model\.safetensors") as caught:
        hub.pull(pin)
    assert caught.value.exit_code == 5
    assert nothing_usable(cache)
    assert len(double.paths("cdn")) == 2  # once more, then no more
    double.flip = False
    assert files_in(hub.pull(pin)) == PULLED


def test_a_flipped_byte_that_does_not_come_again_is_repaired(double, repo, hub):
    double.flip = True
    double.faults["/acme/ink/resolve/"] = lambda path: setattr(double, "flip", double.flip and not double.paths("cdn"))
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == PULLED
    assert len(double.paths("cdn")) == 2


def test_a_regular_file_is_held_to_gits_own_hash(double, repo, hub, cache):
    def swap(info: dict[str, object]) -> None:
        for file in info["siblings"]:  # type: ignore[attr-defined]
            if file["rfilename"] == "adapter_config.json":
                file["blobId"] = git_id(b"something else")

    double.listing = swap
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json"):
        hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert nothing_usable(cache)


def test_a_body_that_breaks_off_is_gone_on_with_where_it_stopped(double, repo, hub):
    double.cut, double.cuts_left = 2_000_000, 1
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.served = 0
    assert files_in(hub.pull(pin)) == PULLED
    assert [headers.get("range") for where, _, headers in double.log if where == "cdn"][1].startswith("bytes=")
    assert double.served <= pin.size + (1 << 20)


def test_a_body_that_always_breaks_off_at_the_start_ends_in_an_error(double, repo, hub, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.cut = 0
    double.cuts_left = 10**6
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
    (headers,) = [headers for where, _, headers in double.log if where == "cdn"]
    assert int(headers["range"].removeprefix("bytes=").rstrip("-")) >= 2_000_000 - (1 << 20)


def test_a_longer_body_than_listed_is_refused_before_it_fills_the_disk(double, repo, hub, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    repo.commits[pin.commit]["adapter_config.json"] = b"x" * 5_000_000
    with pytest.raises(IntegrityError, match="more than"):
        hub.pull(pin)
    assert not list(cache.root.rglob("pin.json"))


def test_hostile_headers_decide_no_path(repo, hub, tmp_path):
    """Every answer of the double carries such an ETag, and regular files such a commit."""
    hub.pull(hub.resolve(Ref.parse("acme/ink")))
    assert not list(tmp_path.rglob("*evil*"))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# ------------------------------------------------------------------------------------------ hostile listings


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "a\\..\\evil.safetensors", "C:evil.safetensors", "/evil.safetensors"]
)
def test_a_hostile_name_in_the_listing_is_refused_before_anything_is_fetched(double, repo, hub, cache, name):
    double.listing = lambda info: info["siblings"].append(  # type: ignore[attr-defined]
        {"rfilename": name, "size": 4, "blobId": git_id(b"evil")}
    )
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
    double.listing = lambda info: info["siblings"][1].update(change)  # type: ignore[index]
    with pytest.raises(IntegrityError):
        hub.resolve(Ref.parse("acme/ink"))


def test_a_listing_beyond_all_size_is_refused_before_a_byte_moves(double, repo, hub):
    double.listing = lambda info: info["siblings"][0].update(size=1 << 40)  # type: ignore[index]
    with pytest.raises(IntegrityError, match="larger"):
        hub.resolve(Ref.parse("acme/ink"))


def test_an_answer_for_another_commit_is_refused(double, repo, hub):
    double.listing = lambda info: info.update(sha="0" * 40)
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
    def answer(path: str) -> None:
        raise Reply(200, body)

    double.faults["/revision/"] = answer
    with pytest.raises((Unavailable, IntegrityError)):
        hub.resolve(Ref.parse("acme/ink"))


# ------------------------------------------------------------------------------------------------- refusals


def test_a_gated_repository_says_where_to_ask(double, repo, hub, cache):
    repo.gated = True
    pin = hub.resolve(Ref.parse("acme/ink"))
    with pytest.raises(AccessDenied, match="gated") as caught:
        hub.pull(pin)
    assert f"{double.endpoint}/acme/ink" in caught.value.hint
    assert nothing_usable(cache)


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


def test_a_disabled_repository_is_refused(repo, hub):
    repo.disabled = True
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
    def fail(path: str) -> None:
        raise Reply(status, f'{{"error": "{TOKEN} \\u001b[31m"}}'.encode(), X_Error_Message=f"\x9b31m {TOKEN}")

    double.faults[part] = fail
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

    def fail(part: str) -> Callable[[str], None]:
        def once(path: str) -> None:
            if failures[part]:
                failures[part] -= 1
                raise Reply(503, b"", Retry_After="0")

        return once

    double.faults.update({part: fail(part) for part in failures})
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == PULLED
    assert not any(failures.values())


def test_a_long_wait_is_not_sat_out_but_told(double, repo, hub):
    def limit(path: str) -> None:
        raise Reply(429, b"", Retry_After="3600")

    double.faults["/refs"] = limit
    with pytest.raises(Unavailable, match="3600 seconds"):
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

    monkeypatch.setattr("lorahub.hub.download._fetch", full)
    with pytest.raises(WriteFailed, match="No space left"):
        hub.pull(pin)


def test_publishing_there_is_refused_with_the_way_that_works(hub, double, tmp_path):
    with pytest.raises(PushRefused) as caught:
        hub.push(tmp_path, Ref.parse("acme/ink"))
    assert "--hub" in caught.value.hint
    assert double.log == []


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
    repo = double.repos["acme/base"] = Repo()
    commit = repo.commit(BASE)
    other = repo.commit(BASE | {"README.md": b"new words"})
    pins = [hub.base_pin(Ref.parse(f"acme/base@{each}")) for each in (commit, other)]
    assert pins[0].digest() == pins[1].digest()  # another commit, the same weights
    assert pins[0].files["model.safetensors"].sha256 == hashlib.sha256(BASE["model.safetensors"]).hexdigest()
    assert not [path for path in double.paths() if "/resolve/" in path]
    repo.commit(BASE | {"model.safetensors": b"v" * 1000})
    assert hub.base_pin(Ref.parse("acme/base")).digest() != pins[0].digest()


def test_a_base_is_pulled_without_pickles_and_code(double, hub, offline):
    repo = double.repos["acme/base"] = Repo()
    commit = repo.commit(BASE, tag="v0.1")
    repo.commit(BASE | {"config.json": b'{"new": 1}'})
    ref = Ref.parse(f"acme/base@{commit}")
    folder = hub.pull_base(ref)
    assert set(files_in(folder)) == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert hub.base_pin(Ref.parse("acme/base")).commit == repo.branches["main"]  # the branch, whatever is tagged
    assert offline.pull_base(ref) == folder


def test_a_base_is_no_adapter(double, hub):
    double.repos["acme/base"] = Repo()
    double.repos["acme/base"].commit(BASE)
    with pytest.raises(NotFound, match="base model"):
        hub.resolve(Ref.parse("acme/base"))
