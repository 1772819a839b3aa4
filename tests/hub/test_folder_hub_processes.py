"""The folder hub under processes that race and processes that die: nothing torn, nothing lost, nothing half there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorahub.errors import PushRefused
from lorahub.files.atomic import is_partial
from lorahub.hub.cache import Cache
from lorahub.hub.folder import FolderHub
from lorahub.hub.hub import Pin
from lorahub.names import Ref

INK = Ref(repo="acme/ink")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def commits_of(root: Path) -> dict[str, dict[str, object]]:
    places = (root / "repos" / "acme" / "ink" / "commits").glob("*.json")
    return {place.stem: json.loads(place.read_bytes()) for place in places}


def refs_of(root: Path) -> dict[str, dict[str, str]]:
    place = root / "repos" / "acme" / "ink" / "refs.json"
    return json.loads(place.read_bytes()) if place.exists() else {"branches": {}, "tags": {}}


def assert_sound(root: Path) -> None:
    """Every ref names a commit, every commit behind it and every content in it is there and what it says."""
    refs, commits = refs_of(root), commits_of(root)
    for commit in {*refs["branches"].values(), *refs["tags"].values()}:
        at: object = commit
        while at is not None:
            for file in commits[at]["files"].values():
                blob = root / "blobs" / file["sha256"][:2] / file["sha256"]
                assert hashlib.sha256(blob.read_bytes()).hexdigest() == file["sha256"]
            at = commits[at]["parent"]


# ----------------------------------------------------------------------------------------------------- races

PUSH = """
import sys
from pathlib import Path
from lorahub.errors import PushRefused
from lorahub.hub.cache import Cache
from lorahub.hub.folder import FolderHub
from lorahub.names import Ref
root, cache, version, *folders = sys.argv[1:]
sys.stdin.readline()
hub = FolderHub(Path(root), cache=Cache(Path(cache)))
try:
    for folder in folders:
        print(hub.push(Path(folder), Ref(repo="acme/ink"), version=version or None).commit)
except PushRefused as error:
    print("refused", error.message)
"""


def race(script: str, arguments: list[list[str]]) -> list[list[str]]:
    """Lines of output of processes that all start at one signal."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *each], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for each in arguments
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return results


def test_pushes_from_several_processes_all_land_one_after_the_other(tmp_path, make_adapter):
    folders = [[str(make_adapter(f"{who}-{turn}", seed=10 * who + turn)) for turn in range(3)] for who in range(3)]
    root, cache = str(tmp_path / "hub"), str(tmp_path / "cache")
    printed = race(PUSH, [[root, cache, "", *mine] for mine in folders])
    commits = commits_of(tmp_path / "hub")
    assert sorted(commits) == sorted(commit for lines in printed for commit in lines)
    assert len(commits) == 9
    parents = [commit["parent"] for commit in commits.values()]
    assert len(set(parents)) == 9  # one line of history: no commit was built on twice, none was lost
    assert_sound(tmp_path / "hub")


def test_of_two_processes_with_one_version_one_wins_and_the_other_is_refused(tmp_path, make_adapter):
    folders = [str(make_adapter(f"adapter-{seed}", seed=seed, size=200_000)) for seed in range(3)]
    root, cache = str(tmp_path / "hub"), str(tmp_path / "cache")
    printed = [lines[0] for lines in race(PUSH, [[root, cache, "1.0.0", folder] for folder in folders])]
    assert sum(line.startswith("refused") for line in printed) == 2
    (winner,) = [line for line in printed if not line.startswith("refused")]
    assert refs_of(tmp_path / "hub")["tags"] == {"v1.0.0": winner}
    assert_sound(tmp_path / "hub")


PULL = """
import sys
from pathlib import Path
from lorahub.hub.cache import Cache
from lorahub.hub.folder import FolderHub
from lorahub.names import Ref
hub = FolderHub(Path(sys.argv[1]), cache=Cache(Path(sys.argv[2])))
sys.stdin.readline()
folder = hub.pull(hub.resolve(Ref(repo="acme/ink")))
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_pulls_of_one_pin_from_several_processes_all_give_the_whole_folder(tmp_path, cache, make_adapter):
    FolderHub(tmp_path / "hub", cache=cache).push(make_adapter(size=500_000), INK)
    printed = race(PULL, [[str(tmp_path / "hub"), str(tmp_path / "cache")]] * 3)
    assert printed == [["README.md adapter_config.json adapter_model.safetensors"]] * 3


# ---------------------------------------------------------------------------------------------------- deaths


def dies_at(step: int, action: Callable[[Callable[[], None]], None]) -> bool:
    """Run ``action`` in a process that is killed at its ``step``-th change to the disk; False if it never got there."""
    child = os.fork()
    if child == 0:
        left = step

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counting(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                count()
                return function(*arguments, **options)

            return call

        for name in ("replace", "rename", "fsync", "mkdir", "unlink"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            action(count)
        except BaseException:  # noqa: BLE001 - the parent hears of it; a second pytest must not run on
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_a_push_killed_anywhere_leaves_the_hub_as_it_was_and_runs_again(tmp_path, make_adapter):
    old, new = make_adapter("old", seed=1), make_adapter("new", seed=2)
    whole = FolderHub(tmp_path / "whole", cache=Cache(tmp_path / "cache"))
    whole.push(old, INK, version="1.0.0")
    wanted = whole.push(new, INK, version="2.0.0")
    steps = 0
    while True:
        steps += 1
        root = tmp_path / f"hub-{steps}"
        hub = FolderHub(root, cache=Cache(tmp_path / "cache"))
        before = hub.push(old, INK, version="1.0.0")
        killed = dies_at(steps, lambda _, root=root: push(root, new, "2.0.0"))
        assert_sound(root)
        refs = refs_of(root)
        assert refs["tags"] in ({"v1.0.0": before.commit}, {"v1.0.0": before.commit, "v2.0.0": wanted.commit})
        assert refs["branches"]["main"] == refs["tags"].get("v2.0.0", before.commit)  # both moved, or neither
        assert FolderHub(root).push(new, INK, version="2.0.0").commit == wanted.commit
        assert refs_of(root) == refs_of(tmp_path / "whole")
        assert_sound(root)
        if not killed:
            break
    assert steps > 15  # it really was killed at many places


def push(root: Path, folder: Path, version: str) -> None:
    FolderHub(root).push(folder, INK, version=version)


def test_what_a_killed_push_left_is_removed_by_a_push_on_another_day(tmp_path, make_adapter):
    root, folder = tmp_path / "hub", make_adapter("new", seed=2)
    FolderHub(root).push(make_adapter("old", seed=1), INK, version="1.0.0")
    steps, left = 0, []
    while not left:
        steps += 1
        assert dies_at(steps, lambda _: push(root, folder, "2.0.0"))
        left = [path for path in (root / "blobs").rglob("*") if is_partial(path.name)]
    (old,) = left
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    young = old.with_name(".lorahub-0123456789abcdef.partial")
    young.write_bytes(b"another push's")
    FolderHub(root).push(folder, INK, version="2.0.0")
    assert not old.exists()
    assert young.exists()
    young.unlink()
    assert_sound(root)


def test_a_first_push_killed_anywhere_can_be_run_again(tmp_path, make_adapter):
    folder = make_adapter()
    steps = 0
    killed = True
    while killed:
        steps += 1
        root = tmp_path / f"hub-{steps}"
        killed = dies_at(steps, lambda _, root=root: push(root, folder, "1.0.0"))
        pin = FolderHub(root).push(folder, INK, version="1.0.0")
        assert refs_of(root) == {"branches": {"main": pin.commit}, "tags": {"v1.0.0": pin.commit}}
        assert_sound(root)
    assert steps > 15


def test_a_pull_killed_anywhere_leaves_no_folder_and_runs_again(tmp_path, make_adapter, monkeypatch):
    source = make_adapter()
    pin = FolderHub(tmp_path / "hub").push(source, INK)
    monkeypatch.setattr("lorahub.hub.folder.CHUNK", 1000)  # so that it dies within a file too
    steps = 0
    killed = True
    while killed:
        steps += 1
        cache = Cache(tmp_path / f"cache-{steps}")
        killed = dies_at(steps, lambda count, cache=cache: pull(tmp_path / "hub", cache, pin, count))
        found = list(cache.root.rglob("pin.json"))
        for place in found:  # whatever may be taken for a pulled folder is one
            if not place.parent.name.endswith(".partial"):
                assert len(list((place.parent / "ink").iterdir())) == 3
        folder = FolderHub(tmp_path / "hub", cache=cache).pull(pin)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in source.iterdir()
        }
        assert not list(cache.root.rglob("*.partial"))
    assert steps > 15


def pull(root: Path, cache: Cache, pin: Pin, count: Callable[[], None]) -> None:
    FolderHub(root, cache=cache).pull(pin, progress=lambda *step: count())


def test_a_pull_that_goes_on_does_not_fetch_again_what_was_whole(tmp_path, make_adapter):
    pin = FolderHub(tmp_path / "hub").push(make_adapter(), INK)
    cache = Cache(tmp_path / "cache")
    told: list[str] = []

    def stop(path: str, done: int, total: int) -> None:
        told.append(path)
        if path == "adapter_model.safetensors":
            raise KeyboardInterrupt

    hub = FolderHub(tmp_path / "hub", cache=cache)
    with pytest.raises(KeyboardInterrupt):
        hub.pull(pin, progress=stop)
    assert told == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    told.clear()
    hub.pull(pin, progress=lambda path, done, total: told.append(path))
    assert "README.md" not in told


def test_a_refused_version_is_refused_before_any_content_is_copied(tmp_path, make_adapter):
    hub = FolderHub(tmp_path / "hub")
    hub.push(make_adapter(seed=1), INK, version="1.0.0")
    before = sorted((tmp_path / "hub").rglob("*"))
    with pytest.raises(PushRefused):
        hub.push(make_adapter(seed=2), INK, version="1.0.0")
    assert sorted((tmp_path / "hub").rglob("*")) == before
