"""How much of a change is left as stored, what is said of that, and results in another dtype."""

from __future__ import annotations

import pytest
import torch

from lorahub.deltas.lora import LoRA
from lorahub.engine.folding.retention import IDLE, LOST
from lorahub.errors import Degraded, NotFinite, UsageError
from lorahub.findings import Verdict


def problem(tools, size, *, dtype=torch.bfloat16, shape=(900, 700)):
    weight = tools.weights(*shape, dtype=dtype)
    delta = tools.lora(*shape, r=8)
    now = delta.delta(weight.double()).norm() / weight.double().norm()
    return weight, LoRA(delta.up, delta.down, delta.scale * size / float(now))


def measure(weight, delta, after):
    wanted = delta.delta(weight.double())
    effect = after.double() - weight.double()
    return float((effect * wanted).sum() / wanted.square().sum()), float((effect - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1e-3, 4e-3, 1e-2, 4e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gain_and_loss_are_those_of_all_elements_to_a_few_hundredths(tools, dtype, size):
    weight, delta = problem(tools, size, dtype=dtype)
    world = tools.World({"m.weight": weight})
    live = world.live()
    merged = world.merge(live, {"m.weight": delta}, allow=[LOST])
    gain, error = measure(weight, delta, live["m.weight"])
    found = merged.report.retained["m.weight"]
    assert found == merged.report.retention
    assert found.gain == pytest.approx(gain, abs=0.03)
    assert found.error == pytest.approx(error, abs=0.03)
    assert found.lost == abs(1 - found.gain)
    assert merged.report.document()["retention"] == {"gain": found.gain, "error": found.error}


def test_a_change_that_is_mostly_lost_is_refused_unless_allowed_and_nothing_changes(tools, tmp_path):
    weight, delta = problem(tools, 5e-4)
    world = tools.World({"m.weight": weight})
    live = world.live()
    with pytest.raises(Degraded, match=r"loses [0-9]+% of the change.*most in m\.weight") as error:
        world.merge(live, {"m.weight": delta})
    assert "--allow delta-lost" in error.value.hint
    assert "--dtype float32" in error.value.hint
    assert torch.equal(live["m.weight"], weight)
    files = world.save(tmp_path / "base")
    with pytest.raises(Degraded, match="loses"):
        world.stream(files, tmp_path / "out", {"m.weight": delta})
    assert not (tmp_path / "out").exists()
    report = world.stream(files, tmp_path / "out", {"m.weight": delta}, allow=[LOST])
    assert report.retention.lost > 0.5
    assert [(each.code, each.level) for each in report.findings] == [(LOST, Verdict.DEGRADED)]


def test_a_noticeable_loss_is_said_and_a_small_one_is_not(tools):
    for size, codes in ((1.5e-3, [LOST]), (4e-2, [])):
        weight, delta = problem(tools, size)
        report = tools.World({"m.weight": weight}).merge({"m.weight": weight.clone()}, {"m.weight": delta}).report
        assert [each.code for each in report.findings] == codes
        assert all(each.level is Verdict.UNVERIFIED for each in report.findings)


def test_small_changes_are_lost_beside_large_ones_without_a_word(tools):
    large, delta = problem(tools, 4e-2)
    small, little = problem(tools, 2e-4)
    world = tools.World({"m.weight": large, "n.weight": small})
    report = world.merge(world.live(), {"m.weight": delta, "n.weight": little}).report
    assert report.retained["n.weight"].lost > 0.5
    assert report.retention.lost < 0.1
    assert not report.findings


def test_nothing_is_measured_where_nothing_was_to_change(tools):
    world = tools.World({"m.weight": tools.weights(24, 16)})
    report = world.merge(world.live(), {"m.weight": LoRA(torch.zeros(24, 2), torch.ones(2, 16), 1.0)}).report
    assert report.retained == {}
    assert report.retention is None


def test_a_change_of_zeros_everywhere_is_said_and_one_beside_a_real_one_is_not(tools, tmp_path):
    zero = LoRA(torch.zeros(24, 2), torch.ones(2, 16), 1.0)
    world = tools.World({"m.weight": tools.weights(24, 16), "n.weight": tools.weights(24, 16, seed=1)})
    for report in (
        world.merge(world.live(), {"m.weight": zero, "n.weight": zero}).report,
        world.stream(world.save(tmp_path / "base"), tmp_path / "out", {"m.weight": zero, "n.weight": zero}),
    ):
        (finding,) = report.findings
        assert (finding.code, finding.level, finding.where) == (IDLE, Verdict.UNVERIFIED, ("m.weight", "n.weight"))
    report = world.merge(world.live(), {"m.weight": zero, "n.weight": tools.lora(24, 16)}).report
    assert report.findings == ()


def test_a_weight_in_float16_is_not_told_to_be_stored_in_float16(tools):
    for dtype, size, said in ((torch.bfloat16, 5e-4, True), (torch.float16, 6e-5, False)):
        weight, delta = problem(tools, size, dtype=dtype)
        with pytest.raises(Degraded) as error:
            tools.World({"m.weight": weight}).merge({"m.weight": weight.clone()}, {"m.weight": delta})
        assert "--dtype float32" in error.value.hint
        assert ("or float16" in error.value.hint) is said


# --------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", ["float32", "fp16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_a_result_is_stored_in_the_dtype_that_is_asked_for_throughout(tools, tmp_path, stored, dtype):
    weight, delta = problem(tools, 2e-2, dtype=stored, shape=(300, 200))
    rest = {"n.weight": tools.weights(40, 30, seed=5, dtype=stored), "count": torch.arange(5)}
    extras = {"inv_freq": torch.rand(8)}
    world = tools.World(
        {"m.weight": weight, **rest}, extras=extras, config={"torch_dtype": "x", "part": {"dtype": "y"}}
    )
    files = world.save(tmp_path / "base")
    world.stream(files, tmp_path / "out", {"m.weight": delta}, dtype=dtype, allow=[LOST])
    found = tools.read(tmp_path / "out")
    target = {"float32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    expected = (weight.double() + delta.delta(weight.double())).to(target)
    assert (found["m.weight"] == expected).double().mean() > 0.9995
    assert found["m.weight"].dtype == target
    assert torch.equal(found["n.weight"], rest["n.weight"].to(target))
    assert torch.equal(found["count"], rest["count"])
    assert torch.equal(found["inv_freq"], extras["inv_freq"])
    word = {"fp16": "float16"}.get(dtype, dtype)
    text = (tmp_path / "out" / "config.json").read_text()
    assert f'"torch_dtype": "{word}"' in text
    assert f'"dtype": "{word}"' in text.replace('"torch_dtype"', "")


def test_a_finer_result_keeps_what_bfloat16_loses(tools, tmp_path):
    weight, delta = problem(tools, 5e-4)
    files = tools.World({"m.weight": weight}).save(tmp_path / "base")
    world = tools.World({"m.weight": weight})
    half = world.stream(files, tmp_path / "half", {"m.weight": delta}, dtype="float16", allow=[LOST])
    full = world.stream(files, tmp_path / "full", {"m.weight": delta}, dtype="float32")
    same = world.stream(files, tmp_path / "same", {"m.weight": delta}, allow=[LOST])
    assert same.retention.gain < 0.5
    assert half.retention.gain > 0.9
    assert full.retention.lost < 1e-3
    assert full.retention.gain == pytest.approx(1, abs=1e-3)


def test_a_weight_that_float16_cannot_hold_is_refused(tools, tmp_path):
    weights = {"m.weight": tools.weights(24, 16), "n.weight": torch.full((8, 8), 1e6, dtype=torch.bfloat16)}
    world = tools.World(weights)
    files = world.save(tmp_path / "base")
    with pytest.raises(NotFinite, match=r"n\.weight"):
        world.stream(files, tmp_path / "out", {"m.weight": tools.lora(24, 16)}, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_what_is_no_dtype_is_refused(tools):
    with pytest.raises(UsageError, match="is no dtype that a result can be stored in"):
        tools.World({"m.weight": tools.weights(24, 16)}).plan({"m.weight": tools.lora(24, 16)}, dtype="int8")
