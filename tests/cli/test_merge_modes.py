"""``lorahub merge --mode`` and ``--dtype``, what is said of changes that are lost, and the same from Python."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub as library
from lorahub.errors import Degraded, Incompatible, UsageError


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.0.q_proj.weight": torch.randn(64, 48, generator=generator).mul(0.05).bfloat16(),
        "norm.weight": torch.ones(48, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "hidden_size": 48}))
    return folder


@pytest.fixture
def adapter(tmp_path):
    return _adapter(tmp_path / "adapter", 0.05)


def _adapter(folder, size):
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": torch.randn(4, 48, generator=generator) * 0.1,
        "base_model.model.layers.0.q_proj.lora_B.weight": torch.randn(64, 4, generator=generator) * size,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _expected(base, adapter, dtype):
    """The merged weight in float64, rounded once."""
    weight = load_file(base / "model.safetensors")["layers.0.q_proj.weight"].double()
    factors = load_file(adapter / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.layers.0.q_proj.lora_{which}.weight"].double() for which in "AB")
    return (weight + 0.75 * (up @ down)).to(dtype)


@pytest.mark.parametrize("mode", ["fast", "exact", "peft", "peft-safe", "stochastic(7)"])
def test_the_mode_is_recorded_and_decides_the_bits(lorahub, base, adapter, tmp_path, mode):
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out", "--mode", mode, "--json")
    assert run.code == 0, run.err
    assert json.loads((tmp_path / "out" / "lorahub-merge.json").read_text())["mode"] == mode
    found = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q_proj.weight"]
    share = (found == _expected(base, adapter, torch.bfloat16)).double().mean()
    assert share > {"peft-safe": 0.8, "stochastic(7)": 0.4}.get(mode, 0.999)
    assert (share == 1) == (mode in {"fast", "exact", "peft"})


def test_a_mode_that_does_not_exist_is_a_malformed_request(lorahub, base, adapter, tmp_path):
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out", "--mode", "precise")
    assert run.code == 2
    assert "stochastic(SEED)" in run.err


@pytest.mark.parametrize(("word", "dtype"), [("float16", torch.float16), ("fp32", torch.float32)])
def test_the_whole_checkpoint_is_stored_in_the_dtype_that_is_asked_for(lorahub, base, adapter, tmp_path, word, dtype):
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out", "--dtype", word, "-q")
    assert run.code == 0, run.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    expected = _expected(base, adapter, dtype)
    assert (found["layers.0.q_proj.weight"] == expected).double().mean() > 0.999
    assert torch.equal(found["norm.weight"], torch.ones(48, dtype=dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": str(dtype).removeprefix("torch."), "hidden_size": 48}


def test_a_change_that_would_be_lost_is_refused_with_ways_out(lorahub, base, tmp_path):
    small = _adapter(tmp_path / "small", 5e-5)
    run = lorahub("merge", small, "--base", base, "-o", tmp_path / "out")
    assert run.code == 3
    assert "of the change" in run.err
    assert "--allow delta-lost" in run.err
    assert "--dtype float32" in run.err
    assert not (tmp_path / "out").exists()
    allowed = lorahub("merge", small, "--base", base, "-o", tmp_path / "out", "--allow", "delta-lost", "--json")
    assert allowed.code == 0, allowed.err
    assert json.loads(allowed.out)["retention"]["gain"] < 0.5
    finer = lorahub("merge", small, "--base", base, "-o", tmp_path / "finer", "--dtype", "float32", "--json")
    assert finer.code == 0, finer.err
    assert json.loads(finer.out)["retention"]["gain"] == pytest.approx(1, abs=0.01)


def test_what_is_kept_is_told(lorahub, base, adapter, tmp_path):
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    assert "kept of the change as stored" in run.out


def test_a_merge_in_place_keeps_the_dtype(base, adapter):
    for place in ({"in_place": True}, {}):
        with pytest.raises(UsageError, match="keeps the dtype of what it merges into"):
            library.merge(base, [adapter], dtype="float16", **place)


def test_modes_and_refusals_are_the_same_from_python(base, adapter, tmp_path):
    report = library.merge(base, [adapter], out=tmp_path / "out", mode="exact")
    assert report.retention.gain == pytest.approx(1, abs=0.01)
    assert library.plan(base, [adapter], mode="stochastic(1)").mode == "stochastic(1)"
    with pytest.raises(Degraded, match="of the change"):
        library.merge(base, [_adapter(tmp_path / "small", 5e-5)], out=tmp_path / "lost")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.layers.0.q_proj.lora_magnitude_vector"] = torch.ones(64)
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(Incompatible) as error:
        library.merge(base, [adapter], out=tmp_path / "peft", mode="peft")
    assert any(finding.code == "mode-unfit" and "dora" in finding.message for finding in error.value.findings)


# --------------------------------------------------------------------------------------------------- devices


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(lorahub, base, adapter, tmp_path):
    for command in (["-o", tmp_path / "out"], ["--in-place"]):
        run = lorahub("merge", adapter, "--base", base, *command, "--device", "cuda:99")
        assert run.code == 2
        assert "cuda:99 does not compute here" in run.err
    assert not (tmp_path / "out").exists()
    run = lorahub("merge", adapter, "--base", base, "-o", tmp_path / "out", "--device", "cpu")
    assert run.code == 0, run.err
    found = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q_proj.weight"]
    assert (found == _expected(base, adapter, torch.bfloat16)).double().mean() > 0.999


def test_a_live_model_is_merged_into_where_it_lies(adapter):
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(48, 64)})
    before = model["q_proj"].weight.detach().clone()
    with pytest.raises(UsageError, match="not on cuda") as caught:
        library.merge(model, adapter, device="cuda")
    assert "model.to" in caught.value.hint
    assert torch.equal(model["q_proj"].weight, before)
