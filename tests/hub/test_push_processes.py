"""Publishing processes that are killed, and many at once: each version is published once, by one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hub.double import TOKEN, Asked, Double, Hangup, Reply
from hub.trained import trained_folder

import lorahub

KILLS = {
    "before anything": ("/whoami", "GET", False),
    "once the repository is made": ("/repos/create", "POST", True),
    "while bytes move": ("/upload/", "PUT", False),
    "before the commit": ("/commit/", "POST", False),
    "once the commit is made": ("/commit/", "POST", True),
    "while it is read back": ("/commits/", "GET", True),
    "before the tag": ("/tag/", "POST", False),
    "once the tag is made": ("/tag/", "POST", True),
}
"""When a process is killed -> part of the request's address, its method, whether it is applied all the same."""


@dataclass(slots=True)
class Stall:
    """Hold a request until its process is gone; then answer nothing, having done what was asked or not."""

    applied: bool
    reached: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def __call__(self, asked: Asked, answer) -> Reply:
        if self.applied:
            answer()
        self.reached.set()
        self.gone.wait(60)
        raise Hangup


def start(environment: dict[str, str], folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorahub", "push", "acme/ink", str(folder), "--version", "1.0.0", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("when", KILLS)
def test_a_push_that_is_killed_is_made_good_by_the_same_push(double: Double, environment, tmp_path, when: str):
    folder = trained_folder(tmp_path / "out")
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    part, method, applied = KILLS[when]
    stall = Stall(applied)
    double.fault(stall, part, method=method)
    killed = start(environment, folder)
    try:
        assert stall.reached.wait(60)
    finally:
        killed.kill()
        killed.communicate()
        stall.gone.set()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == left

    pin = lorahub.push(folder, "acme/ink", version="1.0.0", hub=double.endpoint, token=TOKEN).pin
    repo = double.repo("acme/ink")
    assert repo.tags == {"v1.0.0": pin.commit}
    assert repo.branches == {"main": pin.commit}
    assert len(repo.history()) == 2, "the hub's own commit, and one of ours"
    assert json.loads((folder / "lorahub.json").read_bytes())["version"] == "1.0.0"
    assert repo.files()["lorahub.json"] == (folder / "lorahub.json").read_bytes()
    assert [path for path in folder.rglob("*") if path.name.endswith(".partial")] == []


def test_of_several_that_publish_one_version_one_wins_and_the_other_is_told(double: Double, environment, tmp_path):
    double.repo("acme/ink").commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    folders = [trained_folder(tmp_path / f"out-{seed}", seed=seed) for seed in range(2)]
    racing = [start(environment, folder, "-q") for folder in folders]
    done = [(*process.communicate(timeout=120), process.returncode) for process in racing]
    repo = double.repo("acme/ink")
    won = [out.strip() for out, _, code in done if code == 0]
    assert won == [repo.tags["v1.0.0"]]
    (winner,) = (folder for folder, (*_, code) in zip(folders, done, strict=True) if code == 0)
    published = repo.files(repo.tags["v1.0.0"])
    assert published["adapter_model.safetensors"] == (winner / "adapter_model.safetensors").read_bytes()
    # a commit and its tag are two requests: who looks between them builds on a commit that is no version yet
    assert len(repo.history()) in {2, 3}
    assert all("Traceback" not in error and "Hint" in error for _, error, code in done if code)


def test_who_builds_on_a_commit_before_it_is_tagged_wins_and_the_other_is_told(double: Double, environment, tmp_path):
    double.repo("acme/ink").commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    first, second = (trained_folder(tmp_path / f"out-{seed}", seed=seed) for seed in range(2))
    stall = Stall(applied=False)
    double.fault(stall, "/tag/", method="POST")
    slow = start(environment, first, "-q")
    try:
        assert stall.reached.wait(60)
        pin = lorahub.push(second, "acme/ink", version="1.0.0", hub=double.endpoint, token=TOKEN).pin
    finally:
        stall.gone.set()
    _, error = slow.communicate(timeout=120)
    repo = double.repo("acme/ink")
    (theirs,) = (each for each in repo.history()[1:] if each.title.startswith("Publish"))
    assert slow.returncode == 1
    assert f"was made at commit {pin.commit[:12]} meanwhile" in error
    assert f"commit {theirs.oid[:12]} is published without a version" in error
    assert repo.tags == {"v1.0.0": pin.commit}
    assert repo.files()["adapter_model.safetensors"] == (second / "adapter_model.safetensors").read_bytes()


def test_several_that_publish_the_same_agree(double: Double, environment, tmp_path):
    double.repo("acme/ink").commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    folders = [trained_folder(tmp_path / f"out-{number}") for number in range(2)]
    racing = [start(environment, folder, "-q") for folder in folders]
    done = [(*process.communicate(timeout=120), process.returncode) for process in racing]
    repo = double.repo("acme/ink")
    assert {(out.strip(), code) for out, _, code in done} == {(repo.tags["v1.0.0"], 0)}, done
    assert len(repo.history()) == 2
