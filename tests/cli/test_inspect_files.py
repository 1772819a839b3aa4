"""``lorahub inspect FILE``: judged by what the file is, whatever it is called and whatever lies beside it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.adapter import open_header
from lorahub.files.writer import save_file
from lorahub.plugins import Registry

Cli = Callable[..., Any]

PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "base_model_name_or_path": "acme/other"}
PROMPTS = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}, "model": "acme/other"}
HUB = {"config": {"architecture": "lora", "r": 2, "alpha": 16}, "model_name": "acme/other", "model_type": "bert"}

FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "kohya": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "diffusers": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        ("lora.down.weight", "lora.up.weight"),
    ),
    "comfy": ("diffusion_model.blocks.0.self_attn.q", ("lora_A.weight", "lora_B.weight")),
    "loralib": ("roberta.encoder.layer.0.attention.self.query", ("lora_A", "lora_B")),
}
"""Format -> a module as it names it, and its factors, down and up."""


def factors(name: str) -> dict[str, torch.Tensor]:
    stem, (down, up) = FILES[name]
    return {f"{stem}.{down}": torch.ones(2, 8), f"{stem}.{up}": torch.ones(6, 2)}


@pytest.mark.parametrize("config", [PEFT, PROMPTS, MLX, HUB], ids=["peft", "prompts", "mlx", "adapterhub"])
@pytest.mark.parametrize("name", FILES)
def test_names_decide_over_a_config_that_explains_none_of_them(
    tmp_path: Path, registry: Registry, name: str, config: Mapping[str, object]
) -> None:
    path = save_file(tmp_path / "style.safetensors", factors(name), {})
    alone = open_header(path, registry)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = open_header(path, registry)
    assert found.format == alone.format == name
    assert found.reading.groups == alone.reading.groups != ()
    assert found.reading.base_repo == ""
    assert [each.code for each in found.findings] == [each.code for each in alone.findings]


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_beside_a_peft_adapter_is_what_its_names_say(
    lorahub: Cli, adapter: Path, registry: Registry, name: str
) -> None:
    save_file(adapter / "pytorch_lora_weights.safetensors", factors(name), {})
    assert open_header(adapter / "pytorch_lora_weights.safetensors", registry).format == name
    assert open_header(adapter, registry).format == "peft"
    run = lorahub("inspect", adapter / "pytorch_lora_weights.safetensors")
    assert run.code == 0
    assert "nothing that changes weights" not in run.out


def test_peft_tensors_without_their_config_are_shown_and_neither_merged_nor_converted(
    lorahub: Cli, adapter: Path, base: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_config.json").unlink()
    (adapter / "lorahub.json").unlink(missing_ok=True)
    run = lorahub("inspect", adapter)
    assert run.code == 0
    assert "unknown" in run.out
    assert "config-missing" in run.err
    assert "lora_alpha" in run.err
    document = lorahub("inspect", adapter, "--json").json()
    assert document["kinds"] == ["lora"]
    assert {row["scale"] for row in document["rows"]} == {None}
    assert {row["rank"] for row in document["rows"]} == {4}
    assert all("scale" not in each["options"] for each in document["targets"])
    merged = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "merged")
    assert merged.code == 4
    assert "adapter_config.json" in merged.err
    assert not (tmp_path / "merged").exists()
    converted = lorahub("convert", adapter, "--to", "kohya", "-o", tmp_path / "converted")
    assert converted.code == 4
    assert not (tmp_path / "converted").exists()
    recorded = lorahub("record", adapter)
    assert recorded.code == 4
    assert not (adapter / "lorahub.json").exists()
    assert lorahub("merge", adapter, "--base", base, "-o", tmp_path / "m", "--allow", "config-missing").code != 0


@pytest.mark.parametrize("name", ["adapter_model.sft", "weights", "adapter_model.bin", "x.pt"])
def test_safetensors_are_read_whatever_they_are_called(lorahub: Cli, adapter: Path, name: str) -> None:
    whole = lorahub("inspect", adapter, "--json").json()
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    found = lorahub("inspect", adapter / name, "--json").json()
    assert (found["format"], found["file"], found["rows"]) == ("peft", name, whole["rows"])
    if name != "weights":
        assert lorahub("inspect", adapter, "--json").json()["file"] == name


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", "cos\nsystem\n(S'touch ran'\ntR.")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("README.md", b"# A style\n", "README.md is no weights file: it holds text"),
        ("notes", "Größe".encode() * 200, "it holds text"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", "it is a picture"),
        ("noise", bytes(range(256)), "no header of safetensors"),
        ("empty.sft", b"", "0 bytes"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        ("old", b"\x80\x02}q\x00.", "is a Python pickle"),
        ("old.pt", b"\x80\x02}q\x00.", "is a Python pickle"),
        ("model", b"GGUF\x03\0\0\0", "it is GGUF"),
        ("cut.sft", (1 << 40).to_bytes(8, "little") + b"{", "no header of safetensors"),
    ],
)
def test_any_other_file_is_told_for_what_it_is_and_not_for_its_folder(
    lorahub: Cli, adapter: Path, name: str, content: bytes, says: str
) -> None:
    (adapter / name).write_bytes(content)
    run = lorahub("inspect", adapter / name)
    assert run.code == 4
    assert says in run.err
    assert str(adapter / name) in run.err
    assert "holds no safetensors file" not in run.err


def test_a_zip_is_not_opened(lorahub: Cli, tmp_path: Path) -> None:
    zipped(tmp_path / "old.pt")
    assert "is a Python pickle" in lorahub("inspect", tmp_path / "old.pt").err
    shutil.move(tmp_path / "old.pt", tmp_path / "old")
    assert "zip archive" in lorahub("inspect", tmp_path / "old").err


def test_a_kind_whose_tensors_are_shared_is_named_without_a_base(lorahub: Cli, tmp_path: Path) -> None:
    save_file(tmp_path / "adapter_model.safetensors", {"base_model.unilora_theta_d": torch.ones(9)}, {})
    config = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 9, "target_modules": ["q"], "proj_seed": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    run = lorahub("inspect", tmp_path)
    assert run.code == 0
    assert "nothing that changes weights" not in run.out
    assert "unilora" in run.out
    assert lorahub("inspect", tmp_path, "--json").json()["kinds"] == ["unilora"]


def test_a_single_number_in_the_place_of_a_matrix_is_a_finding_without_a_config_too(
    tmp_path: Path, registry: Registry
) -> None:
    stem = "base_model.model.layers.0.q"
    save_file(tmp_path / "adapter_model.safetensors", {f"{stem}.miss_block": torch.tensor(1.0), "a": torch.ones(2, 6)})
    findings = {each.code: each for each in open_header(tmp_path, registry).findings}
    assert findings.keys() >= {"config-missing", "key-unknown"}
    assert any(f"{stem}.miss_block" in each.where for each in findings.values() if each.code != "config-missing")
