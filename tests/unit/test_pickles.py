"""What is in a PyTorch file comes out as safetensors: the same tensors under the same names, and nothing unsaid."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorahub.errors import NotFound, UnsupportedFormat, UsageError, WriteFailed
from lorahub.files.header import read_header
from lorahub.files.pickles import ORIGIN, left_out, unpack

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def saved(path: Path, value: Any, *, old: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_state_dict_keeps_its_names_and_bits(tmp_path: Path, target: Path, suffix: str, old: bool) -> None:
    state = OrderedDict((f"layer.{number}.weight", torch.randn(3, number + 1)) for number in range(4))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
    path = unpack(saved(tmp_path / f"adapter_model{suffix}", state, old=old), target)
    assert path == target / "adapter_model.safetensors"
    found = load_file(path)
    assert found.keys() == state.keys()
    assert all(same(found[name], state[name]) for name in state)
    assert read_header(path).metadata["format"] == "pt"
    assert left_out(read_header(path).metadata) == ()


def test_every_dtype_that_both_can_hold_comes_through(tmp_path: Path, target: Path) -> None:
    state = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES}
    found = load_file(unpack(saved(tmp_path / "x.pt", state), target))
    assert all(same(found[name], state[name]) for name in state)


def test_shared_and_strided_memory_is_written_each_for_itself(tmp_path: Path, target: Path) -> None:
    whole = torch.randn(8, 8)
    state = {
        "whole": whole,
        "tied": whole,
        "rows": whole[2:5],
        "turned": whole.T,
        "column": whole[:, 3],
        "none": whole[:0],
    }
    for old in (False, True):
        path = unpack(saved(tmp_path / "x.pt", state, old=old), target)
        found = load_file(path)
        assert all(same(found[name], state[name]) for name in state)
        assert len({found[name].data_ptr() for name in ("whole", "tied", "rows")}) == 3


def test_a_list_is_named_by_places_and_a_tensor_alone_is_one(tmp_path: Path, target: Path) -> None:
    listed = [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(12)]
    found = load_file(unpack(saved(tmp_path / "x.text_encoder.pt", listed), target))
    assert list(found) == [f"{place:03d}" for place in range(12)]
    assert all(same(found[f"{place:03d}"], each) for place, each in enumerate(listed))
    assert (target / "x.text_encoder.safetensors").is_file()
    assert list(load_file(unpack(saved(tmp_path / "y.pt", torch.ones(2)), target))) == ["tensor"]


def test_the_wrapping_of_a_checkpoint_is_taken_off_and_its_training_left_out(tmp_path: Path, target: Path) -> None:
    weight = torch.randn(2, 2)
    checkpoint = {
        "state_dict": {"a.weight": weight, "a.bias": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": weight}}}],
        "extra": {"vectors": [weight, {"deep": weight}], 7: weight},
        "epoch": 3,
        "loss": 0.25,
        "done": True,
        "nothing": None,
        "author": "somebody",
        "notes": "x" * 10_000,
        "tags": ("a", "b"),
        "raw": b"bytes",
        "lorahub": "ours",
        ("a", "tuple"): weight,
    }
    with pytest.raises(UnsupportedFormat, match=r"asks to load _codecs\.encode"):
        unpack(saved(tmp_path / "x.ckpt", checkpoint), target)
    del checkpoint["raw"]  # torch itself needs _codecs.encode for bytes
    path = unpack(saved(tmp_path / "x.ckpt", checkpoint), target)
    names = {"a.weight", "a.bias", "extra.vectors.000", "extra.vectors.001.deep", "extra.7"}
    assert load_file(path).keys() == names
    metadata = dict(read_header(path).metadata)
    about = json.loads(metadata.pop(ORIGIN))
    assert metadata == {
        "format": "pt",
        "epoch": "3",
        "loss": "0.25",
        "done": "true",
        "nothing": "null",
        "author": "somebody",
        "tags.000": "a",
        "tags.001": "b",
    }
    assert about["wrapper"] == "state_dict"
    left = {"lorahub", "notes", "optimizer_states", "the file under a key of type tuple"}
    assert set(left_out(read_header(path).metadata)) == left


def test_what_no_header_can_hold_is_left_out_and_said(tmp_path: Path, target: Path) -> None:
    checkpoint: dict[Any, Any] = {"w": torch.ones(1), "large": 1 << 1000, 1 << 1000: "under a number"}
    checkpoint |= {"half \ud800": 1, "text": "half \ud800", "x" * 5000: 1, "inner": {("a",): 1}}
    left = left_out(read_header(unpack(saved(tmp_path / "x.pt", checkpoint), target)).metadata)
    assert {"large", "text", "inner under a key of type tuple", "the file under a key of type int"} <= set(left)
    assert "'half \\ud800'" in left
    many = {"w": torch.ones(1)} | {f"note {number}": "\U0001f58b" * 200 for number in range(2000)}
    metadata = read_header(unpack(saved(tmp_path / "y.pt", many), target)).metadata
    assert len(metadata) == 502
    assert left_out(metadata)[-1] == "and 1000 more"


def test_configs_go_along_and_the_record_does_not(tmp_path: Path, target: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "lorahub.json").write_text("{}")
    (tmp_path / "x.bin.index.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "large.json").write_text(json.dumps({"x": "y" * (2 << 20)}))
    unpack(saved(tmp_path / "adapter_model.bin", {"w": torch.ones(1)}), target)
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (target / "adapter_config.json").read_bytes() == (tmp_path / "adapter_config.json").read_bytes()


def test_a_folder_with_one_such_file_stands_for_it(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(NotFound):
        unpack(source, target)
    saved(source / "adapter_model.bin", {"w": torch.ones(1)})
    assert unpack(source, target).name == "adapter_model.safetensors"
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model_head.bin"):
        (source / name).write_bytes(b"not looked at")
    (source / "folder.bin").mkdir()
    assert unpack(source, target).name == "adapter_model.safetensors"
    saved(source / "more.pt", {"w": torch.ones(1)})
    assert unpack(source, target).name == "adapter_model.safetensors"
    (source / "adapter_model.bin").rename(source / "adapter.bin")
    saved(source / "other.pt", {"w": torch.ones(1)})
    with pytest.raises(UsageError, match=r"adapter\.bin, more\.pt, other\.pt"):
        unpack(source, target)
    with pytest.raises(NotFound):
        unpack(source / "third.pt", target)
    with pytest.raises(NotFound):
        unpack(source / "other.pt", tmp_path / "nowhere")


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, target: Path) -> None:
    path = saved(tmp_path / "x.pt", {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16), "step": 1})
    first = unpack(path, target).read_bytes()
    assert unpack(path, target).read_bytes() == first


def test_a_disk_that_is_full_leaves_nothing_behind(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.ones(3)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorahub.files.writer.write_at", full)
    with pytest.raises(WriteFailed, match="No space left"):
        unpack(path, target)
    assert list(target.iterdir()) == []


def test_a_file_is_never_held_whole(tmp_path: Path, target: Path) -> None:
    saved(tmp_path / "x.pt", {str(number): torch.full((1 << 20,), float(number)) for number in range(32)})  # 128 MB
    script = (
        "import sys, torch\n"
        "from lorahub.files.pickles import unpack\n"
        "from pathlib import Path\n"
        "torch.ones(4) @ torch.ones(4)\n"
        "def held():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(next(line.split()[1] for line in text.splitlines() if line.startswith('RssAnon')))\n"
        "before = held()\n"
        "unpack(sys.argv[1], sys.argv[2])\n"
        "print(held() - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("this platform has no /proc to ask how much is held")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "x.pt", target], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout)
    assert grown < 40_000  # KiB of 128 MB; a tensor is 4 MB
    assert load_file(target / "x.safetensors")["31"][-1] == 31


def test_without_torch_refusals_are_the_same_and_a_good_file_says_what_is_missing(tmp_path: Path, target: Path) -> None:
    good = saved(tmp_path / "good.bin", {"w": torch.ones(1)})
    evil = saved(tmp_path / "evil.bin", {"w": torch.ones(1), "path": Path()})
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from lorahub.files.pickles import unpack\n"
        "from lorahub.errors import LorahubError\n"
        "for path in sys.argv[1:3]:\n"
        "    try: unpack(path, sys.argv[3])\n"
        "    except LorahubError as error: print(type(error).__name__, error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, good, evil, target], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("MissingDependency torch is needed")
    assert "UnsupportedFormat" in second
    assert "pathlib" in second
