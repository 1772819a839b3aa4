"""One batch over many changes: the compiled kernel and its twin against float64 loops over the rows."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from lorahub.engine.kernels import segmented_torch, trials
from lorahub.engine.kernels.segments import Segments

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
PLACES = ((5, 0), (3,), (1, 6, 2))  # row 4 has no change


@pytest.fixture
def kernel():
    return importlib.import_module("lorahub.engine.kernels.segmented_triton")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this platform compiles kernels for its device")
    return request.param


@pytest.fixture(params=["torch", "triton"])
def add(request, kernel):
    return segmented_torch.add_segments if request.param == "torch" else kernel.add_segments


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def problem(dtype, ranks, tokens, inputs, outputs, device="cpu"):
    """A batch of seven, its factors and scales; changes about as large as the output."""
    ups = [normal(outputs, rank, seed=rank, dtype=dtype, device=device) for rank in ranks]
    downs = [normal(rank, inputs, seed=50 + rank).div((rank * inputs) ** 0.5).to(device, dtype) for rank in ranks]
    segments = Segments.of(PLACES, ups, downs)
    scales = torch.tensor([0.5, 0.5, -1.0, 2.0, 2.0, 2.0], device=device)
    y = normal(7, tokens, outputs, seed=1, dtype=dtype, device=device)
    return y, normal(7, tokens, inputs, seed=2, dtype=dtype, device=device), segments, scales


def by_loop(y, x, segments, scales):
    result = y.double().clone()
    for row, which, scale in zip(segments.rows, segments.which, scales.tolist(), strict=True):
        result[row] += scale * (x[row].double() @ segments.downs[which].double().T @ segments.ups[which].double().T)
    return result


CASES = [  # tokens, inputs and outputs; ranks
    ((1, 64, 128), (16, 16, 16)),
    ((1, 37, 50), (1, 8, 33)),
    ((5, 1, 3), (2, 3, 4)),
    ((17, 1100, 130), (4, 17, 1)),  # several stretches of the inputs
    ((2, 130, 260), (64, 3, 128)),
]


@pytest.mark.parametrize(("sizes", "ranks"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_is_the_float64_sum_rounded_once(add, device, dtype, ranks, sizes):
    y, x, segments, scales = problem(dtype, ranks, *sizes, device=device)
    expected, found = by_loop(y, x, segments, scales), y.clone()
    add(found, x, segments, scales)
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    else:
        step = torch.finfo(dtype).eps * torch.maximum(expected.abs(), y.double().abs())
        assert ((found.double() - expected).abs() <= step).all()
        assert (found != expected.to(dtype)).double().mean() < 5e-3
    assert torch.equal(found[4], y[4])
    assert float((expected - y.double()).norm() / y.double().norm()) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_may_lie_in_memory_as_they_like_and_nothing_else_is_written(add, device, dtype):
    y, x, segments, scales = problem(dtype, (4, 7, 20), 5, 40, 24, device=device)
    expected = y.clone()
    add(expected, x, segments, scales)
    around = torch.full((5, 7, 2 * 24), 3.0, dtype=dtype, device=device)
    view = around.transpose(0, 1)[..., ::2]
    view.copy_(y)
    add(view, x.transpose(1, 2).contiguous().transpose(1, 2), segments, scales)
    steps = 64 if dtype == torch.float32 else 1
    torch.testing.assert_close(view, expected, rtol=steps * torch.finfo(dtype).eps, atol=1e-6)
    assert (around[..., 1::2] == 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_becomes_of_a_row_depends_on_the_row_alone(kernel, dtype):
    y, x, segments, scales = problem(dtype, (4, 7, 20), 3, 1100, 24)
    together = y.clone()
    kernel.add_segments(together, x, segments, scales)
    for at, (row, which) in enumerate(zip(segments.rows, segments.which, strict=True)):
        alone = Segments.of([[0]], [segments.ups[which]], [segments.downs[which]])
        found = y[row : row + 1].clone()
        kernel.add_segments(found, x[row : row + 1], alone, scales[at : at + 1])
        assert torch.equal(found[0], together[row])


def test_what_is_changed_is_known_to_autograd_as_changed(add):
    y, x, segments, scales = problem(torch.float32, (4, 7, 20), 1, 8, 8)
    product = torch.ones_like(y).requires_grad_() * y  # keeps y
    add(y, x, segments, scales)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_empty_batches_are_nothing_to_do(add):
    for tokens, inputs, outputs in ((0, 4, 4), (2, 4, 0), (2, 0, 4)):
        y, x, segments, scales = problem(torch.float32, (2, 3, 4), tokens, max(inputs, 1), outputs)
        before, x = y.clone(), x[..., :inputs]
        narrow = Segments.of(PLACES, segments.ups, [each[:, :inputs] for each in segments.downs])
        add(y, x, narrow, scales)
        assert torch.equal(y, before)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in DTYPES[1:])]
)
def test_a_kernel_that_gives_other_numbers_is_found_out(kernel, dtype):
    def wrong(y, x, segments, scales):
        kernel.add_segments(y, x, segments, scales)
        y[0, 0, 0] += 1

    def untouched(y, x, segments, scales):
        pass

    assert trials.adds_alike(kernel.add_segments, torch.device("cpu"), dtype=dtype)
    assert not trials.adds_alike(wrong, torch.device("cpu"), dtype=dtype)
    assert not trials.adds_alike(untouched, torch.device("cpu"), dtype=dtype)


COMPILE = """
import json, sys
import triton
import triton.language as language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorahub.engine.kernels import segmented_triton as kernel

SHORT = dict(bfloat16="*bf16", float16="*fp16", float32="*fp32")
capability, stored = int(sys.argv[1]), sys.argv[2]
half = stored == "bfloat16"
factor = getattr(language, stored)
alike = dict(FACTOR=factor, WIDE=True, TOKENS=kernel.TOKENS, RANKS=kernel.RANKS)
inward = dict(x_beside=1, PRODUCT="tf32", LONG=kernel.INPUTS[0], INPUTS=kernel.INPUTS[1]) | alike
outward = dict(y_beside=1, STORE=language.int16 if half else factor, OUTPUTS=kernel.OUTPUTS) | alike
pointers = dict(table="*i64", scales="*fp32", inner="*fp32", x=SHORT[stored], y="*i16" if half else SHORT[stored])
codes = []
for function, constants in ((kernel.shrink, inward), (kernel.expand, outward)):
    arguments = {name: pointers.get(name, "i32") for name in function.arg_names if name not in constants}
    even = {"inputs", "outputs", "x_row", "x_token", "y_row", "y_token", *pointers} & arguments.keys()
    places = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(function, arguments, constants, places)
    options = dict(num_warps=kernel._WARPS, enable_fp_fusion=False)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    codes.append(dict(shared=code.metadata.shared, ptx=code.asm["ptx"]))
print(json.dumps(codes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_the_kernels_compile_for_devices_that_are_not_here_and_move_16_bytes_at_a_time(capability, stored):
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), stored]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for code in json.loads(done.stdout):
        assert code["shared"] <= 100 << 10
        assert "mma" in code["ptx"]  # products run on tensor cores
        assert re.search(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], (16|0x10)", code["ptx"])
