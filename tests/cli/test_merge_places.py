"""Where ``lorahub merge`` puts its result: one file, the base's own files, and several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.errors import Degraded, UsageError, WriteFailed
from lorahub.files.header import read_header
from lorahub.patching import settle_base, undo

NAMES = {  # as in a single-file diffusion checkpoint: no config beside it says what it is
    "model.diffusion_model.input_blocks.1.1.proj.weight": (24, 16),
    "first_stage_model.encoder.conv.weight": (8, 8),
    "cond_stage_model.out.weight": (16, 16),
}
TARGET = "model.diffusion_model.input_blocks.1.1.proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A single weights file among others, with metadata of its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(*shape, generator=generator) * 0.05).half() for name, shape in NAMES.items()}
    (tmp_path / "checkpoints").mkdir()
    save_file(tensors, tmp_path / "checkpoints" / "ink-v1.safetensors", {"modelspec.title": "Ink"})
    save_file(tensors, tmp_path / "checkpoints" / "another.safetensors")
    return tmp_path / "checkpoints" / "ink-v1.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA for one of its layers."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"base_model.model.{TARGET}.lora_A.weight": torch.randn(4, 16, generator=generator) * 0.1,
        f"base_model.model.{TARGET}.lora_B.weight": torch.randn(24, 4, generator=generator) * 0.1,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [TARGET.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _sum(checkpoint: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged tensors, in float64 and rounded once."""
    tensors, factors = load_file(checkpoint), load_file(adapter / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{TARGET}.lora_{which}.weight"].double() for which in "AB")
    assert (up @ down).norm() / tensors[f"{TARGET}.weight"].double().norm() > 1e-2
    tensors[f"{TARGET}.weight"] = (tensors[f"{TARGET}.weight"].double() + up @ down).half()
    return tensors


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_single_file_is_merged_to_a_single_file_with_its_names_and_metadata(lorahub, checkpoint, adapter, tmp_path):
    out = tmp_path / "merged.safetensors"
    run = lorahub("merge", adapter, "--base", checkpoint, "-o", out, "-q")
    assert run.code == 0, run.err
    assert _equal(load_file(out), _sum(checkpoint, adapter))
    header = read_header(out)
    assert header.metadata["modelspec.title"] == "Ink"
    said = json.loads(header.metadata["lorahub-merge"])
    assert [each["name"] for each in said["adapters"]] == ["adapter"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoints", "merged.safetensors"]
    again = lorahub("merge", adapter, "--base", checkpoint, "-o", out)
    assert again.code == 1
    assert "is there already" in again.err


def test_a_single_file_is_merged_to_a_folder_too(lorahub, checkpoint, adapter, tmp_path):
    run = lorahub("merge", adapter, "--base", checkpoint, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    assert _equal(load_file(tmp_path / "out" / "ink-v1.safetensors"), _sum(checkpoint, adapter))


def test_a_checkpoint_in_several_files_is_no_single_file(lorahub, checkpoint, adapter, tmp_path):
    tensors = load_file(checkpoint)
    base = tmp_path / "sharded"
    base.mkdir()
    weight_map = {name: f"model-{number}-of-3.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "x.safetensors")
    assert run.code == 2
    assert "3 files" in run.err
    assert not (tmp_path / "x.safetensors").exists()


def test_merging_in_place_says_so_beside_the_file_and_is_undone(lorahub, checkpoint, adapter):
    folder, before = checkpoint.parent, checkpoint.read_bytes()
    expected = _sum(checkpoint, adapter)
    run = lorahub("merge", adapter, "--base", checkpoint, "--in-place", "--keep-undo")
    assert run.code == 0, run.err
    assert _equal(load_file(checkpoint), expected)
    said = json.loads((folder / "ink-v1.safetensors.lorahub-merge.json").read_bytes())
    assert said["adapters"][0]["sha256"]
    assert said["earlier"] == []
    assert not (folder / "lorahub-merge.json").exists()
    twice = lorahub("merge", adapter, "--base", checkpoint, "--in-place")
    assert twice.code == 3
    assert "merged-already" in twice.err
    assert _equal(load_file(checkpoint), expected)
    back = lorahub("merge", "--undo", checkpoint)
    assert back.code == 0, back.err
    assert checkpoint.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["another.safetensors", "ink-v1.safetensors"]


def test_what_was_merged_before_is_kept_on_record(checkpoint, adapter):
    lorahub.merge(checkpoint, [adapter], in_place=True)
    lorahub.merge(checkpoint, [adapter], in_place=True, allow=["merged-already"])
    said = json.loads((checkpoint.parent / f"{checkpoint.name}.lorahub-merge.json").read_bytes())
    assert len(said["earlier"]) == 1
    assert said["allowed"] == ["merged-already"]
    assert said["base"]["weights"] != said["earlier"][0]["base"]["weights"]  # that of the merged one, not of the first


def test_the_files_of_a_hubs_cache_are_not_merged_into(lorahub, checkpoint, adapter, tmp_path):
    with pytest.raises(UsageError, match="cache"):
        settle_base("acme/base")
    (tmp_path / "linked.safetensors").symlink_to(checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(WriteFailed, match="is a link"):
        lorahub_merge(tmp_path / "linked.safetensors", adapter)
    assert checkpoint.read_bytes() == before


def lorahub_merge(base: Path, adapter: Path) -> None:
    lorahub.merge(base, [adapter], in_place=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ADAPTER", "--base", "BASE"],
        ["ADAPTER", "--base", "BASE", "--in-place", "-o", "x"],
        ["ADAPTER", "--in-place"],
        ["--base", "BASE", "-o", "x"],
        ["ADAPTER", "--undo", "BASE"],
    ],
)
def test_merge_wants_one_place_for_its_result(lorahub, checkpoint, adapter, arguments):
    named = {"ADAPTER": adapter, "BASE": checkpoint}
    before = checkpoint.read_bytes()
    run = lorahub("merge", *(named.get(each, each) for each in arguments))
    assert run.code == 2
    assert checkpoint.read_bytes() == before


KILLED = """
import os, signal, sys
import lorahub
from lorahub.files import journal

real = journal._write_file
def dies(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
journal._write_file = dies
lorahub.merge(sys.argv[1], [sys.argv[2]], in_place=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_the_command_of_a_killed_run_given_again_completes_it_and_does_not_merge_twice(lorahub, checkpoint, adapter):
    expected = _sum(checkpoint, adapter)
    done = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(adapter)], check=False)
    assert done.returncode < 0
    looked = lorahub("merge", adapter, "--base", checkpoint, "--plan")
    assert looked.code == 5
    assert "partly old, partly new" in looked.err
    run = lorahub("merge", adapter, "--base", checkpoint, "--in-place", "--json")
    assert run.code == 0, run.err
    assert _equal(load_file(checkpoint), expected)


def test_undoing_from_scripts_tells_what_is_as_before(checkpoint, adapter):
    lorahub.merge(checkpoint, [adapter], in_place=True, keep_undo=True)
    assert list(undo(checkpoint).changes) == [f"{TARGET}.weight"]
    with pytest.raises(Degraded):
        lorahub.merge(checkpoint, [adapter], in_place=True, keep_undo=True) and lorahub.merge(
            checkpoint, [adapter], in_place=True
        )


@pytest.mark.parametrize("world", [2])
def test_processes_that_are_started_together_write_one_checkpoint(lorahub, checkpoint, adapter, tmp_path, world):
    tensors = load_file(checkpoint)
    base = tmp_path / "sharded"
    base.mkdir()
    weight_map = {name: f"model-{number}-of-3.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert lorahub("merge", adapter, "--base", base, "-o", tmp_path / "one").code == 0
    command = [sys.executable, "-m", "lorahub", "merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    assert "parameters changed" in said[0]
    assert said[1] == ""
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
