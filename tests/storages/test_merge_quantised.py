"""Merging adapters into live quantised models: on the same grid, with what is lost said, and back to the bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.engine.changing.quantised import COARSE, Quantised
from lorahub.engine.folding.retention import LOST
from lorahub.errors import BaseMismatch, Degraded, NotFinite, UsageError
from lorahub.findings import Verdict
from lorahub.storages.storage import held_in

from .conftest import COARSE as FOUR_BIT
from .conftest import outputs

ANYTHING = [COARSE, LOST]


def weights(model):
    return {name: one.read().values() for name, one in held_in(model).items()}


def changes(folder, scaling=2.0):
    """The changes that a LoRA folder makes, in float64 from its tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        f"{name}.weight": scaling
        * tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
        for name in ("q", "v")
    }


def share(before, after, wanted):
    kept = after.double() - before.double()
    return float((kept * wanted).sum() / (wanted * wanted).sum())


def test_what_is_stored_is_the_sum_rounded_to_the_grid(quantised, stored, lora):
    model, folder = quantised(stored), lora(size=0.3)
    before, wanted = weights(model), changes(folder)
    merged = lorahub.merge(model, [folder], allow=ANYTHING)
    for name, after in weights(model).items():
        assert wanted[name].norm() / before[name].norm() > 1e-2
        assert share(before[name], after, wanted[name]) > 0.9
        noise = (after.double() - before[name].double() - wanted[name]).norm() / after.norm()
        assert noise < (0.15 if stored in FOUR_BIT else 0.035)
        assert merged.report.changes[name] == pytest.approx(float(wanted[name].norm() / before[name].norm()), rel=1e-2)


def test_undo_gives_back_every_bit(quantised, stored, lora, inputs):
    model, same = quantised(stored), quantised(stored)
    x = inputs
    if stored == "int8":
        model, same, x = model.half(), same.half(), inputs.half()
    merged = lorahub.merge(model, [lora(size=0.3)], allow=ANYTHING)
    changed = outputs(model, x)
    merged.undo()
    assert merged.undone
    assert torch.equal(outputs(model, x), outputs(same, x))
    assert not torch.equal(changed, outputs(same, x))
    assert {name: one.read().mark() for name, one in held_in(model).items()} == {
        name: one.read().mark() for name, one in held_in(same).items()
    }


def test_a_hundred_merges_and_undos_change_no_bit(quantised, stored, lora):
    model, folder = quantised(stored), lora(size=0.3)
    before = weights(model)
    for _ in range(100 if stored == "int8" else 3):
        with lorahub.merge(model, [folder], allow=ANYTHING):
            assert not torch.equal(weights(model)["q.weight"], before["q.weight"])
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())


@pytest.mark.parametrize("kind", sorted(FOUR_BIT))
def test_a_four_bit_merge_is_refused_and_says_how_much_would_be_left(quantised, kind, lora):
    model, folder = quantised(kind), lora(size=0.01)
    before = weights(model)
    with pytest.raises(
        Degraded, match=r"2 parameters are stored as bitsandbytes .p4|nf4.* keeps \d+\.\d% of"
    ) as refused:
        lorahub.merge(model, [folder])
    (finding,) = refused.value.findings
    assert finding.code == COARSE
    assert set(finding.where) == {"q.weight", "v.weight"}
    assert "attach the adapter live" in refused.value.hint
    assert "--allow quantised-merge" in refused.value.hint
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())
    merged = lorahub.merge(model, [folder], allow=[COARSE])
    wanted = changes(folder)
    shares = {name: share(before[name], values, wanted[name]) for name, values in weights(model).items()}
    assert max(shares.values()) < 0.2  # nearly nothing of a change of 1 % survives four bits
    assert not merged.undone


@pytest.mark.parametrize("kind", ["int8", "ao-int8", "ct-channel", "ao-float8"])
def test_eight_bits_keep_a_large_change_and_lose_a_small_one(quantised, kind, lora):
    small, large = lora(size=1e-4, name="small"), lora(size=0.2, name="large")
    model = quantised(kind)
    before = weights(model)
    with pytest.raises(Degraded) as refused:
        lorahub.merge(model, [small])
    (finding,) = refused.value.findings
    assert (finding.code, finding.level, finding.allowable) == (LOST, Verdict.DEGRADED, True)
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())
    lorahub.merge(model, [small], allow=[LOST]).undo()
    with lorahub.merge(model, [large]):
        after = weights(model)
    assert share(before["q.weight"], after["q.weight"], changes(large)["q.weight"]) > 0.95


def test_the_retained_share_is_the_projection_on_what_was_wanted(quantised, lora):
    from lorahub.bases.torch_module import held_parameters
    from lorahub.engine.folding.bind import Bound
    from lorahub.merging.preparing import prepare
    from lorahub.plugins import load_registry

    model, folder = quantised("ao-int8"), lora(size=0.003)
    job = prepare(model, [folder])
    bound = Bound(job.plan, job.adapters(load_registry()))
    staged = Quantised(job.plan.steps, held_parameters(model, job.base.index), bound, lambda piece: None)
    staged.stage(1, ANYTHING)
    before, wanted = weights(model), changes(folder)
    assert torch.equal(weights(model)["q.weight"], before["q.weight"])  # nothing is in place yet
    staged.commit()
    for name, after in weights(model).items():
        assert staged.retained[name] == pytest.approx(share(before[name], after, wanted[name]), abs=1e-3)
        assert 0.1 < staged.retained[name] < 0.99
    assert staged.altered() == []
    staged.restore()
    assert staged.altered() == ["q.weight", "v.weight"]


def test_a_failure_when_the_last_parameter_is_put_in_place_leaves_all_as_they_were(quantised, lora, monkeypatch):
    model = quantised("int8")
    held, before = held_in(model), weights(model)
    writes = []
    kind = type(held["q.weight"])
    write = kind.write

    def failing(self, coded):
        writes.append(self)
        if len(writes) == 2:
            raise KeyboardInterrupt
        write(self, coded)

    monkeypatch.setattr(kind, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        lorahub.merge(model, [lora(size=0.3)])
    assert len(writes) == 4
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())


def test_undoing_is_refused_where_somebody_changed_the_codes_since(quantised, stored, lora):
    model = quantised(stored)
    merged = lorahub.merge(model, [lora(size=0.3)], allow=ANYTHING)
    one = held_in(model)["q.weight"]
    mine = one.read()
    other = mine.requantised(mine.values() * 0.5 + 0.01)
    one.write(other)
    with pytest.raises(UsageError, match=r"q\.weight changed since"):
        merged.undo()
    one.write(mine)
    merged.undo()


def test_plain_and_quantised_parameters_change_together(quantised, lora):
    folder = lora(size=0.3, modules_to_save=["norm"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: value * 2 if ".norm." in name else value for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    model = quantised("int8")
    before, norm = weights(model), model.norm.weight.detach().clone()
    merged = lorahub.merge(model, [folder])
    assert torch.equal(model.norm.weight, norm * 2)
    assert set(merged.report.changes) == {"norm.weight", "norm.bias", "q.weight", "v.weight"}
    assert merged.report.plan == lorahub.plan(model, [folder]).digest()
    merged.undo()
    assert torch.equal(model.norm.weight, norm)
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())


def test_a_weight_dependent_kind_sees_the_weight_and_not_the_codes(quantised, lora):
    folder = lora(size=0.2, use_dora=True)
    model = quantised("ao-int8")
    before = weights(model)
    plain = copy.deepcopy(model)
    lorahub.merge(model, [folder])
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("q", "v"):
        value = before[f"{name}.weight"].double() + changes(folder)[f"{name}.weight"]
        magnitude = tensors[f"base_model.model.{name}.lora_magnitude_vector"].double()
        wanted = value * (magnitude / value.norm(dim=1))[:, None]
        distance = (weights(model)[f"{name}.weight"].double() - wanted).norm() / wanted.norm()
        assert distance < 0.01
    assert not torch.equal(weights(plain)["q.weight"], weights(model)["q.weight"])


def test_a_plan_for_another_shape_is_refused(quantised, lora, net):
    from lorahub.engine.changing.merge import merge_into
    from lorahub.merging.preparing import prepare
    from lorahub.plugins import load_registry

    job = prepare(net, [lora()])
    held = {"q.weight": held_in(quantised("int8"))["v.weight"]}
    live = dict(net.state_dict(keep_vars=True))
    with pytest.raises(BaseMismatch, match=r"q\.weight is \[32, 64\].* planned as \[64, 128\]"):
        merge_into(live, job.plan, job.adapters(load_registry()), held=held)


# Defects of PEFT 0.21 that must not be here.


def test_two_adapters_are_merged_into_torchao_weights_in_one_go(quantised, lora):
    """PEFT deletes the weight after the first adapter and then looks at it: UnboundLocalError."""
    folders = [lora(size=0.2, name=name, seed=seed) for seed, name in enumerate(("one", "two"))]
    model = quantised("ao-int8")
    before = weights(model)
    lorahub.merge(model, folders)
    wanted = sum(changes(folder)["q.weight"] for folder in folders)
    assert share(before["q.weight"], weights(model)["q.weight"], wanted) > 0.95

    from peft import PeftModel
    from torchao.quantization import Int8WeightOnlyConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = PeftModel.from_pretrained(quantised("ao-int8"), folders[0], adapter_name="one")
        theirs.load_adapter(folders[1], adapter_name="two")
    theirs.base_model.set_adapter(["one", "two"])
    layer = theirs.base_model.model.q
    layer.get_apply_tensor_subclass = Int8WeightOnlyConfig
    with pytest.raises(UnboundLocalError):
        layer.merge()


def test_a_change_that_is_no_number_is_never_put_in_place(quantised, stored, lora):
    """PEFT's ``safe_merge`` tests a torchao weight before it adds the change."""
    folder = lora(size=0.2)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        tensors[name] = torch.full_like(tensors[name], 1e30)
    save_file(tensors, folder / "adapter_model.safetensors")
    model = quantised(stored)
    before = weights(model)
    with pytest.raises(NotFinite):
        lorahub.merge(model, [folder], allow=ANYTHING)
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # PEFT takes its own bias for a lost shard
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_lora_bias_is_scaled_as_it_is_live(quantised, kind, lora):
    """PEFT adds ``lora_B``'s bias to a bitsandbytes layer without the scaling that its own forward applies."""
    folder = lora(size=0.2, lora_bias=True, target_modules=["q"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    assert "base_model.model.q.lora_B.bias" in tensors
    save_file(tensors | {"base_model.model.q.lora_B.bias": torch.linspace(-1, 1, 64)}, path)
    model = quantised(kind)
    bias = model.q.bias.detach().clone()
    lorahub.merge(model, [folder], allow=ANYTHING)
    wanted = bias.float() + 2.0 * torch.linspace(-1, 1, 64)
    torch.testing.assert_close(model.q.bias.float(), wanted, rtol=2**-8, atol=1e-2)


def test_a_model_that_ran_is_merged_as_well_as_one_that_did_not(quantised, lora, inputs):
    """On CPUs with bfloat16 instructions PEFT merges such a bitsandbytes layer onto noise."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    folder = lora(size=0.3)
    for kind in sorted(FOUR_BIT):
        fresh, ran = quantised(kind), quantised(kind)
        for layer in (ran.q, ran.v):
            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
        for model in (fresh, ran):
            lorahub.merge(model, [folder], allow=ANYTHING)
        one, other = weights(fresh)["q.weight"], weights(ran)["q.weight"]
        assert (one - other).norm() / one.norm() < 0.03


def test_the_report_says_what_is_left_and_what_the_way_back_takes(quantised, stored, lora):
    model, folder = quantised(stored), lora(size=0.3)
    before, wanted = weights(model), changes(folder)
    report = lorahub.merge(model, [folder], allow=ANYTHING).report
    after = weights(model)
    assert set(report.retained) == {"q.weight", "v.weight"}
    for name, said in report.retained.items():
        assert said.gain == pytest.approx(share(before[name], after[name], wanted[name]), abs=1e-3)
        off = (after[name].double() - before[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert said.error == pytest.approx(float(off), abs=1e-3)
    assert report.undo == {"copy": sum(one.read().nbytes for one in held_in(model).values())}
    assert {each.code for each in report.findings} == ({COARSE} if stored in FOUR_BIT else set())


def test_another_adapter_takes_the_place_of_the_first_as_if_it_had_come_alone(quantised, stored, lora):
    first, second = (lora(size=0.3, name=name, seed=seed) for seed, name in enumerate(("one", "two")))
    model, alone = quantised(stored), quantised(stored)
    before = weights(model)
    lorahub.merge(alone, [second], allow=ANYTHING)
    merged = lorahub.merge(model, [first], allow=ANYTHING)
    between = weights(model)
    merged.swap([second], allow=ANYTHING)
    for name, values in weights(model).items():
        assert torch.equal(values, weights(alone)[name])
        assert not torch.equal(values, between[name])
    merged.undo()
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())


def test_a_swap_that_is_refused_leaves_the_first_in_place(quantised, lora):
    first, tiny = lora(size=0.3, name="one"), lora(size=1e-4, name="two", seed=1)
    model = quantised("int8")
    before = weights(model)
    merged = lorahub.merge(model, [first])
    between = weights(model)
    with pytest.raises(Degraded):
        merged.swap([tiny])
    assert all(torch.equal(values, between[name]) for name, values in weights(model).items())
    merged.undo()
    assert all(torch.equal(values, before[name]) for name, values in weights(model).items())
