"""Storages that are recognised by name, and what is said of quantised bases before anything is done."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorahub
from lorahub.bases.index import BaseRef
from lorahub.bases.torch_module import TorchModule
from lorahub.errors import Incompatible, MissingDependency
from lorahub.plugins import load_registry
from lorahub.storages.storage import held_in, library

from .conftest import Net, compressed, outputs, torchao


class TorchQuantLinear(nn.Module):
    """What GPTQ layers look like from outside: packed codes, and a weight that is nowhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, 4
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features, dtype=torch.bfloat16))
        self.register_buffer("g_idx", torch.zeros(linear.in_features, dtype=torch.int32))
        self.bias = linear.bias
        self.secret = [linear.weight.detach()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.secret[0], self.bias)


TorchQuantLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"


class WQLinear_GEMM(TorchQuantLinear):  # noqa: N801 - the library's name
    """The same for AWQ."""


WQLinear_GEMM.__module__ = "awq.modules.linear.gemm"


@pytest.fixture(params=["GPTQ", "AWQ"])
def packed(request, net):
    kind = {"GPTQ": TorchQuantLinear, "AWQ": WQLinear_GEMM}[request.param]
    model = copy.deepcopy(net)
    model.q = kind(model.q)
    return request.param, model


def test_gptq_and_awq_layers_are_known_by_name_and_shown_with_their_shape(packed):
    method, model = packed
    index = TorchModule().index_model(model, BaseRef())
    info = index.parameters["q.weight"]
    assert (info.shape, info.dtype, info.storage) == ((64, 128), "BF16", f"{method} int4")
    assert not any("qweight" in name or "scales" in name or "g_idx" in name for name in index.parameters)
    assert "q.bias" in index.parameters


def test_merging_into_gptq_and_awq_is_refused_by_name(packed, lora, quantised):
    method, model = packed
    plain = outputs(model, torch.ones(1, 128, dtype=torch.bfloat16))
    with pytest.raises(Incompatible, match=f"{method} chose its codes with calibration data") as refused:
        lorahub.merge(model, [lora()])
    assert "attach the adapter live" in refused.value.hint
    assert torch.equal(outputs(model, torch.ones(1, 128, dtype=torch.bfloat16)), plain)


def test_adapters_run_live_on_gptq_and_awq(lora, packed, inputs):
    folder, (_, model) = lora(size=0.3), packed
    reference = Net().to(torch.bfloat16).eval()
    state = {name: value for name, value in model.state_dict().items() if name in reference.state_dict()}
    reference.load_state_dict(state | {"q.weight": model.q.secret[0], "v.weight": model.v.weight})
    with lorahub.attach(model, [folder]), lorahub.attach(reference, [folder]):
        found, wanted = outputs(model, inputs), outputs(reference, inputs)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, outputs(model, inputs))


def test_what_needs_the_weight_is_refused_where_only_its_library_reads_it(lora, packed, inputs):
    method, model = packed
    folder = lora(size=0.3, use_dora=True)
    with pytest.raises(Incompatible, match=f"packed by {method}"), lorahub.attach(model, [folder]):
        outputs(model, inputs)


def test_a_weight_that_is_packed_until_the_model_runs_says_so(net, lora, inputs):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    config = QuantizationConfig(config_groups={"all": QuantizationScheme(targets=["Linear"], weights=args)})
    folder = lora(size=0.3)
    apply_quantization_config(net, config)
    for layer in (net.q, net.v):
        blocks = layer.weight.detach().float().reshape(layer.out_features, -1, 32)
        layer.weight_scale.data.copy_(blocks.abs().amax(2) / 7)
    ModelCompressor(quantization_config=config).compress_model(net)
    with pytest.raises(Incompatible, match="running the model once makes the library expand them"):
        lorahub.merge(net, [folder])
    plain = outputs(net, inputs)
    assert {one.storage for one in held_in(net).values()} == {"compressed-tensors int4"}
    with lorahub.merge(net, [folder], allow=["quantised-merge"]):
        assert not torch.equal(outputs(net, inputs), plain)
    assert torch.equal(outputs(net, inputs), plain)


def test_a_layout_of_torchao_that_packs_its_codes_is_live_only(net, lora):
    model = torchao(copy.deepcopy(net), "Int8WeightOnlyConfig")
    kind = type(model.q.weight)
    held = held_in(model)["q.weight"]
    name, kind.__name__ = kind.__name__, "OpaqueTensor"
    try:
        assert "OpaqueTensor packs its codes" in held.refusal
        values = held.read().values()
        assert torch.equal(values, model.q.weight.dequantize().float())
        with pytest.raises(Incompatible):
            held.read().requantised(values)
        with pytest.raises(Incompatible, match="cannot be merged into"):
            lorahub.merge(model, [lora()])
    finally:
        kind.__name__ = name


def test_a_check_says_that_the_base_is_quantised(quantised, net, lora):
    folder = lora()
    (said,) = [each for each in lorahub.check(folder, quantised("nf4")).findings if each.code == "base-quantised"]
    assert "2 of the parameters that it changes are stored as bitsandbytes nf4" in said.message
    assert said.where == ("q.weight", "v.weight")
    assert not any(each.code == "base-quantised" for each in lorahub.check(folder, net).findings)


def test_every_storage_has_a_name_and_a_library():
    storages = load_registry().storages
    assert set(storages) == {"bitsandbytes-4bit", "bitsandbytes-int8", "compressed-tensors", "gptq-awq", "torchao"}
    assert all(storage.library for storage in storages.values())


def test_a_missing_library_is_said_with_the_command():
    with pytest.raises(MissingDependency, match="no_such_library is needed") as missing:
        library("no_such_library")
    assert missing.value.hint == "pip install no_such_library"


def test_looking_for_quantised_modules_imports_no_library():
    code = (
        "import sys, torch; from lorahub.storages.storage import held_in; "
        "assert held_in(torch.nn.Sequential(torch.nn.Linear(2, 2))) == {}; "
        "print([name for name in ('bitsandbytes', 'torchao', 'compressed_tensors') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_strategies_whose_scales_lie_in_another_order_are_refused(net):
    model = compressed(copy.deepcopy(net), "channel")
    held = held_in(model)["q.weight"]
    assert held.refusal == ""
    model.q.weight_g_idx = nn.Parameter(torch.zeros(128, dtype=torch.int32), requires_grad=False)
    assert "order of activations" in held.refusal
    with pytest.raises(Incompatible):
        held.read()


def test_an_adapter_trained_on_a_quantised_base_says_so_on_another(net, lora, tmp_path):
    folder, base = lora(), tmp_path / "base"
    base.mkdir()
    save_file(net.state_dict(), base / "model.safetensors")
    lorahub.record(folder, base=base)
    path = folder / "lorahub.json"
    record = json.loads(path.read_text())
    record["base"]["quantization"] = {"method": "bitsandbytes", "bits": 4}
    path.write_text(json.dumps(record))
    (said,) = [each for each in lorahub.check(folder, base).findings if each.code == "trained-quantised"]
    assert "(bits 4, method bitsandbytes)" in said.message


def test_sizes_relative_to_a_quantised_base_are_those_of_its_numbers(quantised, lora):
    folder, model = lora(size=0.25), quantised("nf4")
    found = lorahub.weigh(folder, model)
    values = held_in(model)["q.weight"].read().values()
    change = next(each for target, each in lorahub.load(folder).deltas.items() if target.module.endswith("q"))
    wanted = float(change.delta(torch.zeros(64, 128)).norm() / values.norm())
    (q,) = [each for each in found.targets if each.module.endswith("q")]
    assert q.relative == pytest.approx(wanted, rel=1e-3)
