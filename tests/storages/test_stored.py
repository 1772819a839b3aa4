"""Every storage: what is read is what its library computes with, and what is written the library reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorahub.bases.index import BaseRef
from lorahub.bases.torch_module import TorchModule, held_parameters, live_tensors
from lorahub.storages.storage import held_in


def by_library(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear layer as its library gives it, or as the layer's outputs show it."""
    layer = model.get_submodule(name)
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if type(layer).__name__ == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        maxima = weight.SCB if weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(weight.data, maxima).float()
    if hasattr(weight, "dequantize") and hasattr(weight, "__tensor_flatten__"):
        return weight.dequantize().float()
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = layer.quantization_scheme.weights
    return dequantize(layer.weight.data, layer.weight_scale.data, args=args).float()


def test_every_linear_weight_is_held_under_its_name_and_shape(quantised, stored, net):
    held = held_in(quantised(stored))
    assert {name: one.shape for name, one in held.items()} == {"q.weight": (64, 128), "v.weight": (32, 64)}
    assert {one.bits for one in held.values()} == {4 if stored in {"nf4", "nf4-nested", "fp4"} else 8}
    assert all(one.refusal == "" for one in held.values())
    assert held_in(net) == {}


def test_what_is_read_is_the_weight_that_the_library_reads(quantised, stored, net):
    model = quantised(stored)
    for name, one in held_in(model).items():
        values, plain = one.read().values(), net.get_parameter(name).float()
        assert values.dtype == torch.float32
        # libraries round to bfloat16 what is given in float32 here
        torch.testing.assert_close(values, by_library(model, name.removesuffix(".weight")), rtol=2**-7, atol=1e-6)
        distance = (values - plain).norm() / plain.norm()
        assert 1e-4 < distance < 0.2


def test_the_layer_computes_with_what_was_read(quantised, stored):
    model = quantised(stored)
    layer = model.q
    if stored.startswith("ct"):  # the library expands the model as a whole, when that is called
        model(torch.zeros(1, 128, dtype=torch.bfloat16))
    values = held_in(model)["q.weight"].read().values()
    x = torch.eye(128, dtype=torch.float16 if stored == "int8" else torch.bfloat16)
    with torch.no_grad():
        seen = (layer(x) - layer.bias.to(x.dtype)).float().T
    error = (seen - values).norm() / values.norm()
    assert error < 0.02


def test_writing_back_what_was_read_changes_nothing(quantised, stored):
    model = quantised(stored)
    for one in held_in(model).values():
        before = one.read()
        again = before.requantised(before.values())
        assert torch.equal(again.values(), before.values())
        one.write(again)
        assert torch.equal(one.read().values(), before.values())
        assert one.read().mark() == before.mark() or stored == "fp4"  # which has two codes for zero


def test_the_library_reads_what_was_written_and_writing_is_undone_to_the_bit(quantised, stored):
    model = quantised(stored)
    for name, one in held_in(model).items():
        before = one.read()
        new = before.requantised(before.values() + 0.3 * before.values().roll(1, 0))
        moved = (new.values() - before.values()).norm() / before.values().norm()
        assert moved > 0.1
        one.write(new)
        torch.testing.assert_close(by_library(model, name.removesuffix(".weight")), new.values(), rtol=2**-7, atol=1e-6)
        assert one.read().mark() == new.mark() != before.mark()
        one.write(before)
        assert torch.equal(one.read().values(), before.values())
        assert one.read().mark() == before.mark()


def test_a_model_that_ran_in_between_comes_back_too(quantised, stored, inputs):
    """Libraries lay weights out anew when a model first runs: bitsandbytes on some CPUs, compressed-tensors always."""
    model, other = quantised(stored), quantised(stored)
    x = inputs.half() if stored == "int8" else inputs
    run = nn.Sequential(model.half(), nn.Identity()) if stored == "int8" else model
    held = held_in(model)
    saved = {name: one.read() for name, one in held.items()}
    for name, one in held.items():
        one.write(saved[name].requantised(saved[name].values() * 0.5))
    changed = run(x)
    for name, one in held.items():
        one.write(saved[name])
    back, expected = run(x), (other.half() if stored == "int8" else other)(x)
    assert not torch.equal(changed, expected)
    assert torch.equal(back, expected)


def test_the_index_shows_the_weights_and_not_the_codes(quantised, stored, net):
    framework = TorchModule()
    index, plain = (framework.index_model(each, BaseRef()) for each in (quantised(stored), net))
    assert {name: info.shape for name, info in index.parameters.items()} == {
        name: info.shape for name, info in plain.parameters.items()
    }
    assert index.structure == plain.structure
    assert {name for name, info in index.parameters.items() if info.storage} == {"q.weight", "v.weight"}
    assert index.parameters["q.weight"].role == "linear"


def test_looking_at_a_model_leaves_it_alone(quantised, stored, inputs):
    model = quantised(stored)
    if stored != "int8":
        model(inputs)
    held = held_in(model)
    before = {name: one.read().mark() for name, one in held.items()}
    raw = {name: value.data_ptr() for name, value in model.named_parameters()}
    TorchModule().index_model(model, BaseRef())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == raw
    assert {name: one.read().mark() for name, one in held.items()} == before


def test_of_a_quantised_module_only_the_codes_and_what_is_not_quantised_are_tensors(quantised, stored, net):
    model = quantised(stored)
    tensors = live_tensors(model)
    assert set(tensors) - {"q.weight", "v.weight"} == set(net.state_dict()) - {"q.weight", "v.weight"}
    assert tensors["norm.weight"] is model.norm.weight


def test_a_weight_under_two_names_is_one_parameter(quantised):
    model = quantised("nf4")
    model.again = model.q
    index = TorchModule().index_model(model, BaseRef())
    assert ("again.weight", "q.weight") in index.tied
    assert set(held_parameters(model, index)) == {"again.weight", "v.weight"}


def test_a_layer_that_is_not_quantised_yet_is_an_ordinary_one():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(16, 8), bnb.nn.Linear8bitLt(16, 8, has_fp16_weights=True))
    assert held_in(model) == {}
    assert set(live_tensors(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_int8_codes_and_maxima_are_those_of_the_library_for_the_same_weight(net):
    """The scale of a row reaches its largest weight, as the library's does: fresh codes agree."""
    from bitsandbytes.functional import int8_vectorwise_quant

    from .conftest import eight_bit

    model = eight_bit(copy.deepcopy(net))
    one = held_in(model)["q.weight"]
    wanted = (net.q.weight.detach().float() * 3).half()  # beyond every scale, so that all are made anew
    new = one.read().requantised(wanted.float())
    codes, maxima, _ = int8_vectorwise_quant(wanted)
    assert (new.codes.int() - codes.int()).abs().max() <= 1  # ties, where the library multiplies and we divide
    assert (new.codes == codes).float().mean() > 0.99
    torch.testing.assert_close(new.scale.flatten(), maxima, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4"])
def test_four_bit_codes_are_those_that_the_library_finds(quantised, kind):
    from bitsandbytes.functional import quantize_4bit

    weight = quantised(kind).q.weight
    held = held_in(quantised(kind))["q.weight"]
    wanted = held.read().values().roll(3, 0) * 1.5
    codes, _ = quantize_4bit(wanted, blocksize=64, quant_type=kind[:3], compress_statistics=weight.compress_statistics)
    assert torch.equal(held.read().requantised(wanted).data, codes)


def test_four_bit_is_read_in_the_layout_that_a_cpu_with_bfloat16_instructions_makes_of_it(quantised):
    """bitsandbytes' own ``dequantize_4bit`` reads that layout as if it were the other, and gives noise."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    for kind in ("nf4", "nf4-nested", "fp4"):
        model = quantised(kind)
        held, weight = held_in(model)["q.weight"], model.q.weight
        before = held.read()
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, copy.copy(weight.quant_state))
        packed = held.read()
        assert packed.mark() == before.mark()
        torch.testing.assert_close(packed.values(), before.values(), rtol=2**-7, atol=1e-6)
        noise = dequantize_4bit(weight.data, weight.quant_state).float() - before.values()
        assert noise.norm() / before.values().norm() > 1
        assert packed.requantised(packed.values()).state.dtype == before.state.dtype == held.dtype
