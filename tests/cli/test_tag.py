"""``lorahub tag``: metadata change, tensors do not; whole or not at all; and nothing that others rely on goes stale."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorahub.errors import UsageError
from lorahub.files.header import read_header
from lorahub.files.writer import save_file
from lorahub.tagging import SHORT, tag

Cli = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in ("down_blocks_0_attentions_0_proj_in", "mid_block_attentions_0_proj_in"):
        stem = f"lora_unet_{module}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, 8, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(8, 4, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "shelf" / "ink.safetensors"
    path.parent.mkdir()
    return save_file(path, tensors, {"ss_output_name": "ink", "note": "old"})


def tensors_of(path: Path) -> bytes:
    return path.read_bytes()[read_header(path).data_start :]


def test_tensor_bytes_and_autov3_stay_and_the_metadata_are_what_was_asked_for(lorahub: Cli, file: Path) -> None:
    before = tensors_of(file)
    hashes = lorahub("inspect", file, "--hashes", "--json").json()["hashes"]
    run = lorahub(
        "tag", file, "trigger_words=ink wash, sumi-e", "base=acme/painter", "free.key=a=b", "--remove", "note"
    )
    assert run.code == 0, run.err
    assert tensors_of(file) == before
    after = lorahub("inspect", file, "--hashes", "--json").json()
    assert after["hashes"]["autov3"] == hashes["autov3"] == hashlib.sha256(before).hexdigest()[:12]
    assert after["hashes"]["autov2"] != hashes["autov2"]
    assert after["trigger_words"] == ["ink wash", "sumi-e"]
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {
            "ss_output_name": "ink",
            "ss_sd_model_name": "acme/painter",
            "modelspec.trigger_phrase": "ink wash, sumi-e",
            "modelspec.sai_model_spec": "1.0.1",
            "free.key": "a=b",
        }
    assert "modelspec.architecture" in run.err


def test_the_same_tags_give_the_same_bytes_whatever_the_order(lorahub: Cli, file: Path) -> None:
    other = file.with_name("other.safetensors")
    shutil.copy(file, other)
    assert lorahub("tag", file, "title=Ink", "author=Kim").code == 0
    assert lorahub("tag", other, "author=Kim").code == 0
    assert lorahub("tag", other, "title=Ink").code == 0
    assert file.read_bytes() == other.read_bytes()
    inode = file.stat().st_ino
    again = lorahub("tag", file, "title=Ink")
    assert "nothing to change" in again.out
    assert file.stat().st_ino == inode


def test_without_a_change_the_metadata_are_shown_and_long_ones_are_cut(lorahub: Cli, file: Path) -> None:
    tag(file, {"long": "x" * 5000})
    run = lorahub("tag", file)
    assert "ss_output_name" in run.out
    assert "(5,000 characters)" in run.out
    assert len(run.out) < 1000
    assert lorahub("tag", file, "--json").json()["metadata"]["long"] == "x" * 5000
    assert "author" in lorahub("tag", file, "author=Kim", "--show").out


@pytest.mark.parametrize(
    "pair",
    [
        "format=tf",
        "lorahub={}",
        "lorahub.modules={}",
        "__metadata__=x",
        "=x",
        "two words=x",
        "caf\u00e9=x",
        "bell\x07=x",
        f"{'k' * 201}=x",
        "note=\x1b]0;owned\x07",
        "note=\u202egnp.exe",
        "nothing",
    ],
)
def test_hostile_keys_and_values_are_refused_and_the_file_stays(lorahub: Cli, file: Path, pair: str) -> None:
    before = file.read_bytes()
    run = lorahub("tag", file, pair)
    assert run.code == 2
    assert "\x1b" not in run.err
    assert file.read_bytes() == before


def test_metadata_over_the_readers_limit_are_refused(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(UsageError, match="1048576"):
        tag(file, {"note": "x" * (1 << 20)})
    assert file.read_bytes() == before


def test_a_tag_that_would_change_the_arithmetic_is_refused(lorahub: Cli, file: Path) -> None:
    before = file.read_bytes()
    run = lorahub("tag", file, "ss_network_module=networks.lora", "ss_network_alpha=64")
    assert run.code == 2
    assert "another adapter" in run.err
    assert file.read_bytes() == before
    assert lorahub("tag", file, "ss_network_alpha=2").code == 0


def test_a_key_that_is_not_there_cannot_be_removed(lorahub: Cli, file: Path) -> None:
    run = lorahub("tag", file, "--remove", "gone")
    assert run.code == 2
    assert "gone" in run.err


def test_two_values_for_one_key_are_refused(lorahub: Cli, file: Path) -> None:
    assert lorahub("tag", file, "title=a", "modelspec.title=b").code == 2
    assert lorahub("tag", file, "title=a", "title=b").code == 2


def test_links_and_pulled_folders_are_left_alone(
    lorahub: Cli, file: Path, adapter: Path, base: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert lorahub("tag", link, "title=x").code == 2
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    hub = tmp_path / "hub"
    pushed = lorahub("push", "acme/ink", adapter, "--version", "1.0.0", "--hub", hub)
    assert pushed.code == 0, pushed.err
    folder = Path(lorahub("pull", "acme/ink", "--hub", hub).out.strip())
    run = lorahub("tag", folder, "title=x")
    assert run.code == 2
    assert "pulled" in run.err


def test_a_fresh_record_is_kept_fresh_and_a_stale_one_is_said_to_be(lorahub: Cli, adapter: Path, base: Path) -> None:
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    run = lorahub("tag", adapter, "title=Ink")
    assert run.code == 0, run.err
    assert "new digest" in run.err
    assert "record-stale" not in lorahub("inspect", adapter).err
    assert lorahub("check", adapter, "--base", base).code == 0

    config = json.loads((adapter / "lorahub.json").read_text())
    config["files"]["adapter_model.safetensors"]["sha256"] = "0" * 64
    (adapter / "lorahub.json").write_text(json.dumps(config))
    run = lorahub("tag", adapter, "title=Ink II")
    assert "stale before" in run.err
    assert "record-stale" in lorahub("inspect", adapter).err


def test_the_arithmetic_that_lorahub_wrote_into_the_header_is_kept(lorahub: Cli, adapter: Path, tmp_path: Path) -> None:
    from lorahub import load
    from lorahub.adapter import save

    save(load(adapter), tmp_path / "saved")
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    own = read_header(weights).metadata["lorahub"]
    assert lorahub("tag", weights, "author=Kim").code == 0
    assert read_header(weights).metadata["lorahub"] == own
    assert lorahub("tag", weights, "--remove", "lorahub").code == 2


def test_a_folder_with_several_files_asks_for_one(lorahub: Cli, file: Path) -> None:
    shutil.copy(file, file.with_name("b.safetensors"))
    assert lorahub("tag", file.parent, "title=x").code == 2


def test_permissions_are_kept(file: Path) -> None:
    file.chmod(0o640)
    tag(file, {"title": "x"})
    assert file.stat().st_mode & 0o777 == 0o640


def test_every_short_key_is_in_the_help_with_what_it_stands_for(lorahub: Cli) -> None:
    text = lorahub("tag", "--help").out
    assert [short for short, key in SHORT.items() if short not in text or key not in text] == []


def test_a_full_disk_leaves_the_file(lorahub: Cli, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = file.read_bytes()
    for name in ("pwrite", "write", "copy_file_range"):
        monkeypatch.setattr(os, name, full)
    run = lorahub("tag", file, "title=x")
    monkeypatch.undo()
    assert run.code == 1
    assert "space" in run.err.lower()
    assert file.read_bytes() == before
    assert [each.name for each in file.parent.iterdir()] == [file.name]


KILLER = """
import json, shutil, sys
from pathlib import Path

from killing import run
from lorahub.plugins import load_registry
from lorahub.tagging import tag

load_registry()
folder, work, calls = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]


def tagged(place, kill_at=0):
    return run(lambda: tag(place, {"title": "Ink", "note": "x" * 3000}), calls, kill_at)


shutil.copytree(folder, work / "expected")
count = tagged(work / "expected")
results = []
for number in range(1, count + 1):
    place = work / f"killed-{number}"
    shutil.copytree(folder, place)
    results.append([number, tagged(place, number)])
print(json.dumps(results))
"""
"""Tags copies of a folder in child processes that kill themselves at their n-th call of the system: before it where n
is even, after it where it is odd."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_any_call_leaves_the_old_file_or_the_new_one(
    lorahub: Cli, adapter: Path, base: Path, run_script: Callable[..., Any], tmp_path: Path
) -> None:
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    work = tmp_path / "work"
    work.mkdir()
    calls = ("fsync", "replace", "rename", "unlink", "pwrite", "copy_file_range", "fchmod", "open", "close")
    results = run_script(KILLER, adapter, work, *calls)
    assert len(results) >= 10
    weights, record = "adapter_model.safetensors", "lorahub.json"
    old, new = (
        {name: (place / name).read_bytes() for name in (weights, record)} for place in (adapter, work / "expected")
    )
    assert old[weights] != new[weights]
    assert old[record] != new[record]
    seen = set()
    for number, killed in results:
        place = work / f"killed-{number}"
        assert killed == -signal.SIGKILL
        now = {name: (place / name).read_bytes() for name in (weights, record)}
        assert now[weights] in (old[weights], new[weights])
        assert now[record] in (old[record], new[record])
        assert (now[weights], now[record]) != (old[weights], new[record])  # the record never runs ahead
        seen.add((now[weights] == new[weights], now[record] == new[record]))
        torn = now[weights] == new[weights] and now[record] == old[record]
        assert ("record-stale" in lorahub("inspect", place).err) is torn
        assert tag(place, {"title": "Ink", "note": "x" * 3000}).metadata["modelspec.title"] == "Ink"
        assert (place / weights).read_bytes() == new[weights]
    assert len(seen) == 3
