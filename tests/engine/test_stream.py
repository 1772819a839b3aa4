"""Merging from disk to disk: files, names, resuming, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal

import pytest
import torch

from lorahub.bases.framework import Edits
from lorahub.deltas.replace import Replace
from lorahub.engine.writing.staging import Staging, staging_of
from lorahub.engine.writing.stream import stream_merge
from lorahub.errors import BaseMismatch, IntegrityError, NotFinite, UsageError, WriteFailed
from lorahub.files.atomic import is_partial
from lorahub.files.header import read_header
from lorahub.files.writer import StreamWriter


@pytest.fixture
def adapter(tools):
    return {
        "layers.0.q.weight": tools.lora(24, 16, seed=1),
        "layers.1.q.weight": tools.lora(24, 16, seed=2),
        "norm.weight": Replace(tools.weights(16, seed=3)),
    }


# --------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("shards", [1, 3])
def test_files_names_and_metadata_are_the_bases(base, adapter, tools, tmp_path, shards):
    base.stored = {"layers.0.q.weight": "model.layers.0.q.weight"}
    files = base.save(tmp_path / "base", shards=shards)
    base.stream(files, tmp_path / "out", adapter)
    before, after = tools.contents(tmp_path / "base"), tools.contents(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in files.headers:
        old, new = read_header(tmp_path / "base" / name), read_header(tmp_path / "out" / name)
        assert (list(new.tensors), new.metadata) == (list(old.tensors), {"format": "pt"})
    old, new = tools.read(tmp_path / "base"), tools.read(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"model.layers.0.q.weight", "layers.1.q.weight", "norm.weight"}
    assert not any(is_partial(path.name) for path in tmp_path.iterdir())


def test_the_index_counts_the_bytes_of_all_tensors(base, adapter, tmp_path):
    base.stream(base.save(tmp_path / "base", shards=2), tmp_path / "out", adapter)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in base.tensors.values())
    assert index["weight_map"].keys() == base.tensors.keys()


def test_the_report_counts_what_was_read_written_and_changed(base, adapter, tools, tmp_path):
    report = base.stream(base.save(tmp_path / "base"), tmp_path / "out", adapter, companions={"a.txt": b"12345"})
    assert report.bytes_read == sum(tensor.numel() * 2 for tensor in base.tensors.values())
    assert report.bytes_written == sum(map(len, tools.contents(tmp_path / "out").values()))
    assert dict(report.changes) == dict(base.merge(base.live(), adapter).report.changes)
    assert report.resumed == 0


def test_companions_come_along_and_edits_are_made_to_the_configuration(base, tools, tmp_path):
    base.head = Edits(config={"num_labels": 3})
    files = base.save(tmp_path / "base")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    companions = {
        "tokenizer.json": tmp_path / "tokenizer.json",
        "pooling/config.json": b"pool",
        "config.json": '{"b": 1, "a": "ü"}'.encode(),
    }
    base.stream(files, tmp_path / "out", {"head.weight": Replace(tools.weights(3, 16))}, companions=companions)
    written = tools.contents(tmp_path / "out")
    assert written["tokenizer.json"] == b"{}"
    assert written["pooling/config.json"] == b"pool"
    assert list(json.loads(written["config.json"]).items()) == [("b", 1), ("a", "ü"), ("num_labels", 3)]
    base.stream(files, tmp_path / "bare", {"head.weight": Replace(tools.weights(3, 16))})
    assert json.loads(tools.contents(tmp_path / "bare")["config.json"]) == base.config | {"num_labels": 3}


@pytest.mark.parametrize("name", ["../x", "/x", "model.safetensors", "a/../b"])
def test_a_companion_cannot_leave_the_folder_or_pose_as_weights(base, adapter, tmp_path, name):
    files = base.save(tmp_path / "base")
    with pytest.raises(Exception, match=r"climbs out|is absolute|file of the weights"):
        base.stream(files, tmp_path / "out", adapter, companions={name: b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_new_parameters_go_to_the_last_shard_and_removed_ones_are_gone(base, tools, tmp_path):
    base.head = Edits(
        removed=("norm.weight",), renamed={"head.weight": "score.weight", "embed.weight": "bert.embed.weight"}
    )
    base.stored = {"norm.weight": "final_norm.weight"}
    files = base.save(tmp_path / "base", shards=2)
    value = tools.weights(3, 16, dtype=torch.float32)
    report = base.stream(
        files, tmp_path / "out", {"head.weight": Replace(value), "layers.0.q.weight": tools.lora(24, 16)}
    )
    written = tools.read(tmp_path / "out")
    assert written.keys() == {"score.weight", "bert.embed.weight"} | base.tensors.keys() - {
        "norm.weight",
        "embed.weight",
    }
    assert torch.equal(written["score.weight"], value)
    assert "score.weight" in read_header(tmp_path / "out" / "model-1-of-2.safetensors").tensors
    assert torch.equal(written["bert.embed.weight"], base.tensors["embed.weight"])
    assert (report.created, report.removed) == (("head.weight",), ("norm.weight",))


def test_a_shard_of_which_nothing_is_left_is_left_out(tools, tmp_path):
    world = tools.World({"a.weight": tools.weights(8, 8), "b.weight": tools.weights(8, 8)})
    world.head = Edits(removed=("b.weight",))
    world.stream(world.save(tmp_path / "base", shards=2), tmp_path / "out", {"c.weight": Replace(tools.weights(8))})
    assert tools.read(tmp_path / "out").keys() == {"a.weight", "c.weight"}


def test_a_parameter_in_another_shape_takes_the_place_of_the_old_one(base, tools, tmp_path):
    base.head = Edits(config={"vocab_size": 53})
    value = tools.weights(53, 16, seed=8)
    base.stream(base.save(tmp_path / "base"), tmp_path / "out", {"embed.weight": Replace(value)})
    assert torch.equal(tools.read(tmp_path / "out")["embed.weight"], value)


@pytest.mark.parametrize("changed", ["embed.weight", "lm_head.weight"])
@pytest.mark.parametrize("second_copy", [False, True])
def test_an_untied_parameter_is_stored_apart_with_the_value_each_name_should_have(
    base, tools, tmp_path, changed, second_copy
):
    base.tied = (("embed.weight", "lm_head.weight"),)
    base.apart = Edits(config={"tie_word_embeddings": False}, copied={"lm_head.weight": "embed.weight"})
    if second_copy:
        base.extras = {"lm_head.weight": base.tensors["embed.weight"].clone()}
    files = base.save(tmp_path / "base", shards=2)
    base.stream(files, tmp_path / "out", {changed: tools.lora(50, 16)}, allow=["tied-parameter"])
    written, before = tools.read(tmp_path / "out"), base.tensors["embed.weight"]
    other = {"embed.weight": "lm_head.weight", "lm_head.weight": "embed.weight"}[changed]
    assert torch.equal(written[other], before)
    assert not torch.equal(written[changed], before)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["tie_word_embeddings"] is False


def test_mixed_dtypes_stay_aligned_when_something_is_added(tools, tmp_path):
    world = tools.World({"a.weight": torch.ones(3, dtype=torch.int8), "b.weight": tools.weights(8, 8)}, head=Edits())
    world.stream(
        world.save(tmp_path / "base"), tmp_path / "out", {"c.weight": Replace(tools.weights(5, dtype=torch.float64))}
    )
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert all((header.data_start + info.start) % 8 == 0 for info in header.tensors.values() if info.dtype == "F64")
    assert tools.read(tmp_path / "out").keys() == {"a.weight", "b.weight", "c.weight"}


def test_a_shard_that_nothing_changes_is_copied_from_its_first_byte_to_its_last(base, tools, tmp_path, monkeypatch):
    files, whole = base.save(tmp_path / "base", shards=3), []
    real = StreamWriter.copy_whole
    monkeypatch.setattr(StreamWriter, "copy_whole", lambda *args: whole.append(real(*args)) or whole[-1])
    adapter = {"layers.0.q.weight": tools.lora(24, 16)}
    report = base.stream(files, tmp_path / "out", adapter)
    assert whole == [True, True]
    assert report.bytes_read == sum(tensor.numel() * 2 for tensor in base.tensors.values())
    monkeypatch.setattr(StreamWriter, "copy_whole", lambda *_: False)
    base.stream(files, tmp_path / "other", adapter)
    assert tools.contents(tmp_path / "out") == tools.contents(tmp_path / "other")


def test_a_file_of_another_layout_is_not_copied_whole(base, adapter, tools, tmp_path):
    base.save(tmp_path / "base")
    header = read_header(tmp_path / "base" / "model.safetensors")
    entries = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    for change in ({"extra": ("F32", [1])}, {"norm.weight": ("F16", [16])}):
        with StreamWriter(tmp_path / "x", {**entries, **change}, {"format": "pt"}) as out:
            assert not out.copy_whole(tmp_path / "base" / "model.safetensors")
    with StreamWriter(tmp_path / "x", entries, {"format": "pt"}) as out:
        assert out.copy_whole(tmp_path / "base" / "model.safetensors")
        assert out.commit().read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_a_damaged_file_of_an_earlier_run_is_made_again_though_nothing_shows_it_but_its_bytes(
    base, adapter, tools, tmp_path, monkeypatch
):
    files, out = base.save(tmp_path / "base", shards=3), tmp_path / "out"
    base.stream(files, tmp_path / "expected", adapter)
    _stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        base.stream(files, out, adapter)
    monkeypatch.undo()
    for number, path in enumerate(sorted(staging_of(out).glob("*.safetensors"))):
        stamp = path.stat()
        data = bytearray(path.read_bytes())
        data[-1 if number else read_header(path).data_start] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    report = base.stream(files, out, adapter)
    assert report.resumed == 0
    assert tools.contents(out) == tools.contents(tmp_path / "expected")


def test_weights_behind_links_are_read_through_them(base, adapter, tools, tmp_path):
    files = base.save(tmp_path / "blobs")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    import dataclasses

    base.stream(dataclasses.replace(files, folder=tmp_path / "base"), tmp_path / "out", adapter)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_progress_counts_bytes_and_ends_with_all(base, adapter, tools, tmp_path):
    seen = []
    stream_merge(
        base.save(tmp_path / "base", shards=2),
        base.plan(adapter),
        tools.bring(adapter),
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(tensor.numel() * 2 for tensor in base.tensors.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


# --------------------------------------------------------------------------------------------------- refusals


def test_an_out_folder_that_holds_something_is_never_touched(base, adapter, tmp_path):
    files = base.save(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(WriteFailed, match="not empty"):
        base.stream(files, out, adapter)
    with pytest.raises(WriteFailed, match="no folder"):
        base.stream(files, out / "mine.txt", adapter)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    base.stream(files, out, adapter)
    assert (out / "model.safetensors").is_file()


def test_the_base_itself_is_not_a_place_for_the_result(base, adapter, tools, tmp_path):
    files = base.save(tmp_path / "base")
    before = tools.contents(tmp_path / "base")
    with pytest.raises(WriteFailed):
        base.stream(files, tmp_path / "base", adapter)
    assert tools.contents(tmp_path / "base") == before


def test_a_plan_that_cannot_be_executed_writes_nothing(base, tools, tmp_path):
    files = base.save(tmp_path / "base")
    with pytest.raises(BaseMismatch):
        base.stream(files, tmp_path / "out", {"layers.0.q.weight": tools.lora(20, 16)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_base_that_changed_since_it_was_planned_is_refused(base, adapter, tools, tmp_path):
    files = base.save(tmp_path / "base")
    base.tensors["norm.weight"] = tools.weights(8)
    other = base.save(tmp_path / "other")
    base.tensors["norm.weight"] = tools.weights(16)
    with pytest.raises(IntegrityError, match=r"expects norm\.weight \[16\] BF16"):
        base.stream(other, tmp_path / "out", adapter)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "base" / "model.safetensors")
    with pytest.raises(IntegrityError, match="changed since"):
        base.stream(files, tmp_path / "out", adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_a_result_that_is_not_finite_leaves_nothing(base, adapter, tmp_path):
    adapter["norm.weight"].value[3] = float("inf")
    with pytest.raises(NotFinite, match=r"norm\.weight"):
        base.stream(base.save(tmp_path / "base", shards=3), tmp_path / "out", adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_missing_companion_is_said_before_anything_is_written(base, adapter, tmp_path):
    with pytest.raises(Exception, match=r"vocab\.txt cannot be read"):
        base.stream(base.save(tmp_path / "base"), tmp_path / "out", adapter, companions={"v": tmp_path / "vocab.txt"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_weights_of_no_base_are_refused(base, adapter, tmp_path):
    import dataclasses

    files = dataclasses.replace(base.save(tmp_path / "base"), headers={})
    with pytest.raises(UsageError, match="nothing to merge into"):
        base.stream(files, tmp_path / "out", adapter)


# --------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace", "rename"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_disk_that_refuses_leaves_nothing_at_out_and_the_next_run_succeeds(
    base, adapter, tools, tmp_path, monkeypatch, call, number
):
    files = base.save(tmp_path / "base", shards=3)
    base.stream(files, tmp_path / "expected", adapter, companions={"config.json": b"{}"})
    real, left = getattr(os, call), [number]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(os, call, full)
    refused = None
    try:
        base.stream(files, out, adapter, companions={"config.json": b"{}"})
    except WriteFailed as error:
        refused = error
    monkeypatch.undo()
    if refused:  # some calls are made fewer times than the number
        assert "No space left" in str(refused)
        assert "free some space" in refused.hint
        assert not out.exists()
    if not out.exists():
        base.stream(files, out, adapter, companions={"config.json": b"{}"})
    assert tools.contents(out) == tools.contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expected", "out"]


def test_a_limit_on_the_size_of_files_is_a_failed_write(tools, tmp_path):
    world = tools.World({"m.weight": tools.weights(300, 200)})
    files = world.save(tmp_path / "base")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(WriteFailed, match=r"model\.safetensors"):
            world.stream(files, tmp_path / "out", {"m.weight": tools.lora(300, 200)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# --------------------------------------------------------------------------------------------------- going on


def _stop_after(monkeypatch, commits: int) -> None:
    """Interrupt the run when so many shards are finished."""
    real, done = StreamWriter.commit, []

    def commit(self):
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(1)
        return real(self)

    monkeypatch.setattr(StreamWriter, "commit", commit)


def test_finished_shards_are_kept_and_not_written_again(base, adapter, tools, tmp_path, monkeypatch):
    files, out = base.save(tmp_path / "base", shards=3), tmp_path / "out"
    base.stream(files, tmp_path / "expected", adapter)
    expected = base.stream(files, tmp_path / "again", adapter)
    _stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        base.stream(files, out, adapter)
    monkeypatch.undo()
    assert not out.exists()
    kept = {path.name: path.stat().st_ino for path in staging_of(out).glob("*.safetensors")}
    assert len(kept) == 2
    report = base.stream(files, out, adapter)
    assert report.resumed == 2
    assert (report.changes, report.bytes_read, report.bytes_written) == (
        expected.changes,
        expected.bytes_read,
        expected.bytes_written,
    )
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert tools.contents(out) == tools.contents(tmp_path / "expected")
    assert not staging_of(out).exists()


@pytest.mark.parametrize("what", ["weight", "adapter", "base", "shard"])
def test_what_was_finished_for_something_else_is_done_again(base, adapter, tools, tmp_path, monkeypatch, what):
    files, out, weights = base.save(tmp_path / "base", shards=3), tmp_path / "out", [1.0]
    _stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        base.stream(files, out, adapter)
    monkeypatch.undo()
    if what == "weight":
        weights = [0.5]
    elif what == "adapter":
        adapter["norm.weight"].value[0] += 1
    elif what == "base":
        os.utime(tmp_path / "base" / "model-0-of-3.safetensors", ns=(1, 1))
    else:
        with min(staging_of(out).glob("*.safetensors")).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
    base.stream(files, tmp_path / "expected", adapter, weights=weights)
    report = base.stream(files, out, adapter, weights=weights)
    assert report.resumed == (1 if what == "shard" else 0)
    assert tools.contents(out) == tools.contents(tmp_path / "expected")


def test_one_run_at_a_time_has_a_destination(base, adapter, tmp_path):
    files, out = base.save(tmp_path / "base"), tmp_path / "out"
    held = Staging(out, {})
    with pytest.raises(WriteFailed, match="another run"):
        base.stream(files, out, adapter)
    held.release()
    base.stream(files, out, adapter)


def test_a_staging_folder_starts_afresh_where_its_journal_is_not_ours(tmp_path):
    out = tmp_path / "out"
    staging_of(out).mkdir()
    (staging_of(out) / "journal-0.json").write_text("not json")
    (staging_of(out) / "sub").mkdir()
    (staging_of(out) / "sub" / "x").write_text("x")
    staging = Staging(out, {"plan": "p"})
    assert dict(staging.finished) == {}
    assert [path.name for path in staging.folder.iterdir()] == ["journal-0.json"]
    staging.abandon(KeyboardInterrupt(), resumable=True)
    staging.release()
    assert not staging.folder.exists()


KILLER = """
import json, sys
from pathlib import Path

from engine import conftest as doubles
from killing import run

folder, step, calls = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
world = doubles.World({f"m.{n}.weight": doubles.weights(8 + n, 8, seed=n) for n in range(4)})
world.head = doubles.Edits(config={"x": 1})
adapter = {f"m.{n}.weight": doubles.lora(8 + n, 8, seed=n) for n in range(3)}
adapter["head.weight"] = doubles.Replace(doubles.weights(3, 8))
files = world.save(folder / "base", shards=2)
companions = {"config.json": b"{}", "sub/tokenizer.json": b"{}"}


def merge(out, kill_at=0):
    return run(lambda: world.stream(files, out, adapter, companions=companions), calls, kill_at)


count = merge(folder / "expected")
results = []
for number in sorted({*range(1, count + 1, step), count - 1, count}):
    parent = folder / f"killed-{number}"
    parent.mkdir()
    killed = merge(parent / "out", number)
    complete = (parent / "out").exists()
    again = 0 if complete else merge(parent / "out")
    results.append([number, killed, again, complete])
print(json.dumps([count, results]))
"""
"""Merges in child processes that kill themselves at their n-th call of the system, before it (n even) or after it."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_call_is_finished_by_the_next_with_the_same_bytes(
    tools, run_script, tmp_path, step
):
    (tmp_path / "work").mkdir()
    calls = ("fsync", "replace", "rename", "unlink", "pwrite", "posix_fallocate", "copy_file_range", "mkdir")
    count, results = run_script(KILLER, tmp_path / "work", str(step), *calls)
    assert count > 30
    assert len(results) >= count // step
    expected = tools.contents(tmp_path / "work" / "expected")
    for number, killed, again, complete in results:
        parent = tmp_path / "work" / f"killed-{number}"
        assert killed == -signal.SIGKILL
        assert again >= 0
        assert tools.contents(parent / "out") == expected
        assert [path.name for path in parent.iterdir()] == ["out"]
        assert not complete or number > count - 3  # the destination appears at the very end
