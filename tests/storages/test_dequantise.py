"""Quantised checkpoints on disk, written as the numbers that they stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.cli.main import main
from lorahub.errors import Incompatible, IntegrityError, NotFinite, UnsupportedFormat, UsageError, WriteFailed
from lorahub.storages.storage import held_in

SETTINGS = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "nf4-nested": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "ct-channel": {"quant_method": "compressed-tensors"},
    "ct-tensor": {"quant_method": "compressed-tensors"},
    "ct-block": {
        "quant_method": "compressed-tensors",
        "config_groups": {"all": {"weights": {"block_structure": [32, 32]}}},
    },
    "ct-int8": {"quant_method": "compressed-tensors"},
}


@pytest.fixture(params=sorted(SETTINGS))
def kind(request):
    return request.param


@pytest.fixture
def saved(quantised, tmp_path):
    """A quantised model's state as its library saves it, with the configuration that a model would have."""

    def make(kind, *, shards=False, **config):
        model = quantised(kind)
        held = {name: one.read().values() for name, one in held_in(model).items()}
        folder = tmp_path / f"base-{kind}"
        folder.mkdir()
        state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
        if shards:
            parts = [dict(list(state.items())[0::2]), dict(list(state.items())[1::2])]
            names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
            for part, name in zip(parts, names, strict=True):
                save_file(part, folder / name)
            where = {key: name for part, name in zip(parts, names, strict=True) for key in part}
            index = {"metadata": {"total_size": 0}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(state, folder / "model.safetensors", {"format": "pt"})
        settings = {"dtype": "bfloat16", "quantization_config": SETTINGS[kind]} | config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder, held

    return make


def test_the_numbers_are_those_that_the_live_model_computes_with(saved, kind, tmp_path, net):
    folder, held = saved(kind)
    done = lorahub.dequantise(folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(net.state_dict())
    for name, values in held.items():
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], values.to(torch.bfloat16))
        assert not torch.equal(tensors[name], net.get_parameter(name))
    assert torch.equal(tensors["norm.weight"], net.norm.weight)
    assert (done.weights, done.dtypes) == (2, ("BF16",))
    assert (done.rounded == 0) == ("4" in kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": "bfloat16"}


def test_shards_keep_their_names_and_their_index(saved, kind, tmp_path, net):
    folder, held = saved(kind, shards=True)
    lorahub.dequantise(folder, tmp_path / "out", dtype="float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(net.state_dict())
    tensors = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / "out" / file)
        assert {name for name, home in index["weight_map"].items() if home == file} == set(part)
        tensors |= part
    assert all(torch.equal(tensors[name], values) for name, values in held.items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_an_adapter_merges_into_what_it_was_trained_with(saved, kind, tmp_path, lora):
    base, held = saved(kind)
    lorahub.dequantise(base, tmp_path / "plain")
    folder = lora(size=0.3)
    lorahub.merge(tmp_path / "plain", [folder], out=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(folder / "adapter_model.safetensors")
    for name, values in held.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        change = 2.0 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        wanted = values.to(torch.bfloat16).double() + change
        assert change.norm() / wanted.norm() > 1e-2
        torch.testing.assert_close(merged[name].double(), wanted, rtol=2**-8, atol=1e-9)


def test_the_command_says_what_it_did(saved, tmp_path, capsys):
    folder, _ = saved("nf4-nested")
    with pytest.raises(SystemExit) as stop:
        main(["dequantise", str(folder), "-o", str(tmp_path / "out"), "--dtype", "fp16"])
    assert not stop.value.code
    assert "2 weights of bitsandbytes-4bit as F16" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors")["q.weight"].dtype == torch.float16
    with pytest.raises(SystemExit):
        main(["dequantise", str(folder), "-o", str(tmp_path / "more"), "--json"])
    assert json.loads(capsys.readouterr().out)["weights"] == 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"quant_method": "gptq"}, Incompatible, "GPTQ is read by its own library only"),
        ({"quant_method": "awq"}, Incompatible, "AWQ is read"),
        ({"quant_method": "torchao"}, Incompatible, "torchao"),
        ({"quant_method": "hqq"}, UnsupportedFormat, "method hqq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, UnsupportedFormat, "method bitsandbytes"),
        (None, UsageError, "is not quantised"),
    ],
)
def test_what_is_not_read_is_refused_by_name_and_leaves_nothing(saved, tmp_path, settings, error, words):
    folder, _ = saved("nf4", quantization_config=settings)
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        lorahub.dequantise(folder, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("kind", "lost", "words"),
    [
        ("nf4", "q.weight.absmax", "q.weight is stored in 4 bits, and q.weight.absmax is missing"),
        ("nf4-nested", "v.weight.nested_absmax", "nested_absmax is missing"),
        ("int8", "q.weight", "q.weight is not"),
        ("ct-channel", "v.weight", "v.weight is not"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(saved, tmp_path, kind, lost, words):
    folder, _ = saved(kind)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=words):
        lorahub.dequantise(folder, tmp_path / "out")


def test_a_state_that_is_no_json_is_refused(saved, tmp_path):
    folder, _ = saved("nf4")
    tensors = load_file(folder / "model.safetensors")
    tensors["q.weight.quant_state.bitsandbytes__nf4"] = torch.arange(20, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"does not say how q\.weight is stored"):
        lorahub.dequantise(folder, tmp_path / "out")


def test_packed_weights_of_compressed_tensors_are_refused_by_name(saved, tmp_path):
    folder, _ = saved("ct-channel")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"v.weight_packed": torch.zeros(2, dtype=torch.int32)}, folder / "model.safetensors")
    with pytest.raises(Incompatible, match=r"v\.weight_packed"):
        lorahub.dequantise(folder, tmp_path / "out")


def test_numbers_beyond_the_dtype_are_refused(saved, tmp_path):
    folder, _ = saved("int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["q.SCB"] = tensors["q.SCB"] * 1e10
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NotFinite, match=r"q\.weight is not finite in F16"):
        lorahub.dequantise(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_request_itself_is_looked_at_first(saved, tmp_path):
    folder, _ = saved("nf4")
    with pytest.raises(UsageError, match="no dtype for weights"):
        lorahub.dequantise(folder, tmp_path / "out", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(WriteFailed, match="exists already"):
        lorahub.dequantise(folder, tmp_path / "full")
