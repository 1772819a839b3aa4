"""Merging into live tensors: all or nothing, in place, and back again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorahub.bases.framework import Edits
from lorahub.deltas.dora import DoRA
from lorahub.deltas.replace import Replace
from lorahub.engine.changing.merge import merge_into
from lorahub.errors import BaseMismatch, Degraded, Incompatible, LorahubError, NotFinite, UsageError


@pytest.fixture
def adapter(tools):
    return {
        "layers.0.q.weight": tools.lora(24, 16, seed=1),
        "layers.1.q.weight": tools.lora(24, 16, seed=2),
        "norm.weight": Replace(tools.weights(16, seed=3)),
    }


def same(live, world):
    return all(
        torch.equal(live[name].view(torch.uint8), world.tensors[name].view(torch.uint8)) for name in world.tensors
    )


def test_the_report_tells_what_changed_and_how_much(base, adapter):
    live = base.live()
    report = base.merge(live, adapter).report
    assert list(report.changes) == ["layers.0.q.weight", "layers.1.q.weight", "norm.weight"]
    before, after = base.tensors["norm.weight"].double(), live["norm.weight"].double()
    assert report.changes["norm.weight"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    assert report.largest_name == "norm.weight"
    assert report.largest_change == report.changes["norm.weight"]
    assert report.changed == 3
    assert report.document()["plan"] == base.plan(adapter).digest()


def test_a_change_to_zeros_has_no_relative_size(base):
    base.tensors["norm.weight"].zero_()
    report = base.merge(base.live(), {"norm.weight": Replace(torch.ones(16))}).report
    assert report.changes == {"norm.weight": None}
    assert (report.largest_change, report.largest_name) == (0.0, "")


def test_weights_change_where_they_lie(base, adapter):
    live = {name: torch.nn.Parameter(tensor) for name, tensor in base.live().items()}
    seen = live["layers.0.q.weight"][3].detach()
    address, version = live["layers.0.q.weight"].data_ptr(), live["layers.0.q.weight"]._version
    base.merge(live, adapter)
    assert live["layers.0.q.weight"].data_ptr() == address
    assert torch.equal(seen, live["layers.0.q.weight"][3])
    assert live["layers.0.q.weight"]._version > version  # autograd notices
    assert live["layers.0.q.weight"].requires_grad
    assert live["layers.0.q.weight"].grad_fn is None


def test_tensors_made_in_inference_mode_and_strided_ones_are_changed_alike(base, adapter):
    expected = base.live()
    base.merge(expected, adapter)
    with torch.inference_mode():
        frozen = {name: tensor.clone() for name, tensor in base.tensors.items()}
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in base.tensors.items()}
    turned = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor.clone() for name, tensor in base.tensors.items()
    }
    for live in (frozen, strided, turned):
        merged = base.merge(live, adapter)
        assert all(torch.equal(live[name], expected[name]) for name in live)
        merged.undo()
        assert all(torch.equal(live[name], base.tensors[name]) for name in live)


# --------------------------------------------------------------------------------------------------- undo


def test_undo_works_once_and_frees_the_copies(base, adapter):
    live = base.live()
    merged = base.merge(live, adapter)
    merged.undo()
    assert same(live, base)
    assert merged.undone
    with pytest.raises(UsageError, match="undone already"):
        merged.undo()


def test_leaving_the_block_undoes(base, adapter):
    live = base.live()
    with base.merge(live, adapter):
        assert not same(live, base)
    assert same(live, base)
    with base.merge(live, adapter) as merged:
        merged.undo()
    assert same(live, base)


@pytest.mark.parametrize("name", ["layers.0.q.weight", "norm.weight"])
def test_undo_refuses_to_lose_what_someone_else_wrote(base, adapter, name):
    live = base.live()
    merged = base.merge(live, adapter)
    kept = live[name].clone()
    live[name].data[0] += 1  # past autograd's notice
    changed = live[name].clone()
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        merged.undo()
    assert torch.equal(live[name], changed)
    live[name].copy_(kept)
    merged.undo()
    assert same(live, base)


def test_merges_are_undone_in_turn_the_last_one_first(base, adapter, tools):
    live = base.live()
    first = base.merge(live, adapter)
    between = {name: tensor.clone() for name, tensor in live.items()}
    second = base.merge(live, {"layers.0.q.weight": tools.lora(24, 16, seed=7)})
    with pytest.raises(UsageError, match="last one before"):
        first.undo()
    second.undo()
    assert all(torch.equal(live[name], between[name]) for name in live)
    first.undo()
    assert same(live, base)


def test_an_undo_that_was_interrupted_goes_on_where_it_was(base, adapter, monkeypatch):
    live = base.live()
    merged = base.merge(live, adapter)

    def restore(keepers, threads):
        raise KeyboardInterrupt  # a signal would not do: a run in the background ignores it

    with monkeypatch.context() as patched:
        patched.setattr("lorahub.engine.changing.state.restore", restore)
        with pytest.raises(KeyboardInterrupt):
            merged.undo()
    assert not merged.undone
    merged.undo()
    assert same(live, base)


# --------------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_at_the_last_parameter_leaves_all_as_it_was(base, adapter, threads):
    adapter["norm.weight"].value[3] = float("nan")
    live = base.live()
    with pytest.raises(NotFinite, match=r"'a' brings for norm\.weight"):
        base.merge(live, adapter, threads=threads)
    assert same(live, base)


def test_an_interrupt_leaves_all_as_it_was(base, adapter, tools):
    live = base.live()

    def progress(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into(live, base.plan(adapter), tools.bring(adapter), threads=1, progress=progress)
    assert same(live, base)


def test_progress_counts_parameters_and_ends_with_all(base, adapter, tools):
    seen = []
    merge_into(
        base.live(), base.plan(adapter), tools.bring(adapter), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_no_memory_for_copies_is_said_before_anything_changes(base, adapter, monkeypatch):
    live = base.live()

    def refuse(*_, **__):
        raise RuntimeError("not enough memory: you tried to allocate 7 bytes")

    monkeypatch.setattr("lorahub.lazy.torch.empty", refuse, raising=False)
    with pytest.raises(LorahubError, match="no room for a copy of") as caught:
        base.merge(live, adapter)
    assert "merge to disk" in caught.value.hint
    assert same(live, base)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensor: None, "has no norm"),
        (lambda tensor: tensor[:8], r"\[8\].*planned as \[16\] BF16"),
        (lambda tensor: tensor.float(), "torch.float32 and was planned"),
        (lambda tensor: tensor.to("meta"), "meta device"),
        (lambda tensor: tensor[:1].expand(16), "expanded"),
        (lambda tensor: tensor.to_sparse(), "keeps its numbers elsewhere"),
    ],
)
def test_what_is_not_the_planned_parameter_is_refused_before_anything_changes(base, adapter, spoil, says):
    live = base.live()
    live["norm.weight"] = spoil(live["norm.weight"])
    if live["norm.weight"] is None:
        del live["norm.weight"]
    with pytest.raises(BaseMismatch, match=says):
        base.merge(live, adapter)
    assert torch.equal(live["layers.0.q.weight"], base.tensors["layers.0.q.weight"])


def test_two_parameters_that_share_memory_are_refused(base, adapter):
    live = base.live()
    live["layers.1.q.weight"] = live["layers.0.q.weight"]
    with pytest.raises(BaseMismatch, match="share memory"):
        base.merge(live, adapter)


def test_findings_that_stop_the_plan_stop_the_merge(base, adapter, tools):
    adapter["elsewhere.weight"] = tools.lora(3, 3)
    live = base.live()
    with pytest.raises(Degraded):
        base.merge(live, adapter)
    base.merge(live, adapter, allow=["target-missing"])


def test_new_heads_and_untied_weights_need_another_model(base, tools):
    base.head = Edits()
    with pytest.raises(Incompatible, match=r"head\.weight.*no place") as caught:
        base.merge(base.live(), {"head.weight": Replace(tools.weights(3, 16))})
    assert "-o FOLDER" in caught.value.hint
    base.tied, base.apart = (("embed.weight", "lm_head.weight"),), Edits(copied={"lm_head.weight": "embed.weight"})
    with pytest.raises(Incompatible, match=r"untying lm_head\.weight"):
        base.merge(base.live(), {"embed.weight": tools.lora(50, 16)}, allow=["tied-parameter"])


# --------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_that_was_not_planned_is_refused(base, adapter, tools):
    plan, live = base.plan(adapter), base.live()
    with pytest.raises(UsageError, match="'a', which was not given"):
        merge_into(live, plan, {})
    with pytest.raises(UsageError, match=r"no change for norm\.weight"):
        merge_into(live, plan, tools.bring({name: delta for name, delta in adapter.items() if name != "norm.weight"}))
    with pytest.raises(UsageError, match=r"as \[20, 16\], not \[24, 16\]"):
        merge_into(live, plan, tools.bring(adapter | {"layers.0.q.weight": tools.lora(20, 16)}))
    assert same(live, base)


@dataclasses.dataclass(frozen=True, eq=False)
class Gated(DoRA):
    """A change that looks at a sibling: itself times what the gate is before anything is merged."""

    def delta(self, weight, **siblings):
        return super().delta(weight) * siblings["gate"].reshape(-1, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_siblings_are_read_before_they_change(tools, tmp_path, streamed):
    world = tools.World(
        {"m.weight": tools.weights(24, 16), "m.gate": tools.weights(24, seed=1)}, stored={"m.gate": "m.g"}
    )
    lora = tools.lora(24, 16)
    adapter = {
        "m.gate": Replace(torch.ones(24)),
        "m.weight": DoRA(lora.up, lora.down, 1.0, torch.linspace(0.1, 0.3, 24), 0),
    }
    kind = tools.kinds["dora"]

    def touches(group):
        return (dataclasses.replace(kind.touches(group)[0], reads=("gate",)),)

    from lorahub.engine.planning.plan import plan
    from lorahub.engine.writing.stream import stream_merge

    kinds = tools.kinds | {"dora": dataclasses.replace(kind, touches=touches)}
    planned = plan(world.index(), world, {"a": (tools.header(adapter), 1.0)}, kinds)
    gated = adapter["m.weight"]
    gated = Gated(gated.up, gated.down, gated.scale, gated.magnitude, gated.axis)
    brought = tools.bring(adapter | {"m.weight": gated})
    if streamed:
        stream_merge(world.save(tmp_path / "base"), planned, brought, tmp_path / "out")
        live = tools.read(tmp_path / "out")
        live["m.gate"] = live.pop("m.g")
    else:
        live = world.live()
        merged = merge_into(live, planned, brought, threads=2)
    before = {name: tensor.double() for name, tensor in world.tensors.items()}
    expected = (before["m.weight"] + gated.delta(before["m.weight"], gate=before["m.gate"])).bfloat16()
    assert (live["m.weight"] == expected).double().mean() > 0.99
    assert torch.equal(live["m.gate"], torch.ones(24).bfloat16())
    if not streamed:
        merged.undo()
        assert same(live, world)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_merging_on_a_gpu_equals_the_cpu_to_rounding_and_is_undone_exactly(base, adapter):
    there = {name: tensor.cuda() for name, tensor in base.live().items()}
    here = base.live()
    base.merge(here, adapter)
    merged = base.merge(there, adapter)
    assert all((there[name].cpu() == here[name]).double().mean() > 0.99 for name in here)
    merged.undo()
    assert all(torch.equal(there[name].cpu(), base.tensors[name]) for name in here)
