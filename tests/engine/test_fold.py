"""How parameters are cut, what is said of numbers that are none, and that threads stop together."""

from __future__ import annotations

import threading

import pytest
import torch

from lorahub.bases.layout import Piece, Region
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.engine.crew import Workspace, crew_size, run_jobs
from lorahub.engine.folding.fold import Fold
from lorahub.engine.folding.sums import Ingredient, Sums
from lorahub.engine.folding.windows import cut, gather
from lorahub.engine.planning.steps import Form, Step
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.rounding.table import read_mode
from lorahub.errors import NotFinite, UsageError


def make(weight, *deltas, piece=None, local=True, weights=None, mode=FAST):
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    form = Form(tuple(weight.shape), codes[weight.dtype])
    step = Step(out="m.weight", source="m.weight", before=form, after=form, terms=())
    items = [
        Ingredient(
            weight=weights[n] if weights else 1.0,
            delta=delta,
            piece=piece or Piece(parameter="m.weight"),
            local=local,
            adapter=chr(97 + n),
        )
        for n, delta in enumerate(deltas)
    ]
    return Fold(step, items, mode=mode)


def run(fold, weight):
    out = torch.empty_like(weight)
    changes = [fold.run(unit, weight[unit.rows], out[unit.rows], Workspace()) for unit in fold.units]
    return out, sum(changes[1:], changes[0])


# --------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 63, 64, 65, 1000])
def test_windows_cover_all_rows_once_and_have_one_row_only_where_there_is_one(rows):
    for row_bytes in (1, 100, 1 << 18, 1 << 24):
        windows = cut(10, 10 + rows, row_bytes, window=1 << 20)
        assert [row for window in windows for row in range(window.start, window.stop)] == list(range(10, 10 + rows))
        assert rows == 1 or min(window.stop - window.start for window in windows) > 1
        assert all((window.stop - window.start) * row_bytes <= max(1 << 20, 4 * row_bytes) for window in windows)


def test_units_are_consecutive_windows_up_to_their_size():
    windows = cut(0, 100, 1 << 10, window=10 << 10)
    units = gather(windows, 100, unit=2500)
    assert [window for unit in units for window in unit] == list(windows)
    assert {unit[-1].stop - unit[0].start for unit in units} == {20}
    assert all(len(unit) == 1 for unit in gather(windows, 1 << 20, unit=1))


def test_units_follow_the_stored_rows_and_a_region_starts_new_windows(tools):
    weight = tools.weights(3000, 1000)
    plain = make(weight, tools.lora(3000, 1000))
    assert plain.units[0].rows.start == 0
    assert plain.units[-1].rows.stop == 3000
    banded = make(weight, tools.lora(500, 1000), piece=Piece(parameter="m", of_parameter=Region(rows=slice(701, 1201))))
    edges = {window.start for unit in banded.units for window in unit.windows}
    assert {0, 701, 1201} <= edges


def test_an_empty_parameter_has_no_units():
    weight = torch.empty(0, 8, dtype=torch.bfloat16)
    assert make(weight, LoRA(torch.empty(0, 2), torch.ones(2, 8), 1.0)).units == ()


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 3.0), (0.5, 2.0)])
def test_a_single_number_is_one_row(weight, expected):
    step = Step(out="scale", source="scale", before=Form((), "F32"), after=Form((), "F32"), terms=())
    item = Ingredient(weight=weight, delta=Replace(torch.tensor(3.0)), piece=Piece(parameter="scale"), local=True)
    assert run(Fold(step, [item]), torch.tensor([1.0]))[0].tolist() == [expected]


# --------------------------------------------------------------------------------------------------- sums


def test_rows_outside_a_region_keep_their_bits(tools):
    weight = tools.weights(40, 16)
    weight[0, 0], weight[39, 0] = -0.0, float("nan")
    fold = make(weight, tools.lora(8, 16), piece=Piece(parameter="m", of_parameter=Region(rows=slice(10, 18))))
    out, _ = run(fold, weight)
    untouched = [*range(10), *range(18, 40)]
    assert torch.equal(out[untouched].view(torch.int16), weight[untouched].view(torch.int16))
    assert not torch.equal(out[10:18], weight[10:18])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_size_of_a_change_is_that_of_the_sum_of_all_terms(tools, dtype):
    weight = tools.weights(300, 64, dtype=dtype)
    deltas = [tools.lora(300, 64, seed=1), tools.lora(300, 64, seed=2)]
    _, change = run(make(weight, *deltas, weights=[1.0, -0.5]), weight)
    wide = weight.double()
    expected = (deltas[0].delta(wide) - 0.5 * deltas[1].delta(wide)).norm() / wide.norm()
    assert change.relative == pytest.approx(expected.item(), rel=1e-5)
    value = Replace(tools.weights(300, 64, seed=3))
    _, change = run(make(weight, value), weight)
    assert change.relative == pytest.approx(((value.value.double() - wide).norm() / wide.norm()).item(), rel=1e-5)


def test_opposite_adapters_change_nothing(tools):
    weight, delta = tools.weights(64, 64), tools.lora(64, 64)
    out, change = run(make(weight, delta, delta, weights=[1.0, -1.0]), weight)
    assert torch.equal(out, weight)
    assert change.relative < 1e-6


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [(0.0, 0.5), (0.5, 0.0), (1e-43, 0.5), (1e-43, -0.5), (0.0, 0.0, 0.25), (0.0, 0.0)])
def test_an_adapter_of_no_weight_or_next_to_none_takes_nothing_from_the_others(tools, weights, dtype, mode):
    weight = tools.weights(24, 16, dtype=dtype)
    deltas = [tools.lora(24, 16, seed=number) for number in range(len(weights))]
    out, _ = run(make(weight, *deltas, weights=list(weights), mode=read_mode(mode)), weight)
    total = weight.double()
    for strength, delta in zip(weights, deltas, strict=True):
        total += strength * delta.scale * (delta.up.double() @ delta.down.double())
    assert (out != total.to(dtype)).sum() <= (4 if mode == "fast" else 0)
    torch.testing.assert_close(out.double(), total, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(out, weight) == (not any(each > 1e-3 for each in map(abs, weights)))


def test_sums_are_finer_than_what_they_are_rounded_to():
    storages = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32, torch.float64)
    assert {storage: Sums(storage, torch.device("cpu"), FAST).dtype for storage in storages} == {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float64,
        torch.float8_e4m3fn: torch.float32,
        torch.float32: torch.float64,
        torch.float64: torch.float64,
    }


def test_factors_are_not_rounded_to_the_storage_dtype():
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    out, _ = run(make(weight, LoRA(torch.full((8, 1), 1.003), torch.full((1, 8), 1.003), 1.0)), weight)
    assert torch.tensor(1.003).bfloat16().item() == 1.0
    assert out[0, 0].item() == 1.0078125  # bfloat16 next to 1.003 squared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_broken_adapter_is_named(tools, dtype):
    weight = tools.weights(64, 64, dtype=dtype)
    broken = tools.lora(64, 64)
    broken.down[2, 3] = float("nan")
    with pytest.raises(NotFinite, match=r"adapter 'b' brings for m\.weight"):
        run(make(weight, tools.lora(64, 64), broken), weight)


def test_an_overflow_of_the_storage_names_the_adapters_and_the_limit(tools):
    weight = torch.full((8, 8), 60000.0, dtype=torch.float16)
    delta = LoRA(torch.full((8, 1), 100.0), torch.full((1, 8), 100.0), 1.0)
    with pytest.raises(NotFinite, match=r"'a' at 1 takes m\.weight beyond 65504"):
        run(make(weight, delta), weight)
    with pytest.raises(NotFinite, match="beyond 65504"):
        run(make(weight, Replace(torch.full((8, 8), 70000.0))), weight)


def test_a_large_norm_alone_is_no_overflow():
    weight = torch.full((64, 64), 60000.0, dtype=torch.float16)
    out, _ = run(make(weight, LoRA(torch.ones(64, 1), torch.ones(1, 64), 100.0)), weight)
    assert torch.equal(out, torch.full((64, 64), 60100.0).half())


def test_a_base_that_was_broken_before_is_said_to_be(tools):
    weight = tools.weights(64, 64)
    weight[5, 5] = float("inf")
    with pytest.raises(NotFinite, match="of the base holds NaN or infinity before"):
        run(make(weight, tools.lora(64, 64)), weight)


# --------------------------------------------------------------------------------------------------- threads


def test_jobs_run_on_one_core_each_and_leave_the_settings_as_they_were():
    before, seen = torch.get_num_threads(), []
    run_jobs([lambda _: seen.append(torch.get_num_threads())] * 4, 2)
    assert seen == [1, 1, 1, 1]
    assert torch.get_num_threads() == before
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_jobs_may_return_more_jobs_which_come_next():
    done = []
    first = [lambda _: done.append("a1"), lambda _: done.append("a2")]
    run_jobs([lambda _: first, lambda _: done.append("b")], 1)
    assert done == ["a1", "a2", "b"]


def test_the_first_failure_stops_the_crew_and_is_raised_when_all_are_idle():
    before, done = torch.get_num_threads(), []

    def fail(_):
        raise ValueError("one")

    with pytest.raises(ValueError, match="one"):
        run_jobs([fail, *[lambda _: done.append(1)] * 50], 1)
    assert not done
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lorahub-")]


def test_an_interrupt_ends_a_crew_but_not_one_that_works_to_the_end():
    def interrupt():
        raise KeyboardInterrupt

    gate, done = threading.Event(), []

    def wait(_):
        gate.wait()
        done.append(1)

    def release():
        gate.set()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        run_jobs([wait] * 20, 1, tick=release)
    assert len(done) < 20
    gate.clear()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([wait] * 20, 2, tick=release, to_the_end=True)
    assert len(done) == 20


def test_fewer_than_one_thread_is_refused():
    assert crew_size(None) == crew_size(None, [1 << 23, 10]) == torch.get_num_threads()
    assert crew_size(None, [2000, 10]) == 1
    assert crew_size(3, [2000, 10]) == 3
    with pytest.raises(UsageError):
        crew_size(0)


def test_scratch_memory_is_used_again():
    space, cpu = Workspace(), torch.device("cpu")
    large = space.take("x", (4, 8), torch.float32, cpu)
    small = space.take("x", (2, 3), torch.float32, cpu)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (2, 3)
    assert space.take("y", (2, 3), torch.float32, cpu).data_ptr() != small.data_ptr()
