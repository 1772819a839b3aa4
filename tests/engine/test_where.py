"""Streaming with units folded on a device: the same bytes, in the same order of moving and folding."""

from __future__ import annotations

import pytest
import torch

from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.replace import Replace
from lorahub.engine.crew import Workspace
from lorahub.engine.folding.bind import Bound
from lorahub.engine.folding.fold import Fold
from lorahub.engine.folding.windows import UNIT
from lorahub.engine.kernels import merge_torch
from lorahub.engine.planning.casting import cast
from lorahub.engine.writing import stream
from lorahub.engine.writing import where as wheres
from lorahub.engine.writing.stream import stream_merge
from lorahub.engine.writing.where import HOST, Device, folded_on
from lorahub.errors import LorahubError, NotFinite, UsageError

MODES = ["fast", "exact", "stochastic(7)"]
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def adapter(tools):
    low = tools.lora(24, 16, seed=2)
    return {
        "embed.weight": tools.lora(50, 16, seed=4),
        "layers.0.q.weight": Gain(torch.linspace(0.5, 1.5, 16).reshape(1, 16), 1),
        "layers.0.q.bias": Full(tools.weights(24, seed=9)),
        "layers.1.q.weight": DoRA(low.up, low.down, low.scale, torch.linspace(0.1, 0.3, 24), 0),
        "norm.weight": Replace(tools.weights(16, seed=3)),
    }


@pytest.fixture
def played():
    """The CPU as if it were a device: what is folded there is a copy that was moved."""
    return Device(torch.device("cpu"))


def merged(base, folder, adapter, tools, where, *, mode="fast", dtype=None, threads=2):
    planned = base.plan(adapter, mode=mode)
    planned = planned if dtype is None else cast(planned, base.index(), dtype)
    files, out = folder / "base", folder / f"out-{where is HOST}"
    files = base.save(files) if not files.exists() else tools.survey(files)
    report = stream_merge(files, planned, tools.bring(adapter), out, where=where, threads=threads)
    return out, report


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_folded_on_a_device_is_written_as_what_is_folded_here(
    base, adapter, tools, tmp_path, played, mode, dtype
):
    out, report = merged(base, tmp_path, adapter, tools, played, mode=mode, dtype=dtype)
    here, expected = merged(base, tmp_path, adapter, tools, HOST, mode=mode, dtype=dtype)
    assert tools.contents(out) == tools.contents(here)
    assert report.changes == expected.changes
    assert all(report.changes.values())
    found = tools.read(out)
    assert not any(torch.equal(found[name].to(base.tensors[name].dtype), base.tensors[name]) for name in adapter)


def test_a_devices_kernel_gets_the_products(base, adapter, tools, tmp_path, played, as_device):
    calls = as_device(merge_torch.merge_patches)
    out, _ = merged(base, tmp_path, adapter, tools, played)
    shapes = {tuple(patch.weight.shape) for call in calls for patch in call}
    assert shapes == {(50, 16), (24, 16)}
    changed = {name: delta for name, delta in adapter.items() if name.endswith("q.weight") or "embed" in name}
    found = tools.read(out)
    for name, delta in changed.items():
        before = base.tensors[name].double()
        expected = before + delta.delta(before)
        assert torch.allclose(found[name].double(), expected, rtol=2**-8, atol=0)
        assert not torch.allclose(before, expected, rtol=2**-4, atol=0)


def test_units_on_a_device_are_as_large_as_those_that_are_folded_here(tools):
    world = tools.World({"m.weight": tools.weights(4096, 2048)})
    adapter, there = {"m.weight": tools.lora(4096, 2048)}, torch.device("meta")
    planned = world.plan(adapter)
    (step,), bound = planned.steps, Bound(planned, tools.bring(adapter))
    brought = bound.ingredients(step, lambda _: None)
    rows = [[unit.rows for unit in Fold(step, brought, there, streamed=streamed).units] for streamed in (False, True)]
    assert len(rows[0]) == 1
    assert len(rows[1]) == 4096 * 2048 * 2 // UNIT
    assert rows[1][-1].stop == 4096


def test_rows_move_when_they_may_and_are_read_when_they_are_there(monkeypatch, played):
    said = []

    class Stream:
        def __init__(self, device):
            pass

        def on(self):
            said.append("moving")
            return wheres.nullcontext()

        def __getattr__(self, name):
            return lambda: said.append(name)

    class Folding:
        def run(self, unit, before, out, space):
            said.append("fold")
            return out.copy_(before * 2)

    monkeypatch.setattr(wheres, "_Stream", Stream)
    rows = torch.arange(6.0).view(2, 3)
    played.fold(Folding(), None, rows, rows, Workspace())
    assert said == ["follow", "moving", "lead", "fold", "follow", "moving", "wait"]
    assert rows.tolist() == [[0, 2, 4], [6, 8, 10]]
    wide, out = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3)
    played.fold(Folding(), None, wide, out, Workspace())
    assert out.tolist() == [[2.0] * 3] * 2
    assert wide.tolist() == [[1.0] * 3] * 2


def test_a_result_that_is_not_finite_and_a_device_without_room_leave_nothing(
    base, adapter, tools, tmp_path, played, monkeypatch
):
    broken = adapter | {"layers.0.q.bias": Full(torch.full((24,), 3e38))}
    base.tensors["layers.0.q.bias"][0] = 3e38
    with pytest.raises(NotFinite, match=r"layers\.0\.q\.bias"):
        merged(base, tmp_path, broken, tools, played)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 MB")

    monkeypatch.setattr("lorahub.engine.folding.fold.Fold.run", full)
    with pytest.raises(LorahubError, match=r"no room for a few units.*CUDA out of memory"):
        merged(base, tmp_path, adapter, tools, played)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_was_folded_elsewhere_is_not_gone_on_with(base, adapter, tools, tmp_path):
    planned, files = base.plan(adapter), base.save(tmp_path / "base")
    bound = Bound(planned, tools.bring(adapter))
    places = HOST, Device(torch.device("cuda:0")), Device(torch.device("cuda:1"))
    here, there, beside = (stream._identity(files, planned, bound, {}, place) for place in places)
    assert here != there == beside


@pytest.mark.parametrize(
    ("device", "said"), [("rocket", "no device"), ("cuda:99", "does not compute here"), ("meta", "meta device")]
)
def test_a_device_that_is_not_there_is_refused(device, said):
    with pytest.raises(UsageError, match=said):
        folded_on(device)


def test_the_cpu_is_here():
    assert folded_on(None) is folded_on("cpu") is folded_on(torch.device("cpu")) is HOST


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("mode", MODES)
def test_a_cuda_device_writes_what_the_cpu_writes(base, adapter, tools, tmp_path, mode):
    out, report = merged(base, tmp_path, adapter, tools, folded_on("cuda"), mode=mode, threads=4)
    here, _ = merged(base, tmp_path, adapter, tools, HOST, mode=mode)
    assert not report.findings
    if mode == "fast":
        found, expected = tools.read(out), tools.read(here)
        assert all(torch.allclose(found[name].double(), expected[name].double(), rtol=2**-7) for name in expected)
    else:
        assert tools.contents(out) == tools.contents(here)
