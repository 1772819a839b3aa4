"""Whole adapters that are broken or mean harm: each is refused with its typed error, and nothing is written.

A case is a PEFT folder that would be fine, with one thing changed.  The whole table also runs in one process under
limits on memory and processor time, so a case that takes too much of either ends the test.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorahub.cli.main import main

IN, OUT, R = 16, 16, 4
STEM = "base_model.model.layers.0.q"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": 8,
    "target_modules": ["q"],
    "bias": "none",
    "task_type": None,
    "base_model_name_or_path": "acme/base",
}

Tensor = tuple[str, tuple[int, ...], bytes | None]
"""dtype, shape, bytes; None: as many as the shape asks for, of a pattern that is an ordinary number in every dtype."""

_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    entries, data = {}, bytearray()
    for key, (dtype, shape, content) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        values = content if content is not None else b"\x3c" * (_WIDTH[dtype] * count)
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def floats(*values: float, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    filled = [*values, *[0.5] * (count - len(values))]
    return "F32", shape, struct.pack(f"<{count}f", *filled)


def factors(a: tuple[int, ...] = (R, IN), b: tuple[int, ...] = (OUT, R), *, dtype: str = "F32") -> dict[str, Tensor]:
    return {f"{STEM}.lora_A.weight": (dtype, a, None), f"{STEM}.lora_B.weight": (dtype, b, None)}


Make = Callable[[Path], None]
WEIGHTS, JSON = "adapter_model.safetensors", "adapter_config.json"


def tensors(given: dict[str, Tensor], **config: Any) -> Make:
    """These tensors; and the config with these fields changed."""

    def make(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, given)
        (folder / JSON).write_text(json.dumps({**CONFIG, **config}))

    return make


def config(**fields: Any) -> Make:
    """The config with these fields changed."""
    return tensors(factors(), **fields)


def text(content: str | bytes) -> Make:
    """A config of this content."""

    def make(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, factors())
        (folder / JSON).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def placed(name: str, place: Callable[[Path], object]) -> Make:
    """One of the two files is something else."""

    def make(folder: Path) -> None:
        tensors(factors())(folder)
        (folder / name).unlink()
        place(folder / name)

    return make


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in factors().items()}


def record(content: str | bytes) -> Make:
    """A record of this content beside a sound adapter."""

    def make(folder: Path) -> None:
        tensors(factors())(folder)
        (folder / "lorahub.json").write_bytes(content.encode() if isinstance(content, str) else content)

    return make


BOMB = "(a+)+" * 20 + "$"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
GOOD = json.dumps(CONFIG)

CASES: dict[str, tuple[Make, int, str]] = {
    # the config is no config
    "config empty": (text(""), 5, "not JSON: Expecting value: line 1 column 1"),
    "config null": (text("null"), 5, "it is no object"),
    "config array": (text("[]"), 5, "it is no object"),
    "config number": (text("1"), 5, "it is no object"),
    "config cut off": (text(GOOD[:40]), 5, "not JSON: Unterminated string starting at: line 1 column 31"),
    "config of two objects": (text(GOOD + GOOD), 5, "not JSON: Extra data: line 1 column 147"),
    "config with a trailing comma": (text(GOOD[:-1] + ",}"), 5, "not JSON: Expecting property name enclosed in double"),
    "config with a field twice": (text(GOOD[:-1] + ',"r":64}'), 5, "the key 'r' appears twice"),
    "config with NaN": (text(GOOD[:-1] + ',"x":NaN}'), 5, "NaN is no finite number"),
    "config with Infinity": (text(GOOD[:-1] + ',"x":-Infinity}'), 5, "-Infinity is no finite number"),
    "config with a number too large": (text(GOOD[:-1] + ',"x":1e999}'), 5, "1e999 is no finite number"),
    "config with an endless integer": (text(GOOD[:-1] + ',"x":' + "9" * 5000 + "}"), 5, "an integer of 5,000 digits"),
    "config nested without end": (
        text(GOOD[:-1] + ',"x":' + "[" * 100_000 + "]" * 100_000 + "}"),
        5,
        "nested deeper than 32 levels",
    ),
    "config of objects without end": (text('{"x":' * 100_000 + "1" + "}" * 100_000), 5, "nested deeper than 32 levels"),
    "config larger than any": (
        text(GOOD[:-1] + ',"x":"' + "x" * (2 << 20) + '"}'),
        5,
        "1,048,577 bytes are more than the 1,048,576 allowed",
    ),
    "config in UTF-16": (text(GOOD.encode("utf-16")), 5, "not UTF-8, or half of a surrogate pair"),
    "config not in UTF-8": (text(b'{"peft_type":"LORA\xff"}'), 5, "not UTF-8, or half of a surrogate pair"),
    "config with a lone surrogate": (text(GOOD[:-1] + r',"x":"\ud800"}'), 5, "not UTF-8, or half of a surrogate pair"),
    "config is a pickle": (text(b"\x80\x04\x95\x10\0\0\0\0\0\0\0}."), 5, "not UTF-8, or half of a surrogate pair"),
    "config is a folder": (placed(JSON, Path.mkdir), 4, "holds PEFT tensors, but no adapter_config.json with a"),
    "config is a pipe": (placed(JSON, os.mkfifo), 4, "holds PEFT tensors, but no adapter_config.json with a"),
    "config is a link to a device": (
        placed(JSON, lambda path: path.symlink_to("/dev/zero")),
        4,
        "holds PEFT tensors, but no adapter_config.json with a",
    ),
    "config is a link to itself": (
        placed(JSON, lambda path: path.symlink_to(path)),
        4,
        "holds PEFT tensors, but no adapter_config.json with a",
    ),
    # fields of the wrong type or without sense
    "type unknown": (config(peft_type="SUPERLORA"), 4, "kind-unsupported"),
    "type in lower case": (config(peft_type="lora"), 4, "kind-unsupported"),
    "type a number": (config(peft_type=7), 4, "holds PEFT tensors, but no adapter_config.json with a"),
    "type null": (config(peft_type=None), 4, "holds PEFT tensors, but no adapter_config.json with a"),
    "type with an escape sequence": (config(peft_type="\x1b]0;owned\x07"), 4, "kind-unsupported"),
    "rank zero": (config(r=0), 5, "r says rank 0"),
    "rank negative": (config(r=-4), 5, "r says rank -4"),
    "rank another": (config(r=8), 5, "r says rank 8"),
    "rank a string": (config(r="4"), 5, "r should be a number, not '4'"),
    "rank a fraction": (config(r=4.5), 5, "r says rank 4.5"),
    "rank true": (tensors(factors((1, IN), (OUT, 1)), r=True), 5, "r should be a number, not True"),
    "rank null": (config(r=None), 0, ""),
    "rank beyond all numbers": (config(r=10**30), 5, "an integer of 31 digits"),
    "rank a list": (config(r=[4]), 5, "r should be a number, not"),
    "alpha a string": (config(lora_alpha="8"), 5, "lora_alpha should be a number, not '8'"),
    "alpha null": (config(lora_alpha=None), 5, "lora_alpha should be a number, not None"),
    "alpha true": (config(lora_alpha=True), 5, "lora_alpha should be a number, not True"),
    "alpha a list": (config(lora_alpha=[8]), 5, "lora_alpha should be a number, not"),
    "alpha beyond float64": (config(lora_alpha=10**400), 5, "an integer of 401 digits"),
    "alpha missing": (text(json.dumps({k: v for k, v in CONFIG.items() if k != "lora_alpha"})), 0, ""),
    "rank missing": (text(json.dumps({k: v for k, v in CONFIG.items() if k not in ("r", "lora_alpha")})), 0, ""),
    "rank_pattern a list": (config(rank_pattern=[4]), 5, "rank_pattern should map module names to numb"),
    "rank_pattern of strings": (config(rank_pattern={"q": "4"}), 5, "rank_pattern['q'] should be a number, not '4"),
    "rank_pattern that contradicts": (config(rank_pattern={"q": 64}), 5, "rank_pattern['q'] says rank 64"),
    "rank_pattern that explodes": (config(rank_pattern={BOMB: 4}), 0, ""),
    "rank_pattern that is no pattern": (config(rank_pattern={"(": 4}), 4, "config-unreadable"),
    "rank_pattern with a look-behind": (config(rank_pattern={"(?<=x)q": 4}), 4, "config-unreadable"),
    "rank_pattern with a back-reference": (config(rank_pattern={r"(q)\1": 4}), 4, "config-unreadable"),
    "rank_pattern of counted repeats": (
        config(rank_pattern={"((a{1,1000}){1,1000}){1,1000}": 4}),
        4,
        "config-unreadable",
    ),
    "rank_pattern of a megabyte": (config(rank_pattern={"a" * 900_000: 4}), 4, "config-unreadable"),
    "alpha_pattern that explodes": (config(alpha_pattern={"(.*)*" * 30 + "$": 4}), 0, ""),
    "alpha_pattern of lists": (config(alpha_pattern={"q": [4]}), 5, "alpha_pattern['q'] should be a number, not"),
    "alpha_pattern a string": (config(alpha_pattern="q"), 5, "alpha_pattern should map module names to num"),
    "targets a number": (config(target_modules=7), 5, "adapter_config.json: target_modules is 7, not a list of"),
    "targets of numbers": (config(target_modules=[7]), 5, "adapter_config.json: target_modules is [7], not a list of"),
    "targets an object": (
        config(target_modules={"q": 1}),
        5,
        'adapter_config.json: target_modules is {"q": 1}, not a list',
    ),
    "modules_to_save a number": (
        config(modules_to_save=7),
        5,
        "adapter_config.json: modules_to_save is 7, not a list of",
    ),
    "modules_to_save of objects": (
        config(modules_to_save=[{}]),
        5,
        "adapter_config.json: modules_to_save is [{}], not a list of",
    ),
    "use_dora a string": (config(use_dora="yes"), 5, "use_dora should be true or false, not 'yes' "),
    "use_dora without magnitudes": (config(use_dora=True), 5, "use_dora is true"),
    "use_rslora a string": (config(use_rslora="false"), 5, "use_rslora should be true or false, not 'fal"),
    "lora_bias without a bias": (config(lora_bias=True, surprise=True), 5, "lora_bias is true"),
    "a field nobody knows": (config(rotate_twice=True), 3, "config-unknown"),
    "bias a number": (config(bias=5), 5, "bias should be"),
    "a base-mutating start": (config(init_lora_weights="corda"), 4, "config-refused"),
    "layers replicated": (config(layer_replication=[[0, 1], [0, 1]]), 4, "compat-choice"),
    "layers replicated of no known list": (config(layer_replication=[[0, 1], [1, 3]]), 4, "layers-undeclared"),
    "layers replicated without end": (config(layer_replication=[[0, 10**18]]), 5, "asks for 1000000000000000000"),
    "one layer without end": (config(layer_replication=[[3, 4]] * 4000), 5, "has layer 3 4000 times"),
    "layers replicated backwards": (config(layer_replication=[[4, 0]]), 5, "[4, 0], which is no range of layers"),
    "layers replicated from the end": (config(layer_replication=[[-1, 2]]), 5, "[-1, 2], which is no range"),
    "layers replicated by threes": (config(layer_replication=[[0, 1, 2]]), 5, "is no list of [start, end] pairs"),
    "layers replicated by truth values": (config(layer_replication=[[False, True]]), 5, "is no list of [start"),
    "layers replicated by fractions": (config(layer_replication=[[0.0, 2.0]]), 5, "is no list of [start, end] pairs"),
    "layers replicated a number": (config(layer_replication=7), 5, "layer_replication = 7 is no list of [start, end]"),
    # tensors that are no factors
    "no tensors": (tensors({}), 4, "holds no tensors: its header is empty"),
    "single numbers only": (
        tensors({A: ("F32", (), None), B: ("F32", (), None)}),
        4,
        "holds single numbers only (2 of them): no factors, so",
    ),
    "half a pair": (tensors({A: ("F32", (R, IN), None)}), 5, "slot-missing"),
    "the other half": (tensors({B: ("F32", (OUT, R), None)}), 5, "slot-missing"),
    "factors of one dimension": (tensors(factors((R * IN,), (OUT * R,))), 5, "tensor-empty"),
    "factors of ZeRO-3": (tensors(factors((0,), (0,))), 5, "tensor-empty"),
    "factors without elements": (tensors(factors((0, IN), (OUT, 0)), r=0), 5, "tensor-empty"),
    "factors of three dimensions": (tensors(factors((2, R, IN), (2, OUT, R))), 5, "slot-misfit"),
    "ranks that differ": (tensors(factors((R, IN), (OUT, 2 * R))), 5, "slot-misfit"),
    "factors exchanged": (tensors(factors((OUT, R), (R, IN))), 5, "r says rank 4"),
    "a rank without end": (tensors({A: ("F32", (1 << 40, 0), b""), B: ("F32", (0, 1 << 40), b"")}), 5, "tensor-empty"),
    "factors of integers": (tensors(factors(dtype="I64")), 5, "slot-dtype"),
    "factors of truth values": (tensors(factors(dtype="BOOL")), 5, "slot-dtype"),
    "factors of bytes": (tensors(factors(dtype="U8")), 5, "slot-dtype"),
    "complex factors": (tensors(factors(dtype="C64")), 5, "slot-dtype"),
    "NaN": (tensors({A: floats(float("nan"), shape=(R, IN)), B: floats(shape=(OUT, R))}), 5, "NaN or infinity in"),
    "infinity": (tensors({A: floats(shape=(R, IN)), B: floats(float("inf"), shape=(OUT, R))}), 5, "NaN or infinity in"),
    "minus infinity": (
        tensors({A: floats(float("-inf"), shape=(R, IN)), B: floats(shape=(OUT, R))}),
        5,
        "NaN or infinity in",
    ),
    "NaN in half precision": (
        tensors({A: ("BF16", (R, IN), b"\xff" * (2 * R * IN)), B: floats(shape=(OUT, R))}),
        5,
        "NaN or infinity in",
    ),
    "NaN in eight bits": (
        tensors({A: ("F8_E4M3", (R, IN), b"\x7f" * (R * IN)), B: floats(shape=(OUT, R))}),
        5,
        "NaN or infinity in",
    ),
    "a sum beyond float32": (
        tensors({A: floats(*[3e38] * R * IN, shape=(R, IN)), B: floats(*[3e38] * OUT * R, shape=(OUT, R))}),
        5,
        "the largest number that F32 can hold",
    ),
    "another width": (tensors(factors((R, 2 * IN), (OUT, R))), 4, "shape-mismatch"),
    "another height": (tensors(factors((R, IN), (2 * OUT, R))), 4, "shape-mismatch"),
    # names
    "a module that is not there": (tensors(renamed("layers.0.q", "layers.9.q")), 4, "target-missing"),
    "a module that leads out": (tensors(renamed("layers.0.q", "../../../etc/passwd")), 5, "the tensor name"),
    "a module without a name": (
        tensors(renamed("base_model.model.layers.0.q.", "base_model.model..")),
        4,
        "target-missing",
    ),
    "a name of dots": (tensors(renamed("layers.0.q", "......")), 4, "target-missing"),
    "a name with a terminal's escapes": (
        tensors(renamed("layers.0.q", "layers.\x1b[2J\x1b]0;owned\x07.q")),
        5,
        "the tensor name",
    ),
    "a name with a line break": (
        tensors(renamed("layers.0.q", "layers.0.q\nall is well")),
        5,
        "the tensor name 'base_model.model.layers.0.q\\nall is",
    ),
    "a name that turns the text around": (tensors(renamed("layers.0.q", "layers.0.\u202eq")), 5, "the tensor name"),
    "a name of 100,000 letters": (tensors(renamed("layers.0.q", "q" * 100_000)), 5, "the tensor name"),
    "a name of 100,000 parts": (tensors(renamed("layers.0.q", "q." * 50_000 + "q")), 5, "the tensor name"),
    "a name that is a number of 5,000 digits": (
        tensors(renamed("layers.0.q", f"layers.{'9' * 5000}.q")),
        5,
        "the tensor name",
    ),
    "a prefix alone": (tensors({"base_model.model.": ("F32", (1,), None), **factors()}), 3, "key-unknown"),
    "a tensor nobody knows": (tensors({"extra": ("F32", (4,), None), **factors()}), 3, "key-unknown"),
    "an optimizer's state": (tensors({"optimizer.exp_avg": ("F32", (4, 4), None), **factors()}), 3, "key-unknown"),
    "two adapters": (tensors({**renamed("lora_A", "lora_A.a"), **renamed("lora_B", "lora_B.b")}), 5, "key-twice"),
    "two spellings of one factor": (tensors({**factors(), **renamed(".weight", ".default.weight")}), 5, "key-twice"),
    "20,000 modules that are not there": (
        tensors(
            {
                k.replace("layers.0", f"layers.{at}"): ("F32", (R, IN) if "A" in k else (OUT, R), None)
                for at in range(10, 10010)
                for k in (A, B)
            }
        ),
        4,
        "target-missing",
    ),
    # the files
    "weights are a folder": (placed(WEIGHTS, Path.mkdir), 4, "holds no weights: found adapter_config.json"),
    "weights are a pipe": (placed(WEIGHTS, os.mkfifo), 4, "holds no weights: found adapter_config.json"),
    "weights are a device": (
        placed(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        4,
        "holds no weights: found adapter_config.json",
    ),
    "weights are a link to nothing": (
        placed(WEIGHTS, lambda path: path.symlink_to("gone")),
        4,
        "holds no weights: found adapter_config.json",
    ),
    "weights are a pointer": (
        placed(WEIGHTS, lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
        5,
        "this is a Git LFS pointer, not the file itself",
    ),
    "weights are empty": (placed(WEIGHTS, Path.touch), 5, "the file is empty (0 bytes)"),
    "weights are a pickle": (
        placed(WEIGHTS, lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")),
        5,
        "this looks like a Python pickle",
    ),
    "no weights": (placed(WEIGHTS, lambda path: None), 4, "holds no weights: found adapter_config.json"),
    # the record
    "record empty": (record(""), 3, "record-invalid"),
    "record an array": (record("[]"), 3, "record-invalid"),
    "record of a later schema": (record(json.dumps({"schema_version": "9.0", "kinds": ["lora"]})), 3, "record-invalid"),
    "record nested without end": (record("[" * 100_000), 3, "record-invalid"),
    "record of another adapter": (
        record(
            json.dumps(
                {"schema_version": "1.0", "kinds": ["lora"], "files": {WEIGHTS: {"size": 1, "sha256": "0" * 64}}}
            )
        ),
        3,
        "record-stale",
    ),
    "record that leads out": (
        record(
            json.dumps(
                {"schema_version": "1.0", "kinds": ["lora"], "files": {"../../x": {"size": 1, "sha256": "0" * 64}}}
            )
        ),
        3,
        "record-invalid",
    ),
}

BOUNDED = {
    "rank_pattern that explodes": "matched in as many steps as the name has letters, and it matches nothing",
    "alpha_pattern that explodes": "as above",
    "rank null": "the tensors have the rank",
    "rank missing": "as above; alpha is what PEFT takes where nothing is said",
    "alpha missing": "PEFT's own default is taken",
}
"""Cases that sound bad and are not: merged, within the same limits."""


def write_base(folder: Path) -> Path:
    folder.mkdir()
    names = [f"layers.{layer}.{name}.weight" for layer in range(2) for name in "qv"]
    write_safetensors(folder / "model.safetensors", {name: floats(shape=(OUT, IN)) for name in names})
    return folder


def run(*arguments: str | Path) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("a command ends in SystemExit")


def attempts(folder: Path, capture: Callable[[], str]) -> Iterator[tuple[str, int, str]]:
    """Each case merged into a base: its name, the exit code, and what was said."""
    base = write_base(folder / "base")
    for at, (name, (make, *_)) in enumerate(CASES.items()):
        adapter, out = folder / str(at), folder / f"out{at}"
        adapter.mkdir()
        make(adapter)
        capture()
        code = run("merge", adapter, "--base", base, "-o", out)
        assert out.exists() == (code == 0), f"{name}: {out} was left behind"
        yield name, code, capture()


@pytest.mark.parametrize("name", CASES)
def test_a_broken_adapter_is_refused_for_its_reason_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    make, code, phrase = CASES[name]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    make(adapter)
    assert run("merge", adapter, "--base", write_base(tmp_path / "base"), "-o", out) == code
    said = capsys.readouterr().err
    assert phrase in said
    assert "\x1b" not in said
    assert (code == 0) == (name in BOUNDED)
    assert out.exists() == (code == 0)
    assert [each.name for each in tmp_path.iterdir() if "partial" in each.name] == []


@pytest.mark.parametrize("name", CASES)
def test_inspecting_a_broken_adapter_tells_or_refuses(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    CASES[name][0](adapter)
    code = run("inspect", adapter, "--json")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    if code == 0:
        assert json.loads(said.out)["format"] == "peft"
    else:
        assert json.loads(said.out or said.err)["error"]


LIMITED = f"""
import resource, runpy, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
cases = runpy.run_path({str(Path(__file__))!r})
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (held + (1 << 29), held + (1 << 29)))
with tempfile.TemporaryDirectory() as folder:
    print(sum(1 for _ in cases["attempts"](Path(folder), str)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this platform: limits are set as Linux counts them")
def test_all_of_them_take_little_memory_and_time(tmp_path: Path) -> None:
    environment = {**os.environ, "LORAHUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == str(len(CASES))
