"""Processes that are killed while they lock and install, and several at once: the next run gives the same tree."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from manifest.team import Team

import lorahub

SYNC = "import lorahub, sys; lorahub.sync(manifest=sys.argv[1])"


def test_several_processes_at_once_install_one_and_the_same(locked: Team) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", SYNC, str(locked.folder)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [(run.communicate(timeout=120)[1], run.returncode) for run in runs]
    assert [code for _, code in ends] == [0] * 3, ends
    assert lorahub.verify().ok
    assert lorahub.sync(locked=True).done == dict.fromkeys(("ink", "own", "sql"), "kept")


DEATHS = """
import json, os, shutil, sys
from pathlib import Path

import lorahub
from killing import run
from lorahub.files.atomic import is_partial

CALLS = ["rename", "replace", "mkdir", "fsync", "unlink", "rmdir", "open", "link"]
folder, what = Path(sys.argv[1]), sys.argv[2]
files = {name: (folder / name).read_bytes() for name in ("lorahub.toml", "lorahub.lock") if (folder / name).exists()}


def tree():
    places = [path for path in folder.rglob("*") if path.is_file() and ".lorahub" not in path.parts]
    places = [path for path in places if not is_partial(path.name)]  # of a file beside others, free to remove
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in places}


def sync():
    lorahub.sync(manifest=folder)


def upgrade():
    lorahub.lock(manifest=folder, upgrade=True)
    lorahub.sync(manifest=folder)


def fresh():
    shutil.rmtree(folder / "adapters", ignore_errors=True)
    for name in ("lorahub.toml", "lorahub.lock"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if what == "upgrade":
        sync()


work = {"sync": sync, "upgrade": upgrade}[what]
fresh()
count = run(work, CALLS)
wanted = tree()
deaths, wrong = 0, []
step = (count // 10) | 1  # odd, so that some die before a call and some after one
for at in range(1, count + 1, step):
    fresh()
    deaths += run(work, CALLS, at) < 0
    for name in ("lorahub.toml", "lorahub.lock"):
        assert (folder / name).exists() or name not in files, at
    work()
    if (now := tree()) != wanted:
        wrong.append([at, [name for name in {*now, *wanted} if now.get(name) != wanted.get(name)]])
    left = [path.name for path in (folder / "adapters" / ".lorahub").iterdir() if path.name.endswith(".partial")]
    if left:
        wrong.append([at, left])
print(json.dumps([count, deaths, wrong]))
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")


@needs_fork
@pytest.mark.parametrize("what", ["sync", "upgrade"])
def test_a_run_killed_anywhere_is_finished_by_the_next(locked: Team, run_script, what: str) -> None:
    if what == "upgrade":
        locked.publish("acme/ink", "1.3.0", seed=4)
        locked.write(locked.manifest.read_text().replace('own = "./own"\n', ""))
    count, deaths, wrong = run_script(DEATHS, locked.folder, what)
    assert wrong == []
    assert deaths > 4
    assert count > 40


def test_a_real_command_killed_while_it_installs_is_finished_by_the_next(locked: Team) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lorahub.cli.main import main\n"
        "rename, left = Path.rename, int(sys.argv[1])\n"
        "def deadly(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, target)\n"
        "Path.rename = deadly\n"
        "main(sys.argv[2:])\n"
    )
    for at in (2, 3):
        shutil.rmtree(locked.folder / "adapters", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-c", script, str(at), "sync", "--manifest", str(locked.manifest)],
            check=False,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL
        lorahub.sync(locked=True)
        assert lorahub.verify().ok
