"""The command line as a person meets it: stdout, stderr, exit codes, and the next command to type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorahub.__main__ import main as lorahub_entry
from lorahub.cli.main import main
from lorahub.files.writer import save_file

Cli = Callable[..., Any]
Make = Callable[..., Path]
LAYERS = 3

LAZY = """
import sys
from lorahub.cli.main import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {"torch", "pydantic", "rich", "huggingface_hub", "transformers", "lorahub.plugins"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_inspect_says_what_an_adapter_is(lorahub: Cli, adapter: Path) -> None:
    run = lorahub("inspect", adapter)
    assert run.code == 0
    assert "peft (adapter_model.safetensors)" in run.out
    assert "2 (alpha/r)" in run.out
    document = lorahub("inspect", adapter, "--json").json()
    assert document["kinds"] == ["lora"]
    assert [(row["targets"], row["modules"], row["rank"]) for row in document["rows"]] == [("q", LAYERS, 4)]


def test_a_missing_path_is_unavailable_with_a_hint(lorahub: Cli, tmp_path: Path) -> None:
    run = lorahub("inspect", tmp_path / "nothing")
    assert run.code == 6
    assert run.out == ""
    assert "nothing" in run.err
    assert "Hint:" in run.err


def test_a_misspelt_command_suggests_the_right_one(lorahub: Cli) -> None:
    run = lorahub("inspekt", "x")
    assert run.code == 2
    assert "inspect" in run.err


def test_errors_are_json_where_json_was_asked_for(lorahub: Cli, tmp_path: Path) -> None:
    run = lorahub("inspect", tmp_path / "nothing", "--json")
    error = run.json()["error"]
    assert run.code == 6
    assert error["type"] == "NotFound"


def test_plan_prints_and_writes_nothing(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    run = lorahub("merge", adapter, "--base", base, "--plan")
    assert run.code == 0, run.err
    assert "lora" in run.out
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


def test_merge_writes_the_sum_and_leaves_the_base_alone(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    untouched = (base / "model.safetensors").read_bytes()
    run = lorahub("merge", f"{adapter}:0.5", "--base", base, "-o", tmp_path / "out", "-q")
    assert run.code == 0, run.err
    assert run.out.strip() == str(tmp_path / "out")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in old.items():
        expected = weight.double()
        if name.endswith("q.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            up, down = factors[f"{stem}.lora_B.weight"].double(), factors[f"{stem}.lora_A.weight"].double()
            change = torch.stack([sum(up[:, k, None][i] * down[k] for k in range(4)) for i in range(len(up))])
            assert change.norm() / weight.norm() > 1e-2
            expected = expected + 0.5 * (8 / 4) * change
        assert torch.allclose(new[name].double(), expected, atol=1e-6)
    assert (base / "model.safetensors").read_bytes() == untouched


def test_merge_refuses_a_place_that_is_taken(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert run.code in {1, 2}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_a_base_of_another_width_is_incompatible(lorahub: Cli, adapter: Path, tmp_path: Path, make_base: Make) -> None:
    other = make_base("wide", width=24)
    run = lorahub("merge", adapter, "--base", other, "-o", tmp_path / "out")
    assert run.code == 4
    assert "shape-mismatch" in run.err
    assert not (tmp_path / "out").exists()
    assert lorahub("check", adapter, "--base", other).code == 4


def test_a_truncated_adapter_is_an_integrity_failure(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert run.code == 5
    assert "adapter_model.safetensors" in run.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_is_refused_until_it_is_allowed(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.layers.0.q.lora_mystery"] = torch.ones(3)
    save_file(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert run.code == 3
    assert "lora_mystery" in run.err
    assert "--allow key-unknown" in run.err
    assert lorahub("inspect", adapter).code == 0
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out", "--allow", "key-unknown")
    assert run.code == 0
    assert "allowed: key-unknown" in run.err
    assert "refused:" not in run.err


def test_an_unknown_config_field_that_may_change_the_maths_is_refused(
    lorahub: Cli, base: Path, tmp_path: Path, make_adapter: Make
) -> None:
    odd = make_adapter("odd", use_future_trick=True)
    run = lorahub("merge", odd, "--base", base, "-o", tmp_path / "out")
    assert run.code == 3
    assert "use_future_trick" in run.err
    quiet = make_adapter("quiet", use_future_trick=False)
    assert lorahub("merge", quiet, "--base", base, "-o", tmp_path / "out").code == 0


def test_a_nan_adapter_is_refused_and_nothing_is_written(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert run.code == 5
    assert not (tmp_path / "out").exists()


def test_check_tells_unrecorded_recorded_and_other_weights_apart(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path, make_base: Make
) -> None:
    unrecorded = lorahub("check", adapter, "--base", base, "--json")
    assert (unrecorded.code, unrecorded.json()["verdict"]) == (0, "unverified")
    assert "base-unrecorded" in unrecorded.out

    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    recorded = lorahub("check", adapter, "--base", base, "--json").json()
    assert "base-weights-equal" in {finding["code"] for finding in recorded["findings"]}

    other = make_base("other", seed=9)
    differs = lorahub("check", adapter, "--base", other)
    assert differs.code == 3
    assert "base-weights-differ" in differs.err
    refused = lorahub("merge", adapter, "--base", other, "-o", tmp_path / "out")
    assert refused.code == 3
    assert not (tmp_path / "out").exists()
    allowed = lorahub("merge", adapter, "--base", other, "-o", tmp_path / "out", "--allow", "base-weights-differ")
    assert allowed.code == 0


def test_a_stale_record_is_found_and_cannot_be_pushed(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    assert "record-stale" in lorahub("inspect", adapter).err
    pushed = lorahub("push", "acme/ink", adapter, "--version", "1.0.0", "--hub", tmp_path / "hub")
    assert pushed.code != 0
    assert "stale" in pushed.err
    assert lorahub("pull", "acme/ink", "--hub", tmp_path / "hub").code == 6


def test_push_then_pull_by_selector(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    pushed = lorahub("push", "acme/ink", adapter, "--version", "1.2.0", "--hub", hub)
    assert pushed.code == 0, pushed.err
    again = lorahub("push", "acme/ink", adapter, "--version", "1.2.0", "--hub", hub)
    assert again.code == 0, again.err
    for selector in ("", "@1", "@1.2", "@1.2.0", "@~=1.0", "@v1.2.0"):
        run = lorahub("pull", f"acme/ink{selector}", "--hub", hub)
        assert run.code == 0, run.err
        folder = Path(run.out.strip())
        assert run.out == f"{folder}\n"
        assert (folder / "adapter_model.safetensors").read_bytes() == (
            adapter / "adapter_model.safetensors"
        ).read_bytes()
        assert json.loads((folder / "lorahub.json").read_text())["version"] == "1.2.0"
    missing = lorahub("pull", "acme/ink@2", "--hub", hub)
    assert missing.code == 6
    assert "1.2.0" in missing.err
    merged = lorahub("merge", "acme/ink@1:0.5", "--base", base, "--hub", hub, "-o", tmp_path / "out")
    assert merged.code == 0, merged.err


def test_a_version_is_immutable(lorahub: Cli, adapter: Path, base: Path, tmp_path: Path, make_adapter: Make) -> None:
    hub = tmp_path / "hub"
    other = make_adapter("other", seed=5)
    for folder in (adapter, other):
        assert lorahub("record", folder, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    assert lorahub("push", "acme/ink", adapter, "--version", "1.0.0", "--hub", hub).code == 0
    assert lorahub("push", "acme/ink", other, "--version", "1.0.0", "--hub", hub).code != 0
    folder = Path(lorahub("pull", "acme/ink@1.0.0", "--hub", hub).out.strip())
    assert (folder / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_check_for_vllm_ends_in_the_command_that_fixes_it(
    lorahub: Cli, adapter: Path, tmp_path: Path, make_adapter: Make
) -> None:
    assert lorahub("check", adapter, "--for", "vllm").code == 0
    dora = make_adapter("dora", use_dora=True)
    tensors = load_file(dora / "adapter_model.safetensors")
    for layer in range(LAYERS):
        tensors[f"base_model.model.layers.{layer}.q.lora_magnitude_vector"] = torch.ones(16)
    save_file(dora / "adapter_model.safetensors", tensors, {"format": "pt"})
    run = lorahub("check", dora, "--for", "vllm")
    assert run.code == 4
    assert "lorahub merge" in run.err


def test_an_unknown_runtime_is_named_with_the_known_ones(lorahub: Cli, adapter: Path) -> None:
    run = lorahub("check", adapter, "--for", "vlm")
    assert run.code == 2
    assert "vllm" in run.err


def test_plugins_lists_what_is_built_in(lorahub: Cli) -> None:
    document = lorahub("plugins", "--json").json()
    assert {"lora", "dora", "ia3", "full", "replace"} <= set(document["kinds"])
    assert "peft" in document["formats"]


def test_completion_scripts_are_printed(lorahub: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_LORAHUB_COMPLETE" in lorahub("completion", shell).out


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "numpy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
from lorahub.cli.main import main
main(sys.argv[1:])
"""


def test_everything_but_computing_works_without_torch(adapter: Path, base: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    commands: list[tuple[list[str | Path], int]] = [
        (["inspect", adapter], 0),
        (["record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit"], 0),
        (["push", "acme/ink", adapter, "--version", "1.0.0", "--hub", hub], 0),
        (["pull", "acme/ink@1", "--hub", hub], 0),
        (["check", "acme/ink@1", "--base", base, "--hub", hub], 0),
        (["merge", "acme/ink@1", "--base", base, "--hub", hub, "--plan"], 0),
        (["merge", "acme/ink@1", "--base", base, "--hub", hub, "-o", tmp_path / "out"], 1),
    ]
    for arguments, code in commands:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "", "LORAHUB_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "torch is needed" in done.stderr
    assert "pip install" in done.stderr
    assert not (tmp_path / "out").exists()


def test_control_characters_in_names_are_escaped(lorahub: Cli, tmp_path: Path, make_adapter: Make) -> None:
    odd = make_adapter("odd", base_model_name_or_path="acme/\x1b]0;owned\x07")
    run = lorahub("inspect", odd)
    assert "\x1b" not in run.out + run.err


def test_a_full_disk_leaves_nothing(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("posix_fallocate", "pwrite", "write", "copy_file_range"):
        monkeypatch.setattr(os, name, full)
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    monkeypatch.undo()
    assert run.code == 1
    assert "space" in run.err.lower()
    assert not (tmp_path / "out").exists()


def test_flattened_names_are_folded_to_their_words(lorahub: Cli, tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_down_blocks_{block}_proj_in.{leaf}.weight": torch.ones(2, 2)
        for block in range(3)
        for leaf in ("lora_down", "lora_up")
    }
    save_file(tmp_path / "style.safetensors", tensors)
    document = lorahub("inspect", tmp_path / "style.safetensors", "--json").json()
    assert [(row["targets"], row["modules"]) for row in document["rows"]] == [("down_blocks_*_proj_in", 3)]


def test_recording_again_keeps_the_name_of_the_same_base(
    lorahub: Cli, adapter: Path, base: Path, make_base: Make
) -> None:
    assert lorahub("record", adapter, "--base", base, "--base-repo", "acme/base", "--license", "mit").code == 0
    again = lorahub("record", adapter, "--base", base, "--json").json()
    assert (again["base"]["repo_id"], again["license"]) == ("acme/base", "mit")
    other = lorahub("record", adapter, "--base", make_base("other", seed=9), "--json").json()
    assert "repo_id" not in other["base"]


def test_a_finding_of_the_plan_is_told_once(lorahub: Cli, base: Path, make_adapter: Make) -> None:
    run = lorahub("merge", make_adapter("other", target_modules=["gone"]), "--base", base, "--plan")
    assert (run.out + run.err).count("target-unlisted") == 1
    assert "verdict: unverified" in run.out


def test_an_interruption_while_the_command_line_is_loaded_is_no_traceback(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lorahub.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lorahub.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        lorahub_entry()
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_an_interruption_ends_with_a_line_and_no_traceback(monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorahub.searching.versions", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["versions", "acme/ink"])
    assert stop.value.code == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip().startswith("Interrupted")
