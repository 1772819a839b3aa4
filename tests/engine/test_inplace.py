"""Merging into the files of a base: which bytes change, what is refused, and what a killed run leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from lorahub.bases.framework import Edits
from lorahub.bases.open import survey_base
from lorahub.deltas.replace import Replace
from lorahub.engine.writing.inplace import merge_in_place, restored
from lorahub.errors import IntegrityError, NotFinite, NotFound, UsageError, WriteFailed
from lorahub.files import journal
from lorahub.files.header import read_header
from lorahub.files.journal import demand_settled, hold_settled, revert, settle


@pytest.fixture
def adapter(tools):
    return {
        "layers.0.q.weight": tools.lora(24, 16, seed=1),
        "layers.1.q.weight": tools.lora(24, 16, seed=2),
        "norm.weight": Replace(tools.weights(16, seed=3)),
    }


@pytest.fixture
def merge(tools):
    def run(base, files, adapter, **options):
        return merge_in_place(files, base.plan(adapter), tools.bring(adapter), threads=1, **options)

    return run


# --------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("keep_undo", [False, True])
def test_the_files_hold_afterwards_what_a_merge_to_a_new_folder_writes(
    base, adapter, tools, tmp_path, merge, shards, keep_undo
):
    files = base.save(tmp_path / "base", shards=shards)
    before = tools.contents(tmp_path / "base")
    expected = base.stream(files, tmp_path / "out", adapter)
    report = merge(base, files, adapter, keep_undo=keep_undo)
    weights = {name: data for name, data in tools.contents(tmp_path / "base").items() if "/" not in name}
    assert weights.keys() == before.keys()
    for name in files.headers:
        assert weights[name] == (tmp_path / "out" / name).read_bytes()
        assert weights[name] != before[name]
    assert dict(report.changes) == dict(expected.changes)
    assert (tmp_path / "base" / ".lorahub-undo-1").is_dir() is keep_undo
    assert not (tmp_path / "base" / journal.PENDING).exists()


def test_only_files_and_bytes_that_change_are_written(base, tools, tmp_path, merge):
    files = base.save(tmp_path / "base", shards=3)
    adapter = {"layers.0.q.weight": tools.lora(24, 16, seed=1)}
    stats = {name: (tmp_path / "base" / name).stat().st_mtime_ns for name in files.headers}
    report = merge(base, files, adapter)
    touched = {name for name in files.headers if (tmp_path / "base" / name).stat().st_mtime_ns != stats[name]}
    holder = next(name for name, header in files.headers.items() if "layers.0.q.weight" in header.tensors)
    assert touched == {holder}
    assert report.bytes_written == 24 * 16 * 2
    assert report.bytes_read == 24 * 16 * 2


def test_a_unit_that_stays_as_it_is_is_not_written(tools, tmp_path, merge):
    world = tools.World({"m.weight": tools.weights(8, 8)})
    files = world.save(tmp_path / "base")
    before = tools.contents(tmp_path / "base")
    zero = tools.lora(8, 8)
    report = merge(world, files, {"m.weight": type(zero)(zero.up * 0, zero.down, 1.0)})
    assert report.bytes_written == 0
    assert tools.contents(tmp_path / "base") == before


def test_small_files_are_replaced_with_the_weights(base, adapter, tools, tmp_path, merge):
    files = base.save(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes(b"old")
    companions = {"tokenizer.json": b"new", "sub/new.json": b"{}"}
    merge(base, files, adapter, companions=companions, keep_undo=True)
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == b"new"
    assert (tmp_path / "base" / "sub" / "new.json").read_bytes() == b"{}"
    revert(tmp_path / "base")
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == b"old"
    assert not (tmp_path / "base" / "sub" / "new.json").exists()


def test_the_journal_lies_where_no_survey_of_a_base_looks(base, adapter, tools, tmp_path, merge):
    files = base.save(tmp_path / "base")
    merge(base, files, adapter, keep_undo=True)
    assert survey_base(tmp_path / "base").others == ()
    assert read_header(tmp_path / "base" / "model.safetensors") == files.headers["model.safetensors"]


# --------------------------------------------------------------------------------------------------- taking it back


def test_undoing_merges_one_after_the_other_gives_back_every_byte(base, adapter, tools, tmp_path, merge):
    files = base.save(tmp_path / "base", shards=2)
    states = [tools.contents(tmp_path / "base")]
    for number in range(2):
        given = {name: delta for name, delta in adapter.items() if number or name != "norm.weight"}
        merge(base, files, given, companions={"said.json": str(number).encode()}, keep_undo=True)
        states.append({name: data for name, data in tools.contents(tmp_path / "base").items() if "undo" not in name})
    assert states[0] != states[1] != states[2]
    for state in (states[1], states[0]):
        report = restored(revert(tmp_path / "base"))
        assert report.changed
        assert {n: d for n, d in tools.contents(tmp_path / "base").items() if "undo" not in n} == state
    assert [path.name for path in (tmp_path / "base").iterdir() if path.is_dir()] == []
    with pytest.raises(NotFound, match="no kept journal"):
        revert(tmp_path / "base")


@pytest.mark.parametrize("what", ["weights", "small", "journal"])
def test_nothing_is_undone_where_something_changed_since(base, adapter, tools, tmp_path, merge, what):
    files = base.save(tmp_path / "base")
    merge(base, files, adapter, keep_undo=True, companions={"said.json": b"1"})
    path, at = {
        "weights": (tmp_path / "base" / "model.safetensors", -1),
        "small": (tmp_path / "base" / "said.json", 0),
        "journal": (tmp_path / "base" / ".lorahub-undo-1" / "old.bin", 5),
    }[what]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    before = tools.contents(tmp_path / "base")
    with pytest.raises(IntegrityError):
        revert(tmp_path / "base")
    after = tools.contents(tmp_path / "base")
    if what == "journal":  # found when it is decided already; the weights are as merged
        assert after["model.safetensors"] == before["model.safetensors"]
    else:
        assert after == before


# --------------------------------------------------------------------------------------------------- refusals


def _hard_link(path: Path) -> None:
    os.link(path, path.with_name("other"))


def _soft_link(path: Path) -> None:
    path.rename(path.with_name("blob"))
    path.symlink_to(path.with_name("blob"))


@pytest.mark.parametrize(
    ("share", "words"),
    [(_hard_link, "hard links"), (_soft_link, "is a link"), (lambda path: path.chmod(0o444), "read-only")],
)
def test_files_that_others_may_share_are_never_written(base, adapter, tools, tmp_path, merge, share, words):
    files = base.save(tmp_path / "base")
    share(tmp_path / "base" / "model.safetensors")
    before = tools.contents(tmp_path / "base")
    with pytest.raises(WriteFailed, match=words):
        merge(base, files, adapter)
    assert tools.contents(tmp_path / "base") == before


def test_a_merge_that_moves_tensors_or_edits_the_configuration_is_not_made_in_place(base, tools, tmp_path, merge):
    base.head = Edits(config={"num_labels": 3})
    files = base.save(tmp_path / "base")
    before = tools.contents(tmp_path / "base")
    with pytest.raises(UsageError, match=r"appear, disappear.*head\.weight"):
        merge(base, files, {"head.weight": Replace(tools.weights(3, 16))})
    base.head = Edits(config={"vocab_size": 53})
    with pytest.raises(UsageError, match="cannot be made in place"):
        merge(base, files, {"embed.weight": Replace(tools.weights(53, 16))})
    assert tools.contents(tmp_path / "base") == before


def test_a_result_that_is_not_finite_leaves_every_byte(base, adapter, tools, tmp_path, merge):
    adapter["norm.weight"].value[3] = float("inf")
    files = base.save(tmp_path / "base", shards=3)
    before = tools.contents(tmp_path / "base")
    with pytest.raises(NotFinite, match=r"norm\.weight"):
        merge(base, files, adapter)
    assert tools.contents(tmp_path / "base") == before


def test_one_run_at_a_time_has_the_folder(base, adapter, tmp_path, merge):
    files = base.save(tmp_path / "base")
    lock, _ = hold_settled(tmp_path / "base")
    with pytest.raises(WriteFailed, match="another run"):
        merge(base, files, adapter)
    lock.release()
    merge(base, files, adapter)


def test_a_journal_that_is_none_of_ours_is_named_and_left(base, tmp_path):
    base.save(tmp_path / "base")
    (tmp_path / "base" / journal.PENDING).mkdir()
    (tmp_path / "base" / journal.PENDING / "journal.json").write_text('{"version": 9}')
    with pytest.raises(IntegrityError, match="no journal that can be read"):
        settle(tmp_path / "base")
    with pytest.raises(IntegrityError, match="interrupted"):
        survey_base(tmp_path / "base")


@pytest.mark.parametrize(
    "body",
    [
        {"ranges": [["../x", 0, 1, 0, 0, 0]], "sizes": {"../x": 1}},
        {"ranges": [["/x", 0, 1, 0, 0, 0]], "sizes": {"/x": 1}},
        {"ranges": [["sub/x", 0, 1, 0, 0, 0]], "sizes": {"sub/x": 1}},
        {"ranges": [["x", 1, 1, 0, 0, 0]], "sizes": {"x": 1}},
        {"ranges": [["x", -1, 1, 0, 0, 0]], "sizes": {"x": 1}},
        {"ranges": [["x", "0", 1, 0, 0, 0]], "sizes": {"x": 1}},
        {"ranges": [["x", 0, 1, 0, 0]], "sizes": {"x": 1}},
        {"ranges": [["y", 0, 1, 0, 0, 0]], "sizes": {"x": 1}},
        {"small": {"../x": True}},
        {"small": {"away/x": True}},
        {"small": 7},
    ],
)
def test_a_journal_cannot_name_what_lies_outside_its_folder(tmp_path, body):
    folder, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = folder / journal.PENDING
    place.mkdir(parents=True)
    (folder / "away").symlink_to(elsewhere)
    (folder / "x").write_bytes(b"1")
    whole = {"version": 1, "ranges": [], "sizes": {}, "small": {}, "about": {}, **body}
    (place / "journal.json").write_text(json.dumps(whole))
    (place / "new.bin").write_bytes(b"2")
    (place / "new.bin.d" / "away").mkdir(parents=True)
    (place / "new.bin.d" / "away" / "x").write_bytes(b"2")
    with pytest.raises(IntegrityError):
        settle(folder)
    assert (folder / "x").read_bytes() == b"1"
    assert list(elsewhere.iterdir()) == []


def test_a_journal_that_no_merge_wrote_has_no_report():
    with pytest.raises(IntegrityError, match="nothing of a merge"):
        restored({})


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "rename", "mkdir"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_disk_that_refuses_leaves_old_bytes_or_is_gone_on_from(
    base, adapter, tools, tmp_path, monkeypatch, merge, call, number
):
    files = base.save(tmp_path / "base", shards=2)
    before = tools.contents(tmp_path / "base")
    base.stream(files, tmp_path / "expected", adapter)
    real, left = getattr(os, call), [number]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, full)
    refused = None
    try:
        merge(base, files, adapter)
    except WriteFailed as error:
        refused = error
    monkeypatch.undo()
    if refused and not (tmp_path / "base" / journal.PENDING).exists():
        assert tools.contents(tmp_path / "base") == before
        merge(base, files, adapter)
    elif refused:
        assert "decided" in str(refused)
        with pytest.raises(IntegrityError, match="partly old, partly new"):
            demand_settled(tmp_path / "base")
        assert restored(settle(tmp_path / "base")).changed == 3
    for name in files.headers:
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


# --------------------------------------------------------------------------------------------------- killed runs


KILLER = """
import json, shutil, sys
from pathlib import Path

from engine import conftest as doubles
from killing import run
from lorahub.engine.writing.inplace import merge_in_place
from lorahub.files.journal import revert, settle

folder, undo, step, calls = Path(sys.argv[1]), sys.argv[2] == "undo", int(sys.argv[3]), sys.argv[4:]
world = doubles.World({f"m.{n}.weight": doubles.weights(8 + n, 8, seed=n) for n in range(4)})
adapter = {f"m.{n}.weight": doubles.lora(8 + n, 8, seed=n) for n in range(3)}
world.save(folder / "base", shards=2)
(folder / "base" / "tokenizer.json").write_bytes(b"old")
companions = {"tokenizer.json": b"new", "said.json": b"{}"}


def merge(place):
    options = {"companions": companions, "keep_undo": undo, "threads": 1}
    merge_in_place(doubles.survey(place), world.plan(adapter), doubles.bring(adapter), **options)


shutil.copytree(folder / "base", folder / "merged")
if undo:
    merge(folder / "merged")
    shutil.copytree(folder / "merged", folder / "back")
    work = lambda place: revert(place)
    count = run(lambda: work(folder / "back"), calls)
else:
    work = merge
    count = run(lambda: work(folder / "merged"), calls)
results = []
for number in sorted({*range(1, count + 1, step), count}):
    place = folder / f"killed-{number}"
    shutil.copytree(folder / ("merged" if undo else "base"), place)
    killed = run(lambda: work(place), calls, number)
    settled = settle(place)
    results.append([number, killed, settled is not None])
print(json.dumps([count, results]))
"""
"""Merges in place, or undoing them, in child processes that kill themselves at their n-th call of the system."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["merge", "undo"])
def test_a_run_that_is_killed_at_any_call_is_completed_by_the_next_or_has_changed_nothing(
    tools, run_script, tmp_path, what, step
):
    (tmp_path / "work").mkdir()
    calls = ("fsync", "replace", "rename", "unlink", "rmdir", "pwrite", "mkdir")
    count, results = run_script(KILLER, tmp_path / "work", what, str(step), *calls)
    assert count > 15
    assert len(results) >= count // step

    def state(name: str) -> dict[str, bytes]:
        found = tools.contents(tmp_path / "work" / name)
        return {path: data for path, data in found.items() if not path.startswith(".lorahub-undo-")}

    old, new = state("base"), state("merged")
    assert old["tokenizer.json"] != new["tokenizer.json"]
    assert old.keys() < new.keys()
    before, after = (new, old) if what == "undo" else (old, new)
    outcomes = set()
    for number, killed, settled in results:
        assert killed == -signal.SIGKILL
        found = state(f"killed-{number}")
        assert found in (before, after)  # every byte, and no file more
        outcomes.add((found == after, settled))
        assert found == after or not settled
    assert outcomes >= {(False, False), (True, True)}
    firsts = [state(f"killed-{number}") == after for number, _, _ in results]
    assert firsts == sorted(firsts)  # once it is decided it stays decided
