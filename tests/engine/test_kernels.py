"""The merge kernels: both twins against float64 loops, and what the compiled one is compiled to.

Without a device the kernel runs under Triton's interpreter, which computes with the same program; on one it runs
compiled.  Whether it is fast is for benchmarks to say; here only what can be read off its code is checked.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from lorahub.deltas.full import Full
from lorahub.engine.changing import passage
from lorahub.engine.kernels import choice, merge_torch, trials
from lorahub.engine.kernels.patches import Patch
from lorahub.engine.rounding import fast
from lorahub.engine.rounding.nearest import nearest
from lorahub.findings import Verdict

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [  # what the interpreter's arithmetic says where a device says nothing
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

STORED = [torch.bfloat16, torch.float16, torch.float32]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.fixture
def kernel():
    return importlib.import_module("lorahub.engine.kernels.merge_triton")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this platform compiles kernels for its device")
    return request.param


@pytest.fixture(params=["torch", "triton"])
def merge(request, device, kernel):
    return merge_torch.merge_patches if request.param == "torch" else kernel.merge_patches


SHAPES = [(64, 128, 16), (37, 50, 5), (1, 1, 1), (3, 300, 33), (130, 200, 128), (65, 16, 512), (5, 7, 2)]


def patches(stored, factors, device="cpu", *, seed=0, saved=True, strided=False):
    """Changes about as large as the weights, where rounding shows most."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    made = []
    for number, (m, n, r) in enumerate(SHAPES):
        weight = numbers(m, n).mul(0.05).to(device, stored)
        if strided:
            wide = (
                torch.zeros(2 * m, n + 3, dtype=stored, device=device) if number % 2 else torch.zeros(n, m).to(weight)
            )
            view = wide[::2, :n] if number % 2 else wide.T
            weight = view.copy_(weight)
        made.append(
            Patch(
                weight=weight,
                up=(numbers(m, r) * 0.05).to(device, factors),
                down=(numbers(r, n) / r**0.5).to(device, factors),
                scale=0.37 * (1 + number),
                saved=torch.empty(m, n, dtype=stored, device=device) if saved else None,
            )
        )
    return made


@cache
def expectation(stored, factors):
    """What becomes of ``patches(stored, factors)``; it takes long, and strides and devices change nothing of it."""
    return [by_loop(patch) for patch in patches(stored, factors)]


def by_loop(patch):
    """The weights after the merge, element by element in Python's float64."""
    weight, up, down = (tensor.double().tolist() for tensor in (patch.weight, patch.up, patch.down))
    total = [
        [before + patch.scale * sum(left * down[k][j] for k, left in enumerate(up[i])) for j, before in enumerate(row)]
        for i, row in enumerate(weight)
    ]
    return torch.tensor(total, dtype=torch.float64)


def demand_told(change, before, total, found):
    """What a kernel says happened is what did."""
    wanted, effect = total - before, found - before
    assert change.before == pytest.approx((before**2).sum().item(), rel=1e-5)
    assert change.added == change.wanted == pytest.approx((wanted**2).sum().item(), rel=1e-4)
    assert change.kept == pytest.approx((wanted * effect).sum().item(), rel=1e-4)
    assert change.lost == pytest.approx(((wanted - effect) ** 2).sum().item(), rel=1e-2, abs=1e-12 * change.before)
    assert change.relative > 1e-2


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", STORED)
def test_every_matrix_is_the_float64_sum_rounded_once(merge, device, stored, factors, strided):
    given = patches(stored, factors, device, strided=strided)
    before = [patch.weight.clone() for patch in given]
    expected = expectation(stored, factors)
    outcomes = merge(given)
    wrong = elements = 0
    for patch, weight, total, outcome in zip(given, before, expected, outcomes, strict=True):
        found = patch.weight.double().cpu()
        step = torch.finfo(stored).eps * torch.maximum(weight.double().abs().cpu(), total.abs())
        assert ((found - total).abs() <= step + torch.finfo(stored).smallest_normal).all()
        wrong += (patch.weight.cpu() != total.to(stored)).sum().item()
        elements += total.numel()
        assert torch.equal(patch.saved, weight)
        assert outcome.finite
        demand_told(outcome.change, weight.double().cpu(), total, found)
    assert wrong <= 5e-4 * elements  # ties of sums that are as large as the weights themselves


def directed(stored, factors, device="cpu", *, strength=1.0):
    """The same changes, and new lengths for the rows; one row is empty and stays so."""
    made = []
    for number, patch in enumerate(patches(stored, factors, device)):
        m = len(patch.weight)
        lengths = torch.linspace(0.5, 2, m, dtype=torch.float64, device=device)
        if number == 3:
            patch.weight[1], patch.up[1], lengths[1] = 0, 0, 0
        made.append(replace(patch, lengths=lengths, strength=strength))
    return made


def turned(patch):
    """The weights with new directions and lengths, row by row in Python's float64."""
    rows = []
    for before, moved, length in zip(
        patch.weight.tolist(), by_loop(patch).tolist(), patch.lengths.tolist(), strict=True
    ):
        found = math.sqrt(sum(each * each for each in moved))
        ratio = length / found if found or length else 1.0
        rows.append([old + patch.strength * (ratio * new - old) for old, new in zip(before, moved, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@cache
def expected_turns(stored, factors, strength):
    return [turned(patch) for patch in directed(stored, factors, strength=strength)]


QUICK = {
    (torch.bfloat16, torch.bfloat16, 0.3),
    (torch.float16, torch.float32, 1.0),
    (torch.float32, torch.bfloat16, 0.3),
}
LENGTHENED = [
    pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow)
    for each in product(STORED, (torch.bfloat16, torch.float32), (1.0, 0.3))
]
"""All of them take half a minute in the interpreter."""


@pytest.mark.parametrize(("stored", "factors", "strength"), LENGTHENED)
def test_rows_get_the_lengths_that_they_are_to_have(merge, device, stored, factors, strength):
    given = directed(stored, factors, device, strength=strength)
    before = [patch.weight.clone() for patch in given]
    wrong = elements = 0
    expected = expected_turns(stored, factors, strength)
    for patch, weight, total, outcome in zip(given, before, expected, merge(given), strict=True):
        found = patch.weight.double().cpu()
        step = torch.finfo(stored).eps * torch.maximum(weight.double().abs().cpu(), total.abs())
        assert ((found - total).abs() <= step + torch.finfo(stored).smallest_normal).all()
        wrong += (patch.weight.cpu() != total.to(stored)).sum().item()
        elements += total.numel()
        assert torch.equal(patch.saved, weight)
        assert outcome.finite
        demand_told(outcome.change, weight.double().cpu(), total, found)
    assert wrong <= 1e-3 * elements


def test_a_row_of_zeros_that_is_to_have_a_length_is_told_of(merge, device):
    given = directed(torch.bfloat16, torch.float32, device)
    given[3].lengths[1] = 1.0
    assert [each.finite for each in merge(given)] == [number != 3 for number in range(len(given))]


@pytest.mark.parametrize("stored", STORED)
def test_what_is_added_to_may_lie_elsewhere(merge, device, stored):
    here, apart = (patches(stored, torch.float32, device) for _ in range(2))
    elsewhere = [replace(patch, before=patch.weight.clone()) for patch in apart]
    for patch in elsewhere:
        patch.weight.fill_(9)
    told, same = merge(here), merge(elsewhere)
    assert told == same
    for one, other in zip(here, elsewhere, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(other.saved, other.before)
        assert not torch.equal(other.weight, other.before)


@pytest.mark.parametrize("stored", STORED)
def test_a_product_of_no_factors_changes_nothing_and_is_put_aside(merge, device, stored):
    (patch, *_) = patches(stored, torch.float32, device)
    before, (m, n) = patch.weight.clone(), patch.weight.shape
    empty = replace(patch, up=patch.up.new_empty(m, 0), down=patch.down.new_empty(0, n))
    (outcome,) = merge([empty])
    assert torch.equal(patch.weight, before)
    assert torch.equal(patch.saved, before)
    assert outcome.finite
    assert (outcome.change.added, outcome.change.lost) == (0, 0)


@pytest.mark.parametrize("stored", STORED)
def test_nothing_but_the_weights_is_written(merge, device, stored):
    given = patches(stored, torch.float32, device, saved=False, strided=True)
    around = [patch.weight._base.clone() for patch in given]
    inside = [torch.zeros_like(patch.weight._base, dtype=torch.bool) for patch in given]
    for patch, mask in zip(given, inside, strict=True):
        mask.as_strided(patch.weight.shape, patch.weight.stride(), patch.weight.storage_offset()).fill_(True)
    merge(given)
    for patch, before, mask in zip(given, around, inside, strict=True):
        assert torch.equal(patch.weight._base[~mask], before[~mask])
        assert not torch.equal(patch.weight._base[mask], before[mask])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "up", "down"])
def test_numbers_that_are_none_are_told_of(merge, device, stored, value, where):
    given = patches(stored, torch.float32, device)
    getattr(given[1], where)[-1, -1] = value
    assert [each.finite for each in merge(given)] == [number != 1 for number in range(len(given))]


def test_a_sum_beyond_the_largest_number_is_told_of(merge, device):
    given = patches(torch.float16, torch.float32, device)
    given[3].weight[0, 0] = 65504.0
    given[3].up[0] = given[3].down[:, 0] * 1e4
    assert [each.finite for each in merge(given)] == [number != 3 for number in range(len(given))]


def test_the_number_of_programs_changes_no_bit(kernel, monkeypatch):
    results = []
    shared = importlib.import_module("lorahub.engine.kernels.sums_triton")
    for programs in (1, 3, 64):
        monkeypatch.setattr(shared, "_PROGRAMS", programs)
        given = patches(torch.bfloat16, torch.float32)
        kernel.merge_patches(given)
        results.append([patch.weight for patch in given])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(kernel):
    exact = torch.tensor([[1.0, 1.0078125, -1.0, 3.0e38, 1e-40, 256.0]])
    half = torch.tensor([[2.0**-8, 2.0**-8, -(2.0**-8), 0.0, 0.0, 1.0]])  # half a step, onto even and odd neighbours
    weight = exact.to(torch.bfloat16)
    expected = (weight.double() + half.double()).to(torch.bfloat16)
    kernel.merge_patches([Patch(weight=weight, up=torch.ones(1, 1), down=half, scale=1.0)])
    assert torch.equal(weight, expected)


def test_what_was_made_ready_merges_again_and_again(kernel, device):
    for prepare, merge in (
        (kernel.prepare_patches, kernel.merge_patches),
        (merge_torch.prepare_patches, merge_torch.merge_patches),
    ):
        ours, theirs = (patches(torch.bfloat16, torch.float32, device) for _ in range(2))
        ready = prepare(ours)
        for _ in range(3):
            assert ready() == merge(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.weight, other.weight)
                assert torch.equal(one.saved, other.saved)


def test_no_patches_and_empty_ones_are_nothing_to_do(merge):
    empty = Patch(weight=torch.empty(0, 4), up=torch.empty(0, 2), down=torch.empty(2, 4), scale=1.0)
    assert merge([]) == []
    assert [each.finite for each in merge([empty])] == [True]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernel_that_gives_other_numbers_is_found_out(kernel, storage):
    def wrong(given):
        def merge():
            outcomes = kernel.merge_patches(given)
            given[0].weight[3, 3] += 1
            return outcomes

        return merge

    assert trials.merges_alike(kernel.prepare_patches, torch.device("cpu"), storage=storage)
    assert not trials.merges_alike(wrong, torch.device("cpu"), storage=storage)


def test_no_other_dtype_than_the_one_that_is_merged_is_tried(monkeypatch):
    """Every dtype that is tried is compiled, which takes seconds."""
    tried = []

    def merge(patches):
        tried.extend(patch.weight.dtype for patch in patches)
        return merge_torch.prepare_patches(patches)

    def tried_on_the_cpu(prepare, device, **options):
        return trials.merges_alike(prepare, torch.device("cpu"), **options)

    module = SimpleNamespace(prepare_patches=merge)
    monkeypatch.setitem(sys.modules, "lorahub.engine.kernels.merge_triton", module)
    monkeypatch.setattr(choice, "merges_alike", tried_on_the_cpu)
    monkeypatch.setattr(choice, "find_spec", lambda _: object())
    assert choice.merger.__wrapped__(torch.device("cuda", 0), torch.bfloat16).name == "triton"
    assert set(tried) == {torch.bfloat16}


def test_a_device_without_a_compiled_kernel_is_told_so():
    chosen = choice.merger(torch.device("cpu"), torch.bfloat16)
    assert chosen.name == "torch"
    assert "CUDA" in chosen.reason


def test_a_kernel_that_cannot_be_compiled_is_replaced_and_the_reason_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "lorahub.engine.kernels.merge_triton", None)
    chosen = choice.merger.__wrapped__(torch.device("cuda", 0), torch.bfloat16)
    assert chosen.run is merge_torch.prepare_patches
    assert "merge_triton" in chosen.reason


def on_cuda(monkeypatch):
    """Merges on the CPU whose reports are made as if the parameters lay on a CUDA device without a compiled kernel."""
    monkeypatch.setitem(sys.modules, "lorahub.engine.kernels.merge_triton", None)
    monkeypatch.setattr(fast, "merger", choice.merger.__wrapped__)

    def elsewhere(steps, forms):
        cuda = torch.device("cuda", 0)
        return fast.told_of_kernels(steps, {name: (cuda, dtype) for name, (_, dtype) in forms.items()})

    monkeypatch.setattr(passage, "told_of_kernels", elsewhere)


def test_a_merge_without_the_compiled_kernel_says_so_and_why_and_goes_on(tools, monkeypatch):
    on_cuda(monkeypatch)
    dtypes = {"half.weight": torch.float16, "brain.weight": torch.bfloat16, "wide.weight": torch.float32}
    world = tools.World({name: tools.weights(24, 16, dtype=dtype) for name, dtype in dtypes.items()})
    live = world.live()
    merged = world.merge(live, {name: tools.lora(24, 16) for name in dtypes})
    (finding,) = merged.report.findings
    assert (finding.code, finding.axis, finding.level) == (fast.KERNEL_PLAIN, "libraries", Verdict.EXACT)
    assert finding.where == ("brain.weight", "half.weight")  # none is compiled for float32
    assert "cuda:0" in finding.message
    assert "merge_triton" in finding.message
    assert finding.document() in merged.report.document()["findings"]
    assert not any(torch.equal(live[name], weight) for name, weight in world.tensors.items())


def test_nothing_is_said_of_a_kernel_where_none_would_have_run(tools, monkeypatch):
    weight = tools.weights(24, 16)
    world, low = tools.World({"m.weight": weight}), {"m.weight": tools.lora(24, 16)}
    assert world.merge(world.live(), low).report.findings == ()  # on the CPU
    on_cuda(monkeypatch)
    assert world.merge(world.live(), low, mode="exact").report.findings == ()
    assert world.merge(world.live(), low, mode="stochastic(3)").report.findings == ()
    assert world.merge(world.live(), {"m.weight": Full(weight.float() * 0.1)}).report.findings == ()
    monkeypatch.setattr(fast, "merger", lambda *_: choice.Choice("triton", merge_torch.prepare_patches))
    assert world.merge(world.live(), low).report.findings == ()


def test_what_is_rounded_at_random_is_not_left_to_a_kernel_that_rounds_to_the_nearest(tools, monkeypatch):
    world = tools.World({"m.weight": tools.weights(48, 40)})
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setattr(fast, "merger", lambda *_, name=name: choice.Choice(name, merge_torch.prepare_patches))
        live = world.live()
        world.merge(live, {"m.weight": tools.lora(48, 40)}, mode="stochastic(3)")
        results.append(live["m.weight"])
    exact = world.tensors["m.weight"].double() + tools.lora(48, 40).delta(world.tensors["m.weight"].double())
    assert torch.equal(*results)
    assert (results[0] != nearest(exact, torch.bfloat16)).double().mean() > 0.1


COMPILE = """
import json, sys
import triton
import triton.language as language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorahub.engine.kernels import merge_triton as kernel

capability, stored, directed = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
half = stored == "int16"
rows, cols, ranks = kernel.BLOCK
rows = kernel.DIRECTED if directed else rows
constants = dict(STORE=getattr(language, stored), FACTOR=language.float32, PRODUCT="tf32x3", SAVE=False, WIDE=True)
constants |= dict(DIRECTED=directed)
constants |= dict(SUM=language.float32 if half else language.float64, ROWS=rows, COLS=cols, RANKS=ranks)
arguments = dict(table="*i64", numbers="*fp64", part_of_tile="*i32", tiles="i32", sums="*fp64")
source = ASTSource(kernel.merge_tiles, arguments, constants)
code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.OPTIONS)
print(json.dumps(dict(shared=code.metadata.shared, ptx=code.asm["ptx"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stored", ["int16", "float16", "float32"])
@pytest.mark.parametrize("lengths", [False, True])
def test_the_kernel_compiles_for_devices_that_are_not_here_and_moves_16_bytes_at_a_time(capability, stored, lengths):
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), stored, str(lengths)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout)
    assert code["shared"] <= 100 << 10
    assert "mma" in code["ptx"]  # products run on tensor cores
    assert "st.global.v4" in code["ptx"]
    assert "ld.global.v4" in code["ptx"]
