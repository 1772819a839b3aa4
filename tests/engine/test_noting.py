"""Kernels that merge and note the way back: both twins against loops in plain Python, and what one is compiled to.

Without a device the kernel runs under Triton's interpreter, which computes with the same program; on one it runs
compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorahub.engine.kernels import choice, noting_torch, trials
from lorahub.engine.kernels.patches import Patch
from lorahub.engine.kernels.tiles import COLS, FAR, PLACE, ROWS

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [  # what the interpreter's arithmetic says where a device says nothing
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
SHAPES = [(64, 128, 16), (37, 50, 5), (1, 1, 1), (3, 300, 33), (130, 272, 20), (7, 5, 0), (0, 8, 2)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this platform compiles kernels for its device")
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton"])
def noter(request, device):
    triton = importlib.import_module("lorahub.engine.kernels.noting_triton")
    return noting_torch.NOTER if request.param == "torch" else triton.NOTER


def patches(stored, factors, device, *, size=0.1, swapping=False):
    """Changes of about ``size`` times the weights; when swapping, of weights that lie elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    made = []
    for m, n, r in SHAPES:
        before = numbers(m, n).mul(0.05).to(device, stored)
        made.append(
            Patch(
                weight=torch.zeros_like(before) if swapping else before,
                up=(numbers(m, r) * 0.05).to(device, factors),
                down=(numbers(r, n) / max(r, 1) ** 0.5).to(device, factors),
                scale=size,
                before=before if swapping else None,
            )
        )
    return made


def noted_by_hand(tiles):
    """(row, column) -> steps, read entry by entry."""
    found = {}
    across = -(-tiles.shape[1] // COLS)
    page, begins, counts = tiles.page.tolist(), tiles.begins.tolist(), tiles.counts.tolist()
    for tile, (begin, (count, far)) in enumerate(zip(begins, counts, strict=True)):
        apart = iter(page[begin + count : begin + count + far])
        for entry in page[begin : begin + count]:
            place, steps = entry & ((1 << PLACE) - 1), entry >> PLACE
            at = tile // across * ROWS + place // COLS, tile % across * COLS + place % COLS
            assert at not in found
            found[at] = next(apart) if steps == FAR else steps
        assert next(apart, None) is None
    return found


def differences_by_hand(before, back):
    """(row, column) -> by how many steps of the grid what was there differs from what taking the change off gives."""
    ours, theirs = (each.cpu().view(torch.int16).tolist() for each in (before, back))
    return {
        (i, j): (a - b + (1 << 15)) % (1 << 16) - (1 << 15)
        for i, (row, other) in enumerate(zip(ours, theirs, strict=True))
        for j, (a, b) in enumerate(zip(row, other, strict=True))
        if a != b
    }


@pytest.mark.parametrize("swapping", [False, True])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_what_is_noted_is_what_taking_the_change_off_gets_wrong(noter, device, stored, factors, swapping):
    given = patches(stored, factors, device, swapping=swapping)
    before = [patch.source.clone() for patch in given]
    foreseen = noter.look(given)
    assert all(torch.equal(patch.source, weight) for patch, weight in zip(given, before, strict=True))
    noted = noter.write(foreseen)
    far = several = 0
    for patch, weight, one, tiles in zip(given, before, foreseen, noted, strict=True):
        total = weight.double() + patch.scale * (patch.up.double() @ patch.down.double())
        step = torch.finfo(stored).eps * torch.maximum(weight.double().abs(), total.abs())
        assert ((patch.weight.double() - total).abs() <= step + torch.finfo(stored).smallest_normal).all()
        assert one.outcome.finite
        assert tiles.page.numel() == tiles.counts.sum()
        assert one.outcome.change.added == pytest.approx(((total - weight.double()) ** 2).sum().item(), rel=1e-4)
        back = patch.weight.clone()
        noter.put([replace(patch, weight=back, before=None, scale=-patch.scale)])
        assert noted_by_hand(tiles) == differences_by_hand(weight, back)
        noter.restore([(tiles, back)])
        assert torch.equal(back, weight)
        several += int(tiles.counts[:, 0].sum())
        far += int(tiles.counts[:, 1].sum())
    assert several > 1000
    assert far > 10


def test_twins_note_the_same(device):
    triton = importlib.import_module("lorahub.engine.kernels.noting_triton").NOTER
    one, other = (patches(torch.bfloat16, torch.bfloat16, device) for _ in range(2))
    # powers of two are multiplied and summed without rounding, in whatever order
    exact = [
        [replace(p, up=p.up.sign(), down=p.down.sign() * 2**-9, scale=0.5) for p in given] for given in (one, other)
    ]
    ours, theirs = (
        each.write(each.look(given)) for each, given in zip((triton, noting_torch.NOTER), exact, strict=True)
    )
    for a, b, p, q in zip(ours, theirs, *exact, strict=True):
        assert torch.equal(p.weight, q.weight)
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(a.begins, b.begins)
        assert torch.equal(a.page, b.page)
    assert sum(each.page.numel() for each in ours) > 100


def test_merging_without_a_note_gives_the_same_bits(noter, device):
    twin = "merge_torch" if noter is noting_torch.NOTER else "merge_triton"
    merge = importlib.import_module(f"lorahub.engine.kernels.{twin}")
    for stored in (torch.bfloat16, torch.float16):
        ours, theirs = (patches(stored, torch.float32, device) for _ in range(2))
        noter.write(noter.look(ours))
        merge.merge_patches(theirs)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, theirs, strict=True))


def test_the_number_of_programs_changes_no_bit_of_the_notes(device, monkeypatch):
    shared, triton = (importlib.import_module(f"lorahub.engine.kernels.{name}_triton") for name in ("sums", "noting"))
    results = []
    for programs in (1, 3, 64):
        monkeypatch.setattr(shared, "_PROGRAMS", programs)
        results.append(triton.NOTER.write(triton.NOTER.look(patches(torch.bfloat16, torch.float32, device))))
    for other in results[1:]:
        assert all(torch.equal(a.page, b.page) for a, b in zip(results[0], other, strict=True))
        assert all(torch.equal(a.begins, b.begins) for a, b in zip(results[0], other, strict=True))


def test_a_change_of_a_tenth_takes_less_than_a_tenth(noter, device):
    generator = torch.Generator().manual_seed(1)
    weight, up, down = (torch.randn(*shape, generator=generator) for shape in ((256, 512), (256, 16), (16, 512)))
    for stored in (torch.bfloat16, torch.float16):
        patch = Patch(weight=weight.to(device, stored), up=up.to(device), down=down.to(device), scale=0.1 / 16**0.5)
        (tiles,) = noter.write(noter.look([patch]))
        assert 0.02 * 2 * weight.numel() < tiles.nbytes < 0.1 * 2 * weight.numel()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e4])
def test_what_is_no_number_is_foreseen(noter, device, broken):
    fine, wrong = patches(torch.float16, torch.float32, device)[:2]
    wrong = replace(wrong, up=torch.full_like(wrong.up, broken), down=torch.full_like(wrong.down, 10.0))
    before = [each.weight.clone() for each in (fine, wrong)]
    found = noter.look([fine, wrong])
    assert [each.outcome.finite for each in found] == [True, False]
    assert torch.equal(fine.weight, before[0])
    assert torch.equal(wrong.weight, before[1])


@pytest.mark.parametrize("storage", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_kernel_is_tried_before_its_first_use(device, storage):
    right = importlib.import_module("lorahub.engine.kernels.noting_triton").NOTER
    assert trials.notes_alike(right, device, storage=storage)
    assert trials.notes_alike(noting_torch.NOTER, device, storage=storage)

    def forgetful(foreseen):
        return [replace(each, counts=torch.zeros_like(each.counts)) for each in right.write(foreseen)]

    def late(foreseen):
        return [replace(each, begins=each.begins + 1) for each in right.write(foreseen)]

    assert not trials.notes_alike(replace(right, write=forgetful), device, storage=storage)
    assert not trials.notes_alike(replace(right, write=late), device, storage=storage)
    assert not trials.notes_alike(replace(right, put=lambda _: []), device, storage=storage)


def test_the_cpu_has_its_own_way():
    assert choice.noter(torch.device("cpu"), torch.bfloat16).name == "torch"


COMPILE = """
import json, sys
import triton
import triton.language as language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorahub.engine.kernels import noting_triton as kernel

capability, stored, write = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
rows, cols, ranks = kernel.BLOCK
constants = dict(STORE=getattr(language, stored), FACTOR=language.float32, PRODUCT="tf32x3", WIDE=True, WRITE=write)
constants |= dict(SUM=language.float32 if stored == "int16" else language.float64, ROWS=rows, COLS=cols, RANKS=ranks)
arguments = dict(table="*i64", scales="*fp64", part_of_tile="*i32", tiles="i32", sums="*fp64")
arguments |= dict(counts="*i32", begins="*i64", page="*i16")
target = GPUTarget("cuda", capability, 32)
code = triton.compile(ASTSource(kernel.note_tiles, arguments, constants), target=target, options=kernel.OPTIONS)
back = ASTSource(
    kernel.restore_tiles, dict(table="*i64", part_of_tile="*i32", tiles="i32"), dict(ROWS=rows, COLS=cols, AT_ONCE=512)
)
triton.compile(back, target=target, options=dict(num_warps=4, enable_fp_fusion=False))
print(json.dumps(dict(shared=code.metadata.shared, ptx=code.asm["ptx"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stored", ["int16", "float16"])
@pytest.mark.parametrize("write", [False, True])
def test_the_kernel_compiles_for_devices_that_are_not_here_and_fuses_nothing(capability, stored, write):
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), stored, str(write)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout)
    assert code["shared"] <= 100 << 10
    assert "mma" in code["ptx"]  # products run on tensor cores
    assert "fma.rn.f32" not in code["ptx"]  # what is multiplied is rounded before it is added, in every kernel
    assert "ld.global.v4" in code["ptx"]
    assert ("st.global.v4" in code["ptx"]) == write
