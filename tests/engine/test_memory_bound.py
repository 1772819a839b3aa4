"""How much memory merging from disk takes: measured in a process of its own, whatever the base's and adapter's size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MERGE = """
import json, sys, threading
from pathlib import Path

folder = Path(sys.argv[1])
import torch
from lorahub import merging
from lorahub.files.writer import encode_header

torch.set_num_threads(2)


def sparse(path, entries):
    # A file of zeros that takes no room on the disk.
    header = encode_header(entries, {"format": "pt"})
    size = {"BF16": 2, "F32": 4}
    total = sum(size[dtype] * torch.Size(shape).numel() for dtype, shape in entries.values())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)


def make(name, modules, rows, cols, rank):
    base, adapter = folder / f"{name}-base", folder / f"{name}-adapter"
    base.mkdir()
    adapter.mkdir()
    weights = {f"m{n}.weight": ("BF16", (rows, cols)) for n in range(modules)}
    sparse(base / "model.safetensors", weights | {"head.weight": ("BF16", (rows, 1024))})
    factors = {"base_model.model.head.weight": ("F32", (rows, 1024))}  # a new head, as large as all the rest
    for n in range(modules):
        factors[f"base_model.model.m{n}.lora_A.weight"] = ("F32", (rank, cols))
        factors[f"base_model.model.m{n}.lora_B.weight"] = ("F32", (rows, rank))
    sparse(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "modules_to_save": ["head"]}
    config["target_modules"] = [f"m{n}" for n in range(modules)]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


base, adapter = make("tiny", 2, 64, 16, 4)
merging.merge(base, {"a": adapter}, out=folder / "tiny-out", threads=2)  # what is imported at first use is there now
base, adapter = make("large", 64, 65536, 16, 16)
plan = merging.plan(base, {"a": adapter})
before, peak, stop = anonymous(), [0], threading.Event()


def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())


watcher = threading.Thread(target=watch)
watcher.start()
merging.merge(base, {"a": adapter}, out=folder / "large-out", threads=2)
stop.set()
watcher.join()
size = (adapter / "adapter_model.safetensors").stat().st_size
print(json.dumps({"taken": peak[0] - before, "predicted": plan.peak_bytes(threads=2), "adapter": size}))
"""
"""Merges a small adapter and then one of 540 MB, and says how much anonymous memory the second took at most."""


@pytest.mark.skipif(sys.platform != "linux", reason="this platform has no /proc")
def test_anonymous_memory_does_not_grow_with_adapter_or_base(tmp_path):
    script = tmp_path / "merge.py"
    script.write_text(MERGE)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["adapter"] > 512e6  # held whole, it alone would be more
    assert said["taken"] <= said["predicted"] <= 256e6, said
