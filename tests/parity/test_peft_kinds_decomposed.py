"""PEFT saves and merges, lorahub merges from the files alone: kinds that take the weight apart, or draw numbers again.

Numbers are PEFT 0.21.2's own: nothing is trained, every adapter parameter is moved by seeded noise, saved, and PEFT's
``merge_and_unload`` is what lorahub must come to.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from parity.decomposed import CASES, Case, base, index, loaded, merged_by_hand, quietly, trained
from safetensors.torch import load_file

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.deltas.plain import plain_lora
from lorahub.findings import Verdict
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import PeftModel, get_peft_model


@pytest.fixture(params=CASES)
def some(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_merging_from_the_files_gives_what_peft_merges(some: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(some, tmp_path)
    header = open_header(tmp_path, registry, index=index() if some.codes else None)
    assert tuple(finding.code for finding in header.findings) == some.codes
    assert all(finding.level <= Verdict.UNVERIFIED for finding in header.findings)
    assert header.kinds == (some.kind,)
    adapter = load(header, registry)
    weights = base().state_dict()
    expected = quietly(live.merge_and_unload).state_dict()
    for dtype in (torch.float32, torch.float64):
        found = merged_by_hand(adapter, dtype)
        assert len(found) == some.changed
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].to(dtype), rtol=0, atol=2e-5)
            assert (value - weights[name]).norm() > 1e-2 * weights[name].norm()
    for name, weight in weights.items():
        assert name in found or torch.equal(expected[name], weight)


def test_a_live_model_is_merged_into_whole(some: Case, tmp_path: Path) -> None:
    live = trained(some, tmp_path)
    model = base()
    merge(model, {"one": tmp_path})
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


def test_what_is_written_reads_back_in_peft_as_the_same_change(some: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(some, tmp_path / "theirs")
    save(loaded(tmp_path / "theirs", registry, with_base=some.needs_base), tmp_path / "ours", registry=registry)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() if not some.needs_base else ours.keys() > theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    complaints = [text for each in said if "missing" in (text := str(each.message)) or "nexpected" in text]
    # PEFT 0.21.2 also asks for a copy of RandLoRA's shared pair on every module, and has it without
    assert [text for text in complaints if ".randlora_" not in text] == []
    expected, found = (quietly(model.merge_and_unload).state_dict() for model in (live, again))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=some.reloaded)


def test_an_embedding_beside_pissa_is_plain_lora(tmp_path: Path, registry: Registry) -> None:
    config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["embed", "first"])
    live = trained(Case(lambda: config, "pissa"), tmp_path)
    adapter = loaded(tmp_path, registry, with_base=False)
    assert {target.name: delta.kind for target, delta in adapter.deltas.items()} == {
        "embed.weight": "lora",
        "first.weight": "pissa",
    }
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in merged_by_hand(adapter, torch.float32).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["pissa", "pissa, rslora and stored transposed", "olora"])
def test_as_plain_lora_it_is_what_peft_converts_it_to(name: str, tmp_path: Path, registry: Registry) -> None:
    model = quietly(lambda: get_peft_model(base(), CASES[name].config()))
    quietly(lambda: model.save_pretrained(tmp_path / "start"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    quietly(lambda: model.save_pretrained(tmp_path / "trained"))
    rslora = CASES[name].config().use_rslora
    if not rslora:  # PEFT refuses to convert a rank pattern with rslora
        quietly(
            lambda: model.save_pretrained(
                tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
            )
        )
        theirs = loaded(tmp_path / "converted", registry, with_base=False)
    weights = base().state_dict()
    ours = {}
    for target, delta in loaded(tmp_path / "trained", registry, with_base=False).deltas.items():
        stored = weights[target.name]
        weight = stored.T if target.module == "turned" else stored
        lora = plain_lora(delta, weight)
        assert lora is not None
        ours[target] = lora
        expected = delta.delta(weight) if rslora else theirs.deltas[target].delta(weight)
        torch.testing.assert_close(lora.delta(weight), expected, rtol=0, atol=2e-5)
        assert expected.norm() > 1e-2 * weight.norm()
    hints = {"fan_in_fan_out": True} if rslora else {}
    save(Adapter(deltas=ours, hints=hints), tmp_path / "ours", registry=registry)
    again = quietly(lambda: PeftModel.from_pretrained(base(), tmp_path / "ours"))
    expected_state = quietly(model.merge_and_unload).state_dict()
    for key, value in quietly(again.merge_and_unload).state_dict().items():
        torch.testing.assert_close(value, expected_state[key], rtol=0, atol=2e-5)
