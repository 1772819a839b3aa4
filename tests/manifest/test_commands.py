"""The six commands: what is on stdout, what is said, exit codes, and the next command to type."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manifest.team import Run, Team, write_base

Invoke = Callable[..., Run]


def test_a_first_day_from_nothing_to_installed(team: Team, run: Invoke) -> None:
    team.publish("acme/ink", "1.2.0")
    added = run("add", "--base", "./base", "acme/ink:0.5")
    assert added.code == 0
    assert added.out.splitlines()[1].split()[:3] == ["+", "ink", "acme/ink@v1.2.0"]
    assert 'ink = { ref = "acme/ink@~=1.2", weight = 0.5 }' in team.manifest.read_text()
    synced = run("sync", "-q")
    assert synced.out == f"{team.folder / 'adapters' / 'ink'}\n"
    assert synced.err == ""
    assert run("verify").code == 0
    assert run("outdated").out.splitlines()[-1].split() == ["ink", "v1.2.0", "v1.2.0", "current"]
    assert run("remove", "ink").code == 0
    run("sync")
    assert [path.name for path in (team.folder / "adapters").iterdir()] == [".lorahub"]


def test_locking_prints_a_table_of_what_changed(locked: Team, run: Invoke) -> None:
    again = run("lock")
    assert (again.code, again.out) == (0, "")
    assert "up to date" in again.err
    locked.publish("acme/ink", "1.3.0", seed=4)
    changed = run("lock", "--upgrade")
    line = changed.out.splitlines()[0]
    assert line.startswith("~  ink  acme/ink@v1.2.0 ")
    assert "-> acme/ink@v1.3.0" in line
    assert "the newest that satisfies" in line


def test_one_or_several_can_be_upgraded(locked: Team, run: Invoke) -> None:
    for name, seed in (("ink", 4), ("sql", 5)):
        locked.publish(f"acme/{name}", "1.9.0", seed=seed)
    assert run("lock", "--upgrade", "sql").out.split()[1] == "sql"
    document = run("lock", "--upgrade", "ink", "--upgrade", "sql", "--json").json()
    assert [each["name"] for each in document["changes"]] == ["ink"]
    assert {each["verdict"] for each in document["adapters"]} == {"exact"}
    wrong = run("lock", "--upgrade", "oink")
    assert (wrong.code, wrong.out) == (2, "")
    assert "Did you mean 'ink'?" in wrong.err


def test_a_lock_behind_its_manifest_ends_with_3_and_what_to_type(locked: Team, run: Invoke) -> None:
    locked.write(locked.manifest.read_text().replace("acme/sql@1", "acme/sql@>=0"))
    for arguments in (("lock", "--check"), ("sync", "--locked")):
        refused = run(*arguments)
        assert refused.code == 3
        assert refused.out == ""
        assert "Hint: lorahub lock" in refused.err
    assert run("sync", "--frozen").code == 0
    error = run("lock", "--check", "--json").json()["error"]
    assert error["exit_code"] == 3
    assert [each["code"] for each in error["findings"]] == ["lock-outdated"]


def test_a_policy_ends_with_3_and_a_misfit_with_4(locked: Team, run: Invoke) -> None:
    text = locked.manifest.read_text()
    locked.write(f'{text}[policy]\nowners = ["bob"]\n')
    refused = run("lock")
    assert refused.code == 3
    assert 'ink is from acme, and owners = ["bob"]' in refused.err
    write_base(locked.folder / "wide", width=16)
    locked.write(text.replace("./base", "./wide"))
    misfit = run("sync")
    assert misfit.code == 4
    assert "ink" in misfit.err


def test_a_file_that_changed_ends_with_5_and_is_named(locked: Team, run: Invoke) -> None:
    run("sync")
    (locked.folder / "adapters" / "ink" / "adapter_config.json").write_text("{}")
    found = run("verify")
    assert found.code == 5
    assert "changed  ink/adapter_config.json" in found.out
    assert run("verify", "-q").out == "ink/adapter_config.json\n"
    assert run("verify", "--json").json()["ok"] is False


def test_nothing_that_can_be_asked_ends_with_6(locked: Team, run: Invoke, tmp_path: Path) -> None:
    locked.write('[adapters]\nink = "acme/ink"\n')
    run("lock")
    shutil.rmtree(locked.hub)
    found = run("outdated")
    assert "ink" in found.out
    assert run("lock", "--upgrade").code == 6
    assert run("sync", "--dest", tmp_path / "serve").code == 6


def test_without_a_manifest_every_command_says_how_to_begin(team: Team, run: Invoke) -> None:
    for command in ("lock", "sync", "verify", "outdated"):
        refused = run(command)
        assert refused.code == 2
        assert "Hint: lorahub add" in refused.err
    assert run("add").code == 2


def test_sync_to_a_place_tells_json_what_was_done(locked: Team, run: Invoke, tmp_path: Path) -> None:
    document = run("sync", "--dest", tmp_path / "serve", "--json").json()
    assert document["done"] == {"ink": "installed", "own": "installed", "sql": "installed"}
    assert document["folders"]["ink"] == str(tmp_path / "serve" / "ink")


@pytest.mark.parametrize("command", ["add", "remove", "lock", "sync", "verify", "outdated"])
def test_help_says_what_a_command_is_for(team: Team, run: Invoke, command: str) -> None:
    shown = run(command, "--help")
    assert shown.code == 0
    assert "--json" in shown.out


def test_no_torch_is_loaded_to_lock_and_install(locked: Team) -> None:
    script = (
        "import sys, json, lorahub\n"
        "lorahub.lock(upgrade=True); lorahub.sync(); lorahub.verify()\n"
        "lorahub.outdated(); lorahub.add('more=acme/ink')\n"
        "print(json.dumps('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is False


def test_a_name_that_could_drive_a_terminal_is_escaped(team: Team, run: Invoke) -> None:
    team.write('[adapters]\n"\\u001b]0;evil\\u0007" = "acme/ink"\n')
    refused = run("lock")
    assert refused.code == 2
    assert "\x1b" not in refused.err + refused.out
