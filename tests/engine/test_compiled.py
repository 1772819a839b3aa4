"""The CPU's compiled kernel: against float64, cut in every way, and what it notes of the way back."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from lorahub.deltas.lora import LoRA
from lorahub.engine.changing import undo
from lorahub.engine.changing.merge import merge_into
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.crew import Workspace
from lorahub.engine.folding import planes
from lorahub.engine.folding.fold import Fold
from lorahub.engine.kernels import choice, compiling, merge_c
from lorahub.engine.kernels.compiling import NotCompiled, library
from lorahub.engine.kernels.merge_c import HIGHEST_RANK, Kernel, Notes
from lorahub.engine.rounding import fast
from lorahub.engine.rounding.nearest import nearest
from lorahub.engine.undoing.checksum import checksum
from lorahub.errors import NotFinite

SHAPES = [
    (64, 128, 16),
    (37, 50, 5),
    (1, 1, 1),
    (3, 300, 33),
    (130, 200, 128),
    (65, 16, 256),
    (5, 7, 2),
    (9, 31, 3),
    (2, 70000, 2),
]
STORED = [torch.bfloat16, torch.float16, torch.float32]
FACTORS = [torch.bfloat16, torch.float32]

SCALE = 0.6931471805599453  # no short fraction: with 0.7 a fifth of all products of bfloat16 is half a unit of float32


def compiled(folder, *flags):
    """The kernel compiled with other flags than this machine's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORAHUB_KERNELS", str(folder))
        patched.setattr(compiling, "_NATIVE", flags)
        patched.setattr(compiling, "_FLAGS", ("-std=gnu11", "-O2", "-fPIC", "-shared", "-Wno-psabi", *flags))
        return Kernel(library.__wrapped__(*merge_c._SOURCES))


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
OTHERS = {
    "portable": ((), {torch.backends.cpu.get_cpu_capability()}),
    "avx2": (_AVX2, {"AVX2", "AVX512"}),
    "avx512": ((*_AVX2, *(f"-mavx512{each}" for each in ("f", "bw", "vl", "dq"))), {"AVX512"}),
}
"""What a kernel is compiled for besides this very machine -> flags, and where it runs, in PyTorch's words."""


@pytest.fixture(scope="module", params=["native", *OTHERS])
def kernel(request, tmp_path_factory):
    if request.param == "native":
        if (found := choice.native()).kernel is None:
            pytest.skip(f"no compiled kernel: {found.reason}")
        return found.kernel
    flags, machines = OTHERS[request.param]
    if (here := torch.backends.cpu.get_cpu_capability()) not in machines:
        pytest.skip(f"this machine ({here}) does not run it")
    try:
        return compiled(tmp_path_factory.mktemp("kernels") / request.param, *flags)
    except NotCompiled as reason:
        pytest.skip(f"no compiled kernel: {reason}")


def problem(m, n, r, stored, factors, *, seed=0, size=0.1):
    """Weights, up and down, the change ``size`` times as large as the weights."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down = (numbers(m, r) / r**0.5).to(factors), (numbers(r, n) * size * 0.05).to(factors)
    return numbers(m, n).mul(0.05).to(stored), up.double(), down.double()


def exact(weight, up, down, scale):
    """In float64, element by element of the product."""
    total = weight.double()
    scale = torch.tensor(scale, dtype=torch.float32 if weight.dtype.itemsize == 2 else torch.float64).double()
    for row in range(len(weight)):
        for k in range(len(down)):
            total[row] += scale * up[row, k] * down[k]
    return total


def takes(kernel, stored):
    if not kernel.takes(stored, 1):
        pytest.skip("this kernel has no such weights")


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_results_are_the_float64_ones_rounded_once(kernel, stored, factors):
    takes(kernel, stored)
    wrong = total = 0
    for seed, (m, n, r) in enumerate(SHAPES):
        size = 0.02 if stored == torch.float16 else 0.1  # as far as float32 sums keep the promise
        weight, up, down = problem(m, n, r, stored, factors, seed=seed, size=size)
        wanted, before = exact(weight, up, down, SCALE), weight.clone()
        aside = torch.empty_like(weight)
        assert kernel.add(kernel.pack(up, down, stored), slice(None), SCALE, weight, aside)
        assert torch.equal(weight, before)
        assert kernel.add(kernel.pack(up, down, stored), slice(None), SCALE, weight, weight)
        assert torch.equal(weight, aside)
        assert (weight != before).any()
        wrong += int((weight != nearest(wanted, stored)).sum())
        total += weight.numel()
        step = torch.finfo(stored).eps * torch.maximum(before.double().abs(), wanted.abs()).clamp_min(
            torch.finfo(stored).smallest_normal
        )
        assert ((weight.double() - wanted).abs() <= step).all()
    assert wrong / total < 5e-4  # some thousands of elements here; the share is 1e-4 or less


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_rows_have_lengths_and_numbers_of_their_own(kernel, stored, factors):
    takes(kernel, stored)
    wrong = total = 0
    for seed, (m, n, r) in enumerate(SHAPES):
        size = 0.02 if stored == torch.float16 else 0.1
        weight, up, down = problem(m, n, r, stored, factors, seed=seed, size=size)
        before, packed = weight.clone(), kernel.pack(up, down, stored)
        lengths = kernel.lengths(packed, slice(None), SCALE, weight)
        moved = exact(weight, up, down, SCALE)
        assert lengths.dtype == torch.float64
        assert ((lengths - moved.square().sum(1).sqrt()).abs() <= 3e-7 * lengths).all()
        keep = torch.linspace(0.5, 1.5, m, dtype=torch.float64)
        by_row = torch.stack((keep, SCALE * keep.flip(0)), 1).contiguous()
        wanted = torch.stack([keep[i] * before[i].double() + by_row[i, 1] * (up[i] @ down) for i in range(m)])
        aside = torch.empty_like(weight)
        assert kernel.add_by_row(packed, slice(None), by_row, weight, aside)
        assert torch.equal(weight, before)
        assert kernel.add_by_row(packed, slice(None), by_row, weight, weight)
        assert torch.equal(weight, aside)
        wrong += int((weight != nearest(wanted, stored)).sum())
        total += weight.numel()
        cut = torch.empty_like(weight[m // 2 :])
        assert kernel.add_by_row(packed, slice(m // 2, m), by_row[m // 2 :], before[m // 2 :], cut)
        assert torch.equal(cut, aside[m // 2 :])
    assert wrong / total < 5e-4


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_the_bits_of_an_element_do_not_depend_on_how_the_matrix_is_cut(kernel, factors):
    weight, up, down = problem(45, 150, 20, torch.bfloat16, factors)
    whole, cut = torch.empty_like(weight), torch.empty_like(weight)
    packed = kernel.pack(up, down, torch.bfloat16)
    kernel.add(packed, slice(None), 0.3, weight, whole)
    for start, stop in ((0, 1), (1, 14), (14, 45)):
        kernel.add(packed, slice(start, stop), 0.3, weight[start:stop], cut[start:stop])
    assert torch.equal(cut, whole)
    for start, stop in ((0, 33), (33, 34), (34, 150)):
        part = weight[:, start:stop].contiguous()
        kernel.add(kernel.pack(up, down[:, start:stop], torch.bfloat16), slice(None), 0.3, part, part)
        assert torch.equal(part, whole[:, start:stop])


@pytest.mark.parametrize("size", [1e-6, 0.01, 0.1, 1, 100])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_what_is_noted_gives_back_every_bit_and_the_checksums_are_those_of_tensors(kernel, stored, size):
    takes(kernel, stored)
    noted = 0
    for seed, (m, n, r) in enumerate(SHAPES):
        weight, up, down = problem(m, n, r, stored, torch.float32, seed=seed, size=size)
        before, packed = weight.clone(), kernel.pack(up, down, stored)
        notes = Notes(kernel, weight.dtype, weight.numel(), n, Workspace())
        assert kernel.add(packed, slice(None), 0.7, weight, weight, notes)
        assert all(map(torch.equal, notes.checksums(), (checksum(before), checksum(weight))))
        back, other = torch.empty_like(weight), torch.empty_like(weight)
        for each in (back, other):
            kernel.add(packed, slice(None), -0.7, weight, each)
        noted += int((back != before).sum())
        kernel.restore(notes.residual, back)
        notes.residual.copy().apply(other)
        assert torch.equal(back, before)
        assert torch.equal(other, before)
    assert noted or size < 0.01


def test_parts_of_a_matrix_are_noted_one_after_another(kernel):
    weight, up, down = problem(50, 70, 4, torch.bfloat16, torch.float32, size=0.5)
    before, packed = weight.clone(), kernel.pack(up, down, torch.bfloat16)
    notes = Notes(kernel, weight.dtype, weight.numel(), 70, Workspace())
    kernel.add(packed, slice(0, 13), 0.7, weight[:13], weight[:13], notes)
    notes.keep(weight[13:30])
    kernel.add(packed, slice(30, 50), 0.7, weight[30:], weight[30:], notes, 30 * 70)
    assert torch.equal(weight[13:30], before[13:30])
    assert all(map(torch.equal, notes.checksums(), (checksum(before), checksum(weight))))
    back = weight.clone()
    for rows in (slice(0, 13), slice(30, 50)):
        kernel.add(packed, rows, -0.7, weight[rows], back[rows])
    assert not torch.equal(back, before)
    kernel.restore(notes.residual, back)
    assert torch.equal(back, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_result_that_is_no_number_is_told_and_noted_like_others(kernel, stored, bad):
    takes(kernel, stored)
    weight, up, down = problem(20, 40, 3, stored, torch.float32)
    weight[19, 37] = bad
    before, packed = weight.clone(), kernel.pack(up, down, stored)
    notes = Notes(kernel, weight.dtype, weight.numel(), 40, Workspace())
    assert not kernel.add(packed, slice(None), 1.0, weight, weight, notes)
    back = torch.empty_like(weight)
    kernel.add(packed, slice(None), -1.0, weight, back)
    kernel.restore(notes.residual, back)
    assert torch.equal(back.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF, -1, -0x7FFFFF], ids=hex)
def test_no_way_of_writing_what_is_no_number_is_taken_for_one(kernel, stored, bits):
    """Rounded by integers, some of them would become zero."""
    takes(kernel, stored)
    odd = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    weight, up, down = problem(20, 40, 3, stored, torch.float32)
    for spoilt in ("up", "down", "weight"):
        live, one, other = weight.clone(), up.float(), down.float()
        {"up": one, "down": other, "weight": live}[spoilt][-1, -1:] = odd.to(
            stored if spoilt == "weight" else odd.dtype
        )
        before, packed = live.clone(), kernel.pack(one, other, stored)
        notes = Notes(kernel, live.dtype, live.numel(), 40, Workspace())
        assert not kernel.add(packed, slice(None), 1.0, live, torch.empty_like(live))
        assert not kernel.add(packed, slice(None), 1.0, live, live, notes)
        kernel.add(packed, slice(None), -1.0, live, live)
        kernel.restore(notes.residual, live)
        assert torch.equal(live.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_what_it_foresees_is_what_it_does(kernel, stored, factors):
    takes(kernel, stored)
    for seed, (m, n, r) in enumerate(SHAPES):
        weight, up, down = problem(m, n, r, stored, factors, seed=seed)
        before, packed, pick = weight.clone(), kernel.pack(up, down, stored), slice(0, m, 1 + seed % 3)
        found = kernel.look(packed, slice(None), 0.7, weight, pick)
        assert torch.equal(weight, before)
        kernel.add(packed, slice(None), 0.7, weight, weight)
        start, added = before[pick].double(), 0.7 * (up @ down)[pick]
        effect = weight[pick].double() - start
        wanted = [start.square(), added.square(), added.square(), effect * added, (effect - added).square()]
        for name, each in zip(("before", "added", "wanted", "kept", "lost"), wanted, strict=True):
            assert getattr(found, name) == pytest.approx(float(each.sum()), rel=1e-4), name
        assert 0 < found.lost < found.added


def test_numbers_below_the_normal_ones_are_rounded_like_others(kernel):
    least = torch.finfo(torch.bfloat16).smallest_normal
    steps = torch.arange(-300, 300, dtype=torch.float64) / 128  # in units of the least normal number
    weight = (steps * least).to(torch.bfloat16)[None].contiguous()
    assert ((weight != 0) & (weight.abs() < least)).sum() > 200
    for added in (0.0, least / 64, -least / 2, least):
        down = torch.full((1, 600), added, dtype=torch.float64)
        packed = kernel.pack(torch.ones(1, 1).double(), down, torch.bfloat16)
        before, live = weight.clone(), weight.clone()
        notes = Notes(kernel, live.dtype, 600, 600, Workspace())
        kernel.add(packed, slice(None), 1.0, live, live, notes)
        below = added != 0 and abs(added) < least  # a factor that bfloat16 multiplication takes for zero
        if not below:
            assert torch.equal(live, nearest(before.double() + added, torch.bfloat16))
        kernel.add(packed, slice(None), -1.0, live, live)
        kernel.restore(notes.residual, live)
        assert torch.equal(live.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_the_largest_number_is_one_and_the_next_is_none(kernel, stored):
    takes(kernel, stored)
    most = torch.finfo(stored).max
    weight, one = torch.full((2, 3), most, dtype=stored), torch.ones(2, 1, dtype=torch.float64)
    ulp = most * torch.finfo(stored).eps / 2
    for added, finite in ((ulp * 0.49, True), (ulp * 0.51, False)):
        packed = kernel.pack(one, torch.full((1, 3), added, dtype=torch.float64), stored)
        out = torch.empty_like(weight)
        assert kernel.add(packed, slice(None), 1.0, weight, out) is finite
        assert bool(torch.isfinite(out).all()) is finite


# --------------------------------------------------------------------------------------------------- in the engine


@pytest.fixture
def native():
    found = choice.native().kernel
    if found is None:
        pytest.skip(f"no compiled kernel: {choice.native().reason}")
    return found


def thin(tools, *shape, seed):
    lora = tools.lora(*shape, seed=seed)
    return LoRA(lora.up, lora.down, lora.scale * 0.05)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_merge_notes_its_journal_in_passing_and_undo_gives_back_every_bit(tools, stored, monkeypatch):
    if not choice.native().kernel.takes(stored, 4):
        pytest.skip("this kernel has no such weights")
    monkeypatch.setattr("lorahub.engine.folding.sums.UNIT", 300 * 16)  # several units
    weights = {
        "a.weight": tools.weights(200, 300, seed=1, dtype=stored),
        "b.weight": tools.weights(64, 64, seed=2, dtype=torch.float64),
    }
    changes = {"a.weight": thin(tools, 200, 300, seed=3), "b.weight": thin(tools, 64, 64, seed=4)}
    world = tools.World(weights)
    live = world.live()
    with monkeypatch.context() as patched:
        ran = []
        run = Fold.run
        patched.setattr(Fold, "run", lambda fold, *rest: (ran.append(fold._step.out), run(fold, *rest))[1])
        merged = world.merge(live, changes)
    assert set(ran) == {"b.weight"}  # float64
    assert 0 < merged.report.undo["journal"] < 0.1 * weights["a.weight"].nbytes
    assert merged.report.undo["copy"] == weights["b.weight"].nbytes
    for name, weight in weights.items():
        wanted = nearest(weight.double() + changes[name].delta(weight.double()), weight.dtype)
        assert not torch.equal(live[name], weight)
        near = torch.isclose(live[name], wanted, rtol=1e-12) if weight.dtype == torch.float64 else live[name] == wanted
        assert near.double().mean() > 0.999
    merged.undo()
    assert all(torch.equal(live[name], weight) for name, weight in weights.items())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("policy", ["auto", "none", "journal"])
def test_numbers_that_are_none_leave_everything_as_it_was(tools, policy, monkeypatch):
    monkeypatch.setattr("lorahub.engine.folding.sums.UNIT", 60 * 4)
    weights = {f"{name}.weight": tools.weights(40, 60, seed=1, dtype=torch.bfloat16) for name in "ab"}
    weights["b.weight"][39, 59] = 3.38e38
    up, down = torch.zeros(40, 1), torch.zeros(1, 60)
    up[:] = 0.01
    down[0, :] = 0.01
    over = LoRA(torch.full((40, 1), 1e18), torch.cat([torch.zeros(1, 59), torch.full((1, 1), 1e20)], 1), 1.0)
    world = tools.World(weights)
    live = world.live()
    adapter, keeping = {"a.weight": LoRA(up, down, 1.0), "b.weight": over}, Keeping(policy=policy)
    with pytest.raises(NotFinite, match=r"b\.weight"):
        merge_into(live, world.plan(adapter), tools.bring(adapter), keeping=keeping, threads=1)
    assert all(torch.equal(live[name], weight) for name, weight in weights.items())


@pytest.mark.usefixtures("native")
def test_a_change_too_large_to_be_noted_is_copied(tools):
    weights = {"a.weight": tools.weights(200, 300, seed=1, dtype=torch.bfloat16)}
    world, lora = tools.World(weights), tools.lora(200, 300, seed=3)
    live = world.live()
    merged = world.merge(live, {"a.weight": LoRA(lora.up, lora.down, lora.scale * 20)})
    assert merged.report.changes["a.weight"] > 0.5
    assert merged.report.undo == {"copy": 200 * 300 * 2, "journal": 0}
    assert not torch.equal(live["a.weight"], weights["a.weight"])
    merged.undo()
    assert torch.equal(live["a.weight"], weights["a.weight"])


def test_a_merge_without_the_kernel_says_so_and_why_unless_nobody_wants_it(tools, monkeypatch):
    world = tools.World({"a.weight": tools.weights(40, 60, seed=1, dtype=torch.bfloat16)})
    changes = {"a.weight": thin(tools, 40, 60, seed=3)}
    for reason in ("there is no C compiler here", ""):
        for module in (fast, planes, undo):
            monkeypatch.setattr(module, "native", lambda reason=reason: choice.Native(None, reason))
        findings = world.merge(world.live(), changes).report.findings
        told = [finding for finding in findings if finding.code == fast.KERNEL_PLAIN]
        assert bool(told) is bool(reason)
        assert all(reason in finding.message and "CC=gcc" in finding.remedy for finding in told)


def test_ranks_beyond_what_a_cache_holds_go_another_way(native):
    assert native.takes(torch.bfloat16, HIGHEST_RANK)
    assert not native.takes(torch.bfloat16, HIGHEST_RANK + 1)
    assert native.takes(torch.float32, HIGHEST_RANK // 2)
    assert not native.takes(torch.float32, HIGHEST_RANK // 2 + 1)
    assert not native.takes(torch.float64, 1)


# --------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    monkeypatch.setenv("LORAHUB_KERNELS", str(folder))
    return folder


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("LORAHUB_KERNELS", "off")
    with pytest.raises(NotCompiled, match="LORAHUB_KERNELS is off"):
        library.__wrapped__(*merge_c._SOURCES)


def test_a_machine_without_a_compiler_is_told_apart(monkeypatch, elsewhere):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NotCompiled, match=r"no C compiler here \(no-such-compiler\)"):
        library.__wrapped__(*merge_c._SOURCES)
    assert not elsewhere.exists()


@pytest.mark.usefixtures("native")
def test_a_source_that_does_not_compile_says_why(tmp_path, elsewhere):
    source = tmp_path / "broken.c"
    source.write_text("int f(void) { return nothing; }\n")
    with pytest.raises(NotCompiled, match=r"error: .*nothing"):
        library.__wrapped__(source)
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("native")
def test_what_was_compiled_is_kept_and_what_is_broken_there_is_not_used(elsewhere):
    assert isinstance(library.__wrapped__(*merge_c._SOURCES), ctypes.CDLL)
    (kept,) = elsewhere.iterdir()
    when = kept.stat().st_mtime_ns
    library.__wrapped__(*merge_c._SOURCES)
    assert kept.stat().st_mtime_ns == when
    kept.unlink()
    kept.write_bytes(b"not a library")
    Kernel(library.__wrapped__(*merge_c._SOURCES))
    assert kept.read_bytes() == b"not a library"


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this platform has no owners of files")
def test_a_folder_that_others_can_write_to_is_not_used(elsewhere):
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    Kernel(library.__wrapped__(*merge_c._SOURCES))
    assert not list(elsewhere.iterdir())


def test_a_kernel_that_gives_other_numbers_is_not_used(monkeypatch, native):
    right = native.add
    monkeypatch.setattr(native, "add", lambda *rest: right(*rest[:2], rest[2] * 1.5, *rest[3:]))
    monkeypatch.setattr(choice, "kernel", lambda: native)
    found = choice.native.__wrapped__()
    assert found.kernel is None
    assert "other numbers for torch.bfloat16" in found.reason
