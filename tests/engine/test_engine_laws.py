"""The laws of the engine, on every storage dtype, layout and kind: references are float64 loops, never the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lorahub.bases.layout import Layout, Piece, Region
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.replace import Replace
from lorahub.engine.kernels import choice
from lorahub.engine.kernels.merge_c import Kernel

PART = 0.8137
"""No short fraction: 0.8 of a difference that 5 divides is a short binary number, and sums of those tie."""

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def reference(weight: torch.Tensor, *terms: tuple[float, Delta]) -> torch.Tensor:
    """``W0 + sum of weight * delta(W0)`` in float64, rounded once: to float16 by NumPy, since PyTorch rounds twice."""
    wide = weight.double()
    total = wide.clone()
    for factor, delta in terms:
        total += factor * delta.delta(wide)
    if weight.dtype == torch.float16:
        return torch.from_numpy(total.numpy().astype(np.float16))
    return total.to(weight.dtype)


def demand_close(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, *, share: float = 0.9999) -> None:
    """Law 15: nearly all elements equal, none further off than one unit in the last place."""
    assert found.dtype == expected.dtype
    equal = (found == expected).double().mean().item()
    scale = torch.maximum(before.double().abs(), expected.double().abs())
    eps = torch.finfo(found.dtype).eps
    tiny = torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - expected.double()).abs() <= torch.clamp(scale, min=tiny) * eps).all()
    assert equal >= share, f"{equal:.6%} of the elements equal the correctly rounded result"


def demand_change(before: torch.Tensor, after: torch.Tensor) -> None:
    """A law that holds of a change nobody could notice shows nothing."""
    assert (after.double() - before.double()).norm() > 1e-2 * before.double().norm()


KINDS: dict[str, Callable[[int, int, Any], Delta]] = {
    "lora": lambda out, inp, tools: tools.lora(out, inp),
    "lora in bfloat16": lambda out, inp, tools: tools.lora(out, inp, dtype=torch.bfloat16),
    "dora": lambda out, inp, tools: _dora(tools.lora(out, inp), out, inp, axis=0),
    "dora by columns": lambda out, inp, tools: _dora(tools.lora(out, inp), inp, out, axis=1),
    "full": lambda out, inp, tools: Full(tools.weights(out, inp, seed=9, dtype=torch.float32), 0.07),
    "ia3": lambda out, inp, tools: Gain(1 + 2 * tools.weights(out, 1, seed=9, dtype=torch.float32), 0),
    "ia3 on inputs": lambda out, inp, tools: Gain(1 + 2 * tools.weights(1, inp, seed=9, dtype=torch.float32), 1),
    "replace": lambda out, inp, tools: Replace(_near(out, inp, tools)),
}
"""Changes of a twentieth to a tenth of the weights: the share of elements on the wrong side of a tie grows with the
change, and reaches one in ten thousand where it is as large as bfloat16 weights, or a tenth of float16 weights."""


def _dora(lora: Any, size: int, length: int, *, axis: int) -> DoRA:
    magnitude = torch.linspace(0.9, 1.1, size) * 0.05 * length**0.5
    return DoRA(lora.up, lora.down, lora.scale, magnitude, axis)


def _near(out: int, inp: int, tools: Any) -> torch.Tensor:
    noise = tools.weights(out, inp, seed=9, dtype=torch.float32)
    return tools.weights(out, inp, dtype=torch.float32) + 0.1 * noise


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_float64_rounded_once(tools, kind, dtype):
    world = tools.World({"m.weight": tools.weights(300, 200, dtype=dtype)})
    delta = KINDS[kind](300, 200, tools)
    live = world.live()
    world.merge(live, {"m.weight": delta}, weights=[PART])
    before = world.tensors["m.weight"]
    demand_close(live["m.weight"], reference(before, (PART, delta)), before)
    demand_change(before, live["m.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_parameter_in_many_windows_equals_float64_rounded_once(tools, dtype):
    world = tools.World({"m.weight": tools.weights(2500, 1111, dtype=dtype)})
    delta = tools.lora(2500, 1111, r=16)
    live = world.live()
    world.merge(live, {"m.weight": delta})
    before = world.tensors["m.weight"]
    demand_close(live["m.weight"], reference(before, (1.0, delta)), before)
    demand_change(before, live["m.weight"])


@pytest.mark.parametrize("weight", [1.0, PART, -0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_directions_and_lengths_of_a_large_parameter_equal_float64_rounded_once(tools, dtype, weight):
    world = tools.World({"m.weight": tools.weights(1500, 1111, dtype=dtype)})
    delta = KINDS["dora"](1500, 1111, tools)
    live = world.live()
    world.merge(live, {"m.weight": delta}, weights=[weight])
    before = world.tensors["m.weight"]
    demand_close(live["m.weight"], reference(before, (weight, delta)), before)
    demand_change(before, live["m.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_folds_directions_and_lengths_and_a_row_of_zeros_stays(tools, dtype):
    if choice.native().kernel is None:
        pytest.skip(f"no compiled kernel: {choice.native().reason}")
    recorded = mock.patch.object(Kernel, "lengths", autospec=True, side_effect=Kernel.lengths)
    weight = tools.weights(40, 30, dtype=dtype)
    weight[3] = 0
    lora = tools.lora(40, 30)
    up = lora.up.clone()
    up[3] = 0
    magnitude = torch.linalg.vector_norm(weight.float(), dim=1) * 1.3
    world = tools.World({"m.weight": weight})
    delta = DoRA(up, lora.down, lora.scale, magnitude, 0)
    live = world.live()
    with recorded as found:
        world.merge(live, {"m.weight": delta})
    assert found.called
    assert not live["m.weight"][3].any()
    demand_close(live["m.weight"], reference(weight, (1.0, delta)), weight, share=0.999)
    lengthened = torch.linalg.vector_norm(live["m.weight"].double(), dim=1)
    assert torch.allclose(lengthened, magnitude.double(), rtol=3e-3)


def test_several_adapters_are_added_to_the_untouched_base(tools):
    world = tools.World({"m.weight": tools.weights(300, 200)})
    made = [KINDS[kind](300, 200, tools) for kind in ("lora", "dora", "ia3", "lora in bfloat16")]
    chosen = [0.7, -0.3, 0.5, 1.5]
    live = world.live()
    world.merge(live, *({"m.weight": delta} for delta in made), weights=chosen)
    before = world.tensors["m.weight"]
    demand_close(live["m.weight"], reference(before, *zip(chosen, made, strict=True)), before)


def test_weights_are_linear(tools):
    world = tools.World({"m.weight": tools.weights(64, 32, dtype=torch.float64)})
    delta = KINDS["dora"](64, 32, tools)
    before, moved = world.tensors["m.weight"], []
    for factor in (1.0, 2.0, -0.5):
        live = world.live()
        world.merge(live, {"m.weight": delta}, weights=[factor])
        moved.append((live["m.weight"] - before) / factor)
    assert torch.allclose(moved[0], moved[1], rtol=1e-9, atol=1e-12)
    assert torch.allclose(moved[0], moved[2], rtol=1e-9, atol=1e-12)


def test_a_replacement_alone_is_copied_bit_for_bit(tools):
    value = tools.weights(24, 16, seed=9, dtype=torch.float32)
    value[0, 0] = -0.0
    for dtype in FLOATS:
        world = tools.World({"m.weight": tools.weights(24, 16, dtype=dtype)})
        live = world.live()
        world.merge(live, {"m.weight": Replace(value)})
        assert torch.equal(live["m.weight"], value.to(dtype))
        assert torch.signbit(live["m.weight"][0, 0])


# --------------------------------------------------------------------------------------------------- layouts


def _fused(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
    """q, k and v in one parameter; k in its very middle."""
    stored = tools.weights(72, 16)
    places = {"q": slice(0, 24), "k": slice(24, 48), "v": slice(48, 72)}
    world = tools.World({"qkv.weight": stored})
    deltas = {"q.weight": tools.lora(24, 16, seed=1), "v.weight": KINDS["dora"](24, 16, tools)}
    expected = stored.clone()
    for name, rows in places.items():
        target = tools.target(f"{name}.weight")
        piece = Piece(parameter="qkv.weight", of_parameter=Region(rows=rows))
        world.layout[target] = Layout(target=target, pieces=(piece,))
        if delta := deltas.get(f"{name}.weight"):
            expected[rows] = reference(stored[rows], (PART, delta))
    return world, deltas, {"qkv.weight": expected}


def _interleaved(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
    """Rows of two targets by turns."""
    stored = tools.weights(48, 16)
    world = tools.World({"both.weight": stored})
    deltas = {"even.weight": tools.lora(24, 16, seed=1), "odd.weight": KINDS["ia3"](24, 16, tools)}
    expected = stored.clone()
    for name, first in (("even", 0), ("odd", 1)):
        target, rows = tools.target(f"{name}.weight"), tuple(range(first, 48, 2))
        piece = Piece(parameter="both.weight", of_parameter=Region(rows=rows))
        world.layout[target] = Layout(target=target, pieces=(piece,))
        expected[list(rows)] = reference(stored[list(rows)], (PART, deltas[f"{name}.weight"]))
    return world, deltas, {"both.weight": expected}


def _split(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
    """One target in two stored parameters."""
    upper, lower = tools.weights(20, 16, seed=1), tools.weights(28, 16, seed=2)
    world, target = tools.World({"a.weight": upper, "b.weight": lower}), tools.target("ab.weight")
    world.layout[target] = Layout(
        target=target,
        pieces=(
            Piece(parameter="a.weight", of_delta=Region(rows=slice(0, 20))),
            Piece(parameter="b.weight", of_delta=Region(rows=slice(20, 48))),
        ),
    )
    delta = KINDS["dora"](48, 16, tools)
    whole = reference(torch.cat([upper, lower]), (PART, delta))
    return world, {"ab.weight": delta}, {"a.weight": whole[:20], "b.weight": whole[20:]}


def _transposed(kind: str) -> Callable[[Any], tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]]:
    def build(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
        stored, delta = tools.weights(16, 24), KINDS[kind](24, 16, tools)
        world = tools.World({"m.weight": stored}, transposed=frozenset({"m.weight"}))
        return world, {"m.weight": delta}, {"m.weight": reference(stored.T, (PART, delta)).T}

    return build


def _experts(*, transposed: bool) -> Callable[[Any], tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]]:
    def build(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
        """Four experts of which two change, by different kinds."""
        stored = tools.weights(4, 16, 24) if transposed else tools.weights(4, 24, 16)
        world, expected = tools.World({"experts.weight": stored}), stored.clone()
        deltas = {"expert.1.weight": tools.lora(24, 16), "expert.3.weight": KINDS["dora"](24, 16, tools)}
        for expert in range(4):
            target = tools.target(f"expert.{expert}.weight")
            region = Region(expert=expert, transposed=transposed)
            world.layout[target] = Layout(
                target=target, pieces=(Piece(parameter="experts.weight", of_parameter=region),)
            )
            if delta := deltas.get(target.name):
                one = stored[expert].T if transposed else stored[expert]
                changed = reference(one, (PART, delta))
                expected[expert] = changed.T if transposed else changed
        return world, deltas, {"experts.weight": expected}

    return build


def _convolution(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
    stored, delta = tools.weights(24, 8, 3, 3), tools.lora(24, 8, 3, 3)
    return tools.World({"c.weight": stored}), {"c.weight": delta}, {"c.weight": reference(stored, (PART, delta))}


def _columns(tools: Any) -> tuple[Any, Mapping[str, Delta], dict[str, torch.Tensor]]:
    """A target that is the right half of a stored matrix."""
    stored, delta, target = tools.weights(24, 32), tools.lora(24, 16), tools.target("right.weight")
    piece = Piece(parameter="m.weight", of_parameter=Region(cols=slice(16, 32)))
    world = tools.World({"m.weight": stored}, layout={target: Layout(target=target, pieces=(piece,))})
    expected = stored.clone()
    expected[:, 16:] = reference(stored[:, 16:], (PART, delta))
    return world, {"right.weight": delta}, {"m.weight": expected}


LAYOUTS = {
    "fused": _fused,
    "interleaved": _interleaved,
    "split": _split,
    "transposed lora": _transposed("lora"),
    "transposed dora": _transposed("dora"),
    "transposed ia3": _transposed("ia3 on inputs"),
    "transposed replacement": _transposed("replace"),
    "experts": _experts(transposed=False),
    "transposed experts": _experts(transposed=True),
    "convolution": _convolution,
    "columns": _columns,
}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "replacement" not in name])
def test_every_layout_equals_float64_rounded_once(tools, layout):
    world, deltas, expected = LAYOUTS[layout](tools)
    live = world.live()
    world.merge(live, deltas, weights=[PART])
    for name, value in expected.items():
        demand_close(live[name], value, world.tensors[name], share=0.999)  # some hundred elements
        demand_change(world.tensors[name], live[name])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "replacement" not in name])
@pytest.mark.parametrize("shards", [1, 2])
def test_streamed_equals_merged_in_memory_for_every_layout(tools, tmp_path, layout, shards):
    world, deltas, expected = LAYOUTS[layout](tools)
    files = world.save(tmp_path / "base", shards=shards if len(expected) > 1 else 1)
    world.stream(files, tmp_path / "out", deltas, weights=[PART])
    live, written = world.live(), tools.read(tmp_path / "out")
    world.merge(live, deltas, weights=[PART])
    assert written.keys() == live.keys()
    assert all(torch.equal(written[name], live[name]) for name in live)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_merged_in_memory_for_every_kind(tools, tmp_path, kind, dtype):
    world = tools.World(
        {"m.weight": tools.weights(700, 1300, dtype=dtype), "n.weight": tools.weights(5, 5, seed=1, dtype=dtype)}
    )
    adapters = ({"m.weight": KINDS[kind](700, 1300, tools)}, {"m.weight": tools.lora(700, 1300, seed=5, r=3)})
    world.stream(world.save(tmp_path / "base"), tmp_path / "out", *adapters, weights=[0.9, 0.4])
    live, written = world.live(), tools.read(tmp_path / "out")
    world.merge(live, *adapters, weights=[0.9, 0.4])
    assert all(torch.equal(written[name].view(torch.uint8), live[name].view(torch.uint8)) for name in live)
    demand_change(world.tensors["m.weight"], live["m.weight"])


@pytest.mark.parametrize("threads", [2, 4])
def test_the_bytes_do_not_depend_on_the_number_of_threads(tools, tmp_path, threads):
    world = tools.World({f"m.{n}.weight": tools.weights(700 + n, 900, seed=n) for n in range(5)})
    adapter = {f"m.{n}.weight": (tools.lora if n % 2 else _some_dora(tools))(700 + n, 900) for n in range(5)}
    files = world.save(tmp_path / "base", shards=2)
    for count in (1, threads):
        world.stream(files, tmp_path / f"out{count}", adapter, threads=count)
    assert tools.contents(tmp_path / "out1") == tools.contents(tmp_path / f"out{threads}")
    one, many = world.live(), world.live()
    world.merge(one, adapter, threads=1)
    world.merge(many, adapter, threads=threads)
    assert all(torch.equal(one[name], many[name]) for name in one)


def _some_dora(tools: Any) -> Callable[[int, int], Delta]:
    return lambda out, inp: KINDS["dora"](out, inp, tools)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_undo_gives_back_every_bit(tools, dtype):
    tensors = {f"m.{n}.weight": tools.weights(300, 200, seed=n, dtype=dtype) for n in range(3)}
    tensors["m.0.weight"][0, 0] = -0.0
    world = tools.World(tensors)
    live = world.live()
    merged = world.merge(
        live, {name: KINDS[kind](300, 200, tools) for name, kind in zip(tensors, KINDS, strict=False)}, threads=2
    )
    assert all(not torch.equal(live[name], tensors[name]) for name in tensors)
    merged.undo()
    assert all(torch.equal(live[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_summed_in_float32(tools, dtype):
    world = tools.World({"m.weight": tools.weights(64, 32, dtype=torch.float32).to(dtype)})
    delta = tools.lora(64, 32)
    live = world.live()
    world.merge(live, {"m.weight": delta}, allow=["delta-lost"])  # of 2 bits, most changes are
    expected = (world.tensors["m.weight"].double() + delta.delta(world.tensors["m.weight"].double())).float().to(dtype)
    assert (live["m.weight"].view(torch.uint8) == expected.view(torch.uint8)).double().mean() > 0.99
